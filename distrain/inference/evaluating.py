"""The metrics of a checkpoint on a split, or on other samples with targets."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distrain.config import UserError
from distrain.datasets.base import find_dataset, warnings_of
from distrain.diagnose.index_errors import explaining_errors
from distrain.inference.trained import SPLITS, Trained, batch_size_of, data_overrides, log_error
from distrain.metrics import build_metrics
from distrain.run import heartbeat
from distrain.training.evaluation import evaluate

logger = logging.getLogger(__name__)


def evaluate_checkpoint(
    target: Path | str,
    split: str,
    *,
    data: Sequence[str] = (),
    changed_data: bool = False,
    initial_weights: str | None = None,
) -> dict[str, Any]:
    """Return the metrics of a run's or a checkpoint's model, with its checkpoint. All ranks call.

    `split`: train, valid or test; or a file or folder with targets, as the data set reads one for a split. `data` holds
    keys of the recipe's data section, `KEY=VALUE`, for reading them.
    `initial_weights` is that of `Trained.load`. Raises UserError for a split of data that are not those of the
    training; with `changed_data` the result says how they differ.
    """
    path = Path(split) if split not in SPLITS and Path(split).exists() else None
    if path is not None and changed_data:
        raise UserError(
            f"--changed-data is of splits, and {path} is compared with no data of the training; leave it out"
        )
    trained = Trained.load(target, data_overrides(data), evaluates=path, initial_weights=initial_weights)
    try:
        cut = path is None and find_dataset(trained.recipe.data, trained.recipe.form).registered
        if cut and any(each.startswith("path=") for each in data):
            raise UserError("--data path=FILE: a part of it alone would be the split; name the file behind the run")
        return _evaluate(trained, split, path, changed_data)
    finally:
        trained.world.close()


def _evaluate(trained: Trained, asked: str, path: Path | None, changed_data: bool) -> dict[str, Any]:
    recipe, data, world = trained.recipe, trained.data, trained.world
    split = asked if path is None else "test"
    if split not in data.splits:
        raise UserError(
            f"data set {recipe.data.name!r} has no split {split!r}; it has {', '.join(data.splits)}, and there is no "
            "such file"
        )
    changes = trained.check_inputs(split if path is None else None, changed_data=changed_data)
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
    result: dict[str, Any] = {
        "checkpoint": str(trained.checkpoint),
        "split" if path is None else "data": asked,
        "processes": world.world_size,
    }
    return result | ({"changed_data": changes} if changes else {}) | values
