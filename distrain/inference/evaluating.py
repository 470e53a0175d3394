"""The metrics of a checkpoint on a split."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from distrain.config import UserError
from distrain.datasets.base import warnings_of
from distrain.diagnose.index_errors import explaining_errors
from distrain.inference.trained import Trained, batch_size_of, log_error
from distrain.metrics import build_metrics
from distrain.run import heartbeat
from distrain.training.evaluation import evaluate

logger = logging.getLogger(__name__)


def evaluate_checkpoint(
    target: Path | str, split: str, *, changed_data: bool = False, initial_weights: str | None = None
) -> dict[str, Any]:
    """Return the metrics of a run's or a checkpoint's model on a split, with its checkpoint. All ranks call.

    `initial_weights` is that of `Trained.load`. Raises UserError for data that are not those of the training; with
    `changed_data` the result says how they differ.
    """
    trained = Trained.load(target, initial_weights=initial_weights)
    try:
        return _evaluate(trained, split, changed_data)
    finally:
        trained.world.close()


def _evaluate(trained: Trained, split: str, changed_data: bool) -> dict[str, Any]:
    recipe, data, world = trained.recipe, trained.data, trained.world
    if split not in data.splits:
        raise UserError(f"data set {recipe.data.name!r} has no split {split!r}; it has {', '.join(data.splits)}")
    changes = trained.check_inputs(split, changed_data=changed_data)
    source = data.splits[split]
    for warning in warnings_of(source):
        logger.warning(warning)
    metrics = build_metrics(recipe, data.meta)
    trained.warn_of_padding(source)
    heartbeat.enter_phase("evaluate")
    with explaining_errors(lambda: (trained.model, trained.objective.loss), log_error):
        values = evaluate(
            trained.model,
            trained.objective,
            source,
            world=world,
            metrics=metrics,
            batch_size=batch_size_of(recipe, world.world_size),
            transform=trained.transform(),
            workers=recipe.data.workers,
            meta=data.meta,
            split=split,
            skip_corrupt=recipe.data.skip_corrupt,
            try_company=True,
        )
    nothing = metrics.caveats | ({"loss": values["nonfinite"]} if "nonfinite" in values else {})
    for name, why in nothing.items():
        logger.warning(f"{name} on split '{split}' says nothing: {why}")
    result: dict[str, Any] = {"checkpoint": str(trained.checkpoint), "split": split, "processes": world.world_size}
    return result | ({"changed_data": changes} if changes else {}) | values
