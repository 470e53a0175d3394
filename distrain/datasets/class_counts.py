"""How many training samples each class has, for weights of the loss that are `balanced`."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from distrain.config import Recipe, UserError
from distrain.datasets.base import Data, is_stream
from distrain.datasets.batches import Batches

logger = logging.getLogger(__name__)

BALANCED = "balanced"
"""What a recipe gives for weights that are computed."""
COUNTS = "class_counts"
"""The key of a data set's state under which the counts are stored."""
_READ = 512
"""Samples that are read at a time."""


def wants_counts(recipe: Recipe) -> str | None:
    """Return the key of the recipe's loss that is to be computed from the labels, or None."""
    args = recipe.loss.args if recipe.loss is not None else {}
    return next((f"loss.{key}" for key in ("weight", "pos_weight") if args.get(key) == BALANCED), None)


def with_counts(recipe: Recipe, data: Data, state: dict[str, Any] | None) -> Data:
    """Return the data with the counts of its classes, where the recipe wants them: those of `state`, or counted."""
    if (key := wants_counts(recipe)) is None:
        return data
    ignored = recipe.loss.args.get("ignore_index") if recipe.loss is not None else None
    found = (state or {}).get(COUNTS) or count_classes(data, recipe.form, key, ignored, recipe.data.skip_corrupt)
    meta = replace(data.meta, class_counts=tuple(found["counts"]), counted_samples=int(found["samples"]))
    return replace(data, meta=meta, state={**data.state, COUNTS: found})


def count_classes(data: Data, task: str, key: str, ignored: int | None = None, tolerated: int = 0) -> dict[str, Any]:
    """Return {`samples`: of the training split, `counts`: of each class, or of each label that is 1}.

    A binary task has two classes. Targets of `ignored` have none. Targets in memory are counted where they are; of
    other data each sample is read once, and up to `tolerated` corrupt ones are skipped. Raises UserError for data
    without a class for each sample; `key` is for its message.
    """
    source = data.splits["train"]
    if is_stream(source):
        raise UserError(
            f"{key}: {BALANCED} needs the labels of all training samples, and an iterable data set has no end that is "
            "known before training; give the weights as a list"
        )
    held = getattr(source, "targets", None)
    if not isinstance(held, torch.Tensor | np.ndarray):
        logger.info(f"{key}: every training sample is read once, to count the classes of all {len(source):,}")
        batches = Batches(source, None, tolerated, once=True)
        ids = np.array_split(np.arange(len(source)), -(-len(source) // _READ))
        read = [batches.batch((np.zeros(len(each), np.int64), each)) for each in ids]
        parts = [torch.as_tensor(batch["targets"])[batch["ids"] >= 0] for batch in read]
        held = torch.cat(parts) if len({part.shape[1:] for part in parts}) == 1 else parts[0].new_zeros(0, 0, 0)
    targets = torch.as_tensor(held)
    if targets.dim() != (2 if task == "multilabel" else 1):
        raise UserError(
            f"{key}: {BALANCED} counts one class for each sample, and targets have the shape "
            f"{tuple(targets.shape[1:])}; give the weights as a list"
        )
    if task == "classification":
        targets = targets[(targets >= 0) & (targets != ignored)] if ignored is not None else targets[targets >= 0]
        counts = torch.bincount(targets.long(), minlength=data.meta.num_classes or 0)
    elif bool(((targets != 0) & (targets != 1)).any()):
        raise UserError(
            f"{key}: {BALANCED} counts targets of 0 and 1, and there are others; give the weights as a list"
        )
    else:
        ones = targets.sum(0, dtype=torch.float64).long()
        counts = ones if task == "multilabel" else torch.stack([len(targets) - ones, ones])
    found: dict[str, Any] = {"samples": len(targets), "counts": counts.tolist()}
    shown = ", ".join(map(str, found["counts"][:10])) + (", ..." if len(counts) > 10 else "")
    logger.info(f"{key}: {BALANCED} by the {found['samples']:,} training samples, of which the classes have {shown}")
    return found


def balanced_weights(counts: list[int], names: tuple[str, ...] | None) -> list[float]:
    """Return n / (k * count) for each of k classes of n samples, as scikit-learn's `class_weight="balanced"`."""
    _refuse_empty("loss.weight", counts, names, "sample")
    return [sum(counts) / (len(counts) * count) for count in counts]


def balanced_pos_weights(ones: list[int], samples: int, names: tuple[str, ...] | None) -> list[float]:
    """Return zeros / ones for each label, which makes both weigh the same."""
    _refuse_empty("loss.pos_weight", ones, names, "positive sample")
    _refuse_empty("loss.pos_weight", [samples - count for count in ones], names, "negative sample")
    return [(samples - count) / count for count in ones]


def _refuse_empty(key: str, counts: list[int], names: tuple[str, ...] | None, what: str) -> None:
    if 0 in counts:
        empty = counts.index(0)
        name = repr(names[empty]) if names is not None and len(names) == len(counts) else str(empty)
        raise UserError(
            f"{key}: {BALANCED} divides by the samples of each class, and the training split has no {what} of {name}; "
            "give the weights as a list, or data.stratify: true where the split is drawn"
        )
