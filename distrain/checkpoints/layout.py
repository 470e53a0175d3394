"""What a rank's file holds, and in which order; and how a file is written, hashed and flushed."""

from __future__ import annotations

import os
import threading
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import xxhash

from distrain.checkpoints.arena import Source
from distrain.checkpoints.dtypes import ITEM_SIZES
from distrain.checkpoints.format import FileInfo, Piece, TensorSpec, piece_key
from distrain.checkpoints.headers import flat_entry, pack_header
from distrain.run.heartbeat import progress

_CHUNK = 16 << 20  # bytes hashed and written at a time, both without the GIL: large enough that it is seldom taken


class Cancelled(Exception):
    """The save was cancelled."""


class Place(NamedTuple):
    """Where a piece lies in a rank's file."""

    name: str
    """Of the full tensor."""
    dtype: str
    begin: int
    """Byte behind the header."""
    end: int


@dataclass(frozen=True)
class Layout:
    """A rank's file."""

    header: bytes
    sources: list[Source]
    """Of the pieces that have bytes, in the order of the file."""
    copied: list[bool]
    """Of each, whether it is `Piece.copied`."""
    places: list[Place]
    """Of each."""


def lay_out(specs: dict[str, TensorSpec], pieces: Iterable[Piece]) -> Layout:
    """Return the file of these pieces."""
    laid = []
    for piece in pieces:
        source = piece.source
        if not (nbytes := source.nbytes):
            continue
        spec = specs[piece.name]
        size = ITEM_SIZES[spec.dtype]
        numel, rest = divmod(nbytes, size)
        assert not rest, f"{piece.name}: {nbytes} bytes of {spec.dtype}"
        assert 0 <= piece.start <= spec.numel - numel, f"{piece.name}: {numel} from {piece.start} of {spec.numel}"
        laid.append((-size, spec.dtype, piece.name, piece.start, numel, source, piece.copied))
    # wide elements first: each tensor is then aligned to its element; and those of a dtype can be copied together
    laid.sort(key=lambda entry: entry[:4])
    entries = {piece_key(name, start): flat_entry(dtype, numel) for _, dtype, name, start, numel, *_ in laid}
    assert len(entries) == len(laid), "two pieces of a tensor begin at the same element"
    ends = accumulate(source.nbytes for *_, source, _ in laid)
    places = [
        Place(name, dtype, end - source.nbytes, end)
        for (_, dtype, name, *_, source, _), end in zip(laid, ends, strict=True)
    ]
    return Layout(pack_header(entries), [entry[5] for entry in laid], [entry[6] for entry in laid], places)


def find_not_finite(places: Sequence[Place], views: Sequence[memoryview]) -> str | None:
    """Return the name of a tensor of which a piece has elements that are not finite; None if there is none.

    `places`, in the order of the file, are those to look at; `views` hold the file behind its header, end to end.
    """
    import numpy as np  # looking at a checkpoint needs no array

    from distrain.checkpoints.floats import all_finite

    begins = [*accumulate(map(len, views), initial=0)]

    def finite(dtype: str, begin: int, end: int) -> bool:
        while begin < end:
            at = bisect_right(begins, begin) - 1
            stop = min(end, begins[at + 1])
            raw = np.frombuffer(views[at], np.uint8)[begin - begins[at] : stop - begins[at]]
            progress()
            if not all_finite(raw, dtype):
                return False
            begin = stop
        return True

    for run in _neighbours(places):
        if not finite(run[0].dtype, run[0].begin, run[-1].end):
            return next(each.name for each in run if not finite(each.dtype, each.begin, each.end))
    return None


def _neighbours(places: Sequence[Place]) -> Iterator[list[Place]]:
    """Yield runs of a dtype that lie side by side: many small ones are looked at as one."""
    run: list[Place] = []
    for place in places:
        if run and (run[-1].end, run[-1].dtype) != (place.begin, place.dtype):
            yield run
            run = []
        run.append(place)
    if run:
        yield run


def write_file(path: Path, parts: Sequence[memoryview | bytes], cancelled: threading.Event) -> FileInfo:
    """Write a new file, flush it to disk and return its hash; raises Cancelled once that is set."""
    digest, size = xxhash.xxh3_128(), 0
    with open(path, "xb", buffering=1 << 20) as file:
        for part in parts:
            for start in range(0, len(part), _CHUNK):
                if cancelled.is_set():
                    raise Cancelled
                chunk = memoryview(part)[start : start + _CHUNK]
                digest.update(chunk)
                file.write(chunk)
                progress()
                size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return FileInfo(path.name, size, digest.hexdigest())
