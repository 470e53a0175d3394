"""Losses of class numbers, or of a probability for each class."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from distrain.config import Form, UserError
from distrain.optim.losses.chunked import chunked_cross_entropy
from distrain.optim.losses.interface import NEVER, NO_TARGET, Outputs, TorchLoss
from distrain.optim.losses.shapes import along, kept_sum, repeated, single, wide


class ClassLoss(TorchLoss):
    """CrossEntropyLoss and NLLLoss: of class numbers, or of a probability for each class.

    Outputs are (batch, ..., classes) with targets (batch, ...), read as one row for each target without a copy, or
    torch's own (batch, classes, ...); see `class_dim`.
    """

    def __init__(self, name: str, build: Callable[..., nn.Module], task: Form, args: Mapping[str, Any]):
        self.ignore_index = args.get("ignore_index", NO_TARGET if is_of_tokens(task) else NEVER)
        super().__init__(name, partial(build, ignore_index=self.ignore_index))
        self._task = task
        self._weight = cast("Tensor | None", args.get("weight"))
        self._weights: dict[torch.device, Tensor] = {}
        self._smoothing = cast(float, args.get("label_smoothing", 0.0))
        self.classes = len(self._weight) if self._weight is not None else None
        self.count_is_fixed = self.ignore_index == NEVER and self._weight is None
        self.is_token_entropy = (
            self._weight is None
            and not args.get("label_smoothing")
            and isinstance(self._modules["sum"], nn.CrossEntropyLoss)
        )
        self.takes_hidden = task == "language_modeling" and isinstance(self._modules["sum"], nn.CrossEntropyLoss)

    def sum(self, outputs: Outputs, targets: Tensor, keep: Tensor | None = None) -> Tensor:
        logits = wide(single(outputs, self.name))
        dim = class_dim(logits, targets, self._task)
        soft = targets.is_floating_point() and targets.shape == logits.shape
        self.classes = None if soft else logits.shape[dim]
        targets = targets.to(logits.dtype) if soft else self._numbers(targets, keep)
        if dim == logits.dim() - 1 > 1:
            logits = logits.flatten(0, -2)
            targets = targets.flatten(0, -2) if soft else targets.flatten()
            keep = repeated(keep, targets) if soft else None
        try:
            if soft and keep is not None:
                return kept_sum(self._module(keep, logits)(logits, targets), keep)
            # not as a module, whose hooks are looked for in each step: nobody can have given it one
            total: Tensor = self._module(None, logits).forward(logits, targets)
            return total
        except IndexError as error:
            classes = logits.shape[min(dim, logits.dim() - 1)]  # flattened or not
            raise UserError(
                f"loss: a target is not one of the classes 0 to {classes - 1} that the model has outputs for "
                f"({error}); give the model more classes, or mark targets that are not predicted with loss.ignore_index"
            ) from error

    def count(self, targets: Tensor, keep: Tensor | None = None) -> Tensor:
        if self.count_is_fixed or _is_soft(targets):
            return self._number(targets, keep)
        targets = self._numbers(targets, keep)
        counted = targets != self.ignore_index
        if self._weight is None:
            return counted.sum(dtype=torch.float64)
        return (self._weight_on(targets.device)[targets.where(counted, 0)] * counted).sum()

    def of_hidden(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        self.classes = len(weight)
        if targets.shape != hidden.shape[:-1]:
            raise _misfit((*hidden.shape[:-1], len(weight)), targets, self._task)
        return chunked_cross_entropy(
            hidden,
            weight,
            bias,
            _class_numbers(targets, self._task),
            ignore_index=self.ignore_index,
            class_weights=None if self._weight is None else self._weight_on(hidden.device),
            label_smoothing=self._smoothing,
        )

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        super().prepare(device, dtype)
        if self._weight is not None:
            self._weight_on(device)
            self._weight_on(torch.device("cpu"))

    def _weight_on(self, device: torch.device) -> Tensor:
        # a copy for each: a step counts targets on the host and on the device, which would wait for each other
        assert self._weight is not None
        if device not in self._weights:
            self._weights[device] = self._weight.to(device, torch.float64)
        return self._weights[device]

    def _numbers(self, targets: Tensor, keep: Tensor | None) -> Tensor:
        targets = _class_numbers(targets, self._task)
        return targets if keep is None else targets.where(along(keep, targets), self.ignore_index)

    def _per_sample(self, targets: Tensor) -> int:
        per_sample = targets.shape[1:].numel()
        if not _is_soft(targets):
            return per_sample
        # a probability for each class: one target for each position outside the class dimension
        return per_sample // targets.shape[_soft_class_dim(targets.dim(), self._task)]


def class_dim(outputs: Tensor, targets: Tensor, task: Form) -> int:
    """Return the class dimension of `outputs`; raises UserError if outputs do not fit targets.

    The last for (batch, ..., classes), 1 for torch's (batch, classes, ...). If a shape can be read both ways, tokens
    take the last and all others torch's.
    """
    last = outputs.dim() - 1
    if outputs.dim() >= 2:
        if targets.is_floating_point() and targets.shape == outputs.shape:
            return _soft_class_dim(outputs.dim(), task)
        fits_last = outputs.shape[:-1] == targets.shape
        if fits_last and last == 1:
            return last  # the second too
        fits_second = outputs.shape[:1] + outputs.shape[2:] == targets.shape
        if fits_last and (not fits_second or is_of_tokens(task)):
            return last
        if fits_second and not is_of_tokens(task):
            return 1
    raise _misfit(outputs.shape, targets, task)


def _misfit(shape: Sequence[int], targets: Tensor, task: Form) -> UserError:
    expected = (*targets.shape, "classes")
    if task == "segmentation" and targets.dim() > 1:
        expected = (len(targets), "classes", *targets.shape[1:])
    return UserError(
        f"loss: outputs of shape {tuple(shape)} do not fit targets of shape {tuple(targets.shape)}; expected "
        f"outputs {expected}".replace("'", "")
    )


def is_of_tokens(task: Form) -> bool:
    """Whether a sample has a target for each token."""
    return task in ("language_modeling", "seq2seq", "token_classification")


def _soft_class_dim(dims: int, task: Form) -> int:
    return dims - 1 if is_of_tokens(task) else 1


def _is_soft(targets: Tensor) -> bool:
    return targets.is_floating_point() and targets.dim() > 1


def _class_numbers(targets: Tensor, task: Form) -> Tensor:
    # binary targets are floats, and class numbers too if the model has two outputs
    if targets.is_floating_point() and not (task == "binary" and targets.dim() == 1):
        raise UserError(
            f"loss: targets are {targets.dtype} of shape {tuple(targets.shape)}; expected the numbers of classes "
            "(int64), or a probability for each class in the shape of the outputs"
        )
    return targets.long()
