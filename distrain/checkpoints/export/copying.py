"""Copies tensors, wherever they lie, into new files, and checks the bytes on their way.

The layout is computed first. Each file is then read once, in order, and its bytes are hashed where the checkpoint has a
hash of them. Those of large files go through a small buffer: while one thread reads and hashes the next, others write
those before. Files of which several fit a window of memory are read there, and what they have of a tensor is written at
once: system calls are made for each file and each window, not for each piece. Memory is bounded by buffers and windows,
whatever the model.
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import accumulate
from pathlib import Path

from distrain.checkpoints.dtypes import in_safetensors
from distrain.checkpoints.export import streams, windows
from distrain.checkpoints.export.buffered import ByteStream
from distrain.checkpoints.export.new_files import NewFiles
from distrain.checkpoints.export.streams import Gathering, Output, Placed, Stream, Unit
from distrain.checkpoints.export.windows import ShortParts
from distrain.checkpoints.headers import pack_header
from distrain.checkpoints.rank_files import Part
from distrain.checkpoints.sources import THREADS, Check, Source
from distrain.run.heartbeat import progress


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
    with NewFiles(len(files)) as new:
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


def copy_tensors(source: Source, placed: Iterable[Placed], checks: Sequence[Check] = ()) -> None:
    """Write each output's elements, in row-major order, from its offset in its file on.

    Raises UserError naming the files whose bytes are not those of the `checks`.
    """
    targets: dict[str, list[Placed]] = defaultdict(list)
    for each in placed:
        targets[each[0].name].append(each)
    names = {name for name in targets if source.in_runs(name)}
    units = [*_units(source, names, checks)]
    parts, nbytes = source.count_parts(names), sum(source.tensors[name].nbytes for name in names)
    work: list[Stream]
    if len(units) >= windows.FEW and nbytes / max(parts, 1) < windows.SHORT:
        work = [ShortParts(source, units, targets, parts / len(units))]
    else:
        work = [ByteStream(source, unit, targets) for unit in units]
    work += [Gathering(source, *each) for name, found in targets.items() if not source.in_runs(name) for each in found]
    _Work(work).run()
    if bad := [check for stream in work for check in stream.damaged]:
        raise source.damage(bad)


def _units(source: Source, names: Collection[str], checks: Sequence[Check]) -> Iterator[Unit]:
    by_file: dict[int, list[Check]] = defaultdict(list)
    for check in sorted(checks, key=lambda check: (check.file, check.offset)):
        by_file[check.file].append(check)
    parts = source.parts(names)
    stored = sum(source.tensors[name].nbytes for name in names)
    share = min(1.0, stored / max(1, sum(source.files[file][1] for file in parts)))
    for file in sorted(parts.keys() | by_file.keys()):
        listed, size = parts.get(file, list), source.files[file][1]
        whole = [check for check in by_file[file] if check.covers(size)]
        if whole or not by_file[file]:
            yield Unit(file, whole[0] if whole else None, listed, size * share)
            continue
        found = listed()
        offsets = [part[0] for part in found]
        checked = 0
        rest: list[Part] = []
        for check in by_file[file]:
            low, high = bisect_left(offsets, check.offset, checked), bisect_left(offsets, check.end, checked)
            inside = [part for part in found[low:high] if part[0] + part[1] <= check.end]
            rest += [*found[checked:low], *(part for part in found[low:high] if part[0] + part[1] > check.end)]
            checked = high
            yield Unit(file, check, partial(list, inside), sum(part[1] for part in inside))
        if rest := rest + found[checked:]:
            yield Unit(file, None, partial(list, rest), sum(part[1] for part in rest))


class _Work:
    """Threads that copy streams: each one of its own, and once all are begun, one that others work on."""

    def __init__(self, work: Sequence[Stream]):
        self._waiting = deque(work)
        self._begun: list[Stream] = []
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
        buffer = memoryview(bytearray(streams.BUFFER))
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

    def _copy(self, stream: Stream, buffer: memoryview) -> None:
        while True:
            with stream.lock:
                if self._stopped.is_set():
                    stream.close()
                write = stream.take(buffer)
            if write is None:
                return
            write()
            progress()

    def _choose(self) -> Stream | None:
        with self._lock:
            if self._stopped.is_set():
                return None
            self._begun = [stream for stream in self._begun if not stream.ended]
            if self._waiting:
                self._begun.append(self._waiting.popleft())
            free = [stream for stream in self._begun if stream.threads < stream.most_threads]
            stream = min(free, key=lambda stream: stream.threads, default=None)
            if stream is not None:
                stream.threads += 1
            return stream
