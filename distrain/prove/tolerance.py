"""What must agree between different numbers of processes or strategies, and how closely.

Samples must have the same bits, and learning rates must be equal. Sums over samples are taken in another order, so
losses and tensors agree only within rounding, which grows in training.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distrain.checkpoint import Reader
from distrain.checkpoints.comparing import chunks
from distrain.checkpoints.dtypes import FLOATS, bits_dtype
from distrain.checkpoints.floats import widen
from distrain.prove.divergence import (
    Divergence,
    divergence_in,
    earliest,
    first_differing_element,
    one_sided,
    shared_checkpoints,
)
from distrain.prove.traces import AttemptTrace, Values
from distrain.prove.trial_runs import TrialRun


@dataclass(frozen=True)
class Tolerance:
    """How closely another topology must agree."""

    loss: float
    """Relative difference of each step's loss (relative to a tenth of the first loss, once below that)."""
    state: float
    """2-norm of the difference of each tensor, relative to the 2-norm of the tensor."""
    noise: float
    """Skip a tensor whose gradient norm never exceeds this share of the largest: it is rounding noise."""


TOLERANCES = {
    "fp64": Tolerance(1e-10, 1e-7, 1e-13),
    "fp32": Tolerance(1e-5, 1e-4, 1e-6),
    "tf32": Tolerance(1e-2, 1e-1, 1e-3),
    "bf16": Tolerance(3e-2, 2e-1, 1e-2),
    "fp16": Tolerance(1e-2, 1e-1, 1e-3),
}
"""By the effective precision; any other has that of bf16."""


_START = 1e-3
"""Relative difference of the norms of a tensor before the first step, beyond which it begins otherwise."""


@dataclass
class Agreement:
    """How closely a run in another topology agrees with the baseline run."""

    divergence: Divergence | None
    worst_loss: float
    worst_tensor: float
    noise: list[str]
    """Tensors skipped, as their gradients are rounding noise: see `noisy_tensors`."""
    by_design: str = ""
    """Why loss and weights depend on the topology by design, where they do and differ; empty otherwise."""


def tolerance_of(trace: AttemptTrace, loss: float | None = None, state: float | None = None) -> Tolerance:
    """Return the tolerance of a run's precision; `loss` and `state` override it."""
    usual = TOLERANCES.get(trace.facts["precision"], TOLERANCES["bf16"])
    return Tolerance(usual.loss if loss is None else loss, usual.state if state is None else state, usual.noise)


def compare_within(baseline: TrialRun, other: TrialRun, tolerance: Tolerance) -> Agreement:
    """Return how closely a run in other topologies agrees with the baseline run.

    A dependence on the number of processes by design is excused only where that number differs; a difference in data or
    in work done, and a value that is missing, NaN or infinite, never is.
    """
    reference = baseline.attempts[0].trace
    noise = noisy_tensors(reference, tolerance.noise)
    moved = _world_size_changed(reference.facts["world_size"], other)
    reasons = depends_on_topology(reference) if any(moved) else ""
    divergences: list[Divergence] = []
    excused = False
    worst_loss = worst_tensor = 0.0
    for number, attempt in enumerate(other.attempts):
        if attempt.resumed_at == 0 and (begun := _compare_start(reference, other, number)):
            divergences.append(begun)
        for step in sorted(attempt.trace.steps.keys() & reference.steps.keys()):
            gap, loss = _compare_loss(reference, tolerance, other, number, step)
            worst_loss = max(worst_loss, gap)
            may_differ = bool(reasons) and moved[number] and math.isfinite(gap)
            excused = excused or (loss is not None and may_differ)
            first = _compare_data(reference, other, number, step) or (None if may_differ else loss)
            if first is not None:
                first.ranks = sorted(attempt.trace.steps[step])
                divergences.append(first)
                break
    for step, one, two in shared_checkpoints(baseline.run_dir, other.run_dir):
        excuses = bool(reasons) and moved[other.attempt_of(step)]
        gap, apart, divergence = _compare_checkpoint(step, one, two, tolerance, noise, other, excuses)
        worst_tensor = max(worst_tensor, gap)
        excused = excused or apart
        if divergence is not None:
            divergences.append(divergence)
            break
    for divergence in one_sided(baseline, other):
        # where losses are excused, so is the step at which they stop a run early
        if excused and (baseline.ended_early or other.ended_early):
            continue
        divergences.append(divergence)
    return Agreement(earliest(divergences), worst_loss, worst_tensor, sorted(noise), reasons if excused else "")


def _world_size_changed(count: int, trial: TrialRun) -> list[bool]:
    """Return for each attempt whether another number of processes than `count` contributed to its state."""
    moved: list[bool] = []
    for attempt in trial.attempts:
        inherited = bool(moved) and moved[-1] and attempt.resumed_at > 0
        moved.append(inherited or attempt.trace.facts["world_size"] != count)
    return moved


def depends_on_topology(trace: AttemptTrace) -> str:
    """Return why a model's results depend on the number of processes by design; empty where they do not."""
    reasons = []
    if layers := trace.facts["batch_norm"]:
        shown = ", ".join(layers[:3]) + (", …" if len(layers) > 3 else "")
        reasons.append(f"batch normalisation ({shown}) takes its means over the micro-batch of one process")
    if drawn := trace.drawn():
        reasons.append(
            f"the model draws random numbers in training, as dropout does ({', '.join(drawn)}), and each process "
            "draws its own"
        )
    return "; ".join(reasons)


def noisy_tensors(trace: AttemptTrace, share: float) -> set[str]:
    """Return the tensors whose gradient is rounding noise, such as a bias before batch normalisation.

    An optimizer that divides by the size of gradients turns that noise into steps of full length. The running means of
    batch normalisation follow such a bias, which they subtract again, and are included.
    """
    norms = trace.gradient_norms
    largest = max(norms.values(), default=0.0)
    noise = {name for name, norm in norms.items() if norm <= share * largest}
    if noise:
        noise |= {f"{layer}.running_mean" for layer in trace.facts["batch_norm"]}
    return noise


def _compare_start(reference: AttemptTrace, trial: TrialRun, number: int) -> Divergence | None:
    """Return the first tensor of the model whose norm is another one before the first step."""
    ours, theirs = (_norms_at_start(each) for each in (reference, trial.attempts[number].trace))
    for name in ours.keys() & theirs.keys():
        a, b = ours[name], theirs[name]
        if abs(a - b) > _START * max(a, b):
            ranks = sorted(trial.attempts[number].trace.starts)
            values = f"norm {a!r}", f"norm {b!r}"
            return divergence_in(trial, 0, "start", name, *values, number=number, ranks=ranks)
    return None


def _norms_at_start(trace: AttemptTrace) -> dict[str, float]:
    """Return the 2-norm of each whole tensor of the model, of which each rank has noted its pieces."""
    pieces = {key: norm for start in trace.starts.values() for key, (_, norm) in start["state"].items()}
    squares: dict[str, float] = {}
    for key, norm in pieces.items():
        name = key.partition("@")[0]
        if name.startswith("model/"):
            squares[name] = squares.get(name, 0.0) + norm**2
    return {name: square**0.5 for name, square in squares.items()}


def _compare_data(reference: AttemptTrace, trial: TrialRun, number: int, step: int) -> Divergence | None:
    """Return the first difference in the samples and learning rates of a step, which no topology may change."""
    trace = trial.attempts[number].trace
    ours, theirs = reference.steps[step], trace.steps[step]
    divergence = functools.partial(divergence_in, trial, step, number=number)
    # the trace of a killed rank is incomplete
    if len(theirs) == trace.facts["world_size"] and all("ids" in entry for entry in theirs.values()):
        one, other = sorted(_ids(ours)), sorted(_ids(theirs))
        if one != other:
            only, new = (sorted(set(a) - set(b))[:8] for a, b in ((one, other), (other, one)))
            values = [f"{len(ids)} samples, {own} only in this run" for ids, own in ((one, only), (other, new))]
            return divergence("ids", "", *values)
        for what in ("samples", "inputs", "targets"):
            mine, its = _by_sample(ours, what), _by_sample(theirs, what)
            for sample, found in sorted(its.items()):
                # padding to the longest of a micro-batch changes rows without changing samples
                shapes = {shape for shape, _ in (*found, *mine[sample])}
                if len(shapes) == 1 and sorted(found) != sorted(mine[sample]):
                    shown = [", ".join(f"bits {bits}" for _, bits in sorted(each)) for each in (mine[sample], found)]
                    return divergence(what, f"sample {sample}", shown[0], shown[1])
    rates, its_rates = ({tuple(entry["lr"]) for entry in ranks.values() if "lr" in entry} for ranks in (ours, theirs))
    if rates and its_rates and _flat(rates) != _flat(its_rates):
        return divergence("lr", "", repr(sorted(_flat(rates))), repr(sorted(_flat(its_rates))))
    return None


def _compare_loss(
    reference: AttemptTrace, tolerance: Tolerance, trial: TrialRun, number: int, step: int
) -> tuple[float, Divergence | None]:
    """Return the relative difference of a step's losses, and the divergence where it exceeds the tolerance.

    The difference is infinite where a loss is NaN or infinite.
    """
    ours, theirs = (each.steps[step].get(0, {}) for each in (reference, trial.attempts[number].trace))
    if "loss" not in ours or "loss" not in theirs:
        return 0.0, None
    a, b = ours["loss"], theirs["loss"]
    first = abs(reference.steps[min(reference.steps)].get(0, {}).get("loss", 0.0))
    size = max(abs(a), abs(b), 0.1 * first) or 1.0
    gap = abs(a - b) / size if math.isfinite(a) and math.isfinite(b) else math.inf
    if gap <= tolerance.loss:
        return gap, None
    subject = f"{gap:.2g} apart, tolerance {tolerance.loss:g}"
    return gap, divergence_in(trial, step, "loss", subject, repr(a), repr(b), number=number, gap=gap)


def _flat(rates: set[tuple[float, ...]]) -> set[float]:
    return {rate for each in rates for rate in each}


def _ids(ranks: dict[int, Values]) -> Iterator[int]:
    return (sample for entry in ranks.values() for ids in entry.get("ids", ()) for sample in ids)


def _by_sample(ranks: dict[int, Values], what: str) -> dict[int, list[tuple[str, str]]]:
    """Return the (shape, digest) pairs of each sample; a step longer than an epoch has some samples twice."""
    found: dict[int, list[tuple[str, str]]] = {}
    for entry in ranks.values():
        for ids, shape, digests in zip(entry["ids"], entry["shapes"], entry[what], strict=True):
            for sample, bits in zip(ids, digests, strict=True):
                found.setdefault(sample, []).append((repr(shape), bits))
    return found


def _compare_checkpoint(
    step: int,
    one: Path,
    other: Path,
    tolerance: Tolerance,
    noise: set[str],
    trial: TrialRun,
    excuses: bool,
) -> tuple[float, bool, Divergence | None]:
    """Return the largest relative difference of a tensor in two checkpoints, whether any is excused, the divergence.

    `excuses` allows values beyond the tolerance, but no tensor that is missing, has another shape, NaN or infinities.
    """
    worst, excused, far = 0.0, False, []
    with Reader(one) as a, Reader(other) as b:
        specs, its = a.manifest.specs, b.manifest.specs
        missing = sorted(specs.keys() ^ its.keys())
        changed = [name for name in specs.keys() & its.keys() if specs[name].shape != its[name].shape]
        if missing or changed:
            name = (missing or changed)[0]
            held = [repr(each[name].shape) if name in each else "no such tensor" for each in (specs, its)]
            rest = [*missing, *changed][1:]
            return math.inf, False, divergence_in(trial, step, "checkpoint", name, *held, more=rest)
        for name in specs:
            if name.split("/")[1] in noise:
                continue
            gap = distance(a, b, name)
            worst = max(worst, gap)
            if gap <= tolerance.state:
                continue
            # integers that differ are infinitely far apart, as a count of batches may be
            if excuses and (math.isfinite(gap) or specs[name].dtype not in FLOATS):
                excused = True
            else:
                far.append((name, gap))
    if not far:
        return worst, excused, None
    far.sort(key=lambda item: (not item[0].startswith("model/"), -item[1]))
    name, gap = far[0]
    more = [f"{each}: {apart:.2g}" for each, apart in far[1:]]
    subject, values = first_differing_element(one, other, name)
    subject = f"{subject}; the tensor is {gap:.2g} of its norm apart, tolerance {tolerance.state:g}"
    return worst, excused, divergence_in(trial, step, "checkpoint", subject, *values, gap=gap, more=more)


def distance(a: Reader, b: Reader, name: str) -> float:
    """Return the 2-norm of the difference of a tensor in two checkpoints, relative to the larger of their norms.

    Infinite where integers differ, and where a value is NaN or infinite and the other is not the same. Reads chunks.
    """
    mine, its = a.spec(name), b.spec(name)
    apart = size = other_size = 0.0
    for _, one, other in chunks(a, b, name):
        if mine.dtype not in FLOATS or its.dtype not in FLOATS:
            bits = bits_dtype(mine.dtype)
            if mine.dtype != its.dtype or not np.array_equal(one.view(bits), other.view(bits)):
                return math.inf
            continue
        x, y = widen(one, mine.dtype).astype(np.float64), widen(other, its.dtype).astype(np.float64)
        # infinities, as in a mask, and NaNs that both have count as equal
        same = (x == y) | (np.isnan(x) & np.isnan(y))
        gap = np.subtract(x, y, out=np.zeros_like(x), where=~same)
        x, y = x[np.isfinite(x)], y[np.isfinite(y)]
        with np.errstate(over="ignore"):  # what becomes infinite here is infinitely far apart below
            apart += float(np.dot(gap, gap))
            size, other_size = size + float(np.dot(x, x)), other_size + float(np.dot(y, y))
    if apart == 0:
        return 0.0
    norm = max(size, other_size)
    return (apart / norm) ** 0.5 if math.isfinite(apart) and 0 < norm < math.inf else math.inf
