"""Fingerprints of files by name, size and content, at a bounded cost.

Up to 500 files are listed one by one, each with a hash: of all of a small file, or of blocks spread over a large one.
More are listed by folder, with a hash of the names and sizes, and of the content of a few files.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import xxhash

from distrain.system.output import one_line

MAX_FILES = 500
"""Files that are listed one by one."""

MAX_SIZED = 1_000_000
"""Files whose sizes are read, beyond which only names are; also the most files that are listed of one folder."""

_MAX_FOLDERS, _MAX_SAMPLED = 200, 32
_BLOCK = 1 << 14
_MAX_BYTES = 64 << 20
"""Bytes that are read of all files together, unless they are read in full."""


def walk(folder: str) -> Iterator[str]:
    """Yield the files in and below a folder by name, without hidden ones, Python's caches, and run folders."""
    seen: set[tuple[int, int]] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        state = os.stat(place)
        if "launch.json" in names or (state.st_dev, state.st_ino) in seen:  # a run; a link back to where it is
            folders.clear()
            continue
        seen.add((state.st_dev, state.st_ino))
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and name not in ("__pycache__", "wandb")
        )
        yield from (os.path.join(place, name) for name in sorted(names) if not name.startswith("."))


def labelled(files: Iterable[os.PathLike[str]], roots: Mapping[str, str]) -> dict[str, str]:
    """Return {label: path}: a file's name below the longest of the `roots` {path: prefix} that holds it."""
    ordered = [(root, root.rstrip(os.sep) + os.sep, roots[root]) for root in sorted(roots, key=len, reverse=True)]
    found = {}
    for file in files:
        path = os.fspath(file) if os.path.isabs(file) else os.path.abspath(file)
        label = os.sep.join(path.split(os.sep)[-2:])  # outside all of them, through a link
        for root, start, prefix in ordered:
            if path == root or path.startswith(start):
                label = prefix + (os.path.basename(path) if path == root else path[len(start) :])
                break
        found[label] = path
    return found


def listing(files: Mapping[str, str], *, full: bool) -> dict[str, Any]:
    """Return the listing of files, given by their labels; `full` reads all of their content.

    Few files: `files` {label: [bytes, hash] or [bytes, hash, seconds since 1970]}, the time if the hash is not of all
    of the content. Many: `folders` {folder: [files, bytes, hash of names and sizes, newest time]} and `sampled` {label:
    hash}.
    """
    files = {one_line(label): path for label, path in files.items()}
    labels = sorted(files)
    if len(labels) <= MAX_FILES:
        limit = None if full else max(4 * _BLOCK, min(16 << 20, _MAX_BYTES // max(1, len(labels))))
        return {"files": {label: _file_entry(files[label], limit) for label in labels}}
    chosen = labels[:: -(-len(labels) // _MAX_SAMPLED)]
    stated = len(labels) <= MAX_SIZED
    folders: dict[str, list[Any]] = {}
    digests: dict[str, xxhash.xxh3_128] = {}
    depth = _depth(labels)
    for label in labels:
        folder = _folder(label, depth)
        size, time = _size_and_time(files[label]) if stated else (0, 0)
        digest = digests.setdefault(folder, xxhash.xxh3_128())
        digest.update(
            f"{label}\0{size}\0{_hash(files[label], None) if full else ''}\0".encode(errors="surrogateescape")
        )
        row = folders.setdefault(folder, [0, 0, "", 0])
        row[0], row[1], row[3] = row[0] + 1, row[1] + size, max(row[3], time)
    for folder, row in folders.items():
        row[2] = ("full-" if full else "") + digests[folder].hexdigest()
    return {"folders": folders, "sampled": {label: _hash(files[label], 4 * _BLOCK) for label in chosen}}


def _depth(labels: list[str]) -> int:
    """Return how many levels of folders are listed."""
    return next((n for n in (3, 2, 1) if len({_folder(label, n) for label in labels}) <= _MAX_FOLDERS), 0)


def _folder(label: str, depth: int) -> str:
    return "/".join(label.split("/")[:-1][:depth])


def _size_and_time(path: str) -> tuple[int, int]:
    try:
        state = os.stat(path)
    except OSError:
        return -1, 0
    return state.st_size, int(state.st_mtime)


def _file_entry(path: str, limit: int | None) -> list[Any]:
    size, time = _size_and_time(path)
    digest = _hash(path, limit)
    return [size, digest] if digest.startswith("whole-") else [size, digest, time]


def _hash(path: str, limit: int | None) -> str:
    """Return the hash of a file: of all of it, or of `limit` bytes spread over a larger one."""
    digest = xxhash.xxh3_128()
    try:
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if limit is None or size <= limit:
                while block := file.read(1 << 22):
                    digest.update(block)
                return f"whole-{digest.hexdigest()}"
            count = min(256, limit // _BLOCK)
            for number in range(count):
                file.seek((size - _BLOCK) * number // (count - 1))
                digest.update(file.read(_BLOCK))
            return f"{count}-{digest.hexdigest()}"
    except OSError as error:
        return f"unread-{error.errno}"
