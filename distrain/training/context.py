"""What a step needs, what it returns, and what a step and an evaluation both do to a batch."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from distrain.config import Recipe, mix
from distrain.datasets.base import Batch
from distrain.datasets.nested import map_tensors, tensors_in
from distrain.datasets.transforms import FINISH
from distrain.optim import Schedule
from distrain.parallel import StepFlags, Strategy, TrainingState, World
from distrain.training.compiling import NOTHING, Compiled
from distrain.training.skipping import Anomalies, LocalStepResult
from distrain.training.tasks import Objective


@dataclass
class TrainContext:
    """What a step needs. `step` counts finished optimizer steps; everything else is fixed during a run."""

    recipe: Recipe
    strategy: Strategy
    objective: Objective
    """What is trained: the recipe's loss, or the losses of a task of one's own."""
    schedule: Schedule
    logits_per_sample: int = 0
    """Of a language model whose loss is computed in chunks of them; 0 for others."""
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
    means: Callable[[], dict[str, float]] | None = None
    """Reads the means that the task reports besides the loss; None where there are none."""


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
    beside = copies is not None and copies.takes([each for key in keys for each in tensors_in(moved[key])])
    with copies.batch() if copies is not None and beside else nullcontext(world.put) as copy:
        for key in keys:
            moved[key] = map_tensors(copy, moved[key])
    if world.tuning["channels_last"]:
        moved["inputs"] = map_tensors(_channels_last, moved["inputs"])
    if finish is not None:
        moved["inputs"] = finish(moved["inputs"])
    if world.precision == "fp64":
        for key in keys:
            moved[key] = map_tensors(lambda each: each.double() if each.is_floating_point() else each, moved[key])
    return moved


def _channels_last(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last) if images.dim() == 4 else images


def dropout_seed(t: TrainContext, index: int) -> int:
    """Return what seeds the forward pass of a micro-batch of the step under way, by its number on this rank."""
    return mix(t.recipe.seed, "dropout", t.step, t.world.mesh.data_rank, index)


def seed_dropout(world: World, seed: int) -> None:
    """Seed every generator that a model may draw from; `torch.manual_seed`, which visits all devices, costs more."""
    torch.default_generator.manual_seed(seed)
    if world.device.type == "cuda":
        torch.cuda.default_generators[world.device.index or 0].manual_seed(seed)
    # layers that are dropped at random, in transformers and elsewhere, often draw from these
    random.seed(seed)
    np.random.seed(seed % 2**32)
