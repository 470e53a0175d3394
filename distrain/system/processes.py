"""What the kernel tells of a process of this machine, where there is /proc.

Read here, and not by psutil, because a process is known again by its number and its start together: psutil's start is
in seconds since 1970, which move when the clock is set. What watches a process that hangs must not import anything.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple


class ProcessStat(NamedTuple):
    """A process as it was at one moment."""

    state: str
    """The kernel's letter for what it does: R, S, D, T, t, Z, X."""
    parent: int
    session: int
    computed_s: float
    started: int
    """In the kernel's ticks since the machine started."""


def process_stat(pid: int | str = "self") -> ProcessStat | None:
    """Return what is known of a process, or of a thread ("self/task/17"); None where it is no more, or nobody tells."""
    try:
        # the name of the command stands before the last bracket, and may hold anything
        parts = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        ticks = int(parts[11]) + int(parts[12])
        return ProcessStat(parts[0], int(parts[1]), int(parts[3]), ticks / os.sysconf("SC_CLK_TCK"), int(parts[19]))
    except (OSError, ValueError, IndexError):
        return None


def process_started(pid: int | str = "self") -> int:
    """Return when a process of this machine started, in ticks since the machine did; 0 where that is not known."""
    found = process_stat(pid)
    return found.started if found else 0


def process_state(pid: int, started: int) -> str | None:
    """Return the letter that the kernel has for the state of a process of this machine; None where it is no more.

    `started` says which process of this number is meant; 0: any.
    """
    found = process_stat(pid)
    return found.state if found and started in (0, found.started) else None


def umask() -> int:
    """Return the file mode creation mask of this process."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
