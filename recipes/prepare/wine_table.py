"""scikit-learn's wines as a CSV file of the kind one meets: a column of words, and holes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.datasets import load_wine


def write(path: Path) -> None:
    """Write 178 wines: 12 measurements, the colour in words, the cultivar that is to be told; 4% of values missing."""
    wine = load_wine(as_frame=True)
    table = wine.data.drop(columns="color_intensity")
    table["color"] = pd.cut(wine.data["color_intensity"], [0, 3.5, 5.5, np.inf], labels=["light", "medium", "deep"])
    table = table.mask(np.random.default_rng(0).random(table.shape) < 0.04)
    table["cultivar"] = wine.target_names[wine.target]
    table.to_csv(path, index=False)
