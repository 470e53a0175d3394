"""What differs between the recipes of runs, and what came of each."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distrain.checkpoint import CheckpointError, criterion_of, list_checkpoints, read_manifest
from distrain.report.attempts import attempt_parts, total_seconds
from distrain.report.history import History
from distrain.report.recipe_rows import recipe_rows
from distrain.report.status import statuses
from distrain.run.evaluations import best_of_evaluations, value_of
from distrain.run.folder import RunDir
from distrain.system.numbers import number
from distrain.system.terminal import Table

ABSENT = "–"
"""Stands for a value that a run does not have."""


@dataclass(frozen=True)
class Difference:
    """A key of the recipe, or a fact of the start, that is not the same in all runs."""

    key: str
    values: list[str]
    """One for each run, as an override writes it."""


@dataclass(frozen=True)
class Outcome:
    """A number that came of the runs."""

    name: str
    values: list[float | int | str | None]
    """One for each run."""
    best: list[int]
    """Which of the runs have the best; empty where no direction is better, or all are alike."""


@dataclass(frozen=True)
class Comparison:
    """Runs side by side."""

    runs: list[str]
    """Their names, each once."""
    differences: list[Difference]
    outcomes: list[Outcome]
    same: int
    """Keys of the recipe that are alike in all runs."""
    problems: list[str]
    """Recipes that could not be read, and why."""


_IGNORED = frozenset(("name",))
_MOST_METRICS = 40


def compare_runs(folders: Sequence[Path], names: Sequence[str], histories: Sequence[History]) -> Comparison:
    """Return what differs between runs, and what came out. Raises UserError for what is no run."""
    recipes: list[dict[str, str]] = []
    problems = []
    for folder, name in zip(folders, names, strict=True):
        rows, _, problem = recipe_rows(RunDir(folder))
        recipes.append({row.key: row.value for row in rows})
        if problem is not None:
            problems.append(f"{name}: {problem}")
    keys = list(dict.fromkeys(key for recipe in recipes for key in recipe))
    differences = []
    for key in keys:
        values = [recipe.get(key, ABSENT) for recipe in recipes]
        if len(set(values)) > 1 and key not in _IGNORED:
            differences.append(Difference(key, values))
    same = sum(len({recipe.get(key) for recipe in recipes}) == 1 for key in keys)
    starts = [_start(RunDir(folder)) for folder in folders]
    facts = {
        key: [start.get(key, ABSENT) for start in starts] for key in dict.fromkeys(k for each in starts for k in each)
    }
    differences += [Difference(key, values) for key, values in facts.items() if len(set(values)) > 1]
    return Comparison(
        list(names),
        differences,
        _outcomes([_Run(*each) for each in zip(folders, histories, strict=True)]),
        same,
        problems,
    )


def _start(run: RunDir) -> dict[str, str]:
    """Return what a run's start had besides its recipe."""
    if not run.launch_path.exists():
        return {}
    launch = run.launch()
    return {
        "processes": str(launch.processes),
        "strategy": launch.strategy,
        "git commit": launch.commit or ABSENT,
        **{f"version of {package}": version for package, version in launch.versions.items()},
    }


class _Run:
    """A run, with what came of it."""

    def __init__(self, folder: Path, history: History):
        [self.status] = statuses(folder)
        self.run, self.history = RunDir(folder), history
        self.criterion = criterion_of(self.run.checkpoints)
        self.parts = attempt_parts(self.run, history, self.status)

    def best(self, metric: str, higher: bool) -> float | None:
        """Return the best evaluation of a metric by the split that training is evaluated on."""
        finished = self.run.finished or {}
        if self.criterion is not None and self.criterion.metric == metric and "best" in finished:
            return finished["best"]["value"] if finished["best"] is not None else None
        found = [(int(row["step"]), value_of(row, metric)) for row in self.history.events if row["event"] == "eval"]
        best = best_of_evaluations(found, higher=higher)
        return best[1] if best is not None else None

    def directions(self) -> dict[str, bool]:
        """Return for each metric of the newest checkpoint whose direction is known whether higher is better."""
        for info in list_checkpoints(self.run.checkpoints):
            with suppress(CheckpointError):
                if (evaluation := read_manifest(info.path).evaluation) is not None:
                    return evaluation.higher
        return {}

    def final(self) -> dict[str, float]:
        """Return what the exported model came to, by SPLIT METRIC."""
        found: dict[str, float] = {}
        for row in self.history.events:
            if row["event"] == "final":
                numbers = {name: value for name, value in row.items() if isinstance(value, int | float)}
                split = row.get("split", "test")
                found |= {f"{split} {name}": value for name, value in numbers.items() if name not in _NO_METRICS}
        return found

    def last(self, name: str) -> float | None:
        """Return the last finite value of a curve."""
        values = self.history.series(name).values
        values = values[np.isfinite(values)]
        return float(values[-1]) if len(values) else None

    def median(self, name: str) -> float | None:
        """Return the median of the finite values of a curve."""
        values = self.history.series(name).values
        values = values[np.isfinite(values)]
        return float(np.median(values)) if len(values) else None


_NO_METRICS = ("step", "time", "seconds", "samples", "corrupt_samples", "undecodable", "nonfinite")


def _outcomes(runs: Sequence[_Run]) -> list[Outcome]:
    """Return what came of the runs, each with which are the best where a direction is known."""
    directions = {run.criterion.metric: run.criterion.higher for run in runs if run.criterion is not None}
    known = {"loss": False} | {name: up for run in runs for name, up in run.directions().items()} | directions
    found = [
        Outcome("state", [run.status.state for run in runs], []),
        Outcome("steps", [run.status.step for run in runs], []),
    ]

    def add(name: str, values: list[float | int | None], higher: bool | None = None) -> None:
        if all(value is None for value in values):
            return
        finite = [value for value in values if value is not None and math.isfinite(value)]
        compared = higher is not None and len(finite) > 1
        top = (max(finite) if higher else min(finite)) if compared else None
        # what looks alike is alike
        best = [place for place, value in enumerate(values) if value is not None and number(value) == number(top)]
        best = best if top is not None else []
        found.append(Outcome(name, list(values), best if len(best) < len(values) else []))

    for metric, higher in directions.items():
        add(f"best {metric}", [run.best(metric, higher) for run in runs], higher)
    if "loss" not in directions:
        add("best evaluation loss", [run.best("loss", False) for run in runs], False)
    finals = [run.final() for run in runs]
    for name in list(dict.fromkeys(name for each in finals for name in each))[:_MOST_METRICS]:
        metric = name.partition(" ")[2]
        add(name, [each.get(name) for each in finals], known.get(metric))
    add("last training loss", [run.last("train/loss") for run in runs], False)
    add("samples/s", [run.median("train/samples_per_s") for run in runs], True)
    add("tokens/s", [run.median("train/tokens_per_s") for run in runs], True)
    add("seconds of work", [round(total_seconds(run.parts), 1) for run in runs])
    peaks = [run.history.series("train/peak_memory_gib").values for run in runs]
    add("peak memory, GiB", [float(np.nanmax(each)) if len(each) else None for each in peaks], False)
    add("restarts", [max(0, len(run.parts) - 1) for run in runs])
    return found


# --------------------------------------------------------------------------------------------------------------------
# As people read it


def comparison_lines(found: Comparison, holds: Callable[[Table], bool] = lambda table: True) -> list[Table | str]:
    """Return a comparison as tables and lines for a terminal.

    Where `holds` says that a table is too wide, runs are named by numbers, and as many stand side by side as fit.
    """
    said: list[Table | str] = list(found.problems)
    names = found.runs
    everyone = list(range(len(names)))
    if not holds(_table(found, everyone, names)):
        numbered = [f"#{place + 1}" for place in everyone]
        said += [f"{number}  {name}" for number, name in zip(numbered, names, strict=True)]
        names = numbered
    remaining = everyone
    while remaining:
        count = len(remaining)
        while count > 1 and not holds(_table(found, remaining[:count], names)):
            count -= 1
        said += ["", _table(found, remaining[:count], names)]
        remaining = remaining[count:]
    said.append("")
    said.append(f"{found.same} keys of the recipes are alike; * marks the best of a row")
    return said


def _table(found: Comparison, places: Sequence[int], names: Sequence[str]) -> Table:
    shown = Table(box=None, pad_edge=False, header_style="bold")
    shown.add_column("")
    for place in places:
        shown.add_column(names[place], justify="right")
    for each in found.differences:
        shown.add_row(each.key, *(_within(each.values[place]) for place in places))
    if found.differences:
        shown.add_row(*[""] * (len(places) + 1))
    for outcome in found.outcomes:
        marked = [f"{number(outcome.values[place])}{'*' if place in outcome.best else ''}" for place in places]
        shown.add_row(outcome.name, *marked)
    return shown


_LONGEST = 28


def _within(value: str) -> str:
    """Return a long value without its middle: what differs is mostly at an end."""
    return value if len(value) <= _LONGEST else f"{value[:12]}…{value[-15:]}"
