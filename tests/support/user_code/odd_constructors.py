"""Models whose constructors do more than add layers, named in the recipes of tests as `odd_constructors:NAME`.

As those of odd_models, all take points of 5 numbers, (batch, 5), and return logits of 3 classes, (batch, 3).
"""

from __future__ import annotations

import copy
import functools
import math
import random
import threading

import numpy as np
import torch
from odd_models import WIDTH, Blocks
from torch import Tensor, nn

from distrain.networks.sequential import sequential


class Initialized(Blocks):
    """Its own initialisation, over all layers once they are there, scaled by the depth."""

    def __init__(self) -> None:
        super().__init__()
        self.apply(self._initialize)
        for name, parameter in self.named_parameters():
            if name.endswith("down.weight"):
                nn.init.trunc_normal_(parameter, std=0.1 / math.sqrt(len(self.blocks)))

    @staticmethod
    def _initialize(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.orthogonal_(module.weight)
            nn.init.constant_(module.bias, 0.1)


@functools.cache
def table(length: int) -> Tensor:
    """Return what constructors compute once in a process."""
    return torch.linspace(0, 1, length).sin()


class Computed(Blocks):
    """Constants and random weights by PyTorch, NumPy and Python, in buffers, attributes, lists and dicts."""

    def __init__(self) -> None:
        super().__init__()
        self.rates = [rate.item() for rate in torch.linspace(0.5, 1, 2)]
        self.register_buffer("table", table(WIDTH), persistent=False)
        self.register_buffer("mask", torch.ones(3, 3).tril())
        self.offsets = {"head": [torch.from_numpy(np.arange(3, dtype=np.float32))]}
        self.order = np.random.permutation(WIDTH)
        self.noise = random.random()
        self.weight = nn.Parameter(torch.from_numpy(np.random.rand(WIDTH)).float() + random.random())

    def forward(self, x: Tensor) -> Tensor:
        x = (self.into(x) * self.weight + self.table * self.noise)[:, self.order]
        for block, rate in zip(self.blocks, self.rates, strict=True):
            x = block(x) * rate
        return (self.head(x) + self.offsets["head"][0]) @ self.mask


class Teacher(Blocks):
    """A frozen copy of itself, and a weight in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(self.blocks).requires_grad_(False)
        self.blocks[1].down.weight = self.blocks[0].down.weight

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.head(self.teacher[0](self.into(x)))


class Averaged(Blocks):
    """A buffer that is computed from a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", self.into.weight.detach().mean(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.mean[:3]


class Drawn(Blocks):
    """A buffer of random numbers, drawn after those of the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("features", torch.randn(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.features


class Chance(Blocks):
    """An attribute that is drawn, in plain Python by then."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = {"head": torch.rand(()).item()}

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scales["head"]


class Hidden(Blocks):
    """A tensor that is drawn and that only a function knows."""

    def __init__(self) -> None:
        super().__init__()
        drawn = torch.randn(3)
        self.shift = lambda x: x + drawn

    def forward(self, x: Tensor) -> Tensor:
        return self.shift(super().forward(x))


class Written(Blocks):
    """Weights that are written through NumPy, and one that another is scaled by."""

    def __init__(self) -> None:
        super().__init__()
        self.into.weight.data.numpy()[:] = np.random.rand(WIDTH, 5)
        self.head.weight.data.div_(self.head.weight.data.norm().item())


class Threaded(Blocks):
    """Layers that another thread makes."""

    def __init__(self) -> None:
        super().__init__()
        thread = threading.Thread(target=self._add)
        thread.start()
        thread.join()

    def _add(self) -> None:
        self.head = nn.Linear(WIDTH, 3)


def lazy() -> nn.Module:
    """Layers of a recipe, one of which is sized by a sample."""
    return sequential([{"Linear": [5, 6]}, "ReLU", {"LazyLinear": 3}], input_shape=(5,))
