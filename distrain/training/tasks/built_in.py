"""The tasks by name: an output for each target, compared by the recipe's loss.

A class of your own may inherit from one of these, and add to its losses or replace its predictions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from distrain.config.registry import tasks
from distrain.datasets.base import Batch
from distrain.optim import Loss
from distrain.training.tasks.task import LossSum, Task


class Supervised(Task):
    """Targets that the recipe's loss compares with the model's outputs."""

    loss: Loss
    metrics = None

    @property
    def _name(self) -> str:
        name = self.loss.name.rpartition(":")[2]
        return name if name != "loss" else "supervised"  # rows have the sum of all losses as `loss`

    def losses(self, model: Any, batch: Batch) -> Mapping[str, LossSum | Tensor]:
        """Return the recipe's loss by its name, and what the model adds to it."""
        output, targets = self.outputs(model, batch), batch["targets"]
        found, count = self.loss.sum_and_count(self.loss.select(output), targets)
        if output.aux_loss is not None:
            found = found + output.aux_loss * count.to(found.dtype)
        return {self._name: LossSum(found, count)}

    def count(self, batch: Batch) -> Mapping[str, Tensor | float]:
        """Return what the recipe's loss is over: samples, elements, or targets that are not ignored."""
        return {self._name: self.loss.count(batch["targets"])}


@tasks.register("classification")
class Classification(Supervised):
    """One of several classes for each sample; targets (batch,) int64, or for each place (batch, ...)."""

    form = "classification"


@tasks.register("binary")
class Binary(Supervised):
    """Yes or no for each sample; targets (batch,), 0 and 1."""

    form = "binary"


@tasks.register("multilabel")
class Multilabel(Supervised):
    """Yes or no for each of several labels; targets (batch, labels), 0 and 1."""

    form = "multilabel"


@tasks.register("regression")
class Regression(Supervised):
    """Numbers; targets (batch,) or (batch, targets) floats."""

    form = "regression"


@tasks.register("segmentation")
class Segmentation(Supervised):
    """One of several classes for each pixel; outputs (batch, classes, height, width), targets without the classes."""

    form = "segmentation"


@tasks.register("token_classification")
class TokenClassification(Supervised):
    """One of several classes for each token; targets (batch, seq) int64, -100 where there is none."""

    form = "token_classification"


@tasks.register("language_modeling")
class LanguageModeling(Supervised):
    """The next token; targets (batch, seq) int64."""

    form = "language_modeling"


@tasks.register("seq2seq")
class Seq2Seq(Supervised):
    """Text from text; inputs {source, target}, targets (batch, seq) int64."""

    form = "seq2seq"
