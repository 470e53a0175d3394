"""The interface of losses: a sum and a count."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from distrain.networks.calling import ModelOutput

Outputs = Tensor | Sequence[Tensor]
"""A model's outputs: one tensor, or several for losses that take several."""

NO_TARGET = -100
"""The target of a token that is not predicted (torch's default ignore_index)."""
NEVER = -(2**31)
"""An ignore_index of no target: without `ignore_index` in the recipe, a label outside the classes is an error."""


class Loss(ABC):
    """A loss as a sum and a count."""

    name: str
    """As in the recipe."""
    count_is_fixed: bool = True
    """Whether the count follows from the number of samples (`fixed_count`); otherwise it is summed over ranks."""
    ignore_index: int = NEVER
    """Integer targets of this value are not counted."""
    is_token_entropy: bool = False
    """Whether the mean is the cross entropy without weights or smoothing, whose exponential is the perplexity."""
    takes_probabilities: bool = False
    """Whether outputs are probabilities, as of a model that ends in a sigmoid, and not logits."""
    takes_hidden: bool = False
    """Whether it can be computed from a linear layer and its inputs, instead of that layer's outputs: `of_hidden`."""
    takes_several: bool = False
    """Whether it takes all tensors that a model returns, or only the first."""

    classes: int | None = None
    """Number of classes of the last outputs; None if targets are not class numbers."""

    def select(self, output: ModelOutput) -> Outputs:
        """Return the tensors of a model's output that this loss takes."""
        return (output.logits, *output.others) if self.takes_several and output.others else output.logits

    @abstractmethod
    def sum(self, outputs: Outputs, targets: Tensor, keep: Tensor | None = None) -> Tensor:
        """Return the sum of the losses (0-d, fp32, or fp64 for fp64 outputs).

        Rows where `keep` (batch,) bool is False are ignored. Sums are over fp32 or fp64 values even if outputs are
        bf16. Raises UserError if outputs do not fit the targets; nothing is broadcast.
        """

    @abstractmethod
    def count(self, targets: Tensor, keep: Tensor | None = None) -> Tensor:
        """Return how many losses `sum` is over, from the targets alone (0-d fp64)."""

    def sum_and_count(self, outputs: Outputs, targets: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return both."""
        return self.sum(outputs, targets, keep), self.count(targets, keep)

    def of_hidden(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        """Return what `sum` does for the outputs `hidden @ weight.T + bias`, which are never whole.

        Where `takes_hidden` and the targets are whole numbers, one for each row of `hidden` (..., width).
        """
        raise NotImplementedError

    def check_targets(self, targets: Tensor) -> None:  # noqa: B027 - most are checked as they are computed
        """Raise UserError for targets that the loss does not take; compiled code has no other place for that."""

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:  # noqa: B027 - most hold no tensors
        """Put what it computes with where outputs will be: passes without values and compiled code find it there."""

    def fixed_count(self, samples: int, targets: Tensor) -> int:
        """Return the count of `samples` samples whose targets have the shape of those of the batch `targets`."""
        assert self.count_is_fixed, f"the count of {self.name} depends on the targets"
        return samples * self._per_sample(targets)

    def _per_sample(self, targets: Tensor) -> int:
        return 1

    def _number(self, targets: Tensor, keep: Tensor | None) -> Tensor:
        per_sample = self._per_sample(targets)
        if keep is None:
            return torch.full((), len(targets) * per_sample, dtype=torch.float64, device=targets.device)
        return keep.sum(dtype=torch.float64) * per_sample


class TorchLoss(Loss):
    """A loss of torch.nn, on the outputs' device and in their precision."""

    def __init__(self, name: str, build: Callable[..., nn.Module]):
        self.name = name
        self._build = build
        self._modules = {reduction: build(reduction=reduction) for reduction in ("sum", "none")}
        self._place: tuple[torch.device, torch.dtype] | None = None

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        self._module(None, torch.empty(0, dtype=dtype, device=device))

    def _module(self, keep: Tensor | None, like: Tensor) -> nn.Module:
        if self._place != (like.device, like.dtype):
            self._place = (like.device, like.dtype)
            for reduction in self._modules:
                # rebuilt: weights that were rounded for fp32 outputs would stay rounded for fp64 ones
                self._modules[reduction] = self._build(reduction=reduction).to(*self._place)
        return self._modules["sum" if keep is None else "none"]
