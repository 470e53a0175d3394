"""A diffusion model of the digits (DDPM): it predicts the noise in a picture, and draws digits from noise alone.

python examples/diffusion.py --processes 2
"""

import argparse
import math

import torch
from sklearn.datasets import load_digits
from torch import nn

import distrain

TIMES = 100


def pictures():
    """Return the digits (1797, 64), from -1 to 1, and what each is."""
    digits = load_digits()
    return torch.tensor(digits.data / 8 - 1, dtype=torch.float32), digits.target


class Denoiser(nn.Module):
    """Predicts the noise (batch, 64) in pictures (batch, 64) that have diffused until `time` (batch,)."""

    def __init__(self, width: int = 256):
        super().__init__()
        kept = torch.cos(torch.linspace(0, 1, TIMES + 1) * math.pi / 2) ** 2
        self.register_buffer("kept", kept[1:].clamp(min=1e-3))  # the share of the picture's variance that is left
        self.times = nn.Embedding(TIMES, width)
        self.first = nn.Linear(64, width)
        self.layers = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.last = nn.Linear(width, 64)

    def diffuse(self, picture, time, noise):
        kept = self.kept[time][:, None]
        return kept.sqrt() * picture + (1 - kept).sqrt() * noise

    def forward(self, noisy, time):
        hidden = self.first(noisy) + self.times(time)
        return self.last(hidden + self.layers(hidden))

    @torch.no_grad()
    def sample(self, count: int, seed: int):
        """Return `count` pictures (count, 64)."""
        random = torch.Generator().manual_seed(seed)
        picture = torch.randn(count, 64, generator=random)
        for time in reversed(range(TIMES)):
            kept, before = self.kept[time], self.kept[time - 1] if time else torch.tensor(1.0)
            noise = self(picture, torch.full((count,), time))
            clean = ((picture - (1 - kept).sqrt() * noise) / kept.sqrt()).clamp(-1, 1)
            step = kept / before  # of the variance, from `time - 1` to `time`
            mean = (before.sqrt() * (1 - step) * clean + step.sqrt() * (1 - before) * picture) / (1 - kept)
            fresh = torch.randn(count, 64, generator=random)
            picture = mean + ((1 - before) * (1 - step) / (1 - kept)).sqrt() * fresh
        return picture


class Diffusion(distrain.Task):
    """The squared error of the predicted noise.

    A sample meets the same time and noise on any number of processes, in any micro-batch and after a resume.
    """

    def losses(self, model, batch):
        noise, time, found = self.denoised(model, batch)
        error = (found - noise).square().mean(1)
        late = time >= TIMES // 2
        self.log("late", (error * late).sum(), late.sum())  # where there is more noise than picture
        return {"noise": error}

    def predictions(self, model, batch):
        return self.denoised(model, batch)[2]

    def denoised(self, model, batch):
        picture = batch["inputs"]
        time, noise = distrain.randint_like(picture[:, 0], TIMES), distrain.randn_like(picture)
        return noise, time, model(model.diffuse(picture, time, noise), time)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    run = distrain.train(
        task=Diffusion,
        model=Denoiser,
        data=pictures,
        batch={"global": 128},
        optim={"lr": 0.003},
        schedule="cosine",
        train={"epochs": 20, "ema": 0.98},
        eval={"every": "20 epochs"},
        processes=options.processes,
        run_dir=f"runs/diffusion-{options.processes}",
    )
    last = run.metrics[run.metrics.event == "eval"].iloc[-1]
    print(f"error {last.loss:.6f}, of much noise {last.late:.6f}")

    drawn = run.model().sample(100, seed=0)
    for row in drawn[:6].view(6, 8, 8).permute(1, 0, 2).clamp(-1, 1):  # six digits, side by side
        print("  ".join("".join(" .:*#"[round(2 * value + 2)] for value in part) for part in row.tolist()))
    real, _ = pictures()
    far = torch.cdist(drawn, real).amin(1).mean()
    print(f"nearest digit at {far:.2f}; of noise at {torch.cdist(torch.randn(100, 64), real).amin(1).mean():.2f}")


if __name__ == "__main__":
    main()
