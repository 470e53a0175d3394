"""Data and models whose steps are anomalies, named in the recipes of tests as `anomalous_parts:NAME`."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn


class Spoiled:
    """`samples` points of 5 numbers in 3 classes, of which those with the ids `bad` are multiplied by `factor`."""

    classes = ("a", "b", "c")

    def __init__(self, split: str, samples: int = 96, bad: tuple[int, ...] = (), factor: str = "nan") -> None:
        draw = np.random.default_rng(7 if split == "train" else 8)
        self.inputs = torch.from_numpy(draw.normal(size=(samples, 5)).astype(np.float32))
        self.targets = self.inputs[:, :3].argmax(1)
        if split == "train":
            self.inputs[list(bad)] *= float(factor)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.inputs[index], int(self.targets[index])


class Normed(nn.Module):
    """A small model with batch normalisation and dropout: with buffers that a bad step spoils, and random numbers."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(5, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(width, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.flatten(1))


class Edged(nn.Module):
    """A linear model whose loss is a number, and its gradient is none, where an input is far from the others."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(x.clamp(-3, 3))
        # the root of nothing has an infinite slope
        return out + (out * 0).sqrt() if x.abs().max() > 100 else out


class Once(nn.Module):
    """A linear model whose outputs on rank 1 are no numbers in pass `at` of training, if there is no file `marker`.

    It makes that file, so whatever it was, it does not come again: as an error of the memory does not.
    """

    def __init__(self, marker: str, at: int = 6) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)
        self.marker, self.at, self.passes = Path(marker), at, 0

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(x.flatten(1))
        if self.training and os.environ.get("RANK") == "1":
            self.passes += 1
            if self.passes == self.at and not self.marker.exists():
                self.marker.touch()
                return out * float("nan")
        return out
