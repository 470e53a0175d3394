"""What the launcher said: the environment of this process, and the world that was asked for."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from distrain.config import UserError


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
        """Read RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE; raises UserError when only some are there."""
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
        given = [name for name in names if name in variables]
        if not given:
            return cls(0, 0, 1, 1, launched=False)
        if missing := [name for name in names if name not in variables]:
            raise UserError(
                f"the launcher set {', '.join(given)} but not {', '.join(missing)}; "
                "start with `distrain train`, `accelerate launch` or `torchrun`, or unset them for one process"
            )
        try:
            rank, local_rank, world_size = (int(variables[name]) for name in names)
            local_world_size = int(variables.get("LOCAL_WORLD_SIZE", world_size))
        except ValueError:
            values = ", ".join(f"{name}={variables[name]!r}" for name in names)
            raise UserError(f"expected whole numbers from the launcher, found {values}") from None
        return cls(rank, local_rank, world_size, local_world_size, launched=True)


@dataclass(frozen=True)
class Asked:
    """The strategy that was asked for, resolved."""

    strategy: str
    """single, ddp, zero1, zero2, zero3 or fsdp2."""
    offload_optimizer: bool = False
    offload_parameters: bool = False


_PROCESSES_ASKED = re.compile(r"--(?:num[-_]processes|nproc[-_]per[-_]node)(?:=(\d+))?")


def processes_asked(launcher_argv: Sequence[str]) -> int | None:
    """Return the number of processes that a launcher's command line asks for, or None where it names none."""
    for index, argument in enumerate(launcher_argv):
        if match := _PROCESSES_ASKED.fullmatch(argument):
            text = match[1] or (launcher_argv[index + 1] if index + 1 < len(launcher_argv) else "")
            return int(text) if text.isdigit() else None
    return None


def launcher_argv() -> list[str]:
    """Return the parent's command line when it is a launcher, otherwise an empty list (always so outside Linux).

    `accelerate launch --cpu --num_processes 2` starts one process and says nothing: only its own command line still
    knows that two were asked for.
    """
    try:
        argv = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []
    is_launcher = any(re.search(r"accelerate|torchrun|torch\.distributed\.(run|launch)", part) for part in argv[:4])
    return argv if is_launcher else []


def check_world(environment: Environment, expected: int | None, argv: Sequence[str]) -> None:
    """Raise UserError unless the launcher's world is the one asked for, by `expected` or by the launcher's own argv."""
    found = environment.world_size
    wanted, who = expected, "this run"
    if wanted is None and not environment.launched:
        wanted, who = processes_asked(argv), "the launcher's command"
    if wanted is not None and wanted != found:
        raise UserError(
            f"{who} asks for {_processes(wanted)}, found {found}; nothing was written.\n"
            f"  Start all of them with `distrain train RECIPE --processes {wanted}`, or with\n"
            f"  `accelerate launch --config_file accelerate_configs/multi_cpu.yaml --num_processes {wanted}` "
            "(`accelerate launch --cpu` and plain `python` start only one),\n"
            f"  or run with {_processes(found)}: `--processes {found}`."
        )


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"
