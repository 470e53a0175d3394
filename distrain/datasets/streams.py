"""The samples of a training stream: of its endless repetition, and of one rank."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from distrain.config import UserError
from distrain.datasets.base import StreamSource
from distrain.datasets.batches import Place


def _repeated(source: StreamSource) -> Iterator[tuple[int, int, Any]]:
    """Yield (epoch, place in the epoch, sample) without end."""
    for epoch in itertools.count():
        if hasattr(source, "set_epoch"):
            source.set_epoch(epoch)
        place = -1
        for place, sample in enumerate(source):
            yield epoch, place, sample
        if place < 0:
            raise UserError(
                f"pass {epoch} over the training stream gave no sample; each iteration must start at the beginning"
            )


def training_stream(
    source: StreamSource, first: int, last: int, rank: int, world_size: int, micro_batch_size: int
) -> Iterator[tuple[Place, list[Any]]]:
    """Yield the places and samples of micro-batches first..last-1 of this rank, counted from step 0."""
    walk = _repeated(source)
    before, after = rank * micro_batch_size, (world_size - 1 - rank) * micro_batch_size
    skip = first * world_size * micro_batch_size
    for _ in range(first, last):
        next(itertools.islice(walk, skip + before, skip + before), None)
        epochs, ids, samples = zip(*itertools.islice(walk, micro_batch_size), strict=True)
        yield (np.array(epochs), np.array(ids)), list(samples)
        skip = after
