"""From sample numbers to batches, in the training process or in a loader process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset

from distrain.config import UserError
from distrain.datasets.base import Batch, CorruptSample, Source, StreamSource
from distrain.datasets.transforms import Transform, Windows

Place = tuple[np.ndarray, np.ndarray]
"""(epochs, ids) of the samples of a batch, each (batch,) int64. The id -1 - i is padding that repeats sample i."""


END: Place = (np.zeros(0, np.int64), np.zeros(0, np.int64))
"""A place without a batch: the end of a pass, for loader processes that stay for the next one."""


@dataclass(frozen=True)
class Failure:
    """Sent by a loader process instead of a batch: an exception would arrive wrapped in that process's traceback."""

    message: str


class Batches(Dataset[Any]):
    """The batches of a source by place.

    Up to `tolerated` samples may be corrupt. The next sample that is not replaces a corrupt one, so batches keep their
    size on any number of processes; `corrupt_samples` of the batch is {id: reason} of those replaced. With `once` every
    sample is seen once, and a replacement has the id -1, as padding has.
    """

    def __init__(self, source: Source, transform: Transform | None, tolerated: int = 0, *, once: bool = False):
        self.source = source
        self.transform = transform
        self.tolerated = tolerated
        self.once = once
        self._fetch_at = getattr(source, "fetch_at", None)
        self._whole = is_whole(source)
        # of what a callback has put around it, or of its subclass, only the call is known
        windows = transform.windows if type(transform) is Transform and hasattr(source, "fetch_cut") else None
        self._windows: Callable[[np.ndarray, np.ndarray], Windows] | None = windows
        self._corrupt: dict[int, str] = {}
        """{id: reason} of the corrupt samples that this process has met."""

    def batch(self, place: Place) -> Batch:
        epochs, ids = place
        if self.once and self._whole:
            epochs, ids = (each[_unrepeated(ids)] for each in place)
        padded = self.once and bool((padding := ids < 0).any())  # a step's batches are never filled up
        wanted = np.where(padding, -1 - ids, ids) if padded else ids
        batch = self._fetched(wanted, epochs)
        if self._windows is not None:
            assert self.transform is not None
            batch = self.transform.after_windows(batch, epochs)
        elif self.transform is not None:
            batch = self.transform(batch, epochs)
        if padded:
            batch["ids"] = torch.from_numpy(np.where(padding, -1, ids))
        if self._corrupt and (replaced := {each: why for each, why in self._corrupt.items() if each in ids}):
            batch["corrupt_samples"] = replaced
            if self.once:
                kept = ~np.isin(wanted, list(replaced))
                if self._whole and kept.any() and not padded:
                    return {**self.batch((epochs[kept], ids[kept])), "corrupt_samples": replaced}
                batch["ids"] = torch.from_numpy(np.where(padding | ~kept, -1, ids))
        return batch

    def _fetched(self, wanted: np.ndarray, epochs: np.ndarray) -> Batch:
        while True:
            ids = np.array([self._substitute(each) for each in wanted.tolist()]) if self._corrupt else wanted
            try:
                if self._windows is not None:
                    return self.source.fetch_cut(ids, self._windows(epochs, ids))  # type: ignore[attr-defined]
                return self.source.fetch(ids) if self._fetch_at is None else self._fetch_at(ids, epochs)
            except CorruptSample as error:
                if self.tolerated == 0:
                    raise
                self._corrupt[error.sample] = str(error)
                if len(self._corrupt) > min(self.tolerated, len(self.source) - 1):
                    raise UserError(too_many(self._corrupt, self.tolerated)) from error

    def _substitute(self, sample: int) -> int:
        while sample in self._corrupt:
            sample = (sample + 1) % len(self.source)
        return sample

    def __getitem__(self, place: Place) -> Batch | Failure | None:
        if len(place[1]) == 0:
            self._corrupt.clear()  # a file may have been repaired since
            return None
        try:
            return self.batch(place)
        except UserError as error:
            return Failure(str(error))


def is_whole(source: Source | StreamSource) -> bool:
    """Whether a batch of a source is made by code of the user's own: which parts of it are whose is then not known."""
    return getattr(source, "is_whole", False)


def _unrepeated(ids: np.ndarray) -> np.ndarray:
    """Return the rows of ids that do not only repeat a sample; the first one where all do."""
    return np.flatnonzero(ids >= 0) if (ids >= 0).any() else np.zeros(1, np.int64)


def too_many(corrupt: dict[int, str], tolerated: int) -> str:
    """Return the error for more corrupt samples, {id: reason}, than the recipe tolerates."""
    return (
        f"{len(corrupt)} samples of a split are corrupt, and data.skip_corrupt is {tolerated}; the last: "
        f"{list(corrupt.values())[-1]}"
    )


class StreamBatches(IterableDataset[Any]):
    """The batches of one rank of a stream; `plan` groups its samples."""

    def __init__(self, plan: Callable[[], Iterator[tuple[Place, list[Any]]]], source: StreamSource, transform: Any):
        self.plan = plan
        self.source = source
        self.transform = transform

    def batches(self) -> Iterator[Batch]:
        for (epochs, ids), samples in self.plan():
            if is_whole(self.source):
                kept = _unrepeated(ids)
                epochs, ids, samples = epochs[kept], ids[kept], [samples[each] for each in kept.tolist()]
            batch = self.source.collate(samples)
            batch["ids"] = torch.from_numpy(np.maximum(ids, -1))
            yield batch if self.transform is None else self.transform(batch, epochs)

    def __iter__(self) -> Iterator[Batch | Failure]:
        try:
            yield from self.batches()
        except UserError as error:
            yield Failure(str(error))
