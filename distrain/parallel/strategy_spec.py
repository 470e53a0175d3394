"""What was asked for: the world, and how state is spread over it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from distrain.config import UserError, close_names
from distrain.system.environment import Environment

STRATEGIES = ("single", "ddp", "zero1", "zero2", "zero3", "fsdp2")
"""How state can be spread over processes: not at all, whole on each, by DeepSpeed's stages, by PyTorch's FSDP2."""

OFFLOADS = ("none", "optimizer", "all")
"""What can be kept in the memory of the CPU: nothing, the optimizer's state, or the parameters as well."""

_REPLICATED = ("single", "ddp")


@dataclass(frozen=True)
class StrategySpec:
    """The strategy that a run is started with, settled."""

    strategy: str
    """One of STRATEGIES."""
    offload_optimizer: bool = False
    """Whether the optimizer's state, and its step, are on the CPU."""
    offload_parameters: bool = False
    """Whether the parameters are on the CPU but where they are used."""

    @classmethod
    def of(cls, strategy: str, offload: str = "none") -> StrategySpec:
        """Return what these two names stand for; raises UserError where the strategy cannot offload that."""
        offers = {"zero1": OFFLOADS[:2], "zero2": OFFLOADS[:2], "zero3": OFFLOADS, "fsdp2": ("none", "all")}
        for name, kind, choices in ((strategy, "strategy", STRATEGIES), (offload, "offload", OFFLOADS)):
            if name not in choices:
                raise UserError(f"no {kind} {name!r}; expected one of {', '.join(choices)}{close_names(name, choices)}")
        if offload not in (offered := offers.get(strategy, ("none",))):
            raise UserError(
                f"{strategy} cannot offload {offload!r}, expected {' or '.join(offered)}; " + _OFFLOAD_HINTS[strategy]
            )
        return cls(strategy, offload != "none", offload == "all")

    @property
    def offload(self) -> str:
        """One of OFFLOADS."""
        return "all" if self.offload_parameters else "optimizer" if self.offload_optimizer else "none"

    def __str__(self) -> str:
        words = {"none": "", "optimizer": " with offload of the optimizer", "all": " with offload of all"}
        return self.strategy + words[self.offload]


_OFFLOAD_HINTS = {
    **dict.fromkeys(_REPLICATED, "zero3 can, also on one process: --strategy zero3"),
    **dict.fromkeys(("zero1", "zero2"), "each process has whole parameters there; zero3 has not: --strategy zero3"),
    "fsdp2": "it moves parameters, gradients and the optimizer's state together: --offload all",
}


@dataclass(frozen=True)
class StrategyHint:
    """What one place says about the strategy."""

    place: str
    """Where it is said: an option, a file, launch.json."""
    strategy: str | None = None
    """One of STRATEGIES; None where it says nothing."""
    offload: str | None = None
    """One of OFFLOADS; None where it says nothing."""


def check_precision(precision: str, strategy: str) -> None:
    """Raise UserError where a strategy cannot train in the recipe's `train.precision` on any machine."""
    if precision == "fp64" and strategy.startswith("zero"):
        raise UserError(
            f"train.precision is fp64 and the strategy {strategy}: DeepSpeed keeps what it trains in fp32, whatever "
            "the model has. Take ddp or fsdp2, or fp32"
        )


def resolve_strategy(
    world_size: int, wishes: Sequence[StrategyHint], fallback: StrategyHint | None = None
) -> StrategySpec:
    """Return what is to be done in a world of that size, from what all places say.

    `wishes` must agree; `fallback` holds where they say nothing: a run goes on as it was started, unless that was
    single or ddp, which follow from the world. Raises UserError for two that differ, for `single` on several
    processes, and for what the strategy cannot offload.
    """
    strategy = _agreed("strategy", [(wish.place, wish.strategy) for wish in wishes])
    offload = _agreed("offload", [(wish.place, wish.offload) for wish in wishes])
    if fallback is not None and fallback.strategy not in (None, *_REPLICATED) and strategy in (None, fallback.strategy):
        # who names a strategy without its offload has not asked for that of earlier starts
        offload = fallback.offload if offload is None and strategy is None else offload
        strategy = fallback.strategy
    if strategy == "single" and world_size > 1:
        raise UserError(
            f"the strategy single is one process, found {world_size}; nothing was written. "
            "Start one, or take ddp, which keeps the whole state on each process"
        )
    if strategy is None or strategy in _REPLICATED:
        strategy = "single" if world_size == 1 else "ddp"
    return StrategySpec.of(strategy, offload or "none")


def _agreed(what: str, said: Sequence[tuple[str, str | None]]) -> str | None:
    values = [(place, value) for place, value in said if value is not None]
    # one process needs no ddp: which of the two it is follows from the world
    if len({"ddp" if value == "single" else value for _, value in values}) > 1:
        lines = "".join(f"\n  {value:<10} {place}" for place, value in values)
        raise UserError(
            f"the {what} is said in {len(values)} places that differ; nothing was written.{lines}\n"
            "Say it once, or the same everywhere; accelerate_configs/ has a file for each strategy."
        )
    return next((value for _, value in values), None)


_PROCESSES_ASKED = re.compile(r"--(?:num[-_]processes|nproc[-_]per[-_]node)(?:=(\d+))?")


def processes_asked(launcher_argv: Sequence[str]) -> int | None:
    """Return the number of processes that a launcher's command line asks for, or None where it names none."""
    for index, argument in enumerate(launcher_argv):
        if match := _PROCESSES_ASKED.fullmatch(argument):
            text = match[1] or (launcher_argv[index + 1] if index + 1 < len(launcher_argv) else "")
            return int(text) if text.isdigit() else None
    return None


def check_world(
    environment: Environment, expected: int | None, argv: Sequence[str], configured: tuple[int, str] | None = None
) -> None:
    """Raise UserError unless the launcher's world is the one asked for.

    That is said by `expected`, by the launcher's own argv, or by its configuration, with the place there.
    """
    found = environment.world_size
    wanted, who = expected, "this run"
    if wanted is None and not environment.launched:
        wanted, who = processes_asked(argv), "the launcher's command"
        if wanted is None and configured is not None:
            wanted, who = configured
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
