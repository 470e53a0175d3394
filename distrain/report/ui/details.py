"""What the page of a run shows besides its curves: recipe, attempts, ranks, logs, checkpoints. All of it JSON."""

from __future__ import annotations

import math
import os
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distrain.checkpoint import CheckpointError, list_checkpoints, read_manifest
from distrain.checkpoints.format import Manifest
from distrain.config.yaml import load_recipe
from distrain.config.yaml import show as shown
from distrain.report.history import History
from distrain.report.logs import log_file
from distrain.report.ui.runs import Runs
from distrain.run.folder import RunDir
from distrain.run.heartbeat import Heartbeat, read_heartbeats
from distrain.system import bounded_json as bounded
from distrain.system.errors import UserError
from distrain.system.output import lines, one_line

LOG_BYTES = 64 << 10
"""How much of a log is sent at a time."""
MOST_CHECKPOINTS = 100
MOST_EVENTS = 200
_NOT_EVENTS = ("eval", "final", "checkpoint")


def about(run: RunDir) -> dict[str, Any]:
    """Return a run's recipe as its file has it, how it was launched, and how it ended."""
    found: dict[str, Any] = {"recipe": "", "launch": None, "attempts": [], "finished": None, "effect": None}
    with suppress(OSError, ValueError):
        found["recipe"] = lines(bounded.read_bounded(run.recipe_path).decode("utf-8", "backslashreplace"))
    with suppress(UserError):
        launch = asdict(run.launch())
        launch.pop("request", None)
        found["launch"] = launch
    with suppress(UserError):
        found["attempts"] = [
            {key: row.get(key) for key in ("time", "step", "processes", "strategy", "host", "job", "restart")}
            for row in run.attempts()
        ]
    with suppress(UserError):
        found["effect"] = _scalars(run.effect() or {})
    if (finished := run.finished) is not None:
        best = finished.get("best")
        found["finished"] = {
            "summary": _scalars(finished) | ({"best": best} if isinstance(best, dict) else {}),
            "splits": {
                name: _scalars(finished[name]) for name in ("valid", "test") if isinstance(finished.get(name), dict)
            },
        }  # fmt: skip
    if (failed := run.failed) is not None:
        found["failed"] = {key: lines(str(value)) for key, value in failed.items() if isinstance(value, str | int)}
    return found


def _scalars(values: dict[str, Any]) -> dict[str, Any]:
    return {one_line(key): value for key, value in values.items() if isinstance(value, str | int | float | bool)}


class Recipes:
    """The recipes of runs; what a file says is kept until it is written again."""

    def __init__(self, most: int = 1000):
        self._most = most
        self._known: OrderedDict[tuple[Path, int, int], dict[str, str]] = OrderedDict()

    def values(self, run: Path) -> dict[str, str]:
        """Return a recipe's values by dotted key, as an override would write them. Raises UserError and OSError."""
        path = run / "recipe.yaml"
        there = os.stat(path)
        key = (path, there.st_mtime_ns, there.st_size)
        if (known := self._known.get(key)) is None:
            known = self._known[key] = {key: value for key, value, _ in shown(load_recipe(path))}
            while len(self._known) > self._most:
                self._known.popitem(last=False)
        return known


def differing(recipes: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
    """Return the keys whose values are not the same in all recipes, and the values (None: a recipe has no such key)."""
    keys = dict.fromkeys(key for recipe in recipes for key in recipe)
    rows = [{"key": key, "values": [recipe.get(key) for recipe in recipes]} for key in keys]
    return [row for row in rows if len(set(row["values"])) > 1]


def happened(history: History) -> dict[str, Any]:
    """Return the names of the curves, the steps that a picture marks, and the last events."""
    starts = [asdict(attempt) for attempt in history.attempts]
    events = [row for row in history.events if row["event"] not in _NOT_EVENTS]
    return {
        "names": history.names,
        "attempts": starts,
        "checkpoints": history.checkpoints[-1000:],
        "rollbacks": [row["step"] for row in events if row.get("action") == "rollback"][-1000:],
        "events": [_event(row) for row in events[-MOST_EVENTS:]],
        "events_before": max(0, len(events) - MOST_EVENTS),
        "start": starts[0]["time"] if starts else None,
    }  # fmt: skip


def _event(row: dict[str, Any]) -> dict[str, Any]:
    return {
        one_line(key): value if isinstance(value, int | float) else one_line(value)[:2000] for key, value in row.items()
    }


# --------------------------------------------------------------------------------------------------------------------


def ranks(run: RunDir) -> list[dict[str, Any]]:
    """Return what each rank last wrote, with its own work in seconds of a step by phase."""
    return [_rank(beat) for beat in read_heartbeats(run)]


def _rank(beat: Heartbeat) -> dict[str, Any]:
    steps = max(1, beat.steps - 1)  # the first is not counted
    work = {
        one_line(phase): seconds / steps
        for phase, seconds in beat.work.items()
        if isinstance(seconds, int | float) and math.isfinite(seconds)
    }
    return {
        "rank": beat.rank,
        "host": one_line(beat.host),
        "pid": beat.pid,
        "step": beat.step,
        "phase": one_line(beat.phase),
        "where": one_line(beat.where()),
        "seconds": beat.seconds,
        "idle": beat.idle,
        "age": beat.age_s(),
        "interval": beat.interval,
        "stalled": beat.stalled is not None,
        "work": work,
    }


# --------------------------------------------------------------------------------------------------------------------


class Checkpoints:
    """The checkpoints of runs; what a manifest says is kept, as it does not change."""

    def __init__(self, most: int = 2000):
        self._most = most
        self._known: OrderedDict[tuple[Path, int], dict[str, Any]] = OrderedDict()

    def of(self, run: RunDir) -> dict[str, Any]:
        """Return a run's newest checkpoints and how many there are before them."""
        try:
            every = list_checkpoints(run.checkpoints)
        except CheckpointError as error:
            return {"checkpoints": [], "before": 0, "problem": one_line(error)}
        rows = [self._one(info.path, info.step) for info in every[:MOST_CHECKPOINTS]]
        return {"checkpoints": rows, "before": len(every) - len(rows)}

    def _one(self, path: Path, step: int) -> dict[str, Any]:
        try:
            key = (path, os.stat(path).st_mtime_ns)
            if (known := self._known.get(key)) is not None:
                return known
            manifest = read_manifest(path)
        except (CheckpointError, OSError) as error:
            return {"name": path.name, "step": step, "problem": one_line(error)}
        found = {
            "name": path.name,
            "step": manifest.step,
            "bytes": sum(file.size for file in manifest.files),
            "files": len(manifest.files),
            "world": manifest.world_size,
            "strategy": manifest.strategy,
            "metric": manifest.metric,
            "value": _value(manifest),
            "created": manifest.created,
        }
        self._known[key] = found
        while len(self._known) > self._most:
            self._known.popitem(last=False)
        return found


def _value(manifest: Manifest) -> float | None:
    """Return the value of the metric that ranks checkpoints."""
    if manifest.evaluation is None:
        return manifest.score
    return manifest.evaluation.values.get(manifest.evaluation.criterion.metric)


# --------------------------------------------------------------------------------------------------------------------


def logs_of(run: RunDir) -> list[str]:
    """Return which logs a run has: `job`, and the number of each rank."""
    ranks = sorted(
        int(number) for path in run.path.glob("log-rank-*.txt") if (number := path.stem[len("log-rank-") :]).isdecimal()
    )
    with suppress(UserError):
        if log_file(run.path).parent != run.path:
            return ["job", *map(str, ranks)]
    return [*map(str, ranks)]


def log(runs: Runs, run: Path, which: str, *, begin: int | None, end: int | None) -> dict[str, Any]:
    """Return a part of a log: from byte `begin`, or the LOG_BYTES before `end` (None: the end of the file).

    Control characters are escaped. `which`: `job`, or a rank. Raises UserError where there is no such log.
    """
    if which != "job" and not (which.isdecimal() and which.isascii() and len(which) < 10):
        raise UserError("there is no such log")
    path = runs.inside(log_file(run, None if which == "job" else int(which)))
    try:
        with open(bounded.open_regular(path), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if begin is not None and begin <= size:
                start = begin
            else:
                end = size if end is None else min(end, size)
                start = max(0, end - LOG_BYTES)
            file.seek(start)
            content = file.read(LOG_BYTES if begin is not None or end is None else end - start)
    except (OSError, ValueError) as error:
        raise UserError(f"{path.name} cannot be read: {error}") from error
    if begin is None and start > 0:  # a line that began before
        first = content.find(b"\n") + 1
        start, content = start + first, content[first:]
    # what is being written may end within a character
    whole = content[: content.rfind(b"\n") + 1] or (content if len(content) == LOG_BYTES else b"")
    text = lines(whole.decode("utf-8", "backslashreplace"))
    return {"begin": start, "end": start + len(whole), "size": size, "text": text, "name": path.name}
