"""The attempts of a run: when each began, how far it came, and what of it was not kept."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distrain.report.history import History
from distrain.report.status import Status
from distrain.run.attempts import EVENT, how_it_ended
from distrain.run.folder import RunDir
from distrain.run.json_files import read_rows


@dataclass(frozen=True)
class AttemptPart:
    """One attempt."""

    number: int
    """From 1."""
    step: int
    """The finished optimizer steps that it began with."""
    reached: int
    """The last step that it is known to have finished."""
    kept: int
    """The last of its steps that the run kept: those after it were trained again by the next attempt."""
    began: float
    """Seconds since 1970."""
    seconds: float
    """From its beginning to its last sign of life."""
    idle_s: float | None
    """From there to the beginning of the next attempt."""
    ended: str
    """Why it ended, as far as that is on record."""
    processes: int
    strategy: str
    host: str
    job: str | None

    @property
    def lost(self) -> int:
        """Steps that were trained again."""
        return max(0, self.reached - self.kept)


def attempt_parts(run: RunDir, history: History, status: Status) -> list[AttemptPart]:
    """Return the attempts of a run, in order.

    Each notes how far it came when the next begins. Of earlier versions, which did not, the rows of metrics.jsonl up to
    where the next one resumed are what is known.
    """
    began = history.attempts
    ended = _ended_rows(run)
    rows = sorted((time, step) for step, time in _times(history) if math.isfinite(time))
    times = [time for time, _ in rows]
    found = []
    for index, attempt in enumerate(began):
        following = began[index + 1] if index + 1 < len(began) else None
        first = bisect.bisect_left(times, attempt.time)
        end = bisect.bisect_left(times, following.time) if following is not None else len(times)
        mine = rows[first:end]
        last, reached = (mine[-1][0] if mine else attempt.time), max([attempt.step, *(step for _, step in mine)])
        if index in ended:
            last, reached = max(last, float(ended[index]["time"])), max(reached, int(ended[index]["step"]))
        kept = reached if following is None else min(following.step, reached)
        found.append(
            AttemptPart(
                number=index + 1,
                step=attempt.step,
                reached=reached,
                kept=kept,
                began=attempt.time,
                seconds=max(0.0, last - attempt.time),
                idle_s=max(0.0, following.time - last) if following is not None else None,
                ended=_ended(status) if following is None else f"interrupted; resumed from step {following.step:,}",
                processes=attempt.processes,
                strategy=attempt.strategy,
                host=attempt.host,
                job=attempt.job,
            )
        )
    return found


def _ended_rows(run: RunDir) -> dict[int, Mapping[str, Any]]:
    """Return how far each attempt came by its place, where that is on record."""
    try:
        rows = list(read_rows(run.attempts_path))
        begun = [row for row in rows if "event" not in row]
        known = {row["token"]: row for row in reversed(rows) if row.get("event") == EVENT}
        found = {place: known[row["token"]] for place, row in enumerate(begun) if row.get("token") in known}
        if begun and len(begun) - 1 not in found:
            found[len(begun) - 1] = how_it_ended(run, begun[-1])
        return {place: row for place, row in found.items() if float(row["time"]) and int(row["step"]) >= 0}
    except (KeyError, TypeError, ValueError):
        return {}


def _times(history: History) -> list[tuple[int, float]]:
    """Return (step, time) of every row that has a time."""
    train = history.series("train/loss")
    found = list(zip(train.steps.tolist(), train.times.tolist(), strict=True))
    for row in history.events:
        time = row.get("time")
        if isinstance(time, int | float):
            found.append((row["step"] if row["event"] != "final" else 0, float(time)))
    return found


def _ended(status: Status) -> str:
    return f"{status.state}: {status.message}" if status.message else status.state


def total_seconds(parts: list[AttemptPart]) -> float:
    """Return how long all attempts worked."""
    return sum(part.seconds for part in parts)
