"""Files by name, size and content: enough to recognise them, at a bounded cost.

Up to 500 files are listed one by one, each with a hash: of its whole content where that is small, else of blocks that
are spread over it. More are listed by folder, with a hash over the names and sizes, and the content of a few of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import xxhash

from distrain.system.output import one_line

MOST_FILES = 500
"""Files that are listed one by one."""

MOST_STATED = 1_000_000
"""Files whose size is asked for; of more, the names are taken alone. So many are looked for in a folder."""

_MOST_FOLDERS, _MOST_SAMPLED = 200, 32
_BLOCK = 1 << 14
_WHOLE_BYTES = 64 << 20
"""What is read of all files together, where they are not read in full."""


def walk(folder: str) -> Iterator[str]:
    """Yield the files in and below a folder by name, without hidden ones, caches of Python's, and folders of runs."""
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


def placed(files: Iterable[os.PathLike[str]], roots: Mapping[str, str]) -> dict[str, str]:
    """Return files by their names below `roots`, each {path: what is put before the names}; the longest root counts."""
    ordered = sorted(
        ((root, root.rstrip(os.sep) + os.sep, label) for root, label in roots.items()), key=lambda r: -len(r[0])
    )
    found = {}
    for file in files:
        path = os.path.abspath(file) if not os.path.isabs(file) else os.fspath(file)
        for root, start, label in ordered:
            if path == root:
                found[label + os.path.basename(path)] = path
                break
            if path.startswith(start):
                found[label + path[len(start) :]] = path
                break
        else:  # by way of a link
            found[os.sep.join(path.split(os.sep)[-2:])] = path
    return found


def listing(files: Mapping[str, str], *, full: bool) -> dict[str, Any]:
    """Return the listing of files, given by their labels; `full` reads the whole content of each.

    Few files: `files` {label: [bytes, hash] or [bytes, hash, seconds since 1970]}, the time where the hash is not of
    the whole content. Many: `folders` {folder: [files, bytes, hash of names and sizes, newest time]} and `sampled`
    {label: hash}.
    """
    files = {one_line(label): path for label, path in files.items()}  # what is stored, and shown, is plain text
    labels = sorted(files)
    if len(labels) <= MOST_FILES:
        limit = None if full else max(4 * _BLOCK, min(16 << 20, _WHOLE_BYTES // max(1, len(labels))))
        return {"files": {label: _file_entry(files[label], limit) for label in labels}}
    chosen = labels[:: -(-len(labels) // _MOST_SAMPLED)]
    stated = len(labels) <= MOST_STATED
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
    """Return how many folders of each path are told apart."""
    for depth in (3, 2, 1):
        if len({_folder(label, depth) for label in labels}) <= _MOST_FOLDERS:
            return depth
    return 0


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
    """Return the hash of a file: of all of it, or of so many bytes of a larger one, from its begin to its end."""
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
