"""Two networks that train against each other, as a user would write them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

import distrain


class NoisyPoints(Dataset[Any]):
    """Points on a curve, each with noise and a place between two points, of its index alone."""

    def __len__(self):
        return 48

    def __getitem__(self, index):
        random = torch.Generator().manual_seed(index)
        x = torch.rand(1, generator=random) * 2 - 1
        point = torch.cat((x, x**2, x**3))
        return {
            "real": point,
            "noise": torch.randn(4, generator=random),
            "between": torch.rand(1, generator=random),
        }, index


class Block(nn.Module):
    """A block that is repeated, for strategies that gather one after the other."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x):
        return x + torch.tanh(self.linear(x))


class Pair(nn.Module):
    """A generator `g` and a discriminator `d`; `buffers` has the generator normalise its batches."""

    def __init__(self, blocks: int = 0, spare: bool = False):
        super().__init__()
        self.g = nn.Sequential(nn.Linear(4, 8), *(Block(8) for _ in range(blocks)), nn.Tanh(), nn.Linear(8, 3))
        self.d = nn.Sequential(nn.Linear(3, 8), *(Block(8) for _ in range(blocks)), nn.SiLU(), nn.Linear(8, 1))
        if spare:
            self.spare = nn.Linear(2, 2)

    def forward(self, noise):
        return self.g(noise)


class Adversarial(distrain.Task):
    """The losses of a GAN that does not saturate."""

    optimizers = ("d", "g")

    def losses(self, model, batch, optimizer):
        fake = model.g(batch["inputs"]["noise"])
        if optimizer == "g":
            return {"generator": F.softplus(-model.d(fake)).squeeze(1)}
        real = model.d(batch["inputs"]["real"])
        self.log("right", (real > 0).sum())
        return {
            "on_real": F.softplus(-real).squeeze(1),
            "on_fake": distrain.LossSum(F.softplus(model.d(fake)).sum()),
        }

    def predictions(self, model, batch):
        return model(batch["inputs"]["noise"])


class Wasserstein(Adversarial):
    """A critic that is held to gradients of norm 1 between real and made points."""

    weights = {"penalty": 10.0}

    def losses(self, model, batch, optimizer):
        real, noise, between = (batch["inputs"][key] for key in ("real", "noise", "between"))
        fake = model.g(noise)
        if optimizer == "g":
            return {"generator": -model.d(fake).squeeze(1)}
        with torch.enable_grad():  # in an evaluation too
            place = (real + between * (fake - real)).detach().requires_grad_()
            (slope,) = torch.autograd.grad(model.d(place).sum(), place, create_graph=True)
        return {
            "critic": (model.d(fake) - model.d(real)).squeeze(1),
            "penalty": (slope.norm(dim=1) - 1).square(),
        }


class Careless(Adversarial):
    """Gives the generator losses of a name that the discriminator has."""

    def losses(self, model, batch, optimizer):
        return {"loss_of_all": model.d(model.g(batch["inputs"]["noise"])).squeeze(1)}


class Breaking(Adversarial):
    """The generator's loss is NaN for the first sample."""

    def losses(self, model, batch, optimizer):
        found = super().losses(model, batch, optimizer)
        if optimizer == "g" and model.training:
            found["generator"] = found["generator"] + torch.where(batch["ids"] == 7, torch.nan, 0.0)
        return found


class Shuffled(Adversarial):
    """Returns its losses in an order, and reports some of them, by what the samples are."""

    weights = {"on_real": 5.0}

    def losses(self, model, batch, optimizer):
        found = super().losses(model, batch, optimizer)
        return dict(reversed(found.items())) if int(batch["ids"][0]) % 2 else found


class Unlike(Adversarial):
    """In an evaluation, rank 1 gives a loss another name."""

    def losses(self, model, batch, optimizer):
        found = super().losses(model, batch, optimizer)
        if optimizer == "g" and not model.training and torch.distributed.get_rank() == 1:
            found["other"] = found.pop("generator")
        return found


class Relative(Adversarial):
    """Compares each point with the mean of all others in the batch; each optimizer gathers something else."""

    couples_samples = True

    def losses(self, model, batch, optimizer):
        fake = distrain.gather(model.d(model.g(batch["inputs"]["noise"])))
        if optimizer == "g":
            return {"generator": (F.softplus(-(fake - fake.mean())) + F.softplus(-fake)).mean()}
        real = distrain.gather(model.d(batch["inputs"]["real"]))
        return {"relative": F.softplus(fake.mean() - real).mean() + F.softplus(fake).mean()}


class Large(Adversarial):
    """The generator's gradients are 3000 times those of the discriminator."""

    weights = {"generator": 3000.0}


class Demanding(Adversarial):
    """The generator's turn takes more memory than there is."""

    def losses(self, model, batch, optimizer):
        if optimizer == "g":
            raise MemoryError("of the generator")
        return super().losses(model, batch, optimizer)


class Greedy(torch.optim.SGD):
    """Takes more memory than there is once it has the gradients of all its parameters."""

    def step(self, closure=None):
        if all(each.grad is not None for group in self.param_groups for each in group["params"]):
            raise MemoryError("of all gradients")
        return super().step(closure)


class Sole(distrain.Task):
    """One loss of both networks."""

    def losses(self, model, batch):
        return {"sum": model.d(model.g(batch["inputs"]["noise"])).square().squeeze(1)}
