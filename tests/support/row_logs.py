"""The callbacks that write rows, called as a run of one process calls them, without a model or a step."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from distrain.config import Horizon, Recipe
from distrain.run.folder import RunDir
from distrain.training.callbacks.base import CallbackRun, Outcome
from distrain.training.callbacks.dispatch import Callbacks
from distrain.training.callbacks.trackers import MetricsLog, Trackers


class OneProcess:
    """A world of one process, as far as callbacks ask it for anything."""

    def __init__(self, rank: int = 0) -> None:
        self.rank, self.world_size = rank, 1

    def run_on_all(self, action: Any) -> Any:
        return action()

    def gather(self, value: Any) -> list[Any]:
        return [value]


class RowLogs:
    """Those of one attempt, from `start_step` on, with what a checkpoint of it has kept."""

    def __init__(
        self, run: RunDir, recipe: Recipe, start_step: int = 0, history: Mapping[str, Any] | None = None, rank: int = 0
    ) -> None:
        self.log = MetricsLog()
        self.trackers = Trackers(self.log)
        self.context: Any = SimpleNamespace(
            run=run, fence=lambda: None, t=SimpleNamespace(step=start_step), total_steps=1000
        )
        world: Any = OneProcess(rank)
        self.callbacks = Callbacks([self.log, self.trackers], {}, recipe, world)
        self.context.write_row = self.callbacks.row
        self.callbacks.attach(lambda: self._view(recipe, rank), lambda asked: None)
        self.callbacks.load_history(history or {})
        self.callbacks.start_built_in()

    def _view(self, recipe: Recipe, rank: int) -> CallbackRun:
        nothing: Any = None
        return CallbackRun(
            recipe=recipe, rank=rank, world_size=1, strategy="single", folder=self.context.run.path, device=nothing,
            model=nothing, optimizer=nothing, horizon=Horizon(1, None, None, 1000), resumed_step=None,
            context=self.context,
        )  # fmt: skip

    def write(self, row: dict[str, Any]) -> None:
        self.callbacks.row(row)

    def saved_at(self, step: int) -> dict[str, Any]:
        """Return what a checkpoint of `step` keeps."""
        self.context.t.step = step
        return self.callbacks.history()

    def close(self) -> None:
        self.callbacks.close(Outcome("stopped", self.context.t.step))
