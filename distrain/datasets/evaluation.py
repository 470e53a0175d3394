"""The batches of one pass over a split; over all ranks each sample occurs once."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from distrain.config import UserError
from distrain.datasets.base import AnySource, Batch, StreamSource, is_stream
from distrain.datasets.batches import Batches, Place, StreamBatches
from distrain.datasets.loading import Passes, load
from distrain.datasets.transforms import Transform


def check_stream_workers(workers: int) -> None:
    if workers > 1:
        raise UserError(
            f"data.workers is {workers}, but only one process can read an iterable data set; set it to 1 or 0, or "
            "write a Dataset with __len__ and __getitem__"
        )


class EvalLoader:
    """The batches of one rank of one pass over a split; can be iterated repeatedly."""

    def __init__(self, make: Callable[[], Iterator[Batch]], length: int | None, passes: Passes | None = None):
        """`passes`: the loader processes that stay for the next pass, if any do."""
        self._make = make
        self._length = length
        self._passes = passes

    def __len__(self) -> int:
        """Batches of this rank, the same on every rank. TypeError for a stream."""
        if self._length is None:
            raise TypeError("a stream has no known length")
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        return self._make()

    def start(self) -> None:
        """Start the loader processes that stay, if any do, ahead of the first pass."""
        if self._passes is not None:
            self._passes.start()

    def close(self) -> None:
        """End the loader processes that stay."""
        if self._passes is not None:
            self._passes.close()


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
    skip_corrupt: int = 0,
    keep: bool = False,
    even: bool = True,
) -> EvalLoader:
    """Return a loader of this rank's share of one pass, in the split's own order.

    Every rank gets the same number of batches, and of rows in each. Over all ranks each sample id occurs exactly once;
    padding rows repeat a sample under the id -1. A corrupt sample is skipped, with its id in the batch's
    `corrupt_samples`. Raises UserError for more of them than `skip_corrupt`, and for a split without samples.

    Without `even` the ranks take batches of `batch_size` in turns, the last of them smaller: the same batches on any
    number of processes, of which one rank may have one more than another, and none is padded.

    With `keep` the loader processes stay for the next pass, until `close`; those of a stream never do.
    """
    batches: Batches | StreamBatches
    if is_stream(source):
        check_stream_workers(workers)

        def plan() -> Iterator[tuple[Place, list[Any]]]:
            return _eval_stream(source, rank, world_size, batch_size, split, even)

        batches = StreamBatches(plan, source, transform)
        return EvalLoader(lambda: load(batches, None, workers, pin_memory), None)
    if len(source) == 0:
        raise UserError(f"the split {split!r} has no samples to evaluate")
    places = [
        (np.zeros(len(ids), np.int64), ids)
        for start in range(0, len(source), batch_size * world_size)
        for ids in [_eval_ids(start, len(source), rank, world_size, batch_size, even)]
        if len(ids)
    ]

    def mapped() -> Batches:
        return Batches(source, transform, skip_corrupt, once=True)

    if keep and workers:
        passes = Passes(mapped(), places, workers, pin_memory)
        return EvalLoader(passes.one, len(places), passes)
    return EvalLoader(lambda: load(mapped(), places, workers, pin_memory), len(places))


def _eval_ids(start: int, stop: int, rank: int, world_size: int, batch_size: int, even: bool) -> np.ndarray:
    """Return the ids of this rank's batch of the samples from `start`; if `even`, the ranks share the last evenly."""
    if not even:
        begin = start + rank * batch_size
        return np.arange(begin, max(begin, min(begin + batch_size, stop)), dtype=np.int64)
    rows = min(batch_size, -(-(stop - start) // world_size))
    ids = start + rank * rows + np.arange(rows, dtype=np.int64)
    return np.where(ids < stop, ids, -stop)  # -1 - (stop - 1): padding that repeats the last sample


def _eval_stream(
    source: StreamSource, rank: int, world_size: int, batch_size: int, split: str, even: bool
) -> Iterator[tuple[Place, list[Any]]]:
    if hasattr(source, "set_epoch"):
        source.set_epoch(0)
    walk = iter(source)
    start = 0
    while samples := list(itertools.islice(walk, batch_size * world_size)):
        ids = _eval_ids(start, start + len(samples), rank, world_size, batch_size, even)
        if not len(ids):
            return
        yield (np.zeros(len(ids), np.int64), ids), [samples[i - start if i >= 0 else -1] for i in ids.tolist()]
        start += len(samples)
    if start == 0:
        raise UserError(f"the split {split!r} has no samples to evaluate")
