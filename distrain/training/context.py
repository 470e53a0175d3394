"""What a step needs, what it returns, and what a step and an evaluation both do to a batch."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from distrain.config import Recipe
from distrain.datasets.base import Batch
from distrain.datasets.transforms import FINISH
from distrain.networks.calling import Convention
from distrain.optim import Loss, Schedule
from distrain.parallel import StepFlags, Strategy, TrainingState, World
from distrain.training.compiling import NOTHING, Compiled
from distrain.training.forward import told_of
from distrain.training.inner_loss import TARGETS
from distrain.training.skipping import Anomalies, LocalStepResult


@dataclass
class TrainContext:
    """What a step needs. `step` counts finished optimizer steps; everything else is fixed during a run."""

    recipe: Recipe
    strategy: Strategy
    call: Convention
    """How the model is called on inputs."""
    loss: Loss
    schedule: Schedule
    logits_per_sample: int = 0
    """Of a language model whose loss is computed in chunks of them; 0 for others."""
    loss_inside: bool = False
    """Whether the model computes its loss itself; see `compute_loss_inside`."""
    compiled: Compiled = NOTHING
    """What is compiled, and why."""
    step: int = 0
    anomalies: Anomalies | None = None
    """Judges which steps are skipped; None skips none."""
    local: LocalStepResult | None = None
    """What this rank has computed in its last attempt at a step."""

    @property
    def world(self) -> World:
        """The processes that make the step."""
        return self.strategy.world

    @property
    def state(self) -> TrainingState:
        """What a checkpoint of this moment would hold."""
        return self.strategy.state


class PendingMetrics(NamedTuple):
    """Loss, gradient norm and flags, copied to the host asynchronously; read one step later, so that nothing waits."""

    step: int
    """Finished optimizer steps."""
    read: Callable[[], tuple[float, float, StepFlags]]
    """Returns the loss over all ranks, the norm of the gradient before clipping (0 where nothing needs it), and the
    means of the flags."""
    grad_scale: float | None = None
    """What the loss was multiplied by; None where it is not scaled."""
    local: LocalStepResult | None = None
    """What this rank has computed; None for a step that was known to be skipped."""


def loss_of(call: Convention, loss: Loss, model: nn.Module, batch: Batch, *, inside: bool = False) -> Tensor:
    """Return the sum of a batch's losses (0-d), with the model's auxiliary loss for each that is counted.

    `inside`: whether the model computes its loss itself; see `compute_loss_inside`.
    """
    targets = batch["targets"]
    if inside:
        loss.check_targets(targets)
    with told_of(model, len(targets)):
        called: Any = partial(model, **{TARGETS: targets}) if inside else model
        outputs = call(called, batch["inputs"])
    loss_sum = outputs.logits if inside else loss.sum(loss.select(outputs), targets)
    if outputs.aux_loss is not None:
        loss_sum = loss_sum + outputs.aux_loss * loss.count(targets).to(loss_sum.dtype)
    return loss_sum


def to_device(batch: Batch, world: World) -> Batch:
    """Return the batch on this rank's device: floating inputs and targets in float64 under fp64, images as floats.

    The host does not wait for it where the batch is in pinned memory. A batch that is as it has to be is returned
    itself.
    """
    moves = world.device.type != "cpu" or world.tuning["channels_last"] or world.precision == "fp64"
    if not moves and FINISH not in batch:
        return batch
    moved, copies = dict(batch), world.copies
    finish = moved.pop(FINISH, None)
    keys = [key for key in ("inputs", "targets") if key in moved]
    beside = copies is not None and copies.takes([each for key in keys for each in _tensors(moved[key])])
    with copies.batch() if copies is not None and beside else nullcontext(world.put) as copy:
        for key in keys:
            moved[key] = _with_tensors(copy, moved[key])
    if world.tuning["channels_last"]:
        moved["inputs"] = _with_tensors(_channels_last, moved["inputs"])
    if finish is not None:
        moved["inputs"] = finish(moved["inputs"])
    if world.precision == "fp64":
        for key in keys:
            moved[key] = _with_tensors(lambda each: each.double() if each.is_floating_point() else each, moved[key])
    return moved


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)


def _with_tensors(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_tensors(change, item) for key, item in value.items()}
    return change(value) if isinstance(value, Tensor) else value


def _channels_last(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last) if images.dim() == 4 else images


def seed_dropout(world: World, seed: int) -> None:
    """Seed every generator that a model may draw from; `torch.manual_seed`, which visits all devices, costs more."""
    torch.default_generator.manual_seed(seed)
    if world.device.type == "cuda":
        torch.cuda.default_generators[world.device.index or 0].manual_seed(seed)
    # layers that are dropped at random, in transformers and elsewhere, often draw from these
    random.seed(seed)
    np.random.seed(seed % 2**32)
