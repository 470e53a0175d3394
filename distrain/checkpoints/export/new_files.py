"""New files of a known size, whose parts are written in any order and by several threads."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

_MAX_OPEN = 128  # new files that are open at a time; well below the usual limit of 1024

Write = Callable[[Sequence[memoryview], int], None]
"""Writes views one after the other into a new file, from an offset on. Threads may call it side by side."""


class NewFiles:
    """New files that are written in any order, of which few are open at a time. Use it in a `with` statement."""

    def __init__(self, count: int) -> None:
        self._all_open = count <= _MAX_OPEN
        self._lock = threading.Lock()
        self._open: OrderedDict[Path, list[int]] = OrderedDict()  # [descriptor, threads that write]
        self._idle = threading.Condition(self._lock)

    def add(self, path: Path, nbytes: int) -> Write:
        """Make a file of that size that must not exist yet; return what writes into it."""
        with self._lock:
            self._make_room()
            descriptor = _make_file(path, nbytes)
            self._open[path] = [descriptor, 0]
        return partial(write_at, descriptor) if self._all_open else partial(self._write, path)

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

    def __enter__(self) -> NewFiles:
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
