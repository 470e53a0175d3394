"""What is around a start, read once in each process before anything is decided: launchers, GPUs, the command typed."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from distrain.config import UserError
from distrain.system.environment import Environment, has_launcher, join, launcher_argv, say_ignored
from distrain.system.importing import importing

if TYPE_CHECKING:
    from distrain.parallel import Configuration

TYPED = "DISTRAIN_COMMAND"
"""The environment variable that holds the command as typed, for processes that a launcher starts without a request."""


@dataclass(frozen=True)
class StartEnvironment:
    """What a request is resolved from besides what was typed."""

    processes: int
    """Of all machines."""
    nodes: int = 1
    """Machines, each with as many of the processes."""
    here: int = 1
    """Processes of this machine; 0 where they are to run on others."""
    gpus: int = 0
    """GPUs of this machine that they may use; 0: they are on CPUs."""
    world: Environment | None = None
    """What the launcher told this process, one of those that train; None where they are still to be started."""
    configuration: Configuration = field(default_factory=dict)
    """What was written for that launcher."""
    launcher_argv: tuple[str, ...] = ()
    """The launcher's command line, where it is seen."""
    precision: str = "fp32"
    """What `train.precision: auto` means on this machine, as far as the configuration speaks of it."""
    argv: tuple[str, ...] = ()
    """The command as typed."""

    def problems(self, expected: int | None) -> list[UserError]:
        """Return what is wrong with the world when `expected` processes were asked for. Pure."""
        found = []
        if self.world is not None:
            from distrain.parallel import check_world

            count = self.configuration.get("num_processes")
            configured = (int(count.value), count.place) if count is not None and str(count.value).isdigit() else None
            try:
                check_world(self.world, expected, self.launcher_argv, configured)
            except UserError as error:
                found.append(error)
        try:
            check_gpus(self.here, self.gpus)
        except UserError as error:
            found.append(error)
        return found


def gpu_count(variables: Mapping[str, str] = os.environ) -> int:
    """Return the number of NVIDIA GPUs that a process started here may use, without importing torch."""
    visible = variables.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([part for part in visible.split(",") if part.strip() not in ("", "-1")])
    try:
        return len(os.listdir("/proc/driver/nvidia/gpus"))
    except OSError:
        return 0


def check_gpus(processes: int, gpus: int) -> None:
    """Raise UserError where so many processes of this machine have too few GPUs; without any they are on the CPU."""
    if 0 < gpus < processes:
        raise UserError(
            f"there are to be {processes} processes on this machine, which has {gpus} GPU{'s' * (gpus > 1)}; "
            "nothing was written. Start one for each: --processes of `distrain train`, --num_processes of "
            "`accelerate launch`, --nproc-per-node of `torchrun`; CUDA_VISIBLE_DEVICES= has them on the CPU"
        )


@importing()
def launcher_environment(processes: int, nodes: int = 1) -> StartEnvironment:
    """Return what is around a command that starts `processes` itself, as many on this machine as on the others."""
    from distrain.parallel import read_configuration

    configuration = read_configuration([], os.environ)
    return StartEnvironment(
        processes,
        nodes,
        here=processes // nodes,
        gpus=gpu_count(),
        configuration=configuration,
        precision=auto_precision(configuration),
        argv=tuple(sys.argv),
    )


@importing()
def worker_environment() -> StartEnvironment:
    """Return what is around a process that trains, and rid the environment of what its launcher wrote for Accelerate.

    Raises UserError for a world that cannot be. One that has `of_each_process` set is reported by each process:
    nobody else started this one.
    """
    from distrain.parallel import read_configuration, take_over

    try:
        world, ignored = join(os.environ)
    except UserError as error:
        error.of_each_process = not has_launcher()  # type: ignore[attr-defined]
        raise
    say_ignored(ignored)
    argv = launcher_argv()
    configuration = read_configuration(argv, os.environ)
    if (cpu := configuration.get("use_cpu")) is not None and str(cpu.value).lower() == "true":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # accelerate sets this for a single process, not for several
    import torch

    found = StartEnvironment(
        world.world_size,
        max(1, world.world_size // world.local_world_size),
        here=world.local_world_size,
        gpus=torch.cuda.device_count(),
        world=world,
        configuration=configuration,
        launcher_argv=tuple(argv),
        precision=auto_precision(configuration),
        argv=tuple(json.loads(os.environ.get(TYPED, "null")) or sys.argv),
    )
    take_over(os.environ)
    return found


def join_launcher(expected: int | None) -> StartEnvironment:
    """Return what is around a process that a launcher started; raises UserError unless `expected` of them are there.

    Without `expected` it is the launcher's own words that count.
    """
    found = worker_environment()
    if problems := found.problems(expected):
        raise all_of(problems)
    return found


def auto_precision(configuration: Configuration) -> str:
    """Return what `train.precision: auto` means on this machine, looked at only where a launcher's setting meets it."""
    if "mixed_precision" not in configuration:
        return "fp32"
    import torch

    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported(False) else "fp32"


def all_of(problems: list[UserError]) -> UserError:
    """Return one error of all that is wrong: the only one itself, or several with a number each. Pure."""
    told = {str(problem): problem for problem in problems}
    if len(told) == 1:
        return problems[0]
    numbered = [f"{number}. " + text.replace("\n", "\n   ") for number, text in enumerate(told, 1)]
    error = UserError(f"{len(told)} things are wrong with this command; nothing was written.\n" + "\n".join(numbered))
    error.of_each_process = any(  # type: ignore[attr-defined]
        getattr(problem, "of_each_process", False) for problem in problems
    )
    return error
