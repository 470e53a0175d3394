"""Which jobs belong to a run, and what SLURM says of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distrain.rundir import append_row, now, read_rows
from distrain.slurm.queue import Job, jobs_of
from distrain.slurm.sweeps import read_sweep


def _record(folder: Path) -> Path:
    return folder / "submit" / "jobs.jsonl"


def note_job(folder: Path, number: str, **about: Any) -> None:
    """Note that a job was submitted for a run or a sweep."""
    append_row(_record(folder), {"job": number, "time": now(), **about})


def job_numbers(folder: Path) -> list[str]:
    """Return the numbers of the jobs that were submitted for a run or a sweep, the last one last."""
    return [str(row["job"]) for row in read_rows(_record(folder))]


def task_of(folder: Path) -> int | None:
    """Return which task of its sweep's array a run is, or None where it is of no sweep."""
    runs = read_sweep(folder.parent) or []
    return next((number for number, run in enumerate(runs) if run["folder"] == folder.name), None)


def was_submitted(folder: Path) -> bool:
    """Whether a job was submitted for a run, a sweep, or the sweep that a run is of."""
    return bool(job_numbers(folder)) or (task_of(folder) is not None and bool(job_numbers(folder.parent)))


def jobs_for(folder: Path, latest: int = 5) -> list[Job] | None:
    """Return the latest jobs of a run or a sweep that SLURM still knows, oldest first; None where there is no SLURM.

    Of a sweep these are the tasks of its arrays; of a run of a sweep its own tasks.
    """
    task = task_of(folder)
    shared = job_numbers(folder.parent)[-latest:] if task is not None else []
    own = job_numbers(folder)[-latest:]
    found = jobs_of([*shared, *own])
    if found is None:
        return None
    numbers = {f"{number}_{task}" for number in shared}
    mine = [job for id, job in found.items() if id.partition("_")[0] in own or id in numbers]
    return sorted(mine, key=lambda job: [int(part) for part in job.id.split("_") if part.isdecimal()])


def queued_job(folder: Path) -> Job | None:
    """Return a job of a run or sweep that is queued or runs."""
    return next((job for job in jobs_for(folder) or [] if job.alive), None)
