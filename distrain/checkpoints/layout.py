"""What a rank's file holds, and in which order; and how a file is written, hashed and flushed."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from distrain.checkpoints.arena import Source
from distrain.checkpoints.dtypes import ITEM_SIZES
from distrain.checkpoints.format import FileInfo, Piece, TensorSpec, piece_key
from distrain.checkpoints.headers import flat_entry, pack_header
from distrain.run.heartbeat import progress

_CHUNK = 16 << 20  # bytes hashed and written at a time, both without the GIL: large enough that it is seldom taken


class Cancelled(Exception):
    """The save was cancelled."""


@dataclass(frozen=True)
class Layout:
    """A rank's file."""

    header: bytes
    sources: list[Source]
    """Of the pieces that have bytes, in the order of the file."""
    copied: list[bool]
    """Of each, whether it is `Piece.copied`."""


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
    return Layout(pack_header(entries), [entry[5] for entry in laid], [entry[6] for entry in laid])


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
