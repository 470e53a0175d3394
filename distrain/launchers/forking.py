"""Processes of this machine, forked from one that has imported what they need: PyTorch is imported once for all.

A process is fit for that where it has no other threads and no GPU is used: what was forked beside a running thread may
wait for it forever, and CUDA does not work in a copy of a process that has begun to use it. A user's code runs in none
that is forked from: it may start threads, and read the environment of its rank when it is imported.
"""

from __future__ import annotations

import atexit
import errno
import importlib
import os
import pickle
import random
import runpy
import signal
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from distrain.config import UserError
from distrain.launchers.preflight import gpu_count
from distrain.system import logs
from distrain.system.importing import freeze, importing
from distrain.system.output import echo
from distrain.system.processes import end_with_parent

Result = TypeVar("Result")

_ENDS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
"""What ends a launcher: it hands each on to its processes, and waits for them."""
_FAILED_TIMEOUT_S = 30.0
"""After one process has failed the others have so long to end by SIGTERM."""
_END_TIMEOUT_S = 30.0
"""After the processes of one machine have ended well those of the others have so long."""
_POLL_S = 0.05

_imported_here = False


def can_fork() -> bool:
    """Whether the processes of a run may be forked from this one."""
    if sys.platform != "linux" or gpu_count() or threading.active_count() > 1:
        return False
    # without torch no thread computes; those of NumPy's OpenBLAS end and begin with a fork
    return _imported_here or "torch" not in sys.modules or len(os.listdir("/proc/self/task")) == 1


def import_once(modules: Sequence[str]) -> None:
    """Import in this process what each that is forked from it would."""
    global _imported_here
    if "torch" not in sys.modules:
        _imported_here = True
    with importing():
        for name in modules:
            importlib.import_module(name)


def in_copy(action: Callable[[], Result]) -> Result:
    """Return what `action` returns in a forked copy of this process; the result must be picklable.

    Raises the UserError that it raises. Any other error is printed there with its traceback and ends this process too,
    by SystemExit.
    """
    read, write = os.pipe()
    with _held_back(_ENDS) as before:
        pid = _fork()
        if pid == 0:
            _answer(action, write, before)
    os.close(write)
    with os.fdopen(read, "rb") as answer:
        found = answer.read()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code < 0:
        raise UserError(f"the process that checks the recipe was ended by {_named(-code)}; nothing was written")
    if code > 0:
        raise SystemExit(code)
    result: Result
    result, error = pickle.loads(found)
    if error is not None:
        raise error
    return result


def _answer(action: Callable[[], Any], write: int, mask: set[int]) -> NoReturn:
    def answer() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        result = error = None
        try:
            result = action()
        except UserError as problem:
            error = problem
        with os.fdopen(write, "wb") as file:
            pickle.dump((result, error), file)

    os._exit(_status_of(answer))


class PortTaken(UserError):
    """No launcher can listen where the processes of several machines are to find each other."""

    def __init__(self, port: int):
        super().__init__(
            f"port {port} of {socket.gethostname()} is taken, and the processes of all machines are to meet there; "
            "choose another"
        )


@dataclass(frozen=True)
class Meeting:
    """How the processes of several machines find each other: the first machine holds the store of the world."""

    address: str = "127.0.0.1"
    """Where the first machine is reached by all."""
    port: int = 0
    """Where it listens; 0 takes a free one, which works for one machine only."""
    nodes: int = 1
    """Machines, each with as many processes."""
    node: int = 0
    """Which of them this is."""

    @property
    def world(self) -> str:
        """A name that all processes of the world have in common."""
        return uuid.uuid4().hex if self.nodes == 1 else f"{self.address}:{self.port}"

    def listen(self, backlog: int) -> socket.socket | None:
        """Return what listens for the processes of all machines; None on a machine that is not the first.

        Raises PortTaken.
        """
        if self.node > 0:
            return None
        if self.nodes == 1:
            return socket.create_server((self.address, self.port), backlog=backlog)
        both = socket.has_dualstack_ipv6()  # the address may be of either kind
        family = socket.AF_INET6 if both else socket.AF_INET
        try:
            return socket.create_server(("", self.port), family=family, backlog=backlog, dualstack_ipv6=both)
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                raise PortTaken(self.port) from error
            raise

    def end(self, store: Any, codes: Mapping[int, int]) -> None:
        """Have the first machine hold the store until the processes of all have ended, where they end well."""
        from torch.distributed import DistNetworkError, TCPStore

        if self.nodes == 1 or any(codes.values()):
            return
        if self.node > 0:
            with suppress(DistNetworkError):  # it did not wait so long
                timeout = timedelta(seconds=_END_TIMEOUT_S)
                store = TCPStore(self.address, self.port, is_master=False, wait_for_workers=False, timeout=timeout)
                store.set(f"distrain/ended/{self.node}", "")
            return
        until = time.monotonic() + _END_TIMEOUT_S
        while time.monotonic() < until and not store.check([f"distrain/ended/{node}" for node in range(1, self.nodes)]):
            time.sleep(_POLL_S)


def run_forked(
    script: Path,
    arguments: Sequence[str],
    processes: int,
    *,
    meeting: Meeting,
    variables: Mapping[str, str],
    notice: signal.Signals,
    patience_s: float,
    watching: Callable[[], AbstractContextManager[None]],
) -> tuple[dict[int, int], bool]:
    """Run a script in processes forked from this one; returns the exit code of each rank, and whether a signal came.

    They are the world's processes of this machine, and find each other as under torch's launcher, by its environment
    variables with `variables` besides; `meeting` says where, and how many machines there are. When one fails the others
    are ended. SIGTERM, SIGINT, SIGHUP and SIGQUIT are handed on to all, which then have `patience_s` to end; `notice`
    is handed on and no more, and waits in each until it has a handler. `watching()` is a context that is entered when
    they have started.
    """
    from torch.distributed import TCPStore

    first, store = meeting.node * processes, None
    with meeting.listen(meeting.nodes * processes) or nullcontext() as listening:
        port = listening.getsockname()[1] if listening is not None else meeting.port
        world = dict(variables) | {
            "WORLD_SIZE": str(meeting.nodes * processes),
            "LOCAL_WORLD_SIZE": str(processes),
            "GROUP_RANK": str(meeting.node),
            "MASTER_ADDR": meeting.address,
            "MASTER_PORT": str(port),
            "TORCHELASTIC_RUN_ID": meeting.world,
            "TORCHELASTIC_RESTART_COUNT": "0",
            "TORCHELASTIC_MAX_RESTARTS": "0",
            # the store is this process's, as that of torch's launcher is
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        # what collects garbage would write to the pages that all share, and this process only waits for the others
        freeze()
        came: list[int] = []
        pids: list[int] = []
        # blocked they wait in a new process until it is itself
        with _held_back([*_ENDS, notice]) as before, _handlers([*_ENDS, notice], came):
            for local in range(processes):
                pid = _fork()
                if pid == 0:
                    if listening is not None:
                        listening.close()
                    place = {"RANK": str(first + local), "LOCAL_RANK": str(local)}
                    _become(script, arguments, world | place, before, notice)
                pids.append(pid)
            if listening is not None:  # its threads start behind the forks
                store = TCPStore(
                    "127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
                )
            # who started this process may have blocked them until it can hand them on
            signal.pthread_sigmask(signal.SIG_SETMASK, before - {*_ENDS, notice})
            with watching():
                codes = _wait(dict(enumerate(pids, first)), came, notice, patience_s)
            meeting.end(store, codes)
        del store
    return codes, any(number != notice for number in came)


def _wait(pids: Mapping[int, int], came: list[int], notice: int, patience_s: float) -> dict[int, int]:
    """Wait for the processes of ranks, handing on the signals that come; returns their exit codes by rank."""
    alive, codes, seen = dict(pids), dict[int, int](), 0
    until = float("inf")
    while alive:
        for rank, pid in list(alive.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[rank] = os.waitstatus_to_exitcode(status)
                del alive[rank]
        for number in came[seen:]:
            seen += 1
            if number == notice:
                for pid in alive.values():
                    os.kill(pid, number)
            else:
                _end(alive, number)
                until = min(until, time.monotonic() + patience_s)
        if until == float("inf") and any(codes.values()):
            _end(alive, signal.SIGTERM)
            until = time.monotonic() + _FAILED_TIMEOUT_S
        if time.monotonic() > until:
            _end(alive, signal.SIGKILL)
        if alive:
            time.sleep(_POLL_S)
    return codes


def _end(alive: Mapping[int, int], number: int) -> None:
    for pid in alive.values():
        try:
            os.killpg(pid, number)
        except ProcessLookupError:  # it has not made its session yet
            os.kill(pid, number)


def _become(
    script: Path, arguments: Sequence[str], variables: Mapping[str, str], mask: set[int], notice: signal.Signals
) -> NoReturn:
    """Be a process that runs a script, as a new interpreter would be."""

    def run() -> None:
        os.setsid()
        for number in (*_ENDS, notice):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, {*mask, notice})
        os.environ.update(variables)
        logs.reset()
        _seed()
        _use_threads(variables.get("OMP_NUM_THREADS", ""))
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(line_buffering=True)
        sys.argv = [str(script), *arguments]
        runpy.run_path(str(script), run_name="__main__")

    status = _status_of(run)
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as the end of an interpreter does
    atexit._run_exitfuncs()
    _flush()
    os._exit(status)


def _seed() -> None:
    """Give each process random numbers of its own where no seed is set; Python's own are by themselves."""
    import numpy as np

    random.seed()
    np.random.seed()


def _use_threads(wanted: str) -> None:
    import torch

    if wanted.isdecimal() and int(wanted) not in (0, torch.get_num_threads()):
        torch.set_num_threads(int(wanted))


def _fork() -> int:
    """Fork; the new process is killed when this one is gone."""
    _flush()
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        end_with_parent(signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
    return pid


def _status_of(action: Callable[[], None]) -> int:
    """Run what a forked process is for; returns its exit status, having printed the error that it ends with."""
    try:
        action()
        return 0
    except SystemExit as stop:
        if isinstance(stop.code, str):
            echo(stop.code, error=True)
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        return 130
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        _flush()


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()


@contextmanager
def _held_back(numbers: Sequence[int]) -> Iterator[set[int]]:
    """Block signals; yields the mask before."""
    before = {int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, numbers)}
    try:
        yield before
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _handlers(numbers: Sequence[int], came: list[int]) -> Iterator[None]:
    before = {number: signal.signal(number, lambda got, _: came.append(got)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _named(number: int) -> str:
    return signal.Signals(number).name if number in [*signal.Signals] else f"signal {number}"
