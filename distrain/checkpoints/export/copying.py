"""Copies tensors, wherever they lie, into new files, and checks the bytes on their way.

The layout is computed first. Each file is then read once, in order, by whichever of a few threads is free: the bytes go
through a small buffer, are hashed there where the checkpoint has a hash of them, and are written to their offsets.
While one thread reads and hashes the next bytes of a file, others write those before. Small files are read several at a
time, and what of them lies side by side in a new file is written at once. Memory is bounded by the buffers, whatever
the model.
"""

from __future__ import annotations

import ctypes
import errno
import math
import os
import threading
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path

from distrain.checkpoints.dtypes import ITEM_SIZES, in_safetensors
from distrain.checkpoints.headers import pack_header
from distrain.checkpoints.sources import THREADS, Check, Part, Source, Stored
from distrain.run.heartbeat import progress
from distrain.system.errors import UserError

BUFFER = 1 << 18  # bytes that a thread reads, hashes, converts and writes at a time: they stay in its cache
_GATHERED = 1 << 20  # elements of a strided tensor that are gathered at a time
_SMALL = 4  # buffers that a file fills at most which is read whole
_BATCH = 16  # buffers' worth of small files that are read at a time
_MAX_OPEN = 128  # new files that are open at a time; well below the usual limit of 1024
_MAX_VIEWS = 512  # that one call writes; the system takes 1024


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


Write = Callable[[Sequence[memoryview], int], None]
"""Writes views one after the other into a new file, from an offset on. Threads may call it side by side."""

Placed = tuple[Output, Write, int]
"""A tensor to be written, what writes into its new file, and the tensor's offset there."""


@dataclass(slots=True)
class _Span:
    """Consecutive bytes of a file, and where they go."""

    offset: int
    nbytes: int
    output: Output
    write: Write
    target: int

    @property
    def end(self) -> int:
        return self.offset + self.nbytes

    @property
    def kept(self) -> bool:
        """Whether the bytes are written as they are."""
        return self.output.stored.dtype == self.output.dtype


def write_safetensors(
    source: Source,
    files: Mapping[Path, dict[str, Output]],
    *,
    metadata: dict[str, str] | None,
    flat: bool = False,
    checks: Sequence[Check] = (),
) -> None:
    """Write new files of the outputs in their order, which must put wide elements first; `flat`: as 1-D tensors.

    Raises UserError, with all the rest written, if bytes of the source are not those of the `checks`.
    """
    with _NewFiles() as new:
        placed: list[Placed] = []
        for path, outputs in files.items():
            entries = {name: in_safetensors(out.dtype, out.stored.spec.shape) for name, out in outputs.items()}
            if flat:
                entries = {name: (dtype, (math.prod(shape),)) for name, (dtype, shape) in entries.items()}
            header = pack_header(entries, metadata)
            *starts, end = accumulate((output.nbytes for output in outputs.values()), initial=len(header))
            write = new.add(path, end)
            write([memoryview(header)], 0)
            placed += [(output, write, start) for output, start in zip(outputs.values(), starts, strict=True)]
        copy_tensors(source, placed, checks)


class _NewFiles:
    """New files that are written in any order, of which few are open at a time. Use it in a `with` statement."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: OrderedDict[Path, list[int]] = OrderedDict()  # [descriptor, threads that write]
        self._idle = threading.Condition(self._lock)

    def add(self, path: Path, nbytes: int) -> Write:
        """Make a file of that size that must not exist yet; return what writes into it."""
        with self._lock:
            self._make_room()
            self._open[path] = [_make_file(path, nbytes), 0]
        return partial(self._write, path)

    def _write(self, path: Path, views: Sequence[memoryview], offset: int) -> None:
        with self._lock:
            entry = self._open.get(path)
            if entry is None:
                self._make_room()
                entry = self._open[path] = [os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW), 0]
            else:
                self._open.move_to_end(path)
            entry[1] += 1
        try:
            write_at(entry[0], views, offset)
        finally:
            with self._lock:
                entry[1] -= 1
                if not entry[1]:
                    self._idle.notify()

    def _make_room(self) -> None:
        """Close the file that was written longest ago, where as many are open as may be. The caller holds the lock."""
        while len(self._open) >= _MAX_OPEN:
            path = next((path for path, (_, threads) in self._open.items() if not threads), None)
            if path is None:
                self._idle.wait()
            else:
                os.close(self._open.pop(path)[0])

    def __enter__(self) -> _NewFiles:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor, _threads in self._open.values():
            os.close(descriptor)
        self._open.clear()


@contextmanager
def new_file(path: Path, nbytes: int) -> Iterator[int]:
    """Open a file of that size that must not exist yet."""
    descriptor = _make_file(path, nbytes)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _make_file(path: Path, nbytes: int) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        _allocate(descriptor, nbytes)
        os.ftruncate(descriptor, nbytes)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _allocate(descriptor: int, nbytes: int) -> None:
    """Reserve the file's place on the disk, if the file system can: writing costs a fifth less, and a full disk shows.

    Not `os.posix_fallocate`, which writes into each block where the file system cannot.
    """
    fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if fallocate is None or not nbytes:
        return
    fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    if fallocate(descriptor, 0, 0, nbytes) and (number := ctypes.get_errno()) in (errno.ENOSPC, errno.EDQUOT):
        raise OSError(number, os.strerror(number))


def copy_tensors(source: Source, placed: Iterable[Placed], checks: Sequence[Check] = ()) -> None:
    """Write each output's elements, in row-major order, from its offset in its file on.

    Raises UserError naming the files whose bytes are not those of the `checks`.
    """
    targets: dict[str, list[Placed]] = defaultdict(list)
    for each in placed:
        targets[each[0].name].append(each)
    streams: list[_Stream] = [*_streams(source, targets, checks)]
    streams += [
        _Gathering(source, *each) for name, found in targets.items() if not source.in_runs(name) for each in found
    ]
    _Work(streams).run()
    if bad := [check for stream in streams for check in stream.damaged]:
        raise source.damage(bad)


def _streams(source: Source, targets: Mapping[str, list[Placed]], checks: Sequence[Check]) -> Iterator[_Stream]:
    by_file: dict[int, list[Check]] = defaultdict(list)
    for check in sorted(checks, key=lambda check: (check.file, check.offset)):
        by_file[check.file].append(check)
    parts = source.parts({name for name in targets if source.in_runs(name)})
    small: list[tuple[Check, Callable[[], list[_Span]]]] = []
    for file in sorted(parts.keys() | by_file.keys()):
        listed = parts.get(file, list)
        whole = [check for check in by_file[file] if check.covers(source.files[file][1])]
        if whole and whole[0].nbytes <= _SMALL * BUFFER:
            small.append((whole[0], partial(_spans, listed, targets)))
            continue
        if whole or not by_file[file]:
            yield _Bytes(source, file, whole[0] if whole else None, partial(_spans, listed, targets))
            continue
        spans = _spans(listed, targets)
        offsets = [span.offset for span in spans]
        checked = 0
        rest: list[_Span] = []
        for check in by_file[file]:
            low, high = bisect_left(offsets, check.offset, checked), bisect_left(offsets, check.end, checked)
            inside = [span for span in spans[low:high] if span.end <= check.end]
            rest += [*spans[checked:low], *(span for span in spans[low:high] if span.end > check.end)]
            checked = high
            yield _Bytes(source, file, check, partial(list, inside))
        rest += spans[checked:]
        if rest:
            yield _Bytes(source, file, None, partial(list, rest))
    if small:
        yield _SmallFiles(source, small)


def _spans(listed: Callable[[], list[Part]], targets: Mapping[str, list[Placed]]) -> list[_Span]:
    """Return where the parts of a file go, in their order; what lies side by side both here and there is one."""
    spans: list[_Span] = []
    last: dict[Write, _Span] = {}
    for offset, nbytes, name, start in listed():
        for output, write, target in targets[name]:
            place = target + start * ITEM_SIZES[output.dtype]
            before = last.get(write)
            if (
                before is not None
                and before.kept
                and output.stored.dtype == output.dtype
                and before.end == offset
                and before.target + before.nbytes == place
            ):
                before.nbytes += nbytes
                continue
            last[write] = span = _Span(offset, nbytes, output, write, place)
            spans.append(span)
    return spans


class _Stream(ABC):
    """What threads take parts of, one at a time, and write side by side."""

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


class _Bytes(_Stream):
    """Bytes of one file that are read once, in their order: those of a check, or of spans alone."""

    def __init__(self, source: Source, file: int, check: Check | None, spans: Callable[[], list[_Span]]):
        super().__init__()
        self.source = source
        self.file = file
        self.check = check
        self._listed = spans
        self._spans: list[_Span] = []
        self._next = 0  # the first of the spans that is not read to its end
        self._descriptor: int | None = None
        self._reached = 0 if check is None else check.offset
        self._digest = None if check is None else check.begin()

    def take(self, buffer: memoryview) -> Callable[[], None] | None:
        """Read the next bytes into the buffer; return what writes them."""
        if self.ended:
            return None
        if self._descriptor is None:
            self._spans = self._listed()
            self._descriptor = self.source.open(self.file)
        begin, end = self._range(len(buffer))
        if begin == end:
            self.close()
            if self.check is not None and self._digest is not None and not self.check.holds(self._digest):
                self.damaged.append(self.check)
            return None
        view = buffer[: end - begin]
        _read(self._descriptor, view, begin)
        if self._digest is not None:
            self._digest.update(view)
        parts = []
        for span in self._upcoming(end):
            if span.end > begin:
                parts.append((span, max(begin, span.offset), min(end, span.end)))
        while self._next < len(self._spans) and self._spans[self._next].end <= end:
            self._next += 1
        self._reached = end
        return partial(_put, parts, view, begin)

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
        if self.check is not None:
            end = min(begin + length, self.check.end)
        elif self._next == len(self._spans):
            return begin, begin
        else:
            end = begin = max(begin, self._spans[self._next].offset)
            for span in self._upcoming(begin + length):
                if span.offset > end:
                    break
                end = max(end, min(span.end, begin + length))
        read = end
        while cut := max(map(partial(_beyond, end), self._upcoming(end)), default=0):
            end -= cut
        if begin >= end < read:
            raise UserError(f"{self.source.files[self.file][0]}: tensors of several dtypes share bytes of it")
        return begin, end


class _SmallFiles(_Stream):
    """Files that are read whole, several at a time, so that parts of a tensor which each has a few of come together."""

    def __init__(self, source: Source, files: Sequence[tuple[Check, Callable[[], list[_Span]]]]):
        super().__init__()
        self.source = source
        self._files = deque(files)
        self._free: list[memoryview] = []

    def take(self, buffer: memoryview) -> Callable[[], None] | None:
        """Return what reads the next files and writes what is in them."""
        batch, nbytes = [], 0
        while not self.ended and self._files and nbytes + self._files[0][0].nbytes <= _BATCH * BUFFER:
            batch.append(self._files.popleft())
            nbytes += batch[-1][0].nbytes
        if not batch:
            self.ended = True
            return None
        return partial(self._copy, batch)

    def _copy(self, batch: Sequence[tuple[Check, Callable[[], list[_Span]]]]) -> None:
        buffer = self._free.pop() if self._free else memoryview(bytearray(_BATCH * BUFFER))
        kept: dict[Write, list[tuple[int, memoryview]]] = defaultdict(list)
        reached = 0
        for check, listed in batch:
            view = buffer[reached : reached + check.nbytes]
            reached += check.nbytes
            descriptor = self.source.open(check.file)
            try:
                _read(descriptor, view, 0)
            finally:
                os.close(descriptor)
            hashed = check.begin()
            hashed.update(view)
            if not check.holds(hashed):
                self.damaged.append(check)
                continue
            for span in listed():
                if span.kept:
                    kept[span.write].append((span.target, view[span.offset : span.end]))
                else:
                    _put([(span, span.offset, span.end)], view, 0)
        for write, pieces in kept.items():
            _write_together(write, pieces)
        self._free.append(buffer)


def _write_together(write: Write, pieces: list[tuple[int, memoryview]]) -> None:
    """Write pieces of a new file, those side by side in one call."""
    pieces.sort(key=lambda piece: piece[0])
    start = end = 0
    views: list[memoryview] = []
    for target, view in pieces:
        if views and (target != end or len(views) == _MAX_VIEWS):
            write(views, start)
            views = []
        if not views:
            start = end = target
        views.append(view)
        end += len(view)
    if views:
        write(views, start)


class _Gathering(_Stream):
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
        size, new_size = ITEM_SIZES[self.output.stored.dtype], ITEM_SIZES[self.output.dtype]
        raw = self.source.gather(self.output.name, start, count).data
        for done in range(0, count, BUFFER // size or 1):
            part = raw[done * size : (done + (BUFFER // size or 1)) * size]
            self.write([_converted(part, self.output)], self.target + (start + done) * new_size)


class _Work:
    """Threads that copy streams: each one of its own, and once all are begun, one that others work on."""

    def __init__(self, streams: Sequence[_Stream]):
        self._waiting = deque(streams)
        self._begun: list[_Stream] = []
        self._lock = threading.Lock()
        self._stopped = threading.Event()

    def run(self) -> None:
        """Copy all; the first error of a thread ends it."""
        with ThreadPoolExecutor(THREADS) as pool:
            try:
                for done in [pool.submit(self._run_thread) for _ in range(THREADS)]:
                    done.result()
            finally:
                self._stopped.set()

    def _run_thread(self) -> None:
        buffer = memoryview(bytearray(BUFFER))
        while (stream := self._choose()) is not None:
            try:
                self._copy(stream, buffer)
            except BaseException:
                self._stopped.set()
                with stream.lock:
                    stream.close()
                raise
            with self._lock:
                stream.threads -= 1

    def _copy(self, stream: _Stream, buffer: memoryview) -> None:
        while True:
            with stream.lock:
                if self._stopped.is_set():
                    stream.close()
                write = stream.take(buffer)
            if write is None:
                return
            write()
            progress()

    def _choose(self) -> _Stream | None:
        with self._lock:
            if self._stopped.is_set():
                return None
            self._begun = [stream for stream in self._begun if not stream.ended]
            if self._waiting:
                self._begun.append(self._waiting.popleft())
            stream = min(self._begun, key=lambda stream: stream.threads, default=None)
            if stream is not None:
                stream.threads += 1
            return stream


def _beyond(end: int, span: _Span) -> int:
    """Return how many bytes of an element that is converted lie before `end`, which cuts it."""
    cuts = not span.kept and span.end > end
    return (end - span.offset) % ITEM_SIZES[span.output.stored.dtype] if cuts else 0


def _put(parts: Sequence[tuple[_Span, int, int]], view: memoryview, begin: int) -> None:
    """Write what was read from `begin` on to where each part of it goes."""
    for span, low, high in parts:
        output = span.output
        raw = view[low - begin : high - begin]
        size, new_size = ITEM_SIZES[output.stored.dtype], ITEM_SIZES[output.dtype]
        span.write([_converted(raw, output)], span.target + (low - span.offset) // size * new_size)


def _converted(raw: memoryview, output: Output) -> memoryview:
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


def _read(descriptor: int, view: memoryview, offset: int) -> None:
    while view:
        count = os.preadv(descriptor, [view], offset)
        if count == 0:
            raise UserError(f"a file of the checkpoint ended before byte {offset} while it was being read")
        view, offset = view[count:], offset + count


def write_at(descriptor: int, views: Sequence[memoryview], offset: int) -> None:
    """Write views of bytes one after the other, from an offset on."""
    if len(views) > 1:
        done = os.pwritev(descriptor, views, offset)
        if done == sum(map(len, views)):
            return
    else:
        done = 0
    for view in views:
        skipped = min(done, len(view))
        done, offset, view = done - skipped, offset + skipped, view[skipped:]
        while view:
            count = os.pwrite(descriptor, view, offset)
            view, offset = view[count:], offset + count
