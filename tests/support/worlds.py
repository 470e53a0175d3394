"""Runs a function in a world of real processes, for tests.

The processes are forked from a server that has imported torch and distrain once, so a world of two costs a few tenths
of a second instead of the many seconds that fresh interpreters take. Each has the environment that a launcher sets, and
what runs in it (the process group, DDP, the files) is the real thing.
"""

from __future__ import annotations

import faulthandler
import functools
import multiprocessing
import os
import pickle
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any

from places import IMPORTABLE

_context = multiprocessing.get_context("forkserver")


SHARED = "DISTRAIN_TESTS_FORK_SERVER"
"""The variable that names the socket of a server for several processes that test beside each other."""


@functools.cache
def start_server() -> None:
    """Start the server from which all processes are forked, with preloaded.py imported; or join the shared one."""
    if address := os.environ.get(SHARED):
        _join(address)
        return
    _context.set_forkserver_preload(["preloaded"])
    before = os.environ.get("PYTHONPATH")
    # Python before 3.13 does not hand its own path on to the server
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [IMPORTABLE, before]))
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def share_server() -> None:
    """Start the server for the processes that this one starts as well: what it imports takes many seconds."""
    if sys.version_info >= (3, 14):
        return  # it asks for a key that this process keeps for itself
    start_server()
    address: str = forkserver._forkserver._forkserver_address  # type: ignore[attr-defined]
    os.environ[SHARED] = address.replace("\0", "@")  # as others write an abstract address


def _join(address: str) -> None:
    """Fork from the server of the process that started this one, and that outlives it."""
    server = forkserver._forkserver  # type: ignore[attr-defined]
    server._forkserver_address = address.replace("@", "\0", 1) if address.startswith("@") else address
    # where the server's own children have the pipe by which it sees that nobody is left
    server._forkserver_alive_fd = os.open(os.devnull, os.O_RDONLY)
    server.ensure_running = resource_tracker.ensure_running


class WorldFailed(AssertionError):
    """A process of the world raised or ended early; the message holds every rank's traceback."""


def free_port() -> int:
    """Return a TCP port that nothing listens on, and that the system gives to no connection before the world is up."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)  # below the ports of outgoing connections
        with socket.socket() as server, suppress(OSError):
            server.bind(("127.0.0.1", port))
            return port


@dataclass
class RunningWorld:
    """The processes of a world, in the order of their ranks."""

    processes: list[Any]
    folder: Path

    def kill(self, *ranks: int) -> None:
        """SIGKILL these ranks, or all of them where none is named."""
        for rank in ranks or range(len(self.processes)):
            self.processes[rank].kill()

    def signal(self, number: int) -> None:
        """Send a signal to every rank that is there."""
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, number)

    def wait(self, timeout_s: float = 120) -> list[int]:
        """Wait for every rank; returns the exit codes. What is late is killed."""
        self._join(timeout_s)
        for process in self.processes:
            if process.is_alive():
                process.kill()
                process.join()
        return [process.exitcode for process in self.processes]

    def _join(self, timeout_s: float) -> None:
        until = time.monotonic() + timeout_s
        for process in self.processes:
            process.join(max(0.0, until - time.monotonic()))

    def results(self, timeout_s: float = 120) -> list[Any]:
        """Wait for every rank; returns what each returned. Raises WorldFailed with all that went wrong."""
        results, failures = [], []
        self._join(timeout_s)
        self.signal(signal.SIGABRT)  # by which a rank that is late writes where it is
        for rank, code in enumerate(self.wait(5)):
            file = self.folder / str(rank)
            if not file.exists():
                stacks = file.with_suffix(".stacks")
                where = stacks.read_text(errors="replace") if stacks.exists() else ""
                where = where.split("\nExtension modules")[0]
                failures.append(f"rank {rank} ended with exit code {code} and no result (in {timeout_s:g} s)\n{where}")
                continue
            ok, value = pickle.loads(file.read_bytes())
            if ok and code == 0:
                results.append(value)
            else:
                failures.append(f"rank {rank}, exit code {code}:\n{value}")
        if failures:
            raise WorldFailed("\n".join(failures))
        return results


@contextmanager
def running_world(
    world_size: int, function: Callable[..., Any], *args: Any, launched: bool = True
) -> Iterator[RunningWorld]:
    """Start `function(*args)` in every process of a world; none is left when the block ends.

    The function must be importable by name and its arguments and results picklable. `launched=False` starts one process
    without a launcher's environment, as a plain `python` does.
    """
    assert launched or world_size == 1, "only a launcher starts several"
    start_server()
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(world_size):
            variables = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            result = Path(folder) / str(rank)
            environment = variables if launched else {}
            process = _context.Process(target=_child, args=(environment, os.getcwd(), str(result), function, args))
            process.start()
            processes.append(process)
        world = RunningWorld(processes, Path(folder))
        try:
            yield world
        finally:
            world.wait(0)


def in_world(
    world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 120, launched: bool = True
) -> list[Any]:
    """Return what `function(*args)` returns on each rank of a world of that size; see `running_world`."""
    with running_world(world_size, function, *args, launched=launched) as world:
        return world.results(timeout_s)


def _child(variables: dict[str, str], folder: str, result: str, function: Callable[..., Any], args: Any) -> None:
    os.environ.update(variables)
    os.chdir(folder)
    with open(result + ".stacks", "w") as stacks:
        faulthandler.enable(stacks)  # what it runs may put its own streams elsewhere
        try:
            outcome = (True, function(*args))
        except BaseException:
            outcome = (False, traceback.format_exc())
        faulthandler.disable()
    temporary = Path(result + ".part")
    temporary.write_bytes(pickle.dumps(outcome))
    temporary.rename(result)
