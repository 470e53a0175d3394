"""The last transforms of images, which make floats of bytes: on the host, or on the device, for a quarter of the copy.

An element goes through the same roundings on both: it becomes a float, is multiplied by 1/255, has the mean subtracted,
and is divided by the deviation, each by an operation of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from distrain.datasets.base import Batch

FINISH = "finish"
"""The key of a batch whose inputs are bytes: the `Finish` that makes floats of them."""

_IN_CACHE = 1 << 20
"""Bytes of floats that a CPU finishes at a time: every operation then finds them in its cache, and few are begun."""


def finished(batch: Batch) -> Batch:
    """Return a batch whose inputs are floats, where they are bytes with a `Finish` beside them."""
    return {**batch, "inputs": batch[FINISH](batch["inputs"])} if FINISH in batch else batch


@dataclass(frozen=True)
class Finish:
    """Makes floats of images of bytes, and normalises them."""

    dtype: torch.dtype
    scaled: bool = True
    """Whether bytes become numbers in [0, 1]; otherwise they stay 0 to 255."""
    normalised: tuple[tuple[tuple[float, ...], tuple[float, ...]], ...] = ()
    """(mean, deviation) of each normalisation, by channel."""

    def __call__(self, images: Tensor) -> Tensor:
        """Return the floats of `images` (batch, channels, height, width) uint8, in the same layout of memory."""
        if images.device.type != "cpu":
            return self._finish(images.to(self.dtype))
        floats = torch.empty_like(images, dtype=self.dtype)
        rows = max(1, _IN_CACHE // max(1, floats[:1].nbytes))
        for part, source in zip(floats.split(rows), images.split(rows), strict=True):
            self._finish(part.copy_(source))
        return floats

    def _finish(self, floats: Tensor) -> Tensor:
        if self.scaled:
            floats.mul_(1 / 255)
        for mean, deviation in self.normalised:
            floats.sub_(_by_channel(mean, floats.dtype, floats.device))
            floats.div_(_by_channel(deviation, floats.dtype, floats.device))
        return floats


@lru_cache(maxsize=32)
def _by_channel(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    # kept, because a copy from the host at every batch would make it wait for the device
    return torch.tensor(values, dtype=dtype, device=device).view(-1, 1, 1)
