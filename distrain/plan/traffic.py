"""What the ranks send each other in a step of each strategy, in theory: bytes and collectives. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Collective:
    """One call of torch.distributed on this rank."""

    kind: str
    nbytes: int
    """Of the whole tensor: the output of an all_gather, the input of a reduce_scatter."""
    ranks: int
    """In the group."""
    dtype: str

    @property
    def sent(self) -> float:
        """Bytes that a rank sends where the group is a ring."""
        return self.nbytes * (self.ranks - 1) / self.ranks * (2 if self.kind == "all_reduce" else 1)


AGREED = 6
"""Numbers of a step on which the ranks agree: the loss and five flags."""
BUCKET = 2**20, 25 * 2**20
"""Bytes of DDP's first bucket and of the others, at which it sends them."""
PERSISTENT = 100_000
"""Numbers of the largest parameter that ZeRO-3 keeps on every rank."""


@dataclass(frozen=True)
class Parameter:
    """A trained parameter, in fp32."""

    shape: tuple[int, ...]
    cast: bool = False
    """Whether the forward pass uses nothing but a cast of it to 16 bits."""

    @property
    def numel(self) -> int:
        """Numbers of it."""
        return math.prod(self.shape)

    def padded(self, shards: int) -> int:
        """Numbers of it with as many rows on every rank."""
        return -(-self.shape[0] // shards) * shards * math.prod(self.shape[1:])


@dataclass(frozen=True)
class Case:
    """A step of a strategy."""

    strategy: str
    """hsdp: fsdp2 in two replicas."""
    ranks: int
    units: Sequence[Sequence[Parameter]]
    """What is gathered together: first what is in no block, then each block."""
    micro_batches: int = 1
    autocast: bool = False
    casts: bool = True
    """Whether weights are cast before they are gathered."""
    every_micro: bool = False
    """Whether fsdp2 reduces gradients with each micro-batch."""

    @property
    def shards(self) -> int:
        """Ranks that share out a replica."""
        return self.ranks // 2 if self.strategy == "hsdp" else self.ranks

    @property
    def parameters(self) -> list[Parameter]:
        """Of all units."""
        return [parameter for unit in self.units for parameter in unit]

    def theory(self) -> dict[str, tuple[int, int]]:
        """Return the least and the most bytes of each kind of collective in a step."""
        times, every = self.micro_batches, self.parameters
        gradients = 4 * sum(each.numel for each in every)
        numbers = 8 * (1 + AGREED + len(every))  # the norm, the record of the step, and which parameters were used
        if self.strategy == "ddp":
            return {"all_reduce": _exactly(gradients + 4 * AGREED)}
        if self.strategy in ("zero1", "zero2"):
            reduced = gradients * (times if self.strategy == "zero2" else 1)
            # each of two groups of parameters is padded, with and without weight decay
            most = gradients + 2 * 4 * 2 * self.ranks
            return {"all_reduce": _exactly(reduced + numbers), "all_gather": (gradients, most)}
        if self.strategy == "zero3":
            parts = [(each, 4 * -(-each.numel // self.ranks) * self.ranks) for each in every]
            kept = sum(part for each, part in parts if each.numel <= PERSISTENT)
            rest = sum(part for each, part in parts if each.numel > PERSISTENT)
            return {
                "all_gather": (kept + rest * times, kept + 2 * rest * times),
                "reduce_scatter": _exactly((kept + rest) * times),
                "all_reduce": _exactly(numbers),
            }
        narrow = self.autocast and self.casts
        root, *blocks = [
            sum(each.padded(self.shards) * (2 if each.cast and narrow else 4) for each in unit) for unit in self.units
        ]
        padded = 4 * sum(each.padded(self.shards) for each in every)
        averaged = padded // self.shards if self.strategy == "hsdp" else 0
        return {
            "all_gather": _exactly(times * (root + 2 * sum(blocks))),
            "reduce_scatter": _exactly(padded * (times if self.every_micro else 1)),
            "all_reduce": _exactly(averaged + numbers),
        }

    def sent(self) -> str:
        """Return the MB that a rank sends in a step, by `theory` and in rings."""
        found = [0.0, 0.0]
        for kind, bounds in self.theory().items():
            for place, nbytes in enumerate(bounds):
                # in two replicas of two all groups are of two, but for a few numbers
                found[place] += Collective(kind, nbytes, self.shards, "").sent / 1e6
        return f"{found[0]:.2f}" if round(found[0], 2) == round(found[1], 2) else f"{found[0]:.2f} to {found[1]:.2f}"

    def counts(self) -> dict[str, int]:
        """Return how many collectives of each kind there are at most in a step."""
        times, units, parameters = self.micro_batches, len(self.units), len(self.parameters)
        if self.strategy == "ddp":
            size = 4 * sum(each.numel for each in self.parameters)
            return {"all_reduce": 1 + -(-max(size - BUCKET[0], 0) // BUCKET[1])}
        if self.strategy in ("zero1", "zero2"):
            # a bucket for each large parameter, and a piece of it for each rank that it is on
            return {"all_reduce": 1 + (parameters if self.strategy == "zero1" else times * parameters), "all_gather": 2}
        if self.strategy == "zero3":
            return {"all_gather": (1 + 2 * times) * parameters, "reduce_scatter": times * parameters, "all_reduce": 1}
        return {
            "all_gather": times * (2 * units - 1),
            "reduce_scatter": units * (times if self.every_micro else 1),
            "all_reduce": 1 + (units if self.strategy == "hsdp" else 0),
        }


def _exactly(nbytes: int) -> tuple[int, int]:
    return nbytes, nbytes
