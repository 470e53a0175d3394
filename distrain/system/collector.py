"""Python's search for cycles among objects, put off where many objects come into being that have none.

What reads or writes the manifest of a checkpoint makes a few objects for each tensor. Each time their number has grown
by a quarter, the collector looks at every object of the process, and every thread waits for it.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_inside = 0
_was_on = False


@contextmanager
def no_collection() -> Iterator[None]:
    """Have no garbage collected while this block runs, in any thread; objects without cycles are freed as ever."""
    global _inside, _was_on
    with _lock:
        if _inside == 0:
            _was_on = gc.isenabled()
            gc.disable()
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0 and _was_on:
                gc.enable()
