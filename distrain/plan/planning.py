"""`make_plan`: a recipe on some GPUs, as every strategy would train it, and which of them to take."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import Any

import torch

from distrain.config import Duration, Recipe, UserError
from distrain.datasets.batch_sizes import batch_shape, micro_batch_sizes
from distrain.parallel.frozen import refers
from distrain.parallel.precision import MixedPrecision
from distrain.plan.facts import ModelFacts, Trace
from distrain.plan.gpus import CPU, Gpu
from distrain.plan.memory import Memory, Setting, plan_memory
from distrain.plan.timing import StepTime, step_time
from distrain.plan.tracing import CannotTrace, Planned, Tracer
from distrain.system.memory import GIB, gib, limits
from distrain.training.ranking import scored_split

FREE = 0.1
"""The share of a GPU's memory that stays free, as in the search for `batch.micro: auto`."""
SIMPLER = 1.05
"""A strategy is taken for its speed where it is faster than the simpler ones by more than this."""
PREFERRED = ("single", "ddp", "zero1", "fsdp2", "hsdp", "zero2", "zero3")
"""From the simplest on: what it keeps whole cannot be out of step, and it has the fewest collectives."""


@dataclass(frozen=True)
class Option:
    """A way to train: a strategy, with or without activation checkpointing, and a micro-batch."""

    strategy: str
    checkpointing: bool
    micro: int
    accumulation: int
    memory: Memory
    fits: bool
    largest: int | None
    """The largest micro-batch that fits, of those that make the global batch; None: not even one sample fits."""
    time: StepTime

    @property
    def arguments(self) -> list[str]:
        """What `distrain train` is given for it, beside the recipe."""
        name = "ddp" if self.strategy == "single" else self.strategy
        return {
            "single": [], "ddp": ["--strategy", "ddp"], "hsdp": ["--strategy", "fsdp2", "--replicate", "auto"]
        }.get(self.strategy, ["--strategy", name])  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """Return it for programs: bytes and seconds."""
        return {
            "strategy": self.strategy,
            "activation_checkpointing": self.checkpointing,
            "micro_batch_size": self.micro,
            "accumulation": self.accumulation,
            "bytes": dict(self.memory.parts),
            "total_bytes": self.memory.total,
            "highest_in": self.memory.moment,
            "fits": self.fits,
            "largest_micro_batch_size": self.largest,
            "step": self.time.to_json(),
        }


@dataclass(frozen=True)
class Plan:
    """What a recipe takes on some GPUs."""

    name: str
    gpu: Gpu
    nodes: int
    per_node: int
    """Processes of each node, each with a GPU."""
    precision: str
    model: ModelFacts
    global_batch_size: int
    micro_is_auto: bool
    asked_checkpointing: bool
    total_steps: int
    tokens_per_sample: int | None
    options: tuple[Option, ...]
    chosen: Option | None
    """None where nothing fits."""
    reason: str
    checkpoints: int | None
    """How many are due to the end; None where that goes by the clock and no time is known."""
    checkpoints_of_best: int
    """How many are written besides at most: one after each evaluation that is the best up to then."""
    checkpoint_bytes: int
    """Of each."""
    kept: int
    """How many of them stay."""
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    """In which this was planned."""

    @property
    def ranks(self) -> int:
        """Processes of all nodes."""
        return self.nodes * self.per_node

    def to_json(self) -> dict[str, Any]:
        """Return it for programs: bytes and seconds."""
        chosen = self.chosen
        return {
            "recipe": self.name,
            "gpu": self.gpu.name,
            "gpu_memory_bytes": self.gpu.memory,
            "nodes": self.nodes,
            "gpus_per_node": self.per_node,
            "precision": self.precision,
            "parameters": sum(each.numel for each in self.model.parameters),
            "trained_parameters": self.model.trained_elements,
            "optimizer": self.model.optimizer.name,
            "global_batch_size": self.global_batch_size,
            "steps": self.total_steps,
            "options": [each.to_json() for each in self.options],
            "recommended": None if chosen is None else self.options.index(chosen) if chosen in self.options else None,
            "recommended_arguments": None if chosen is None else self.arguments(chosen),
            "reason": self.reason,
            "training_s": None if chosen is None else round(chosen.time.total * self.total_steps, 3),
            "checkpoints": self.checkpoints,
            "checkpoints_of_best": self.checkpoints_of_best,
            "checkpoint_bytes": self.checkpoint_bytes,
            "checkpoints_kept": self.kept,
            "notes": list(self.notes),
            "planned_in_s": round(self.seconds, 2),
        }

    def arguments(self, option: Option) -> list[str]:
        """Return what `distrain train RECIPE` is given to train so."""
        found = list(option.arguments)
        if option.checkpointing != self.asked_checkpointing:
            found.append(f"train.activation_checkpointing={str(option.checkpointing).lower()}")
        if not self.micro_is_auto and option.micro != self._asked_micro:
            found.append(f"batch.micro={option.micro}")
        return found

    @property
    def _asked_micro(self) -> int:
        return self.options[0].micro


def strategies_for(ranks: int, nodes: int, precision: str) -> list[str]:
    """Return the strategies that such a world can have."""
    if ranks == 1:
        return ["single"]
    found = ["ddp", "zero1", "zero2", "zero3", "fsdp2"]
    if 1 < nodes < ranks:
        found.append("hsdp")
    return [name for name in found if precision != "fp64" or not name.startswith("zero")]


def precision_on(recipe: Recipe, gpu: Gpu) -> tuple[MixedPrecision, str, str]:
    """Return the recipe's precision on this GPU, the kind of its narrow products, and of the others."""
    name = recipe.train.precision
    if name == "auto":
        name = "bf16" if gpu.device_type == "cuda" and gpu.bf16 else "fp32"
    if name in ("bf16", "fp8") and gpu.device_type == "cuda" and not gpu.bf16:
        raise UserError(f"train.precision is {name}, and {gpu.name} computes no bf16; take fp16, fp32 or auto")
    narrow = {"bf16": torch.bfloat16, "fp16": torch.bfloat16, "fp8": torch.bfloat16}.get(name)
    weights = torch.float64 if name == "fp64" else torch.float32
    # fp8 is left out of what is traced: its layers need the GPU, and keep what bf16 keeps
    kind = "fp8" if name == "fp8" else "half"
    wide = "tf32" if name in ("tf32", "bf16", "fp16", "fp8") and gpu.device_type == "cuda" else "fp32"
    shown = "bf16" if name == "fp8" else name
    return MixedPrecision(shown, narrow, weights, scaled=name == "fp16"), kind, wide


def make_plan(recipe: Recipe, gpu: Gpu, nodes: int = 1, per_node: int = 1) -> Plan:
    """Return what a recipe takes on `nodes` machines with `per_node` such GPUs each.

    Reads the data set as a run would, and takes no memory for the model. Raises UserError for what a run would refuse,
    and CannotTrace for a model whose passes need values.
    """
    return _Planner(recipe, gpu, nodes, per_node).plan()


class _Planner:
    def __init__(self, recipe: Recipe, gpu: Gpu, nodes: int, per_node: int):
        self.began = time.perf_counter()
        self.recipe, self.gpu, self.nodes, self.per_node = recipe, gpu, nodes, per_node
        self.ranks = nodes * per_node
        self.precision, self.kind, self.wide = precision_on(recipe, gpu)
        self.auto = recipe.batch.micro_batch_size == "auto"
        self.asked, _ = batch_shape(recipe.batch, self.ranks)
        self.sizes = micro_batch_sizes(recipe.batch.global_batch_size, self.ranks) or [self.asked]
        self.planned = Planned.of(recipe, self.precision, gpu.device_type)
        self.notes: list[str] = []
        compiled = recipe.train.compile
        self.compiled = compiled is True or (compiled != "auto" and compiled is not False) or (
            compiled == "auto" and gpu.device_type == "cuda"
        )  # fmt: skip
        self.limit = gpu.memory if gpu.device_type == "cuda" else _memory_here() // per_node

    def plan(self) -> Plan:
        asked = bool(self.recipe.train.activation_checkpointing)
        passes = {asked: _Passes(self, checkpointing=self.recipe.train.activation_checkpointing)}
        try:
            passes[not asked] = _Passes(self, checkpointing=not asked)
        except UserError:  # a model without blocks
            self.notes.append("activation checkpointing: the model has no repeated blocks")
        model = passes[asked].facts
        options = [
            self.option(model, each, strategy)
            for strategy in strategies_for(self.ranks, self.nodes, self.precision.name)
            for each in passes.values()
        ]
        chosen, reason = self.choose(options, asked, model, passes)
        if not model.optimizer.measured:
            self.notes.append(f"{model.optimizer.name} was not tried without values: taken to keep two moments")
        if self.compiled:
            self.notes.append("compiled, a step keeps less than shown: what is kept is decided by the compiler")
        sources, size = self.planned, _stored(model, self.recipe)
        count, best = self._checkpoints(chosen), self._checkpoints_of_best()
        keep = self.recipe.checkpoint.keep + self.recipe.checkpoint.keep_best
        return Plan(
            self.recipe.name, self.gpu, self.nodes, self.per_node, self.recipe.train.precision
            if self.recipe.train.precision == "fp8" else self.precision.name, model,
            self.recipe.batch.global_batch_size, self.auto, asked, sources.horizon.total_steps or 0,
            sources.data.meta.tokens_per_sample, tuple(options), chosen, reason, count, best, size,
            min(count + best, keep) if count is not None else keep, tuple(self.notes), time.perf_counter() - self.began,
        )  # fmt: skip

    def setting(self, strategy: str, micro: int) -> Setting:
        accumulation = self.recipe.batch.global_batch_size // (micro * self.ranks)
        return Setting(
            strategy, self.ranks, self.nodes, accumulation, self.recipe.train.ema is not None,
            self.gpu.device_type == "cuda", self.precision.autocast is not None, refers(self.recipe),
        )  # fmt: skip

    def option(self, model: ModelFacts, passes: _Passes, strategy: str, micro: int | None = None) -> Option:
        """Return a strategy with a micro-batch: as stated, or for auto the largest that fits."""
        largest = passes.largest(model, strategy)
        if micro is None:
            micro = self.asked if not self.auto else largest or self.sizes[0]
        setting = self.setting(strategy, micro)
        trace = passes.trace(micro)
        memory = plan_memory(model, trace, setting)
        seconds = step_time(model, trace, setting, self.gpu, kind=self.kind, wide=self.wide, compiled=self.compiled)
        return Option(
            strategy, passes.checkpointing, micro, setting.accumulation, memory, self.fits(memory.total), largest,
            seconds,
        )  # fmt: skip

    def fits(self, nbytes: float) -> bool:
        return nbytes <= (1 - FREE) * self.limit

    def choose(
        self, options: Sequence[Option], asked: bool, model: ModelFacts, passes: dict[bool, _Passes]
    ) -> tuple[Option | None, str]:
        """Return the option to take, and why."""
        fitting = [each for each in options if each.fits and each.checkpointing == asked]
        fitting = fitting or [each for each in options if each.fits]
        if fitting:
            return _fastest(fitting, options, self)
        # the same step in smaller micro-batches
        smaller = [
            self.option(model, passes[each.checkpointing], each.strategy, each.largest)
            for each in options
            if each.largest is not None
        ]
        smaller = [each for each in smaller if each.fits]
        if smaller:
            best = min(smaller, key=lambda each: (each.time.total, PREFERRED.index(each.strategy)))
            return best, (
                f"a micro-batch of {self.asked} fits under no strategy; of {best.micro} it fits, and the step stays "
                f"the same, in {best.accumulation} micro-batches"
            )
        least = min(options, key=lambda each: each.memory.total)
        return None, (
            f"nothing fits: the least is {least.strategy}{' with activation checkpointing' * least.checkpointing}, "
            f"{gib(least.memory.total)} of {gib((1 - FREE) * self.limit)}. {self.more(model, passes)}"
        )

    def more(self, model: ModelFacts, passes: dict[bool, _Passes]) -> str:
        """Return with how many GPUs it would fit."""
        each = passes.get(True) or passes[False]
        trace = each.trace(self.sizes[0])
        for nodes in (self.nodes * 2**power for power in range(11)):
            if nodes * self.per_node > self.ranks:
                here = self.setting("fsdp2", self.sizes[0])
                setting = replace(here, ranks=nodes * self.per_node, nodes=nodes, accumulation=1)
                if self.fits(plan_memory(model, trace, setting).total):
                    return f"fsdp2 fits on {nodes * self.per_node} of them, with a micro-batch of {self.sizes[0]}"
        return "Take zero3 with --offload all, a smaller model, or GPUs with more memory"

    def _checkpoints(self, chosen: Option | None) -> int | None:
        every = self.recipe.checkpoint.every
        if every is not None and every.seconds is not None:
            if chosen is None:
                return None
            total = self.planned.horizon.total_steps or 0
            return int(chosen.time.total * total // max(every.seconds, 1e-9)) + 1
        return len(self._due(every))

    def _checkpoints_of_best(self) -> int:
        if not self.recipe.checkpoint.keep_best or scored_split(self.planned.data) is None:
            return 0
        return len(self._due(self.recipe.eval.every) - self._due(self.recipe.checkpoint.every))

    def _due(self, every: Duration | None) -> set[int]:
        """Return the steps after which something is due, as a run has them; the last one always."""
        total = self.planned.horizon.total_steps or 0
        if every is None or every.seconds is not None:
            return {total}
        period = max(Fraction(1), self.planned.horizon.exact_steps(every, "a plan"))
        return {total, *(math.ceil(number * period) for number in range(1, int(total / period) + 1))}


def _fastest(fitting: list[Option], options: Sequence[Option], planner: _Planner) -> tuple[Option, str]:
    fastest = min(fitting, key=lambda each: each.time.total)
    close = [each for each in fitting if each.time.total <= SIMPLER * fastest.time.total]
    best = min(close, key=lambda each: PREFERRED.index(each.strategy))
    share = f"{gib(best.memory.total)} of {gib(planner.limit)}"
    others = [each for each in fitting if each is not best]
    if best.strategy in ("single", "ddp"):
        what = "it fits" if best.strategy == "single" else "it fits, and nothing is faster or simpler"
        return best, f"{what}: {share}"
    failed = [each for each in options if each.strategy == "ddp" and each.checkpointing == best.checkpointing]
    why = f"it fits ({share})"
    if failed and not failed[0].fits:
        why += f", where ddp needs {gib(failed[0].memory.total)}"
    if others:
        why += ", and is the fastest that does" if best is fastest else ", and is the simplest of the fastest that do"
    return best, why


class _Passes:
    """The passes of the model with or without activation checkpointing, by the size of a micro-batch."""

    def __init__(self, planner: _Planner, *, checkpointing: bool | str):
        self._planner = planner
        self.checkpointing = bool(checkpointing)
        size = planner.asked if not planner.auto else planner.sizes[-1]
        self._tracer = Tracer(planner.planned, size, checkpointing=checkpointing)
        self._traces: dict[int, Trace] = {}

    @cached_property
    def facts(self) -> ModelFacts:
        return self._tracer.facts()

    def trace(self, size: int) -> Trace:
        if size not in self._traces:
            self._traces[size] = self._tracer.trace(size)
        return self._traces[size]

    @cached_property
    def _ends(self) -> tuple[Trace, Trace]:
        """Two sizes between which and beyond memory is taken to grow evenly."""
        planner = self._planner
        large = planner.asked if not planner.auto else min(planner.sizes[-1], max(4, planner.sizes[0]))
        small = max(1, large // 2) if large > 1 else 2
        return self.trace(min(small, large)), self.trace(max(small, large))

    def total(self, model: ModelFacts, strategy: str, size: int) -> float:
        """Return the bytes with a micro-batch of this size, without another pass."""
        setting = self._planner.setting(strategy, size)
        if size in self._traces:
            return plan_memory(model, self._traces[size], setting).total
        a, b = self._ends
        low, high = (plan_memory(model, each, setting).total for each in (a, b))
        return low + (high - low) * (size - a.samples) / (b.samples - a.samples)

    def largest(self, model: ModelFacts, strategy: str) -> int | None:
        """Return the largest size that fits, of those that make the global batch; the last one is passed through."""

        def fits(size: int) -> bool:
            return self._planner.fits(self.total(model, strategy, size))

        found = _last(self._planner.sizes, fits)
        while found is not None and found not in self._traces and found * 4 > self._ends[1].samples * 5:
            self.trace(found)  # far from what was passed through: looked at, for what does not grow evenly
            if fits(found):
                break
            found = _last([size for size in self._planner.sizes if size < found], fits)
        return found


def _last(sizes: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    return next((size for size in reversed(sizes) if fits(size)), None)


def _stored(model: ModelFacts, recipe: Recipe) -> int:
    """Return the bytes of a checkpoint."""
    weights = model.trained_bytes if refers(recipe) else model.nbytes
    stored = weights + model.buffer_bytes
    averages = stored if recipe.train.ema is not None else 0
    return stored + averages + int(model.optimizer.bytes_per_element * model.trained_elements)


def _memory_here() -> int:
    """Return the bytes that the processes of this machine may take."""
    return min(each.nbytes - each.used for each in limits() if each.shared)


def gpu_here() -> Gpu:
    """Return this machine's processors as a `Gpu` of their own, as fast as two short tries show."""
    a, copied = torch.ones(512, 512), torch.ones(2**23)
    half = a.bfloat16()

    def best(action: Callable[[], Any], count: int = 5) -> float:
        times = []
        for _ in range(count):
            began = time.perf_counter()
            action()
            times.append(time.perf_counter() - began)
        return min(times)

    flops = 2 * 512**3
    tflops = {"fp32": flops / best(lambda: a @ a) / 1e12, "half": flops / best(lambda: half @ half) / 1e12}
    speed = 2 * copied.nbytes / best(copied.clone) / 1e9
    return Gpu(CPU, _memory_here() / GIB, tflops, speed, speed / 4, 1.25, bf16=False)


__all__ = ["CannotTrace", "Option", "Plan", "gpu_here", "make_plan", "strategies_for"]
