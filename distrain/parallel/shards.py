"""What a rank holds of a tensor: a flat range of its elements."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Shard:
    """What a rank holds of one parameter: a range of its elements in row-major order, maybe empty, maybe all."""

    shape: tuple[int, ...]
    """Of the full parameter."""
    start: int
    """Of the range."""
    values: Tensor
    """The range, in the precision that is trained; writing into it is writing the weight."""
    replicated: bool
    """Whether every rank holds all of it."""
    entry: Tensor | None
    """What the optimizer's state is kept under; None for a parameter that is not trained."""
    offset: int = 0
    """Where the range begins in the (flattened, local) tensors of that state."""


def whole(parameter: nn.Parameter) -> Shard:
    """Return the shard of a parameter that every rank holds."""
    entry = parameter if parameter.requires_grad else None
    return Shard(tuple(parameter.shape), 0, parameter.detach(), replicated=True, entry=entry)


@dataclass(frozen=True)
class LocalTensor:
    """What this rank holds of one tensor of the state."""

    role: str
    """parameter, buffer, optimizer, ema or state."""
    shape: tuple[int, ...]
    """Of the full tensor."""
    start: int
    """Of the range that is held, in elements."""
    values: Tensor
    """The range."""
    replicated: bool
    """Whether every rank holds all of it. Otherwise it is a range that each replica of the mesh holds once."""

    @property
    def nbytes(self) -> int:
        """Bytes of the range."""
        return self.values.numel() * self.values.element_size()


def range_of(values: Tensor, shard: Shard) -> Tensor:
    """Return a view of the elements of `values` that belong to the shard."""
    numel = shard.values.numel()
    if values.numel() == numel:
        return values
    return values.view(-1)[shard.offset : shard.offset + numel]


def replicated(role: str, tensor: Tensor) -> LocalTensor:
    return LocalTensor(role, tuple(tensor.shape), 0, tensor, replicated=True)
