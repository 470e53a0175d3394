"""Importing large libraries quickly."""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_frozen = False
"""By `freeze`; Python 3.12 counts some objects as frozen from its start."""


@contextmanager
def importing() -> Iterator[None]:
    """Collect no garbage while this block imports, and never look again at what is there once PyTorch is imported.

    What is imported stays, and Python would look through all of it again and again: a tenth to a fifth of the time that
    PyTorch takes to import, and as much once more until the first step. Only the first block that imports PyTorch does
    so: later there may be tensors, also of code that a recipe names, which somebody waits to be rid of.
    """
    collects, before = gc.isenabled(), "torch" in sys.modules
    gc.disable()
    try:
        yield
    finally:
        if not before and "torch" in sys.modules and not _frozen:
            freeze()
        if collects:
            gc.enable()


def freeze() -> None:
    """Have Python's collector of garbage never look again at what there is now."""
    global _frozen
    _frozen = True
    gc.freeze()
    atexit.unregister(_thaw)
    atexit.register(_thaw)


def _thaw() -> None:
    # at the end of a process its bindings print what was not collected, and it takes a while
    if "triton" in sys.modules:
        gc.unfreeze()
