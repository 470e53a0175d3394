"""The numbers of a column of a table, their mean and their spread, as exactly as float64 can say them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

WHOLE = 2.0**53
"""Up to here float64 holds every whole number."""
_CLOSE = 1e5
"""From this many standard deviations on, a mean is far: its own rounding can be seen in what is left without it."""


@dataclass(frozen=True)
class Numbers:
    """The numbers of a column."""

    values: np.ndarray
    """(rows,) float64, NaN where missing."""
    exact: np.ndarray | None = None
    """(rows,) int64 or uint64, anything where missing: whole numbers of which float64 cannot hold each."""

    @property
    def present(self) -> np.ndarray:
        """(rows,) bool."""
        return ~np.isnan(self.values)

    def less(self, base: float) -> np.ndarray:
        """Return the numbers less `base`, (rows,) float64, exact where they are close to it."""
        distances = self.values - float(base)
        if self.exact is None or not isinstance(base, int):
            return distances
        # unsigned numbers wrap round, and so does the difference back again
        exact = (self.exact - np.array(base).astype(self.exact.dtype)).view(np.int64)
        return np.where(np.abs(distances) < 2.0**62, exact, distances)

    def moments(self) -> Moments:
        """Return mean and standard deviation (of the population) of the numbers present, of which there is one."""
        present = self.present
        values = self.values[present]
        with np.errstate(over="ignore", invalid="ignore"):
            mean, std = float(values.mean()), float(values.std())
        if 1e-140 < std < 1e140 and abs(mean) < _CLOSE * std:
            return Moments(mean, std, usual=True)
        # What float64 cannot hold of numbers of this size must not be taken for their spread, nor be lost of it.
        base = float(values[0]) if self.exact is None else int(self.exact[present][0])
        distances = self.less(base)[present]
        if self._is_constant(values, distances):
            return Moments(mean, 1.0) if mean == base else Moments(0.0, 1.0, base)
        size = float(np.abs(distances).max())
        with np.errstate(invalid="ignore"):
            scaled = distances / size
            return Moments(float(scaled.mean()) * size, float(scaled.std()) * size, base)

    def _is_constant(self, values: np.ndarray, distances: np.ndarray) -> bool:
        """Whether the numbers differ by no more than the rounding of numbers of their size."""
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
    """Of the numbers less `base`."""
    std: float
    """1 for a constant column, which is 0 where it keeps its value."""
    base: float = 0.0
    """A number among them where they are close to each other and far from 0; an int where they are whole."""
    usual: bool = False
    """Whether they are what the plain formulas give."""


def beyond_whole(values: np.ndarray) -> bool:
    """Whether there are numbers so large that float64 does not hold each whole one."""
    return bool((np.abs(values) > WHOLE).any())
