"""Further evidence for which rank hangs and which waits for it: its collectives, what its thread does."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from distrain.run.stacks import PACKAGE, Stack
from distrain.system.processes import process_stat

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

    before, began = process_stat(f"self/task/{task}"), time.monotonic()
    if before is None:
        return None
    time.sleep(seconds)
    after = process_stat(f"self/task/{task}")
    return None if after is None else (after.computed_s - before.computed_s) / (time.monotonic() - began)


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
    how = {"includeCollectives": True, "onlyActive": False}
    try:
        text = recorder._dump_fr_trace_json(**how, backend=backend)
    except (AttributeError, TypeError):  # torch 2.11 has a function for each backend
        dump = getattr(recorder, "_dump_nccl_trace_json" if backend == "nccl" else "_dump_fr_trace_json", None)
        if dump is None:
            return None
        text = dump(**how)
    return text.decode() if isinstance(text, bytes) else text
