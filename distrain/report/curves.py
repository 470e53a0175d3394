"""Which curves a report shows, of one run and of several: panels of curves with few points. Imports no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from distrain.report.history import History, Series, downsampled
from distrain.system.output import one_line

_NEVER = frozenset(
    ("samples", "epoch", "seconds", "corrupt_samples", "undecodable", "nonfinite", "processes", "checkpoint")
)
_TIMES = ("step_s", "data_s", "forward_backward_s", "optimizer_s", "agreement_s", "saving_s")
_ITEM = re.compile(r"/\d+$")
"""What the names of a list's items end in, as of a metric for each class."""
_MOST_CURVES = 8
"""Curves of a panel: as many as there are colours that everybody can tell apart."""
_MOST_PANELS = 60
_STRETCHES = 80
"""Points of a trend; curves of fewer than twice as many have none."""
_SMOOTH = ("Learning rate",)
_LOG_FROM = 50.0
"""Positive values that span more than this factor are drawn over a logarithmic axis."""


@dataclass(frozen=True)
class Curve:
    """Points of a curve, at most as many as were asked for; the least and the greatest of each stretch are kept."""

    name: str
    steps: list[float]
    values: list[float | None]
    """None where the value was NaN or infinite."""
    trend: tuple[list[float], list[float]] | None = None
    """Steps and medians of stretches of equal length, of a curve that may be noisy."""


@dataclass(frozen=True)
class Panel:
    """Curves over one axis."""

    title: str
    unit: str
    """Of the values; empty: none."""
    curves: list[Curve]
    log: bool = False
    """Whether the axis of the values is logarithmic."""
    note: str = ""
    zero: bool = False
    """Whether the axis begins at 0."""
    over: str = "step"
    """What the horizontal axis counts."""
    marks: bool = True
    """Whether restarts and checkpoints are marked in it."""
    dots: bool = field(default=False)
    """Whether points are drawn alone, with no line through them."""


_BUILT_IN = (
    ("Learning rate", "", ("lr",), False),
    ("Gradient norm", "", ("grad_norm",), False),
    ("Throughput", "samples/s", ("samples_per_s",), True),
    ("Throughput", "tokens/s", ("tokens_per_s",), True),
    ("Model FLOPs utilization", "", ("mfu",), True),
    ("Time of a step", "s", ("step_s",), True),
    ("Waiting for data", "share of time", ("data_wait",), True),
    ("Peak memory", "GiB", ("peak_memory_gib",), True),
)
"""Title, unit, columns of training rows, and whether the axis begins at 0."""


def panels_of(history: History, points: int) -> list[Panel]:
    """Return the panels of one run."""
    split_names = _splits(history)
    found = [_panel("Loss", "", {split: history.series(f"{split}/loss") for split in ["train", *split_names]}, points)]
    for metric in _metrics(history, split_names):
        series = {split: history.series(f"{split}/{metric}") for split in ["train", *split_names]}
        found.append(_panel(metric, "", series, points))
    for title, unit, columns, zero in _BUILT_IN:
        series = {name: history.series(f"train/{name}") for column in columns for name in _items(history, column)}
        if len(series) == 1:
            series = {title.lower(): next(iter(series.values()))}
        found.append(_panel(title, unit, series, points, zero=zero))
    used = {"loss", *_TIMES, *(column for _, _, columns, _ in _BUILT_IN for column in columns)}
    for name in _own(history, used | set(_metrics(history, split_names))):
        found.append(_panel(name, "", {"train": history.series(f"train/{name}")}, points))
    return [panel for panel in found if panel is not None][:_MOST_PANELS]


def comparing_panels(histories: Mapping[str, History], points: int) -> list[Panel]:
    """Return the panels of several runs by their names, a curve for each: what at least two of them have."""
    shown = dict(list(histories.items())[:_MOST_CURVES])
    note = f"the first {_MOST_CURVES} of {len(histories)} runs" if len(histories) > _MOST_CURVES else ""
    names: dict[str, tuple[str, str, bool]] = {"train/loss": ("Training loss", "", False)}
    for history in shown.values():
        for split in _splits(history):
            for metric in ("loss", *_metrics(history, [split])):
                names.setdefault(f"{split}/{metric}", (f"{split} {metric}", "", False))
    for title, unit, columns, zero in _BUILT_IN:
        names |= {f"train/{column}": (title, unit, zero) for column in columns}
    found = []
    for name, (title, unit, zero) in names.items():
        series = {label: history.series(name) for label, history in shown.items()}
        if sum(len(each.steps) > 1 for each in series.values()) < 2:
            continue
        found.append(_panel(title, unit, series, points, zero=zero, note=note, marks=False))
    return [panel for panel in found if panel is not None][:_MOST_PANELS]


def _splits(history: History) -> list[str]:
    """Return the splits that were evaluated more than once, the one that training is evaluated on first."""
    counts: dict[str, int] = {}
    for row in history.events:
        if row["event"] == "eval":
            split = one_line(row.get("split") or "eval")
            counts[split] = counts.get(split, 0) + 1
    return [split for split, _ in sorted(counts.items(), key=lambda each: -each[1]) if split != "train"]


def _metrics(history: History, splits: Iterable[str]) -> list[str]:
    prefixes = [f"{split}/" for split in splits]
    found = [name[len(prefix) :] for name in history.names for prefix in prefixes if name.startswith(prefix)]
    return [name for name in dict.fromkeys(found) if name != "loss" and name not in _NEVER and not _ITEM.search(name)]


def _items(history: History, column: str) -> list[str]:
    """Return the curves of a column of training rows: itself, or one for each item of its list."""
    names = [name.removeprefix("train/") for name in history.names if name.startswith("train/")]
    return [name for name in names if name == column or name.startswith(f"{column}/")]


def _own(history: History, used: set[str]) -> list[str]:
    names = [name.removeprefix("train/") for name in history.names if name.startswith("train/")]
    return [name for name in names if _ITEM.sub("", name) not in used and name not in _NEVER]


def _panel(
    title: str,
    unit: str,
    series: Mapping[str, Series],
    points: int,
    *,
    zero: bool = False,
    note: str = "",
    marks: bool = True,
) -> Panel | None:
    """Return a panel, or None where no curve of it has two points."""
    there = {name: each for name, each in series.items() if np.isfinite(each.values).sum() > 1}
    if not there:
        return None
    if len(there) > _MOST_CURVES:
        note = f"the first {_MOST_CURVES} of {len(there)} curves"
        there = dict(list(there.items())[:_MOST_CURVES])
    finite = np.concatenate([each.values[np.isfinite(each.values)] for each in there.values()])
    least, greatest = float(finite.min()), float(finite.max())
    if title == "Peak memory" and greatest - least < 0.05 * greatest:
        return None  # a number says it
    log = not zero and title != "Learning rate" and least > 0 and greatest / least > _LOG_FROM
    missing = sum(int((~np.isfinite(each.values)).sum()) for each in there.values())
    if missing:
        note = "; ".join(filter(None, (note, f"{missing:,} values are NaN or infinite")))
    return Panel(
        title,
        unit,
        [_curve(name, each, points, noisy=title not in _SMOOTH) for name, each in there.items()],
        log,
        note,
        zero,
        marks=marks,
    )


def _curve(name: str, series: Series, points: int, *, noisy: bool) -> Curve:
    values = np.where(np.isfinite(series.values), series.values, np.nan)
    trend = _trend(series.steps, values) if noisy else None
    steps, values = downsampled(series.steps, values, points)
    return Curve(name, steps.tolist(), [None if math.isnan(each) else _short(each) for each in values.tolist()], trend)


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def _trend(steps: np.ndarray, values: np.ndarray) -> tuple[list[float], list[float]] | None:
    """Return the medians of stretches, of steps and of values; None for few points."""
    there = np.isfinite(values)
    steps, values = steps[there], values[there]
    if len(values) < 2 * _STRETCHES:
        return None
    size = len(values) // _STRETCHES
    ends = len(values) // size * size
    middle = np.median(values[:ends].reshape(-1, size), axis=1)
    at = np.median(steps[:ends].reshape(-1, size), axis=1)
    return at.tolist(), [_short(each) for each in middle.tolist()]
