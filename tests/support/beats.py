"""Heartbeats of ranks that do not run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from distrain.run import heartbeat
from distrain.run.folder import RunDir
from distrain.run.heartbeat import Heartbeat
from distrain.system.processes import process_started


def beat(rank: int = 0, **values: Any) -> Heartbeat:
    """Return a heartbeat of this process."""
    known: dict[str, Any] = {
        "host": "n1", "pid": os.getpid(), "started": process_started(), "job": None, "attempt": "a", "world_size": 4,
        "sequence": 1, "time": 1e9, "interval": 5.0, "step": 7, "marks": 3, "phase": "forward", "seconds": 0.5,
        "idle": 0.0, "steps": 7,
    }  # fmt: skip
    return Heartbeat(rank=rank, **known | values)


def run_in(folder: Path) -> RunDir:
    """Return a run folder with a place for heartbeats."""
    run = RunDir(folder / "run")
    heartbeat.folder(run).mkdir(parents=True)
    return run
