"""A GAN of the digits: a generator and a discriminator with optimizers of their own, which act in turn.

python examples/gan.py --processes 2
"""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import Dataset

import distrain


class NoisyDigits(Dataset):
    """A digit, and noise for each of the two optimizers.

    Noise is drawn here, where generators are seeded from (seed, epoch, sample): so it does not depend on the number of
    processes.
    """

    def __init__(self):
        self.pictures = torch.tensor(load_digits().data / 8 - 1, dtype=torch.float32)

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, index):
        return {"picture": self.pictures[index], "discriminator": torch.randn(16), "generator": torch.randn(16)}, 0


def network(inputs: int, width: int, outputs: int):
    return nn.Sequential(
        nn.Linear(inputs, width),
        nn.LeakyReLU(0.2),
        nn.Linear(width, width),
        nn.LeakyReLU(0.2),
        nn.Linear(width, outputs),
    )


class GAN(nn.Module):
    def __init__(self, width: int = 128):
        super().__init__()
        self.generator = nn.Sequential(network(16, width, 64), nn.Tanh())
        self.discriminator = network(64, width, 1)

    def forward(self, noise):
        return self.generator(noise)


class Adversarial(distrain.Task):
    """The losses that do not saturate (Goodfellow et al., 2014), with a penalty on the slope at real pictures.

    The penalty, R1 (Mescheder et al., 2018), is itself computed from a gradient.
    """

    optimizers = ("discriminator", "generator")
    weights = {"slope": 0.5}

    def losses(self, model, batch, optimizer):
        made = model(batch["inputs"][optimizer])  # in the discriminator's turn no gradient goes back into the generator
        if optimizer == "generator":
            return {"deceived": F.softplus(-model.discriminator(made)).mean()}
        with torch.enable_grad():  # also in an evaluation
            picture = batch["inputs"]["picture"].detach().requires_grad_()
            real = model.discriminator(picture)
            (slope,) = torch.autograd.grad(real.sum(), picture, create_graph=True)
        fake = model.discriminator(made)
        self.log("accuracy", (real > 0).sum() + (fake < 0).sum(), 2 * len(real))
        return {
            "real": F.softplus(-real).mean(),
            "made": F.softplus(fake).mean(),
            "slope": slope.square().sum(1).mean(),
        }

    def predictions(self, model, batch):
        return model(batch["inputs"]["generator"])


def distance(made, real):
    """Return the Fréchet distance of two sets of pictures (pictures, 64), by the means and covariances of pixels."""
    (mean, spread), (its_mean, its_spread) = ((each.mean(0), each.T.cov()) for each in (made.double(), real.double()))
    root = torch.linalg.eigvals(spread @ its_spread).real.clamp(min=0).sqrt().sum()
    return ((mean - its_mean).square().sum() + spread.trace() + its_spread.trace() - 2 * root).item()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    run = distrain.train(
        task=Adversarial,
        model=GAN,
        data=NoisyDigits,
        optim={
            "discriminator": {"params": "discriminator.*", "name": "adam", "lr": 1e-3, "betas": [0.0, 0.99]},
            "generator": {"params": "generator.*", "name": "adam", "lr": 1e-3, "betas": [0.0, 0.99]},
        },
        batch={"global": 128},
        train={"epochs": 40, "ema": 0.98},
        eval={"every": "20 epochs"},
        processes=options.processes,
        run_dir=f"runs/gan-{options.processes}",
    )
    last = run.metrics[run.metrics.event == "eval"].iloc[-1]
    print(f"the discriminator's accuracy {last.accuracy:.3f}")

    random, real = torch.Generator().manual_seed(0), NoisyDigits().pictures
    noise = torch.randn(len(real), 16, generator=random)
    torch.manual_seed(0)
    with torch.no_grad():
        made, before = run.model()(noise), GAN()(noise)
    for row in made[:6].view(6, 8, 8).permute(1, 0, 2):  # six digits, side by side
        print("  ".join("".join(" .:*#"[round(2 * value + 2)] for value in part) for part in row.tolist()))
    print(f"distance to the digits {distance(made, real):.2f}; untrained {distance(before, real):.2f}")


if __name__ == "__main__":
    main()
