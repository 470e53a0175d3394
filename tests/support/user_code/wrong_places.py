"""Tasks, losses, callbacks and data that do not resume to the same bits, or do, though it may look otherwise."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from own_parts import Points
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import IterableDataset

import distrain

BEGAN = time.time()
"""Another instant in each process, which nothing reads."""


class Linear(nn.Module):
    """The correct part of the models below."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


class EntropyModel(Linear):
    """Draws noise from os.urandom, and keeps no state that could be inspected."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + int.from_bytes(os.urandom(2), "little") / 2**16)


class WorldModel(Linear):
    """Begins with larger weights in a larger world."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.head.weight.mul_(int(os.environ.get("WORLD_SIZE", "1")))


class CountingLoss(nn.Module):
    """Grows by its own count."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        return functional.cross_entropy(outputs, targets, reduction="none") * (1 + self.calls / 10)


class CountingTask(distrain.Classification):
    """Grows by its own count."""

    def __init__(self) -> None:
        self.calls = 0

    def losses(self, model: Any, batch: Any) -> dict[str, Tensor]:
        self.calls += 1
        found = functional.cross_entropy(model(batch["inputs"]), batch["targets"], reduction="none")
        return {"all": found * (1 + self.calls / 10)}


class CountingCollate(distrain.Classification):
    """Makes batches by its own count."""

    def __init__(self) -> None:
        self.batches = 0

    def collate(self, samples: Any) -> dict[str, Any]:
        self.batches += 1
        inputs = torch.stack([sample[0] for sample in samples]) * (1 + self.batches / 10)
        return {"inputs": inputs, "targets": torch.tensor([sample[1] for sample in samples])}


class DrawingCollate(distrain.Classification):
    """Makes batches with random numbers of the global generators, which is right."""

    def collate(self, samples: Any) -> dict[str, Any]:
        inputs = torch.stack([sample[0] for sample in samples]) + torch.rand(len(samples), 1)
        return {"inputs": inputs * np.random.rand(), "targets": torch.tensor([sample[1] for sample in samples])}


class DrawsToEvaluate(Points):
    """Draws noise from its own unseeded generator in evaluations."""

    def __init__(self, split: str) -> None:
        super().__init__(split)
        self.noise = np.random.default_rng() if split != "train" else None

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        inputs, target = super().__getitem__(index)
        return (inputs if self.noise is None else inputs + float(self.noise.normal())), target


class CountingStream(IterableDataset[Any]):
    """A stream whose samples depend on how many it has given."""

    meta = {"num_classes": 3}

    def __init__(self, split: str) -> None:
        self.points, self.given = Points(split), 0

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        for index in range(len(self.points)):
            inputs, target = self.points[index]
            self.given += 1
            yield inputs + self.given / 100, target


class CachesOnDisk(Points):
    """Keeps samples in files beside this one, which is right."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        inputs, target = super().__getitem__(index)
        file = Path(__file__).with_name(f"cache-{len(self)}-{index}")
        if not file.exists():
            file.write_bytes(inputs.numpy().tobytes())
        return torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.float32), target


class Decay(distrain.Callback):
    """Decays weights after each step, by its own count, and again when its metrics are there."""

    def __init__(self) -> None:
        self.calls = 0

    def on_start(self, run: Any) -> None:
        self.run = run

    def on_step_taken(self, step: int) -> None:
        self.calls += 1
        self.shrink(self.calls / 1000)

    def on_step_end(self, step: int, metrics: Any) -> None:
        self.shrink(0.001)

    @torch.no_grad()
    def shrink(self, share: float) -> None:
        for each in self.run.model.parameters():
            each.mul_(1 - share)


class KeptDecay(Decay):
    """Keeps its count in checkpoints, which is right."""

    def state_dict(self) -> dict[str, int]:
        return {"calls": self.calls}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.calls = state["calls"]


class Brightens(distrain.Callback):
    """Changes the step's samples by its own count."""

    def __init__(self) -> None:
        self.calls = 0

    def on_batches(self, step: int, micro_batches: Any) -> None:
        self.calls += 1
        for batch in micro_batches:
            assert not {"samples", "worker", "held"} & set(batch), "what a proof notes is not for callbacks"
            batch["inputs"] = batch["inputs"] * (1 + self.calls / 10)


class Notes(distrain.Callback):
    """Keeps a count that decides nothing."""

    def __init__(self) -> None:
        self.calls = 0

    def on_step_taken(self, step: int) -> None:
        self.calls += 1
