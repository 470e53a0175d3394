"""Two towers: which left and right half are of one picture? The loss takes the whole global batch together.

python examples/two_towers.py --processes 2 --micro 16

The numbers are those of any number of processes and any micro-batch.
"""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import Dataset

import distrain


class Halves(Dataset):
    """The left and the right half of each digit, 32 pixels each."""

    def __init__(self):
        pictures = torch.tensor(load_digits().images / 16, dtype=torch.float32)
        self.left, self.right = pictures[:, :, :4].flatten(1), pictures[:, :, 4:].flatten(1)

    def __len__(self):
        return len(self.left)

    def __getitem__(self, index):
        return {"left": self.left[index], "right": self.right[index]}, index


def tower():
    return nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.LayerNorm(128), nn.Linear(128, 32))


class Towers(nn.Module):
    """An encoder for each half, and the temperature, which is trained with them."""

    def __init__(self):
        super().__init__()
        self.left, self.right = tower(), tower()
        self.log_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, left, right):
        return F.normalize(self.left(left), dim=-1), F.normalize(self.right(right), dim=-1)


class Contrastive(distrain.Task):
    """The symmetric InfoNCE: each half finds the other one among those of the whole batch."""

    couples_samples = True
    evaluation_group = 180  # samples among which an evaluation looks for the other half; without it batch.global

    def losses(self, model, batch):
        left, right = model(**batch["inputs"])
        left, right = distrain.gather(left), distrain.gather(right)  # of the whole global batch, in its order
        logits = model.log_scale.exp() * left @ right.T
        own = torch.arange(len(logits), device=logits.device)
        self.log("retrieved", (logits.argmax(1) == own).sum())  # a mean over the samples: how often it is found
        return {"contrastive": (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--micro", type=int, default=64)
    options = parser.parse_args()
    run = distrain.train(
        task=Contrastive,
        model=Towers,
        data=Halves,
        batch={"global": 64, "micro": options.micro},
        optim={"lr": 0.005},
        train={"epochs": 20},
        eval={"every": "10 epochs"},
        processes=options.processes,
        run_dir=f"runs/two-towers-{options.processes}-{options.micro}",
    )
    last = run.metrics[run.metrics.event == "eval"].iloc[-1]
    print(f"loss {last.loss:.6f}, found among 180: {last.retrieved:.3f}")


if __name__ == "__main__":
    main()
