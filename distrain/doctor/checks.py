"""How checks are run: each in a process of its own, for a limited time, so that none takes the others with it."""

from __future__ import annotations

import importlib
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, Pipe
from typing import NoReturn

from distrain.doctor.context import Context
from distrain.doctor.findings import Finding, Level, error
from distrain.system.output import error_line

LIMIT_S = 60.0
"""How long a check may take that reads some files: a file system that hangs does so for minutes."""
COMPUTE_LIMIT_S = 300.0
"""The same of one that imports PyTorch, from a slow disk perhaps."""


@dataclass(frozen=True)
class Check:
    """A question to a machine."""

    name: str
    """As it is shown, in lower case but for what is a name, such as `open files`."""
    function: Callable[[Context], Iterable[Finding]]
    """Yields what it finds; nothing where the question does not arise. An exception is an error of the check."""
    limit_s: float = LIMIT_S
    """Seconds after which it is ended, and said to hang."""
    then_import: str = ""
    """What it has imported: those that follow need not, once this process has done so where that is safe."""


def run_checks(checks: Sequence[Check], context: Context, *, limit_s: float | None = None) -> Iterator[list[Finding]]:
    """Yield what each check finds, in order; `limit_s` replaces the limit of each.

    A check that raises, hangs or is killed yields an error that says so, behind what it had found before.
    """
    for check in checks:
        found = run_check(check, context, limit_s or check.limit_s)
        yield [replace(each, check=check.name, host=context.host) for each in found]
        if check.then_import and not any(each.level is Level.error for each in found):
            importlib.import_module(check.then_import)


def run_check(check: Check, context: Context, limit_s: float) -> list[Finding]:
    """Return what a check finds in a process that is forked for it, and an error where that does not end well."""
    ours, theirs = Pipe(duplex=False)
    output = os.memfd_create("distrain-doctor-check")
    # not a process of multiprocessing: that waits at exit for each of them, also for one that the kernel holds
    if (pid := os.fork()) == 0:
        _in_child(check, context, ours, theirs, output)
    theirs.close()
    try:
        found, problem = _receive(ours, pid, time.monotonic() + limit_s)
        if problem is None:
            return found
        if problem == "hangs":
            what = f"did not end within {limit_s:g} s"
            means = "a file system, a driver or a network that it asks does not answer; a run would wait for it as well"
            do = "see where processes wait in the kernel (ps -eo pid,stat,wchan:30,args), and mend what it is about"
            return [*found, error(what, means, do)]
        said = _last_line(output)
        what = f"the check {problem}{f': {said}' if said else ''}"
        return [*found, error(what, "this could not be looked at", "mend what it names, and start again")]
    finally:
        ours.close()
        os.close(output)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        _ended(pid, time.monotonic() + 1.0)  # what waits in the kernel does not even end when it is killed


def _receive(ours: Connection, pid: int, until: float) -> tuple[list[Finding], str | None]:
    """Return what came before the time was over, and how it ended if not well."""
    found: list[Finding] = []
    while ours.poll(max(0.0, until - time.monotonic())):
        try:
            item = ours.recv()
        except EOFError:
            return found, _how_it_ended(_ended(pid, time.monotonic() + 10.0))
        if item is None:
            return found, None
        if isinstance(item, str):
            return found, item
        found.append(item)
    return found, "hangs"


def _ended(pid: int, until: float) -> int | None:
    """Return the exit code of a process that ends before `until`, as `subprocess` counts; else None."""
    with suppress(ChildProcessError):
        while True:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() > until:
                return None
            time.sleep(0.005)
    return None


def _how_it_ended(code: int | None) -> str:
    if code is not None and code < 0:
        with suppress(ValueError):
            return f"was ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def _in_child(check: Check, context: Context, ours: Connection, theirs: Connection, output: int) -> NoReturn:
    try:
        os.setpgid(0, 0)  # with all that it starts it is ended
        ours.close()
        for stream in (1, 2):  # what libraries print is no result
            os.dup2(output, stream)
        for each in check.function(context):
            theirs.send(each)
        theirs.send(None)
    except Exception as raised:
        theirs.send(f"raised {error_line(raised)}")
    finally:
        os._exit(1)


def _last_line(output: int) -> str:
    size = os.fstat(output).st_size
    text = os.pread(output, 4096, max(0, size - 4096)).decode(errors="replace").strip()
    return text.splitlines()[-1][:200] if text else ""
