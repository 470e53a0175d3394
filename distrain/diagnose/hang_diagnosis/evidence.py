"""What else tells a rank that hangs from one that waits for it: its loaders, its collectives, what its thread does."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from distrain.diagnose.hang_diagnosis.stacks import PACKAGE, Stack, parse_dump
from distrain.run import heartbeat

T = TypeVar("T")


def within(action: Callable[..., T], seconds: float, *args: Any) -> T | None:
    """Return what `action(*args)` returns, or None if that takes longer or fails."""
    found: list[T] = []

    def act() -> None:
        with suppress(Exception):
            found.append(action(*args))

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else None


# --------------------------------------------------------------------------------------------------------------------
# Loader processes


def loaders() -> list[tuple[int, int]]:
    """Return (process, number of the loader) of the loader processes that this process has."""
    file = heartbeat.open_loader_notes()
    if file is None:
        return []
    content = os.pread(file, os.fstat(file).st_size, 0).decode(errors="replace")
    found = []
    for line in content.splitlines():
        parts = line.split()
        if len(parts) == 3 and parts[0] == "loader" and _parent(int(parts[1])) == os.getpid():
            found.append((int(parts[1]), int(parts[2])))
    return list(dict.fromkeys(found))


def _parent(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return None


def loader_stacks(patience_s: float = 0.3) -> list[tuple[str, Stack]]:
    """Return the name and the stack of each loader process of this process."""
    file = heartbeat.open_loader_notes()
    found: list[tuple[str, Stack]] = []
    for pid, worker in loaders():
        assert file is not None, "there are notes"
        assert heartbeat.STACK_SIGNAL is not None, "they listen to it"
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
        if dumped:
            found.append((f"loader process {worker}", dumped[-1]))
    return found


def main_of(dumped: list[Stack]) -> Stack:
    """Return of the stacks of a process that has written them itself the one of the thread that trains.

    Empty where that has not been written so far: the other threads come first.
    """
    training = [
        stack
        for stack in dumped
        if any(frame.file.startswith(PACKAGE) for frame in stack)
        and not any(frame.file.endswith("/threading.py") and frame.function == "_bootstrap" for frame in stack)
    ]
    return training[-1] if training else []


# --------------------------------------------------------------------------------------------------------------------
# This process


def cpu_share(task: int, seconds: float = 0.2) -> float | None:
    """Return how much of the time a thread of this process computes; None where that is not known."""

    def used() -> float:
        parts = Path(f"/proc/self/task/{task}/stat").read_text().rpartition(")")[2].split()
        return (int(parts[11]) + int(parts[12])) / os.sysconf("SC_CLK_TCK")

    try:
        before, began = used(), time.monotonic()
        time.sleep(seconds)
        return (used() - before) / (time.monotonic() - began)
    except (OSError, ValueError, IndexError):
        return None


def collectives(path: Path) -> dict[str, int]:
    """Return how many collectives this process has begun in each group, from the flight recorder of torch.

    What it has recorded is written to `path`, with the name of the backend and .json added. Empty without torch, or
    without a recorder.
    """
    recorder = sys.modules.get("torch._C._distributed_c10d")
    if recorder is None:
        return {}
    found: dict[str, int] = {}
    for backend in ("nccl", "gloo"):
        text = within(_recorded, 1.0, recorder, backend)
        if text is None:
            continue
        with suppress(Exception):
            entries = json.loads(text).get("entries", [])
            if not entries:
                continue
            with suppress(OSError):
                path.with_name(f"{path.name}-{backend}.json").write_text(text, encoding="utf-8")
            for entry in entries:
                group = f"{backend} {' '.join(map(str, entry.get('process_group', ())))}"
                found[group] = max(found.get(group, 0), int(entry.get("collective_seq_id", 0)))
    return found


def _recorded(recorder: Any, backend: str) -> str | None:
    if hasattr(recorder, "_dump_fr_trace_json"):
        text = recorder._dump_fr_trace_json(includeCollectives=True, onlyActive=False, backend=backend)
    elif backend == "nccl" and hasattr(recorder, "_dump_nccl_trace_json"):
        text = recorder._dump_nccl_trace_json(includeCollectives=True, onlyActive=False)
    else:
        return None
    return text.decode() if isinstance(text, bytes) else text
