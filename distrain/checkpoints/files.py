"""The files of a checkpoint: opened as what they must be, and hashed."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import xxhash

from distrain.checkpoints.format import CheckpointError, error_reason
from distrain.run.heartbeat import progress
from distrain.system import bounded_json as bounded

_CHUNK = 1 << 18  # stays in the cache between being read and being hashed


def open_descriptor(path: Path, size: int | None = None) -> int:
    """Open a regular file for reading, no symbolic link, of that size (None: any); raises CheckpointError."""
    try:
        descriptor = bounded.open_regular(path, os.O_NOFOLLOW)
    except OSError as error:
        reason = "it is a symbolic link" if error.errno == errno.ELOOP else error_reason(error)
        raise CheckpointError(f"{path.name}: {reason}") from error
    except ValueError as error:
        raise CheckpointError(f"{path.name}: {error}") from error
    if size in (None, found := os.fstat(descriptor).st_size):
        return descriptor
    os.close(descriptor)
    raise CheckpointError(f"{path.name}: it has {found} bytes, and {size} were written")


def hash_file(descriptor: int) -> str:
    """Return the XXH3-128 of an open file."""
    digest, buffer, offset = xxhash.xxh3_128(), memoryview(bytearray(_CHUNK)), 0
    while count := os.preadv(descriptor, [buffer], offset):
        digest.update(buffer[:count])
        offset += count
        progress()
    return digest.hexdigest()
