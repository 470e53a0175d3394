"""Models of pixels and of tokens, as a user would write them."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import Dataset


def _block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU())


class UNet(nn.Module):
    """One level down and up again: (batch, in_channels, height, width) to (batch, num_classes, height, width)."""

    def __init__(self, in_channels: int, num_classes: int, width: int = 8):
        super().__init__()
        self.down, self.deep = _block(in_channels, width), _block(width, 2 * width)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.out = nn.Sequential(_block(2 * width, width), nn.Conv2d(width, num_classes, 1))

    def forward(self, images):
        down = self.down(images)
        up = self.up(self.deep(nn.functional.max_pool2d(down, 2)))
        return self.out(torch.cat([down, up], 1))


class Tagger(nn.Module):
    """A class for each token, from it and its two neighbours: (batch, seq) to (batch, seq, num_classes)."""

    def __init__(self, vocab_size: int, num_classes: int, pad_id: int, width: int = 16):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width, pad_id)  # padding is as what lies beyond a row
        self.mix = nn.Conv1d(width, width, 3, padding=1)
        self.out = nn.Linear(width, num_classes)

    def forward(self, tokens):
        return self.out(self.mix(self.embedding(tokens).mT).relu().mT)


class Sentences(Dataset):
    """Rows of 3 to 8 of the tokens 1 to 6; the class of a token is whether it is above the one before it."""

    classes = ("falls", "rises")
    meta = {"vocab_size": 7, "pad_id": 0}

    def __len__(self):
        return 96

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        tokens = torch.randint(1, 7, (3 + index % 6,), generator=generator)
        targets = torch.cat([torch.tensor([-100]), (tokens.diff() > 0).long()])  # the first has none before it
        return tokens, targets
