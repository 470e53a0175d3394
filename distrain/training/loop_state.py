"""What the parts of the loop share: what one attempt at a run is made of, and what changes between its steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from distrain.config import Recipe
from distrain.datasets.base import Data
from distrain.parallel import World
from distrain.run.folder import RunDir
from distrain.training.callbacks.dispatch import Callbacks
from distrain.training.context import PendingMetrics, TrainContext
from distrain.training.intervals import EvalHistory, StopRequest
from distrain.training.setup import TrainSetup

if TYPE_CHECKING:
    from distrain.training.evaluator import Evaluator
    from distrain.training.saving import Checkpoints

_ELSEWHERE = "a request on another rank"


@dataclass
class LoopState:
    """What changes between steps, besides the training state; alike on all ranks.

    A resume and a rollback make a new one from a checkpoint, by the same function.
    """

    evaluations: EvalHistory
    """Which was best, and how long ago that was."""
    scores: dict[str, float | None] = field(default_factory=dict)
    """Of the checkpoints that were there, by their names."""
    evaluated_step: int = -1
    """Of the last evaluation; -1: there was none."""
    evaluation: dict[str, Any] | None = None
    """The values of that step's evaluation; None where another attempt made it."""
    saved_step: int = -1
    """Of the newest checkpoint; -1: there is none of this state."""
    save_requested: bool = False
    """Whether ranks have agreed that a checkpoint is due by the time."""
    pending: PendingMetrics | None = None
    """Of the last step, where its metrics were not read yet."""
    stop_reason: str = ""
    """Why the run is left, to be resumed by the same command."""
    ended_early: bool = False
    """Whether training ends before its last step, and the run with it."""


@dataclass
class RunContext:
    """What one attempt is made of. Fixed from the first step on, but for `state`, and what a step changes in `t`."""

    run: RunDir
    recipe: Recipe
    world: World
    stop: StopRequest
    """What this rank was asked for."""
    fence: Callable[[], None]
    """Called before anything is written into the run; raises when this process may write no more."""
    setup: TrainSetup
    callbacks: Callbacks
    started: float
    """On this rank's monotonic clock."""
    state: LoopState = field(init=False)
    evaluator: Evaluator = field(init=False)
    checkpoints: Checkpoints = field(init=False)

    @cached_property
    def t(self) -> TrainContext:
        """What a step needs, with the number of finished steps."""
        return self.setup.training

    @property
    def data(self) -> Data:
        """The splits."""
        return self.setup.feed.data

    @cached_property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.setup.feed.total_steps

    @property
    def stopping(self) -> str:
        """Why the run is left after this step, to be resumed by the same command; empty where it is not."""
        planned = self.callbacks.plan.stop
        if self.state.stop_reason or planned is None:
            return self.state.stop_reason
        step, reason = planned
        return reason if step <= self.t.step < self.total_steps else ""

    def at_end(self) -> bool:
        """Whether no step follows this one."""
        return self.t.step >= self.total_steps or bool(self.stopping) or self.state.ended_early

    def stop_as_requested(self) -> None:
        """Leave the run after this step, as some rank was asked to."""
        self.state.stop_reason = self.stopping or self.stop.reason or _ELSEWHERE

    def write_row(self, row: dict[str, Any]) -> None:
        """Write a row of metrics.jsonl, with at least `event` and `step`; on rank 0."""
        self.callbacks.row(row)
