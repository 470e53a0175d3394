"""Models and data of a user's own that take much memory, named in the recipes of tests as `hungry_parts:NAME`."""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn

MIB = 2**20


class Hungry(nn.Module):
    """A linear model that takes at least 3 * `mib` MiB for each sample of a batch, from its forward pass to its end.

    `rank`: only there; None on all. `when`: in training, in evaluation, or when it is built.
    """

    def __init__(self, mib: int, rank: int | None = None, when: str = "training", features: int = 64) -> None:
        super().__init__()
        self.linear = nn.Linear(features, 10)
        here = rank is None or int(os.environ.get("RANK", "0")) == rank
        self.mib, self.when = mib if here else 0, when
        if when == "building" and here:
            torch.ones(mib * MIB)

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(x.flatten(1))
        if not self.mib or (self.when == "training") != self.training or self.when == "building":
            return out
        wide = out.mean(1, keepdim=True).repeat(1, self.mib * MIB // 4)
        return out + torch.tanh(torch.sin(wide)).mean(1, keepdim=True)
