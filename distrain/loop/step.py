"""One optimizer step: the whole mathematics."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distrain.config import Recipe, mix
from distrain.datasets import Batch
from distrain.heartbeat import mark, stepped
from distrain.loop.anomalies import Anomalies, Anomaly, Own
from distrain.loop.forward import told_of
from distrain.loop.indices import given
from distrain.loop.trace import Trace
from distrain.models import Convention
from distrain.optim import AnySchedule, Loss, set_lr
from distrain.strategy import FLAGS, Engine, TrainingState, World
from distrain.strategy.engine import Numbers


@dataclass
class Training:
    """What a step needs. `step` counts finished optimizer steps; everything else is fixed during a run."""

    recipe: Recipe
    engine: Engine
    call: Convention
    """How the model is called on inputs."""
    loss: Loss
    schedule: AnySchedule
    step: int = 0
    trace: Trace | None = None
    """Notes what each step does; None, as always but in a proof, notes nothing."""
    anomalies: Anomalies | None = None
    """Knows which steps are left out; None leaves out none."""
    own: Own | None = None
    """What this rank has computed in its last attempt at a step."""

    @property
    def world(self) -> World:
        """The processes that make the step."""
        return self.engine.world

    @property
    def state(self) -> TrainingState:
        """What a checkpoint of this moment would hold."""
        return self.engine.state


def loss_of(call: Convention, loss: Loss, model: nn.Module, batch: Batch) -> Tensor:
    """Return the sum of a batch's losses (0-d), with the model's auxiliary loss for each that is counted."""
    with told_of(model, len(batch["targets"])):
        outputs = call(model, batch["inputs"])
    loss_sum, count = loss.sum_and_count(loss.taken(outputs), batch["targets"])
    if outputs.aux_loss is not None:
        loss_sum = loss_sum + outputs.aux_loss * count.to(loss_sum.dtype)
    return loss_sum


@dataclass(frozen=True)
class StepNumbers:
    """What a step has to say, on its way to the host: to be read when the next step runs, so that nothing waits."""

    step: int
    """Finished optimizer steps."""
    numbers: Numbers
    loss_scale: float | None = None
    """What the loss was multiplied by; None where it is not scaled."""
    own: Own | None = None
    """What this rank has computed; None for a step that was known to be left out."""

    def read(self) -> tuple[float, float, list[float]]:
        """Return the loss over all ranks, the norm of the gradient before clipping (0 unclipped), the flags' means."""
        norm, (loss, *flags) = self.numbers()
        return loss, norm, flags


def train_step(
    t: Training, micro_batches: Sequence[Batch], flags: Callable[[], Sequence[float]] = lambda: [0.0] * FLAGS
) -> StepNumbers:
    """Make one optimizer step. All ranks call.

    The gradient is that of `sum of losses / count`, both taken over all micro-batches and ranks, so it depends neither
    on how samples are spread over them nor on how many targets each holds. `flags` returns numbers of this rank, which
    are averaged over the ranks on the way: what ranks must agree on needs no reduction of its own. A step whose scaled
    gradient overflows is made again with a smaller scale, from the same samples. A step that is left out changes
    nothing but the count of steps.
    """
    if t.anomalies is not None and (known := t.anomalies.left_out(t.step + 1)) is not None:
        return _leave_out(t, known, flags())
    given(f"step {t.step + 1}", micro_batches)
    mark("sync")
    set_lr(t.engine.optimizer, t.recipe.optim.lr * t.schedule(t.step))
    share = _share(t, micro_batches)
    while True:
        loss_scale, put_buffers_back = t.engine.loss_scale, t.engine.remember_buffers()
        if (numbers := _attempt(t, micro_batches, share, flags)) is not None:
            break
        put_buffers_back()
    if not t.engine.moved:
        put_buffers_back()
    seed = _seed(t, len(micro_batches) - 1)
    t.step += 1
    stepped(t.step)
    if t.trace is not None:
        t.trace.stepped(seed)
    return StepNumbers(t.step, numbers, loss_scale, t.own)


def _leave_out(t: Training, known: Anomaly, flags: Sequence[float]) -> StepNumbers:
    """Count a step without making it; what the ranks tell each other with each step, they tell."""
    means = list(flags)
    read = lambda: means  # noqa: E731
    if t.world.world_size > 1:
        read = t.world.later(t.world.sum(t.world.numbers(torch.zeros(()), flags))[1:] / t.world.world_size)
    seed = _seed(t, 0)
    t.step += 1
    stepped(t.step)
    if t.trace is not None:
        seed_dropout(t.world, seed)
        t.trace.stepped(seed)
    return StepNumbers(t.step, lambda: (known.norm, [known.loss, *read()]), t.engine.loss_scale)


def _share(t: Training, micro_batches: Sequence[Batch]) -> float | Tensor:
    """Return what the sum of losses of a rank is multiplied by."""
    # ranks' gradients are averaged on the way, and this is to be a sum: hence the world's size above the count
    if t.loss.count_is_fixed:
        return t.world.world_size / t.loss.fixed_count(t.recipe.batch.global_batch_size, micro_batches[0]["targets"])
    counts = torch.stack([t.loss.count(batch["targets"]) for batch in micro_batches]).sum()
    return t.world.world_size / t.world.sum(counts.to(t.world.device, torch.float64))


def _seed(t: Training, index: int) -> int:
    return mix(t.recipe.seed, "dropout", t.step, t.world.rank, index)


def _attempt(
    t: Training, micro_batches: Sequence[Batch], share: float | Tensor, flags: Callable[[], Sequence[float]]
) -> Numbers | None:
    engine, last = t.engine, len(micro_batches) - 1
    losses: list[Tensor] = []
    for index, batch in enumerate(micro_batches):
        batch = to_device(batch, t.world)
        seed_dropout(t.world, _seed(t, index))
        with engine.micro_batch(last=index == last):
            mark("forward")
            objective = loss_of(t.call, t.loss, engine.wrapped, batch)
            # handed to the backward pass: multiplied in, it would be one more operation to go back through
            if not isinstance(share, Tensor):
                # a fill: for a copy to a device the host would wait
                share = torch.full((), share, dtype=objective.dtype, device=objective.device)
            share = share.to(objective.dtype)
            losses.append(objective.detach() * share)
            mark("backward")
            if index < last:
                engine.backward(objective, share)
                continue
            loss = losses[0] if last == 0 else torch.stack(losses).sum(dtype=torch.float64)
            t.own = Own(losses, [each["ids"] for each in micro_batches])
            return engine.step(objective, share, loss, flags())
    raise AssertionError("a step has at least one micro-batch")


def to_device(batch: Batch, world: World) -> Batch:
    """Return the batch on this rank's device; floating inputs and targets in float64 where the arithmetic is."""

    def move(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: move(item) for key, item in value.items()}
        if not isinstance(value, Tensor):
            return value
        dtype = torch.float64 if world.precision == "fp64" and value.is_floating_point() else value.dtype
        return value.to(world.device, dtype, non_blocking=True)

    return {key: move(value) if key in ("inputs", "targets") else value for key, value in batch.items()}


def seed_dropout(world: World, seed: int) -> None:
    """Seed every generator that a model may draw from; `torch.manual_seed`, which visits all devices, costs more."""
    torch.default_generator.manual_seed(seed)
    if world.device.type == "cuda":
        torch.cuda.default_generators[world.device.index or 0].manual_seed(seed)
    # layers that are dropped at random, in transformers and elsewhere, often draw from these
    random.seed(seed)
    np.random.seed(seed % 2**32)
