"""When things are due, and what a run has noted on its way."""

from __future__ import annotations

import math
import signal
import time
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import FrameType
from typing import Any

from distrain.checkpoint import Criterion
from distrain.config import Duration, Horizon, UserError
from distrain.datasets.waiting import while_waiting
from distrain.system.job_environment import job_environment


class Interval:
    """Says after which steps something is due: each time `period` steps, which may be a fraction, have gone by."""

    def __init__(self, duration: Duration | None, horizon: Horizon, what: str):
        self.seconds = duration.seconds if duration is not None else None
        self._period: tuple[int, int] | None = None
        """So many steps of so many periods."""
        if duration is not None and self.seconds is None and duration.amount > 0:
            self._period = max(Fraction(1), horizon.exact_steps(duration, what)).as_integer_ratio()

    def due(self, step: int) -> bool:
        """Whether it is due after `step` finished steps."""
        if self._period is None or step == 0:
            return False
        steps, periods = self._period
        return step * periods // steps > (step - 1) * periods // steps

    def elapsed(self, since: float) -> bool:
        """Whether a period in seconds has gone by on this rank's monotonic clock."""
        return self.seconds is not None and time.monotonic() - since >= self.seconds


class StopRequest:
    """Notes SIGTERM, SIGINT, a scheduler's notice and a file that asks for a stop; in the loop all ranks decide on it.

    A second SIGINT interrupts. A request also ends a wait for loader processes that give nothing for `PATIENCE_S`, by
    `NoBatch`: the loop could not act on it there.
    """

    def __init__(self, watched: Path | None = None) -> None:
        """`watched`: the file; None on the ranks that leave looking for it to another."""
        self._noted: str | None = None
        self._watched = watched
        self._looked_at = -math.inf
        self._notice = job_environment().notice
        self._before: dict[int, Any] = {}

    @property
    def reason(self) -> str | None:
        """Why this rank wants to stop, or None."""
        if self._noted is None and self._watched is not None and time.monotonic() - self._looked_at > _LOOK_EVERY_S:
            self._looked_at = time.monotonic()
            if self._watched.exists():
                self._noted = f"the file {self._watched.name}"
        return self._noted

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT, self._notice):
            self._before[number] = signal.signal(number, self._note)
        # a launcher blocks it, so that no process dies of it before it has come here
        self._mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, [self._notice])
        while_waiting.append(self._give_up_waiting)
        return self

    def __exit__(self, *exception: object) -> None:
        while_waiting.remove(self._give_up_waiting)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._noted is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self._noted is None:
            self._noted = signal.Signals(number).name

    def _give_up_waiting(self, waited_s: float) -> None:
        if waited_s > PATIENCE_S and self.reason is not None:
            raise NoBatch(
                f"{self.reason} asks the run to stop, and its loader processes have given no batch for "
                f"{waited_s:.0f} s; it stops without one, and resumes from its newest checkpoint. If they hang, see "
                "what data.workers=0 does"
            )


class NoBatch(UserError):
    """A run that is asked to stop waits for its loader processes in vain."""

    restart = True
    """Another start may find them well."""


PATIENCE_S = 20.0
"""How long a request to stop waits for a batch that is on its way: less than most clusters give to end."""
_LOOK_EVERY_S = 0.25


@dataclass
class EvalHistory:
    """Which evaluation was best, and how long ago that was. It grows with no number of evaluations.

    Only finite numbers are scores: what is NaN or infinite is no improvement and never the best.
    """

    criterion: Criterion
    min_delta: float = 0.0
    """The least change that early stopping counts as an improvement."""
    best: tuple[int, float] | None = None
    """(step, score) of the best evaluation, the earliest of equals."""
    last: tuple[int, float] | None = None
    """The same of the last one; NaN where it has no score."""
    top: float | None = None
    """The score of the last improvement."""
    since: int = 0
    """Evaluations since then."""
    count: int = 0
    """Evaluations in all."""
    constant: bool = True
    """Whether all of them had one score."""

    @property
    def metric(self) -> str:
        """The metric that decides."""
        return self.criterion.metric

    def add(self, step: int, score: float) -> None:
        """Take up the evaluation after a step."""
        self.constant = self.constant and (self.last is None or self.last[1] == score)
        self.last, self.count = (step, score), self.count + 1
        improved = False
        if math.isfinite(score):
            improved = self.top is None or self._gain(score, self.top) > self.min_delta
            if self.best is None or self._gain(score, self.best[1]) > 0:
                self.best = (step, score)
        if improved:
            self.top = score
        # the first has nothing to be better than
        self.since = 0 if improved or self.count == 1 else self.since + 1

    def _gain(self, score: float, other: float) -> float:
        return score - other if self.criterion.higher else other - score

    def value(self) -> tuple[int, float] | None:
        """Return (step, score) of the best evaluation, the earliest of equals; None where none had a finite value."""
        return self.best

    def improved(self) -> bool:
        """Whether the last evaluation is the best."""
        return self.best is not None and self.best == self.last

    def exhausted(self, patience: int) -> bool:
        """Whether the last `patience` evaluations brought no improvement of more than `min_delta`."""
        return self.since >= patience

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of it, as JSON values."""
        values = {key: value for key, value in vars(self).items() if key != "criterion"}
        if self.last is not None and not math.isfinite(self.last[1]):
            values["last"] = [self.last[0], None]
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    def load(self, state: Any, min_delta: float) -> None:
        """Take up what `state` returned; raises ValueError, TypeError or KeyError where it is none."""
        found = {key: _pair(state[key]) for key in ("best", "last")}
        top, since, count = state["top"], state["since"], state["count"]
        if type(since) is not int or type(count) is not int or not 0 <= since <= count:
            raise ValueError("it counts no evaluations")
        self.best, self.last = found["best"], found["last"]
        self.top, self.since, self.count = None if top is None else float(top), since, count
        self.constant = state["constant"] is True
        if state["min_delta"] != min_delta:  # another measure of what an improvement is: patience begins anew
            self.top, self.since = self.best[1] if self.best is not None else None, 0


def _pair(value: Any) -> tuple[int, float] | None:
    if value is None:
        return None
    step, score = value
    if type(step) is not int or step < 0:
        raise ValueError(f"{step!r} is no step")
    return step, math.nan if score is None else float(score)
