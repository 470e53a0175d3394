"""Sequences of different lengths, models that read their padding or not, and losses of them, as a user would write."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset

import distrain


class Sequences(Dataset[Any]):
    """`kind`: tokens without a padding id, some broken or sorted by length, features, next tokens, numbers or waves."""

    def __init__(self, kind: str = "tokens"):
        self.kind = kind
        self.meta = {"vocab_size": 12, "num_classes": 2, "padding": {"targets": -100}}

    def __len__(self):
        return 40

    def __getitem__(self, index):
        if self.kind == "broken" and index % 6 == 5:
            raise ValueError("no tokens")
        length = 3 + (index // 20 if self.kind == "sorted" else index * 7 % 5)
        tokens = (torch.arange(length) * (index + 1)) % 11 + 1
        if self.kind == "features":
            return {"features": torch.sin(tokens[:, None] * torch.arange(1.0, 5.0))}, index % 2
        if self.kind == "waves":
            return torch.sin(tokens.float()) + 2, index % 2
        if self.kind == "numbers":
            return tokens, tokens / 12
        return (tokens[:-1], tokens[1:]) if self.kind == "next" else (tokens, index % 2)


class Stream:
    meta = Sequences().meta

    def __iter__(self):
        sequences = Sequences()
        yield from (sequences[index] for index in range(40))


class Mean(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(12, 8), nn.Linear(8, 2)

    def forward(self, tokens):
        return self.head(self.embed(tokens).mean(1))


class MeanOfTokens(Mean):
    def forward(self, tokens):
        there = (tokens > 0).unsqueeze(2)
        return self.head((self.embed(tokens) * there).sum(1) / there.sum(1))


class Centred(MeanOfTokens):
    def forward(self, tokens):
        found = super().forward(tokens)
        return found - found.mean(0)


class Dropped(MeanOfTokens):
    def forward(self, tokens):
        return functional.dropout(super().forward(tokens))


class MeanOfFeatures(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 2)

    def forward(self, features):
        return self.head(features.mean(1))


class MeanOfWave(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(1, 2)

    def forward(self, wave):
        return self.head(wave.mean(1, keepdim=True))


class MeanOfLoud(MeanOfWave):
    def forward(self, wave):
        return self.head(wave.sum(1, keepdim=True) / (wave != 0).sum(1, keepdim=True))


class Windows(nn.Module):
    """Cannot read a sequence that is shorter than its window."""

    def __init__(self):
        super().__init__()
        self.embed, self.window, self.head = nn.Embedding(12, 8), nn.Conv1d(8, 8, 6), nn.Linear(8, 2)

    def forward(self, tokens):
        return self.head(self.window(self.embed(tokens).transpose(1, 2)).amax(2))


class Next(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(12, 8), nn.Linear(8, 12)

    def forward(self, tokens):
        return self.head(self.embed(tokens))


class Number(Mean):
    def forward(self, tokens):
        return self.head(self.embed(tokens))[..., 0]


class MeanOverTokens(distrain.Task):
    reduction = "mean"

    def losses(self, model, batch):
        logits, targets = model(batch["inputs"]).flatten(0, 1), batch["targets"].flatten()
        return {"entropy": functional.cross_entropy(logits, targets, reduction=self.reduction)}


class SumOverTokens(MeanOverTokens):
    reduction = "sum"

    def count(self, batch):
        return {"entropy": (batch["targets"] != -100).sum()}

    def losses(self, model, batch):
        return {
            name: distrain.LossSum(each, self.count(batch)[name]) for name, each in super().losses(model, batch).items()
        }


class Contrastive(distrain.Task):
    def losses(self, model, batch):
        vectors = functional.normalize(model(batch["inputs"]), dim=1)
        return {"contrast": functional.cross_entropy(vectors @ vectors.T, torch.arange(len(vectors)))}


class Drawn(SumOverTokens):
    """Whose noise is another one in another batch."""

    def losses(self, model, batch):
        return {"entropy": super().losses(model, batch)["entropy"], "noise": torch.randn(len(batch["ids"]))}


def mean_of_all(outputs, targets):
    return functional.cross_entropy(outputs.transpose(1, 2), targets, reduction="none")


def hits_of_all(outputs, targets):
    return (outputs.argmax(-1) == targets).float().mean(1)


def hits(outputs, targets):
    there = targets != -100
    return ((outputs.argmax(-1) == targets) & there).sum(), there.sum()


class Bags(distrain.Task):
    """Its batches hold all tokens one after the other."""

    form = "classification"

    def collate(self, samples):
        tokens = [tokens for tokens, _ in samples]
        starts = torch.tensor([0, *(len(each) for each in tokens[:-1])]).cumsum(0)
        return {"inputs": (torch.cat(tokens), starts), "targets": torch.tensor([label for _, label in samples])}

    def losses(self, model, batch):
        return {"entropy": functional.cross_entropy(model(*batch["inputs"]), batch["targets"], reduction="none")}

    def measure(self, predictions, batch):
        return {"largest": distrain.LossSum(predictions.abs().amax(1).sum())}


class SumOfBags(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.EmbeddingBag(12, 8, mode="sum"), nn.Linear(8, 2)

    def forward(self, tokens, starts):
        return self.head(self.embed(tokens, starts))
