"""What is believed of an environment that launchers, schedulers and MPI have written to.

Their variables outlive them, in shells and containers, and libraries below act on each that they find. So it is decided
here, once at the start of each process, and what has no part in this start is taken out: `own_start` for commands that
start their processes themselves, `join` for those that a launcher starts.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from distrain.system.errors import UserError
from distrain.system.output import echo
from distrain.system.processes import process_stat

LAUNCHED_BY = "DISTRAIN_LAUNCHER"
"""The environment variable that names the process, by its number, which started this one as one of several."""
QUIET = "DISTRAIN_QUIET"
"""Set in processes of a command that is to print nothing but its result, warnings and errors."""
SWEPT_BY = "DISTRAIN_SWEEP"
"""The same of the process that started this run as one of a sweep: when that ends, the run saves and stops."""

_NUMBERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
_WORLD: tuple[str, ...] = (
    *_NUMBERS,
    *("GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_NAME", "ROLE_RANK", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
)
_AGENT = ("TORCHELASTIC_", "TORCH_ELASTIC_WORKER_IDENTICAL", "PET_")
_MPI = ("OMPI_COMM_WORLD_", "PMI_", "PMIX_", "MV2_COMM_WORLD_", "MPI_LOCAL", "JSM_NAMESPACE_", "PALS_", "ALPS_APP_")
SETTINGS = (
    "ACCELERATE_CONFIG_DS_FIELDS",
    "ACCELERATE_DEEPSPEED_",
    "ACCELERATE_DYNAMO_",
    "ACCELERATE_FP8_",
    "ACCELERATE_GRADIENT_",
    "ACCELERATE_MIXED_PRECISION",
    "ACCELERATE_USE_",
    "FSDP_",
    "MEGATRON_LM_",
    "PARALLELISM_CONFIG_",
)
"""What the variables begin with in which `accelerate launch` hands on its configuration."""

_DEVICE = ("ACCELERATE_TORCH_DEVICE", "ACCELERATE_CPU_AFFINITY", "ACCELERATE_SAGEMAKER_", "FORK_LAUNCHED")


@dataclass(frozen=True)
class Environment:
    """What a launcher told this process through environment variables."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    launched: bool
    """Whether a launcher set the variables at all."""

    @classmethod
    def read(cls, variables: Mapping[str, str]) -> Environment:
        """Read RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE.

        Some of them alone are passed over where they say nothing of other processes. Raises UserError where they do,
        and for numbers that do not fit one another.
        """
        told = _numbers(variables)
        names = _NUMBERS[:3]
        if missing := [name for name in names if name not in told]:
            if not _of_several(told):
                return cls(0, 0, 1, 1, launched=False)
            raise UserError(
                f"the launcher set {', '.join(told)} but not {', '.join(missing)}; "
                "start with `distrain train`, `accelerate launch` or `torchrun`, or unset them for one process"
            )
        rank, local_rank, world_size = (told[name] for name in names)
        local_world_size = told.get("LOCAL_WORLD_SIZE", world_size)
        if not (0 <= local_rank < local_world_size <= world_size and local_rank <= rank < world_size):
            if not _of_several(told):
                return cls(0, 0, 1, 1, launched=False)
            raise UserError(
                f"the environment says {_said(variables, told)}, which no launcher sets together, expected LOCAL_RANK "
                "< LOCAL_WORLD_SIZE <= WORLD_SIZE and LOCAL_RANK <= RANK < WORLD_SIZE; unset what is left over"
            )
        return cls(rank, local_rank, world_size, local_world_size, launched=True)


def is_quiet() -> bool:
    """Whether this process prints nothing but results, warnings and errors."""
    return bool(os.environ.get(QUIET))


def rank_told(variables: Mapping[str, str] = os.environ) -> int:
    """Return the rank that the environment gives this process, 0 where it gives none that is one."""
    text = variables.get("RANK", "")
    return int(text) if text.isdecimal() else 0


def _numbers(variables: Mapping[str, str]) -> dict[str, int]:
    given = {name: variables[name] for name in _NUMBERS if variables.get(name)}
    try:
        return {name: int(value) for name, value in given.items()}
    except ValueError:
        values = ", ".join(f"{name}={value!r}" for name, value in given.items())
        raise UserError(
            f"expected whole numbers from the launcher, found {values}; unset them where nothing else set them"
        ) from None


def _of_several(told: Mapping[str, int]) -> bool:
    least = {"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    return any(value >= least[name] for name, value in told.items())


def _said(variables: Mapping[str, str], names: Sequence[str] | Mapping[str, int]) -> str:
    return ", ".join(f"{name}={variables[name]}" for name in names)


# --------------------------------------------------------------------------------------------------------------------
# Who is above this process


def launcher_argv() -> list[str]:
    """Return the command line of the nearest launcher above this process, an empty list without one (or /proc).

    `accelerate launch --cpu --num_processes 2` starts one process and says nothing: only its own command line still
    knows that two were asked for.
    """
    return next((argv for argv in _above() if _is_launcher(argv)), [])


def has_launcher(variables: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher of several processes is above this one: what it says of the world is then of this start.

    Where the processes above cannot be seen, whatever speaks of one is believed.
    """
    if process_stat() is None:
        return any(name in variables for name in (LAUNCHED_BY, "TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"))
    return variables.get(LAUNCHED_BY, "") in {str(pid) for pid in _ancestors()} or bool(launcher_argv())


def under_torch_launcher(variables: Mapping[str, str] = os.environ) -> bool:
    """Whether torch's launcher, also that inside `accelerate launch`, has started this process."""
    return "TORCHELASTIC_RUN_ID" in variables and has_launcher(variables)


def _above() -> Iterator[list[str]]:
    """Yield the command lines of the processes above this one, the parent's first, up to one that is distrain's."""
    for pid in _ancestors():
        if os.environ.get(LAUNCHED_BY) == str(pid):
            return
        try:
            yield Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
        except OSError:
            return


def _ancestors() -> Iterator[int]:
    pid = os.getppid()
    while pid > 0:
        yield pid
        found = process_stat(pid)
        pid = found.parent if found else 0


def _is_launcher(argv: Sequence[str]) -> bool:
    runs = bool(argv) and (_LAUNCHER.fullmatch(argv[0]) or Path(argv[0]).name.startswith(("python", "pypy")))
    return bool(runs) and any(_LAUNCHER.fullmatch(part) for part in argv[:4])


_LAUNCHER = re.compile(
    r"(.*/)?(accelerate|accelerate-launch|torchrun|deepspeed|accelerate/commands/launch\.py"
    r"|torch/distributed/(run|launch)\.py|deepspeed/launcher/(launch|runner)\.py)"
    r"|accelerate\.commands\.(launch|accelerate_cli)|torch\.distributed\.(run|launch)|deepspeed\.launcher\.(launch|runner)"
)


# --------------------------------------------------------------------------------------------------------------------
# Tasks that are no world

STARTERS = {
    "srun": ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    "mpirun": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    "mpirun of MVAPICH": ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
    "jsrun": ("JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_RANK"),
    "mpiexec": ("PMI_SIZE", "PMI_RANK"),
    "mpiexec of Intel MPI": ("MPI_LOCALNRANKS", "MPI_LOCALRANKID"),
    # without a variable for how many there are
    "mpiexec of PALS": ("", "PALS_RANKID"),
    "aprun": ("", "ALPS_APP_PE"),
    "a starter of PMIx": ("", "PMIX_RANK"),
}
"""Who starts a command several times: the variables that say how often, and which of them a task is."""


def tasks_of(starter: str, variables: Mapping[str, str]) -> int:
    """Return how often the command was started, by one of `STARTERS`; 0 where that started nothing."""
    told = variables.get(STARTERS[starter][0], "")
    return int(told) if told.isdecimal() else 0


def refuse_tasks(variables: Mapping[str, str]) -> None:
    """Raise UserError where this process, alone in its world, is one of several tasks of srun, mpirun or the like."""
    for starter, (size, rank) in STARTERS.items():
        count, number = (int(text) if (text := variables.get(name, "")).isdecimal() else 0 for name in (size, rank))
        if count < 2 and number == 0:
            continue
        said = ", ".join(f"{name}={variables[name]}" for name in (size, rank) if name in variables)
        unset = " ".join(f"-u {name}" for name in (size, rank) if name in variables)
        tasks = f"{count} tasks" if count > 1 else "several tasks"
        step = "one task for each node (srun --ntasks-per-node 1)" if starter == "srun" else "one task (-n 1)"
        raise UserError(
            f"{starter} has started {tasks} ({said}), and they are no world of several processes: each would be a "
            f"whole run of one. Nothing was written.\n"
            f"  On one machine start {step}, and let it start the processes: `distrain train RECIPE --processes "
            f"{max(count, number + 1)}`;\n"
            "  on the nodes of a SLURM cluster: `distrain submit RECIPE --nodes N`;\n"
            f"  and where {starter} did not start this and these are left over: `env {unset} distrain ...`"
        )


# --------------------------------------------------------------------------------------------------------------------
# What is taken out


def own_start(variables: MutableMapping[str, str], processes: int | None, command: str = "train") -> list[str]:
    """Rid the environment of launchers for a command that starts its processes, as many as `processes`, itself.

    Returns a line for what was ignored. Raises UserError where this is one of several tasks, or where the environment
    speaks of several processes and it is not known to be wrong: neither by `processes` nor by the lack of a launcher.
    """
    refuse_tasks(variables)
    launcher = launcher_argv()
    told: dict[str, int] = {}
    try:
        told = _numbers(variables)
    except UserError:
        if launcher:
            raise
    if _of_several(told) and (launcher or processes is None):
        unset = " ".join(f"-u {name}" for name in _WORLD if name in variables)
        started = "a launcher started this process as" if launcher else "the environment says that this process is"
        size = told.get("WORLD_SIZE", 0)
        raise UserError(
            f"{started} one of several ({_said(variables, told)}), and `distrain {command}` starts its processes "
            "itself; nothing was written.\n"
            + ("" if launcher else f"  Left over from another launcher: `env {unset} distrain {command} ...`,\n")
            + f"  processes of this machine alone: `distrain {command} ... --processes {max(size, 2)}`, without a "
            "launcher around it;\n"
            "  what a launcher is to start, once for each process, is launch/train.py (or launch/evaluate.py)"
        )
    there = [name for name in variables if name in _WORLD or name.startswith(_AGENT)]
    if launcher:  # it is one process, as this is: only where it would meet others is of no use
        there = [name for name in there if not name.startswith("TORCHELASTIC_")]
    else:
        there += _settings(variables)
    notes = _take_out(variables, there, tells=not launcher)
    return notes + use_interfaces(variables, alone=True)


def join(variables: MutableMapping[str, str]) -> tuple[Environment, list[str]]:
    """Return what a launcher says of this process, and lines for what was ignored because none says it.

    The environment is rid of that, and of the address of others where there are none. Raises UserError where one
    process is one of several tasks, and where several cannot meet.
    """
    environment = Environment.read(variables)
    above = has_launcher(variables)
    if environment.world_size == 1:
        refuse_tasks(variables)
        there = [name for name in variables if name in _WORLD or name.startswith("PET_")]
        if not above:
            there += [name for name in variables if name.startswith(_AGENT[:2])]
        # who sets all of it for one process has what was meant
        notes = _take_out(variables, there, tells=not (above or environment.launched))
        if not above:
            notes += _take_out(variables, _settings(variables))
        return environment, notes + use_interfaces(variables, alone=True)
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if not variables.get(name)]:
        raise UserError(
            f"the environment says {_said(variables, _numbers(variables))} but not {' and '.join(missing)}, where the "
            "processes meet; start with `distrain train --processes N`, `accelerate launch` or `torchrun`, or unset "
            "these for one process"
        )
    if not variables["MASTER_PORT"].isdecimal():
        raise UserError(f"MASTER_PORT is {variables['MASTER_PORT']!r} in the environment, expected a number")
    notes = [] if above else _take_out(variables, [name for name in variables if name.startswith((*_AGENT, *_DEVICE))])
    return environment, notes + use_interfaces(variables, alone=environment.local_world_size == environment.world_size)


def forget_launchers(variables: MutableMapping[str, str]) -> list[str]:
    """Take out all that a launcher started here would take for its own options, or its processes for a world.

    Returns a line for what was ignored; of MPI nothing is reported, as each of its starters sets dozens.
    """
    _take_out(variables, [name for name in variables if name.startswith(_MPI)])
    return _take_out(
        variables, [name for name in variables if name in _WORLD or name.startswith((*_AGENT, *SETTINGS, *_DEVICE))]
    )


def share_cores(processes: int, variables: MutableMapping[str, str] = os.environ) -> None:
    """Give each of several processes its share of this process's cores, where nothing else says how many.

    Libraries read it when they are imported, NumPy's too. Of a list, one number for each level of OpenMP, the first
    stays: Accelerate takes one number. What is not a number is ignored, as OpenMP does.
    """
    if processes > 1:
        given = variables.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
        cores = len(os.sched_getaffinity(0))
        variables["OMP_NUM_THREADS"] = given if given.isdecimal() else str(max(1, cores // processes))


def forget_world(variables: MutableMapping[str, str]) -> None:
    """Take out what would have this process, which is alone, wait for others."""
    _take_out(variables, [name for name in variables if name in _WORLD])


def _settings(variables: Mapping[str, str]) -> list[str]:
    return [name for name in variables if name.startswith((*SETTINGS, *_DEVICE))]


def _take_out(variables: MutableMapping[str, str], names: Sequence[str], *, tells: bool = True) -> list[str]:
    for name in names:
        del variables[name]
    if not names or not tells:
        return []
    return [f"ignored {', '.join(sorted(names))} in the environment: no launcher above this process has set them"]


def use_interfaces(variables: MutableMapping[str, str], *, alone: bool) -> list[str]:
    """Take out the names of network interfaces that this machine does not have; returns a line for what was ignored.

    Raises UserError for them unless the processes of this machine are `alone`, as others are reached over those.
    """
    there, wrong = interfaces_here(), missing_interfaces(variables)
    found = [f"{name}={variables[name]}" for name in wrong]
    if wrong and not alone:
        raise UserError(
            f"the environment says {', '.join(found)}, and {socket.gethostname()} has no such interface, it has "
            f"{', '.join(there)}; correct or unset it"
        )
    for name in wrong:
        del variables[name]
    return [f"ignored {', '.join(found)} in the environment: this machine has {', '.join(there)}"] if wrong else []


def interfaces_here() -> list[str]:
    """Return the names of this machine's network interfaces."""
    return [name for _, name in socket.if_nameindex()] if hasattr(socket, "if_nameindex") else []


def missing_interfaces(variables: Mapping[str, str]) -> list[str]:
    """Return the variables that name network interfaces of which this machine has none."""
    there = interfaces_here()
    return [
        name
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME")
        if there and variables.get(name) and not _has_interface(variables[name], there, whole=name[0] == "G")
    ]


def _has_interface(asked: str, there: Sequence[str], *, whole: bool) -> bool:
    if asked.startswith("^"):  # all but these
        return True
    names = [name.partition(":")[0] for name in asked.removeprefix("=").split(",") if name]
    return any(own == name or (not whole and own.startswith(name)) for name in names for own in there)


def say_ignored(notes: Sequence[str]) -> None:
    """Print lines of `own_start` or `join`, to standard error: standard output may be read by programs."""
    for note in notes:
        echo(f"note: {note}", error=True)
