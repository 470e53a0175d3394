"""Data, from a recipe to the batches of one rank.

    data = build_data(recipe)
    order = SampleOrder(len(data.splits["train"]), recipe.seed)
    micro_batch_size, accumulation = batch_shape(recipe.batch, world_size)
    for micro_batches in build_loader(data.splits["train"], order, ...):     # one list for each optimizer step

Where a run is in its data is a function of the step: optimizer step s consumes positions [s*G, (s+1)*G) of the endless
order of samples, G being the global batch size, whatever the number of processes and of loader workers.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from distrain.config import BatchSection, Recipe, UserError, is_object_spec, mix, resolve_object
from distrain.datasets.base import AnySource, Batch, Data, DataRequest, StreamSource, find_dataset, is_stream
from distrain.datasets.batches import Batches, Place, StreamBatches
from distrain.datasets.labels import Labels
from distrain.datasets.loading import load
from distrain.datasets.randomness import stream_of
from distrain.datasets.transforms import Transform
from distrain.datasets.user import own_data
from distrain.system.output import error_line

# --------------------------------------------------------------------------------------------------------------------
# The order of samples


@dataclass(frozen=True)
class SampleOrder:
    """The endless order of samples: position p is place p % length of epoch p // length.

    Each epoch is a permutation of its own, computed for any place without the places before it: a Feistel network
    keyed by (seed, epoch) over h * 2**k numbers, the least of that form that are enough, walked again for the few that
    fall outside (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). Nothing is stored, so a position at
    10**15 costs as much as the first.
    """

    length: int
    """Samples in an epoch, up to 2**62."""
    seed: int
    """The recipe's seed."""
    shuffle: bool = True
    """False keeps the samples in their own order."""

    def __post_init__(self) -> None:
        if self.length < 1:
            raise UserError("the training split has no samples")

    def at(self, start: int, stop: int) -> Place:
        """Return (epochs, ids), int64, of the positions [start, stop), up to 2**62."""
        return self.at_positions(np.arange(start, stop, dtype=np.int64))

    def at_positions(self, positions: np.ndarray) -> Place:
        """Return (epochs, ids), int64, of `positions`, which are int64 of any shape and ascending."""
        if positions.size == 0:
            return positions.copy(), positions.copy()
        flat = positions.reshape(-1)
        epoch = int(flat[0]) // self.length
        row: np.ndarray | None = None
        if epoch == int(flat[-1]) // self.length:
            epochs, places, runs = np.full_like(flat, epoch), flat - epoch * self.length, np.array([epoch])
        else:
            epochs, places = np.divmod(flat, self.length)
            begins = np.concatenate([[True], epochs[1:] != epochs[:-1]])
            runs, row = epochs[begins], np.cumsum(begins) - 1
        if self.shuffle and self.length > 1:
            places = self._permuted(places.astype(np.uint64), runs, row).astype(np.int64)
        return epochs.reshape(positions.shape), places.reshape(positions.shape)

    def _permuted(self, values: np.ndarray, runs: np.ndarray, row: np.ndarray | None) -> np.ndarray:
        """Permute `values` (n,) uint64, each under the key of epoch runs[row[i]] (runs[0] where row is None)."""
        # Small halves mix little in a round, and rounds cost little there: an epoch is then short.
        bits = (self.length - 1).bit_length()
        rounds = max(6, 24 - bits)
        keys = stream_of(mix(self.seed, "order"), runs[:, None], np.arange(rounds))
        shift = bits // 2
        height = -(-self.length >> shift)
        values = _feistel(values, keys, row, shift, height)
        outside = np.flatnonzero(values >= self.length)
        while outside.size:
            values[outside] = _feistel(values[outside], keys, None if row is None else row[outside], shift, height)
            outside = outside[values[outside] >= self.length]
        return values


def _feistel(values: np.ndarray, keys: np.ndarray, row: np.ndarray | None, shift: int, height: int) -> np.ndarray:
    """Permute uint64 `values` in [0, height * 2**shift): a low part of `shift` bits, a high one below `height`."""
    multiplier, half = np.uint64(0xD6E8FEB86659FD93), np.uint64(32)
    high, low = values >> np.uint64(shift), values & np.uint64((1 << shift) - 1)
    size = np.uint64(height)
    for number in range(keys.shape[1]):
        key = keys[0, number] if row is None else keys[row, number]
        mixed = (high if number % 2 else low) ^ key
        mixed *= multiplier
        mixed ^= mixed >> half
        mixed *= multiplier
        if number % 2:
            if shift:
                mixed >>= np.uint64(64 - shift)
                low = low ^ mixed
            continue
        mixed >>= half
        mixed *= size
        mixed >>= half
        mixed += high
        # The sum is below 2 * size; where it is below size, the difference wraps round to something larger.
        high = np.minimum(mixed, mixed - size)
    return (high << np.uint64(shift)) | low


# --------------------------------------------------------------------------------------------------------------------
# Batch sizes


def batch_shape(section: BatchSection, world_size: int) -> tuple[int, int]:
    """Return (micro batch size, accumulation): samples in a forward pass of one process, and passes in a step.

    Raises UserError where micro * processes * accumulation cannot be the global batch size.
    """
    total = section.global_batch_size
    if section.micro_batch_size != "auto":
        return section.micro_batch_size, accumulation_steps(total, section.micro_batch_size, world_size)
    if total % world_size:
        raise UserError(
            f"batch.global {total} is not a multiple of the {world_size} processes; {_nearest(total, world_size)}"
        )
    return total // world_size, 1


def accumulation_steps(global_batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Return how many micro-batches of each process make an optimizer step; UserError where that is not whole."""
    unit = micro_batch_size * world_size
    if global_batch_size % unit:
        raise UserError(
            f"batch.global {global_batch_size} is not a multiple of micro {micro_batch_size} × world {world_size} = "
            f"{unit}; {_nearest(global_batch_size, unit)}"
        )
    return global_batch_size // unit


def micro_batch_sizes(global_batch_size: int, world_size: int) -> list[int]:
    """Return every size of a micro-batch with which whole accumulation steps make the global batch, ascending."""
    share, rest = divmod(global_batch_size, world_size)
    if rest:
        return []
    small = [size for size in range(1, math.isqrt(share) + 1) if share % size == 0]
    return sorted({*small, *(share // size for size in small)})


def _nearest(total: int, unit: int) -> str:
    lower, upper = total // unit * unit, (total // unit + 1) * unit
    return f"try {lower} or {upper}" if lower else f"try {upper}"


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
) -> Iterator[list[Batch]]:
    """Yield for each optimizer step in [start_step, stop_step) the micro-batches of this rank, in order.

    A step's micro-batches come together because the loss is divided by what all of them count. Micro-batch `a` of rank
    r of W in step s holds the positions [s*G + (a*W + r)*m, ... + m), with G the recipe's global batch size and m
    `micro_batch_size`; so over all ranks a step consumes [s*G, (s+1)*G), and starting at any step costs the same.

    A stream has no order: its positions are the places in its endless repetition. Every rank walks all of it and keeps
    what is its own, and starting at a later step walks to there. It is read by at most one loader process.

    `close()` ends the loader processes. Raises UserError for sizes that do not fit, and with the path and the number of
    a sample that cannot be read.
    """
    accumulation = accumulation_steps(recipe.batch.global_batch_size, micro_batch_size, world_size)
    first = start_step * accumulation
    # Without an end, as far as positions can be numbered.
    last = 2**62 // (world_size * micro_batch_size) if stop_step is None else stop_step * accumulation
    workers = recipe.data.workers
    batches: Batches | StreamBatches
    places: Iterable[Place] | None = None
    if is_stream(source):
        _check_stream_workers(workers)

        def plan() -> Iterator[tuple[Place, list[Any]]]:
            return _train_stream(source, first, last, rank, world_size, micro_batch_size)

        batches = StreamBatches(plan, source, transform)
    else:
        assert order is not None, "a source that is not a stream needs an order"
        assert order.length == len(source), "the order is for as many samples as there are"
        batches = Batches(source, transform, recipe.data.skip_undecodable)
        places = _train_places(order, first, last, rank, world_size, micro_batch_size)
    return _steps(load(batches, places, workers, pin_memory), accumulation)


def _steps(batches: Iterator[Batch], accumulation: int) -> Iterator[list[Batch]]:
    while micro_batches := list(itertools.islice(batches, accumulation)):
        yield micro_batches


def _train_places(
    order: SampleOrder, first: int, last: int, rank: int, world_size: int, micro_batch_size: int
) -> Iterator[Place]:
    """Yield the places of micro-batches first..last-1 of this rank, counted from step 0."""
    block = max(1, _BLOCK // micro_batch_size)
    within = np.arange(micro_batch_size, dtype=np.int64)
    for start in range(first, last, block):
        numbers = np.arange(start, min(start + block, last), dtype=np.int64)[:, None]
        yield from zip(*order.at_positions((numbers * world_size + rank) * micro_batch_size + within), strict=True)


def _walk(source: StreamSource) -> Iterator[tuple[int, int, Any]]:
    """Yield (epoch, place in the epoch, sample) without end."""
    for epoch in itertools.count():
        if hasattr(source, "set_epoch"):
            source.set_epoch(epoch)
        place = -1
        for place, sample in enumerate(source):
            yield epoch, place, sample
        if place < 0:
            raise UserError(
                f"pass {epoch} over the training stream gave no sample; iterating must start anew each time"
            )


def _train_stream(
    source: StreamSource, first: int, last: int, rank: int, world_size: int, micro_batch_size: int
) -> Iterator[tuple[Place, list[Any]]]:
    walk = _walk(source)
    before, after = rank * micro_batch_size, (world_size - 1 - rank) * micro_batch_size
    skip = first * world_size * micro_batch_size
    for _ in range(first, last):
        next(itertools.islice(walk, skip + before, skip + before), None)
        epochs, ids, samples = zip(*itertools.islice(walk, micro_batch_size), strict=True)
        yield (np.array(epochs), np.array(ids)), list(samples)
        skip = after


def _check_stream_workers(workers: int) -> None:
    if workers > 1:
        raise UserError(
            f"data.workers is {workers}, and an iterable data set can only be read by one process; take 1 or 0, or "
            "write it as a Dataset with __len__ and __getitem__"
        )


class EvalLoader:
    """The batches of one rank of one pass over a split; can be iterated again and again."""

    def __init__(self, make: Callable[[], Iterator[Batch]], length: int | None):
        self._make = make
        self._length = length

    def __len__(self) -> int:
        """Batches of this rank, the same on every rank. TypeError for a stream."""
        if self._length is None:
            raise TypeError("the length of a stream is not known")
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        return self._make()


def build_eval_loader(
    source: AnySource,
    *,
    rank: int,
    world_size: int,
    batch_size: int,
    transform: Transform | None = None,
    workers: int = 0,
    pin_memory: bool = False,
    split: str = "test",
    skip_undecodable: int = 0,
) -> EvalLoader:
    """Return a loader of this rank's share of one pass, in the split's own order.

    Every rank gets the same number of batches, and of rows in each. Over all ranks each sample id occurs exactly once;
    rows that only fill up repeat a sample under the id -1. A sample that does not decode is missing, with its id in the
    batch's `undecodable`; more of them than `skip_undecodable` are an error. Raises UserError for a split without
    samples.
    """
    batches: Batches | StreamBatches
    if is_stream(source):
        _check_stream_workers(workers)

        def plan() -> Iterator[tuple[Place, list[Any]]]:
            return _eval_stream(source, rank, world_size, batch_size, split)

        batches = StreamBatches(plan, source, transform)
        return EvalLoader(lambda: load(batches, None, workers, pin_memory), None)
    if len(source) == 0:
        raise UserError(f"the split {split!r} has no samples to evaluate")
    mapped = Batches(source, transform, skip_undecodable, once=True)
    places = [
        (np.zeros(len(ids), np.int64), ids)
        for start in range(0, len(source), batch_size * world_size)
        for ids in [_eval_ids(start, len(source), rank, world_size, batch_size)]
    ]
    return EvalLoader(lambda: load(mapped, places, workers, pin_memory), len(places))


def _eval_ids(start: int, stop: int, rank: int, world_size: int, batch_size: int) -> np.ndarray:
    """Return the ids of this rank's batch of the samples from `start`: what is left is dealt out evenly at the end."""
    rows = min(batch_size, -(-(stop - start) // world_size))
    ids = start + rank * rows + np.arange(rows, dtype=np.int64)
    return np.where(ids < stop, ids, -stop)  # -1 - (stop - 1): padding that repeats the last sample


def _eval_stream(
    source: StreamSource, rank: int, world_size: int, batch_size: int, split: str
) -> Iterator[tuple[Place, list[Any]]]:
    if hasattr(source, "set_epoch"):
        source.set_epoch(0)
    walk = iter(source)
    start = 0
    while samples := list(itertools.islice(walk, batch_size * world_size)):
        ids = _eval_ids(start, start + len(samples), rank, world_size, batch_size)
        yield (np.zeros(len(ids), np.int64), ids), [samples[i - start if i >= 0 else -1] for i in ids.tolist()]
        start += len(samples)
    if start == 0:
        raise UserError(f"the split {split!r} has no samples to evaluate")


# --------------------------------------------------------------------------------------------------------------------
# A recipe's data


def build_data(recipe: Recipe, state: dict[str, Any] | None = None) -> Data:
    """Return the data set of a recipe. With `state`, of an earlier build, nothing is fitted to the data again.

    `meta.input_shape` is that after the training transforms. Raises UserError for an unknown name or key, for files
    that are missing or do not fit, and for transforms that do not fit the samples.
    """
    labels = functools.partial(Labels.of, recipe)
    request = DataRequest(recipe.data, recipe.task, recipe.seed, Path(), state, float_dtype(recipe), labels)
    data = own_data(request) if is_object_spec(recipe.data.name) else find_dataset(recipe.data.name)(request)
    if empty := [name for name, source in data.splits.items() if not is_stream(source) and len(source) == 0]:
        raise UserError(f"data set {recipe.data.name!r}: the split {empty[0]!r} has no samples")
    if recipe.data.skip_undecodable and any(map(is_stream, data.splits.values())):
        raise UserError(
            f"data.skip_undecodable is {recipe.data.skip_undecodable}, and samples of an iterable data set have no "
            "numbers; leave out what does not decode where it is iterated, in the same way in every process"
        )
    shapes = {}
    for name, source in data.splits.items():
        transform = build_transform(recipe, "train" if name == "train" else "eval")
        # The first sample shows at once whether the transforms fit, long before the first evaluation.
        inputs = _first(source, transform, recipe.data.skip_undecodable)["inputs"]
        if isinstance(inputs, torch.Tensor) and inputs.is_floating_point():
            shapes[name] = tuple(inputs.shape[1:])
    meta = data.meta if "train" not in shapes else dataclasses.replace(data.meta, input_shape=shapes["train"])
    return dataclasses.replace(data, meta=meta)


def float_dtype(recipe: Recipe) -> torch.dtype:
    """Return what a run computes in: float64 with `train.precision: fp64`, else float32."""
    return torch.float64 if recipe.train.precision == "fp64" else torch.float32


def check_data(recipe: Recipe) -> list[str]:
    """Return what is wrong with the data section's name, arguments and transforms, as far as that needs no data."""
    problems = []
    checks: list[Callable[[], Any]] = [
        lambda: build_transform(recipe, "train"),
        lambda: build_transform(recipe, "eval"),
    ]
    if not is_object_spec(recipe.data.name):
        checks.insert(0, lambda: find_dataset(recipe.data.name).check(recipe.data, recipe.task))
    for check in checks:
        try:
            check()
        except UserError as error:
            problems.append(str(error))
    return problems


def build_transform(recipe: Recipe, kind: Literal["train", "eval"]) -> Transform:
    """Return what is done to the inputs of the training split, or of all others."""
    items = getattr(recipe.data.transforms, kind)
    return Transform(items, recipe.seed, f"data.transforms.{kind}", float_dtype(recipe))


def _first(source: AnySource, transform: Transform, tolerated: int) -> Batch:
    if is_stream(source):
        return next(iter(build_eval_loader(source, rank=0, world_size=1, batch_size=1, transform=transform)))
    return Batches(source, transform, tolerated).batch((np.zeros(1, np.int64), np.zeros(1, np.int64)))


def prepare_data(recipe: Recipe) -> bool:
    """Call the recipe's `data.prepare` with data.path if nothing is there; return whether it was called.

    One process calls, before any other looks. The function gets a path of the same name in a folder beside, which is
    renamed when it returns: what an interrupted one leaves is never taken for the data. Of two runs that prepare the
    same data at once, each in a folder of its own, one is taken.
    """
    spec, path = recipe.data.prepare, recipe.data.path
    if spec is None:
        return False
    if path is None:
        raise UserError("data.prepare needs data.path: it is called with it when nothing is there")
    target = Path(path)
    if target.exists():
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".preparing-{target.name}-", dir=target.parent) as folder:
        made = Path(folder, target.name)
        try:
            resolve_object(spec)(made)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"data.prepare: {spec} failed: {error_line(error)}") from error
        if not made.exists():
            raise UserError(f"data.prepare: {spec} returned, and there is nothing at the path that it was called with")
        try:
            os.replace(made, target)
        except OSError:
            if not target.is_dir():  # another one's, with something in it
                raise
    return True
