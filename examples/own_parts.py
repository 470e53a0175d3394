"""A Dataset, loss, metric and callback of your own, in one process or in several: the numbers are the same.

python examples/own_parts.py --processes 2
"""

import argparse

import torch
from torch import nn
from torch.utils.data import Dataset

import distrain


class Curve(Dataset):
    """Points of a sine, with noise that depends on the sample alone."""

    def __init__(self, points: int = 512):
        self.x = torch.linspace(-3, 3, points)[:, None]
        self.y = self.x.sin() + 0.1 * torch.randn(points, 1, generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index], self.y[index]


def build_model(width: int = 32):
    """Return a model; its initial weights depend on the recipe's seed."""
    return nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, 1))


def log_cosh(outputs, targets):
    """A loss for each sample: quadratic near 0, and linear far from it."""
    return (outputs - targets).cosh().log()


def within_a_tenth(outputs, targets):
    """The share of predictions that are close."""
    return ((outputs - targets).abs() < 0.1).double()


class Watch(distrain.Callback):
    """Prints the loss now and then."""

    def on_start(self, run):
        self.rank = run.rank

    def on_step_end(self, step, metrics):
        if step % 20 == 0 and self.rank == 0:
            print(f"watched: step {step}, loss {metrics.loss:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--processes", type=int, default=1)
    run = distrain.train(
        task="regression",
        model=build_model,
        data=Curve,
        loss=log_cosh,
        metrics=["mae", within_a_tenth],
        callbacks=[Watch],
        batch={"global": 64},
        optim={"lr": 0.01},
        train={"epochs": 10},
        run_dir="runs/own-parts",
        **vars(parser.parse_args()),
    )
    print(run)
    print(run.evaluate("test"))


if __name__ == "__main__":
    main()
