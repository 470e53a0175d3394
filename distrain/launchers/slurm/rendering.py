"""`render_sbatch`: a plan as a batch script. Pure but for the template, slurm/train.sbatch, which also runs by hand."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from distrain.launchers import shared_file
from distrain.launchers.slurm.plan import Plan

BODY = "# --- What is done -"
"""What begins the part of the script that every job has in common."""


PRUNES = "DISTRAIN_PRUNES"
"""The environment variable by which the processes of a run know that its search may stop it."""


@cache
def template() -> str:
    """Return slurm/train.sbatch."""
    return shared_file("slurm", "train.sbatch").read_text(encoding="utf-8")


def render_sbatch(plan: Plan) -> str:
    """Return the batch script of a plan: lines for SLURM, values, and what slurm/train.sbatch does with them."""
    before, marker, body = template().partition(BODY)
    assert marker
    assert before.startswith("#!/bin/bash\n")
    values = "\n".join(f"{name}={quoted(value)}" for name, value in _values(plan).items())
    options = "\n".join(f"#SBATCH {option}" for option in _options(plan))
    written_by = (
        f"# `distrain submit` wrote this for {plan.folder}\n# shellcheck disable=SC2016 # no value is expanded\n"
    )
    return f"#!/bin/bash\n{written_by}{options}\n\n{values}\n\n{marker}{body}"


def log_pattern(plan: Plan) -> str:
    """Return where SLURM writes what the job says, with its own sign for the job's number."""
    return f"{plan.folder}/submit/slurm-{'%A_%a' if plan.is_array else '%j'}.log"


def _options(plan: Plan) -> list[str]:
    gpus = None
    if plan.gpus_per_node:
        gpus = f"{plan.gpu_type}:{plan.gpus_per_node}" if plan.gpu_type else str(plan.gpus_per_node)
        gpus = f"--gpus-per-node={gpus}" if plan.gpu_option == "gpus-per-node" else f"--gres=gpu:{gpus}"
    array = None
    if plan.is_array:
        tasks = _ranges(plan.tasks or range(len(plan.runs)))
        array = f"--array={tasks}" + (f"%{plan.parallel}" if plan.parallel else "")
    given = {
        "partition": plan.partition,
        "account": plan.account,
        "qos": plan.qos,
        "constraint": plan.constraint,
        "reservation": plan.reservation,
        "cpus-per-task": plan.cpus_per_task,
        "mem": plan.mem,
    }
    output = f"--output={log_pattern(plan)}"
    return [
        f"--job-name={plan.name}",
        f"--nodes={plan.nodes}",
        "--ntasks-per-node=1",
        *([gpus] if gpus else []),
        *(f"--{name}={value}" for name, value in given.items() if value is not None),
        f"--time={plan.time}",
        *([array] if array else []),
        # SLURM takes double quotes off; the path has none, and nothing else that it knows
        f'"{output}"' if " " in output else output,
        "--open-mode=append",
        "--requeue",
        f"--signal=B:USR1@{plan.notice_s}",
        *plan.sbatch,
    ]


def _ranges(numbers: Iterable[int]) -> str:
    """Return ascending numbers as SLURM has those of an array: 0-3,5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    return ",".join("-".join(map(str, each)) for each in runs)


def _values(plan: Plan) -> dict[str, str | list[str]]:
    container, step_options = _container(plan)
    variables = dict(plan.variables)
    if plan.python_path:
        variables["PYTHONPATH"] = ":".join(plan.python_path)
    if plan.prunes:
        variables[PRUNES] = "1"
    return {
        "runs": [] if plan.tasks else list(plan.runs),
        "search": plan.folder if plan.tasks else "",
        "python": plan.container.python if plan.container else plan.python,
        "node_script": plan.node_script,
        "processes": str(plan.processes_per_node),
        "strategy": plan.strategy,
        "offload": plan.offload,
        "replicate": str(plan.replicate),
        "run_dir": "",
        "update": "",
        "interface": plan.interface or "",
        "scratch": plan.scratch or "",
        "modules": list(plan.modules),
        "sources": list(plan.sources),
        "variables": [f"{name}={value}" for name, value in variables.items()],
        "container": container,
        "step_options": step_options,
    }


def _container(plan: Plan) -> tuple[list[str], list[str]]:
    """Return what comes before the command, and the options of srun."""
    if plan.container is None:
        return [], []
    mounts = list(plan.container.mounts)
    for own in (plan.folder, str(Path(plan.node_script).parent), *plan.python_path):
        if not any(Path(own).is_relative_to(mount.split(":")[0]) for mount in mounts if ":/" not in mount):
            mounts.append(own)
    if plan.container.apptainer is not None:
        bind = ["--bind", ",".join(mounts)]
        return ["apptainer", "exec", *(["--nv"] if plan.gpus_per_node else []), *bind, plan.container.apptainer], []
    assert plan.container.pyxis is not None
    pairs = [mount if ":" in mount else f"{mount}:{mount}" for mount in mounts]
    return [], [f"--container-image={plan.container.pyxis}", f"--container-mounts={','.join(pairs)}"]


def quoted(value: str | list[str]) -> str:
    """Return a text, or a list of texts, as a shell takes it for itself. Pure."""
    if isinstance(value, list):
        return f"({' '.join(map(quoted, value))})"
    return value if re.fullmatch(r"[A-Za-z0-9_./:=+@-]+", value) else "'" + value.replace("'", "'\"'\"'") + "'"
