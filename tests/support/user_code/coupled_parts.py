"""Two towers, and tasks whose losses take all samples of a batch together."""

from __future__ import annotations

import math
import os

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

import distrain


class Pairs(Dataset):
    """Two noisy views of a hidden vector of each sample."""

    def __init__(self, split: str = "train", samples: int = 160):
        self.samples = samples
        self.seed = {"train": 1, "held": 2}[split]

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int):
        generator = torch.Generator().manual_seed(1000 * self.seed + index)
        hidden = torch.randn(6, generator=generator)
        return {
            "left": torch.cat((hidden, 0.1 * torch.randn(2, generator=generator))),
            "right": torch.cat((0.1 * torch.randn(3, generator=generator), hidden.flip(0))),
        }, index % 2


class Towers(nn.Module):
    """An encoder for each side, and a temperature that is trained."""

    def __init__(self, dropout: float = 0.0, norm: bool = False):
        super().__init__()
        middle = [nn.BatchNorm1d(16)] if norm else []
        self.left = nn.Sequential(nn.Linear(8, 16), *middle, nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 5))
        self.right = nn.Sequential(nn.Linear(9, 16), nn.Tanh(), nn.Linear(16, 5))
        self.scale = nn.Parameter(torch.tensor(math.log(5.0)))

    def forward(self, left, right):
        return self.left(left), self.right(right)


def clip_loss(left, right, scale):
    """The symmetric InfoNCE: a mean over the samples."""
    left, right = F.normalize(left, dim=-1), F.normalize(right, dim=-1)
    logits = scale.exp() * left @ right.T
    labels = torch.arange(len(left))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2, logits


class Clip(distrain.Task):
    """Contrastive; also reports how often the nearest is the right one."""

    couples_samples = True

    def __init__(self, evaluation_group: int | None = None):
        self.evaluation_group = evaluation_group

    def losses(self, model, batch):
        left, right = model(**batch["inputs"])
        left, right, index = distrain.gather(left), distrain.gather(right), distrain.gather(batch["targets"])
        loss, logits = clip_loss(left, right, model.scale)
        self.log("retrieved", (logits.argmax(1) == torch.arange(len(left))).sum())
        self.log("odd", index.sum())
        return {"contrastive": loss}


class Dice(distrain.Task):
    """Of sums over the whole batch, beside a mean over samples."""

    form = "binary"
    couples_samples = True

    def losses(self, model, batch):
        left, right = model(**batch["inputs"])
        probability, target = (left * right).sum(1).sigmoid(), batch["targets"].to(left.dtype)
        both, either = distrain.gather(probability * target), distrain.gather(probability + target)
        entropy = distrain.gather(F.binary_cross_entropy(probability, target, reduction="none"))
        dice = 1 - 2 * both.sum() / (either.sum() + 1)
        return {"dice": dice, "entropy": entropy}


class Anchors(Clip):
    """Computes the loss of its own anchors alone: the gradient of the others would be lost."""

    def losses(self, model, batch):
        left, right = model(**batch["inputs"])
        every = distrain.gather(right)
        logits = F.normalize(left, dim=-1) @ F.normalize(every, dim=-1).T
        return {"contrastive": F.cross_entropy(logits, torch.arange(len(left)))}


class Counted(Anchors):
    """The same, with what it is over."""

    def losses(self, model, batch):
        count = len(batch["targets"])
        return {"contrastive": distrain.LossSum(super().losses(model, batch)["contrastive"] * count, count)}


class Dependent(Clip):
    """Gathers what depends on what was gathered."""

    def losses(self, model, batch):
        left, right = model(**batch["inputs"])
        centre = distrain.gather(left).mean(0)
        left, right = distrain.gather(left - 2 * centre), distrain.gather(right)
        return {"contrastive": clip_loss(left, right, model.scale)[0]}


class Never(Clip):
    """Gathers nothing."""

    def losses(self, model, batch):
        return {"contrastive": clip_loss(*model(**batch["inputs"]), model.scale)[0]}


class Unsaid(Clip):
    """Does not say that it couples samples."""

    couples_samples = False


class Sums(Clip):
    """Gathers what has no row for each sample."""

    def losses(self, model, batch):
        left, right = model(**batch["inputs"])
        return {"contrastive": clip_loss(distrain.gather(left.T), distrain.gather(right.T), model.scale)[0]}


class OnOneRank(Clip):
    """Gathers another time on one rank."""

    def losses(self, model, batch):
        if os.environ.get("RANK") == "1":
            distrain.gather(batch["targets"])
        return super().losses(model, batch)


class Sometimes(Clip):
    """Gathers another time for some micro-batches."""

    def losses(self, model, batch):
        left, right = model(**batch["inputs"])
        left, right = distrain.gather(left), distrain.gather(right)
        if 0 in batch["ids"] or 7 in batch["ids"]:
            distrain.gather(batch["targets"])
        return {"contrastive": clip_loss(left, right, model.scale)[0]}
