"""Models, data sets, transforms and optimizers that do not resume to the same bits, each in the way its name says."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from own_parts import Points
from torch import Tensor, nn
from torch.utils.data import get_worker_info


class Linear(nn.Module):
    """The correct part of the models below."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


class UnseededModel(Linear):
    """Draws noise from its own unseeded generator."""

    def __init__(self) -> None:
        super().__init__()
        self.noise = np.random.default_rng()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + float(self.noise.normal()))


class EntropyModel(Linear):
    """Draws noise from os.urandom, and keeps no state that could be inspected."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + int.from_bytes(os.urandom(2), "little") / 2**16)


class UnseededStart(Linear):
    """Starts from different weights each time."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.head.weight += int.from_bytes(os.urandom(4), "little") / 2**32


class CountingModel(Linear):
    """Warms up by its own count, which is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        return super().forward(x) * min(1.0, self.calls / 20)


class ForgetfulModel(Linear):
    """Keeps a running mean of its inputs in a buffer that is not persistent."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen = 0.9 * self.seen + 0.1 * x.detach().mean(0)
        return super().forward(x - self.seen)


class SeededModel(Linear):
    """Draws from its own generator, seeded at each start, and so differs after a resume."""

    def __init__(self) -> None:
        super().__init__()
        self.draws = torch.Generator().manual_seed(1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.randn(x.shape, generator=self.draws))


class UnorderedModel(Linear):
    """Sums in a different order each time, as atomic additions on a GPU do."""

    def forward(self, x: Tensor) -> Tensor:
        order = np.random.default_rng().permutation(5)
        total = torch.zeros(len(x), 3)
        for column in order:
            total = total + x[:, column, None] * self.head.weight[:, column]
        return total + self.head.bias


class LuckyModel(Linear):
    """Rounds at random, and alike in the first step of each second run: runs are counted by files of a folder."""

    def __init__(self, runs: str) -> None:
        super().__init__()
        self.runs = Path(runs)
        self.steps = 0

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        own = self.runs / str(os.getpid())
        if not own.exists():
            own.write_text(str(len(list(self.runs.iterdir())) % 2))
        self.steps += 1
        chance = int(own.read_text()) if self.steps == 1 else int.from_bytes(os.urandom(2), "little")
        return super().forward(x) * (1 + chance / 2**22)


class LateModel(Linear):
    """Draws noise from os.urandom from its tenth step on, counted in a buffer."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.count += 1
        return super().forward(x) * (1 + (self.count >= 10) * int.from_bytes(os.urandom(2), "little") / 2**16)


class CountsCalls(Linear):
    """Correct: counts calls in training and evaluation in a persistent buffer, and uses the count."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return super().forward(x) * (1 + self.count / 100)


calls = 0


class GlobalModel(Linear):
    """Counts in a variable of this file."""

    def forward(self, x: Tensor) -> Tensor:
        global calls
        calls += self.training
        return super().forward(x) * (1 + calls / 10)


class CountsEvaluationsInSecret(Linear):
    """Counts evaluations in a buffer that is not persistent, and uses the count."""

    evaluations: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("evaluations", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.evaluations += not self.training
        return super().forward(x) * (1 + self.evaluations / 100)


def ramp(steps: list[int] = [0]) -> float:  # noqa: B006
    steps[0] += 1
    return min(1.0, steps[0] / 50)


class Ramped(Linear):
    """Warms up by a count in a default argument."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (ramp() if self.training else 1.0)


class Noted(Linear):
    """Uses a mean from a file that the previous attempt wrote."""

    def forward(self, x: Tensor) -> Tensor:
        note = Path(__file__).with_name("note.txt")
        before = float(note.read_text()) if note.exists() else 0.0
        if self.training:
            note.with_suffix(".tmp").write_text(str(float(x.mean())))
            note.with_suffix(".tmp").replace(note)
        return super().forward(x) * (1 + before)


class HashedData(Points):
    """Adds a value that depends on the hash seed, as the iteration order of a set of strings does."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        inputs, target = super().__getitem__(index)
        # forked processes hash alike whatever this is
        return inputs + int(os.environ["PYTHONHASHSEED"]) % 1000, target


class UnseededData(Points):
    """Adds unseeded noise."""

    def __init__(self, split: str) -> None:
        super().__init__(split)
        self.noise = np.random.default_rng()

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        inputs, target = super().__getitem__(index)
        return (inputs + float(self.noise.normal()) if len(self) == 30 else inputs), target


class CountingData(Points):
    """Scales samples by the number of samples read so far."""

    def __init__(self, split: str) -> None:
        super().__init__(split)
        self.reads = 0

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        inputs, target = super().__getitem__(index)
        self.reads += 1
        return inputs * (1 + self.reads / 100), target


class WorkerData(Points):
    """Returns different samples in each loader process."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        inputs, target = super().__getitem__(index)
        worker = get_worker_info()
        return inputs + (0 if worker is None else worker.id), target


class RankData(Points):
    """Returns different samples in each training process."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        inputs, target = super().__getitem__(index)
        return inputs + int(os.environ.get("RANK", "0")), target


class GrowingData(Points):
    """Has a different number of samples each time, as a folder that is being written to."""

    def __init__(self, split: str) -> None:
        super().__init__(split, samples=30 + time.monotonic_ns() // 1000 % 5000)  # seldom the same one twice


class Jitter:
    """A transform with its own generator."""

    def __init__(self) -> None:
        self.draws = torch.Generator().manual_seed(0)

    def __call__(self, x: Tensor) -> Tensor:
        return x + torch.randn(x.shape, generator=self.draws)


class Forgetful(torch.optim.Optimizer):
    """SGD with momentum kept outside its state."""

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.velocity: dict[int, Tensor] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        place = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                place += 1
                if parameter.grad is not None:
                    before = self.velocity.get(place, torch.zeros_like(parameter))
                    self.velocity[place] = 0.9 * before + parameter.grad
                    parameter -= group["lr"] * self.velocity[place]


STEPS = [0]


class Slowing(torch.optim.SGD):
    """SGD with a decaying step, by a count in a list of this file."""

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay)

    def step(self, closure: Any = None) -> None:
        STEPS[0] += 1
        rates = [group["lr"] for group in self.param_groups]
        for group in self.param_groups:
            group["lr"] /= 1 + STEPS[0] / 10
        super().step(closure)
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = rate


class Amnesiac(torch.optim.SGD):
    """SGD that forgets its momentum when it is loaded."""

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay, momentum=0.9)

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict | {"state": {}})
