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
from distrain.loop.trace import Trace
from distrain.models import Convention
from distrain.optim import Loss, Schedule, set_lr
from distrain.strategy import TrainingState, World, backward, clip_gradients, without_sync


@dataclass
class Training:
    """What a step needs. `step` counts finished optimizer steps; everything else is fixed during a run."""

    recipe: Recipe
    world: World
    model: nn.Module
    """Wrapped for the world."""
    optimizer: torch.optim.Optimizer
    """Prepared for the world."""
    parameters: list[nn.Parameter]
    """Those that are trained."""
    call: Convention
    """How the model is called on inputs."""
    loss: Loss
    schedule: Schedule
    state: TrainingState
    step: int = 0
    trace: Trace | None = None
    """Notes what each step does; None, as always but in a proof, notes nothing."""

    def objective(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the sum of a batch's losses (0-d), with the model's auxiliary loss for each that is counted."""
        outputs = self.call(model, batch["inputs"])
        loss_sum, count = self.loss.sum_and_count(self.loss.taken(outputs), batch["targets"])
        if outputs.aux_loss is not None:
            loss_sum = loss_sum + outputs.aux_loss * count.to(loss_sum.dtype)
        return loss_sum


@dataclass(frozen=True)
class StepNumbers:
    """What a step has to say, on its way to the host: to be read when the next step runs, so that nothing waits."""

    step: int
    """Finished optimizer steps."""
    means: Callable[[], list[float]]
    norm: Callable[[], list[float]]

    def read(self) -> tuple[float, float, list[float]]:
        """Return the loss over all ranks, the norm of the gradient before clipping (0 unclipped), the flags' means."""
        loss, *flags = self.means()
        return loss, self.norm()[0], flags


def train_step(t: Training, micro_batches: Sequence[Batch], flags: Sequence[float] = (0.0, 0.0, 0.0)) -> StepNumbers:
    """Make one optimizer step. All ranks call.

    The gradient is that of `sum of losses / count`, both taken over all micro-batches and ranks, so it depends neither
    on how samples are spread over them nor on how many targets each holds. `flags` are three numbers of this rank that
    are averaged over the ranks on the way: what ranks must agree on needs no reduction of its own.
    """
    world, loss = t.world, t.loss
    set_lr(t.optimizer, t.recipe.optim.lr * t.schedule(t.step))
    # ranks' gradients are averaged on the way, and this is to be a sum: hence the world's size above the count
    share: float | Tensor
    if loss.count_is_fixed:
        share = world.world_size / loss.fixed_count(t.recipe.batch.global_batch_size, micro_batches[0]["targets"])
    else:
        counts = torch.stack([loss.count(batch["targets"]) for batch in micro_batches]).sum()
        share = world.world_size / world.sum(counts.to(world.device))
    losses: list[Tensor] = []
    last = len(micro_batches) - 1
    means: Callable[[], list[float]]
    for index, batch in enumerate(micro_batches):
        batch = to_device(batch, world)
        seed = mix(t.recipe.seed, "dropout", t.step, world.rank, index)
        seed_dropout(world, seed)
        with without_sync(world, t.model, last=index == last):
            objective = t.objective(t.model, batch)
            # handed to the backward pass: multiplied in, it would be one more operation to go back through
            share = torch.as_tensor(share, dtype=objective.dtype, device=objective.device)
            losses.append(objective.detach() * share)
            if index < last:
                objective.backward(share)
            else:
                whole = losses[0] if last == 0 else torch.stack(losses).sum(dtype=torch.float64)
                means = backward(world, t.model, objective, share, whole, flags)
    clip = t.recipe.optim.clip_norm
    norm = clip_gradients(t.parameters, clip) if clip is not None else torch.zeros(())
    t.optimizer.step()
    t.optimizer.zero_grad(set_to_none=True)
    if t.state.ema is not None:
        t.state.ema.update()
    t.step += 1
    if t.trace is not None:
        t.trace.stepped(seed)
    return StepNumbers(t.step, means, world.later(norm.reshape(1)))


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
