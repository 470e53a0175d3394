"""From sample numbers to batches, in the process that trains or in one that loads for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset

from distrain.config import UserError
from distrain.datasets.base import Batch, CorruptSample, Source, StreamSource
from distrain.datasets.transforms import Transform

Place = tuple[np.ndarray, np.ndarray]
"""(epochs, ids) of the samples of one batch, each (batch,) int64. An id of -1 - i is padding that repeats sample i."""


@dataclass(frozen=True)
class Failure:
    """What a loader process sends instead of a batch: an exception would arrive wrapped in that process's traceback."""

    message: str


class Batches(Dataset[Any]):
    """The batches of a source by place.

    Up to `tolerated` samples of it may not decode. In the place of one stands the next that does, so a batch is as
    large as ever, whatever the number of processes; and `undecodable` of the batch is {id: why} of those it replaces.
    Where `once` is true every sample is to be seen once, and what stands there has the id -1, as padding has.
    """

    def __init__(self, source: Source, transform: Transform | None, tolerated: int = 0, *, once: bool = False):
        self.source = source
        self.transform = transform
        self.tolerated = tolerated
        self.once = once
        self._fetch_at = getattr(source, "fetch_at", None)
        self._undecodable: dict[int, str] = {}
        """Those that this process has come upon."""

    def batch(self, place: Place) -> Batch:
        epochs, ids = place
        padding = ids < 0
        padded = bool(padding.any())
        wanted = np.where(padding, -1 - ids, ids) if padded else ids
        batch = self._fetched(wanted, epochs)
        if self.transform is not None:
            batch = self.transform(batch, epochs)
        if padded:
            batch["ids"] = torch.from_numpy(np.where(padding, -1, ids))
        if self._undecodable and (lost := {each: why for each, why in self._undecodable.items() if each in ids}):
            batch["undecodable"] = lost
            if self.once:
                batch["ids"] = torch.from_numpy(np.where(padding | np.isin(wanted, list(lost)), -1, ids))
        return batch

    def _fetched(self, wanted: np.ndarray, epochs: np.ndarray) -> Batch:
        while True:
            ids = np.array([self._substitute(each) for each in wanted.tolist()]) if self._undecodable else wanted
            try:
                return self.source.fetch(ids) if self._fetch_at is None else self._fetch_at(ids, epochs)
            except CorruptSample as error:
                if self.tolerated == 0:
                    raise
                self._undecodable[error.sample] = str(error)
                if len(self._undecodable) > min(self.tolerated, len(self.source) - 1):
                    raise UserError(too_many(self._undecodable, self.tolerated)) from error

    def _substitute(self, sample: int) -> int:
        while sample in self._undecodable:
            sample = (sample + 1) % len(self.source)
        return sample

    def __getitem__(self, place: Place) -> Batch | Failure:
        try:
            return self.batch(place)
        except UserError as error:
            return Failure(str(error))


def too_many(undecodable: dict[int, str], tolerated: int) -> str:
    """Return what is said where more samples than the recipe tolerates do not decode: {id: why}."""
    why = f"{len(undecodable)} samples of a split do not decode, and data.skip_undecodable is {tolerated}"
    return f"{why}; the last: {list(undecodable.values())[-1]}"


class StreamBatches(IterableDataset[Any]):
    """The batches of one rank from a stream that is walked in whole; `plan` turns its samples into them."""

    def __init__(self, plan: Callable[[], Iterator[tuple[Place, list[Any]]]], source: StreamSource, transform: Any):
        self.plan = plan
        self.source = source
        self.transform = transform

    def batches(self) -> Iterator[Batch]:
        for (epochs, ids), samples in self.plan():
            batch = self.source.collate(samples)
            batch["ids"] = torch.from_numpy(np.maximum(ids, -1))
            yield batch if self.transform is None else self.transform(batch, epochs)

    def __iter__(self) -> Iterator[Batch | Failure]:
        try:
            yield from self.batches()
        except UserError as error:
            yield Failure(str(error))
