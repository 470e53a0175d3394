"""Curves drawn with characters, for terminals. Pure."""

from __future__ import annotations

import math

import numpy as np

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""The bits of a Braille character by row and column."""
_LABEL = 9


def draw(x: np.ndarray, y: np.ndarray, width: int, height: int) -> list[str]:
    """Return `height` lines of `width` characters that show a curve with its axes; `x`, `y`: (n,).

    The last two lines are the horizontal axis. Values that are no finite numbers leave gaps.
    """
    rows, columns = max(height - 2, 1), max(width - _LABEL - 1, 2)
    finite = np.isfinite(y)
    if not finite.any():
        return ["no values yet".center(width)] + [" " * width] * (height - 1)
    low, high = float(y[finite].min()), float(y[finite].max())
    first, last = float(x[0]), float(x[-1])
    cells = np.zeros((rows, columns), np.int32)
    across = np.zeros(len(x)) if last == first else (x - first) / (last - first)
    up = np.full(len(y), 0.5) if high == low else (y - low) / (high - low)
    at_column = np.rint(across * (columns * 2 - 1)).astype(int)
    before: tuple[int, int] | None = None
    for place, there in enumerate(finite):
        if not there:
            before = None
            continue
        point = int(at_column[place]), round((1 - float(up[place])) * (rows * 4 - 1))
        for column, row in _line(before or point, point):
            cells[row // 4, column // 2] |= _DOTS[row % 4][column % 2]
        before = point
    labels = {0: high, rows // 2: (low + high) / 2, rows - 1: low} if rows > 2 else {0: high, rows - 1: low}
    lines = [
        f"{_short(labels[row]) if row in labels else '':>{_LABEL}}{'┤' if row in labels else '│'}"
        + "".join(chr(0x2800 + int(cell)) if cell else " " for cell in cells[row])
        for row in range(rows)
    ]
    start, end = f"{first:,.0f}", f"{last:,.0f}"
    ends = start + end.rjust(columns - len(start)) if columns > len(start) + len(end) else end.rjust(columns)
    return [*lines, " " * _LABEL + "└" + "─" * columns, " " * (_LABEL + 1) + ends[-columns:]][:height]


def _line(start: tuple[int, int], end: tuple[int, int]) -> list[tuple[int, int]]:
    """Return the dots of a straight line."""
    count = max(abs(end[0] - start[0]), abs(end[1] - start[1]), 1)
    return [
        (round(start[0] + (end[0] - start[0]) * i / count), round(start[1] + (end[1] - start[1]) * i / count))
        for i in range(count + 1)
    ]


def _short(value: float) -> str:
    """Return a number in at most eight characters."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6 or size < 1e-3:
        return f"{value:.1e}"
    return f"{value:,.0f}" if size >= 1e4 else f"{value:.{max(0, 3 - math.floor(math.log10(size)) - 1)}f}"
