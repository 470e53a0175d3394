"""The numbers of a table column, and their mean and deviation as exactly as float64 allows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # imported where it is used, as in table_files.py
    import pyarrow as pa

WHOLE = 2.0**53
"""float64 holds every integer up to here."""
_CLOSE = 1e5
"""A mean of this many standard deviations is far from 0: its rounding shows in the centred numbers."""

_NUMBER = r"^-?(?:(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|(?i:inf|infinity))$"


def parse_numbers(texts: pa.ChunkedArray) -> np.ndarray:
    """Return the numbers (rows,) float64 that texts name, each the closest to its digits; NaN where one names none.

    pandas before 3 takes a neighbour of the closest for one number in five.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    plain = pc.replace_substring_regex(pc.ascii_trim_whitespace(texts), r"^\+([^+-])", r"\1")
    found: np.ndarray = pc.if_else(pc.match_substring_regex(plain, _NUMBER), plain, None).cast(pa.float64()).to_numpy()
    return found


@dataclass(frozen=True)
class Numbers:
    """The numbers of a column."""

    values: np.ndarray
    """(rows,) float64, NaN where missing."""
    exact: np.ndarray | None = None
    """(rows,) int64 or uint64, arbitrary where missing: integers that float64 cannot hold."""

    @property
    def present(self) -> np.ndarray:
        """(rows,) bool."""
        return ~np.isnan(self.values)

    def less(self, base: float) -> np.ndarray:
        """Return the numbers minus `base`, (rows,) float64, exact where they are close to it."""
        distances = self.values - float(base)
        if self.exact is None or not isinstance(base, int):
            return distances
        # unsigned numbers wrap around, and the difference wraps back
        exact = (self.exact - np.array(base).astype(self.exact.dtype)).view(np.int64)
        return np.where(np.abs(distances) < 2.0**62, exact, distances)

    def moments(self) -> Moments:
        """Return mean and population standard deviation of the numbers present, at least one."""
        present = self.present
        values = self.values[present]
        with np.errstate(over="ignore", invalid="ignore"):
            mean, std = float(values.mean()), float(values.std())
        if 1e-140 < std < 1e140 and abs(mean) < _CLOSE * std:
            return Moments(mean, std, usual=True)
        # the rounding of numbers of this size must neither count as their spread nor hide it
        base = float(values[0]) if self.exact is None else int(self.exact[present][0])
        distances = self.less(base)[present]
        if self._is_constant(values, distances):
            return Moments(mean, 1.0) if mean == base else Moments(0.0, 1.0, base)
        size = float(np.abs(distances).max())
        with np.errstate(invalid="ignore"):
            scaled = distances / size
            return Moments(float(scaled.mean()) * size, float(scaled.std()) * size, base)

    def _is_constant(self, values: np.ndarray, distances: np.ndarray) -> bool:
        """Whether the numbers differ by no more than their rounding."""
        spread = float(distances.max()) - float(distances.min())
        if self.exact is not None:
            return spread == 0
        largest = float(np.abs(values).max())
        if largest <= WHOLE and bool((values == np.floor(values)).all()):
            return spread == 0
        return spread <= 4 * float(np.spacing(largest))


@dataclass(frozen=True)
class Moments:
    """Mean and standard deviation of the numbers of a column."""

    mean: float
    """Of the numbers minus `base`."""
    std: float
    """1 for a constant column, which standardises to 0."""
    base: float = 0.0
    """One of the numbers if they are close to each other and far from 0, an int if they are integers."""
    usual: bool = False
    """Whether the textbook formulas were exact enough."""


def beyond_whole(values: np.ndarray) -> bool:
    """Whether there are numbers beyond the integers that float64 holds."""
    return bool((np.abs(values) > WHOLE).any())
