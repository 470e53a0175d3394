"""SLURM's own commands, and the states of jobs in their output."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from distrain.config import UserError
from distrain.launchers.launcher import Job
from distrain.launchers.slurm.plan import is_secret

_PASSED = re.compile(
    r"HOME|USER|LOGNAME|SHELL|PATH|LANG|LC_[A-Z]+|TZ|TERM|PWD|HOSTNAME|LD_LIBRARY_PATH|LIBRARY_PATH|CPATH|MANPATH"
    r"|MODULEPATH|MODULESHOME|MODULES_[A-Z_]+|LMOD_\w+|LOADEDMODULES|_LMFILES_\w*|BASH_FUNC_(module|ml)\W*|BASH_ENV"
    r"|VIRTUAL_ENV|CONDA_\w+|MAMBA_\w+|PYTHONPATH|PYTHONHOME|PYTHONNOUSERSITE|PYTHONUSERBASE"
    r"|CUDA_HOME|CUDA_PATH|ROCM_PATH|CC|CXX|XDG_[A-Z_]+|TORCH_HOME|TRITON_CACHE_DIR|TORCH_EXTENSIONS_DIR"
    r"|HF_\w+|TRANSFORMERS_\w+|WANDB_(MODE|DIR|PROJECT|ENTITY|CACHE_DIR|BASE_URL|RUN_GROUP|TAGS)"
    r"|(NCCL|GLOO|UCX|FI|TORCH_NCCL|OMP|MKL|APPTAINER|SINGULARITY|DISTRAIN)_\w+"
    r"|SLURM_CONF|SLURM_CLUSTERS|SLURM_JWT|MUNGE_\w+"
)
"""Environment variables that a job is given, where they are set and hold no secret."""


def passed_on(variables: Mapping[str, str]) -> dict[str, str]:
    """Return what of an environment a job is given. Pure.

    sbatch would hand on all of it, into SLURM's records and to every process of the job: keys of trackers, tokens, and
    what an outer job has set for itself.
    """
    return {
        name: value
        for name, value in variables.items()
        if _PASSED.fullmatch(name)
        and (name == "SLURM_JWT" or not is_secret(name))
        and not re.search(r"://[^/@\s]*:[^/@\s]*@", value)
    }


def find_command(name: str) -> str | None:
    """Return where one of SLURM's commands is, or None."""
    return shutil.which(name)


def run_command(*arguments: str, environment: Mapping[str, str] | None = None) -> str:
    """Run one of SLURM's commands; returns what it prints. Raises UserError with its error message."""
    if find_command(arguments[0]) is None:
        raise UserError(
            f"there is no {arguments[0]} here, so this machine belongs to no SLURM cluster; log in to one that does"
        )
    try:
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, env=environment)
    except subprocess.TimeoutExpired:
        raise UserError(f"{arguments[0]} did not answer within two minutes; is slurmctld up? Try again") from None
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip()).replace(f"{arguments[0]}: error: ", "")
        raise UserError(f"{arguments[0]} refused: {said}")
    return done.stdout


def sbatch(script: Path) -> str:
    """Submit a batch script; returns the job's number."""
    out = run_command("sbatch", "--parsable", "--export=ALL", str(script), environment=passed_on(os.environ))
    number = out.strip().splitlines()[-1].partition(";")[0] if out.strip() else ""
    if not number.isdecimal():
        raise UserError(f"sbatch printed {out.strip()!r}, expected the number of a job")
    return number


def jobs_of(numbers: Sequence[str]) -> dict[str, Job] | None:
    """Return what SLURM still knows of these jobs and the tasks of arrays among them; None where there is no SLURM.

    squeue knows those that are queued, run, or have ended a few minutes ago; sacct the others, where there is
    accounting.
    """
    if not numbers or find_command("squeue") is None:
        return None if find_command("squeue") is None else {}
    wanted = set(numbers)
    # asked for by number, squeue fails when one of them is forgotten
    out = run_command("squeue", "--noheader", "--array", "--states=all", "--user", _user(), "--format=%i|%T|%R|%M|%L")
    found = {}
    for line in out.splitlines():
        number, state, reason, elapsed, left = (line.strip().split("|", 4) + [""] * 5)[:5]
        if number.partition("_")[0] in wanted:
            found[number] = Job(number, state, reason.strip("()"), elapsed, left)
    missing = wanted - {number.partition("_")[0] for number in found}
    return found | (_accounted(sorted(missing)) if missing else {})


def _user() -> str:
    import pwd

    return pwd.getpwuid(os.getuid()).pw_name


def _accounted(numbers: Sequence[str]) -> dict[str, Job]:
    if find_command("sacct") is None:
        return {}
    try:
        out = run_command(
            "sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={','.join(numbers)}",
            "--format=JobID,State,NodeList,Elapsed",
        )  # fmt: skip
    except UserError:
        return {}  # no accounting here
    found = {}
    for line in out.splitlines():
        number, state, where, elapsed = (line.split("|", 3) + [""] * 4)[:4]
        if re.fullmatch(r"\d+(_\d+)?", number):
            found[number] = Job(number, state.split(" ")[0], where, elapsed)
    return found


def cancel(number: str) -> None:
    """Cancel a job; SLURM does not queue it again."""
    run_command("scancel", number)
