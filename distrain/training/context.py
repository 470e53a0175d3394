"""What a step needs, what it returns, and what a step and an evaluation both do to a batch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distrain.config import OptimSection, Recipe, mix
from distrain.datasets.base import Batch
from distrain.datasets.nested import map_tensors, tensors_in
from distrain.datasets.transforms import FINISH
from distrain.optim import Schedule, parts_of, set_lr
from distrain.parallel import StepFlags, Strategy, TrainingState, World
from distrain.training import noise
from distrain.training.compiling import NOTHING, Compiled
from distrain.training.skipping import Anomalies, LocalStepResult
from distrain.training.tasks import Objective

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Turn:
    """One optimizer's part in a step: the whole of it, where there is only one."""

    name: str
    """The optimizer's in the recipe; empty where there is only one."""
    number: int
    """Its place among all, from 0."""
    section: OptimSection
    schedule: Schedule
    objective: Objective
    """The losses that train it."""
    every: int = 1
    """It acts at each so many-th step."""

    def lr(self, step: int) -> float:
        """Return the learning rate of `step`, from 0."""
        return self.section.lr * self.schedule(step)


@dataclass
class TrainContext:
    """What a step needs. `step` counts finished optimizer steps; everything else is fixed during a run."""

    recipe: Recipe
    strategy: Strategy
    objective: Objective
    """What is trained: the recipe's loss, or all losses of a task of one's own."""
    turns: Sequence[Turn]
    """Of the optimizers, in the order in which they act."""
    logits_per_sample: int = 0
    """Of a language model whose loss is computed in chunks of them; 0 for others."""
    compiled: Compiled = NOTHING
    """What is compiled, and why."""
    step: int = 0
    anomalies: Anomalies | None = None
    """Judges which steps are skipped; None skips none."""
    local: LocalStepResult | None = None
    """What this rank has computed in its last attempt at a step."""
    _rates: list[tuple[dict[str, Any], float]] = field(default_factory=list)
    """The optimizers' groups, each with the learning rate that the last step has begun with."""
    _warned: bool = False

    def acting(self, step: int) -> Sequence[Turn]:
        """Return the turns of the optimizers that act in `step`, from 1."""
        return self.turns if self._alike else [turn for turn in self.turns if step % turn.every == 0]

    @cached_property
    def _alike(self) -> bool:
        return all(turn.every == 1 for turn in self.turns)

    @cached_property
    def _parts(self) -> list[tuple[Turn, Any]]:
        parts = parts_of(self.strategy.optimizer)
        return [(turn, parts[turn.name]) for turn in self.turns]

    def set_lr(self, step: int) -> None:
        """Set the learning rates of `step`, from 0, and warn where something else has set one since the last step."""
        for group, lr in self._rates:
            if group["lr"] != lr and not self._warned:
                self._warned = True
                logger.warning(
                    f"a callback or the optimizer has set a learning rate to {group['lr']:g}, which lasts until the "
                    f"next step begins: each has that of its schedule, {lr:g} in the last one, so that a resumed run "
                    "has the same. To change it, change the group's lr_scale (group['lr_scale'] *= 0.1), by which the "
                    "schedule is multiplied and which checkpoints keep; or write a schedule"
                )
        self._rates.clear()
        for turn, part in self._parts:
            set_lr(part, turn.lr(step))
            for group in part.param_groups:
                self._rates += ((group, group["lr"]),)

    @cached_property
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
    turn: Turn
    """Of which optimizer these are."""
    grad_scale: float | None = None
    """What the loss was multiplied by; None where it is not scaled."""
    local: LocalStepResult | None = None
    """What this rank has computed; None for a step that was known to be skipped."""
    means: Callable[[], dict[str, float]] | None = None
    """Reads the means that the task reports besides the loss; None where there are none."""
    taken: bool = True
    """Whether the optimizer has stepped."""
    earlier: tuple[PendingMetrics, ...] = ()
    """Of the optimizers that have acted before it in the step; the flags are those of the last one."""

    @property
    def name(self) -> str:
        """Of the optimizer."""
        return self.turn.name

    @property
    def turns(self) -> tuple[PendingMetrics, ...]:
        """Those of each optimizer that has acted in the step, in their order."""
        return (*self.earlier, self)


def to_device(batch: Batch, world: World, *, again: bool = False) -> Batch:
    """Return the batch on this rank's device: floating inputs and targets in float64 under fp64, images as floats.

    The host does not wait for it where the batch is in pinned memory. A batch that is as it has to be is returned
    itself; one that is used `again` is copied, as a model may change its inputs in place.
    """
    if again and world.device.type == "cpu":
        batch = map_tensors(torch.clone, batch)
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
        images = moved["inputs"]  # in any layout: to turn bytes takes the device less time than a loader process
        moved["inputs"] = finish(images if world.tuning["channels_last"] else images.contiguous())
    if world.precision == "fp64":
        for key in keys:
            moved[key] = map_tensors(lambda each: each.double() if each.is_floating_point() else each, moved[key])
    return moved


def _channels_last(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last) if images.dim() == 4 else images


def dropout_seed(t: TrainContext, step: int, index: int, turn: Turn) -> int:
    """Return what seeds the forward pass of a micro-batch of `step`, from 0, by its number on this rank."""
    others = (turn.number,) if turn.number else ()  # the first draws as the only one does
    return mix(t.recipe.seed, "dropout", step, t.world.mesh.data_rank, index, *others)


def seed_forward(t: TrainContext, index: int, turn: Turn, samples: int) -> None:
    """Seed what a forward pass of the step under way draws: of a micro-batch of `samples`, by its number here."""
    world, step = t.world, t.step
    mesh = world.mesh
    noise.seed_generators(dropout_seed(t, step, index, turn), world.device)
    # a step's positions are those of the ranks' first micro-batches, then of their second ones
    first = (index * mesh.data_size + mesh.data_rank) * samples
    noise.of_step(t.recipe.seed, step, first, samples, turn.number)


def seed_dropout(world: World, seed: int) -> None:
    """Seed every generator that a model may draw from."""
    noise.seed_generators(seed, world.device)
