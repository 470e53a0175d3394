"""`gather`: a tensor of the whole global batch, from what `Task.losses` has of one micro-batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distrain.config import UserError
from distrain.parallel import World
from distrain.system.compiler import compiler_imported
from distrain.system.numbers import a_kind


def gather(tensor: Tensor) -> Tensor:
    """Return a tensor (samples of the global batch, ...) from that of this micro-batch (samples, ...).

    For `losses` of a task with `couples_samples = True`: the rows are those of all micro-batches and ranks of a step,
    in the order of the global batch. A loss of them is that of the whole batch, and each row gets its whole gradient.
    Make the same calls for each micro-batch, with the same shapes; nothing that is gathered may depend on what was
    gathered before. In an evaluation the rows are those of a group of samples (`Task.evaluation_group`).

    Raises UserError elsewhere, and for rows that are not the samples.
    """
    if _active is None:
        raise UserError(
            "distrain.gather was called outside of losses(model, batch) of a task that couples samples; call it there, "
            "and set couples_samples = True in the class of the task"
        )
    return _active.take(tensor)


_active: Gathering | None = None


class Slot(NamedTuple):
    """What one call of `gather` takes: alike for each micro-batch, on all ranks."""

    shape: tuple[int, ...]
    """Without the samples."""
    dtype: torch.dtype


class Gathering(ABC):
    """What calls of `gather` return, one after the other."""

    def __init__(self, samples: int, size: int, layout: Sequence[Slot] | None = None):
        """`samples` of the batch, and `size` of what is gathered; `layout`: what is known of the calls."""
        self._samples, self.size = samples, size
        self._layout = layout
        self.calls: list[Slot] = []
        self.take: Any = self._take
        if compiler_imported():  # a collective, and what counts calls, are no part of a graph
            import torch._dynamo

            self.take = torch._dynamo.disable(self._take)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Have `gather` ask this. Raises UserError at the end where calls are missing."""
        global _active
        before, _active = _active, self
        try:
            yield
        finally:
            _active = before
        if not self.calls:
            raise UserError(
                "the task says couples_samples = True, and its losses called distrain.gather for nothing; gather what "
                "the loss takes together, or set couples_samples = False"
            )
        if self._layout is not None and len(self.calls) < len(self._layout):
            raise UserError(
                f"losses called distrain.gather {_times(len(self.calls))} for this micro-batch, and "
                f"{_times(len(self._layout))} before; make the same calls for each"
            )

    def _take(self, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, Tensor) or tensor.dim() == 0 or len(tensor) != self._samples:
            found = f"a tensor {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else a_kind(tensor)
            raise UserError(
                f"distrain.gather was given {found} for {self._samples} samples; expected a tensor with a row for each "
                "sample of this micro-batch"
            )
        number, slot = len(self.calls), Slot(tuple(tensor.shape[1:]), tensor.dtype)
        self.calls.append(slot)
        if self._layout is not None and self._layout[number : number + 1] != [slot]:
            known = self._layout[number : number + 1]
            expected = f"rows {known[0].shape} of {known[0].dtype}" if known else f"only {_times(number)}"
            raise UserError(
                f"call {number + 1} of distrain.gather has rows {slot.shape} of {slot.dtype}, and had {expected} for "
                "another micro-batch; make the same calls for each, and pad rows of different lengths alike"
            )
        return self._gathered(number, tensor)

    @abstractmethod
    def _gathered(self, number: int, tensor: Tensor) -> Tensor:
        """Return what call `number`, from 0, returns."""


class Repeated(Gathering):
    """Outside of a step, where only shapes and the way of gradients count: the micro-batch, as if all were this one."""

    def __init__(self, samples: int, copies: int):
        super().__init__(samples, samples * copies)
        self._copies = copies

    def _gathered(self, number: int, tensor: Tensor) -> Tensor:
        return torch.cat([tensor] * self._copies)


class Kept(Gathering):
    """Keeps what is gathered, of a batch without its gradient, for when the others are there."""

    def __init__(self, samples: int, copies: int, layout: Sequence[Slot] | None):
        super().__init__(samples, samples * copies, layout)
        self._copies = copies
        self.tensors: list[Tensor] = []

    def _gathered(self, number: int, tensor: Tensor) -> Tensor:
        self.tensors.append(tensor.detach())
        return torch.cat([tensor] * self._copies)  # of the right size; what is computed from it is dropped


class Known(Gathering):
    """Returns what is known of all samples; the rows of this micro-batch get the gradient."""

    def __init__(self, samples: int, whole: Sequence[Tensor], start: int = 0, copies: int = 1):
        """`whole`: by call; `start`: the first of this micro-batch's rows, of as many `copies` of the loss."""
        super().__init__(samples, len(whole[0]), [Slot(tuple(each.shape[1:]), each.dtype) for each in whole])
        self._whole, self._start, self._copies = whole, start, copies
        self.drifts: list[Tensor] = []
        """(2,) float64 by call: the largest difference to the known rows, and the largest of these."""

    def _gathered(self, number: int, tensor: Tensor) -> Tensor:
        whole = self._whole[number]
        if tensor.is_floating_point() and torch.is_grad_enabled():
            with torch.no_grad():
                known = whole[self._start : self._start + len(tensor)]
                pair = torch.stack(((tensor - known).abs().max(), known.abs().max()))
                self.drifts.append(pair.double())
        return _Placed.apply(tensor, whole, self._start, self._copies)


class Exchanged(Gathering):
    """Exchanges each tensor with the other ranks where it is gathered: for a single micro-batch on each."""

    def __init__(self, samples: int, world: World, layout: Sequence[Slot] | None):
        super().__init__(samples, samples * world.world_size, layout)
        self._world = world

    def _gathered(self, number: int, tensor: Tensor) -> Tensor:
        if self._world.world_size == 1:
            return tensor
        whole = torch.cat(self._world.gather_tensors(tensor.detach()))
        start = self._world.mesh.data_rank * len(tensor)
        return _Placed.apply(tensor, whole, start, self._world.world_size)


class _Placed(torch.autograd.Function):
    """Returns the whole, of which the rows of this micro-batch are given with their gradient.

    Each micro-batch of each rank computes the whole loss, and what is trained is the mean of these copies. A parameter
    that the loss takes itself, such as a temperature, gets its gradient from each, and the mean is right. A row gets it
    from its own copy alone, and so it is multiplied by their number.
    """

    @staticmethod
    def forward(ctx: Any, own: Tensor, whole: Tensor, start: int, copies: int) -> Tensor:
        ctx.rows, ctx.copies = slice(start, start + len(own)), copies
        return whole.clone()  # it may be changed in place

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return gradients[0][ctx.rows] * ctx.copies, None, None, None


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
