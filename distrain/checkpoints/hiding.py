"""Names of what is being written or deleted: hidden, and telling whose they are, so that leftovers are found."""

from __future__ import annotations

import os
import re
import socket
import time
from pathlib import Path

from distrain.system.processes import process_started

_LEFTOVER = re.compile(r"\.(?:tmp|trash)-.+-(?P<host>[A-Za-z0-9._]+)-(?P<pid>[0-9]+)-(?P<start>[0-9]+)-[0-9a-f]+")
_DAY = 24 * 60 * 60
HOST = re.sub(r"[^A-Za-z0-9._]", "_", socket.gethostname()) or "unknown"


def _started(pid: int) -> int | None:
    """Return when process `pid` of this host started, in kernel ticks (0: unknown); None if it has ended."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        return 0  # another user's process, so not the one that wrote here
    return process_started(pid)


def hidden(kind: str, what: str) -> str:
    """Return the name of `what` while it is being written (`tmp`) or deleted (`trash`)."""
    pid = os.getpid()
    return f".{kind}-{what}-{HOST}-{pid}-{_started(pid) or 0}-{os.urandom(4).hex()}"


def is_leftover(path: Path) -> bool:
    """Whether `path` is hidden and abandoned: its process has ended, or nothing in it changed for a day."""
    match = _LEFTOVER.fullmatch(path.name)
    if match is None:
        return False
    if match["host"] == HOST:
        return _started(int(match["pid"])) != int(match["start"])
    inside = path.iterdir() if path.is_dir() else ()
    newest = max(entry.stat(follow_symlinks=False).st_mtime for entry in (path, *inside))
    return time.time() - newest > _DAY
