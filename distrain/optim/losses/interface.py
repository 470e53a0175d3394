"""What a loss is: a sum and a count."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from distrain.networks.calling import ModelOutput

Outputs = Tensor | Sequence[Tensor]
"""What a model returns: one tensor, or several for losses that take several."""

NO_TARGET = -100
"""Where a token is not to be predicted (torch's default ignore_index)."""
NEVER = -(2**31)
"""An ignore_index that no target has: without `ignore_index` in the recipe, a label outside the classes is an error."""


class Loss(ABC):
    """A loss as a sum and a count."""

    name: str
    """As in the recipe."""
    count_is_fixed: bool = True
    """Whether `fixed_count` knows the count from the number of samples; otherwise counts must be summed over ranks."""
    ignore_index: int = NEVER
    """Integer targets of this value are not counted."""
    is_token_entropy: bool = False
    """Whether the mean is the plain cross entropy, whose exponential is the perplexity."""
    takes_probabilities: bool = False
    """Whether outputs are probabilities, as of a model that ends in a sigmoid, and not logits."""
    takes_several: bool = False
    """Whether it takes all that a model returns, where that is a tuple of tensors, or only the first."""

    classes: int | None = None
    """How many classes the outputs had that it took last; None where targets are no class numbers."""

    def taken(self, output: ModelOutput) -> Outputs:
        """Return what of a model's output this loss takes."""
        return (output.logits, *output.others) if self.takes_several and output.others else output.logits

    @abstractmethod
    def sum_and_count(self, outputs: Outputs, targets: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the sum of the losses (0-d, fp32, or fp64 for fp64 outputs) and the count they are over (0-d fp64).

        Rows where `keep` (batch,) bool is False count as if they were not there. Sums are over fp32 or fp64 values even
        where outputs are bf16. Raises UserError where outputs do not fit the targets; nothing is broadcast.
        """

    @abstractmethod
    def count(self, targets: Tensor, keep: Tensor | None = None) -> Tensor:
        """Return the count of `sum_and_count` from the targets alone (0-d fp64)."""

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
    """What losses of torch.nn share: the module, on the outputs' device and in their precision."""

    def __init__(self, name: str, build: Callable[..., nn.Module]):
        self.name = name
        self._build = build
        self._modules = {reduction: build(reduction=reduction) for reduction in ("sum", "none")}
        self._place: tuple[torch.device, torch.dtype] | None = None

    def _module(self, keep: Tensor | None, like: Tensor) -> nn.Module:
        if self._place != (like.device, like.dtype):
            self._place = (like.device, like.dtype)
            for reduction in self._modules:
                # made anew: what was rounded for outputs of fp32 would not come back for those of fp64
                self._modules[reduction] = self._build(reduction=reduction).to(*self._place)
        return self._modules["sum" if keep is None else "none"]
