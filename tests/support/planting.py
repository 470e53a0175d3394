"""Faults for `distrain doctor` to find, made by the operating system in a process that ends with its check."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import os
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

from distrain.doctor.checks import Check, run_check
from distrain.doctor.context import Context
from distrain.doctor.findings import Finding, Level

MOUNTS, NAMES, USERS, NETWORK = 0x00020000, 0x04000000, 0x10000000, 0x40000000
"""Flags of unshare(2): CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWUSER, CLONE_NEWNET."""
_READ_ONLY, _NO_EXEC, _PRIVATE = 1, 8, 0x4000 | 1 << 18
_LIBC = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: object) -> None:
    """Call a function of the C library; raises OSError."""
    if getattr(_LIBC, name)(*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


def unshare(*kinds: int) -> None:
    """Give this process namespaces of its own."""
    user, group = os.geteuid(), os.getegid()
    call("unshare", sum(kinds) | (USERS if user else 0))
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    if MOUNTS in kinds:
        call("mount", None, b"/", None, _PRIVATE, None)


def mount_memory(place: Path | str, options: str = "", *, read_only: bool = False, no_exec: bool = False) -> Path:
    """Mount a file system in memory over a folder, for this process alone."""
    unshare(MOUNTS)
    flags = _READ_ONLY * read_only | _NO_EXEC * no_exec
    call("mount", b"tmpfs", os.fsencode(place), b"tmpfs", flags, options.encode() or None)
    return Path(place)


def write(folder: Path, files: dict[str, str]) -> None:
    """Write files below a folder."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def loopback_up() -> None:
    """Bring up the loopback interface of a new network namespace."""
    with socket.socket() as any_socket:
        request = struct.pack("16sh14x", b"lo", 0x1)
        fcntl.ioctl(any_socket, 0x8914, request)


@functools.cache
def can_unshare() -> bool:
    """Whether a process here may have namespaces of its own."""
    if (pid := os.fork()) == 0:
        try:
            unshare(MOUNTS, NETWORK, NAMES)
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def found_with(plant: Callable[[Context], None], check: Check, context: Context) -> list[Finding]:
    """Return the warnings and errors of a check in a process in which a fault was planted."""

    def planted(context: Context) -> Iterator[Finding]:
        plant(context)
        yield from check.function(context)

    found = run_check(Check(check.name, planted), context, 120.0)
    return [each for each in found if each.level is not Level.ok]
