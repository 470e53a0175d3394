"""Early stopping: training ends where `eval.early_stop` has seen enough evaluations without an improvement."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distrain.training.callbacks.base import Callback, CallbackRun


class EarlyStopping(Callback):
    """Ends training after `patience` evaluations that were no improvement by more than `min_delta`."""

    def on_start(self, run: CallbackRun) -> None:
        """End it before the first step, where a run was stopped between its last evaluation and its end."""
        self._run = run
        self._end_if_exhausted()

    def on_evaluate(self, split: str, values: Mapping[str, Any]) -> None:
        """Look at what the evaluation has brought."""
        self._end_if_exhausted()

    def _end_if_exhausted(self) -> None:
        section, evaluations = self._run.recipe.eval.early_stop, self._run.evaluations
        if section is not None and evaluations.exhausted(section.patience):
            self._run.request_stop(
                f"early stopping: {evaluations.metric} has not improved by more than {section.min_delta:g} in "
                f"{section.patience} evaluations",
                finish=True,
            )
