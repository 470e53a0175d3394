"""The strategies by name, and what each can do. Imports no torch, nor what it names.

To add one, write a class of `distrain.parallel.strategy.Strategy` in a file of its own, and its line here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from distrain.system.compiler import COMPILER

OFFLOADS = ("none", "optimizer", "all")
"""What can be kept in the memory of the CPU: nothing, the optimizer's state, or the parameters as well."""


@dataclass(frozen=True)
class StrategyKind:
    """How state is spread over processes under one strategy."""

    place: str
    """The class, `package.module:NAME`, imported where it is used: some take seconds to import, or may be missing."""
    accelerate: Literal["plain", "fsdp2", "deepspeed"]
    """How Accelerate is set up for it."""
    shards: bool = False
    """Whether a process holds a part of the state only."""
    forward_is_collective: bool = False
    """Whether forward() runs collectives, so that every rank must call it equally often."""
    replicates: bool = False
    """Whether `--replicate` can have several replicas of what is sharded."""
    several_optimizers: bool = True
    """Whether optimizers of their own can train parts of a model in turn."""
    offloads: tuple[str, ...] = ("none",)
    """Those of OFFLOADS that it can do."""
    imports_compiler: bool = False
    """Whether it imports torch's compiler, whatever is compiled: to go through a model without its values."""
    offload_hint: str = "zero3 can, also on one process: --strategy zero3"
    """What to do where another is asked for."""


_DDP, _ZERO = "distrain.parallel.ddp:DDPStrategy", "distrain.parallel.zero:ZeROStrategy"
_WHOLE = "each process has whole parameters there; zero3 has not: --strategy zero3"

STRATEGIES = {
    "single": StrategyKind(_DDP, "plain"),
    "ddp": StrategyKind(_DDP, "plain"),
    "zero1": StrategyKind(
        _ZERO, "deepspeed", shards=True, several_optimizers=False, offloads=OFFLOADS[:2], offload_hint=_WHOLE
    ),
    "zero2": StrategyKind(
        _ZERO, "deepspeed", shards=True, several_optimizers=False, offloads=OFFLOADS[:2], offload_hint=_WHOLE
    ),
    "zero3": StrategyKind(
        _ZERO,
        "deepspeed",
        shards=True,
        forward_is_collective=True,
        several_optimizers=False,
        offloads=OFFLOADS,
        imports_compiler=True,
    ),
    "fsdp2": StrategyKind(
        "distrain.parallel.fsdp2:FSDP2Strategy",
        "fsdp2",
        shards=True,
        forward_is_collective=True,
        replicates=True,
        offloads=("none", "all"),
        imports_compiler=True,
        offload_hint="it moves parameters, gradients and the optimizer's state together: --offload all",
    ),
}
"""How state can be spread over processes: not at all, whole on each, by DeepSpeed's stages, by PyTorch's FSDP2."""


def strategy_name(name: str) -> str:
    """Return the name; raises ValueError where no strategy has it."""
    if name not in STRATEGIES:
        raise ValueError(f"found {name!r}, expected one of {', '.join(STRATEGIES)}")
    return name


def strategy_imports(name: str) -> tuple[str, ...]:
    """Return what each process imports for a strategy: the module of its class, and what that takes seconds for."""
    kind = STRATEGIES[name]
    return kind.place.partition(":")[0], *((COMPILER,) if kind.imports_compiler else ())


def describe_strategy(strategy: str, replicate: int | str = 1) -> str:
    """Return a strategy with its replicas, where there are several."""
    if replicate == 1:
        return strategy
    return f"{strategy}, " + ("one replica for each machine" if replicate == "auto" else f"{replicate} replicas")
