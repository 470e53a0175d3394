"""Copies short parts of tensors: what many files have of a tensor is read into a window, and written at once."""

from __future__ import annotations

import math
import os
from bisect import bisect_right
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import accumulate
from operator import add, floordiv, itemgetter

from distrain.checkpoints.dtypes import ITEM_SIZES
from distrain.checkpoints.export import streams
from distrain.checkpoints.export.new_files import Write
from distrain.checkpoints.export.streams import Output, Placed, Stream, Unit, converted_parts, read_into
from distrain.checkpoints.rank_files import Part
from distrain.checkpoints.sources import Source
from distrain.run.heartbeat import progress

WINDOW = 2 << 20
"""Bytes of short parts that a thread reads before it writes them: they stay in the cache of a core in between."""
FEW = 8
"""With fewer files there is too little to bring together."""
SHORT = 1 << 16
"""Bytes of a part, on average, from which on each is written by itself."""
_MOST_PARTS = 30_000  # that are listed for a window: they take some 200 bytes each
_MOST_FILES = 256  # that are open for a window
_MAX_VIEWS = 512  # that one call writes; the system takes 1024


class ShortParts(Stream):
    """Units with short parts, several read in turns, so that what they have of a tensor comes together.

    With F units a window holds 1 / F of a window's bytes of each: that takes F reads, and as many writes as there are
    tensors in so many bytes. F is chosen so that both are about as many.
    """

    most_threads = 2  # one reads while another writes

    def __init__(self, source: Source, units: Sequence[Unit], targets: Mapping[str, list[Placed]], parts: float):
        super().__init__()
        self.source = source
        self.targets = targets
        self._units = deque(units)
        in_window = WINDOW * len(units) / max(sum(unit.kept for unit in units), 1)  # units, whole ones
        wanted = max(math.sqrt(parts * in_window), in_window)  # `parts`: of one unit
        self._together = max(1, int(min(wanted, _MOST_PARTS / max(parts, 1), _MOST_FILES)))
        self._free: list[_Window] = []

    def take(self, buffer: memoryview) -> Callable[[], None] | None:
        """Return what copies the next units."""
        if self.ended or not self._units:
            self.ended = True
            return None
        batch = [self._units.popleft() for _ in range(min(self._together, len(self._units)))]
        return partial(self._copy, batch, buffer)

    def _copy(self, batch: Sequence[Unit], buffer: memoryview) -> None:
        window = self._free.pop() if self._free else _Window(self.targets)
        with ExitStack() as opened:
            readings = [_Reading(self.source, unit, self.targets, buffer, opened) for unit in batch]
            share = WINDOW // len(readings)
            while any([reading.read(window, share) for reading in readings]):  # noqa: C419 (each reads its share)
                window.write()
                progress()
        window.write()
        self._free.append(window)
        self.damaged += [reading.unit.check for reading in readings if reading.unit.check and not reading.holds]


class _Reading:
    """A unit that is read in its order, a share of a window at a time."""

    def __init__(
        self,
        source: Source,
        unit: Unit,
        targets: Mapping[str, list[Placed]],
        buffer: memoryview,
        opened: ExitStack,
    ):
        self.unit = unit
        self.holds = True
        """Whether its check does, once it is read."""
        self._buffer = buffer
        self._parts = _cut(unit.listed(), targets)
        self._sums = [0, *accumulate(part[1] for part in self._parts)]
        self._next = 0
        self._done = False
        self._hashed = None if unit.check is None else unit.check.begin()
        self._reached = 0 if unit.check is None else unit.check.offset
        self._descriptor = source.open(unit.file)
        opened.callback(os.close, self._descriptor)

    def read(self, window: _Window, share: int) -> bool:
        """Read parts of so many bytes, at least one, and hash what is of no part; return whether there are more."""
        if self._done:
            return False
        first = self._next
        self._next = max(first + 1, bisect_right(self._sums, self._sums[first] + share) - 1)
        for begin, end, parts in _stretches(self._parts[first : self._next]):
            self._skip(begin)
            view = window.room(end - begin)
            read_into(self._descriptor, view, begin)
            if self._hashed is not None and end > self._reached:  # tied tensors may lie over each other
                self._hashed.update(view[self._reached - begin :])
                self._reached = end
            window.add(view, begin, parts)
        if self._next < len(self._parts):
            return True
        if self.unit.check is not None and self._hashed is not None:
            self._skip(self.unit.check.end)
            self.holds = self.unit.check.holds(self._hashed)
        self._done = True
        return False

    def _skip(self, end: int) -> None:
        """Hash what lies before `end`."""
        while self._hashed is not None and self._reached < end:
            view = self._buffer[: end - self._reached]
            read_into(self._descriptor, view, self._reached)
            self._hashed.update(view)
            self._reached += len(view)


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

    def room(self, nbytes: int) -> memoryview:
        """Return memory for so many bytes of parts."""
        if nbytes > len(self._memory) - self._reached:
            self.write()
        self._reached += nbytes
        return self._memory[self._reached - nbytes : self._reached]

    def add(self, view: memoryview, begin: int, parts: Sequence[Part]) -> None:
        """Add what was read from `begin` on."""
        # called for a million parts: nearly all that is done for each is done by what zip and map call
        offsets, nbytes, names, starts = zip(*parts, strict=True)
        row = self._latest.get(names)
        if row is None or row.stops != starts:
            sizes = [_item_size(self.targets[name]) for name in names]
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


def _item_size(placed: Sequence[Placed]) -> int:
    return ITEM_SIZES[placed[0][0].stored.dtype]


def _cut(parts: list[Part], targets: Mapping[str, list[Placed]]) -> list[Part]:
    """Return the parts with long ones, which a window may not have room for, as several."""
    most = max(WINDOW // 64 * 16, 16)  # of whole elements, whatever their size
    if max((part[1] for part in parts), default=0) <= most:
        return parts
    return [
        (offset + done, min(most, nbytes - done), name, start + done // _item_size(targets[name]))
        for offset, nbytes, name, start in parts
        for done in range(0, nbytes, most)
    ]


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
