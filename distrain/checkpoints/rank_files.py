"""What the file of each rank holds, by the manifest, and whether its header lists that.

Of a thousand ranks nearly all hold as much of each tensor as the next: their headers differ in the numbers of the first
elements alone. So a header is compared to the text that it must be, and parsed only where it is another.
"""

from __future__ import annotations

import os
import threading
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain, repeat
from operator import add, mul
from pathlib import Path

from distrain.checkpoints.dtypes import ITEM_SIZES
from distrain.checkpoints.files import open_descriptor
from distrain.checkpoints.format import CheckpointError, FileInfo, Manifest, piece_key
from distrain.checkpoints.headers import Header, flat_entry, header_text, padded, read_header

Part = tuple[int, int, str, int]
"""Consecutive elements in a file: offset in bytes, bytes, the full tensor's name, index of the first element in it."""

_Run = tuple[int, str, str, int, int, int, int]
"""(- bytes of an element, dtype, name, start, file, file behind the last, elements in each): sorted as files are."""

_KEPT = 4  # kinds of files that are remembered: where one tensor's shares differ by a row, two kinds take turns


@dataclass(frozen=True, slots=True)
class _Kind:
    """What files that hold as much of each tensor have in common."""

    names: list[str]
    entries: list[tuple[str, int]]
    """Of each piece, in the order of the file: dtype and elements."""
    sizes: list[int]
    """The same in bytes."""
    header: str
    """With %d for the number of each piece's first element."""


@dataclass(frozen=True, slots=True)
class RankFile:
    """What one file must hold."""

    kind: _Kind
    starts: list[int]
    """The index of each piece's first element."""
    header: bytes
    """As `layout.lay_out` writes it."""

    def parts(self) -> list[Part]:
        """Return its pieces in their order, where that is its header."""
        offsets = accumulate(self.kind.sizes, initial=len(self.header))
        return [*zip(offsets, self.kind.sizes, self.kind.names, self.starts)]  # noqa: B905 (one offset more)

    def entries(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return the entries that its header must have, in any order."""
        kind = self.kind
        return {
            piece_key(name, start): flat_entry(*entry)
            for name, start, entry in zip(kind.names, self.starts, kind.entries, strict=True)
        }


class RankFiles:
    """What each file must hold. Quick where files are asked for in their order; threads may share it."""

    def __init__(self, manifest: Manifest):
        runs: list[_Run] = [
            (-ITEM_SIZES[each.spec.dtype], each.spec.dtype, name, start, first, first + count, numel)
            for name, each in manifest.tensors.items()
            for first, start, numel, count in each.runs
        ]
        self._runs = sorted(runs, key=lambda run: run[4])
        self._firsts = [run[4] for run in self._runs]
        self._bounds = sorted({bound for run in runs for bound in run[4:6]})
        self._lock = threading.Lock()
        self._file = -1
        self._here: list[_Run] = []  # that have a piece in that file
        self._numels: list[int] = []  # of those pieces
        self._zeros: list[int] = []  # where they would begin in file 0
        self._kind: _Kind | None = None
        self._kinds: dict[tuple[tuple[str, int], ...], _Kind] = {}

    def __getitem__(self, file: int) -> RankFile:
        with self._lock:
            kind = self._go_to(file)
            starts = [*map(add, self._zeros, map(mul, self._numels, repeat(file)))]  # there may be a million
        return RankFile(kind, starts, padded(kind.header % tuple(starts)))

    def _go_to(self, file: int) -> _Kind:
        before, self._file = self._file, file
        if self._kind is not None and bisect_right(self._bounds, before) == bisect_right(self._bounds, file):
            return self._kind
        if file < before:
            before, self._here = -1, []
        begun = self._runs[bisect_right(self._firsts, before) : bisect_right(self._firsts, file)]
        self._here = sorted(run for run in chain(self._here, begun) if run[5] > file)
        self._numels = [run[6] for run in self._here]
        self._zeros = [run[3] - run[4] * run[6] for run in self._here]
        key = tuple((run[2], run[6]) for run in self._here)
        kind = self._kinds.pop(key, None) or _kind_of(self._here)
        while len(self._kinds) >= _KEPT:
            del self._kinds[next(iter(self._kinds))]
        self._kinds[key] = self._kind = kind
        return kind


def _kind_of(runs: list[_Run]) -> _Kind:
    entries = [(run[1], run[6]) for run in runs]
    # the names of two pieces of a tensor would be one
    keys = [
        (piece_key(run[2].replace("%", "%%"), "%d"), flat_entry(*entry))
        for run, entry in zip(runs, entries, strict=True)
    ]
    return _Kind([run[2] for run in runs], entries, [-run[0] * run[6] for run in runs], header_text(keys))


def open_rank_file(folder: Path, info: FileInfo, expected: RankFile) -> tuple[int, Callable[[], list[Part]]]:
    """Return a rank's open file, and what lists its pieces in their order.

    Raises CheckpointError if its size or header differs.
    """
    descriptor = open_descriptor(folder / info.name, info.size)
    try:
        header = expected.header
        if len(header) + sum(expected.kind.sizes) == info.size and os.pread(descriptor, len(header), 0) == header:
            return descriptor, expected.parts
        found, _ = read_header(descriptor, info.size)
        if {key: entry[:2] for key, entry in found.items()} != expected.entries():
            raise CheckpointError("its header lists other pieces than the manifest")
    except BaseException as error:
        os.close(descriptor)
        if isinstance(error, CheckpointError):
            raise CheckpointError(f"{info.name}: {error}") from error
        raise
    return descriptor, partial(_listed, found)


def _listed(header: Header) -> list[Part]:
    parts = []
    for key, (_, _, offset, nbytes) in header.items():
        name, _, start = key.rpartition("@")
        parts.append((offset, nbytes, name, int(start)))
    return sorted(parts)
