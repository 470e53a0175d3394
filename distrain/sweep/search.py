"""A search: runs whose values Optuna draws from ranges, each given the results of those before it.

What is drawn for run `n` is a function of the seed, of `n` and of the results that are there, and these are in the run
folders: a search that is interrupted goes on as if it had not been. So no study is stored; it is built from the folders
each time that it is asked.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from distrain.config import UserError
from distrain.launchers.sweeps import Axes, Range

if TYPE_CHECKING:
    import optuna

_TRIES = 50
"""How often values are drawn anew where another run has them: the same recipe again would be the same run again."""


@dataclass(frozen=True)
class Result:
    """What is known of a run of the search."""

    values: dict[str, str]
    """As it was written: value by dotted key."""
    state: Literal["running", "complete", "pruned", "failed"]
    evaluations: tuple[float, ...] = ()
    """The values of the metric, in order; of a pruned run up to the one that decided. NaN: not finite."""
    best: float | None = None
    """The best of them; None where none is finite."""


@dataclass(frozen=True)
class Search:
    """What is searched, and how results are compared."""

    axes: Axes
    seed: int
    higher: bool
    """Whether a higher metric is better."""
    parallel: bool = False
    """Whether values are drawn while other runs are under way."""

    def draw(self, results: Sequence[Result]) -> dict[str, str] | None:
        """Return the values of the run that follows these; None where no other values are found."""
        known = [result.values for result in results]
        for attempt in range(_TRIES):
            study = self._study(results, len(results) * _TRIES + attempt)
            drawn = study.ask(self._distributions()).params
            values = {key: self._text(key, drawn[key]) for key in self.axes}
            if values not in known:
                return values
        return None

    def prunes(self, results: Sequence[Result], values: dict[str, str], evaluations: Sequence[float]) -> bool:
        """Whether a run is to stop after its last evaluation: the best it had is worse than the median of the others.

        `results` are those of the other runs, each compared at the evaluation of the same number.
        """
        study = self._study([each for each in results if each.state in ("complete", "pruned")], 0)
        study.enqueue_trial(self._params(values))
        trial = study.ask(self._distributions())
        for number, value in enumerate(evaluations, 1):
            trial.report(value, number)
        with warnings.catch_warnings():  # numpy's, of a run without a finite value, which is pruned
            warnings.simplefilter("ignore", RuntimeWarning)
            return bool(trial.should_prune())

    def _study(self, results: Sequence[Result], draw: int) -> optuna.Study:
        optuna = import_optuna()
        study = optuna.create_study(
            direction="maximize" if self.higher else "minimize",
            sampler=optuna.samplers.TPESampler(
                seed=(self.seed * 1_000_003 + draw) % 2**32, constant_liar=self.parallel
            ),
            pruner=optuna.pruners.MedianPruner(),
        )
        distributions = self._distributions()
        for result in results:
            study.add_trial(_trial(result, self._params(result.values), distributions))
        return study

    def _distributions(self) -> dict[str, Any]:
        optuna = import_optuna()
        found: dict[str, Any] = {}
        for key, axis in self.axes.items():
            if not isinstance(axis, Range):
                found[key] = optuna.distributions.CategoricalDistribution(axis)
            elif axis.whole:
                found[key] = optuna.distributions.IntDistribution(int(axis.low), int(axis.high), log=axis.log)
            else:
                found[key] = optuna.distributions.FloatDistribution(axis.low, axis.high, log=axis.log)
        return found

    def _text(self, key: str, value: Any) -> str:
        axis = self.axes[key]
        return axis.text(value) if isinstance(axis, Range) else str(value)

    def _params(self, values: dict[str, str]) -> dict[str, Any]:
        return {
            key: values[key] if not isinstance(axis, Range) else int(values[key]) if axis.whole else float(values[key])
            for key, axis in self.axes.items()
        }


def _trial(result: Result, params: dict[str, Any], distributions: dict[str, Any]) -> optuna.trial.FrozenTrial:
    optuna = import_optuna()
    states = optuna.trial.TrialState
    state = {
        "running": states.RUNNING,
        "complete": states.COMPLETE if result.best is not None else states.FAIL,
        "pruned": states.PRUNED,
        "failed": states.FAIL,
    }[result.state]
    reported = dict(enumerate(result.evaluations, 1))
    last = next((value for value in reversed(result.evaluations) if math.isfinite(value)), None)
    return optuna.trial.create_trial(
        state=state,
        value=result.best if state == states.COMPLETE else last if state == states.PRUNED else None,
        params=params,
        distributions=distributions,
        intermediate_values=reported,
    )


def import_optuna() -> Any:
    """Return Optuna, which logs warnings only; raises UserError where it is not installed."""
    try:
        import optuna
    except ImportError as error:
        raise UserError(
            f"--search draws values by Optuna, which cannot be imported ({error}): pip install 'distrain[search]'"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
