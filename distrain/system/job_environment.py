"""The scheduler's job of this process: its number, node, attempt and notice signal.

Each scheduler registers a reader of its variables, in its folder of `distrain.launchers`. All other code calls
`job_environment` and reads no scheduler's variable.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class JobEnvironment:
    """The job that this process belongs to. The defaults are a process without a scheduler."""

    scheduler: str = "none"
    """The scheduler's name."""
    job: str | None = None
    """The job's number, the same in all its attempts; None without a scheduler."""
    queue_id: str | None = None
    """The job as the scheduler's commands take it: 17, or 17_3 for a task of an array."""
    restart: int = 0
    """How often the scheduler has requeued the job: the number of this attempt, from 0."""
    node: str | None = None
    """The index of this node in the job, from 0, as the scheduler writes it."""
    cpus: int | None = None
    """The job's CPUs on this node; None: unknown."""
    notice: signal.Signals = signal.SIGUSR1
    """The signal that announces a preemption or the time limit: the run is to save and stop."""

    @property
    def requeued(self) -> bool:
        """Whether the scheduler, and not a person, started this attempt."""
        return self.restart > 0

    @property
    def attempt(self) -> str | None:
        """The job with the number of its attempt, such as 17.0; None without a scheduler."""
        return f"{self.job}.{self.restart}" if self.job else None


Reader = Callable[[Mapping[str, str]], JobEnvironment | None]
_READERS: dict[str, Reader] = {}


def register_job_environment(scheduler: str) -> Callable[[Reader], Reader]:
    """Register a function that reads a scheduler's variables and returns its job, or None."""

    def add(reader: Reader) -> Reader:
        _READERS[scheduler] = reader
        return reader

    return add


def job_environment(variables: Mapping[str, str] = os.environ) -> JobEnvironment:
    """Return the job of this process, from the first scheduler whose variables name one."""
    found = (reader(variables) for reader in _READERS.values())
    return next((job for job in found if job is not None), JobEnvironment())
