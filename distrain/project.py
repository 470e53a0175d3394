"""`distrain init`: a small project with a model, a data set and a recipe, ready to train."""

from __future__ import annotations

from pathlib import Path

from distrain.config import UserError

_MODEL = '''"""The project's model: any torch.nn.Module whose forward takes a batch of inputs."""

import torch
from torch import nn


class Net(nn.Module):
    """Classifies points of the plane. Arguments are the keys of the recipe's `model` section."""

    def __init__(self, hidden: int = 32, num_classes: int = 2):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, num_classes)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (batch, 2) float -> logits: (batch, num_classes)."""
        return self.layers(x)
'''

_DATA = '''"""The project's data set: any torch.utils.data.Dataset whose items are (inputs, target)."""

import math

import torch
from torch.utils.data import Dataset


class Spirals(Dataset):
    """Two spirals wound into each other. Arguments are the further keys of the recipe's `data` section."""

    def __init__(self, samples: int = 2000, noise: float = 0.05):
        generator = torch.Generator().manual_seed(0)
        self.targets = torch.arange(samples) % 2
        radius = torch.rand(samples, generator=generator).sqrt()
        angle = 3 * math.pi * radius + math.pi * self.targets
        points = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=1)
        self.points = points + noise * torch.randn(samples, 2, generator=generator)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.points[index], int(self.targets[index])
'''

_RECIPE = """# distrain train recipe.yaml            trains this; the same command resumes after a stop
# distrain show recipe.yaml             prints every value, with where it comes from
# distrain list models                  (datasets, optimizers, losses, metrics): the names that can stand here
name: spirals
task: classification
data: {name: "data.py:Spirals", split: [0.8, 0.2], samples: 2000}
model: {name: "model.py:Net", hidden: 32, num_classes: 2}
optim: {name: adamw, lr: 1.0e-2, clip_norm: 1.0}
schedule: {name: cosine, warmup: 5%}
batch: {global: 64}
train: {epochs: 40}
eval: {every: 5 epochs, metrics: [accuracy, f1_macro], best: accuracy}
checkpoint: {every: 10 epochs}
seed: 0
"""


def create_project(folder: Path) -> list[Path]:
    """Write the project's files into `folder`, which must be absent or empty; returns their paths."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an empty folder; name a new one")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        texts = {"model.py": _MODEL, "data.py": _DATA, "recipe.yaml": _RECIPE, ".gitignore": "/runs/\n"}
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write the project to {folder}: {error.strerror or error}") from error
    return [folder / name for name in texts]
