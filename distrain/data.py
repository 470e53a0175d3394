"""Data, from a recipe to the batches of one rank.

    data = build_data(recipe)
    order = SampleOrder(len(data.splits["train"]), recipe.seed)
    micro_batch_size, accumulation = batch_shape(recipe.batch, world_size)
    for micro_batches in build_loader(data.splits["train"], order, ...):     # one list for each optimizer step

The position in the data is a function of the step: optimizer step s consumes positions [s*G, (s+1)*G) of the endless
order of samples, with G the global batch size, on any number of processes and loader workers.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from distrain.config import Component, DataSection, Recipe, UserError
from distrain.datasets.arrays import check_columns
from distrain.datasets.base import (
    AnySource,
    Batch,
    Data,
    DataRequest,
    Source,
    find_dataset,
    is_stream,
)
from distrain.datasets.batch_sizes import accumulation_steps
from distrain.datasets.batches import Batches, Place, StreamBatches
from distrain.datasets.class_counts import COUNTS, with_counts
from distrain.datasets.describing import described
from distrain.datasets.evaluation import check_stream_workers
from distrain.datasets.labels import Labels
from distrain.datasets.loading import load
from distrain.datasets.mixing import MixedBatches, Mixing, mixing_problems
from distrain.datasets.order import SampleOrder
from distrain.datasets.streams import training_stream
from distrain.datasets.transforms import Masks, Transform
from distrain.datasets.user import named_data, own_collate, source_of

# --------------------------------------------------------------------------------------------------------------------
# Loaders

_BLOCK = 16384  # positions whose samples are computed at a time: about 0.3 ms, once for many steps


def build_loader(
    source: AnySource,
    order: SampleOrder | None,
    *,
    recipe: Recipe,
    rank: int,
    world_size: int,
    micro_batch_size: int,
    start_step: int = 0,
    stop_step: int | None = None,
    transform: Transform | None = None,
    pin_memory: bool = False,
    mixing: Mixing | None = None,
) -> Iterator[list[Batch]]:
    """Yield for each optimizer step in [start_step, stop_step) the micro-batches of this rank, in order.

    A step's micro-batches come together because the loss is divided by their common count. Micro-batch `a` of rank r of
    W in step s holds the positions [s*G + (a*W + r)*m, ... + m), with G the recipe's global batch size and m
    `micro_batch_size`; so over all ranks a step consumes [s*G, (s+1)*G), and starting at any step costs the same.

    A stream has no order: its positions are those of its endless repetition. Every rank reads all of it and keeps its
    own share, and a later step is reached by reading up to it. At most one loader process reads it.

    With `mixing` a batch holds mixed samples, and targets that are shares of classes.

    `close()` ends the loader processes. Raises UserError for sizes that do not divide, and for an unreadable sample
    with its path and number.
    """
    accumulation = accumulation_steps(recipe.batch.global_batch_size, micro_batch_size, world_size)
    first = start_step * accumulation
    # without an end, as far as int64 numbers positions
    last = 2**62 // (world_size * micro_batch_size) if stop_step is None else stop_step * accumulation
    workers = recipe.data.workers
    batches: Batches | StreamBatches
    places: Iterable[Place] | None = None
    if is_stream(source):
        check_stream_workers(workers)

        def plan() -> Iterator[tuple[Place, list[Any]]]:
            return training_stream(source, first, last, rank, world_size, micro_batch_size)

        batches = StreamBatches(plan, source, transform)
    else:
        assert order is not None
        assert order.length == len(source)
        tolerated = recipe.data.skip_corrupt
        if mixing is None:
            batches = Batches(source, transform, tolerated)
        else:
            batches = MixedBatches(source, transform, tolerated, mixing, order)
        places = _train_places(order, first, last, rank, world_size, micro_batch_size, positions=mixing is not None)
    return _steps(load(batches, places, workers, pin_memory), accumulation)


def _steps(batches: Iterator[Batch], accumulation: int) -> Iterator[list[Batch]]:
    while micro_batches := list(itertools.islice(batches, accumulation)):
        yield micro_batches


def _train_places(
    order: SampleOrder, first: int, last: int, rank: int, world_size: int, micro_batch_size: int, *, positions: bool
) -> Iterator[Place]:
    """Yield the places of micro-batches first..last-1 of this rank, counted from step 0; with their `positions`."""
    block = max(1, _BLOCK // micro_batch_size)
    within = np.arange(micro_batch_size, dtype=np.int64)
    for start in range(first, last, block):
        numbers = np.arange(start, min(start + block, last), dtype=np.int64)[:, None]
        where = (numbers * world_size + rank) * micro_batch_size + within
        yield from zip(*order.at_positions(where), *([where] if positions else []), strict=True)


# --------------------------------------------------------------------------------------------------------------------
# A recipe's data


def build_data(
    recipe: Recipe, state: dict[str, Any] | None = None, *, inputs_only: bool = False, reads: str | None = None
) -> Data:
    """Return the data set of a recipe; `state`, of an earlier build, replaces fitting.

    With `inputs_only` the splits need not be there, where the data set can do without; then `reads`, a file or folder
    that it can read, is its only split, under this name, if the shape of a sample is not known otherwise.

    `meta.input_shape` is the shape after the training transforms. Raises UserError for unknown names and keys, missing
    or invalid files, and transforms that do not fit the samples.
    """
    fitted = None if state is None else {key: value for key, value in state.items() if key != COUNTS}
    without_splits = inputs_only and state is not None
    request = replace(_request(recipe, recipe.data), state=fitted, inputs_only=without_splits)
    data = named_data(request)
    if not data.splits and reads is not None and data.meta.input_shape is None and data.read is not None:
        data = replace(data, splits={reads: data.read(Path(reads))})
    data = described(recipe, data, lambda kind: build_transform(recipe, kind), float_dtype(recipe), reads)
    data = replace(data, warnings=(*data.warnings, *_scaled_apart(recipe, bytes_=data.byte_images)))
    return with_counts(recipe, data, state)


def _request(recipe: Recipe, section: DataSection) -> DataRequest:
    labels = functools.partial(Labels.of, recipe)
    about = float_dtype(recipe), labels, own_collate(recipe)
    return DataRequest(section, recipe.form, recipe.seed, Path(), None, *about)


def fitted_keys(recipe: Recipe, then: DataSection, state: Mapping[str, Any]) -> list[str]:
    """Return the keys of the data section that differ from `then` and would have another state fitted than `state`.

    Where a state is given it replaces fitting, so these keys change nothing. Each is put back alone, and the data set,
    as it is now, is fitted with both values; a key with whose earlier value it cannot be read is not among them.
    """

    def put_back(key: str) -> DataSection:
        section = recipe.data.model_copy(update={key: then.args[key]} if key in then.args else {})
        if key not in then.args and section.model_extra is not None:
            section.model_extra.pop(key)
        return section

    now, before = recipe.data.args, then.args
    if then.name != recipe.data.name:
        return ["name"] if (found := _fitted(recipe, recipe.data)) and found != _without_places(state) else []
    changed = [key for key in sorted(now.keys() | before.keys()) if now.get(key) != before.get(key)]
    if not state or not changed:
        return []
    found = _fitted(recipe, recipe.data)
    return [key for key in changed if (earlier := _fitted(recipe, put_back(key))) is not None and earlier != found]


def is_outdated(recipe: Recipe, state: Mapping[str, Any]) -> bool:
    """Whether another state than `state`, which replaces fitting, would be fitted to the data as they are now."""
    found = _fitted(recipe, recipe.data)
    return found is not None and (COUNTS in state or found != _without_places(state))


def _fitted(recipe: Recipe, section: DataSection) -> dict[str, Any] | None:
    """Return what is fitted to the data as they are now, as a checkpoint has it; None where they cannot be read."""
    try:
        found: dict[str, Any] = json.loads(json.dumps(named_data(_request(recipe, section)).state))
    except UserError:
        return None
    return _without_places(found)


def _without_places(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state without the folders in it, beside which it has a digest of what is there."""
    return {
        key: value
        for key, value in state.items()
        if key != COUNTS and not (isinstance(value, str) and Path(value).is_absolute())
    }


def _scaled_apart(recipe: Recipe, *, bytes_: bool) -> list[str]:
    """Return a warning where training and evaluation give the model numbers of another scale.

    `bytes_`: whether images are bytes, which are scaled where no transform makes floats of them as they are.
    """

    def scaling(items: Sequence[Component]) -> list[str]:
        return [
            f"{item.name} {item.args}"
            for item in items
            if item.name in ("Normalize", "Grayscale")
            or (bytes_ and item.name == "ToDtype" and not item.args.get("scale"))
        ]

    transforms = recipe.data.transforms
    train, evaluation = scaling(transforms.train), scaling(transforms.eval)
    if train == evaluation:
        return []
    shown = [" and ".join(each) or "none of these" for each in (train, evaluation)]
    return [
        f"data.transforms.train has {shown[0]}, and data.transforms.eval {shown[1]}: evaluations and predictions give "
        "the model numbers of another scale than it is trained on"
    ]


def given_source(recipe: Recipe, inputs: Any, state: Mapping[str, Any]) -> Source:
    """Return inputs that are given in Python, arrays or a Dataset, for prediction; raises UserError.

    They are as the run's own data set gives them, whose state is `state`; a built-in one encodes what it reads, which
    arrays would bypass.
    """
    name, task = recipe.data.name, recipe.form
    if find_dataset(recipe.data, task).registered:
        raise UserError(
            f"inputs: data set {name!r} encodes what it reads, so arrays would not be what the model has seen; name "
            "one of its splits, or a file or folder as it reads them"
        )
    request = DataRequest(recipe.data, task, recipe.seed, Path(), None, float_dtype(recipe))
    check_columns(inputs, state.get("columns"), "inputs: the table")
    return source_of(request, inputs)


def float_dtype(recipe: Recipe) -> torch.dtype:
    """Return the dtype of inputs and weights: float64 with `train.precision: fp64`, otherwise float32."""
    return torch.float64 if recipe.train.precision == "fp64" else torch.float32


def check_data(recipe: Recipe) -> list[str]:
    """Return the problems of the data section's name, arguments and transforms that show without the data."""
    problems = []
    checks: list[Callable[[], Any]] = [
        lambda: find_dataset(recipe.data, recipe.form),
        lambda: build_transform(recipe, "train"),
        lambda: build_transform(recipe, "eval"),
    ]
    for check in checks:
        try:
            check()
        except UserError as error:
            problems.append(str(error))
    return problems + mixing_problems(recipe)


def build_transform(recipe: Recipe, kind: Literal["train", "eval"]) -> Transform:
    """Return the transforms of the training split, or of all others."""
    items = getattr(recipe.data.transforms, kind)
    masks = None
    if recipe.form == "segmentation":
        index = recipe.loss.args.get("ignore_index") if recipe.loss is not None else None
        masks = Masks(index if isinstance(index, int) else None)
    return Transform(items, recipe.seed, f"data.transforms.{kind}", float_dtype(recipe), masks)
