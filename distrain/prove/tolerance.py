"""What must agree between different numbers of processes or strategies, and how closely.

The same samples with the same bits, and the same learning rates. Sums over samples are taken in another order there, so
losses and tensors agree within rounding, which training carries on and lets grow.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distrain.checkpoint import Reader
from distrain.checkpoints.comparing import chunks
from distrain.checkpoints.dtypes import bits_dtype
from distrain.checkpoints.floats import FLOATS, widen
from distrain.prove.divergence import Divergence, earliest, element, not_done, shared_checkpoints
from distrain.prove.legs import Leg
from distrain.prove.traces import Record, Values


@dataclass(frozen=True)
class Tolerance:
    """How closely another placement must agree."""

    loss: float
    """Of each step's loss, relative to it (or to a tenth of the first step's, where it has fallen below that)."""
    state: float
    """Of each tensor: the 2-norm of the difference, relative to that of the tensor."""
    noise: float
    """A tensor whose gradient is never larger than this share of the largest is left out: it is mere rounding."""


TOLERANCES = {
    "fp64": Tolerance(1e-10, 1e-7, 1e-13),
    "fp32": Tolerance(1e-5, 1e-4, 1e-6),
    "tf32": Tolerance(1e-2, 1e-1, 1e-3),
    "bf16": Tolerance(3e-2, 2e-1, 1e-2),
    "fp16": Tolerance(1e-2, 1e-1, 1e-3),
}
"""By the precision that took effect; of any other, that of bf16."""


@dataclass
class Agreement:
    """How far another placement agrees with the straight run."""

    divergence: Divergence | None
    worst_loss: float
    worst_tensor: float
    noise: list[str]
    """Tensors left out as rounding decides them: see `noisy_tensors`."""
    by_design: str = ""
    """Why loss and weights legitimately depend on the placement, where they do and differ; empty otherwise."""


def tolerance_of(record: Record, loss: float | None = None, state: float | None = None) -> Tolerance:
    """Return the tolerance of a run's precision, or the values given instead."""
    usual = TOLERANCES.get(record.facts["precision"], TOLERANCES["bf16"])
    return Tolerance(usual.loss if loss is None else loss, usual.state if state is None else state, usual.noise)


def within(straight: Leg, other: Leg, tolerance: Tolerance) -> Agreement:
    """Return how a run in other placements agrees with the straight one.

    What depends on the number of processes by design is excused only where that number was another; what is read, what
    was done, and what is not finite or not there never is.
    """
    reference = straight.attempts[0].record
    noise = noisy_tensors(reference, tolerance.noise)
    moved = _moved(reference.facts["world_size"], other)
    reasons = depends_on_placement(reference) if any(moved) else ""
    firm: list[Divergence] = []
    excused = False
    worst_loss = worst_tensor = 0.0
    for number, attempt in enumerate(other.attempts):
        for step in sorted(attempt.record.steps.keys() & reference.steps.keys()):
            ranks, place = attempt.record.steps[step], (step, other.name, number)
            gap, loss = _loss(reference, attempt.record, tolerance, *place)
            worst_loss = max(worst_loss, gap)
            may_differ = bool(reasons) and moved[number] and math.isfinite(gap)
            excused = excused or (loss is not None and may_differ)
            first = _read(reference, attempt.record, *place) or (None if may_differ else loss)
            if first is not None:
                first.ranks = first.ranks or sorted(ranks)
                firm.append(first)
                break
    for step, one, two in shared_checkpoints(straight.run_dir, other.run_dir):
        number = other.attempt_of(step)
        excuses = bool(reasons) and moved[number]
        gap, apart, divergence = _checkpoint(step, one, two, tolerance, noise, other, number, excuses)
        worst_tensor = max(worst_tensor, gap)
        excused = excused or apart
        if divergence is not None:
            firm.append(divergence)
            break
    for divergence in not_done(straight, other):
        # where losses are excused, so is the step at which they make a run stop early
        if excused and (straight.ended_early or other.ended_early):
            continue
        firm.append(divergence)
    return Agreement(earliest(firm), worst_loss, worst_tensor, sorted(noise), reasons if excused else "")


def _moved(count: int, leg: Leg) -> list[bool]:
    """Return for each attempt whether another number of processes than `count` had a part in its state."""
    moved: list[bool] = []
    for attempt in leg.attempts:
        inherited = bool(moved) and moved[-1] and attempt.resumed_at > 0
        moved.append(inherited or attempt.record.facts["world_size"] != count)
    return moved


def depends_on_placement(record: Record) -> str:
    """Return why a model's results depend on the number of processes, as it is built to; empty where nothing does."""
    reasons = []
    if layers := record.facts["batch_norm"]:
        shown = ", ".join(layers[:3]) + (", …" if len(layers) > 3 else "")
        reasons.append(f"batch normalisation ({shown}) takes its means over the samples of one process's micro-batch")
    if drawn := record.drawn():
        reasons.append(
            f"the model draws random numbers while it trains, as dropout does ({', '.join(drawn)}), and each process "
            "has its own"
        )
    return "; ".join(reasons)


def noisy_tensors(record: Record, share: float) -> set[str]:
    """Return the tensors whose gradient is rounding and no more, such as a bias before batch normalisation.

    An optimizer that divides by the size of gradients turns that rounding into steps of full length. The running means
    of batch normalisation follow such a bias, whose shift they take out again, and are returned with it.
    """
    norms = record.gradient_norms
    largest = max(norms.values(), default=0.0)
    noise = {name for name, norm in norms.items() if norm <= share * largest}
    if noise:
        noise |= {f"{layer}.running_mean" for layer in record.facts["batch_norm"]}
    return noise


def _read(reference: Record, record: Record, step: int, leg: str, number: int) -> Divergence | None:
    """Return the first difference in what a step read: samples and learning rates, which no placement may change."""
    ours, theirs = reference.steps[step], record.steps[step]

    def divergence(what: str, subject: str, one: str, other: str) -> Divergence:
        return Divergence(leg, step, what, subject, [], one, other, number, record.start_step)

    # a rank that was killed has not noted all
    if len(theirs) == record.facts["world_size"] and all("ids" in noted for noted in theirs.values()):
        one, other = sorted(_ids(ours)), sorted(_ids(theirs))
        if one != other:
            only, new = (sorted(set(a) - set(b))[:8] for a, b in ((one, other), (other, one)))
            return divergence("ids", "", f"{len(one)} samples, {only} only here", f"{len(other)}, {new} only here")
        for what in ("samples", "inputs", "targets"):
            mine, its = _by_sample(ours, what), _by_sample(theirs, what)
            for sample, found in sorted(its.items()):
                # padding to the longest of a micro-batch changes rows without changing samples
                shapes = {shape for shape, _ in (*found, *mine[sample])}
                if len(shapes) == 1 and sorted(found) != sorted(mine[sample]):
                    shown = [", ".join(f"bits {bits}" for _, bits in sorted(each)) for each in (mine[sample], found)]
                    return divergence(what, f"sample {sample}", shown[0], shown[1])
    rates, its_rates = ({tuple(noted["lr"]) for noted in ranks.values() if "lr" in noted} for ranks in (ours, theirs))
    if rates and its_rates and _flat(rates) != _flat(its_rates):
        return divergence("lr", "", repr(sorted(_flat(rates))), repr(sorted(_flat(its_rates))))
    return None


def _loss(
    reference: Record, record: Record, tolerance: Tolerance, step: int, leg: str, number: int
) -> tuple[float, Divergence | None]:
    """Return the relative distance of a step's losses, and the divergence that it is beyond the tolerance.

    Infinite where one of them is not finite.
    """
    ours, theirs = (each.steps[step].get(0, {}) for each in (reference, record))
    if "loss" not in ours or "loss" not in theirs:
        return 0.0, None
    a, b = ours["loss"], theirs["loss"]
    first = abs(reference.steps[min(reference.steps)].get(0, {}).get("loss", 0.0))
    size = max(abs(a), abs(b), 0.1 * first) or 1.0
    gap = abs(a - b) / size if math.isfinite(a) and math.isfinite(b) else math.inf
    if gap <= tolerance.loss:
        return gap, None
    said = f"{gap:.2g} apart, tolerance {tolerance.loss:g}"
    return gap, Divergence(leg, step, "loss", said, [], repr(a), repr(b), number, record.start_step, gap)


def _flat(rates: set[tuple[float, ...]]) -> set[float]:
    return {rate for each in rates for rate in each}


def _ids(ranks: dict[int, Values]) -> Iterator[int]:
    return (sample for noted in ranks.values() for ids in noted.get("ids", ()) for sample in ids)


def _by_sample(ranks: dict[int, Values], what: str) -> dict[int, list[tuple[str, str]]]:
    """Return (shape, digest) of each sample; a step that is longer than an epoch has some twice."""
    found: dict[int, list[tuple[str, str]]] = {}
    for noted in ranks.values():
        for ids, shape, digests in zip(noted["ids"], noted["shapes"], noted[what], strict=True):
            for sample, bits in zip(ids, digests, strict=True):
                found.setdefault(sample, []).append((repr(shape), bits))
    return found


def _checkpoint(
    step: int, one: Path, other: Path, tolerance: Tolerance, noise: set[str], leg: Leg, number: int, excuses: bool
) -> tuple[float, bool, Divergence | None]:
    """Return the largest relative distance of a tensor in two checkpoints, whether any is excused, and what is not.

    With `excuses`, values may be too far apart; not so what is missing, has another shape, or is not finite.
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
            return math.inf, False, _of_checkpoint(step, name, held[0], held[1], leg, number, None, rest)
        for name in specs:
            if name.split("/")[1] in noise:
                continue
            gap = distance(a, b, name)
            worst = max(worst, gap)
            if gap <= tolerance.state:
                continue
            # whole numbers are infinitely far apart wherever they differ, as a count of batches may
            if excuses and (math.isfinite(gap) or specs[name].dtype not in FLOATS):
                excused = True
            else:
                far.append((name, gap))
    if not far:
        return worst, excused, None
    far.sort(key=lambda item: (not item[0].startswith("model/"), -item[1]))
    name, gap = far[0]
    more = [f"{each}: {apart:.2g}" for each, apart in far[1:]]
    subject, values = element(one, other, name)
    said = f"{subject}; the tensor is {gap:.2g} of its norm apart, tolerance {tolerance.state:g}"
    return worst, excused, _of_checkpoint(step, said, *values, leg, number, gap, more)


def _of_checkpoint(
    step: int, subject: str, one: str, other: str, leg: Leg, number: int, gap: float | None, more: list[str]
) -> Divergence:
    begun = leg.attempts[number].resumed_at
    return Divergence(leg.name, step, "checkpoint", subject, [], one, other, number, begun, gap, more=more)


def distance(a: Reader, b: Reader, name: str) -> float:
    """Return the 2-norm of the difference of a tensor in two checkpoints, relative to the larger of their norms.

    Infinite where whole numbers differ, and where one is not finite and the other is not the same. Reads a little at a
    time.
    """
    mine, its = a.spec(name), b.spec(name)
    apart = size = its_size = 0.0
    for _, one, other in chunks(a, b, name):
        if mine.dtype not in FLOATS or its.dtype not in FLOATS:
            bits = bits_dtype(mine.dtype)
            if mine.dtype != its.dtype or not np.array_equal(one.view(bits), other.view(bits)):
                return math.inf
            continue
        x, y = widen(one, mine.dtype).astype(np.float64), widen(other, its.dtype).astype(np.float64)
        # infinities, as in a mask, and NaNs that both have are no distance
        same = (x == y) | (np.isnan(x) & np.isnan(y))
        gap = np.subtract(x, y, out=np.zeros_like(x), where=~same)
        x, y = x[np.isfinite(x)], y[np.isfinite(y)]
        with np.errstate(over="ignore"):  # what becomes infinite here is infinitely far apart below
            apart += float(np.dot(gap, gap))
            size, its_size = size + float(np.dot(x, x)), its_size + float(np.dot(y, y))
    if apart == 0:
        return 0.0
    whole = max(size, its_size)
    return (apart / whole) ** 0.5 if math.isfinite(apart) and 0 < whole < math.inf else math.inf
