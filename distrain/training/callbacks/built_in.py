"""The built-in callbacks, in the order in which they are called: before those of the recipe."""

from __future__ import annotations

from distrain.config import Recipe
from distrain.training.callbacks.banner import Banner
from distrain.training.callbacks.base import Callback
from distrain.training.callbacks.corrupt_samples import CorruptSamples
from distrain.training.callbacks.early_stopping import EarlyStopping
from distrain.training.callbacks.profiler import Profiler
from distrain.training.callbacks.trace import Trace
from distrain.training.callbacks.trackers import MetricsLog, Terminal, Trackers, named_trackers
from distrain.training.callbacks.train_log import TrainLog


def built_in_callbacks(recipe: Recipe) -> list[Callback]:
    """Return those that a run of the recipe has, in their order. What is not in the list has no effect."""
    trace, log = Trace.from_environment(), MetricsLog()
    wanted: list[Callback | None] = [
        trace,  # first: what it waits for is no time that the loop waits for data
        log,
        Terminal(),
        Trackers(log) if named_trackers(recipe) else None,
        Banner(),
        TrainLog(),
        Profiler(recipe.train.profile) if recipe.train.profile is not None else None,
        CorruptSamples() if recipe.data.skip_corrupt else None,
        EarlyStopping() if recipe.eval.early_stop is not None else None,
    ]
    return [each for each in wanted if each is not None]
