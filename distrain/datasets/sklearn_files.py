"""The small data sets that scikit-learn brings, read from its files: importing it would take longer than a first run.

What is returned equals what `sklearn.datasets.load_*` returns, which a test holds.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distrain.config import UserError

_CELLS = "radius texture perimeter area smoothness compactness concavity concave_points symmetry fractal_dimension"
_WINE = (
    "alcohol malic_acid ash alcalinity_of_ash magnesium total_phenols flavanoids nonflavanoid_phenols proanthocyanins "
    "color_intensity hue od280/od315_of_diluted_wines proline"
)


@dataclass(frozen=True)
class Table:
    """Rows and what is known of them."""

    data: np.ndarray
    """(rows, features) float64."""
    target: np.ndarray
    """(rows,) int64 of classes, float64 of a regression."""
    feature_names: tuple[str, ...]
    target_names: tuple[str, ...] = ()


def load_digits() -> Table:
    """Return 1 797 images of 8 × 8 pixels, 0 to 16, as rows of 64."""
    values = _values("digits.csv.gz", ",")
    pixels = tuple(f"pixel_{row}_{column}" for row in range(8) for column in range(8))
    return Table(values[:, :-1], values[:, -1].astype(np.int64), pixels, tuple("0123456789"))


def load_iris() -> Table:
    """Return 150 flowers: lengths and widths in cm."""
    features = tuple(f"{part} {side} (cm)" for part in ("sepal", "petal") for side in ("length", "width"))
    return _classes("iris.csv", features)


def load_wine() -> Table:
    """Return 178 wines: 13 chemical analyses."""
    return _classes("wine_data.csv", tuple(_WINE.split()))


def load_breast_cancer() -> Table:
    """Return 569 tumours: mean, error and worst value of 10 properties of their cells."""
    means, errors, worst = (
        [form.format(each.replace("_", " ")) for each in _CELLS.split()] for form in ("mean {}", "{} error", "worst {}")
    )
    return _classes("breast_cancer.csv", (*means, *errors, *worst))


def load_diabetes() -> Table:
    """Return 442 patients: 10 measurements in their own units, and the progression in a year."""
    names = ("age", "sex", "bmi", "bp", *(f"s{number}" for number in range(1, 7)))
    return Table(_values("diabetes_data_raw.csv.gz"), _values("diabetes_target.csv.gz"), names)


def _classes(name: str, features: tuple[str, ...]) -> Table:
    """Return the table of a file whose first line holds the numbers of rows and features and the names of classes."""
    with _path(name).open(encoding="utf-8") as file:
        _, _, *classes = file.readline().strip().split(",")
    values = _values(name, ",", skiprows=1)
    return Table(values[:, :-1], values[:, -1].astype(np.int64), features, tuple(classes))


def _values(name: str, delimiter: str | None = None, skiprows: int = 0) -> np.ndarray:
    return np.loadtxt(_path(name), delimiter=delimiter, skiprows=skiprows, encoding="utf-8")


def _path(name: str) -> Path:
    package = importlib.util.find_spec("sklearn")
    if package is None or package.origin is None:
        raise UserError("scikit-learn is not installed, and its small data sets come with it: pip install scikit-learn")
    path = Path(package.origin).with_name("datasets") / "data" / name
    if not path.exists():
        raise UserError(f"{path} is missing, which belongs to scikit-learn; install scikit-learn again")
    return path
