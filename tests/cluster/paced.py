"""A model that takes its time in training, as long as a file says so: runs that are caught in the middle."""

from __future__ import annotations

import socket
import time
from pathlib import Path

from torch import Tensor, nn


class Paced(nn.Module):
    """A small convolutional network with batch normalisation for the digits, (batch, 1, 8, 8) to (batch, 10).

    The file `pace.all` holds the seconds that a forward pass of training waits, and `pace.n1` those on node n1; without
    them there is no wait. `pace` itself is no file: that would be a part of what the run depends on.
    """

    def __init__(self, pace: str, channels: int = 8) -> None:
        super().__init__()
        self.paces = (Path(f"{pace}.{socket.gethostname()}"), Path(f"{pace}.all"))
        self.features = nn.Sequential(nn.Conv2d(1, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU())
        self.head = nn.Linear(channels * 64, 10)

    def forward(self, images: Tensor) -> Tensor:
        if self.training and (pace := next(filter(Path.exists, self.paces), None)) is not None:
            time.sleep(float(pace.read_text()))
        return self.head(self.features(images).flatten(1))
