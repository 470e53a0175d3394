"""What a run reads and leaves outside of its processes: files that the user's code opens, for `distrain prove`.

A note in a file, a cache, a counter on the disk: what training writes and reads again is in no checkpoint, and a later
start finds it as the one before has left it. Python itself reports each file that is opened (its audit events), in
this process and in those that it forks.
"""

from __future__ import annotations

import json
import os
import stat
import sys
import threading
import zlib
from pathlib import Path
from types import FrameType
from typing import Any

from distrain.config.user_files import is_users_path

VARIABLE = "DISTRAIN_TRACE"
"""See `distrain.training.callbacks.trace`."""
_MOST = 10_000  # files noted of one process; a data set may have many more
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_SYSTEM = ("/dev/", "/proc/", "/sys/")
_OWN = f"{Path(__file__).parents[2]}{os.sep}"
_IMPORTING = "<frozen importlib."
_COMPILER = ("/torch/_dynamo/convert_frame.py", "/torch/_inductor/")


class _Notes:
    """What one process has noted: each file once as read, as it was then, and once as written."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.known: set[tuple[str, bool]] = set()
        self.pid = os.getpid()
        self.local = threading.local()

    def hook(self, event: str, args: tuple[Any, ...]) -> None:
        if (look := _EVENTS.get(event)) is None or getattr(self.local, "busy", False):
            return
        self.local.busy = True
        try:
            for path, writes in look(*args):
                self.note(path, writes)
        except Exception:  # whatever is handed to open(): it is only looked at
            return
        finally:
            self.local.busy = False

    def note(self, path: Any, writes: bool) -> None:
        if not isinstance(path, str | bytes | os.PathLike):
            return  # a descriptor, which was opened before
        name = os.path.abspath(os.fsdecode(path))
        key = (name, writes)
        if key in self.known or len(self.known) >= _MOST or not _of_users(name):
            return
        self.known.add(key)
        noted = {"path": name, "writes": writes, "found": None if writes else _state_of(name)}
        with open(self.folder / f"files-{os.getpid()}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(noted) + "\n")


def note_files() -> None:
    """Note from here on the files that the user's code opens, in this process and all that it forks, for a trace."""
    if text := os.environ.get(VARIABLE):
        sys.addaudithook(_Notes(Path(json.loads(text)["folder"])).hook)


def _of_users(path: str) -> bool:
    """Whether it is the user's code that opens a file: what stands between that and here are libraries.

    What a library does while it is imported is its own, such as PyTorch's compiler, which makes a folder for its cache.
    And so is what that compiler does where it compiles the user's code on its way through it: what it keeps is known
    by what it was made of, and changes no number.
    """
    if path.startswith(_SYSTEM) or "__pycache__" in path or is_code(path):
        return False
    frame: FrameType | None = sys._getframe(3)
    while frame is not None and not frame.f_code.co_filename.startswith((_OWN, _IMPORTING)):
        if any(part in frame.f_code.co_filename for part in _COMPILER):
            return False
        if is_users_path(frame.f_code.co_filename):
            return True
        frame = frame.f_back
    return False


def is_code(path: str) -> bool:
    """Whether a file is one that importing reads."""
    return path.endswith((".py", ".pyc", ".so"))


def _state_of(path: str) -> str:
    """Return in words what there is: another after it was written."""
    try:
        found = os.stat(path)
        if stat.S_ISDIR(found.st_mode):
            names = sorted(os.listdir(path))
            return f"{len(names):,} entries ({zlib.crc32(repr(names[:_MOST]).encode()):08x})"
    except OSError:
        return "not there"
    return f"{found.st_size:,} bytes, written at {found.st_mtime_ns / 1e9:.6f}"


def _opened(path: Any, mode: Any, flags: Any = 0, *rest: Any) -> list[tuple[Any, bool]]:
    mode, flags = mode if isinstance(mode, str) else "", flags if isinstance(flags, int) else 0
    writes = bool(flags & _WRITES) or any(letter in mode for letter in "wax+")
    reads = not writes or "+" in mode or bool(flags & os.O_RDWR)  # one that is changed in place is read as well
    return [(path, False)] * reads + [(path, True)] * writes


_EVENTS = {
    "open": _opened,
    "os.rename": lambda source, target, *rest: [(target, True)],
    "os.link": lambda source, target, *rest: [(target, True)],
    "os.symlink": lambda source, target, *rest: [(target, True)],
    "os.mkdir": lambda path, *rest: [(path, False), (path, True)],
    "os.remove": lambda path, *rest: [(path, True)],
    "os.truncate": lambda path, *rest: [(path, True)],
    "os.listdir": lambda path, *rest: [(path, False)],
    "os.scandir": lambda path, *rest: [(path, False)],
    "sqlite3.connect": lambda path, *rest: [(path, False), (path, True)],
}
