"""Processes of this machine, from /proc.

Not from psutil: number and start identify a process, and psutil's start is in seconds since 1970, which move when the
clock is set. And a watchdog must import nothing while a process hangs.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import NamedTuple


class ProcessStat(NamedTuple):
    """A process as it was at one moment."""

    state: str
    """The kernel's letter: R, S, D, T, t, Z, X."""
    parent: int
    session: int
    computed_s: float
    started: int
    """In the kernel's ticks since the machine started."""


def process_stat(pid: int | str = "self") -> ProcessStat | None:
    """Return the state of a process, or of a thread ("self/task/17"); None if it is gone or there is no /proc."""
    try:
        # the command's name before the last bracket may hold anything
        parts = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        ticks = int(parts[11]) + int(parts[12])
        return ProcessStat(parts[0], int(parts[1]), int(parts[3]), ticks / os.sysconf("SC_CLK_TCK"), int(parts[19]))
    except (OSError, ValueError, IndexError):
        return None


def process_started(pid: int | str = "self") -> int:
    """Return the start of a process in ticks since the machine's; 0: unknown."""
    found = process_stat(pid)
    return found.started if found else 0


def process_state(pid: int, started: int) -> str | None:
    """Return the kernel's letter for the state of a process that `started` then (0: any); None if it is gone."""
    found = process_stat(pid)
    return found.state if found and started in (0, found.started) else None


def namespace_of_processes() -> str:
    """Return what processes have in common that know each other by number: the machine's start and the namespace.

    Empty where there is no /proc. Machines may share a name, and so may containers of one machine.
    """
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def end_with_parent(number: signal.Signals) -> None:
    """Have the kernel send this process a signal when its parent ends, however that ends. Linux only."""
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, int(number))


def umask() -> int:
    """Return the file mode creation mask of this process."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
