"""Users' losses."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from distrain.config import UserError
from distrain.config.arguments import argument_problems
from distrain.optim.losses.interface import Loss, Outputs
from distrain.optim.losses.shapes import wide


class UserLoss(Loss):
    """A function `(outputs, targets)`, or an object that is called like one.

    It returns a loss for each sample or element (a sample's loss is then the mean over its elements), or the mean over
    the batch; either is averaged over samples. Or it returns (sum, count), and has an attribute `count`, a function of
    the targets that returns the same count.
    """

    takes_several = True

    def __init__(self, name: str, function: Callable[..., Any]):
        self.name = name
        self.function = function
        self._count = getattr(function.func if isinstance(function, partial) else function, "count", None)
        self.count_is_fixed = self._count is None

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        if isinstance(self.function, nn.Module):  # a pass without values would leave it tensors without values
            self.function.to(device)

    def sum(self, outputs: Outputs, targets: Tensor, keep: Tensor | None = None) -> Tensor:
        if keep is not None:
            # the function may mix rows, so padding must not reach it
            outputs = outputs[keep] if isinstance(outputs, Tensor) else tuple(each[keep] for each in outputs)
            targets = targets[keep]
        first = outputs if isinstance(outputs, Tensor) else outputs[0]
        if not len(targets):
            return first.sum() * 0
        if isinstance(self.function, nn.Module):
            self.function.to(first.device)
        result = self.function(outputs, targets)
        if isinstance(result, tuple):
            if self._count is None:
                raise UserError(
                    f"loss: {self.name} returned (sum, count), so it needs a function of the targets that returns the "
                    "same count: give it an attribute `count`, as in `my_loss.count = lambda targets: ...`"
                )
            return wide(result[0])
        if not isinstance(result, Tensor) or (result.dim() and len(result) != len(targets)) or self._count is not None:
            found = f"a tensor {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
            expected = "(sum, count), as it has a `count`" if self._count else "a tensor () or (batch, ...)"
            raise UserError(f"loss: {self.name} returned {found}; expected {expected}")
        if first.requires_grad and torch.is_grad_enabled() and not result.requires_grad:
            raise UserError(
                f"loss: {self.name} returned a tensor without a gradient, so nothing would be trained: it comes from "
                "argmax, a comparison, .detach(), .item() or NumPy; compute it from the outputs by what has a gradient"
            )
        return wide(result).mean() * len(targets)

    def count(self, targets: Tensor, keep: Tensor | None = None) -> Tensor:
        if self._count is None:
            return self._number(targets, keep)
        count = self._count(targets if keep is None else targets[keep])
        if isinstance(count, Tensor):
            return count.to(targets.device, torch.float64)
        # a fill: for a copy to a device the host would wait
        return torch.full((), count, dtype=torch.float64, device=targets.device)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Set the default dtype of new floating-point tensors."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def user_loss(name: str, found: Any, args: Mapping[str, Any], dtype: torch.dtype) -> Loss:
    """Return a user's function or class as a loss; the class makes its tensors in `dtype` by default."""
    if not callable(found):
        raise UserError(f"loss.name: {name!r} is {found!r}; expected a function (outputs, targets), or a class")
    is_class = inspect.isclass(found)
    first_two = () if is_class else tuple(list(inspect.signature(found).parameters)[:2])
    if problems := argument_problems(found, args, "loss", repr(name), given=first_two):
        raise UserError("\n".join(problems))
    if not is_class:
        return UserLoss(name, partial(found, **args) if args else found)
    try:
        with default_dtype(dtype):
            made = found(**args)
    except (TypeError, ValueError) as error:
        raise UserError(f"loss: {name!r} refuses its arguments: {error}") from error
    if not callable(made):
        raise UserError(f"loss.name: objects of {name!r} cannot be called with (outputs, targets)")
    return UserLoss(name, made)
