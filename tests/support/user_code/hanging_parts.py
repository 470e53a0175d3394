"""A model and a data set that hang, are stopped or are slow in one rank, named in recipes as `hanging_parts:NAME`.

`where` says in what, `at` at which time of doing it, `rank` on which rank (-1: on all). When it comes to it, a file
`hangs` in the folder of DISTRAIN_TEST_FOLDER gets its time; where there is one already, nothing hangs.
"""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

LONG_S = 600.0


def line_of(mark: str) -> int:
    """Return the number of the line of this file that ends with `# mark`."""
    lines = Path(__file__).read_text().splitlines()
    (found,) = [number for number, line in enumerate(lines, 1) if line.endswith(f"# {mark}")]
    return found


class Trouble:
    """Does something `how` the `at`-th time that it is asked, in one rank."""

    def __init__(self, rank: int, at: int, how: str = "sleep", seconds: float = LONG_S):
        hung_before = Path(os.environ["DISTRAIN_TEST_FOLDER"], "hangs").exists()
        self.here = rank in (-1, int(os.environ.get("RANK", "0"))) and not hung_before
        self.at, self.how, self.seconds, self.count = at, how, seconds, 0

    def due(self) -> bool:
        """Count; whether it is time."""
        self.count += 1
        due = self.here and (self.count == self.at or (self.how == "slow" and self.count > self.at))
        if due and self.how != "slow":
            folder = Path(os.environ["DISTRAIN_TEST_FOLDER"])
            (folder / f"hangs.part{os.getpid()}").write_text(str(time.monotonic()))
            (folder / f"hangs.part{os.getpid()}").replace(folder / "hangs")
        return due


class Points:
    """`samples` points of 5 numbers in 3 classes; reading one of the training split may hang."""

    classes = ("a", "b", "c")

    def __init__(self, split: str, samples: int = 400, rank: int = -2, at: int = 0) -> None:
        random = np.random.default_rng(7 if split == "train" else 8)
        count = samples if split == "train" else 48
        self.inputs = torch.from_numpy(random.normal(size=(count, 5)).astype(np.float32))
        self.targets = self.inputs[:, :3].argmax(1)
        self.trouble = Trouble(rank if split == "train" else -2, at)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if self.trouble.due():
            time.sleep(LONG_S)  # in data
        return self.inputs[index], int(self.targets[index])


class Late(torch.autograd.Function):
    """The identity, whose backward pass may hang."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, trouble: Trouble) -> Tensor:
        ctx.trouble = trouble
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        if ctx.trouble.due():
            time.sleep(LONG_S)  # in backward
        return gradients[0], None


class Model(nn.Module):
    """A linear model that hangs in one rank."""

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        where: str = "",
        rank: int = 0,
        at: int = 0,
        how: str = "sleep",
        seconds: float = LONG_S,
    ) -> None:
        super().__init__()
        self.head = nn.Linear(in_features, num_classes)
        self.where, self.trouble = where, Trouble(rank, at, how, seconds)
        if where == "setup" and self.trouble.due():
            time.sleep(LONG_S)  # in setup

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        if self.where == "evaluate" and not self.training and self.trouble.due():
            time.sleep(LONG_S)  # in evaluate
        if self.where == "forward" and self.training and self.trouble.due():
            self.hang()
        if self.where == "backward" and self.training:
            x = Late.apply(x.requires_grad_(), self.trouble)
        return self.head(x)

    def hang(self) -> None:
        """Do what was asked for."""
        if self.trouble.how == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif self.trouble.how == "gil":
            # a pattern of this kind takes for ever, and Python's lock with it
            re.match("(a+)+$", "a" * 60 + "b")  # in gil
        else:
            time.sleep(self.trouble.seconds)  # in forward
