"""Losses whose mean is over elements or over rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from distrain.config import Form, UserError
from distrain.optim.losses.interface import NO_TARGET, Outputs, TorchLoss
from distrain.optim.losses.shapes import equal_shapes, fitted, kept_sum, of_rows, several, shapes, wide


@dataclass(frozen=True)
class Rule:
    about: str
    build: Callable[..., nn.Module]
    over: Literal["classes", "elements", "rows"]
    outputs: int = 1
    """How many tensors the model returns for it."""
    class_targets: bool = False
    """Whether targets are integers."""


_SIGNED = (nn.SoftMarginLoss, nn.HingeEmbeddingLoss, nn.MarginRankingLoss, nn.CosineEmbeddingLoss)
"""Losses of targets 1 and -1, to which the targets of binary and multilabel, 1 and 0, are converted."""
_OF_PROBABILITIES = (nn.BCELoss, nn.BCEWithLogitsLoss)


class ElementLoss(TorchLoss):
    """Losses whose mean is over elements or over rows."""

    def __init__(self, name: str, build: Callable[..., nn.Module], rule: Rule, per_row: bool, task: Form):
        super().__init__(name, build)
        self._rule = rule
        self.takes_several = rule.outputs > 1
        self._per_row = per_row
        self._kind = type(self._modules["sum"])
        self._signed = self._kind in _SIGNED and task in ("binary", "multilabel")
        self.takes_probabilities = self._kind is nn.BCELoss

    def sum(self, outputs: Outputs, targets: Tensor, keep: Tensor | None = None) -> Tensor:
        inputs = [wide(output) for output in several(outputs, self._rule.outputs, self.name)]
        if not self._rule.class_targets:
            targets = targets.to(inputs[0].dtype)
        if not torch.compiler.is_compiling():
            self.check_targets(targets)
        if self._signed:
            targets = (targets > 0.5).to(inputs[0].dtype) * 2 - 1
        module = self._module(keep, inputs[0])
        if self._kind is nn.TripletMarginLoss:
            losses = module(*equal_shapes(inputs, self.name))
        elif self._kind is nn.CosineEmbeddingLoss:
            losses = module(*equal_shapes(inputs, self.name), of_rows(targets, inputs[0], self.name))
        elif self._kind is nn.MultiMarginLoss:
            self.classes = inputs[0].shape[-1]
            losses = module(inputs[0], of_rows(targets, inputs[0], self.name))
        elif self._kind is nn.GaussianNLLLoss:
            mean, variance = (fitted(each, targets, self.name) for each in inputs)
            losses = module(mean, targets, variance)
        else:
            losses = module(*(fitted(each, targets, self.name) for each in inputs), targets)
        return losses if keep is None else kept_sum(losses, keep)

    def check_targets(self, targets: Tensor) -> None:
        if (
            self._kind in _OF_PROBABILITIES
            and targets.device.type == "cpu"
            and bool(((targets < 0) | (targets > 1)).any())
        ):
            # not on a GPU, where the check would make every step wait for the device
            raise UserError(
                f"loss: {self.name} takes targets from 0 to 1, and these are from {targets.min():g} to "
                f"{targets.max():g}; encode the two classes as 0 and 1"
            )

    def count(self, targets: Tensor, keep: Tensor | None = None) -> Tensor:
        return self._number(targets, keep)

    def _per_sample(self, targets: Tensor) -> int:
        return 1 if self._per_row else targets.shape[1:].numel()


class CtcLoss(TorchLoss):
    """CTCLoss: the mean over samples of the loss divided by the length of the target.

    Outputs are (batch, time, classes), logits or log-probabilities, or a pair of them and the lengths (batch,) of each
    in time. Targets are (batch, length) int64, filled up with -100.
    """

    takes_several = True

    def sum(self, outputs: Outputs, targets: Tensor, keep: Tensor | None = None) -> Tensor:
        logits, *rest = [outputs] if isinstance(outputs, Tensor) else outputs
        if len(rest) > 1 or logits.dim() != 3 or targets.dim() != 2 or len(logits) != len(targets):
            raise UserError(
                f"loss: {self.name} takes outputs (batch, time, classes), or a pair of them and their lengths "
                f"(batch,), and targets (batch, length); found {shapes(outputs)} and {tuple(targets.shape)}"
            )
        real = targets != NO_TARGET
        lengths = real.sum(1)
        times = rest[0] if rest else torch.full_like(lengths, logits.shape[1])
        rows = torch.ones_like(lengths, dtype=torch.bool) if keep is None else keep
        # the log-softmax of log-probabilities is the same again
        log_probabilities = wide(logits).log_softmax(-1).transpose(0, 1)
        losses = self._module(rows, log_probabilities)(log_probabilities, targets.where(real, 0), times.long(), lengths)
        return kept_sum(losses / lengths.clamp(min=1), rows)

    def count(self, targets: Tensor, keep: Tensor | None = None) -> Tensor:
        return self._number(targets, keep)
