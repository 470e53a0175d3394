"""What SLURM's variables say of a process: its job, its attempt, its node."""

from __future__ import annotations

from collections.abc import Mapping

from distrain.system.job_environment import JobEnvironment, register_job_environment


@register_job_environment("slurm")
def slurm_job(variables: Mapping[str, str]) -> JobEnvironment | None:
    """Return the SLURM job of a process that has these variables; None where they name none. Pure."""
    found = read_slurm(variables)
    return found if found.job is not None else None


def read_slurm(variables: Mapping[str, str]) -> JobEnvironment:
    """Return what SLURM's variables say, also where they are only some of a job's. Pure."""
    job = variables.get("SLURM_JOB_ID") or None
    array, task = variables.get("SLURM_ARRAY_JOB_ID"), variables.get("SLURM_ARRAY_TASK_ID")
    return JobEnvironment(
        scheduler="slurm",
        job=job,
        queue_id=f"{array}_{task}" if array and task else job,
        restart=_number(variables, "SLURM_RESTART_COUNT") or 0,
        node=variables.get("SLURM_NODEID"),
        cpus=_number(variables, "SLURM_CPUS_PER_TASK"),
    )


def allocated_nodes(variables: Mapping[str, str]) -> int | None:
    """Return how many nodes the allocation of a process has; None where it is in none. Pure."""
    count = _number(variables, "SLURM_JOB_NUM_NODES") or _number(variables, "SLURM_NNODES")
    return count if variables.get("SLURM_JOB_ID") else None


def _number(variables: Mapping[str, str], name: str) -> int | None:
    told = variables.get(name, "")
    return int(told) if told.isdecimal() else None
