"""Processes that are started, interrupted, and never left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from distrain.system.processes import process_stat

# said by the process itself, before anything else: code between fork and exec is not safe beside other threads
_COMMAND = """
import ctypes, signal, sys
if sys.platform == "linux":
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, int(signal.SIGKILL))
sys.argv[0] = "distrain"
from distrain.cli.main import main
main()
"""


class Process(Protocol):
    """What is needed of a started process, which leads a session of its own."""

    pid: int

    def poll(self) -> int | None:
        """Return its exit code, or None while it runs."""
        ...


Start = Callable[[Sequence[str], Mapping[str, str], Path], Process]
"""(arguments of `distrain`, environment, file for what it prints) -> the process."""


def start_distrain(arguments: Sequence[str], environment: Mapping[str, str], output: Path) -> Process:
    """Start `distrain ARGUMENTS`, in a session of its own; it is killed when this process ends, in whatever way."""
    with output.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-P", "-c", _COMMAND, *arguments],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def members(session: int, mark: str) -> list[int]:
    """Return the processes of a session, and those elsewhere whose environment holds `mark`.

    Launchers give each rank a session of its own, and ranks start loader processes: the environment is what they share.
    """
    import psutil

    found = []
    for pid in psutil.pids():
        stat = process_stat(pid)
        if stat is None or stat.state == "Z" or pid == os.getpid():
            continue
        with contextlib.suppress(psutil.Error):
            if stat.session == session or any(
                mark in f"{name}={value}" for name, value in psutil.Process(pid).environ().items()
            ):
                found.append(pid)
    return found


def kill_all(process: Process, mark: str) -> None:
    """SIGKILL a process and everything it started, and wait until nothing of it is left."""
    for _ in _until(60):
        left = members(process.pid, mark)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if not left and process.poll() is not None:
            return
    raise RuntimeError(f"processes {members(process.pid, mark)} are still there a minute after SIGKILL")


def wait(process: Process, timeout_s: float) -> int | None:
    """Return the exit code, or None when the process still runs after `timeout_s`."""
    for _ in _until(timeout_s):
        if (code := process.poll()) is not None:
            return code
    return None


def _until(timeout_s: float, pause_s: float = 0.005) -> Iterator[None]:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        yield
        time.sleep(pause_s)
