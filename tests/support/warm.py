"""Starts the Python programs that a launcher starts without the time that their imports take.

`warm_children()` replaces what `subprocess.Popen` does for `python SCRIPT …`, `python -m MODULE …` and `python -c CODE
…`: the process is not executed anew but forked from a copy of this one, made before it had threads. It is a child of
this process as any other, with its own arguments, environment, folder, streams, session and blocked signals; only what
it imports was imported before. A process whose environment says something else of what is read at imports is started as
ever. All of them hash strings alike, whatever PYTHONHASHSEED is.
"""

from __future__ import annotations

import array
import atexit
import ctypes
import faulthandler
import inspect
import os
import pickle
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

READ_AT_IMPORT = (
    "CUDA_VISIBLE_DEVICES",
    "DS_ACCELERATOR",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "LD_LIBRARY_PATH",
    "LD_PRELOAD",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "PYTORCH_NVML_BASED_CUDA_CHECK",
    "TORCH_LOGS",
)
_PIPE_ENDS = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Program:
    """What is to be run, and where."""

    arguments: Sequence[str]
    """After the interpreter's name: its options, then `-c CODE`, `-m MODULE` or a script, then what it is given."""
    environment: dict[str, str]
    folder: str
    new_session: bool
    blocked: set[int]
    parent: int


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


def can_fork(command: Sequence[str], environment: Mapping[str, str]) -> bool:
    """Whether a command is a Python program that imports the same as this process has."""
    rest = [word for word in command[1:3] if word not in ("-u", "-P")]
    return (
        bool(rest)
        and command[0] == sys.executable
        and (rest[0] in ("-c", "-m") or rest[0].endswith(".py"))
        and all(environment.get(name) == os.environ.get(name) for name in READ_AT_IMPORT)
    )


@contextmanager
def warm_children() -> Iterator[None]:
    """Have Python programs that this process starts forked. It must have no threads yet."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    this = os.getpid()
    if os.fork() == 0:
        ours.close()
        _serve(theirs)
    theirs.close()
    # a forked process whose own parent ends at once becomes a child of this one
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    original = subprocess.Popen._execute_child  # type: ignore[attr-defined]
    names = list(inspect.signature(original).parameters)

    def execute_child(self: Any, *values: Any) -> None:
        given = dict(zip(names[1:], values, strict=True))
        environment = dict(os.environ if given["env"] is None else given["env"])
        command = given["args"]
        command = [command] if isinstance(command, str) else [os.fspath(word) for word in command]
        if os.getpid() != this or given["preexec_fn"] or given["shell"] or not can_fork(command, environment):
            original(self, *values)
            return
        blocked = {int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])}
        folder = os.fspath(given["cwd"] or os.getcwd())
        program = Program(command[1:], environment, folder, given["start_new_session"], blocked, this)
        streams = [
            default if end == -1 else end
            for end, default in ((given["p2cread"], 0), (given["c2pwrite"], 1), (given["errwrite"], 2))
        ]
        socket.send_fds(ours, [pickle.dumps(program)], streams)
        self.pid = int.from_bytes(ours.recv(8), "little")
        self._child_created = True
        self._close_pipe_fds(*(given[name] for name in names if name in _PIPE_ENDS))

    subprocess.Popen._execute_child = execute_child  # type: ignore[attr-defined]
    try:
        yield
    finally:
        subprocess.Popen._execute_child = original  # type: ignore[attr-defined]
        ours.close()


def _serve(requests: socket.socket) -> None:
    """Fork a process for each request, until the other end is gone. Never returns."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # it is among the children of a launcher, which hands signals on to all of them
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    while True:
        message, streams, _, _ = socket.recv_fds(requests, 1 << 20, 3)
        if not message:
            os._exit(0)
        program: Program = pickle.loads(message)
        read, write = os.pipe()
        between = os.fork()
        if between == 0:
            child = os.fork()
            if child == 0:
                for number in (requests.fileno(), read, write):
                    os.close(number)
                _become(program, streams)
            os.write(write, child.to_bytes(8, "little"))
            os._exit(0)
        os.waitpid(between, 0)  # from now on the process is a child of who asks
        requests.send(os.read(read, 8))
        for number in (*streams, read, write):
            os.close(number)


def _become(program: Program, streams: array.array[int] | list[int]) -> None:
    """Be that program. Never returns."""
    _prctl(_PR_SET_PDEATHSIG, 0)
    while os.getppid() != program.parent:  # the one between is about to end
        if os.getppid() == 1:
            os._exit(1)
        time.sleep(0.001)
    if program.new_session:
        os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, program.blocked)
    faulthandler.disable()
    os.chdir(program.folder)
    os.environ.clear()
    os.environ.update(program.environment)
    atexit._clear()
    arguments = list(program.arguments)
    options = []
    while arguments[0] in ("-u", "-P"):
        options.append(arguments.pop(0))
    for folder in reversed(program.environment.get("PYTHONPATH", "").split(os.pathsep)):
        if folder and folder not in sys.path:
            sys.path.insert(0, folder)
    status = 0
    try:
        with warm_children() if arguments[0] in ("-c", "-m") else nullcontext():
            if arguments[0] == "-c":
                sys.argv = ["-c", *arguments[2:]]
                exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
            elif arguments[0] == "-m":
                sys.argv = arguments[1:]
                runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
            else:
                sys.argv = arguments
                sys.path.insert(0, os.path.dirname(os.path.abspath(arguments[0])))
                runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except KeyboardInterrupt:
        status = 130
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
