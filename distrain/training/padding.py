"""Whether what is computed of a sample depends on the padding that a longer one in its batch asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from distrain.datasets.base import AnySource, Batch, DataMeta
from distrain.datasets.nested import map_tensors
from distrain.datasets.transforms import Transform
from distrain.datasets.user import is_users
from distrain.networks.calling import Convention, unwrap_model
from distrain.parallel import World
from distrain.training import noise
from distrain.training.tasks import Objective
from distrain.training.trying import TriedSamples, eagerly

_LOOKED_AT = 16
"""Samples among which some that are shorter than others are looked for."""
_PAIRS = 3
"""Of a shorter and a longer sample, with which a model is tried."""


class PaddedSamples(NamedTuple):
    """Samples of which some are padded beside others."""

    samples: TriedSamples
    pairs: Sequence[tuple[int, int]]
    """The numbers of a shorter and of a longer one."""


def padded_samples(source: AnySource, transform: Transform, meta: DataMeta, world: World) -> PaddedSamples | None:
    """Return a few samples of a source with which to try a model; None where none is padded, or they cannot be read.

    Images, and rows of a table, are not read for it: they have one shape nearly always, and reading may take long. Of a
    data set of one's own a row may be a waveform.
    """
    shape = meta.input_shape
    if shape is not None and len(shape) != 2 and not (len(shape) == 1 and is_users(source)):
        return None
    with suppress(Exception):  # what reads them next says what is wrong
        samples = TriedSamples(source, transform, world, _LOOKED_AT)
        if pairs := samples.of_unequal_lengths()[:_PAIRS]:
            return PaddedSamples(samples, pairs)
    return None


def padding_warnings(model: nn.Module, objective: Objective, padded: PaddedSamples, world: World) -> list[str]:
    """Return a warning for a model whose output for a sample is another one beside a longer sample, or such losses.

    Tried, since many models take no mask, or take one and pass over it. `model` is whole and in the mode of an
    evaluation, in which it draws no random numbers. Empty where the trial fails: what computes next says what is wrong.
    """
    samples = padded.samples
    reads, counts = False, dict[str, None]()
    with suppress(Exception), torch.no_grad(), eagerly():
        for pair in padded.pairs:
            alone, again, both = (samples.batch(*which) for which in (pair[:1], pair[:1], pair))
            with suppress(Exception):  # a task of one's own may call its model otherwise
                outputs = [_outputs(objective.call, model, _one(each["inputs"])) for each in (alone, again, both)]
                reads |= _depends(outputs, world)
            both["ids"][1:] = -1  # padding, as ranks have it at the end of a split
            if not objective.couples:
                losses = [_losses(objective, model, each, world) for each in (alone, both)]
                with noise.other_draws("again"):  # a loss that draws at random tells nothing
                    losses.insert(1, _losses(objective, model, again, world))
                counts |= {name: None for name in losses[0] if _depends([[each[name]] for each in losses], world)}
    kind = type(unwrap_model(model)).__name__
    if reads:
        return [
            f"{kind} computes something else of a sample where a longer one is beside it: it reads padding, so that "
            "metrics and predictions depend on batch sizes and on the number of processes. Have it pass over padding, "
            "which a mask among the inputs or its value tells"
        ]
    return [
        f"loss {name} of a sample is another number where a longer one is beside it: it counts padding, so that it "
        "depends on batch sizes and the number of processes. Have it pass over padding, which the targets tell"
        for name in counts
    ]


def _outputs(call: Convention, model: nn.Module, inputs: Any) -> list[Tensor]:
    found = call(model, map_tensors(torch.clone, inputs))  # it may change them in place
    return [each.double() for each in (found.logits, *found.others)]


def _losses(objective: Objective, model: nn.Module, batch: Batch, world: World) -> dict[str, Tensor]:
    """Return the sum and the count of each loss that an evaluation adds up of a batch (2,)."""
    names, pairs = objective.score(objective.evaluate(model, batch, predict=False), batch, world).means
    return dict(zip(names if objective.loss is None else [objective.name], pairs, strict=True))


def _depends(found: Sequence[list[Tensor]], world: World) -> bool:
    """Whether what a sample has alone, and alone again, is another number beside another sample."""
    alone, again, beside = found
    return not differ(alone, again, world) and differ(alone, beside, world)


def differ(alone: Sequence[Tensor], beside: Sequence[Tensor], world: World) -> bool:
    """Whether outputs of one sample differ from those that it has in a batch, by more than rounding."""
    rounding = 2e-2 if world.mixed_precision.autocast is not None else 1e-8 if world.precision == "fp64" else 1e-4
    for one, other in zip(alone, beside, strict=True):
        part = other[tuple(map(slice, one.shape))]
        if one.numel() and bool((one - part).abs().max() > rounding * one.abs().max()):
            return True
    return False


def _one(inputs: Any) -> Any:
    """Return inputs of one call: of pairs of answers the first."""
    nested = isinstance(inputs, Mapping) and any(isinstance(each, Mapping) for each in inputs.values())
    return next(iter(inputs.values())) if nested else inputs
