"""Runs a function in a world of real processes, for tests.

The processes are forked from a server that has imported torch and distrain once, so a world of two costs a few tenths of
a second instead of the many seconds that fresh interpreters take. Each has the environment that a launcher sets, and what
runs in it (the process group, DDP, the files) is the real thing.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["torch", "accelerate", "torchvision.transforms.v2", "distrain.loop", "distrain.launcher"]
)


class WorldFailed(AssertionError):
    """A process of the world raised or ended early; the message holds every rank's traceback."""


def free_port() -> int:
    """Return a TCP port that nothing listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def in_world(world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 120) -> list[Any]:
    """Return what `function(*args)` returns on each rank of a world of that size.

    The function must be importable by name and its arguments and results picklable.
    """
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
            process = _context.Process(target=_child, args=(variables, os.getcwd(), str(result), function, args))
            process.start()
            processes.append(process)
        for process in processes:
            process.join(timeout_s)
        late = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()
        results, failures = [], [f"rank {rank} was still running after {timeout_s:g} s" for rank in late]
        for rank, process in enumerate(processes):
            file = Path(folder) / str(rank)
            if not file.exists():
                failures.append(f"rank {rank} ended with exit code {process.exitcode} and no result")
                continue
            ok, value = pickle.loads(file.read_bytes())
            if ok:
                results.append(value)
            else:
                failures.append(f"rank {rank}:\n{value}")
        if failures:
            raise WorldFailed("\n".join(failures))
        return results


def _child(variables: dict[str, str], folder: str, result: str, function: Callable[..., Any], args: Any) -> None:
    os.environ.update(variables)
    os.chdir(folder)
    try:
        outcome = (True, function(*args))
    except BaseException:
        outcome = (False, traceback.format_exc())
    temporary = Path(result + ".part")
    temporary.write_bytes(pickle.dumps(outcome))
    temporary.rename(result)
