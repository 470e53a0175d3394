"""Importing large libraries quickly."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Collect no garbage while this block imports, and never look again at what was there when it had imported PyTorch.

    What is imported stays, and Python would look through all of it again and again: a tenth to a fifth of the time that
    PyTorch takes to import, and as much once more until the first step. Where PyTorch was there before, there may be
    tensors too, which somebody waits to be rid of.
    """
    collects, before = gc.isenabled(), "torch" in sys.modules
    gc.disable()
    try:
        yield
    finally:
        if not before and "torch" in sys.modules:
            gc.freeze()
        if collects:
            gc.enable()
