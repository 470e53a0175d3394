"""`StrategySpec`: the strategy of a run, resolved from what options, files and launchers ask for."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from distrain.config import UserError, close_names
from distrain.config.strategies import OFFLOADS, STRATEGIES, describe_strategy
from distrain.system.environment import Environment


@dataclass(frozen=True)
class StrategySpec:
    """The strategy of a run, resolved."""

    strategy: str
    """One of STRATEGIES."""
    offload_optimizer: bool = False
    """Whether the optimizer's state, and its step, are on the CPU."""
    offload_parameters: bool = False
    """Whether the parameters are on the CPU but where they are used."""
    replicate: int | Literal["auto"] = 1
    """How many whole replicas there are of what is sharded; auto: one for each machine."""

    @classmethod
    def of(cls, strategy: str, offload: str = "none", replicate: int | str = 1) -> StrategySpec:
        """Return what these names stand for; raises UserError where the strategy cannot offload or replicate that."""
        for name, what, choices in ((strategy, "strategy", tuple(STRATEGIES)), (offload, "offload", OFFLOADS)):
            if name not in choices:
                raise UserError(f"no {what} {name!r}; expected one of {', '.join(choices)}{close_names(name, choices)}")
        kind = STRATEGIES[strategy]
        if offload not in kind.offloads:
            raise UserError(
                f"{strategy} cannot offload {offload!r}, expected {' or '.join(kind.offloads)}; {kind.offload_hint}"
            )
        return cls(strategy, offload != "none", offload == "all", _replicate(strategy, str(replicate)))

    @property
    def offload(self) -> str:
        """One of OFFLOADS."""
        return "all" if self.offload_parameters else "optimizer" if self.offload_optimizer else "none"

    @property
    def options(self) -> tuple[str, ...]:
        """The options of `distrain train` and of launch/train.py that are equivalent."""
        return ("--strategy", self.strategy, "--offload", self.offload, "--replicate", str(self.replicate))

    def replicas(self, world_size: int, machines: int | None = None) -> int:
        """Return how many replicas there are in a world of that size, on so many `machines` where it is auto.

        Raises UserError where the processes cannot be put into so many groups of several.
        """
        count = machines if self.replicate == "auto" else self.replicate
        assert count is not None, "auto is one for each machine"
        if count == 1:
            return 1
        said = f"--replicate {self.replicate}" + (f", of {count} machines," if self.replicate == "auto" else "")
        if world_size % count:
            raise UserError(
                f"{said} asks for {count} replicas, found {_processes(world_size)}, expected a multiple of {count}; "
                f"nothing was written. {_replicas_that_fit(world_size)}"
            )
        if world_size == count:
            raise UserError(
                f"{said} asks for {count} replicas, found {_processes(world_size)}, so that each has a whole one and "
                f"nothing is sharded, which is --strategy ddp; nothing was written. {_replicas_that_fit(world_size)}"
            )
        return count

    def __str__(self) -> str:
        words = {"none": "", "optimizer": " with offload of the optimizer", "all": " with offload of all"}
        return describe_strategy(self.strategy, self.replicate) + words[self.offload]


def _replicate(strategy: str, said: str) -> int | Literal["auto"]:
    """Return what --replicate says; raises UserError where it says nothing that can be, under this strategy."""
    if said != "auto" and not (said.isascii() and said.isdigit() and int(said) > 0):
        raise UserError(f"--replicate: found {said!r}, expected a whole number from 1, or auto: one for each machine")
    if not STRATEGIES[strategy].replicates and said != "1":
        why = "shards over all processes" if STRATEGIES[strategy].shards else "keeps everything on each process"
        raise UserError(
            f"--replicate {said} is for fsdp2, found {strategy}, which {why}; say --strategy fsdp2, or take it out"
        )
    return "auto" if said == "auto" else int(said)


def _replicas_that_fit(world_size: int) -> str:
    fitting = [str(count) for count in range(1, world_size) if world_size % count == 0] or ["1"]
    return f"Say --replicate {' or '.join([', '.join(fitting[:-1]), fitting[-1]] if fitting[:-1] else fitting)}"


@dataclass(frozen=True)
class StrategyHint:
    """What one source asks for."""

    place: str
    """The source: an option, a file, launch.json."""
    strategy: str | None = None
    """One of STRATEGIES; None where it names none."""
    offload: str | None = None
    """One of OFFLOADS; None where it names none."""
    replicate: str | None = None
    """A number of replicas, or auto; None where it names none."""


def check_precision(precision: str, strategy: str) -> None:
    """Raise UserError where a strategy cannot train in the recipe's `train.precision` on any machine."""
    if precision == "fp64" and strategy.startswith("zero"):
        raise UserError(
            f"train.precision is fp64 and the strategy {strategy}: DeepSpeed keeps what it trains in fp32, whatever "
            "the model has. Take ddp or fsdp2, or fp32"
        )


def check_several(optimizers: Collection[str], strategy: str) -> None:
    """Raise UserError where a strategy cannot train by several optimizers; `optimizers` are their names."""
    if len(optimizers) > 1 and not STRATEGIES[strategy].several_optimizers:
        able = [name for name, kind in STRATEGIES.items() if kind.several_optimizers]
        raise UserError(
            f"optim has {len(optimizers)} optimizers ({', '.join(optimizers)}) and the strategy is {strategy}: "
            "DeepSpeed steps all that it trains together, by the one optimizer that it owns. Take "
            f"{', '.join(able[:-1])} or {able[-1]}: --strategy {able[-1]}"
        )


def resolve_strategy(
    world_size: int, wishes: Sequence[StrategyHint], fallback: StrategyHint | None = None
) -> StrategySpec:
    """Return the strategy in a world of that size, from what all sources ask for.

    `wishes` must agree; `fallback` holds where they name none: a run resumes as it was launched, unless that was
    single or ddp, which follow from the world. Raises UserError for two that differ, for `single` on several
    processes, and for what the strategy cannot offload or replicate in this world.
    """
    strategy = _agreed("strategy", [(wish.place, wish.strategy) for wish in wishes])
    offload = _agreed("offload", [(wish.place, wish.offload) for wish in wishes])
    replicate = _agreed("number of replicas", [(wish.place, wish.replicate) for wish in wishes])
    if (
        fallback is not None
        and fallback.strategy is not None
        and STRATEGIES[fallback.strategy].shards
        and strategy in (None, fallback.strategy)
    ):
        # who names a strategy without its offload has not asked for that of earlier attempts
        offload = fallback.offload if offload is None and strategy is None else offload
        replicate = fallback.replicate if replicate is None and strategy is None else replicate
        strategy = fallback.strategy
    if strategy == "single" and world_size > 1:
        raise UserError(
            f"the strategy single is one process, found {world_size}; nothing was written. "
            "Start one, or take ddp, which keeps the whole state on each process"
        )
    if strategy is None or strategy in ("single", "ddp"):
        strategy = "single" if world_size == 1 else "ddp"
    asked = StrategySpec.of(strategy, offload or "none", 1 if replicate is None else replicate)
    if asked.replicate != "auto":
        asked.replicas(world_size)
    return asked


def _agreed(what: str, said: Sequence[tuple[str, str | None]]) -> str | None:
    values = [(place, value) for place, value in said if value is not None]
    # one process needs no ddp: which of the two it is follows from the world
    if len({"ddp" if value == "single" else value for _, value in values}) > 1:
        lines = "".join(f"\n  {value:<10} {place}" for place, value in values)
        raise UserError(
            f"the {what} differs between {len(values)} places; nothing was written.{lines}\n"
            "Set it once, or the same everywhere; accelerate_configs/ has a file for each strategy."
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

    That is `expected`, or what is asked for by the launcher's own argv, or by its configuration, with the place there.
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
