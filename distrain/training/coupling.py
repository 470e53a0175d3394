"""Losses that couple samples: a step's look at all of them, and the trial of a loss of the user's own for being one.

A task says that it couples samples, and gathers what it takes together. A function `loss:` sees only a micro-batch.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from distrain.config import UserError, mix
from distrain.datasets.base import Batch
from distrain.networks.undisturbed import Attributes
from distrain.optim import Loss
from distrain.optim.losses.interface import Outputs
from distrain.optim.losses.user import UserLoss
from distrain.parallel.parameter_writes import restored
from distrain.run.heartbeat import enter_phase
from distrain.training.context import TrainContext, Turn, seed_dropout, seed_forward, to_device
from distrain.training.tasks import SupervisedObjective

_TOLERANCE = 1e-4
"""Of the difference, relative to the sum; what fp32 rounds away is far below."""
_SAMPLES = 64
"""Outputs of at most so many samples are looked at."""
_LARGE = 1 << 24
"""Numbers in outputs that are compared with the targets of further samples."""


def look_ahead(t: TrainContext, turn: Turn, micro_batches: Sequence[Batch]) -> None:
    """Compute what a task gathers of all micro-batches of a step, without gradient, and give it to all ranks.

    With the random numbers of the passes that follow; nothing is left changed.
    """
    strategy, world = t.strategy, t.world
    strategy.share_buffers()  # as the first of those passes does
    restore, attributes = strategy.remember_buffers(), Attributes(strategy.model)
    tensors = [(each, each.clone()) for each in attributes.tensors]
    enter_phase("forward")
    with torch.no_grad():
        for index, batch in enumerate(micro_batches):
            seed_forward(t, index, turn, len(batch["ids"]))
            turn.objective.look_ahead(strategy.model, to_device(batch, world, again=True))
        attributes.restore()
        for each, before in tensors:
            each.copy_(before)
    restore()
    strategy.reshard()
    turn.objective.exchange()


def couples_samples(t: TrainContext, steps: Callable[[], Iterator[list[Batch]]]) -> bool | None:
    """Return whether the loss of a batch is not the sum of the losses of its parts. All ranks call; all get the same.

    Only a loss of the user's own is tried; those of torch are sums. The model computes once, as in an evaluation, so
    that layers that look across the batch have no part in it; its outputs are then compared with the targets of further
    samples too, as the first ones may all be of one class, and a mean by classes shows in several. Nothing is left
    changed. None where the trial fails.
    """
    objective, loss = t.objective, t.objective.loss
    if not (isinstance(objective, SupervisedObjective) and isinstance(loss, UserLoss)):
        return False
    found = None
    batches, others = _some(steps())
    t.strategy.model.eval()
    try:
        # what is wrong with a model or a loss, training says; but ranks that wait for each other must all fail
        with (
            torch.no_grad(),
            restored(t.strategy.model, () if t.world.forward_is_collective else t.strategy.model.parameters()),
            suppress(*([] if t.world.forward_is_collective else [Exception])),
        ):
            batches = [to_device(batch, t.world) for batch in batches]
            parts = [(objective.call(t.strategy.model, batch["inputs"]), batch["targets"]) for batch in batches]
            with suppress(Exception):
                outputs = _joined([loss.select(output) for output, _ in parts])
                targets = torch.cat([targets for _, targets in parts])
                found = _differs(t, loss, outputs, targets)
                more = _repeated(outputs, len(targets), len(targets) + sum(map(len, others)))
                if not found and more is not None:
                    found = _differs(t, loss, more, torch.cat((targets, *(each.to(targets) for each in others))))
    finally:
        t.strategy.model.train()
        t.strategy.reshard()
    ranks = t.world.gather(found)
    return True if any(ranks) else None if None in ranks else False


def _some(steps: Iterator[list[Batch]]) -> tuple[list[Batch], list[Tensor]]:
    """Return as many micro-batches as it takes for two samples, and the targets of those that follow."""
    found, others, samples = list[Batch](), list[Tensor](), 0
    for batch in itertools.chain.from_iterable(steps):
        if samples < 2:
            found.append(batch)
        else:
            others.append(batch["targets"])
        samples += len(batch["targets"])
        if samples >= _SAMPLES:
            break
    return found, others


def _repeated(outputs: Outputs, count: int, wanted: int) -> Outputs | None:
    """Return outputs of `count` samples again and again, for `wanted`; None where they are large."""
    each = (outputs,) if isinstance(outputs, Tensor) else outputs
    if wanted == count or max(part.numel() for part in each) * wanted > _LARGE * count:
        return None
    rows = torch.arange(wanted) % count
    found = [part[rows.to(part.device)] if part.dim() and len(part) == count else part for part in each]
    return found[0] if isinstance(outputs, Tensor) else found


def _joined(outputs: Sequence[Outputs]) -> Outputs:
    if len(outputs) == 1:
        return outputs[0]
    if isinstance(outputs[0], Tensor):
        return torch.cat([each for each in outputs if isinstance(each, Tensor)])
    return tuple(torch.cat(each) if each[0].dim() else each[0] for each in zip(*outputs, strict=True))


def _differs(t: TrainContext, loss: Loss, outputs: Outputs, targets: Tensor) -> bool:
    count = len(targets)

    def part(value: Tensor, low: int, high: int) -> Tensor:
        return value[low:high] if value.dim() and len(value) == count else value

    def of(low: int, high: int) -> float:
        cut = (
            part(outputs, low, high)
            if isinstance(outputs, Tensor)
            else tuple(part(each, low, high) for each in outputs)
        )
        seed_dropout(t.world, mix(t.recipe.seed, "coupling"))  # a loss that draws at random draws the same
        return loss.sum(cut, targets[low:high]).item()

    loss = copy.deepcopy(loss)  # it may have a state
    size = min(count, _SAMPLES)
    whole, again = of(0, size), of(0, size)
    if not math.isfinite(whole):
        return False  # no difference can be told of these
    # in more than two parts: with the same classes in both halves, a mean by classes is one by samples
    pairs = [(of(0, cut), of(cut, size)) for cut in sorted({size // 2, size // 3, size // 8} - {0})]
    return any(
        max(abs(whole - again), abs(whole - sum(pair))) > _TOLERANCE * max(abs(whole), sum(map(abs, pair)), 1e-6)
        for pair in pairs
        if all(map(math.isfinite, pair))
    )


def cut_of(micro_batch_size: int, world_size: int) -> dict[str, int]:
    """Return what such a loss depends on besides the recipe, as checkpoints hold it."""
    return {"micro_batch_size": micro_batch_size, "processes": world_size}


def describe_cut(cut: dict[str, int]) -> str:
    """Return how the batch is cut, for a person."""
    several = f"{cut['processes']} processes" if cut["processes"] > 1 else "1 process"
    return f"micro-batches of {cut['micro_batch_size']} on {several}"


def check_cut(then: dict[str, int], now: dict[str, int], name: str) -> None:
    """Raise UserError where a resume would change the objective of the run."""
    if then != now:
        raise UserError(
            f"loss {name} takes the samples of a micro-batch together, and the run was trained with "
            f"{describe_cut(then)}; {describe_cut(now)} make another objective of it. Start as many processes with "
            f"batch.micro={then['micro_batch_size']}, choose another --run-dir for a new run, or --update to use the "
            "new one"
        )


def warning(name: str, cut: dict[str, int], global_batch_size: int) -> str | None:
    """Return the warning for a loss that takes samples together; None where it has those of the whole step."""
    if cut["micro_batch_size"] == global_batch_size:
        return None
    return (
        f"loss {name} is no mean over samples: it takes those of a micro-batch together, and sees "
        f"{cut['micro_batch_size']} of the {global_batch_size} samples of a step at once ({describe_cut(cut)}), so "
        "that another batch.micro or number of processes means another objective. For that of the whole batch write it "
        "as a task with couples_samples = True (docs/tasks.md), or train in one process with "
        f"batch.micro={global_batch_size}; otherwise the cut is kept with the run"
    )
