"""What the first samples of a data set say of it, long before the first step and the first evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch

from distrain.config import Recipe, UserError
from distrain.datasets.base import AnySource, Batch, Data, is_stream
from distrain.datasets.batches import Batches
from distrain.datasets.evaluation import build_eval_loader
from distrain.datasets.mixing import Mixing
from distrain.datasets.transforms import Transform


def described(
    recipe: Recipe,
    data: Data,
    transform_of: Callable[[Literal["train", "eval"]], Transform],
    dtype: torch.dtype,
    reads: str | None = None,
) -> Data:
    """Return the data with what its first samples show: the shape of an input after the transforms, bytes, one size.

    `reads`: the split whose shape counts where it is there, and that may be corrupt throughout. Raises UserError for a
    split without samples, and for transforms that do not fit.
    """
    if empty := [name for name, source in data.splits.items() if not is_stream(source) and len(source) == 0]:
        raise UserError(f"data set {recipe.data.name!r}: the split {empty[0]!r} has no samples")
    if recipe.data.skip_corrupt and any(map(is_stream, data.splits.values())):
        raise UserError(
            f"data.skip_corrupt is {recipe.data.skip_corrupt}, and samples of an iterable data set have no "
            "numbers; skip corrupt samples in the iterable itself, alike in every process"
        )
    shapes, byte_images, fixed_shapes = {}, False, False
    for name, source in data.splits.items():
        transform = transform_of("train" if name == "train" else "eval")
        tolerated = len(source) if name == reads and not is_stream(source) else recipe.data.skip_corrupt
        first = _first(source, transform, tolerated)
        inputs = first["inputs"]
        if name == "train":
            byte_images = transform.met_bytes
            if (mixing := Mixing.of(recipe, data.meta, dtype)) is not None:
                mixing.check(source, inputs, first.get("targets"))
                byte_images &= mixing.keeps_bytes
            of_one_size = isinstance(getattr(source, "inputs", None), torch.Tensor) or getattr(source, "size", None)
            fixed_shapes = isinstance(inputs, torch.Tensor) and transform.gives_one_size(bool(of_one_size))
        if isinstance(inputs, torch.Tensor) and inputs.is_floating_point():
            shapes[name] = tuple(inputs.shape[1:])
    shape = shapes.get(reads if reads is not None and reads in shapes else "train")
    meta = data.meta if shape is None else dataclasses.replace(data.meta, input_shape=shape)
    return dataclasses.replace(data, meta=meta, byte_images=byte_images, fixed_shapes=fixed_shapes)


def _first(source: AnySource, transform: Transform, tolerated: int) -> Batch:
    if is_stream(source):
        return next(iter(build_eval_loader(source, rank=0, world_size=1, batch_size=1, transform=transform)))
    return Batches(source, transform, tolerated).batch((np.zeros(1, np.int64), np.zeros(1, np.int64)))
