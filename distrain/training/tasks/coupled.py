"""A task whose losses couple samples: each micro-batch sees what is gathered of the whole global batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distrain.config import UserError
from distrain.datasets.base import Batch
from distrain.parallel import World
from distrain.training import noise
from distrain.training.tasks.gathering import Exchanged, Gathering, Kept, Known, Repeated, Slot
from distrain.training.tasks.inside import TaskModel, call_inside
from distrain.training.tasks.objective import Means, Scored, TaskObjective
from distrain.training.tasks.task import TaskContext

_DRIFT = 0.05
"""Of what a micro-batch gives with its gradient, from what it gave without, relative to the largest number."""
_SPREAD = 1e-4
"""Of the loss between micro-batches, relative to it; all compute it from the same numbers."""


class CoupledObjective(TaskObjective):
    """Computes the whole loss with each micro-batch of each rank; what is trained and reported is the mean of them.

    Of a single micro-batch on each rank, `gather` exchanges tensors where it is called. Of several, and in the first
    step, all are computed without gradient before (`look_ahead`), and each then sees what is known of all: the gradient
    is that of the whole batch at once, in the memory of one micro-batch (Gao et al., "Scaling Deep Contrastive Learning
    Batch Size under Memory Limited Setup", 2021).
    """

    couples = True
    _count_hint = (
        "in a task that couples samples each micro-batch computes the LossSum of the whole batch: gather what it is "
        "over, and let the task's method count(batch) return what a micro-batch has of it"
    )

    _gathering: Gathering
    _calls: list[Slot]
    """Of the first micro-batches of a step that looks ahead."""
    _copies = 1
    """Of the whole loss in a step: micro-batches times ranks."""
    _at = 0
    """Micro-batches of the step under way that were gone through."""
    _world: World | None = None
    """That of the step under way; None outside of a step."""
    _layout_of_calls: list[Slot] | None = None
    """Of `gather`; known after the first step has begun."""

    def bind(self, model: nn.Module, context: TaskContext) -> None:
        super().bind(model, context)
        self._group = self.task.evaluation_group or context.recipe.batch.global_batch_size
        if self._group < 1:
            raise UserError(f"{self.name}: evaluation_group is {self._group}; expected at least 1, or None")

    # ---- a step

    def loss_scale(self, world: World, global_batch_size: int, micro_batches: Sequence[Batch]) -> Mapping[str, Any]:
        self._micro_batches, self._copies = len(micro_batches), len(micro_batches) * world.world_size
        self._next_world = world
        scales = super().loss_scale(world, global_batch_size, micro_batches)
        return {name: scale / self._copies for name, scale in scales.items()}

    def begin_step(self) -> None:
        super().begin_step()
        self._world = self._next_world
        self._at = 0
        self._ahead: list[list[Tensor]] = []
        self._whole: list[Tensor] | None = None
        self._losses: list[Tensor] = []
        self._drifts: list[Tensor] = []

    @property
    def looks_ahead(self) -> bool:
        """Whether a step first computes all that is gathered: there are others, and they cannot be asked in between.

        Also in the first step, in which ranks find out whether they make the same calls.
        """
        return self._copies > 1 and (self._micro_batches > 1 or self._layout_of_calls is None)

    def look_ahead(self, model: nn.Module, batch: Batch) -> None:
        """Keep what a micro-batch gathers. Call it for each, in their order, without gradients."""
        self._batch = batch
        known = self._calls if self._ahead else self._layout_of_calls
        kept = self._gathering = Kept(len(batch["ids"]), self._copies, known)
        call_inside(model, self._compute)
        self._losses.clear()
        self._ahead.append(kept.tensors)
        self._calls = kept.calls

    def exchange(self) -> None:
        """Give each rank what all have kept. All ranks call. Raises UserError where their calls differ."""
        world = self._world
        assert world is not None
        if self._layout_of_calls is None:
            ranks = world.gather(self._calls)
            if other := next((each for each in ranks if each != ranks[0]), None):
                raise UserError(
                    f"{self.name}: losses gather {_listed(ranks[0])} on rank 0 and {_listed(other)} on rank "
                    f"{ranks.index(other)}; make the same calls of distrain.gather on all ranks"
                )
            self._layout_of_calls = self._calls
        self._whole = []
        for number in range(len(self._calls)):
            own = torch.stack([each[number] for each in self._ahead])  # (micro-batches, samples, ...)
            # a step's positions are those of the ranks' first micro-batches, then of their second ones
            self._whole.append(torch.stack(world.gather_tensors(own), dim=1).flatten(0, 2))
        self._ahead = []

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        samples, world = len(batch["ids"]), self._world
        if world is None:  # a dry run
            self._gathering = Repeated(samples, self._copies)
        elif self._whole is None:
            self._gathering = Exchanged(samples, world, self._layout_of_calls)
        else:
            place = self._at * world.mesh.data_size + world.mesh.data_rank
            self._gathering = Known(samples, self._whole, place * samples, self._copies)
        self._at += 1
        found = super().loss_sum(model, batch)
        if isinstance(self._gathering, Known):
            self._drifts += self._gathering.drifts
        elif world is not None and self._layout_of_calls is None:
            self._layout_of_calls = self._gathering.calls
        return found

    def means_async(self, world: World) -> Callable[[], dict[str, float]]:
        read = super().means_async(world)
        self._world, self._whole = None, None
        copies, names = self._copies, self.names
        if copies == 1:
            return read
        losses = torch.stack(self._losses).double()  # (micro-batches, losses)
        ratio = losses.new_zeros(1)
        if self._drifts:
            drift, largest = torch.stack(self._drifts).unbind(1)
            ratio = (drift / largest.clamp(min=1e-12)).max()[None] / world.world_size
        sums = torch.cat((losses.sum(0), losses.square().sum(0), ratio))
        agreed = world.to_host_async(world.sum_async(sums)())
        tolerance = _SPREAD if world.mixed_precision.autocast is None else 10 * _SPREAD

        def means() -> dict[str, float]:
            found = read()  # where a count is wrong, this says so
            numbers = agreed()
            if numbers[-1] > _DRIFT:
                raise UserError(
                    f"{self.name}: what distrain.gather was given for a micro-batch differs by {numbers[-1]:.0%} "
                    "between its two passes, without and with gradients, so that the losses are not of one batch; "
                    "gather nothing that is computed from what was gathered, and draw random numbers from the default "
                    "generators"
                )
            for name, total, squares in zip(names, numbers, numbers[len(names) :], strict=False):
                mean = total / copies
                spread = math.sqrt(max(squares / copies - mean * mean, 0.0)) if math.isfinite(squares) else 0.0
                if spread > tolerance * abs(mean) + 1e-6:
                    raise UserError(
                        f"{self.name}: loss {name!r} differs between the micro-batches of a step, by {spread:.3g} "
                        f"around {mean:.6g}; in a task that couples samples each computes the loss of the whole batch, "
                        "from what distrain.gather returns alone"
                    )
            return found

        return means

    # ---- an evaluation

    def begin_evaluation(self) -> None:
        self._kept: list[tuple[Tensor, list[Tensor]]] = []
        """Of each batch: ids, and what was gathered."""
        self._sample: Batch | None = None
        """A batch with which the losses of groups are computed."""

    def evaluate(self, model: nn.Module, batch: Batch, *, predict: bool) -> Any:
        kept = int((batch["ids"] >= 0).sum()) or len(batch["ids"])
        known = [Slot(tuple(each.shape[1:]), each.dtype) for each in self._kept[0][1]] if self._kept else None
        gathering = self._gathering = Kept(kept, 1, known)
        found = super().evaluate(model, batch, predict=predict)
        self._kept.append((self._batch["ids"], gathering.tensors))
        self._sample = self._sample or self._batch
        return found

    def score(self, evaluated: Any, batch: Batch, world: World) -> Scored:
        """Return what is of single samples; `coupled` returns the rest."""
        scored = super().score(evaluated, batch, world)
        names, pairs = scored.means
        self._names = names
        own = torch.arange(len(names), device=pairs.device)[:, None] < self._reported
        return scored._replace(means=Means(names, pairs.masked_fill(own, 0)))

    def coupled(self, model: nn.Module, world: World) -> Means:
        sample = self._sample
        assert sample is not None, "each rank has at least one batch"
        ids, whole = self._in_order(world)
        groups = [range(start, min(start + self._group, len(ids))) for start in range(0, len(ids), self._group)]
        total: Tensor | None = None
        for start in range(0, len(groups), world.world_size):
            number = start + world.rank
            group = groups[number] if number < len(groups) else groups[0]  # ranks compute equally often
            self._batch = sample
            rows = slice(group.start, group.stop)
            self._gathering = Known(len(sample["ids"]), [each[rows] for each in whole])
            noise.seed_evaluation(self._seed, int(ids[group.start]))
            _, pairs, _ = call_inside(model, self._compute)
            pairs = pairs if number < len(groups) else torch.zeros_like(pairs)
            total = pairs if total is None else total + pairs
        assert total is not None
        self._kept, self._sample = [], None
        further = total.new_zeros((len(self._names) - len(total), 2))
        return Means(self._names, torch.cat((total, further)))

    def _in_order(self, world: World) -> tuple[Tensor, list[Tensor]]:
        """Return the ids of all samples of an evaluation, ascending, and what was gathered of them, by call."""
        ids = torch.cat([each for each, _ in self._kept])
        columns = [torch.cat(each) for each in zip(*(tensors for _, tensors in self._kept), strict=True)]
        most = max(world.gather(len(ids)))

        def of_all(own: Tensor, fill: int) -> Tensor:
            padded = own.new_full((most, *own.shape[1:]), fill)
            padded[: len(own)] = own
            return torch.cat(world.gather_tensors(padded))

        found = of_all(world.to_device(ids), -1)
        order = found.argsort()
        order = order[int((found < 0).sum()) :]  # padding comes first
        return found[order], [of_all(each, 0)[order] for each in columns]

    # ---- within the forward pass

    _reported = 0
    """How many names are of the losses and of what they log."""

    def _samples(self) -> int:
        return self._gathering.size

    def _compute(self, model: TaskModel) -> tuple[Tensor, Tensor, tuple[str, ...]]:
        with self._gathering.active():
            values, pairs, names = super()._compute(model)
        self._reported = len(names)
        if self._world is None:
            return values, pairs, names
        self._losses.append(values.detach())
        return values, pairs / self._copies, names


def _listed(calls: Sequence[Slot]) -> str:
    return ", ".join(f"rows {each.shape} of {each.dtype}" for each in calls) or "nothing"
