"""What a step and an evaluation ask of a task: sums of losses, what they are divided by, and predictions."""

from __future__ import annotations

import copy
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from distrain.config import UserError
from distrain.datasets.base import Batch
from distrain.datasets.nested import map_tensors, rows_of
from distrain.networks.calling import Convention, calling_convention
from distrain.optim import Loss
from distrain.optim.losses.shapes import wide
from distrain.parallel import World, keep_with
from distrain.run.media import Encoded
from distrain.system.numbers import a_kind
from distrain.training import noise
from distrain.training.forward import FAILS, explain
from distrain.training.inner_loss import TARGETS
from distrain.training.tasks.inside import TaskModel, call_inside, run_inside
from distrain.training.tasks.task import LossSum, Task, TaskContext

_TAKEN = frozenset(("event", "step", "split", "time", "epoch", "samples", "lr", "grad_norm", "loss_scale", "seconds"))
"""Columns of rows that no loss and no mean of one's own may have."""
_WEIGHTS = "task_weights"


class Means(NamedTuple):
    """Sums and counts of one batch on this rank."""

    names: tuple[str, ...]
    pairs: Tensor
    """(names, 2) float64: the sum and the count of each."""


class Scored(NamedTuple):
    """What an evaluation has of one batch."""

    means: Means
    """Of the losses first, in the order of `Objective.losses`."""
    predictions: Any
    """What metrics compare with `targets`; None where nothing asks for them."""
    targets: Any
    keep: Tensor | None
    """(batch,) bool on the device: rows that are no padding; None: all."""
    loss: tuple[Tensor, Tensor] | None
    """Sum and count of the recipe's loss."""


class Objective(ABC):
    """What is trained. All ranks call each method alike."""

    name: str
    """For messages."""
    loss: Loss | None = None
    """The recipe's loss, where that is all there is to it."""
    call: Convention
    """How the model is called on the inputs of a batch; `bind` sets it."""
    weights: Mapping[str, float] = {}
    names: tuple[str, ...] = ("loss",)
    """Of the losses; known after the first batch."""
    follows = False
    """Whether `at_step` and `step_taken` are called with each step."""
    couples = False
    """Whether losses take the samples of a step together; see `CoupledObjective`."""

    @property
    @abstractmethod
    def holds(self) -> Any:
        """What may have a state of its own, for a proof to look at."""

    @abstractmethod
    def bind(self, model: nn.Module, context: TaskContext) -> None:
        """Take the model, before it is sharded or wrapped."""

    @abstractmethod
    def loss_scale(self, world: World, global_batch_size: int, micro_batches: Sequence[Batch]) -> Any:
        """Return what the sums of a rank's losses are multiplied by: 1 / count over all ranks, times their number."""

    @abstractmethod
    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the sum of a batch's losses: 0-d, or (losses,) where there are several by name."""

    def of(self, optimizer: str) -> Objective:
        """Return what trains one of several optimizers; call it after `bind`, before the first step."""
        raise NotImplementedError

    def as_scale(self, loss_scale: Any, loss_sum: Tensor) -> Tensor:
        """Return `loss_scale` as a tensor in the shape and dtype of a loss."""
        if isinstance(loss_scale, Tensor):
            return loss_scale.to(loss_sum.dtype)
        return _constant(loss_scale, loss_sum.dtype, loss_sum.device)

    def at_step(self, step: int) -> None:  # noqa: B027 - a loss depends on no step
        """Take note of how many steps were taken."""

    def step_taken(self, model: nn.Module) -> None:  # noqa: B027 - a loss keeps nothing
        """Have the task keep what it keeps of a step."""

    def scalars(self) -> dict[str, Any]:
        """Return what a checkpoint holds of it besides the state of a task."""
        return {}

    def load(self, scalars: Mapping[str, Any]) -> None:  # noqa: B027 - a loss keeps nothing
        """Take up what `scalars` returned; call it after `bind`."""

    def begin_step(self) -> None:  # noqa: B027 - most report nothing besides their loss
        """Forget what was computed for a step that is made again."""

    @property
    def looks_ahead(self) -> bool:
        """Whether a step begins with `look_ahead` for each of its micro-batches, and `exchange`."""
        return False

    def look_ahead(self, model: nn.Module, batch: Batch) -> None:
        """Keep what a micro-batch gives without gradient for the losses of all of them."""
        raise NotImplementedError

    def exchange(self) -> None:
        """Give each rank what all have kept."""
        raise NotImplementedError

    def means_async(self, world: World) -> Callable[[], dict[str, float]] | None:
        """Begin to reduce what a step reports besides the loss; returns a function that reads it a step later."""
        return None

    def begin_evaluation(self) -> None:  # noqa: B027 - most keep nothing from batch to batch
        """Forget what was kept of an evaluation."""

    def coupled(self, model: nn.Module, world: World) -> Means:
        """Return the losses that take samples of several batches together, once each batch is evaluated."""
        raise NotImplementedError

    @abstractmethod
    def evaluate(self, model: nn.Module, batch: Batch, *, predict: bool) -> Any:
        """Take a batch (on the device, `ids` on the host) through the model in an evaluation: one forward pass."""

    @abstractmethod
    def score(self, evaluated: Any, batch: Batch, world: World) -> Scored:
        """Return what an evaluation adds up of what `evaluate` has returned."""

    @abstractmethod
    def predict(self, model: nn.Module, batch: Batch) -> Any:
        """Return the predictions of a batch."""

    @property
    def shows(self) -> bool:
        """Whether the task says itself what to show of samples."""
        return False

    def show(self, model: nn.Module, batch: Batch, *, keep: bool) -> list[Encoded]:
        """Return what the task shows of samples, an empty list unless `keep`."""
        raise NotImplementedError


class SupervisedObjective(Objective):
    """The recipe's loss over the model's outputs. The model may compute it itself; see `compute_loss_inside`."""

    loss: Loss

    inside = False
    """Whether the model computes its loss itself."""

    def __init__(self, loss: Loss):
        self.name = loss.name
        self.loss = loss

    @property
    def holds(self) -> Any:
        """The loss."""
        return self.loss

    def bind(self, model: nn.Module, context: TaskContext) -> None:
        """Note how the model is called."""
        self.call = calling_convention(model)
        self._seed = context.recipe.seed

    def loss_scale(self, world: World, global_batch_size: int, micro_batches: Sequence[Batch]) -> float | Tensor:
        """Return it as a number where the count is that of the samples, otherwise as a tensor (0-d)."""
        # gradients are averaged over the ranks, and the sum is wanted: hence the world size above the count
        if self.loss.count_is_fixed:
            return world.world_size / self.loss.fixed_count(global_batch_size, micro_batches[0]["targets"])
        counts = torch.stack([self.loss.count(batch["targets"]) for batch in micro_batches]).sum()
        if world.world_size == 1:
            count = counts.item()  # of targets on the host
            return 1 / count if count else math.inf
        return world.world_size / world.sum(world.to_device(counts.double()))

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the sum (0-d), with the model's auxiliary loss for each target that is counted."""
        targets = batch["targets"]
        if self.inside:
            self.loss.check_targets(targets)
        called: Any = partial(model, **{TARGETS: targets}) if self.inside else model
        try:
            outputs = self.call(called, batch["inputs"])
        except FAILS as error:
            explain(error, model, len(targets))
            raise
        loss_sum = outputs.logits if self.inside else self.loss.sum(self.loss.select(outputs), targets)
        if outputs.aux_loss is not None:
            loss_sum = loss_sum + outputs.aux_loss * self.loss.count(targets).to(loss_sum.dtype)
        return loss_sum

    def evaluate(self, model: nn.Module, batch: Batch, *, predict: bool) -> Any:
        """Return the model's output."""
        with noise.evaluating(self._seed, batch["ids"]):
            return self.call(model, batch["inputs"])

    def score(self, evaluated: Any, batch: Batch, world: World) -> Scored:
        """Compare it with the targets; the auxiliary loss is no part of an evaluation."""
        keep, targets = world.to_device(batch["ids"]) >= 0, batch["targets"]
        loss_sum, count = self.loss.sum_and_count(self.loss.select(evaluated), targets, keep)
        pairs = torch.stack((loss_sum.double(), count.double()))[None]
        return Scored(Means(self.names, pairs), evaluated.logits, targets, keep, (loss_sum, count))

    def predict(self, model: nn.Module, batch: Batch) -> Any:
        """Return the model's first output."""
        with noise.evaluating(self._seed, batch["ids"]):
            return self.call(model, batch["inputs"]).logits


class TaskObjective(Objective):
    """The losses of a task of one's own, computed within the model's forward pass, inside every strategy's hooks."""

    follows = True

    _count_hint = "let the task's method count(batch) return what its LossSum says"

    def __init__(self, task: Task, name: str):
        self.name = name
        self.task = task
        self._measures = type(task).measure is not Task.measure
        self._keeps = type(task).step_taken is not Task.step_taken
        self._counts_itself = type(task).count is not Task.count
        self._batch: Batch = {}
        self._sums: dict[str, Tensor] = {}
        """(2,) float64 by name: of the micro-batches of a step."""
        self._layout: tuple[str, ...] | None = None
        """The names that ranks reduce, in one order on all of them."""
        self._asked: dict[str, Tensor | float] = {}
        """What `Task.count` has said of a step, over all ranks."""
        self._optimizers = tuple(task.optimizers)
        """Whose losses these are; none: those of the only one."""
        self._of_step: dict[str, None] = {}
        """The names of the losses of a step: those of its micro-batches, which may not all have the same."""
        self._built: dict[str, float] | None = None
        """The weights of the losses as the task was built."""
        self._scales: dict[tuple[str, ...], Tensor] = {}
        """What their sums are multiplied by, in the order in which a micro-batch of the step has them."""

    @property
    def weights(self) -> Mapping[str, float]:  # type: ignore[override] # the task may set others, as by its step
        """What each loss is multiplied by."""
        return self.task.weights

    @property
    def holds(self) -> Any:
        """What the task has on itself, but for what is noted there for it."""
        ours = {"logged", "convention", "showing", "shown", "step", "_step"}
        ours |= {"weights"} if self._numbers() is not None else set()  # `scalars` has them
        return {key: value for key, value in vars(self.task).items() if key not in ours}

    def bind(self, model: nn.Module, context: TaskContext) -> None:
        """Have the model run what the task computes, and the task build what it needs."""
        self.call = self.task.convention = calling_convention(model)
        self._seed = context.recipe.seed
        self.task.prepare(context)
        self._built = self._numbers()
        if hasattr(self.task, "state_dict"):
            keep_with(model, self.task)
        run_inside(model)

    def _numbers(self) -> dict[str, float] | None:
        """Return the weights of the losses; None where they are no plain numbers, or cannot be set."""
        weights = self.task.weights
        plain = all(isinstance(each, int | float) and math.isfinite(each) for each in weights.values())
        return dict(weights) if plain and not inspect.isdatadescriptor(getattr(type(self.task), "weights", 0)) else None

    def scalars(self) -> dict[str, Any]:
        """Return the weights that the task has changed since it was built."""
        weights = self._numbers()
        return {} if weights is None or weights == self._built else {_WEIGHTS: weights}

    def load(self, scalars: Mapping[str, Any]) -> None:
        weights = scalars.get(_WEIGHTS, self._built)
        if weights is not None and weights != self._numbers():
            self.task.weights = dict(weights)

    def at_step(self, step: int) -> None:
        if not callable(getattr(type(self.task), "step", None)):  # a method of the user's own
            self.task.step = step

    def of(self, optimizer: str) -> TaskObjective:
        found = copy.copy(self)
        found._sums, found._asked, found._of_step, found._scales = {}, {}, {}, {}
        found._optimizers = (optimizer,)
        return found

    def step_taken(self, model: nn.Module) -> None:
        if self._keeps:
            with torch.no_grad():
                self.task.step_taken(model)

    # ---- a step

    def loss_scale(self, world: World, global_batch_size: int, micro_batches: Sequence[Batch]) -> Mapping[str, Any]:
        """Return it by name; `""` is that of losses that are over samples."""
        scales: dict[str, Any] = {"": world.world_size / global_batch_size}
        self._asked, self._scales = {"": float(global_batch_size)}, {}
        if not self._counts_itself or not (found := [self.task.count(batch) for batch in micro_batches])[0]:
            return scales
        names = list(found[0])
        counts = torch.stack(
            [torch.as_tensor(sum(each[name] for each in found), dtype=torch.float64) for name in names]
        )
        if world.world_size == 1:
            numbers = counts.tolist()  # they are on the host
            self._asked |= dict(zip(names, numbers, strict=True))
            scales |= {name: 1 / each if each else math.inf for name, each in zip(names, numbers, strict=True)}
        else:
            total = world.sum(world.to_device(counts))
            self._asked |= dict(zip(names, total, strict=True))
            scales |= dict(zip(names, world.world_size / total, strict=True))
        return scales

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the sums (losses,)."""
        self._batch = batch
        try:
            sums, pairs, names = call_inside(model, self._compute)
        except FAILS as error:
            explain(error, model, len(batch["ids"]))
            raise
        self.names = names[: len(sums)]
        self._of_step |= dict.fromkeys(self.names)
        for name, pair in zip(names, pairs, strict=True):
            self._sums[name] = self._sums[name] + pair if name in self._sums else pair
        return sums

    def as_scale(self, loss_scale: Mapping[str, Any], loss_sum: Tensor) -> Tensor:
        """Return (losses,)."""
        if self.names not in self._scales:
            each = [self.weights.get(name, 1.0) * loss_scale.get(name, loss_scale[""]) for name in self.names]
            scales = torch.stack([_on(value, loss_sum) for value in each])
            if self._counts_itself and len(each) > 1:  # one that is over nothing in a step trains nothing in it
                nothing = scales.isinf()
                scales = torch.where(nothing & ~nothing.all(), 0.0, scales)
            self._scales[self.names] = scales
        return self._scales[self.names]

    def begin_step(self) -> None:
        self._sums, self._of_step = {}, {}

    def means_async(self, world: World) -> Callable[[], dict[str, float]]:
        """Reduce the losses and what was logged; raises UserError where a count is not what was promised."""
        if self._layout is None:
            ranks = world.gather(tuple(self._sums))
            self._layout = tuple(dict.fromkeys(name for names in ranks for name in names))
            if taken := sorted(name for name in self._layout if name.partition("/")[0] in _TAKEN):
                raise UserError(f"{self.name}: {taken[0]!r} is a column that rows have already; take another name")
            if "loss" in self._layout and len(self._of_step) > 1:
                raise UserError(f"{self.name}: 'loss' is the sum of all losses; give the one of that name another")
        layout, asked = self._layout, self._asked
        if more := [name for name in self._sums if name not in layout]:
            raise UserError(
                f"{self.name}: {more[0]!r} is reported here and was not in the first step; report it in each step, "
                "with a count of 0 where there is nothing"
            )
        nothing = torch.zeros(2, dtype=torch.float64, device=world.device)
        pairs = torch.stack([self._sums.get(name, nothing) for name in layout])
        losses = tuple(self._of_step)
        promised = torch.stack([_on(asked.get(name, asked[""]), pairs) for name in losses])
        read = world.to_host_async(world.sum_async(pairs)().flatten(), promised)

        def means() -> dict[str, float]:
            numbers = read()
            found = {}
            for place, name in enumerate(layout):
                total, count = numbers[2 * place : 2 * place + 2]
                if name in losses:
                    said = numbers[2 * len(layout) + losses.index(name)]
                    if abs(count - said) > 1e-6 * max(abs(count), abs(said)):
                        raise UserError(
                            f"{self.name}: loss {name!r} is over {count:g} in this step, and was divided by {said:g}; "
                            f"{self._count_hint}"
                        )
                if name != "loss":
                    found[name] = total / count if count else math.nan
            return found

        return means

    # ---- an evaluation

    def evaluate(self, model: nn.Module, batch: Batch, *, predict: bool) -> Any:
        """Return losses, further means and predictions of the rows that are no padding; where all are, of them."""
        keep = (batch["ids"] >= 0).tolist()
        self._batch = batch if all(keep) or not any(keep) else rows_of(batch, keep)
        with noise.evaluating(self._seed, self._batch["ids"]):
            found = call_inside(model, self._predict if predict or self._measures else self._judge)
        return found, self._batch, any(keep)

    def score(self, evaluated: Any, batch: Batch, world: World) -> Scored:
        """Return it; of a batch that is padding alone nothing counts, but metrics get it: each rank must have sums."""
        (losses, pairs, names, predictions), of, counts = evaluated
        self.names = names[:losses]
        means = Means(names, pairs if counts else torch.zeros_like(pairs))
        keep = None if counts else world.to_device(batch["ids"]) >= 0
        return Scored(means, predictions, of.get("targets"), keep, None)

    def predict(self, model: nn.Module, batch: Batch) -> Any:
        self._batch = batch
        with noise.evaluating(self._seed, batch["ids"]):
            return call_inside(model, lambda inner: self.task.predictions(inner, batch))

    @property
    def shows(self) -> bool:
        return type(self.task).show is not Task.show

    def show(self, model: nn.Module, batch: Batch, *, keep: bool) -> list[Encoded]:
        task, self._batch = self.task, batch
        task.showing, task.shown = True, [] if keep else None
        try:
            with noise.evaluating(self._seed, batch["ids"]):
                call_inside(model, lambda inner: task.show(inner, batch))
            return task.shown or []
        finally:
            task.showing, task.shown = False, None

    # ---- within the forward pass

    def _samples(self) -> int:
        """Return how many samples losses are over that say nothing else."""
        return len(self._batch["ids"])

    def _compute(self, model: TaskModel) -> tuple[Tensor, Tensor, tuple[str, ...]]:
        """Return the sums (losses,), and (sum, count) of all that is reported (names, 2) float64 with the names."""
        samples = self._samples()
        self.task.logged.clear()
        losses = self._named_losses(model)
        sums = {name: _summed(value, samples, f"{self.name}: loss {name!r}") for name, value in losses.items()}
        logged = self.task.logged
        if twice := sums.keys() & logged.keys():
            raise UserError(f"{self.name}: {min(twice)!r} is a loss, and logged too; give one of them another name")
        values = torch.stack([each.sum for each in sums.values() if isinstance(each.sum, Tensor)])
        pairs = torch.stack([_pair(each, samples, values) for each in (*sums.values(), *logged.values())])
        return values, pairs, (*sums, *logged)

    def _named_losses(self, model: TaskModel) -> dict[str, LossSum | Tensor]:
        """Return the task's losses: all of them, or those of the optimizer whose turn it is."""
        losses: dict[str, LossSum | Tensor] = {}
        turns: list[tuple[str, ...]] = [(name,) for name in self._optimizers] or [()]
        for arguments in turns:
            batch = self._batch if len(turns) == 1 else map_tensors(torch.clone, self._batch)
            found = self.task.losses(model, batch, *arguments)
            where = f"{self.name}.losses" + (f" for optimizer {arguments[0]!r}" if arguments else "")
            if not isinstance(found, Mapping) or not found:
                what = "no loss" if isinstance(found, Mapping) else a_kind(found)
                raise UserError(f"{where} returned {what}; expected a dict of at least one LossSum by its name")
            if twice := losses.keys() & found.keys():
                raise UserError(
                    f"{where} returned {min(twice)!r}, which trains another optimizer too; give each its own name"
                )
            losses |= found
        return losses

    def _judge(self, model: TaskModel) -> tuple[int, Tensor, tuple[str, ...], Any]:
        values, pairs, names = self._compute(model)
        return len(values), pairs, names, None

    def _predict(self, model: TaskModel) -> tuple[int, Tensor, tuple[str, ...], Any]:
        batch = self._batch
        self._batch = map_tensors(torch.clone, batch)  # as if they were asked for alone: a model may change its inputs
        losses, pairs, names, _ = self._judge(model)
        self._batch = batch
        noise.of_evaluation(self._seed, batch["ids"])
        predictions = self.task.predictions(model, map_tensors(torch.clone, batch))
        samples = len(self._batch["ids"])
        further = {
            name: _summed(value, samples, f"{self.name}.measure: {name!r}")
            for name, value in self.task.measure(predictions, self._batch).items()
        }
        if twice := further.keys() & set(names):
            raise UserError(f"{self.name}.measure: {min(twice)!r} is reported by its losses already")
        more = [_pair(each, samples, pairs)[None] for each in further.values()]
        return losses, torch.cat((pairs, *more)), (*names, *further), predictions


def _summed(value: Any, samples: int, what: str) -> LossSum:
    """Return what a task gives for a loss as a sum (0-d, fp32 or fp64) and a count."""
    if isinstance(value, Tensor):
        if value.dim() == 0:
            return LossSum(wide(value) * samples, samples)  # a mean over samples
        if value.shape == (samples,):
            return LossSum(wide(value).sum(), samples)
        raise UserError(
            f"{what} is a tensor {tuple(value.shape)} for {samples} samples; expected a LossSum, one value for each "
            "sample, or their mean"
        )
    if not isinstance(value, LossSum) or not isinstance(value.sum, Tensor) or value.sum.dim():
        found = f"a LossSum of a tensor {tuple(value.sum.shape)}" if _has_shape(value) else a_kind(value)
        raise UserError(f"{what} is {found}; expected a LossSum of a tensor (0-d)")
    return LossSum(wide(value.sum), samples if value.count is None else value.count)


def _has_shape(value: Any) -> bool:
    return isinstance(value, LossSum) and isinstance(value.sum, Tensor)


def _pair(each: LossSum, samples: int, like: Tensor) -> Tensor:
    count = samples if each.count is None else each.count
    return torch.stack([_on(part, like).detach().double() for part in (each.sum, count)])


def _on(value: Tensor | float, like: Tensor) -> Tensor:
    """Return a number as a tensor (0-d) like another one; on a device the host does not wait for it."""
    return value.to(like) if isinstance(value, Tensor) else torch.full((), value, dtype=like.dtype, device=like.device)


@lru_cache(maxsize=8)
def _constant(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor (0-d) that is read alone: the same one in each step."""
    return torch.full((), value, dtype=dtype, device=device)  # a fill: for a copy to a device the host would wait
