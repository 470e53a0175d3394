"""Curves of many runs: each read once and further as it grows, and cut to the points that a picture needs."""

from __future__ import annotations

import math
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic_core import from_json

from distrain.report.history import History, Series

T = TypeVar("T")

HISTORIES_BYTES = 128 << 20
"""What whole histories may take in memory; those that were asked for the longest ago are dropped first."""
CURVES_BYTES = 256 << 20
"""What curves that were asked for may take, of runs whose history was dropped."""


SKETCHED = 96
"""Rows that are looked at for a first picture of a curve."""
_LONGEST = 1 << 16


_NONE = Series(np.zeros(0, np.int64), np.zeros(0), np.zeros(0))


@dataclass
class _Entry:
    """What is known of a run."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    history: History | None = None
    signature: tuple[int, int, int] | None = None
    """Of metrics.jsonl when it was last read."""
    curves: dict[str, Series] = field(default_factory=dict)
    """Those that were asked for, and those of evaluations, as the signature has them."""
    names: frozenset[str] | None = None
    """All that there are."""
    reading: Future[None] | None = None
    sketches: dict[tuple[tuple[int, int, int], str], Series | None] = field(default_factory=dict)
    """Of curves that were asked for before the file was read, by the file's signature and name."""
    bytes: int = 0
    """Of the history, where there is one."""

    def known(self, names: list[str], curves: dict[str, Series]) -> bool:
        """Return whether each of these is among `curves`, or known not to be there."""
        return self.names is not None and all(name in curves or name not in self.names for name in names)

    @property
    def curves_bytes(self) -> int:
        return sum(array.nbytes for curve in [*self.curves.values()] for array in curve)


def _signature(run: Path) -> tuple[int, int, int]:
    try:
        there = os.stat(run / "metrics.jsonl")
    except OSError:
        return (0, 0, 0)
    return there.st_ino, there.st_size, there.st_mtime_ns


class Curves:
    """The curves of runs, in bounded memory. For several threads."""

    def __init__(self, histories_bytes: int = HISTORIES_BYTES, curves_bytes: int = CURVES_BYTES):
        self._limits = histories_bytes, curves_bytes
        self._entries: OrderedDict[Path, _Entry] = OrderedDict()
        self._lock = threading.Lock()
        # one at a time: they are bound by this process's interpreter
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read-runs")

    def close(self) -> None:
        """Stop reading."""
        self._reader.shutdown(wait=False, cancel_futures=True)

    def _entry(self, run: Path) -> _Entry:
        with self._lock:
            entry = self._entries.setdefault(run, _Entry())
            self._entries.move_to_end(run)
            return entry

    def of_history(self, run: Path, look: Callable[[History], T]) -> T:
        """Return what `look` finds in a run's rows, read up to now, while nobody reads them further.

        Raises UserError for a file that cannot be read.
        """
        entry = self._entry(run)
        with entry.lock:
            found = look(self._read(run, entry))
        self._bound()
        return found

    def _read(self, run: Path, entry: _Entry) -> History:
        signature = _signature(run)
        history = entry.history
        if history is None:
            history = History(run)
        elif signature != entry.signature:
            history.refresh()
        if signature != entry.signature:
            # those of evaluations are short, and are asked for next
            entry.names, entry.signature = frozenset(history.names), signature
            entry.curves = {name: history.series(name) for name in entry.names if not name.startswith("train/")}
        entry.history, entry.bytes, entry.sketches = history, history.nbytes, {}
        return history

    def series(self, run: Path, names: Iterable[str]) -> dict[str, Series]:
        """Return curves of a run by name, read up to now; empty ones where there are none of the name."""
        entry = self._entry(run)
        with entry.lock:
            names = list(names)
            history, found = entry.history, entry.curves  # another thread may drop them, and none changes them
            if _signature(run) != entry.signature or (history is None and not entry.known(names, found)):
                history = self._read(run, entry)
                found = entry.curves
            if history is not None and any(name not in found for name in names):
                entry.curves = found = found | {name: history.series(name) for name in names if name not in found}
        self._bound()
        return {name: found.get(name, _NONE) for name in names}

    def series_by(self, until: float, asked: dict[Path, list[str]]) -> dict[Path, dict[str, Series] | Exception | None]:
        """Return curves of several runs as far as they are read at `until` (time.monotonic): None is not yet.

        What is not yet is read in the background. An exception is returned for a run that cannot be read.
        """
        found: dict[Path, dict[str, Series] | Exception | None] = {}
        for run, names in asked.items():
            entry = self._entry(run)
            with self._lock:
                if entry.history is None and not entry.known(names, entry.curves) and entry.reading is None:
                    entry.reading = self._reader.submit(self._read_ahead, run, names)
                reading = entry.reading
            if reading is not None:
                try:
                    reading.result(max(0.0, until - time.monotonic()))
                except TimeoutError:
                    found[run] = None
                    continue
                except Exception:
                    pass  # said below, where it is read again
                with self._lock:
                    entry.reading = None
            try:
                found[run] = self.series(run, names)
            except (ValueError, OSError) as error:
                found[run] = error
        return found

    def sketch(self, run: Path, name: str) -> Series | None:
        """Return some points of a curve of training numbers, from rows here and there in the file.

        For a first picture, until the file is read; None where such rows do not have it. Kept until then.
        """
        entry = self._entry(run)
        key = _signature(run), name
        if key not in entry.sketches:
            entry.sketches = {each: kept for each, kept in entry.sketches.items() if each[0] == key[0]}
            entry.sketches[key] = _sketched(run / "metrics.jsonl", name) if len(entry.sketches) < 64 else None
        return entry.sketches[key]

    def _read_ahead(self, run: Path, names: list[str]) -> None:
        self.series(run, names)

    def _bound(self) -> None:
        """Drop what was asked for the longest ago until the rest keeps to the limits."""
        histories, curves = self._limits
        with self._lock:
            for entry in reversed(self._entries.values()):
                if entry.history is not None:
                    histories -= entry.bytes
                    if histories < 0 and entry is not next(reversed(self._entries.values())):
                        entry.history = None
                curves -= entry.curves_bytes
                if curves < 0:
                    entry.curves = {}
            for run in [run for run, entry in self._entries.items() if entry.history is None and not entry.curves]:
                if len(self._entries) > 1000 and self._entries[run].reading is None:
                    del self._entries[run]


def _sketched(path: Path, name: str) -> Series | None:
    split, _, key = name.partition("/")
    found: list[tuple[int, float, float]] = []
    with suppress(OSError), open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        for part in range(SKETCHED):
            file.seek(size * part // SKETCHED)
            if part:
                file.readline(_LONGEST)  # a row that began before
            row: Any = None
            with suppress(ValueError):
                row = from_json(file.readline(_LONGEST))
            if not isinstance(row, dict) or row.get("event") != split or split != "train":
                continue
            step, value, at = row.get("step"), row.get(key), row.get("time")
            if type(step) is int and isinstance(value, int | float) and step > (found[-1][0] if found else -1):
                found.append((step, float(value), float(at) if isinstance(at, int | float) else math.nan))
    if len(found) < 2:
        return None
    steps, values, times = zip(*found, strict=True)
    return Series(np.array(steps, np.int64), np.array(values), np.array(times))


# --------------------------------------------------------------------------------------------------------------------
# As few points as a picture needs


Axis = Callable[[Series], np.ndarray]


def by_step(series: Series) -> np.ndarray:
    """Return the optimizer steps of a curve."""
    return series.steps.astype(np.float64)


def by_hours(start: float | None) -> Axis:
    """Return what gives the hours since `start` (seconds since 1970; None: the first point) of a curve's points.

    They never go back.
    """

    def hours(series: Series) -> np.ndarray:
        finite = series.times[np.isfinite(series.times)]
        if not len(finite):
            return np.zeros(len(series.times))
        first = float(finite[0]) if start is None else start
        times = np.where(np.isfinite(series.times), series.times, first)
        return np.maximum.accumulate((times - first) / 3600)

    return hours


@dataclass(frozen=True)
class Line:
    """A curve on the points that all of a picture share."""

    index: np.ndarray | None
    """(n,) int64: which points it has; None: all."""
    values: np.ndarray
    """(n,) float64; NaN where the run's value is NaN or infinite."""
    nonfinite: int
    """How many values are NaN or infinite in the range."""


def aligned(
    curves: Sequence[tuple[np.ndarray, np.ndarray]],
    points: int,
    low: float | None = None,
    high: float | None = None,
    *,
    means: bool = False,
) -> tuple[np.ndarray, list[Line]]:
    """Return the points that several curves share, at most `points` (8 or more) and two, and each curve on them.

    `curves`: (x, y) of each, x (n,) float64 not decreasing. `low`, `high`: what part of x is looked at, with the points
    next to it; None: all. Where the curves have more points the range is divided evenly, and of each part the least and
    the greatest value of each curve are kept, or with `means` its mean.
    """
    cut = []
    for x, y in curves:
        begin = 0 if low is None else max(0, int(np.searchsorted(x, low)) - 1)
        end = len(x) if high is None else min(len(x), int(np.searchsorted(x, high, "right")) + 1)
        cut.append((x[begin:end], y[begin:end]))
    every = [x for x, _ in cut if len(x)]
    if not every:
        return np.zeros(0), [Line(None, np.zeros(0), 0) for _ in cut]
    shared = every[0] if len(every) == 1 else None
    if shared is None and max(map(len, every)) <= points:
        shared = np.unique(np.concatenate(every))
    if shared is not None and len(shared) <= points and np.all(np.diff(shared) > 0):
        return shared, [_exact(shared, x, y) for x, y in cut]
    first, last = min(float(x[0]) for x in every), max(float(x[-1]) for x in every)
    parts = max(1, (points - 2) // 2)
    edges = np.linspace(first, last, parts + 1)
    width = (last - first) / parts or 1.0
    inner = edges[:-1]
    grid = np.concatenate([[first], np.stack([inner + 0.25 * width, inner + 0.75 * width], 1).ravel(), [last]])
    return grid, [_reduced(edges, x, y, means) for x, y in cut]


def _exact(shared: np.ndarray, x: np.ndarray, y: np.ndarray) -> Line:
    finite = np.isfinite(y)
    values = np.where(finite, y, np.nan)
    index = None if len(x) == len(shared) else np.searchsorted(shared, x)
    return Line(index, values, int(len(y) - finite.sum()))


def _reduced(edges: np.ndarray, x: np.ndarray, y: np.ndarray, means: bool) -> Line:
    if not len(x):
        return Line(np.zeros(0, np.int64), np.zeros(0), 0)
    parts = len(edges) - 1
    finite = np.isfinite(y)
    clean = np.where(finite, y, np.nan)
    begins = np.searchsorted(x, edges[:-1])
    begins[0] = 0
    counts = np.diff(np.append(begins, len(x)))
    there = np.flatnonzero(counts)
    begins, counts = begins[there], counts[there]
    if means:
        sums, known = np.add.reduceat(np.where(finite, y, 0.0), begins), np.add.reduceat(finite.astype(float), begins)
        values = np.divide(sums, known, out=np.full(len(begins), np.nan), where=known > 0)
        return Line(1 + 2 * there, values, int(len(y) - finite.sum()))
    least, greatest = np.fmin.reduceat(clean, begins), np.fmax.reduceat(clean, begins)
    falls = clean[begins] > clean[begins + counts - 1]
    pairs = np.where(falls[:, None], np.stack([greatest, least], 1), np.stack([least, greatest], 1))
    index = 1 + np.stack([2 * there, 2 * there + 1], 1)
    keep = np.stack([np.ones(len(there), bool), counts > 1], 1)
    # where they begin and end is drawn where it is
    index, values = index[keep], pairs[keep]
    if x[0] == edges[0]:
        index, values = np.append(0, index), np.append(clean[0], values)
    if x[-1] == edges[-1]:
        index, values = np.append(index, 2 * parts + 1), np.append(values, clean[-1])
    return Line(index, values, int(len(y) - finite.sum()))
