"""Whether what a model computes of a sample depends on the padding that a longer one in its batch asks for."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distrain.datasets.base import Data, is_stream
from distrain.networks.calling import calling_convention, unwrap_model
from distrain.parallel.parameter_writes import restored
from distrain.parallel.stirring import stirred
from distrain.training.context import TrainContext, to_device

_LOOKED_AT = 16
"""Samples among which one that is shorter than another is looked for."""


def padding_warning(t: TrainContext, data: Data) -> str | None:
    """Return the warning for a model whose output for a sample is another one beside a longer sample.

    Tried with two training samples, since many models take no mask, or take one and pass over it. All ranks call, and
    try the same: a sharded model's forward runs collectives. None where samples are not padded, or the trial fails:
    training says what is wrong.
    """
    source, shape = data.splits["train"], data.meta.input_shape
    may_pad = data.meta.pad_id is not None or data.chat is not None or (shape is not None and len(shape) < 3)
    if not may_pad or is_stream(source):
        return None
    lengths = [_length(source.fetch(np.array([number]))["inputs"]) for number in range(min(len(source), _LOOKED_AT))]
    short, long = int(np.argmin(lengths)), int(np.argmax(lengths))
    if lengths[short] == lengths[long]:
        return None
    model, call, world = t.strategy.model, calling_convention(t.strategy.model), t.world
    batches = [
        to_device({"inputs": _one(source.fetch(np.array(ids))["inputs"])}, world)
        for ids in ([short], [short], [short, long])
    ]
    written = () if world.forward_is_collective else model.parameters()
    eager = torch.compiler.set_stance("force_eager") if t.compiled.on else nullcontext()
    apart = False
    model.eval()  # draws no random numbers
    try:
        with stirred(t.strategy), restored(model, written), suppress(Exception), torch.no_grad(), eager:
            alone, again, both = (call(model, batch["inputs"]).logits.float() for batch in batches)
            beside = both[tuple(map(slice, alone.shape))]
            limit = (2e-2 if world.mixed_precision.autocast is not None else 1e-4) * alone.abs().max()
            apart = bool((alone - again).abs().max() <= limit < (alone - beside).abs().max())
    finally:
        model.train()
    if not apart:
        return None
    return (
        f"{type(unwrap_model(model)).__name__} computes something else of a sample where a longer one is beside it: it "
        "reads padding, so that metrics and predictions depend on batch sizes and on the number of processes. Have it "
        "pass over padding, which a mask among the inputs or its value tells"
    )


def _one(inputs: Any) -> Any:
    """Return inputs of one call: of pairs of answers the first."""
    nested = isinstance(inputs, Mapping) and any(isinstance(each, Mapping) for each in inputs.values())
    return next(iter(inputs.values())) if nested else inputs


def _length(inputs: Any) -> int:
    """Return the longest second dimension."""
    inputs = _one(inputs)
    tensors = inputs.values() if isinstance(inputs, Mapping) else [inputs]
    return max((each.shape[1] for each in tensors if isinstance(each, Tensor) and each.dim() > 1), default=0)
