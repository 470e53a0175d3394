"""Where threads are: their Python stacks, which line of them a person wants to see, and whether it waits for others."""

from __future__ import annotations

import linecache
import os
import re
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import distrain
from distrain.run import heartbeat
from distrain.system.processes import process_stat

PACKAGE = str(Path(distrain.__file__).parent) + os.sep
_SCHEMES = sysconfig.get_paths()
_SITE = tuple({str(Path(_SCHEMES[key])) + os.sep for key in ("purelib", "platlib")})
_STANDARD = tuple({str(Path(_SCHEMES[key])) + os.sep for key in ("stdlib", "platstdlib")})
_SITES = ("/site-packages/", "/dist-packages/")
_PLUMBING = ("torch", "torchvision", "accelerate", "deepspeed", "numpy", "pandas", "tqdm", "rich", "distrain")
"""Installed packages in which nobody looks for a mistake of their own first."""


@dataclass(frozen=True)
class Frame:
    """A line that is being run."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{shortened(self.file)}:{self.line} in {self.function}"

    def source(self) -> str:
        """Return the line itself, as far as it can be read."""
        return linecache.getline(self.file, self.line).strip()


def shortened(file: str) -> str:
    """Return a file's name as people know it: from the current folder, or from the package on."""
    for site in (*_SITE, os.path.dirname(PACKAGE.rstrip(os.sep)) + os.sep, os.getcwd() + os.sep):
        if file.startswith(site):
            return file[len(site) :]
    for name in _SITES:
        if name in file:
            return file.rpartition(name)[2]
    return file


Stack = list[Frame]
"""The innermost frame first."""


def stack_of(frame: FrameType | None) -> Stack:
    """Return the stack that ends in `frame`."""
    found = []
    while frame is not None:
        found.append(Frame(frame.f_code.co_filename, frame.f_lineno or 0, frame.f_code.co_name))
        frame = frame.f_back
    return found


def stacks() -> dict[int, Stack]:
    """Return the stacks of all threads of this process but the one that looks, by their identifier."""
    own = threading.get_ident()
    return {thread: stack_of(frame) for thread, frame in sys._current_frames().items() if thread != own}


_FRAME = re.compile(r'^  File "(?P<file>.*)", line (?P<line>\d+|\?\?\?) in (?P<function>.*)$')
_THREAD = re.compile(r"^(?P<current>Current thread|Thread) (?P<thread>0x[0-9a-f]+)")


def parse_dump(text: str) -> list[Stack]:
    """Return the stacks in what `faulthandler` wrote; the current thread's, where there is one, is the last."""
    found: list[Stack] = []
    last: Stack | None = None
    for line in text.splitlines():
        if match := _THREAD.match(line):
            found.append([])
            if match["current"] == "Current thread":
                last = found[-1]
        elif found and (match := _FRAME.match(line)):
            number = int(match["line"]) if match["line"].isdecimal() else 0
            found[-1].append(Frame(match["file"], number, match["function"]))
    if last is not None:
        found.remove(last)
        found.append(last)
    return found


# --------------------------------------------------------------------------------------------------------------------
# The line to look at


def inner(stack: Stack) -> Stack:
    """Return the part of a stack that distrain has called, with its own lines."""
    # what the command line or a launcher has called, and not these: their frames are of no interest
    command = next((index for index, frame in enumerate(stack) if _is_command_line(frame.file)), len(stack))
    stack = stack[:command] or stack
    own = [index for index, frame in enumerate(stack) if frame.file.startswith(PACKAGE)]
    return stack[: own[-1] + 1] if own else stack


_COMMAND_LINE = re.compile(r"(typer|click)/|distrain/(cli/\w+|__main__|launchers/forking)\.py$")


def _is_command_line(file: str) -> bool:
    return _COMMAND_LINE.match(shortened(file)) is not None


def without_machinery(stack: Stack) -> Stack:
    """Return the innermost lines, down to distrain's own, without those of torch and multiprocessing between them."""
    own = next((index for index, frame in enumerate(stack) if frame.file.startswith(PACKAGE)), len(stack))
    return [frame for frame in stack[:own] if not _MACHINERY.search(frame.file)]


_MACHINERY = re.compile(r"(site|dist)-packages/torch/|lib/python[0-9.]+/multiprocessing/|^<")


def line_to_see(stack: Stack) -> Frame | None:
    """Return the innermost line of the user's own files, else of a package of theirs, else the innermost line."""
    stack = inner(stack)
    by_kind: dict[str, Frame] = {}
    for frame in stack:
        by_kind.setdefault(_kind(frame.file), frame)
    return by_kind.get("own") or by_kind.get("package") or by_kind.get("distrain") or (stack[0] if stack else None)


def _kind(file: str) -> str:
    if file.startswith(PACKAGE):
        return "distrain"
    if file.startswith("<"):
        return "other"
    site = next((name for name in _SITES if name in file), None)
    if site is not None or file.startswith(_SITE):
        root = next((prefix for prefix in _SITE if file.startswith(prefix)), None)
        inside = file[len(root) :] if root else file.rpartition(site or "")[2]
        return "other" if inside.split(os.sep)[0].removesuffix(".py") in _PLUMBING else "package"
    return "other" if file.startswith(_STANDARD) else "own"


_TRANSPARENT = ("torch/_ops.py", "torch/utils/_contextlib.py", "torch/_compile.py", "torch/_dynamo/", "contextlib.py")
_COLLECTIVE = ("torch/distributed/", "torch/nn/parallel/distributed.py", "deepspeed/comm/", "deepspeed/runtime/comm/")
_OF_DISTRAIN = ("share_buffers", "_agree_on_another_order")
"""Functions of distrain that call a collective which has no Python of its own, or wait for other ranks."""
_BACKWARD = (("torch/autograd/graph.py", "_engine_run_backward"), ("distrain/parallel/ddp.py", "_run_backward"))
"""Files and functions that call the engine of a backward pass, which has no Python of its own."""


def waits(stack: Stack) -> bool | None:
    """Whether a thread waits for other ranks, judged by its innermost lines; None where they leave it open.

    A backward pass and waiting for a GPU look the same from Python whether they wait for others or not.
    """
    for frame in stack:
        name = shortened(frame.file)
        if any(part in name for part in _TRANSPARENT):
            continue
        if any(part in name for part in _COLLECTIVE):
            return True
        if name.startswith("deepspeed/") and frame.function.startswith("wait"):
            return True
        if frame.file.startswith(PACKAGE) and frame.function in _OF_DISTRAIN:
            return True
        if any(name.endswith(file) and frame.function == function for file, function in _BACKWARD):
            return None
        if "torch/cuda/" in name and "synchronize" in frame.function:
            return None
        return False
    return False


_OF_DEVICE = ("torch/", "distrain/parallel/", "distrain/loop.py", "deepspeed/", "accelerate/")
_NOT_OF_DEVICE = ("torch/utils/data/", "torch/multiprocessing/", "torch/_inductor/", "torch/_dynamo/")
_READS_DEVICE = re.compile(r"\.(item|tolist|cpu|numpy|nonzero|synchronize|to)\(")


def is_at_device(stack: Stack) -> bool:
    """Whether a thread is likely to be in a call to a GPU: one that waits for it, or that it has no room for."""
    if not stack or not _on_gpu() or waits(stack):
        return False
    name = shortened(stack[0].file)
    if name.startswith(_NOT_OF_DEVICE):
        return False
    return name.startswith(_OF_DEVICE) or _READS_DEVICE.search(stack[0].source()) is not None


def _on_gpu() -> bool:
    torch: Any = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_initialized()


_DEBUGGERS = ("/bdb.py", "/pdb.py", "/pydevd", "/debugpy/")


def is_debugged(stack: Stack) -> bool:
    """Whether a person looks at this thread with a debugger."""
    return any(part in frame.file for frame in stack for part in _DEBUGGERS)


@dataclass(frozen=True)
class Where:
    """Where a rank is."""

    line: Frame | None
    """The line to look at."""
    waits: bool | None
    """Whether it waits for other ranks; None where that is unknown."""
    thread: str
    """Whose line it is: of the main thread, of another one by name, or of a loader process."""
    stack: tuple[str, ...]
    """The whole of it, the innermost line first, in words."""
    device: bool = False
    """Whether it is likely to be in a call to a GPU."""

    def plain(self) -> dict[str, Any]:
        """Return it as values for JSON."""
        return asdict(self)

    @classmethod
    def of(cls, content: dict[str, Any] | None) -> Where | None:
        """Read what `plain` gave; None where there is nothing."""
        if not content:
            return None
        line = Frame(**content["line"]) if content.get("line") else None
        thread, stack = content.get("thread", ""), tuple(content.get("stack", ()))
        return cls(line, content.get("waits"), thread, stack, content.get("device", False))


def where(stack: Stack, thread: str = "", *, waiting: bool | str | None = "look") -> Where:
    """Describe a stack; `waiting` overrides the judgement by its lines."""
    found = waits(stack) if waiting == "look" else waiting
    assert not isinstance(found, str)
    return Where(line_to_see(stack), found, thread, tuple(map(str, inner(stack)[:40])), is_at_device(stack))


def where_is(main: int, threads: dict[int, Stack], loaders: Sequence[tuple[str, Stack]] = ()) -> Where:
    """Return where this process is: its thread `main`, or what that one waits for within the process.

    `threads` are the `stacks` of this process. `loaders` are the processes that load data for it, with their stacks.
    """
    found = dict(threads)
    stack = found.pop(main, [])
    names = {thread.ident: thread for thread in threading.enumerate()}
    if _is_waiting_for_thread(stack):
        for ident, other in found.items():
            thread = names.get(ident)
            if thread is not None and thread.name.startswith("checkpoint-"):
                return where(other, f"the thread {thread.name!r}", waiting=False)
    if waits(stack) is None:
        # on a GPU the backward pass runs on threads of the autograd engine, which Python's threading does not know
        for ident, other in found.items():
            unknown = ident not in names or isinstance(names[ident], threading._DummyThread)
            if unknown and any(frame.file.endswith("torch/autograd/function.py") for frame in other):
                return where(other, "a thread of the backward pass")
    if any("torch/utils/data/dataloader.py" in shortened(frame.file) for frame in inner(stack)):
        for name, other in loaders:
            if not is_idle_loader(other):
                return where(other, name, waiting=False)
    return where(stack)


def _is_waiting_for_thread(stack: Stack) -> bool:
    joins = ("join", "wait", "_wait_for_tstate_lock")
    for frame in stack:
        if frame.file.endswith("/threading.py") and frame.function in joins:
            continue
        return bool(stack) and frame is not stack[0] and "distrain/checkpoints/" in frame.file
    return False


def is_idle_loader(stack: Stack) -> bool:
    """Whether a loader process is idle, without a batch to load."""
    for frame in stack:
        if "/multiprocessing/" in frame.file or frame.file.endswith(("/selectors.py", "/threading.py")):
            continue
        return shortened(frame.file).startswith("torch/utils/data/_utils/worker.py")
    return True


def format_stacks(found: dict[int, Stack]) -> Iterator[str]:
    """Yield the lines of a report of all threads' stacks."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    for ident, stack in found.items():
        yield f"thread {names.get(ident, 'without a name')} ({ident:#x}), the innermost line first:"
        for frame in stack:
            source = frame.source()
            yield f"  {shortened(frame.file)}:{frame.line} in {frame.function}" + (f": {source}" if source else "")
        yield ""


# --------------------------------------------------------------------------------------------------------------------
# Loader processes

_asking = threading.Lock()


def loaders() -> list[tuple[int, int]]:
    """Return (process, number of the loader) of the loader processes that this process has."""
    file = heartbeat.open_loader_notes()
    if file is None:
        return []
    content = os.pread(file, os.fstat(file).st_size, 0).decode(errors="replace")
    found = []
    for line in content.splitlines():
        parts = line.split()
        if len(parts) == 3 and parts[0] == "loader" and _is_own(int(parts[1])):
            found.append((int(parts[1]), int(parts[2])))
    return list(dict.fromkeys(found))


def _is_own(pid: int) -> bool:
    found = process_stat(pid)
    return found is not None and found.parent == os.getpid()


def loader_stack(pid: int, patience_s: float = 0.3) -> Stack | None:
    """Return the stack of a loader process of this process; None where it does not answer in time."""
    file = heartbeat.open_loader_notes()
    if file is None or heartbeat.STACK_SIGNAL is None:
        return None
    with _asking:
        begin = os.fstat(file).st_size
        with suppress(OSError):
            os.kill(pid, heartbeat.STACK_SIGNAL)
        until, size = time.monotonic() + patience_s, begin
        while time.monotonic() < until:
            time.sleep(0.02)
            before, size = size, os.fstat(file).st_size
            if size > begin and size == before:
                break
        dumped = parse_dump(os.pread(file, size - begin, begin).decode(errors="replace"))
    return dumped[-1] if dumped else None


def loader_stacks() -> list[tuple[str, Stack]]:
    """Return the name and the stack of each loader process of this process that answers."""
    found = ((f"loader process {worker}", loader_stack(pid)) for pid, worker in loaders())
    return [(name, stack) for name, stack in found if stack is not None]
