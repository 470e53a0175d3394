"""The time of a step: each operation takes as long as its arithmetic or its memory traffic, whichever is longer. Pure.

The efficiencies are stated here. Those of a GPU and of the host that feeds it were set by six steps that were measured
on one H200, which benchmarks/results/plan.md has beside what is predicted of them. Links were not measured: there was
one GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from distrain.plan.facts import ModelFacts, Trace
from distrain.plan.gpus import Gpu
from distrain.plan.memory import Setting
from distrain.plan.traffic import Case, Collective, Parameter

PRODUCTS = 0.65
"""Of the peak, in matrix products of a model's usual sizes, which are smaller than the largest ones that reach 0.82."""
CONVOLUTIONS = 0.30
"""Of the peak, in convolutions."""
TRAFFIC = 0.80
"""Of the memory's bandwidth, in operations that read and write tensors once."""
FUSED = 0.60
"""Of the bytes of operations between products, what is left where they are compiled into a few kernels."""
LAUNCH_S = 40e-6
"""In which the host hands an operation to a GPU, Python and autograd included; passes take no less than all of them."""
CPU_LAUNCH_S = 15e-6
"""That an operation on a CPU takes at least, Python and autograd included."""
CPU_STEP_S = 0.6e-3
"""STEP_S, of a run on a CPU."""
STEP_S = 1.5e-3
"""Of the host in each step: gradient norm, optimizer, metrics, the next batch."""
LINK = 0.75
"""Of a link's bandwidth, in collectives of large tensors."""
LATENCY_S = 20e-6
"""Of a collective within a node; between nodes 2.5 times that."""
HIDDEN = 0.8
"""Of the time that ranks send while a pass computes, what is hidden behind it."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step."""

    compute: float
    """Of all passes of its micro-batches."""
    optimizer: float
    communication: float
    """In which ranks send; part of it behind the passes."""
    exposed: float
    """Of that, what is not hidden."""

    @property
    def total(self) -> float:
        """Of the step."""
        return self.compute + self.optimizer + self.exposed

    def to_json(self) -> dict[str, float]:
        """Return it in seconds."""
        names = ("compute", "optimizer", "communication", "exposed", "total")
        return {f"{name}_s": round(getattr(self, name), 6) for name in names}


def pass_time(trace: Trace, gpu: Gpu, *, kind: str, wide: str, compiled: bool) -> float:
    """Return the seconds of a forward and a backward pass over a micro-batch.

    `kind`: of number of operations that compute with 16 bits; `wide`: of the others.
    """
    peak = np.where(trace.narrow, gpu.peak(kind), gpu.peak(wide))
    efficiency = np.where(trace.convolution, CONVOLUTIONS, PRODUCTS)
    arithmetic = trace.flops / (peak * efficiency)
    moved = trace.moved * np.where((trace.flops == 0) & compiled, FUSED, 1.0)
    seconds = np.maximum(arithmetic, moved / (gpu.memory_gb_per_s * 1e9 * TRAFFIC))
    if gpu.device_type != "cuda":  # the host computes an operation before it comes to the next
        return float(np.maximum(seconds, trace.kernel * CPU_LAUNCH_S).sum())
    launches = int(trace.kernel.sum()) * LAUNCH_S * (FUSED if compiled else 1.0)
    return max(float(seconds.sum()), launches)


def step_time(
    model: ModelFacts, trace: Trace, setting: Setting, gpu: Gpu, *, kind: str, wide: str, compiled: bool
) -> StepTime:
    """Return the seconds of a step of this strategy, in which each rank makes `setting.accumulation` such passes."""
    once = pass_time(trace, gpu, kind=kind, wide=wide, compiled=compiled)
    compute = once * setting.accumulation
    share = 1 if setting.strategy in ("single", "ddp") else setting.shards
    # weights, gradients and state are read, all but the gradients written
    touched = model.trained_bytes * 3 + 2 * model.optimizer.bytes_per_element * model.trained_elements
    optimizer = touched / share / (gpu.memory_gb_per_s * 1e9 * TRAFFIC)
    optimizer += STEP_S if gpu.device_type == "cuda" else CPU_STEP_S
    if setting.ranks == 1:
        return StepTime(compute, optimizer, 0.0, 0.0)
    sent, calls = sent_bytes(model, setting)
    communication = sum(
        nbytes / (bandwidth(gpu, where) * LINK) + calls[where] * LATENCY_S * (1 if where == "link" else 2.5)
        for where, nbytes in sent.items()
    )
    # gradients that are reduced once travel behind the last backward pass alone
    behind = compute if setting.strategy in ("zero2", "zero3", "fsdp2", "hsdp") else once * 2 / 3
    after = model.trained_bytes / (bandwidth(gpu, _slowest(setting)) * LINK) if setting.strategy == "zero1" else 0.0
    exposed = max(communication - behind, communication * (1 - HIDDEN), min(after, communication))
    return StepTime(compute, optimizer, communication, exposed)


def bandwidth(gpu: Gpu, where: str) -> float:
    """Return the bytes per second of a GPU's link in its node, or of its way to other nodes."""
    return (gpu.link_gb_per_s if where == "link" else gpu.network_gb_per_s) * 1e9


def _slowest(setting: Setting) -> str:
    return "network" if setting.nodes > 1 else "link"


def sent_bytes(model: ModelFacts, setting: Setting) -> tuple[Mapping[str, float], Mapping[str, int]]:
    """Return the bytes that a rank sends in a step, in rings, and how many collectives: over `link` and `network`."""
    units: dict[int, list[Parameter]] = {0: []}
    for each in model.trained:
        shape = each.shape or (1,)
        units.setdefault(each.unit, []).append(Parameter(shape, cast=each.cast))
    every = setting.accumulation > 1 and model.trained_bytes > 4 * 2**30
    case = Case(
        "fsdp2" if setting.strategy == "hsdp" else setting.strategy, setting.shards, [*units.values()],
        setting.accumulation, autocast=setting.narrow, every_micro=every,
    )  # fmt: skip
    nbytes = sum(Collective(kind, sum(bounds) // 2, setting.shards, "").sent for kind, bounds in case.theory().items())
    count = sum(case.counts().values())
    if setting.strategy in ("zero3", "fsdp2", "hsdp"):  # what is not trained is gathered all the same
        frozen = sum(
            each.numel * (2 if each.cast and setting.narrow else each.itemsize)
            for each in model.parameters
            if not each.trained
        )
        nbytes += 2 * setting.accumulation * Collective("all_gather", frozen, setting.shards, "").sent
    if setting.strategy != "hsdp":
        where = _slowest(setting)
        return {where: nbytes}, {where: count}
    averaged = Collective("all_reduce", model.trained_bytes // setting.shards, setting.nodes, "").sent
    return {"link": nbytes, "network": averaged}, {"link": count, "network": len(units)}
