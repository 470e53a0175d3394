"""When things are due, and what a run has noted on its way."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from distrain.config import Duration, Horizon, Recipe, UserError
from distrain.datasets.loading import waited_s
from distrain.heartbeat import mark
from distrain.metrics import MetricSet, higher_is_better
from distrain.rundir import RunDir
from distrain.strategy import World

T = TypeVar("T")


class Every:
    """Says after which steps something is due: each time `period` steps, which may be a fraction, have gone by."""

    def __init__(self, duration: Duration | None, horizon: Horizon, what: str):
        self.seconds = duration.seconds if duration is not None else None
        self._period: Fraction | None = None
        if duration is not None and self.seconds is None and duration.amount > 0:
            self._period = max(Fraction(1), horizon.exact_steps(duration, what))

    def due(self, step: int) -> bool:
        """Whether it is due after `step` finished steps."""
        if self._period is None or step == 0:
            return False
        steps, periods = self._period.numerator, self._period.denominator
        return step * periods // steps > (step - 1) * periods // steps

    def elapsed(self, since: float) -> bool:
        """Whether a period in seconds has gone by on this rank's monotonic clock."""
        return self.seconds is not None and time.monotonic() - since >= self.seconds


class StopRequest:
    """Notes SIGTERM, SIGINT, SIGUSR1 and a file that asks for a stop; the loop makes that a decision of all ranks.

    A second SIGINT interrupts. A signal also ends a wait for loader processes that give nothing for `PATIENCE_S`, by
    `NoBatch`: the loop could not heed it there.
    """

    _SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self, watched: Path | None = None) -> None:
        """`watched`: the file; None on the ranks that leave looking for it to another."""
        self._noted: str | None = None
        self._watched = watched
        self._looked_at = -math.inf
        self._before: dict[int, Any] = {}
        self._left = threading.Event()

    @property
    def reason(self) -> str | None:
        """Why this rank wants to stop, or None."""
        if self._noted is None and self._watched is not None and time.monotonic() - self._looked_at > _LOOK_EVERY_S:
            self._looked_at = time.monotonic()
            if self._watched.exists():
                self._noted = f"the file {self._watched.name}"
        return self._noted

    def __enter__(self) -> StopRequest:
        for number in self._SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        # a launcher blocks it, so that no process dies of it before it has come here
        self._mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])
        return self

    def __exit__(self, *exception: object) -> None:
        self._left.set()
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._noted is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self._noted is None:
            self._noted = signal.Signals(number).name
            threading.Thread(target=self._insist, args=(number,), name="stop", daemon=True).start()
        elif waited_s() > PATIENCE_S:
            raise NoBatch(
                f"{self._noted} asks the run to stop, and its loader processes have given no batch for "
                f"{waited_s():.0f} s; it stops without one, and resumes from its newest checkpoint. If they hang, see "
                "what data.workers=0 does"
            )

    def _insist(self, number: int) -> None:
        """Signal the main thread once more where it waits for loader processes in vain."""
        while not self._left.wait(PATIENCE_S / 20):
            if waited_s() > PATIENCE_S:
                signal.pthread_kill(threading.main_thread().ident or 0, number)
                return


class NoBatch(UserError):
    """A run that is asked to stop waits for its loader processes in vain."""

    restart = True
    """Another start may find them well."""


PATIENCE_S = 20.0
"""How long a request to stop waits for a batch that is on its way: less than most clusters give to end."""
_LOOK_EVERY_S = 0.25


@dataclass
class Best:
    """The evaluations so far, and which was best. Read back from metrics.jsonl, so nothing of it is state."""

    metric: str
    higher: bool
    scores: list[tuple[int, float]] = field(default_factory=list)

    @classmethod
    def of(cls, recipe: Recipe, metrics: MetricSet, run: RunDir, world: World, step: int) -> Best:
        """Take up the scores of this run up to `step`."""
        name = (recipe.eval.best or "loss").removeprefix("-")
        best = cls(name, higher_is_better(recipe.eval.best or "loss", metrics))
        rows = world.first(
            # a recipe that was changed may ask for a metric that was not computed before
            lambda: [
                (row["step"], row[name])
                for row in run.rows()
                if row["event"] == "eval" and row["step"] <= step and name in row
            ]
        )
        best.scores = [(at, float(score)) for at, score in rows]
        return best

    def _key(self, scored: tuple[int, float]) -> float:
        score = scored[1]
        if math.isnan(score):
            return -math.inf
        return score if self.higher else -score

    def value(self) -> tuple[int, float] | None:
        """Return (step, score) of the best evaluation, the earliest of equals."""
        return max(self.scores, key=self._key, default=None)

    def improved(self) -> bool:
        """Whether the last evaluation is the best."""
        return bool(self.scores) and self.value() == self.scores[-1]

    def exhausted(self, patience: int, min_delta: float) -> bool:
        """Whether the last `patience` evaluations brought no improvement of more than `min_delta`."""
        top, since = -math.inf, 0
        for scored in self.scores:
            if self._key(scored) > top + min_delta or top == -math.inf:
                top, since = self._key(scored), 0
            else:
                since += 1
        return since >= patience


class Waited:
    """Measures how long a loop waits for its batches."""

    def __init__(self) -> None:
        self._seconds = 0.0

    def during(self, items: Iterator[T]) -> Iterator[T]:
        """Yield the same."""
        while True:
            mark("data")
            began = time.perf_counter()
            try:
                item = next(items)
            except StopIteration:
                return
            finally:
                self._seconds += time.perf_counter() - began
            yield item

    def take(self) -> float:
        """Return the seconds since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds
