"""One process, and DistributedDataParallel: every rank holds the whole state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distrain.optim import plain_name
from distrain.strategy.state import TrainingState
from distrain.strategy.world import World


def prepare(
    world: World, model: nn.Module, optimizer: torch.optim.Optimizer, objective: Callable[[nn.Module], Tensor]
) -> tuple[nn.Module, Any]:
    """Wrap model and optimizer for this world; returns (wrapped model, wrapped optimizer). All ranks call.

    `objective` gives the loss (0-d) of a model, wrapped or not, on a first micro-batch. Among several processes it is
    rehearsed forward and backward, after which gradients and buffers are as before, for two reasons. Parameters that
    get no gradient must be known before wrapping. And DDP lays its buckets out anew after its first backward pass,
    which changes the order in which more than two ranks are summed: without a rehearsal the first step after a resume
    would differ in its last bits from the same step of an uninterrupted run.
    """
    # moves it to the device and puts the arithmetic around its forward, for training and evaluation alike
    model = world.accelerator.prepare_model(model, evaluation_mode=True)
    if world.world_size == 1:
        return model, optimizer

    def without_gradient() -> list[str]:
        with _restored(model):
            objective(model).backward()
            return [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]

    unused = world.together(without_gradient)
    anywhere = sorted({name for names in world.gather(unused) for name in names})
    handler = world.accelerator.ddp_handler
    assert handler is not None, "open_world sets it"
    handler.find_unused_parameters = bool(anywhere)
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    carries = not anywhere and dtypes in ({torch.float32}, {torch.float64})
    # in a module of its own in any case: what is prepared already, Accelerate returns without wrapping it in DDP
    wrapped = world.accelerator.prepare_model(_Carrier(model, dtypes.pop() if carries else None))
    assert isinstance(wrapped, nn.parallel.DistributedDataParallel), "without it no gradient would travel"
    if world.world_size > 2:
        with _restored(model):
            value = objective(wrapped)
            backward(world, wrapped, value, torch.ones_like(value), value.detach(), (0.0, 0.0, 0.0))
    # Accelerate's wrapper looks for optional packages at every step, which costs as much as a small step. It serves
    # gradient scaling and sharding, and there is neither here.
    return wrapped, optimizer


class _Carrier(nn.Module):
    """A model, beside it a parameter that is never trained: its gradient carries numbers from rank to rank.

    DDP averages gradients over the ranks in a few large reductions. A handful of numbers among them costs nothing,
    while a reduction of their own costs a small model's step half as much again.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None):
        """`dtype`: of the numbers, which is that of all the model's gradients; None carries none."""
        super().__init__()
        self.model = model
        self.numbers = nn.Parameter(torch.zeros(4, dtype=dtype)) if dtype is not None else None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


def backward(
    world: World, wrapped: nn.Module, objective: Tensor, share: Tensor, loss: Tensor, flags: Sequence[float]
) -> Callable[[], list[float]]:
    """Go backward from `share * objective` (both 0-d) with the last micro-batch of a step. All ranks call.

    On the way the means over the ranks of `loss` (0-d) and of the three `flags` are taken; the returned function reads
    them, best a step later.
    """
    if world.world_size == 1:
        objective.backward(share)
        read = world.later(loss.reshape(1))
        return lambda: [*read(), *flags]
    numbers = torch.tensor((0.0, *flags), dtype=torch.float64, device=objective.device)
    numbers[0] = loss
    carrier = wrapped.module
    if isinstance(carrier, _Carrier) and carrier.numbers is not None:
        carried = torch.dot(carrier.numbers, numbers.to(carrier.numbers.dtype))
        torch.autograd.backward((objective, carried), (share, torch.ones_like(carried)))
        means, carrier.numbers.grad = carrier.numbers.grad, None
        assert means is not None
        return world.later(means.clone())  # the gradient is a view of DDP's buffer
    objective.backward(share)
    return world.later(world.sum(numbers) / world.world_size)


class _restored(AbstractContextManager[None]):
    """Puts a model's buffers and absent gradients back on leaving."""

    def __init__(self, model: nn.Module):
        self._model = model
        self._buffers = [buffer.clone() for buffer in model.buffers()]

    def __exit__(self, *exception: object) -> None:
        with torch.no_grad():
            for buffer, before in zip(self._model.buffers(), self._buffers, strict=True):
                buffer.copy_(before)
        self._model.zero_grad(set_to_none=True)


def without_sync(world: World, model: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """Return the context for one micro-batch: gradients travel only with the `last` one of a step."""
    return nullcontext() if last or world.world_size == 1 else world.accelerator.no_sync(model)


def align_buffers(world: World, state: TrainingState) -> None:
    """Give every rank rank 0's buffers, as the next training step would, and their averages: all evaluate one model."""
    if world.world_size == 1:
        return
    buffers = list(state.model.buffers())
    if state.ema is not None:
        parameters = {plain_name(name) for name, _ in state.model.named_parameters()}
        buffers += [average for name, average in state.ema.tensors().items() if name not in parameters]
    for buffer in buffers:
        dist.broadcast(buffer, src=0)


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """Scale the whole gradient down to `max_norm` where it is larger; returns the norm that it had (0-d)."""
    return nn.utils.clip_grad_norm_(parameters, max_norm)
