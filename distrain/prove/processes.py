"""Start processes, interrupt them, and leave none behind."""

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

# the process does this itself, first: code between fork and exec is not safe beside other threads
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
    """A started process that leads its own session."""

    pid: int

    def poll(self) -> int | None:
        """Return its exit code, or None while it runs."""
        ...


StartProcess = Callable[[Sequence[str], Mapping[str, str], Path], Process]
"""(arguments of `distrain`, environment, file for its output) -> the process."""


def start_distrain(arguments: Sequence[str], environment: Mapping[str, str], output: Path) -> Process:
    """Start `distrain ARGUMENTS` in its own session; the kernel kills it when this process ends."""
    with output.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-P", "-c", _COMMAND, *arguments],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def session_processes(session: int, tag: str) -> list[int]:
    """Return the processes of a session, and those elsewhere whose environment holds `tag`.

    Launchers give each rank its own session, and ranks start loader processes: they share the environment.
    """
    import psutil

    found = []
    for pid in psutil.pids():
        stat = process_stat(pid)
        if stat is None or stat.state == "Z" or pid == os.getpid():
            continue
        with contextlib.suppress(psutil.Error):
            if stat.session == session or any(
                tag in f"{name}={value}" for name, value in psutil.Process(pid).environ().items()
            ):
                found.append(pid)
    return found


def kill_all(process: Process, tag: str) -> None:
    """SIGKILL a process and all processes it started, and wait until none is left."""
    for _ in _until(60):
        left = session_processes(process.pid, tag)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if not left and process.poll() is not None:
            return
    raise RuntimeError(f"processes {session_processes(process.pid, tag)} still run a minute after SIGKILL")


def wait(process: Process, timeout_s: float) -> int | None:
    """Return the exit code, or None when the process still runs after `timeout_s`."""
    for _ in _until(timeout_s):
        if (code := process.poll()) is not None:
            return code
    return None


def _until(timeout_s: float, pause_s: float = 0.02) -> Iterator[None]:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        yield
        time.sleep(pause_s)
