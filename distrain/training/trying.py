"""A few samples, and a model, with which is tried before the first step what a number depends on."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from distrain.datasets.base import AnySource, Batch, DataMeta, is_stream
from distrain.datasets.nested import tensors_in
from distrain.datasets.transforms import Transform
from distrain.models import build_model
from distrain.optim.losses.user import UserLoss
from distrain.parallel import World
from distrain.parallel.parameter_writes import restored
from distrain.parallel.stirring import stir, stirred
from distrain.parallel.strategy import with_mixed_precision
from distrain.system.compiler import compiler_imported
from distrain.training.context import TrainContext, to_device
from distrain.training.tasks import Objective, SupervisedObjective, TaskObjective
from distrain.training.tasks.inside import run_inside

T = TypeVar("T")

_BUILT_ANEW = 2**28
"""Most parameters of a model that each rank builds for itself."""


@contextmanager
def tried_model(t: TrainContext, meta: DataMeta, parameters: int, kept: Path) -> Iterator[nn.Module | None]:
    """Yield the model to try, as in an evaluation, none of its weights zero; nothing is left changed. All ranks call.

    Where ranks hold parts of it, a forward pass that fails leaves these gathered, which no later one bears: they get a
    whole one with weights of its own, or None if it has too many `parameters` for that. `kept`: that of `build_model`.
    """
    model, beside = t.strategy.model, parameters_beside(t.objective)
    if not t.world.forward_is_collective:
        with stirred(t.strategy), restored(model, (*model.parameters(), *beside)):
            model.eval()
            try:
                yield model
            finally:
                model.train()
        return
    found: nn.Module | None = None
    if parameters <= _BUILT_ANEW:
        with suppress(Exception):
            found = build_model(t.recipe, meta, weights=False, kept=kept).to(t.world.device).eval()
            run_inside(found)
            stir(found)
            found = with_mixed_precision(t.world, found)
    with restored(model, beside):
        yield found


def tried_objective(objective: Objective) -> Objective:
    """Return a copy of an objective for passes that are only tried: what its task or its loss keeps of them is lost.

    Models that these hold have the same parameters in it (`parameters_beside`), and buffers of their own.
    """
    found = copy.copy(objective)
    if isinstance(found, TaskObjective):
        TaskObjective.begin_step(found)  # what it adds up of a step is its own
        found.task = _with_own_state(found.task)
    elif isinstance(found, SupervisedObjective) and isinstance(found.loss, UserLoss):
        found.loss, found.inside = _with_own_state(found.loss), False  # the model would compute its own
    return found


def parameters_beside(objective: Objective) -> list[nn.Parameter]:
    """Return the parameters of the models that a task or a loss holds, such as a teacher."""
    holder = objective.task if isinstance(objective, TaskObjective) else objective.loss
    models = [each for each in vars(holder).values() if isinstance(each, nn.Module)]
    return [parameter for model in models for parameter in model.parameters()]


def _with_own_state(value: T) -> T:
    """Return a copy whose attributes are copies too, but for parameters of models, files and what cannot be copied."""
    found = copy.copy(value)
    of_class = {
        key: each
        for kind in reversed(type(value).__mro__)
        for key, each in vars(kind).items()
        if isinstance(each, dict | list | set | Tensor) and not key.startswith("__")
    }
    models = [each for each in vars(value).values() if isinstance(each, nn.Module)]
    shared = [each for each in vars(value).values() if isinstance(each, np.memmap)]
    memo: dict[int, Any] = {id(each): each for each in (*shared, *(p for model in models for p in model.parameters()))}
    memo[id(value)] = found
    for key, each in (of_class | vars(value)).items():
        with suppress(Exception):
            vars(found)[key] = copy.deepcopy(each, memo)
    return found


def eagerly() -> AbstractContextManager[object]:
    """Return the context in which compiled models are called without: a few samples are not worth a compilation."""
    return torch.compiler.set_stance("force_eager") if compiler_imported() else nullcontext()


class TriedSamples:
    """Up to `count` samples: evenly spread over a split, which may be sorted by length; of a stream the first.

    The same on all ranks. What cannot be read raises what reading it raises.
    """

    def __init__(self, source: AnySource, transform: Transform | None, world: World, count: int):
        self._source, self._transform, self._world = source, transform, world
        if is_stream(source):
            if hasattr(source, "set_epoch"):
                source.set_epoch(0)
            self._items = list(itertools.islice(iter(source), count))
            self._ids = np.arange(len(self._items))
        else:
            self._ids = np.unique(np.linspace(0, len(source) - 1, count).round().astype(np.int64))

    def __len__(self) -> int:
        return len(self._ids)

    def batch(self, *which: int) -> Batch:
        """Return samples as one batch on the device, as an evaluation reads them; `which` are numbers below len."""
        ids = self._ids[list(which)]
        if is_stream(self._source):
            found = {**self._source.collate([self._items[each] for each in which]), "ids": torch.from_numpy(ids)}
        else:
            found = self._source.fetch(ids)
        if self._transform is not None:
            found = self._transform(found, np.zeros_like(ids))
        return to_device(found, self._world)

    def keep(self, which: Sequence[int]) -> None:
        """Go on with these alone, by their numbers."""
        self._ids = self._ids[list(which)]
        if is_stream(self._source):
            self._items = [self._items[each] for each in which]

    def targets(self) -> Any:
        """Return the targets of all of them as they are read; None where there are none."""
        return None if is_stream(self._source) else self._source.fetch(self._ids).get("targets")

    def of_unequal_lengths(self) -> list[tuple[int, int]]:
        """Return a shorter and a longer sample for each part of the inputs whose lengths differ, none twice.

        A length is any dimension of a sample's tensors that have no more than two of them: those of images are none.
        """
        lengths = [_lengths(self.batch(each)) for each in range(len(self))]
        if len({len(each) for each in lengths}) != 1:
            return []
        found = [
            (int(np.argmin(part)), int(np.argmax(part))) for part in zip(*lengths, strict=True) if len({*part}) > 1
        ]
        return list(dict.fromkeys(found))


def _lengths(batch: Batch) -> Sequence[int]:
    return [size for each in tensors_in(batch["inputs"]) if each.dim() < 4 for size in each.shape[1:]]
