"""What copies the parts of tensors: work that threads take turns at."""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from distrain.checkpoints.dtypes import ITEM_SIZES
from distrain.checkpoints.export.new_files import Write
from distrain.checkpoints.rank_files import Part
from distrain.checkpoints.sources import THREADS, Check, Source, Stored
from distrain.system.errors import UserError

BUFFER = 1 << 20  # bytes that a thread reads, hashes, converts and writes at a time: they stay in its cache
_GATHERED = 1 << 20  # elements of a strided tensor that are gathered at a time


@dataclass(frozen=True, slots=True)
class Output:
    """A tensor to be written."""

    name: str
    """In the source."""
    stored: Stored
    dtype: str
    """In the new file."""

    @property
    def nbytes(self) -> int:
        """Bytes in the new file."""
        return self.stored.spec.numel * ITEM_SIZES[self.dtype]

    @property
    def kept(self) -> bool:
        """Whether the bytes are written as they are."""
        return self.stored.dtype == self.dtype


Placed = tuple[Output, Write, int]
"""A tensor to be written, what writes into its new file, and the tensor's offset there."""


@dataclass(frozen=True, slots=True)
class Unit:
    """Bytes of one file that are read once, in their order: those of a check, or of the parts alone."""

    file: int
    check: Check | None
    listed: Callable[[], list[Part]]
    """Returns the parts of tensors in it, in their order."""
    kept: float
    """About so many bytes are of those parts."""


class Stream(ABC):
    """What threads take parts of, one at a time, and write side by side."""

    most_threads = THREADS
    """That work on it at a time."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.ended = False
        self.damaged: list[Check] = []
        """What was read and does not hold."""
        self.threads = 0
        """How many work on it; `_Work` counts."""

    @abstractmethod
    def take(self, buffer: memoryview) -> Callable[[], None] | None:
        """Return what writes the next part, None at the end. The caller holds the lock, and owns the buffer."""

    def close(self) -> None:
        """Take no more."""
        self.ended = True


class Gathering(Stream):
    """A tensor whose elements lie apart."""

    def __init__(self, source: Source, output: Output, write: Write, target: int):
        super().__init__()
        self.source = source
        self.output = output
        self.write = write
        self.target = target
        self._reached = 0

    def take(self, buffer: memoryview) -> Callable[[], None] | None:
        """Return what gathers and writes the next elements."""
        start, numel = self._reached, self.output.stored.spec.numel
        if self.ended or start >= numel:
            self.ended = True
            return None
        self._reached += _GATHERED
        return partial(self._gather, start, min(_GATHERED, numel - start))

    def _gather(self, start: int, count: int) -> None:
        place = self.target + start * ITEM_SIZES[self.output.dtype]
        for part in converted_parts(self.source.gather(self.output.name, start, count).data, self.output):
            self.write([part], place)
            place += len(part)


def converted(raw: memoryview, output: Output) -> memoryview:
    """Return stored bytes in the output's dtype; raises UserError for finite values that become infinite."""
    if output.stored.dtype == output.dtype:
        return raw
    import numpy as np  # most exports convert nothing

    from distrain.checkpoints.floats import convert

    rounded, overflowed = convert(np.frombuffer(raw, np.uint8), output.stored.dtype, output.dtype)
    if overflowed:
        raise UserError(
            f"{output.name} has values that are too large for {output.dtype} (at least {overflowed}); "
            "export it as bf16 or fp32"
        )
    return rounded.data


def converted_parts(raw: memoryview, output: Output) -> Iterator[memoryview]:
    """Yield stored bytes in the output's dtype, a buffer at a time."""
    size = ITEM_SIZES[output.stored.dtype]
    most = BUFFER // size * size or size
    for begin in range(0, len(raw), most):
        yield converted(raw[begin : begin + most], output)


def read_into(descriptor: int, view: memoryview, offset: int) -> None:
    """Fill a view from an offset of an open file on; raises UserError where it has no more."""
    while view:
        count = os.preadv(descriptor, [view], offset)
        if count == 0:
            raise UserError(f"a file of the checkpoint ended before byte {offset} while it was being read")
        view, offset = view[count:], offset + count
