"""scikit-learn's handwritten digits as PNG files: `train/7/0012.png`, one folder for each class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits


def write(path: Path) -> None:
    """Write 1797 grey images of 8 × 8; every fifth of each class is for testing."""
    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    for label in range(10):
        for number, index in enumerate(np.flatnonzero(digits.target == label)):
            folder = path / ("test" if number % 5 == 4 else "train") / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[index]).save(folder / f"{number:04d}.png")
