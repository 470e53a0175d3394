"""Open files after a fork."""

from __future__ import annotations

import os
import stat
from contextlib import suppress

_DESCRIPTORS = "/proc/self/fd"


def own_places() -> None:
    """Give this forked process a place of its own in each file that it has open for reading.

    A forked process shares the place in a file with all others, so that what one reads moves the others: a data set
    that keeps an archive open (zipfile, tarfile, h5py) would read at another's place, and give wrong samples. Files
    that are written are left: what several write into one is to follow on each other.
    """
    with suppress(OSError):  # there is no /proc
        for name in os.listdir(_DESCRIPTORS):
            with suppress(OSError):  # that of the listing is closed by now
                _reopen(int(name))


def _reopen(descriptor: int) -> None:
    import fcntl

    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    if flags & os.O_ACCMODE != os.O_RDONLY or not stat.S_ISREG(os.fstat(descriptor).st_mode):
        return
    place = os.lseek(descriptor, 0, os.SEEK_CUR)
    own = os.open(f"{_DESCRIPTORS}/{descriptor}", flags | os.O_CLOEXEC)  # the same file, also where it has no name now
    try:
        os.lseek(own, place, os.SEEK_SET)
        os.dup2(own, descriptor, inheritable=os.get_inheritable(descriptor))
    finally:
        os.close(own)
