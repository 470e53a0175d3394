"""Whether what an evaluation computes of a sample depends on the samples that are beside it in the batch."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress

import torch
from torch import Tensor, nn

from distrain.datasets.base import Batch
from distrain.datasets.nested import map_tensors, tensors_in
from distrain.datasets.randomness import isolated_randomness, seed_globally
from distrain.networks.calling import ModelOutput
from distrain.networks.undisturbed import undisturbed
from distrain.parallel import World
from distrain.parallel.parameter_writes import restored
from distrain.training.padding import differ
from distrain.training.tasks import Objective
from distrain.training.trying import eagerly

logger = logging.getLogger(__name__)


def warn_of_company(
    model: nn.Module, objective: Objective, batch: Batch, world: World, evaluated: ModelOutput | None = None
) -> None:
    """Warn where the first sample of a batch has another output once copies of it are in the place of the others.

    `evaluated` is what `Objective.evaluate` has returned for the batch, if it has. The trial takes further forward
    passes of as many samples. `model` is in the mode of an evaluation, and nothing is left changed. Where a forward
    pass runs collectives all ranks call, and make as many. Nothing is tried of a task of one's own, and where an input
    has no row for each sample.
    """
    if objective.loss is None:
        return
    collective = world.forward_is_collective
    with nullcontext() if collective else suppress(Exception), torch.no_grad(), _unchanged(model, world):
        changed = _of_first(batch)
        if changed is None and not collective:
            return

        def first(of: Batch) -> list[Tensor]:
            seed_globally(0)  # what is drawn is the same
            if world.device.type == "cuda":
                torch.cuda.manual_seed(0)
            return _first(objective.evaluate(model, of, predict=False))

        beside = first(changed or batch)
        if not collective and evaluated is not None and not differ(_first(evaluated), beside, world):
            return
        whole, again = first(batch), first(batch)
        with suppress(Exception):  # outputs that fit no other, which tell nothing
            if differ(whole, beside, world) and not differ(whole, again, world):
                logger.warning(
                    "the model computes something else of a sample where other samples are beside it, so that metrics "
                    "and predictions depend on batch sizes (eval.batch) and on the number of processes. Batch norms "
                    "without running statistics do that (track_running_stats), and layers that take the dimension of "
                    "the batch for another one (batch_first)"
                )


def _first(evaluated: ModelOutput) -> list[Tensor]:
    """Return what is computed of the first sample."""
    return [each[:1].double() for each in (evaluated.logits, *evaluated.others) if each.dim()]


def _of_first(batch: Batch) -> Batch | None:
    """Return a batch with the first sample in each place; None where there is one only, or inputs have no rows."""
    samples, inputs = len(batch["ids"]), batch["inputs"]
    if samples < 2 or any(each.dim() == 0 or len(each) != samples for each in tensors_in(inputs)):
        return None
    return {**batch, "inputs": map_tensors(lambda each: each[:1].expand_as(each).contiguous(), inputs)}


@contextmanager
def _unchanged(model: nn.Module, world: World) -> Iterator[None]:
    devices = [world.device] if world.device.type == "cuda" else []
    kept = restored(model) if world.forward_is_collective else undisturbed(model)
    with isolated_randomness(), torch.random.fork_rng(devices), kept, eagerly():
        yield
