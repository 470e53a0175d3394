"""SLURM as a `Launcher`: jobs in its queue."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from distrain.config import UserError
from distrain.config.registry import launchers
from distrain.launchers.launcher import Job, Submitted
from distrain.launchers.slurm.queue import cancel
from distrain.launchers.slurm.tracking import jobs_for, jobs_of_folders, was_submitted

if TYPE_CHECKING:
    from distrain.launchers.slurm.submitting import Prepared


@launchers.register("slurm")
class SlurmLauncher:
    """Batch jobs, which SLURM starts when there is room, and again after a preemption or a time limit."""

    name = "slurm"

    def submit(self, start: Prepared) -> Submitted:
        """Write the runs with what their job needs, and hand its script to sbatch."""
        from distrain.launchers.slurm.submitting import submit

        return Submitted(job=submit(start))

    def knows(self, folder: Path) -> bool:
        """Whether a job was submitted for a run, a sweep, or the sweep that a run is of."""
        return was_submitted(folder)

    def status(self, folders: Sequence[Path]) -> dict[Path, list[Job]] | None:
        """Return what squeue and sacct know of these folders' latest jobs; None where there is no SLURM."""
        return jobs_of_folders(folders)

    def cancel(self, folder: Path) -> list[Job]:
        """Cancel every job of a run or sweep that is queued or runs; SLURM does not queue them again."""
        jobs = jobs_for(folder)
        if jobs is None:
            raise UserError(
                "there is no squeue here, so this machine belongs to no SLURM cluster; log in to one that does"
            )
        alive = [job for job in jobs if job.alive]
        for job in alive:
            cancel(job.id)
        return alive
