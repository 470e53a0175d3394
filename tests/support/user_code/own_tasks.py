"""Tasks, models and data sets as a user would write them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset

import distrain


class Autoencoder(nn.Module):
    """A variational autoencoder of digits."""

    def __init__(self, noise: bool = True):
        super().__init__()
        self.noise = noise
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 8))
        self.decoder = nn.Linear(4, 64)

    def forward(self, x):
        mean, log_std = self.encoder(x).chunk(2, dim=1)
        z = mean + torch.randn_like(mean) * log_std.exp() if self.training and self.noise else mean
        return self.decoder(z).view_as(x), mean, log_std


class Variational(distrain.Task):
    """Two losses with counts of their own, a logged mean, and a mean of evaluations."""

    weights = {"kl": 0.25}

    def count(self, batch):
        return {"bright": (batch["inputs"] > 0.5).sum()}

    def losses(self, model, batch):
        x = batch["inputs"]
        out, mean, log_std = model(x)
        self.log("spread", log_std.exp().sum(), log_std.numel())
        bright = x > 0.5
        return {
            "bright": distrain.LossSum(((out - x).square() * bright).sum(), bright.sum()),
            "kl": (mean.square() + (2 * log_std).exp() - 2 * log_std - 1).sum(1) / 2,
            "all": (out - x).abs().mean(),
        }

    def measure(self, predictions, batch):
        return {"worst": distrain.LossSum((predictions - batch["inputs"]).abs().amax((1, 2, 3)).sum())}


class Pairs(Dataset[Any]):
    """`(a, b, y)`: two numbers with names, and a dict of targets."""

    def __len__(self):
        return 48

    def __getitem__(self, index):
        x = torch.sin(torch.arange(4.0) + index)
        return x, {"right": x.flip(0), "rest": (index % 3, x[0])}, {"sum": x.sum(), "sign": int(x[0] > 0)}


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.sign = nn.Linear(4, 1), nn.Linear(4, 1), nn.Linear(4, 2)

    def forward(self, a, named):
        number, first = named["rest"]
        assert number.dtype == torch.int64
        assert first.shape == number.shape
        return {"sum": (self.left(a) + self.right(named["right"]))[:, 0], "sign": self.sign(a)}


class SumAndSign(distrain.Task):
    def losses(self, model, batch):
        out, targets = model(*batch["inputs"]), batch["targets"]
        return {
            "square": (out["sum"] - targets["sum"]).square(),
            "entropy": functional.cross_entropy(out["sign"], targets["sign"], reduction="none"),
        }

    def predictions(self, model, batch):
        return model(*batch["inputs"])["sign"]

    def measure(self, predictions, batch):
        return {"hits": distrain.LossSum((predictions.argmax(1) == batch["targets"]["sign"]).sum())}


class Words(Dataset[Any]):
    """Texts of different lengths, as they are."""

    def __len__(self):
        return 40

    def __getitem__(self, index):
        return "ab" * (1 + index % 5) + "c" * (index % 2)


class CountLetters(distrain.Task):
    def __init__(self, alphabet: str = "abc"):
        self.alphabet = alphabet

    def collate(self, samples):
        rows = [[text.count(letter) for letter in self.alphabet] for text in samples]
        counts = torch.tensor(rows, dtype=torch.get_default_dtype())
        return {"inputs": counts, "targets": counts.sum(1), "texts": samples}

    def losses(self, model, batch):
        assert len(batch["texts"]) == len(batch["targets"])
        return {"square": (model(batch["inputs"])[:, 0] - batch["targets"].to(torch.float64)).square()}


class Distilled(distrain.Classification):
    """The labels, and what the model said before it was trained."""

    def __init__(self, share: float = 0.5):
        self.weights = {"teacher": share}

    def prepare(self, context):
        self.teacher = context.initial_model()

    def losses(self, model, batch):
        with torch.no_grad():
            said = self.teacher(batch["inputs"]).softmax(1)
        out = model(batch["inputs"])
        return {**super().losses(model, batch), "teacher": -(said * out.log_softmax(1)).sum(1)}


class Odd(distrain.Task):
    """Whatever a user may get wrong."""

    def __init__(self, kind: str):
        self.kind, self.calls = kind, 0

    def count(self, batch):
        return {"wrong": 3.0} if self.kind == "count" else {}

    def losses(self, model, batch):
        out = model(batch["inputs"]).sum(1)
        self.calls += 1
        if self.kind == "late" and self.calls > 2:
            self.log("new", out.sum())
        if self.kind == "twice":
            self.log("a", out.sum())
            self.log("a", out.sum())
        return {
            "none": {},
            "list": {"a": [out]},
            "rows": {"a": out[:, None]},
            "number": {"a": 1.0},
            "count": {"wrong": distrain.LossSum(out.sum())},
            "taken": {"lr": out},
            "total": {"loss": out, "other": out},
        }.get(self.kind, {"a": out})


class Nested(distrain.Classification):
    """Predicts several tensors of each sample, nested in one another."""

    def predictions(self, model, batch):
        images, logits = batch["inputs"], model(batch["inputs"])
        top = logits.topk(2)
        return {
            "class": top.indices[:, 0],
            "logits": logits,
            "best": (top.values, top.indices == batch["ids"].to(top.indices.device)[:, None]),
            "maps": {"all": images.float(), "row": [images[:, 0, 0].float()]},
        }


class Annealed(distrain.Classification):
    """Its weight is another one in each step."""

    def losses(self, model, batch):
        self.weights = {"cross_entropy": self.step / 2}
        return super().losses(model, batch)


class Prepared(distrain.Classification):
    """Its weight is known once it is prepared."""

    def prepare(self, context):
        self.weights = {"cross_entropy": 0.5}


class Weighted(distrain.Classification):
    """It changes nothing but a weight."""

    weights = {"cross_entropy": 0.5}


class Halved(distrain.Classification):
    """It changes nothing but how the model is called, of whose gradient it takes half."""

    def outputs(self, model, batch):
        found = super().outputs(model, batch)
        return found._replace(logits=0.5 * found.logits + 0.5 * found.logits.detach())


class Clamped(distrain.Classification):
    """It changes nothing but the weights, after each step."""

    def step_taken(self, model):
        for parameter in model.parameters():
            parameter.clamp_(-0.1, 0.1)


class Keeping(distrain.Classification):
    """It changes nothing, and has a state."""

    def state_dict(self):
        return {"count": 1}

    def load_state_dict(self, state):
        assert state == {"count": 1}


class LateLetters(CountLetters):
    """Makes its batches by the step."""

    def collate(self, samples):
        return super().collate(samples[: len(samples) + self.step])
