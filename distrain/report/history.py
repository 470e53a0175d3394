"""A run's numbers as curves: each step once over all attempts, read further as the run goes on. Imports no torch."""

from __future__ import annotations

import math
import os
import struct
from array import array
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from pydantic_core import from_json

from distrain.run.folder import RunDir
from distrain.run.json_files import metrics_row, parse_row
from distrain.system import bounded_json as bounded
from distrain.system.errors import UserError
from distrain.system.output import one_line

_NO_CURVES = frozenset(("event", "step", "split", "time"))
_BLOCK = 1 << 22
_EACH_STEP = frozenset(("train", "eval", "final"))
"""Events that a step has once for each split; a later row of an earlier step begins it anew."""


class Series(NamedTuple):
    """A curve: three arrays of equal length, in the order of their steps."""

    steps: np.ndarray
    """(n,) int64, increasing."""
    values: np.ndarray
    """(n,) float64; NaN and infinities are kept."""
    times: np.ndarray
    """(n,) float64, seconds since 1970."""


@dataclass(frozen=True)
class Attempt:
    """One start of a run."""

    step: int
    """The finished optimizer steps that it began with."""
    time: float
    """When it began, in seconds since 1970."""
    processes: int
    strategy: str
    host: str
    job: str | None
    """Its SLURM job."""


class _Columns:
    """The rows of one event and split, as columns that grow."""

    def __init__(self) -> None:
        self.steps, self.times = array("q"), array("d")
        self.values: dict[str, array[float]] = {}

    def add(self, step: int, time: float, numbers: dict[str, float]) -> None:
        while self.steps and self.steps[-1] >= step:
            self.steps.pop()
            for column in (self.times, *self.values.values()):
                column.pop()
        for name, column in self.values.items():
            column.append(numbers.get(name, _LACKING))
        for name in numbers.keys() - self.values.keys():
            self.values[name] = array("d", [_LACKING] * len(self.steps)) + array("d", [numbers[name]])
        self.steps.append(step)
        self.times.append(time)

    def extend(self, steps: list[int], times: array[float], numbers: dict[str, array[float]]) -> None:
        """Add rows of increasing steps, which have the same numbers."""
        before = len(self.steps)
        for name in numbers.keys() - self.values.keys():
            self.values[name] = array("d", [_LACKING]) * before
        for name, column in self.values.items():
            column.extend(numbers[name] if name in numbers else array("d", [_LACKING]) * len(steps))
        self.steps.extend(steps)
        self.times.extend(times)


class History:
    """What metrics.jsonl and attempts.jsonl of a run say, up to the last `refresh`.

    Curves have the names that trackers show: `train/loss`, `test/accuracy`, `final/test/accuracy`; items of a list are
    `train/lr/0`, `train/lr/1`.
    """

    def __init__(self, run: str | Path):
        """Read the run in folder `run`. Raises UserError for a file that cannot be read as rows."""
        self.run = RunDir(run)
        self._forget()
        self.refresh()

    def _forget(self) -> None:
        self._columns: dict[str, _Columns] = {}
        self.events: list[dict[str, Any]] = []
        """All rows but those of `train`, in their order: eval, final, checkpoint, anomaly, update, …; of an evaluation
        that was made again after a rollback the later row alone."""
        self._offset, self._inode = 0, -1
        self._last = b""
        """The line before the offset."""

    def refresh(self) -> bool:
        """Read what was added, or all anew where a resumed attempt has cut the file; returns whether there was any."""
        try:
            file = self.run.metrics_path.open("rb")
        except FileNotFoundError:
            found = bool(self._offset)
            self._forget()
            return found
        with file:
            there = os.fstat(file.fileno())
            start = self._offset - len(self._last)
            if there.st_ino != self._inode or os.pread(file.fileno(), len(self._last), start) != self._last:
                self._forget()
                self._inode = there.st_ino
            if there.st_size == self._offset:
                return False
            file.seek(self._offset)
            begun = self._offset
            while lines := self._whole_lines(file):
                self._add_lines(lines)
                self._offset += sum(map(len, lines))
                self._last = lines[-1]
            file.seek(self._offset)
            while (line := file.readline(bounded.ROW + 1)).endswith(b"\n"):
                where = f"{self.run.metrics_path} at byte {self._offset}"
                self._add(metrics_row(parse_row(line, where), self.run.metrics_path))
                self._offset += len(line)
                self._last = line
            if len(line) > bounded.ROW:
                raise UserError(
                    f"{self.run.metrics_path} has a line of more than {bounded.ROW:,} bytes; take it out of the file"
                )
        return self._offset != begun

    @staticmethod
    def _whole_lines(file: BinaryIO) -> list[bytes]:
        """Return the lines that end within the next block; none where a line is longer, or has not ended yet."""
        block = file.read(_BLOCK)
        end = block.rfind(b"\n") + 1
        file.seek(end - len(block), os.SEEK_CUR)
        return [line + b"\n" for line in block[:end].split(b"\n")[:-1]]

    def _add_lines(self, lines: list[bytes]) -> None:
        """Add rows, of which most are of `train` and have the same numbers: those as columns, a tenth of the time."""
        try:
            found = [from_json(line, allow_inf_nan=False) for line in lines]
        except ValueError:
            found = [None]
        if not all(type(row) is dict for row in found):  # one by one, to name the line
            found, where = [], self._offset
            for line in lines:
                found.append(parse_row(line, f"{self.run.metrics_path} at byte {where}"))
                where += len(line)
        found = [metrics_row(row, self.run.metrics_path) for row in found]
        for _, alike in groupby(found, key=tuple):
            rows = list(alike)
            if not self._add_alike(rows):
                for row in rows:
                    self._add(row)

    def _add_alike(self, rows: list[dict[str, Any]]) -> bool:
        """Add rows that have the same keys, and return True; False, and adds none, where they need a look at each."""
        if len(rows) < 2 or any(row["event"] != "train" or row.get("split") for row in rows):
            return False
        train = self._columns.setdefault("train", _Columns())
        steps = [row["step"] for row in rows]
        if any(a >= b for a, b in pairwise([*train.steps[-1:], *steps])):
            return False
        numbers: dict[str, array[float]] = {}
        for name in rows[0]:
            if (key := one_line(name)) in _NO_CURVES:
                continue
            if key in numbers or (columns := _columns(key, [row[name] for row in rows])) is None:
                return False
            numbers |= columns
        times = _columns("time", [row.get("time") for row in rows])
        if times is None:
            return False
        if numbers:
            train.extend(steps, times.get("time", array("d", [math.nan]) * len(rows)), numbers)
        return True

    def _add(self, row: dict[str, Any]) -> None:
        event, step = row["event"], row["step"]
        if event != "train":
            if event in _EACH_STEP:
                self._drop_from(event, row.get("split"), step)
            self.events.append(row)
        group = "/".join(map(one_line, map(str, filter(None, _group(event, row.get("split"))))))
        if (numbers := _numbers(row)) and event in _EACH_STEP:
            self._columns.setdefault(group, _Columns()).add(step, _number(row.get("time")) or math.nan, numbers)

    def _drop_from(self, event: str, split: Any, step: int) -> None:
        last = next(
            (each for each in reversed(self.events) if each["event"] == event and each.get("split") == split), None
        )
        if last is not None and last["step"] >= step:
            self.events = [
                each
                for each in self.events
                if each["event"] != event or each.get("split") != split or each["step"] < step
            ]

    # ----------------------------------------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """The curves that there are."""
        return sorted(f"{group}/{name}" for group, columns in self._columns.items() for name in columns.values)

    def series(self, name: str) -> Series:
        """Return a curve, without the steps whose row lacks it; empty where there is none of this name."""
        for group, columns in self._columns.items():
            column = columns.values.get(name.removeprefix(f"{group}/")) if name.startswith(f"{group}/") else None
            if column is not None:
                steps, times = np.array(columns.steps, np.int64), np.array(columns.times)
                values = np.array(column)
                there = values.view(np.uint64) != _LACKING_BITS
                return Series(steps[there], values[there], times[there])
        return Series(np.zeros(0, np.int64), np.zeros(0), np.zeros(0))

    @property
    def nbytes(self) -> int:
        """About how many bytes of memory it takes."""
        columns = [(len(each.steps), len(each.values)) for each in self._columns.values()]
        return sum(8 * rows * (2 + names) for rows, names in columns) + 1000 * len(self.events)

    @property
    def step(self) -> int:
        """The last step that a row of training numbers is about; 0 before the first."""
        train = self._columns.get("train")
        return train.steps[-1] if train is not None and train.steps else 0

    @property
    def checkpoints(self) -> list[int]:
        """The steps that were saved, whether their checkpoints are still there or not."""
        return sorted({row["step"] for row in self.events if row["event"] == "checkpoint"})

    @property
    def attempts(self) -> list[Attempt]:
        """Every start of the run, in order."""
        return [
            Attempt(
                step=int(row.get("step") or 0),
                time=float(row.get("time") or 0.0),
                processes=int(row.get("processes") or 1),
                strategy=str(row.get("strategy") or ""),
                host=str(row.get("host") or ""),
                job=str(row["job"]) if row.get("job") else None,
            )
            for row in self.run.attempts()
        ]


def _group(event: str, split: Any) -> tuple[Any, Any]:
    if event == "eval":
        return None, split or event
    return event, split


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, value in row.items():
        key = one_line(name)
        if key in _NO_CURVES:
            continue
        if (number := _number(value)) is not None:
            found[key] = number
        elif isinstance(value, list) and all(_number(item) is not None for item in value):
            found |= {f"{key}/{index}": _number(item) or 0.0 for index, item in enumerate(value)}
    return found


def _columns(name: str, values: list[Any]) -> dict[str, array[float]] | None:
    """Return the numbers of a key in several rows, of lists each item's; None where rows need a look at each."""
    kinds = set(map(type, values))
    if kinds == {list}:
        if len(lengths := set(map(len, values))) != 1:
            return None
        found: dict[str, array[float]] = {}
        for index in range(lengths.pop()):
            if (inner := _columns(f"{name}/{index}", [value[index] for value in values])) is None or len(inner) != 1:
                return None
            found |= inner
        return found
    if list in kinds:
        return None
    with suppress(OverflowError):
        if kinds <= {int, float}:
            return {name: array("d", values)}
    numbers = [_number(value) for value in values]
    if all(number is None for number in numbers):
        return {}
    return {name: array("d", [_LACKING if number is None else number for number in numbers])}


_LACKING_BITS = 0x7FF8_0000_0000_0DE7
"""The bits of the NaN that stands for a number that a row does not have; a NaN that it has are others."""
_LACKING = struct.unpack("<d", struct.pack("<Q", _LACKING_BITS))[0]


def _number(value: Any) -> float | None:
    """Return a JSON value as a number; NaN and infinities are stored as text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, str):
        return float(value) if value in ("nan", "inf", "-inf") else None
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


# --------------------------------------------------------------------------------------------------------------------


def downsampled(x: np.ndarray, y: np.ndarray, points: int) -> tuple[np.ndarray, np.ndarray]:
    """Return at most `points` (8 or more) of the points of a curve, in their order, which draw it as all of them would.

    `x`, `y`: (n,). Of each stretch the least and the greatest value are kept, and a NaN where there is one; so are the
    first and the last point.
    """
    if points < 8:
        raise ValueError(f"points: found {points}; expected 8 or more")
    count = len(y)
    if count <= points:
        return x, y
    missing = np.isnan(y)
    stretches = (points - 2) // (3 if missing.any() else 2)
    size = -(-count // stretches)
    begins = np.arange(0, count, size)
    padded = np.full((len(begins), size), np.nan)
    padded.reshape(-1)[:count] = y
    least = np.where(np.isnan(padded), np.inf, padded).argmin(1) + begins
    greatest = np.where(np.isnan(padded), -np.inf, padded).argmax(1) + begins
    absent = np.zeros_like(padded, bool)
    absent.reshape(-1)[:count] = missing
    gaps = (absent.argmax(1) + begins)[absent.any(1)]
    kept = np.unique(np.concatenate([[0, count - 1], least, greatest, gaps]))
    return x[kept], y[kept]
