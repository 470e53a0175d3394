"""Whether the losses of a task of one's own are sums over samples, as it says by returning them."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import torch
from torch import Tensor, nn

from distrain.datasets.base import AnySource, is_stream
from distrain.datasets.nested import tensors_in
from distrain.datasets.transforms import Transform
from distrain.parallel import World
from distrain.training import noise
from distrain.training.tasks import Objective, TaskObjective
from distrain.training.trying import TriedSamples, eagerly

_TRIED = 6
"""Most samples that are taken together, and in two parts."""
_LOOKED_AT = 64
"""Samples of which those are taken that have different targets: of one class, a mean by classes is one by samples."""


def may_be_no_sums(objective: Objective) -> bool:
    """Whether the losses are those of a task of one's own that says they are sums."""
    if not isinstance(objective, TaskObjective) or objective.couples:
        return False
    return type(objective.task).__module__.partition(".")[0] != "distrain"


def sums_warnings(
    model: nn.Module,
    objective: Objective,
    source: AnySource,
    transform: Transform,
    world: World,
    micro_batch_size: int,
) -> list[str]:
    """Return the warning for a task whose losses, or what it reports, are no sums over the parts of a batch.

    Such a mean over tokens, a weighted mean or a loss that compares samples is another one with another micro-batch.
    `model` is whole and in the mode of an evaluation, so that layers that look across the batch have no part in it.
    Empty where all are sums, or where the trial fails.
    """
    names, padded = set[str](), False

    def of(seed: str, which: range) -> dict[str, Tensor]:
        """Return the sum and the count of each name (2,)."""
        with noise.other_draws(seed):
            (_, pairs, reported, _), _, _ = objective.evaluate(model, samples.batch(*which), predict=False)
        return dict(zip(reported, pairs, strict=True))

    with suppress(Exception), torch.no_grad(), eagerly():
        count = min(_TRIED, max(2, micro_batch_size))
        samples = TriedSamples(source, transform, world, count if is_stream(source) else _LOOKED_AT)
        samples.keep(_unlike(samples, count))
        every = range(len(samples))
        whole, again, redrawn = (of(seed, every) for seed in ("a", "a", "b"))
        random = {name for name in whole if max(_gap(whole, again, name), _gap(whole, redrawn, name)) > 1e-6}
        rounding = 2e-2 if world.mixed_precision.autocast is not None else 1e-4
        for cut in sorted({1, len(samples) // 2}):
            first, second = of("a", every[:cut]), of("a", every[cut:])
            parts = {name: pair + second[name] for name, pair in first.items()}
            names |= {name for name in whole if name not in random and _gap(whole, parts, name) > rounding}
        padded = _shapes(samples, every[:1]) != _shapes(samples, every)
    if not names:
        return []
    listed = " and ".join(map(repr, sorted(names)))
    return [
        f"{objective.name}: of a batch, {listed} {'are' if len(names) > 1 else 'is'} not what its parts have together, "
        "so that another batch.micro, eval.batch or number of processes means another number. What is no mean over "
        "samples (but over tokens, or weighted) is returned as a LossSum with its count, which the method count(batch) "
        "returns too; what compares samples needs couples_samples = True (docs/tasks.md)"
        + ("; and a model has to pass over padding" if padded else "")
    ]


def _unlike(samples: TriedSamples, count: int) -> list[int]:
    """Return the numbers of `count` samples, with as many different targets as there are among whole numbers."""
    spread = list(dict.fromkeys(np.linspace(0, len(samples) - 1, count).round().astype(int).tolist()))
    if len(samples) <= count:
        return spread
    targets = samples.targets()
    if not isinstance(targets, Tensor) or targets.dim() != 1 or targets.is_floating_point():
        return spread
    first = {value: number for number, value in reversed(list(enumerate(targets.tolist())))}
    return sorted([*sorted(first.values()), *(each for each in spread if each not in first.values())][:count])


def _gap(whole: dict[str, Tensor], other: dict[str, Tensor], name: str) -> float:
    """Return by how much a sum differs from another, relative to it."""
    one, two = float(whole[name][0]), float(other[name][0])
    return abs(one - two) / max(abs(one), abs(two), 1e-6)


def _shapes(samples: TriedSamples, which: range) -> list[tuple[int, ...]]:
    return [tuple(each.shape[1:]) for each in tensors_in(samples.batch(*which)["inputs"])]
