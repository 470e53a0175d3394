"""What a scheduler says of a process, and that nothing else reads its variables."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from worlds import in_world

import distrain
from distrain.launchers.slurm.job_environment import read_slurm
from distrain.run.lease import Holder
from distrain.system.job_environment import JobEnvironment, job_environment, register_job_environment

JOB = {"SLURM_JOB_ID": "19", "SLURM_NODEID": "1", "SLURM_CPUS_PER_TASK": "8"}


@pytest.mark.parametrize(
    ("variables", "job"),
    [
        ({}, JobEnvironment()),
        ({"SLURM_JOB_ID": ""}, JobEnvironment()),
        ({"SLURM_RESTART_COUNT": "2"}, JobEnvironment()),
        (JOB, JobEnvironment("slurm", "19", "19", 0, "1", 8)),
        (JOB | {"SLURM_RESTART_COUNT": "2"}, JobEnvironment("slurm", "19", "19", 2, "1", 8)),
        (JOB | {"SLURM_RESTART_COUNT": "x"}, JobEnvironment("slurm", "19", "19", 0, "1", 8)),
        (
            JOB | {"SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "3"},
            JobEnvironment("slurm", "19", "17_3", 0, "1", 8),
        ),
    ],
)
def test_what_a_process_knows_of_its_job(variables: dict[str, str], job: JobEnvironment) -> None:
    assert job_environment(variables) == job
    assert job.attempt == (f"19.{job.restart}" if job.job else None)
    assert job.requeued == (job.restart > 0)
    assert job.notice == signal.SIGUSR1, "as slurm/train.sbatch has it sent, and people send it without a scheduler"


def test_a_start_is_of_the_job_that_the_environment_names(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (JOB | {"SLURM_RESTART_COUNT": "2"}).items():
        monkeypatch.setenv(name, value)
    holder = Holder.of_this_process()
    assert (holder.job, holder.restart) == ("19", 2)
    monkeypatch.delenv("SLURM_JOB_ID")
    assert (Holder.of_this_process().job, Holder.of_this_process().restart) == (None, 0)
    assert read_slurm({"SLURM_NODEID": "3"}).node == "3", "what is there of a job, also without its number"


def register_flux() -> list[JobEnvironment]:
    @register_job_environment("flux")
    def read_flux(variables: Mapping[str, str]) -> JobEnvironment | None:
        return JobEnvironment("flux", variables["FLUX_JOB_ID"]) if "FLUX_JOB_ID" in variables else None

    return [job_environment(variables) for variables in ({"FLUX_JOB_ID": "f7"}, {}, JOB)]


def test_another_scheduler_is_one_function() -> None:
    (found,) = in_world(1, register_flux, launched=False)
    assert found == [JobEnvironment("flux", "f7"), JobEnvironment(), read_slurm(JOB)]


def test_only_slurms_own_folder_reads_its_variables() -> None:
    package = Path(distrain.__file__).parent

    def named() -> Iterator[Path]:
        for folder in (package, package.parent / "launch"):
            for file in folder.rglob("*.py"):
                if re.search(r"\b(SLURM|SBATCH)_[A-Z]", file.read_text(encoding="utf-8")):
                    yield file.relative_to(package.parent)

    found = set(named())
    slurm = {file for file in found if file.is_relative_to("distrain/launchers/slurm")}
    assert Path("distrain/launchers/slurm/job_environment.py") in slurm
    # a table of variables by which a process learns that srun, mpirun or the like has started it
    assert found - slurm == {Path("distrain/system/environment.py")}
