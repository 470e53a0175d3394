"""What the ranks agree on in each step: one record with named fields, from one reduction."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from distrain.parallel.comm import World


class StepFlags(NamedTuple):
    """What a rank sends to the others with every step. All get the means over the ranks."""

    stop: float = 0.0
    """1: it was asked to stop."""
    save: float = 0.0
    """1: a checkpoint is due by the time."""
    written: float = 0.0
    """1: its part of the checkpoint under way is written."""
    published: float = 0.0
    """1: all parts of the checkpoint under way are written, and if this is rank 0, it is published."""
    callbacks: float = 0.0
    """1: a callback failed or asks for something."""


FIELDS = 1 + len(StepFlags._fields)
"""Numbers in `StepRecord.means` of several processes."""


class StepRecord(NamedTuple):
    """The same bits on every rank, on the device."""

    means: Tensor
    """Over the ranks (1 + flags,): of the loss, then of each flag. Of a single process (1,): the loss alone."""
    flags: StepFlags | None = None
    """Of a single process, where they stay on the host; None where they are in `means`."""
    square: Tensor | None = None
    """Squared norm (0-d, float64) of the gradient over all shards; None where each rank holds the whole gradient."""
    used: Tensor | None = None
    """How many ranks have used each trained parameter (parameters,); None where that is not exchanged."""

    @property
    def loss(self) -> Tensor:
        """Mean of the ranks' losses (0-d)."""
        return self.means[0]

    @classmethod
    def reduce(cls, world: World, loss: Tensor, flags: StepFlags, square: Tensor, used: Tensor) -> StepRecord:
        """Reduce all fields at once: `square` (0-d) and `used` (parameters,) float64 are summed over the ranks."""
        square = square.to(world.device).reshape(1)
        numbers = world.sum(torch.cat((square, world.pack_metrics(loss, flags), used)))
        end = 1 + FIELDS
        return cls(numbers[1:end] / world.world_size, square=numbers[0], used=numbers[end:])

    @classmethod
    def reduce_async(cls, world: World, loss: Tensor, flags: StepFlags) -> Callable[[], StepRecord]:
        """Begin to reduce loss (0-d) and flags; returns a function that waits for it."""
        if world.world_size == 1:
            alone = cls(loss.reshape(1), flags)
            return lambda: alone
        wait = world.sum_async(world.pack_metrics(loss, flags))
        return lambda: cls(wait() / world.world_size)

    def to_host_async(self, world: World, norm: Tensor | None) -> Callable[[], tuple[float, float, StepFlags]]:
        """Return a function that reads loss, `norm` (0-d; 0.0 for None) and flags; a step later it does not wait."""
        read = world.to_host_async(self.means) if norm is None else world.to_host_async(self.means, norm.reshape(1))

        def split() -> tuple[float, float, StepFlags]:
            loss, *others = read()
            known = others.pop() if norm is not None else 0.0
            return loss, known, StepFlags(*others) if self.flags is None else self.flags

        return split
