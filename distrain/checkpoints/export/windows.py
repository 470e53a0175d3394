"""Copies short parts of tensors: what many files have of a tensor is read into a window, and written at once."""

from __future__ import annotations

import os
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from operator import add, floordiv, itemgetter

from distrain.checkpoints.dtypes import ITEM_SIZES
from distrain.checkpoints.export import streams
from distrain.checkpoints.export.new_files import Write
from distrain.checkpoints.export.streams import Output, Placed, Stream, Unit, converted_parts, read_into
from distrain.checkpoints.rank_files import Part
from distrain.checkpoints.sources import Hash, Source
from distrain.run.heartbeat import progress

WINDOW = 16 << 20
"""Bytes of short parts that a thread reads before it writes them."""
_MAX_VIEWS = 512  # that one call writes; the system takes 1024


class SmallUnits(Stream):
    """Units of which several fit a window."""

    most_threads = 2  # one reads while another writes

    def __init__(self, source: Source, units: deque[Unit], targets: Mapping[str, list[Placed]]):
        super().__init__()
        self.source = source
        self.targets = targets
        self._units = units
        self._free: list[_Window] = []

    def take(self, buffer: memoryview) -> Callable[[], None] | None:
        """Return what copies the next units, as many as fit a window."""
        batch: list[Unit] = []
        kept = 0.0
        while not self.ended and self._units and kept + self._units[0].kept <= WINDOW:
            batch.append(self._units.popleft())
            kept += batch[-1].kept
        if not batch:
            self.ended = True
            return None
        return partial(self._copy, batch, buffer)

    def _copy(self, batch: Sequence[Unit], buffer: memoryview) -> None:
        window = self._free.pop() if self._free else _Window(self.targets)
        for unit in batch:
            descriptor = self.source.open(unit.file)
            try:
                same = window.read(descriptor, unit, buffer)
            finally:
                os.close(descriptor)
            if not same and unit.check is not None:
                self.damaged.append(unit.check)
            progress()
        window.write()
        self._free.append(window)


class _Row:
    """What consecutive files hold of the same tensors, in a window: of each tensor what lies side by side."""

    def __init__(self, names: Sequence[str], sizes: Sequence[int], starts: Sequence[int]):
        self.names = names
        self.sizes = sizes
        """Bytes of an element."""
        self.starts = starts
        """The index of each one's first element."""
        self.stops = starts
        self.files: list[list[memoryview]] = []


class _Window:
    """Memory that files are read into, until what lies side by side in new files is written."""

    def __init__(self, targets: Mapping[str, list[Placed]]):
        self.targets = targets
        self._memory = memoryview(bytearray(WINDOW))
        self._reached = 0
        self._rows: list[_Row] = []
        self._latest: dict[Sequence[str], _Row] = {}  # of those names

    def read(self, descriptor: int, unit: Unit, buffer: memoryview) -> bool:
        """Read a unit from its open file, and through the buffer what is of no part; return whether its check holds."""
        check = unit.check
        hashed = None if check is None else check.begin()
        reached = 0 if check is None else check.offset
        for begin, end, parts in _stretches(unit.listed()):
            if hashed is not None:
                _hash(hashed, descriptor, reached, begin, buffer)
            reached = end
            if end - begin > len(self._memory) - self._reached:
                self.write()
            view = self._memory[self._reached : self._reached + end - begin]
            self._reached += len(view)
            read_into(descriptor, view, begin)
            if hashed is not None:
                hashed.update(view)
            self._add(view, begin, parts)
        if check is None or hashed is None:
            return True
        _hash(hashed, descriptor, reached, check.end, buffer)
        return check.holds(hashed)

    def _add(self, view: memoryview, begin: int, parts: Sequence[Part]) -> None:
        # called for a million parts: nearly all that is done for each is done by what zip and map call
        offsets, nbytes, names, starts = zip(*parts, strict=True)
        row = self._latest.get(names)
        if row is None or row.stops != starts:
            sizes = [ITEM_SIZES[self.targets[name][0][0].stored.dtype] for name in names]
            row = self._latest[names] = _Row(names, sizes, starts)
            self._rows.append(row)
        bounds = [(offset - begin, offset - begin + count) for offset, count in zip(offsets, nbytes, strict=True)]
        row.files.append([view[low:high] for low, high in bounds])
        row.stops = tuple(map(add, starts, map(floordiv, nbytes, row.sizes)))

    def write(self) -> None:
        """Write all that is here, and forget it."""
        kept: dict[Write, list[_Run]] = defaultdict(list)
        for row in self._rows:
            columns = zip(*row.files, strict=True)
            each = zip(row.names, row.sizes, row.starts, row.stops, columns, strict=True)
            for name, size, start, stop, views in each:
                for output, write, target in self.targets[name]:
                    place = target + start * ITEM_SIZES[output.dtype]
                    if output.kept:
                        kept[write].append((place, (stop - start) * size, views))
                    else:
                        _write_converted(output, write, place, views)
        for write, runs in kept.items():
            _write_together(write, runs)
        self._reached = 0
        self._rows.clear()
        self._latest.clear()


_Run = tuple[int, int, Sequence[memoryview]]
"""Consecutive bytes of a new file: their offset, how many, and their views."""


def _stretches(parts: list[Part]) -> Iterator[tuple[int, int, list[Part]]]:
    """Yield (begin, end, parts) of the bytes of a file that are of parts."""
    first = end = 0
    offsets = [part[0] for part in parts]
    ends = [part[0] + part[1] for part in parts]
    if parts and offsets[1:] == ends[:-1]:  # as they lie in most files
        yield offsets[0], ends[-1], parts
        return
    for index, offset in enumerate(offsets):
        if offset > end:
            if index > first:
                yield offsets[first], end, parts[first:index]
            first = index
        end = max(end, ends[index])
    if parts:
        yield offsets[first], end, parts[first:]


def _hash(hashed: Hash, descriptor: int, begin: int, end: int, buffer: memoryview) -> None:
    while begin < end:
        view = buffer[: end - begin]
        read_into(descriptor, view, begin)
        hashed.update(view)
        begin += len(view)


def _write_together(write: Write, runs: list[_Run]) -> None:
    """Write runs of a new file, those side by side in one call."""
    runs.sort(key=itemgetter(0))
    start = end = 0
    views: list[memoryview] = []
    for place, nbytes, more in [*runs, (-1, 0, ())]:
        if place != end:
            for index in range(0, len(views), _MAX_VIEWS):
                together = views[index : index + _MAX_VIEWS]
                write(together, start)
                start += sum(map(len, together))
            start, end, views = place, place, []
        views += more
        end += nbytes


def _write_converted(output: Output, write: Write, place: int, views: Iterable[memoryview]) -> None:
    for raw in _joined(views):
        for part in converted_parts(raw, output):
            write([part], place)
            place += len(part)


def _joined(views: Iterable[memoryview]) -> Iterator[memoryview]:
    """Yield the bytes of the views, short ones joined to at most a buffer."""
    held: list[memoryview] = []
    nbytes = 0
    for view in views:
        if held and nbytes + len(view) > streams.BUFFER:
            yield memoryview(b"".join(held))
            held, nbytes = [], 0
        held.append(view)
        nbytes += len(view)
    yield held[0] if len(held) == 1 else memoryview(b"".join(held))
