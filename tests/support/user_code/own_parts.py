"""Models and data sets of a user's own, named in the recipes of tests as `own_parts:NAME`."""

from __future__ import annotations

import os
import random
import signal
import time

import numpy as np
import torch
from torch import Tensor, nn


class Tagged:
    """Sequences of 1 to 9 tokens, each token with a tag that follows from it; two in seven tags are ignored."""

    meta = {"pad_id": 0, "vocab_size": 11}

    def __init__(self, samples: int = 60) -> None:
        draw = np.random.default_rng(5)
        self.items = [torch.from_numpy(draw.integers(1, 11, draw.integers(1, 10))) for _ in range(samples)]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        tokens = self.items[index]
        tags = (tokens * 3 + index) % 11
        return tokens, torch.where((tokens + index) % 7 < 2, -100, tags)


class Tagger(nn.Module):
    """Logits (batch, seq, 11) for tokens (batch, seq)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.head = nn.Linear(8, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(tokens)))


class Skipper(nn.Module):
    """Leaves a layer out at random, by the generators of Python and of NumPy."""

    def __init__(self, in_features: int, num_classes: int) -> None:
        super().__init__()
        self.middle = nn.Linear(in_features, in_features)
        self.head = nn.Linear(in_features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        if self.training:
            x = x + random.random() * np.random.rand() * self.middle(x)
        return self.head(x)


class Points:
    """`samples` points of 5 numbers in 3 classes; the class cannot be told for certain."""

    classes = ("a", "b", "c")

    def __init__(self, split: str, samples: int = 30, tests: int = 97) -> None:
        random = np.random.default_rng(7 if split == "train" else 8)
        count = samples if split == "train" else tests
        self.inputs = torch.from_numpy(random.normal(size=(count, 5)).astype(np.float32))
        noise = torch.from_numpy(random.normal(size=(count, 3)).astype(np.float32))
        self.targets = (self.inputs[:, :3] + noise).argmax(1)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.inputs[index], int(self.targets[index])


class SlowToScore(nn.Module):
    """A linear model that takes `seconds` for each batch that it scores; then rank 1 asks itself to stop, once."""

    def __init__(self, in_features: int, num_classes: int, seconds: float) -> None:
        super().__init__()
        self.head = nn.Linear(in_features, num_classes)
        self.seconds = seconds
        self.scored = 0

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and self.seconds:
            time.sleep(self.seconds)
            self.scored += 1
            if self.scored == 3 and os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGUSR1)
        return self.head(x.flatten(1))


class Faulty(nn.Module):
    """A linear model which, in forward pass `at` of training on rank `rank`, does what `how` says."""

    def __init__(self, how: str = "raise", at: int = 6, rank: int = 1, width: int = 5, classes: int = 3) -> None:
        super().__init__()
        self.linear = nn.Linear(width, classes)
        self.how, self.at, self.rank, self.passes = how, at, rank, 0

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(x.flatten(1))
        if not self.training or int(os.environ.get("RANK", "0")) != self.rank:
            return out
        self.passes += 1
        if self.passes == self.at:
            if self.how == "raise":
                raise ArithmeticError("the model broke")
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            return out * float(self.how)
        return out


class Partly(nn.Module):
    """One of its layers is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(64, 10)
        self.idle = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x.flatten(1))


class Rooted(nn.Module):
    """A linear model whose loss in forward pass `at` of training is a number while its gradient is not."""

    def __init__(self, at: int = 6) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)
        self.at, self.passes = at, 0

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(x)
        self.passes += self.training
        return out + (out * 0).sqrt() if self.training and self.passes == self.at else out


def pairs(outputs: Tensor, targets: Tensor) -> Tensor:
    """A contrastive loss: each sample's output against the others'."""
    scores = outputs @ outputs.T
    return nn.functional.cross_entropy(scores, torch.arange(len(scores)))


def scaled_by_batch(outputs: Tensor, targets: Tensor) -> Tensor:
    """Normalised by a statistic of the batch."""
    return nn.functional.cross_entropy(outputs / outputs.detach().std(), targets, reduction="none")


class Running:
    """Divides by a running mean of itself, which it keeps."""

    def __init__(self) -> None:
        self.mean = torch.ones(())

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(outputs, targets, reduction="none")
        self.mean = 0.9 * self.mean + 0.1 * loss.detach().mean()
        return loss / self.mean


def apart(outputs: Tensor, targets: Tensor) -> Tensor:
    """A mean over samples."""
    return nn.functional.cross_entropy(outputs, targets, label_smoothing=0.1)
