"""The evaluations of a run, read from metrics.jsonl while the run writes it."""

from __future__ import annotations

import math
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
        """Return (step, value) of all evaluations up to now; NaN where the value is not finite."""
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
        return sorted(self._values.items())

    def _add(self, line: bytes) -> None:
        if b'"eval"' not in line:
            return
        row = parse_row(line, f"{self.path} before byte {self._offset}")
        if row.get("event") == "eval" and self.metric in row:
            self._values[int(row["step"])] = _finite(row[self.metric])


def _finite(value: Any) -> float:
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if known else math.nan


def best_of_evaluations(found: list[tuple[int, float]], *, higher: bool) -> tuple[int, float] | None:
    """Return (step, value) of the best evaluation, the earliest of equals; None where none has a finite value."""
    finite = [(step, value) for step, value in found if math.isfinite(value)]
    return max(finite, key=lambda each: (each[1] if higher else -each[1], -each[0]), default=None)
