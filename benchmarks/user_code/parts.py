"""What each script of a training shape has in common and no trainer shortens: networks and data. It is not counted."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import Dataset


def digits() -> tuple[Tensor, Tensor]:
    """Return pixels (1797, 64) and classes."""
    pixels, classes = load_digits(return_X_y=True)
    return torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(classes)


def text_folder() -> Path:
    """Return a folder with a small language model, its tokenizer, train.txt and pairs.jsonl; see user_code.py."""
    return Path("prepared/llm")


class Net(nn.Module):
    """A classifier of pixels (batch, 64)."""

    def __init__(self, num_classes: int = 10, width: int = 32):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Autoencoder(nn.Module):
    """Returns a code's mean and the logarithm of its deviation, and pixels of a code."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(64, 16), nn.Linear(8, 64)


class Towers(nn.Module):
    """Returns an embedding of each half, and has a temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(32, 16), nn.Linear(32, 16)
        self.log_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        return F.normalize(self.left(left), dim=-1), F.normalize(self.right(right), dim=-1)


class Halves(Dataset):
    """The left and the right half of each digit."""

    def __init__(self) -> None:
        pictures = digits()[0].view(-1, 8, 8)
        self.left, self.right = pictures[:, :, :4].flatten(1), pictures[:, :, 4:].flatten(1)

    def __len__(self) -> int:
        return len(self.left)

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], int]:
        return {"left": self.left[index], "right": self.right[index]}, index
