"""The memory of a process under each strategy, part by part, at the highest moment of a step. Pure: numbers to numbers.

What is held from step to step is the theory of each strategy: its share of weights, gradients, optimizer state and
averages. What comes and goes is followed along a `Trace`: activations as they come alive and go, gradients as they
arrive, weights that are gathered for a block, buffers in which gradients travel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distrain.plan.facts import ModelFacts, ParameterFacts, Trace

STRATEGIES = ("single", "ddp", "zero1", "zero2", "zero3", "fsdp2", "hsdp")
"""hsdp: fsdp2 with one replica for each node."""

PERSISTENT = 100_000
"""Elements of the largest parameter that ZeRO-3 keeps whole on every rank."""
WHOLE_GRADIENTS = 4 * 2**30
"""Bytes up to which fsdp2 keeps whole gradients between micro-batches; see `tune.reduce_every_micro`."""
FRAGMENTED = 0.10
"""Of all that comes and goes: what a caching allocator holds above it, in rounding and in blocks that fit nothing."""
CONTEXT = 500 * 2**20
"""Bytes that the CUDA context and its libraries take of a GPU."""
WORKSPACES = 64 * 2**20
"""Bytes in which cuBLAS computes on a recent GPU; torch's allocator has them."""
COMMUNICATOR = 400 * 2**20
"""Bytes that NCCL's channels and the driver's mappings of other GPUs take."""


@dataclass(frozen=True)
class Memory:
    """The bytes of one process where they are most."""

    parts: Mapping[str, int]
    """By what they are for."""
    moment: str
    """When that is."""

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.parts.values())

    @property
    def allocated(self) -> int:
        """What tensors take of it: without a GPU's context, NCCL, and fragments."""
        return self.total - sum(self.parts.get(name, 0) for name in BESIDE)


BESIDE = ("fragments", "CUDA and NCCL")
"""Parts that are no tensors."""


@dataclass(frozen=True)
class Setting:
    """What a strategy is asked to do."""

    strategy: str
    """One of STRATEGIES."""
    ranks: int
    nodes: int = 1
    accumulation: int = 1
    """Micro-batches of a step."""
    ema: bool = False
    gpu: bool = True
    narrow: bool = False
    """Whether the forward pass is cast to 16 bits."""
    refers: bool = False
    """Whether checkpoints refer to what is frozen, which then has no average."""

    @property
    def shards(self) -> int:
        """Ranks that share out what is sharded."""
        return self.ranks // self.nodes if self.strategy == "hsdp" else self.ranks


def plan_memory(model: ModelFacts, trace: Trace, setting: Setting) -> Memory:
    """Return what one process takes at the highest moment of a step of this strategy, part by part.

    `trace` is of a micro-batch of the size that is meant.
    """
    held = _held(model, setting)
    moments = {
        "the passes": _passes(model, trace, setting),
        "the optimizer's step": _step(model, setting),
    }
    name, most = max(moments.items(), key=lambda each: sum(each[1].values()))
    parts = {**held, **most}
    if setting.gpu:
        moving = sum(most.values())
        parts["fragments"] = int(FRAGMENTED * moving) + 2 * 2**20 * len(model.parameters) // 16
        parts["workspaces"] = WORKSPACES
        parts["CUDA and NCCL"] = CONTEXT + (COMMUNICATOR if setting.ranks > 1 else 0)
    return Memory({name: int(value) for name, value in parts.items() if value}, name)


def _held(model: ModelFacts, setting: Setting) -> dict[str, float]:
    """Return what is there from step to step."""
    trained, whole, shards = model.trained_bytes, model.nbytes, setting.shards
    share = trained / shards if setting.strategy not in ("single", "ddp") else trained
    if setting.strategy == "zero3":
        kept = sum(each.nbytes for each in model.parameters if each.numel <= PERSISTENT)
        weights = whole / shards + kept + share  # what it trains is beside what it computes with
    elif setting.strategy in ("fsdp2", "hsdp"):
        weights = _rows(model.parameters, shards)
    elif setting.strategy in ("zero1", "zero2"):
        weights = whole + share
    else:
        weights = whole
    frozen: float = 0 if setting.refers else whole - trained
    if setting.strategy in ("fsdp2", "hsdp"):  # by rows, as the weights
        share = _rows(model.trained, shards)
        frozen = 0 if setting.refers else weights - share
    elif setting.strategy == "zero3":  # the others keep it whole on every rank
        frozen /= shards
    optimizer = model.optimizer.bytes_per_element * model.trained_elements * (share / max(trained, 1))
    return {
        "weights": weights + model.buffer_bytes,
        "optimizer": optimizer + model.optimizer.counters,
        "average": (share + frozen + model.buffer_bytes) if setting.ema else 0,
    }


def _rows(parameters: Sequence[ParameterFacts], shards: int) -> float:
    """Return the bytes of a rank that has as many rows of each parameter as any."""
    return sum(
        math.ceil(each.shape[0] / shards) * math.prod(each.shape[1:]) * each.itemsize if each.rows else each.nbytes
        for each in parameters
    )


# --------------------------------------------------------------------------------------------------------------------
# The optimizer's step


def _step(model: ModelFacts, setting: Setting) -> dict[str, float]:
    """Return what an optimizer's step takes beside what is held."""
    trained, strategy = model.trained_bytes, setting.strategy
    share: float = trained if strategy in ("single", "ddp") else trained / setting.shards
    if strategy in ("fsdp2", "hsdp"):
        share = _rows(model.trained, setting.shards)
    flat = strategy.startswith("zero")  # DeepSpeed's parameters are flat, so that all of them are one
    largest = max((each.nbytes for each in model.trained), default=0) / (1 if share == trained else setting.shards)
    stepped = share if model.optimizer.together or flat else largest
    # the weights that were stepped elsewhere come back whole, and gloo needs room for them once more
    gathered = trained if strategy in ("zero1", "zero2") and not setting.gpu and setting.ranks > 1 else 0
    if gathered:
        return {"gradients": 0 if strategy == "zero2" else share, "buffers": gathered}
    return {"gradients": share, "optimizer step": model.optimizer.extra * stepped}


# --------------------------------------------------------------------------------------------------------------------
# The forward and the backward pass

Along = np.ndarray[Any, Any]
"""(operations,) bytes after each of them."""


def _passes(model: ModelFacts, trace: Trace, setting: Setting) -> dict[str, float]:
    """Return what the passes take at their highest moment, beside what is held."""
    strategy = setting.strategy
    if strategy in ("fsdp2", "hsdp"):
        parts = _sharded(model, trace, setting)
    elif strategy == "zero3":
        parts = _zero3(model, trace, setting)
    elif strategy in ("zero1", "zero2"):
        parts = _zero12(model, trace, setting)
    else:
        parts = _replicated(model, trace, setting)
    at = int(np.argmax(sum(parts.values())))
    found = {name: float(along[at]) for name, along in parts.items()}
    return {**found, "batch": trace.batch_bytes * (2 if setting.gpu else 1)}


def _arrived(model: ModelFacts, trace: Trace) -> Along:
    """Return the bytes of the gradients that have arrived."""
    sizes = {each.name: each.nbytes for each in model.trained}
    found = np.zeros(len(trace.live) + 1)
    for name, at in trace.arrivals.items():
        found[min(at, len(trace.live))] += sizes.get(name, 0)
    return np.cumsum(found)[: len(trace.live)]


def _transit(model: ModelFacts, trace: Trace) -> Along:
    """Return the bytes of the one gradient that has just arrived, at the operation with which it came."""
    sizes = {each.name: each.nbytes for each in model.trained}
    found = np.zeros(len(trace.live))
    for name, at in trace.arrivals.items():
        place = min(max(at - 1, 0), len(found) - 1)
        found[place] = max(found[place], sizes.get(name, 0))
    return found


def _replicated(model: ModelFacts, trace: Trace, setting: Setting) -> dict[str, Along]:
    whole = np.full(len(trace.live), float(model.trained_bytes))
    # DDP has buckets for all of them, and a first micro-batch's gradients wait for the last one's
    kept = whole if setting.ranks > 1 or setting.accumulation > 1 else _arrived(model, trace)
    return {"activations": trace.live, "gradients": kept}


def bucket_bytes(model: ModelFacts) -> int:
    """Return the bytes of a bucket that DeepSpeed is given here: a sixteenth of the model, at most 200 MB."""
    elements = sum(each.numel for each in model.parameters)
    return 4 * (min(max(elements // 16, 2**18), 50_000_000) // 1024 * 1024)


def _zero12(model: ModelFacts, trace: Trace, setting: Setting) -> dict[str, Along]:
    arrived, share = _arrived(model, trace), model.trained_bytes / setting.shards
    ones = np.ones(len(trace.live))
    if setting.strategy == "zero1":
        # all are whole until the end of a step
        kept = arrived if setting.accumulation == 1 else ones * model.trained_bytes
        return {"activations": trace.live, "gradients": kept}
    bucket = bucket_bytes(model)
    kept = arrived / setting.shards if setting.accumulation == 1 else ones * share
    waiting = np.minimum(arrived, bucket) + _transit(model, trace)
    return {"activations": trace.live, "gradients": kept, "buffers": waiting + bucket * (arrived > 0)}


def _zero3(model: ModelFacts, trace: Trace, setting: Setting) -> dict[str, Along]:
    share = np.full(len(trace.live), model.trained_bytes / setting.shards)
    bucket = bucket_bytes(model)
    large = sum(each.nbytes for each in model.parameters if each.numel > PERSISTENT)
    gathered = np.full(len(trace.live), float(min(large, 4 * bucket)))
    arrived = _arrived(model, trace)
    return {
        "activations": trace.live,  # DeepSpeed gathers in fp32, and each cast is kept for the backward pass
        "gradients": share,
        "gathered weights": gathered,
        "buffers": np.minimum(arrived, bucket) + _transit(model, trace) + bucket,
    }


def _sharded(model: ModelFacts, trace: Trace, setting: Setting) -> dict[str, Along]:
    count, shards = len(trace.live), setting.shards
    units = 1 + max((each.unit for each in model.parameters), default=0)
    gather, reduce = np.zeros(units), np.zeros(units)
    for each in model.parameters:
        width = 2 if each.cast and setting.narrow else each.itemsize
        rows = math.ceil(each.shape[0] / shards) * shards * math.prod(each.shape[1:]) if each.rows else 0
        gather[each.unit] += rows * width
        reduce[each.unit] += rows * each.itemsize if each.trained else 0
    last = _last_arrivals(model, trace, units)
    order = sorted(range(1, units), key=lambda unit: last[unit])  # as their backward passes end
    gathered, whole, kept = np.full(count, gather[0]), np.zeros(count), np.zeros(count)
    for unit, (first, end) in enumerate(trace.spans, 1):
        if unit < units:
            gathered[first:end] += gather[unit]
            gathered[first : first + 1] += gather[unit]  # what arrives is copied to where it is used
    whole_kept = setting.accumulation > 1 and model.trained_bytes <= WHOLE_GRADIENTS
    begin = trace.backward_at
    for place, unit in enumerate(order):
        end = last[unit]
        gathered[begin:end] += gather[unit]
        if place + 1 < len(order):
            gathered[begin:end] += gather[order[place + 1]]  # is on its way meanwhile
        whole[max(end - 1, 0) : end + 1] += 2 * reduce[unit]  # whole, and laid out to be sent
        kept[end:] += reduce[unit] / shards
        begin = end
    whole[max(count - 1, 0) :] += 2 * reduce[0]
    if setting.accumulation > 1:
        kept[:] = reduce.sum() if whole_kept else reduce.sum() / shards
    casts = trace.casts if setting.narrow else 0
    return {"activations": trace.live - casts, "gradients": kept, "gathered weights": gathered, "buffers": whole}


def _last_arrivals(model: ModelFacts, trace: Trace, units: int) -> list[int]:
    found = [len(trace.live)] + [trace.backward_at] * (units - 1)
    for each in model.trained:
        if each.unit and each.name in trace.arrivals:
            found[each.unit] = max(found[each.unit], trace.arrivals[each.name])
    return found
