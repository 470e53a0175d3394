"""`Launcher`: one kind of place where runs are started, this machine or a cluster's queue.

A launcher is one class in a file of its own, registered under its name, or offered by an installed package as
`distrain.launchers`. `distrain status`, `cancel` and `stop` ask launchers and know of no scheduler.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from distrain.config.registry import launchers as registry

_ALIVE = (
    *("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "SIGNALING"),
    *("RESIZING", "STAGE_OUT", "STOPPED", "SPECIAL_EXIT", "REQUEUE_FED", "RESV_DEL_HOLD"),
)


@dataclass(frozen=True)
class Job:
    """The state of a job in a queue, or of one task of an array."""

    id: str
    """17, or 17_3."""
    state: str
    """PENDING, RUNNING, COMPLETING, COMPLETED, CANCELLED, TIMEOUT, ..."""
    reason: str = ""
    """Why it is pending, or where it runs."""
    elapsed: str = ""
    left: str = ""

    @property
    def elapsed_s(self) -> float | None:
        """Seconds since it was started (the last time), None before, and where the queue does not report it."""
        match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", self.elapsed)
        if match is None:
            return None
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
        return ((days * 24 + hours) * 60 + minutes) * 60 + seconds

    @property
    def alive(self) -> bool:
        """Whether it is queued or runs."""
        return self.state in _ALIVE


@dataclass(frozen=True)
class Submitted:
    """The result of a submission."""

    job: str | None = None
    """The queue's number of the job; None where the processes were started here, and have ended."""
    status: int = 0
    """The exit status of the command: 0 where the job is queued, or all processes have ended well."""
    run: Path | None = None
    """The folder of the run."""


class Launcher(Protocol):
    """One kind of place where runs are started."""

    name: str

    def submit(self, start: Any) -> Submitted:
        """Start the processes of a request, or queue a job.

        `start` is a RunRequest where the place is this machine, and otherwise what holds requests with what their job
        needs besides. Raises UserError where the run is at work already.
        """
        ...

    def knows(self, folder: Path) -> bool:
        """Whether a job of this run or sweep was submitted by this launcher."""
        ...

    def status(self, folders: Sequence[Path]) -> dict[Path, list[Job]] | None:
        """Return the latest jobs of runs and sweeps, by folder, oldest first; None where there is no such queue here.

        Raises UserError where the queue does not answer.
        """
        ...

    def cancel(self, folder: Path) -> list[Job]:
        """Cancel every job of a run or sweep that is queued or runs; returns these, as they were.

        Raises UserError where nothing can be cancelled from here.
        """
        ...


def find_launcher(name: str) -> Launcher:
    """Return the launcher of that name: built in, of an installed package, `file.py:NAME` or `package.module:NAME`."""
    found: Launcher = registry.find(name).value()
    return found


def all_launchers() -> list[Launcher]:
    """Return the launchers that are registered, and those that installed packages offer."""
    return [find_launcher(name) for name in dict.fromkeys((*registry.names(), *registry.installed()))]


def launcher_of(folder: Path) -> Launcher:
    """Return the launcher that a run's or sweep's jobs were submitted by; this machine's where there are none."""
    return next((each for each in all_launchers() if each.knows(folder)), find_launcher("local"))


def jobs_of_folders(folders: Sequence[Path]) -> dict[Path, list[Job]]:
    """Return the jobs of runs and sweeps in all queues; raises UserError where one does not answer."""
    jobs: dict[Path, list[Job]] = {folder: [] for folder in folders}
    for each in all_launchers():
        for folder, found in (each.status(folders) or {}).items():
            jobs[folder] += found
    return jobs
