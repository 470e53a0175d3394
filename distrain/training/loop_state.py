"""What the parts of the loop share: one attempt at a run, its step, and whether it is to end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from distrain.config import Recipe
from distrain.datasets.base import Data
from distrain.parallel import World
from distrain.run.folder import RunDir
from distrain.training.callbacks.dispatch import Callbacks
from distrain.training.callbacks.trackers import Telemetry
from distrain.training.context import TrainContext
from distrain.training.corrupt_samples import CorruptSamples
from distrain.training.intervals import StopRequest
from distrain.training.setup import TrainSetup

_ELSEWHERE = "a request on another rank"


@dataclass
class LoopState:
    """Alike on all ranks, but for `stop`, and `telemetry`, which writes on rank 0 alone."""

    run: RunDir
    recipe: Recipe
    world: World
    stop: StopRequest
    """What this rank was asked for."""
    fence: Callable[[], None]
    """Called before anything is written into the run; raises when this process may write no more."""
    setup: TrainSetup
    corrupt: CorruptSamples
    started: float
    """On this rank's monotonic clock."""
    telemetry: Telemetry = field(default_factory=lambda: Telemetry(None, None, []))
    """Says and writes nothing until everything else is built."""
    callbacks: Callbacks = field(init=False)
    """Those of the recipe, and more that were given."""
    stopping: str = ""
    """Why the run is left, to be resumed by the same command."""
    ended_early: bool = False
    """Whether training ends before its last step, and the run with it."""
    ended_by_callback: bool = False
    """Whether that is what a callback asked for."""

    @property
    def t(self) -> TrainContext:
        """What a step needs, with the number of finished steps."""
        return self.setup.training

    @property
    def data(self) -> Data:
        """The splits."""
        return self.setup.feed.data

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.setup.feed.total_steps

    def ended_state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps for a start that resumes where callbacks have ended training."""
        return {"ended": self.recipe.model_dump(mode="json").get("callbacks", [])} if self.ended_by_callback else {}

    def resume_end(self, has_callbacks: bool) -> None:
        """End training where the checkpoint says that the same callbacks have ended it."""
        then = self.setup.resumed.scalars.get("ended") if self.setup.resumed is not None else None
        self.ended_by_callback = has_callbacks and then is not None
        self.ended_by_callback = self.ended_by_callback and then == self.ended_state()["ended"]
        self.ended_early = self.ended_early or self.ended_by_callback

    def at_end(self) -> bool:
        """Whether no step follows this one."""
        return self.t.step >= self.total_steps or bool(self.stopping) or self.ended_early

    def heed_stop(self) -> None:
        """Leave the run, as some rank was asked to."""
        self.stopping = self.stopping or self.stop.reason or _ELSEWHERE

    def say(self, text: str) -> None:
        """Tell the person in front of the terminal, once."""
        self.telemetry.say(text)
