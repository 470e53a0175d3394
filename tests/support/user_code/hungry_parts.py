"""Models and data of a user's own that take much memory, named in the recipes of tests as `hungry_parts:NAME`."""

from __future__ import annotations

import os

import numpy as np
import torch
from torch import Tensor, nn

MIB = 2**20


class Heavy:
    """`samples` points of 64 numbers in 10 classes; reading sample `bad` of the training split takes `mib` MiB."""

    classes = tuple("0123456789")

    def __init__(self, split: str, samples: int = 48, bad: int = 17, mib: int = 0) -> None:
        draw = np.random.default_rng(7 if split == "train" else 8)
        self.inputs = draw.normal(size=(samples, 64)).astype(np.float32)
        self.bad, self.mib = bad if split == "train" else -1, mib

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index == self.bad:
            np.ones(self.mib * MIB, np.uint8)
        return torch.from_numpy(self.inputs[index]), index % 10


class Hungry(nn.Module):
    """A linear model that takes `mib` MiB of addresses for each sample of a batch, which it never touches.

    `rank`: only there; None on all. `when`: in training, in evaluation, or when it is built.
    """

    def __init__(self, mib: int, rank: int | None = None, when: str = "training", features: int = 64) -> None:
        super().__init__()
        self.linear = nn.Linear(features, 10)
        here = rank is None or int(os.environ.get("RANK", "0")) == rank
        self.mib, self.when = mib if here else 0, when
        self.taken = torch.empty(mib * MIB if when == "building" and here else 0, dtype=torch.uint8)

    def forward(self, x: Tensor) -> Tensor:
        if self.mib and {"training": True, "evaluation": False}.get(self.when) is self.training:
            self.taken = torch.empty(0)
            self.taken = torch.empty(len(x) * self.mib * MIB, dtype=torch.uint8)
        return self.linear(x.flatten(1))
