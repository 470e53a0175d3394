"""Which jobs belong to a run, and their states in SLURM."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distrain.launchers.launcher import Job
from distrain.launchers.slurm.queue import jobs_of
from distrain.launchers.sweeps import read_sweep
from distrain.run.json_files import append_row, read_rows


def _record(folder: Path) -> Path:
    return folder / "submit" / "jobs.jsonl"


def note_job(folder: Path, number: str, **about: Any) -> None:
    """Note that a job was submitted for a run or a sweep."""
    append_row(_record(folder), {"job": number, "time": time.time(), **about})


def job_numbers(folder: Path) -> list[str]:
    """Return the numbers of the jobs that were submitted for a run or a sweep, the last one last."""
    return [str(row["job"]) for row in read_rows(_record(folder))]


def task_of(folder: Path) -> int | None:
    """Return which task of its sweep's array a run is, or None where it is of no sweep."""
    runs = read_sweep(folder.parent) or []
    return next((run.get("number", place) for place, run in enumerate(runs) if run["folder"] == folder.name), None)


def was_submitted(folder: Path) -> bool:
    """Whether a job was submitted for a run, a sweep, or the sweep that a run is of."""
    return bool(job_numbers(folder)) or (task_of(folder) is not None and bool(job_numbers(folder.parent)))


def jobs_of_folders(folders: Sequence[Path], latest: int = 5) -> dict[Path, list[Job]] | None:
    """Return the latest jobs of runs and sweeps that SLURM still knows, oldest first; None where there is no SLURM.

    Of a sweep these are the tasks of its arrays, of a run of a sweep its own task and what was submitted for it alone.
    SLURM is asked once for all.
    """
    own = {folder: job_numbers(folder)[-latest:] for folder in folders}
    tasks = {folder: task_of(folder) for folder in folders}
    shared = {
        folder: job_numbers(folder.parent)[-latest:] if task is not None else [] for folder, task in tasks.items()
    }
    found = jobs_of(sorted({number for each in (*own.values(), *shared.values()) for number in each}))
    if found is None:
        return None
    mine: dict[Path, list[Job]] = {}
    for folder in folders:
        numbers = {f"{number}_{tasks[folder]}" for number in shared[folder]}
        jobs = [job for id, job in found.items() if id.partition("_")[0] in own[folder] or id in numbers]
        mine[folder] = sorted(jobs, key=lambda job: [int(part) for part in job.id.split("_") if part.isdecimal()])
    return mine


def jobs_for(folder: Path) -> list[Job] | None:
    """Return the latest jobs of one run or sweep, oldest first; None where there is no SLURM."""
    found = jobs_of_folders([folder])
    return None if found is None else found[folder]


def queued_job(folder: Path) -> Job | None:
    """Return a job of a run or sweep that is queued or runs."""
    return next((job for job in jobs_for(folder) or [] if job.alive), None)
