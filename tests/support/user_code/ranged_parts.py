"""Data sets in which sample 7 of the training split has an index that is none, and models that look it up."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset


class _Samples(Dataset):
    def __init__(self, split: str = "train"):
        self.wrong = split == "train"

    def __len__(self) -> int:
        return 24 if self.wrong else 6

    def wrong_at(self, i: int) -> bool:
        return self.wrong and i == 7


class Digits(_Samples):
    """A class, of which only the model knows how many there are."""

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return torch.ones(64), 12 if self.wrong_at(i) else i % 10


class Tokens(_Samples):
    """A token, or with `targets` the target of one."""

    meta = {"vocab_size": 64}

    def __init__(self, split: str = "train", targets: bool = False):
        super().__init__(split)
        self.targets = targets

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        tokens = (torch.arange(9) + i) % 64
        wrong = tokens.clone()
        wrong[3] += 70 * self.wrong_at(i)
        return (tokens, wrong) if self.targets else (wrong, tokens)


class Named(_Samples):
    """One of two columns, where a larger number is right in the other."""

    classes = tuple("0123456789")

    def __getitem__(self, i: int) -> tuple[dict[str, Tensor], int]:
        return {"item": torch.tensor(i * 40), "place": torch.tensor(9 if self.wrong_at(i) else i % 5)}, i % 10


class Lookup(nn.Module):
    """Sums what two tables have."""

    def __init__(self) -> None:
        super().__init__()
        self.items, self.places = nn.Embedding(1000, 10), nn.Embedding(5, 10)

    def forward(self, item: Tensor, place: Tensor) -> Tensor:
        return self.items(item) + self.places(place)


class Chosen(nn.Module):
    """A linear model that takes from its outputs by `put_`, which has no deterministic form, or fails as a GPU does."""

    def __init__(self, how: str = "", at: int = 2) -> None:
        super().__init__()
        self.head, self.how, self.at, self.passes = nn.Linear(64, 10), how, at, 0

    def forward(self, x: Tensor) -> Tensor:
        out = self.head(x.flatten(1))
        if self.how == "put":
            torch.zeros(4).put_(torch.tensor([1]), torch.ones(1))
        self.passes += self.training
        if self.how == "assert" and self.passes == self.at:
            raise RuntimeError("CUDA error: device-side assert triggered\nCUDA kernel errors might be asynchronous")
        return out
