"""One batch as metrics use it, and the sums that they are computed from.

A part reduces a batch to a vector that is summed over batches and ranks. Metrics list the parts that they need, and
share equal ones. Nothing here waits for the device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distrain.config import Form, UserError
from distrain.datasets.base import DataMeta
from distrain.optim.losses import NO_TARGET, Outputs, class_dim, fitted
from distrain.optim.losses.shapes import wide


@dataclass(frozen=True)
class Setting:
    """What metrics depend on besides outputs and targets."""

    task: Form
    meta: DataMeta | None
    """None if only the recipe is checked."""
    ignore_index: int = NO_TARGET
    """Integer targets that are not counted."""
    loss_is_entropy: bool = False
    """Whether the recipe's loss is the cross entropy without weights or smoothing."""
    is_probability: bool = False
    """Whether outputs of binary and multilabel are probabilities, as the recipe's loss takes them, or logits."""
    own_means: bool = False
    """Whether the task is one's own, whose evaluations have means by names that only they tell."""

    @property
    def is_tokens(self) -> bool:
        """Whether a sample has a target for each token."""
        return self.task in ("language_modeling", "seq2seq")

    @property
    def has_places(self) -> bool:
        """Whether a sample has a target for each token or pixel."""
        return self.is_tokens or self.task in ("segmentation", "token_classification")

    @property
    def is_standardised(self) -> bool:
        """Whether targets were standardised with known statistics."""
        return self.meta is not None and self.meta.target_mean is not None and self.meta.target_std is not None


class Seen:
    """One batch: the model's outputs, the targets, and which rows are not padding."""

    def __init__(
        self,
        outputs: Outputs,
        targets: Tensor,
        keep: Tensor | None,
        setting: Setting,
        loss: tuple[Tensor, Tensor] | None = None,
    ):
        # of several outputs, the first is the prediction (the mean, for a mean and a variance)
        self.outputs = outputs if isinstance(outputs, Tensor) else outputs[0]
        self.targets = targets
        self.keep = keep
        self.setting = setting
        self.loss = loss

    @cached_property
    def scores(self) -> Tensor:
        """(n, classes); (n,) for binary; (n, labels) for multilabel. Each token is one of the n.

        Logits, or probabilities (`Setting.is_probability`).
        """
        outputs, targets, task = self.outputs, self.targets, self.setting.task
        if task == "binary":
            two = outputs.shape == (*targets.shape, 2)
            return (outputs[..., 1] - outputs[..., 0] if two else fitted(outputs, targets, "a metric")).flatten()
        if task == "multilabel":
            return fitted(outputs, targets, "a metric")
        dim = class_dim(outputs, targets, task)
        return (outputs if dim == outputs.dim() - 1 else outputs.movedim(dim, -1)).flatten(0, -2)

    @cached_property
    def labels(self) -> Tensor:
        """(n,) int64; (n, labels) for multilabel."""
        targets = self.targets
        if self.setting.task in ("binary", "multilabel"):
            labels = (targets > 0.5).long()
            return labels if self.setting.task == "multilabel" else labels.flatten()
        if targets.is_floating_point():
            targets = targets.argmax(class_dim(self.outputs, targets, self.setting.task))
        return targets.long().flatten()

    @cached_property
    def mask(self) -> Tensor:
        """(n,) bool: rows that count."""
        labels = self.labels
        if self.keep is None:
            mask = torch.ones(len(labels), dtype=torch.bool, device=labels.device)
        else:
            mask = self.keep.repeat_interleave(len(labels) // len(self.keep), output_size=len(labels))
        return mask if labels.dim() > 1 else mask & (labels != self.setting.ignore_index)

    @cached_property
    def predicted(self) -> Tensor:
        """The predicted labels, shaped as `labels`: the highest score, or all that are more probable than not."""
        if self.setting.task in ("binary", "multilabel"):
            return (self.scores > (0.5 if self.setting.is_probability else 0.0)).long()
        return self.scores.argmax(-1)

    @property
    def classes(self) -> int:
        """How many classes or labels there are."""
        return 2 if self.setting.task == "binary" else self.scores.shape[-1]

    @cached_property
    def values(self) -> tuple[Tensor, Tensor]:
        """(n, k) float64: outputs and targets of a regression, in the targets' own units."""
        found = [fitted(self.outputs, self.targets, "a metric"), self.targets]
        output, target = (tensor.double().reshape(len(tensor), -1) for tensor in found)
        meta = self.setting.meta
        if meta is not None and meta.target_mean is not None and meta.target_std is not None:
            mean, std = (_constant(each, target.device) for each in (meta.target_mean, meta.target_std))
            return output * std + mean, target * std + mean
        return output, target

    @property
    def rows(self) -> Tensor:
        """(batch,) bool: samples that count."""
        if self.keep is not None:
            return self.keep
        return torch.ones(len(self.targets), dtype=torch.bool, device=self.targets.device)

    def kept(self) -> Seen:
        """Return the batch without padding, and without samples whose one target is ignored.

        Waits for the device where there may be any.
        """
        rows = self.keep
        if self.setting.task == "classification" and self.targets.dim() == 1:
            rows = self.mask
        if rows is None or bool(rows.all()):
            return self if self.keep is None else Seen(self.outputs, self.targets, None, self.setting)
        return Seen(self.outputs[rows], self.targets[rows], None, self.setting)


@lru_cache(maxsize=16)
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    # cached, because copying from the host at every batch would wait for the device
    return torch.tensor(values, dtype=torch.float64, device=device)


class Part(ABC):
    """Numbers that are summed over batches and ranks. Equal parts are computed once."""

    @abstractmethod
    def batch(self, seen: Seen) -> Tensor:
        """Return this batch's numbers, 1-D float64 on its device."""


class TextPart(ABC):
    """Numbers of texts that are summed over batches and ranks."""

    size: int
    """How many numbers there are."""

    @abstractmethod
    def texts(self, hypotheses: Sequence[str], references: Sequence[str]) -> Tensor:
        """Return the numbers of these pairs of texts, 1-D float64 (size,)."""


@dataclass(frozen=True)
class Correct(Part):
    """(correct, all): rows whose label is among the `k` highest scores; all labels right, for multilabel."""

    k: int = 1

    def batch(self, seen: Seen) -> Tensor:
        if self.k > 1:
            if self.k > seen.classes:
                raise UserError(
                    f"eval.metrics: top_{self.k} of {seen.classes} classes; take at most {seen.classes - 1}"
                )
            hits = (seen.scores.topk(self.k, dim=-1).indices == seen.labels[:, None]).any(-1)
        else:
            hits = seen.predicted == seen.labels
            hits = hits.all(-1) if hits.dim() > 1 else hits
        return torch.stack([(hits & seen.mask).sum(), seen.mask.sum()]).double()


@dataclass(frozen=True)
class ClassCounts(Part):
    """(3 * classes): for each class, how often it is predicted correctly, is predicted, and occurs."""

    def batch(self, seen: Seen) -> Tensor:
        predicted, labels, mask = seen.predicted, seen.labels, seen.mask
        if labels.dim() > 1:
            right = predicted * labels
            return torch.cat([(each * mask[:, None]).sum(0) for each in (right, predicted, labels)]).double()
        classes = seen.classes
        places = torch.cat(
            [
                labels.where(mask & (predicted == labels), 3 * classes),
                (predicted + classes).where(mask, 3 * classes),
                (labels + 2 * classes).where(mask, 3 * classes),
            ]
        )
        return tally(places, 3 * classes)


@dataclass(frozen=True)
class Confusion(Part):
    """(classes * classes): how often each class (row) is predicted as each (column)."""

    def batch(self, seen: Seen) -> Tensor:
        classes = seen.classes
        return tally((seen.labels * classes + seen.predicted).where(seen.mask, classes * classes), classes * classes)


def tally(places: Tensor, size: int) -> Tensor:
    """Return how often each of 0..size-1 occurs in `places`, where `size` is not counted."""
    # not bincount, which waits for the device to know its result's size
    counts = torch.zeros(size + 1, dtype=torch.float64, device=places.device)
    return counts.scatter_add_(0, places, torch.ones_like(places, dtype=torch.float64))[:size]


@dataclass(frozen=True)
class Errors(Part):
    """(1 + 2 * k): samples, and for each target the sums of absolute and of squared errors."""

    def batch(self, seen: Seen) -> Tensor:
        output, target = seen.values
        errors = (output - target).where(seen.rows[:, None], 0.0)
        return torch.cat([seen.rows.sum().double()[None], errors.abs().sum(0), errors.square().sum(0)])


@dataclass(frozen=True)
class Spread(Part):
    """(2 * k): for each standardised target, the sums of the target and of its square."""

    def batch(self, seen: Seen) -> Tensor:
        # in standardised units, so that a large mean costs no precision
        target = seen.targets.double().reshape(len(seen.targets), -1).where(seen.rows[:, None], 0.0)
        return torch.cat([target.sum(0), target.square().sum(0)])


@dataclass(frozen=True)
class TokenEntropy(Part):
    """(sum of cross entropies in nats, targets): without class weights or label smoothing."""

    def batch(self, seen: Seen) -> Tensor:
        if seen.loss is not None and seen.setting.loss_is_entropy:
            return torch.stack([each.double() for each in seen.loss])
        labels = seen.labels.where(seen.mask, NO_TARGET)
        total = F.cross_entropy(wide(seen.scores), labels, ignore_index=NO_TARGET, reduction="sum")
        return torch.stack([total.double(), seen.mask.sum().double()])


class Moments:
    """Count, mean and sum of squared deviations of targets without known statistics.

    Merged by Chan, Golub & LeVeque 1979: unlike sums of squares, precise however far the values are from zero. For the
    same reason a mean is held as one of the values plus an offset.
    """

    def __init__(self) -> None:
        self.state: Tensor | None = None
        """(1, 4, k) float64: count, a value, mean less that value, sum of squared deviations from the mean."""

    def add(self, seen: Seen) -> None:
        """Add a batch."""
        _, target = seen.values
        rows = seen.rows[:, None]
        # by index_select: a number as an index would be read from the device
        base = target.index_select(0, seen.rows.int().argmax(0, keepdim=True))[0]
        count = rows.sum().double()
        offsets = (target - base).where(rows, 0.0)
        mean = offsets.sum(0) / count.clamp(min=1)
        deviations = (offsets - mean).where(rows, 0.0).square().sum(0)
        batch = torch.stack([count.expand_as(mean), base, mean, deviations])
        self.state = (batch if self.state is None else merged(self.state[0], batch))[None]


def merged(a: Tensor, b: Tensor) -> Tensor:
    """Return the moments (4, k) of two groups together."""
    count = a[0] + b[0]
    share = b[0] / count.clamp(min=1)
    step = (b[1] - a[1]) + (b[2] - a[2])
    both = torch.stack([count, a[1], a[2] + step * share, a[3] + b[3] + step.square() * a[0] * share])
    return both.where(a[0] > 0, b)


Value = float | list[Any]
"""A metric's value: a number, or a list of numbers (by class, or a matrix)."""
