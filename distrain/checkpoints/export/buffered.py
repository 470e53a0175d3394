"""Copies long parts of tensors: a buffer at a time, which threads write side by side."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from distrain.checkpoints.dtypes import ITEM_SIZES
from distrain.checkpoints.export.new_files import Write
from distrain.checkpoints.export.streams import Output, Placed, Stream, Unit, converted, read_into
from distrain.checkpoints.rank_files import Part
from distrain.checkpoints.sources import Source
from distrain.system.errors import UserError


@dataclass(slots=True)
class _Span:
    """Consecutive bytes of a file, and where they go."""

    offset: int
    end: int
    output: Output
    write: Write
    target: int
    kept: bool
    """Whether the bytes are written as they are."""


def _spans(listed: Iterable[Part], targets: Mapping[str, list[Placed]]) -> list[_Span]:
    """Return where the parts of a file go, in their order; what lies side by side both here and there is one."""
    spans: list[_Span] = []
    last: dict[Write, _Span] = {}
    for offset, nbytes, name, start in listed:
        for output, write, target in targets[name]:
            place = target + start * ITEM_SIZES[output.dtype]
            before, kept = last.get(write), output.kept
            if (
                before is not None
                and before.kept
                and kept
                and before.end == offset
                and before.target + before.end - before.offset == place
            ):
                before.end += nbytes
                continue
            last[write] = span = _Span(offset, offset + nbytes, output, write, place, kept)
            spans.append(span)
    return spans


class ByteStream(Stream):
    """A unit that is read a buffer at a time, which threads write side by side."""

    def __init__(self, source: Source, unit: Unit, targets: Mapping[str, list[Placed]]):
        super().__init__()
        self.source = source
        self.unit = unit
        self.targets = targets
        self._spans: list[_Span] = []
        self._next = 0  # the first of the spans that is not read to its end
        self._converts = False
        self._descriptor: int | None = None
        self._reached = 0 if unit.check is None else unit.check.offset
        self._digest = None if unit.check is None else unit.check.begin()

    def take(self, buffer: memoryview) -> Callable[[], None] | None:
        """Read the next bytes into the buffer; return what writes them."""
        if self.ended:
            return None
        if self._descriptor is None:
            self._spans = _spans(self.unit.listed(), self.targets)
            self._converts = not all(span.kept for span in self._spans)
            self._descriptor = self.source.open(self.unit.file)
        begin, end = self._range(len(buffer))
        if begin == end:
            self.close()
            check = self.unit.check
            if check is not None and self._digest is not None and not check.holds(self._digest):
                self.damaged.append(check)
            return None
        view = buffer[: end - begin]
        read_into(self._descriptor, view, begin)
        if self._digest is not None:
            self._digest.update(view)
        spans = [span for span in self._upcoming(end) if span.end > begin]
        while self._next < len(self._spans) and self._spans[self._next].end <= end:
            self._next += 1
        self._reached = end
        return partial(_put, spans, view, begin, end)

    def close(self) -> None:
        """Close the file."""
        super().close()
        self._spans = []
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _upcoming(self, end: int) -> Iterator[_Span]:
        """Yield the spans that begin before `end` and may not be read to their ends."""
        for index in range(self._next, len(self._spans)):
            if self._spans[index].offset >= end:
                return
            yield self._spans[index]

    def _range(self, length: int) -> tuple[int, int]:
        """Return the bytes to read next, [begin, end), which cut no element that is converted."""
        begin = self._reached
        if self.unit.check is not None:
            end = min(begin + length, self.unit.check.end)
        elif self._next == len(self._spans):
            return begin, begin
        else:
            end = begin = max(begin, self._spans[self._next].offset)
            for span in self._upcoming(begin + length):
                if span.offset > end:
                    break
                end = max(end, min(span.end, begin + length))
        if self._converts:
            read = end
            while cut := max(map(partial(_beyond, end), self._upcoming(end)), default=0):
                end -= cut
            if begin >= end < read:
                raise UserError(f"{self.source.files[self.unit.file][0]}: tensors of several dtypes share bytes of it")
        return begin, end


def _beyond(end: int, span: _Span) -> int:
    """Return how many bytes of an element that is converted lie before `end`, which cuts it."""
    cuts = not span.kept and span.end > end
    return (end - span.offset) % ITEM_SIZES[span.output.stored.dtype] if cuts else 0


def _put(spans: Sequence[_Span], view: memoryview, begin: int, end: int) -> None:
    """Write what was read of [begin, end) to where each part of it goes."""
    for span in spans:
        low = max(begin, span.offset)
        raw = view[low - begin : min(end, span.end) - begin]
        if span.kept:
            span.write([raw], span.target + low - span.offset)
        else:
            output = span.output
            size, new_size = ITEM_SIZES[output.stored.dtype], ITEM_SIZES[output.dtype]
            span.write([converted(raw, output)], span.target + (low - span.offset) // size * new_size)
