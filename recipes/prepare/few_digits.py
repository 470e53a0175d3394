"""Handwritten digits 5 to 9 as a few PNG files with a CSV of their labels, and weights of a model to start from.

The weights stand for published ones, which nothing here downloads: they come from a few steps of training on the digits
0 to 4, so their last layer has other classes than the files.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import nn

STEPS = 8
EACH = 40
"""Images of each class."""


def for_resnet(path: Path) -> None:
    """Write the images, and `resnet18.safetensors` of torchvision's model."""
    from torchvision.models import resnet18

    _write(path, lambda: resnet18(num_classes=5), "resnet18", side=32)


def for_vit(path: Path) -> None:
    """Write the images, and `vit_tiny_patch16_224.safetensors` of timm's model, for images of 64 × 64."""
    from timm import create_model

    _write(
        path, lambda: create_model("vit_tiny_patch16_224", num_classes=5, img_size=64), "vit_tiny_patch16_224", side=64
    )


def _write(path: Path, build, name: str, side: int) -> None:  # type: ignore[no-untyped-def]
    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    (path / "images").mkdir(parents=True)
    rows = ["image,label"]
    for label in range(5, 10):
        for index in np.flatnonzero(digits.target == label)[:EACH].tolist():
            Image.fromarray(images[index]).save(path / "images" / f"{index:04d}.png")
            rows.append(f"{index:04d}.png,{label}")
    (path / "labels.csv").write_text("\n".join(rows) + "\n")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_file(
            _pretrained(build(), images[digits.target < 5], digits.target[digits.target < 5], side),
            path / f"{name}.safetensors",
        )


def _pretrained(model: nn.Module, images: np.ndarray, targets: np.ndarray, side: int) -> dict[str, torch.Tensor]:
    inputs = torch.from_numpy(images)[:, None].repeat(1, 3, 1, 1) / 255
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    for _ in range(STEPS):
        chosen = torch.randint(len(inputs), (32,))
        resized = nn.functional.interpolate(inputs[chosen], size=(side, side), mode="bilinear")
        nn.functional.cross_entropy(model(resized), torch.from_numpy(targets)[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()
