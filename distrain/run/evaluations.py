"""The evaluations of a run, read from metrics.jsonl while the run writes it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from distrain.run.folder import RunDir
from distrain.run.json_files import parse_row


class Evaluations:
    """The values of one metric, in the order of their steps. Each `read` looks at what was added since the last."""

    def __init__(self, run: RunDir, metric: str):
        self.path, self.metric = run.metrics_path, metric
        self._values: dict[int, float] = {}
        self._offset, self._last = 0, b""

    def read(self) -> list[tuple[int, float]]:
        """Return (step, value) of all evaluations up to now; NaN where `value_of` a row is."""
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            self._offset, self._last, self._values = 0, b"", {}
            return []
        with file:
            file.seek(self._offset - len(self._last))
            if file.read(len(self._last)) != self._last:  # a run that resumes takes out what it trains again
                self._offset, self._last, self._values = 0, b"", {}
            file.seek(self._offset)
            while (line := file.readline()).endswith(b"\n"):
                self._add(line)
                self._offset, self._last = self._offset + len(line), line
        return list(self._values.items())

    def _add(self, line: bytes) -> None:
        if b'"eval"' not in line:
            return
        row = parse_row(line, f"{self.path} before byte {self._offset}")
        if row.get("event") == "eval" and self.metric in row:
            step = int(row["step"])
            if self._values and step <= next(reversed(self._values)):  # it rolled back, and trains later steps again
                self._values = {before: value for before, value in self._values.items() if before < step}
            self._values[step] = value_of(row, self.metric)


def value_of(row: Mapping[str, Any], metric: str) -> float:
    """Return what an evaluation's row has of a metric; NaN where it, or the loss, is no finite number.

    A model whose loss is not finite is no run's best, whatever its other numbers are.
    """
    known = all(
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        for value in (row.get(metric), row.get("loss", 0.0))
    )
    return float(row[metric]) if known else math.nan


def best_of_evaluations(found: list[tuple[int, float]], *, higher: bool) -> tuple[int, float] | None:
    """Return (step, value) of the best evaluation, the earliest of equals; None where none has a finite value."""
    finite = [(step, value) for step, value in found if math.isfinite(value)]
    return max(finite, key=lambda each: (each[1] if higher else -each[1], -each[0]), default=None)
