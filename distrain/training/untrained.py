"""Parameters that a loss has, and that no optimizer trains: those of a model are all that is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress

import torch
from torch import Tensor, nn

from distrain.config import mix
from distrain.datasets.base import AnySource
from distrain.datasets.transforms import Transform
from distrain.optim.losses.user import UserLoss
from distrain.parallel import World
from distrain.system.errors import some
from distrain.training.context import seed_dropout
from distrain.training.tasks import Objective, TaskObjective
from distrain.training.trying import TriedSamples, eagerly


def may_hold_parameters(objective: Objective) -> bool:
    """Whether what computes the losses is one's own, and may have more than the model has."""
    return isinstance(objective, TaskObjective) or isinstance(objective.loss, UserLoss)


def untrained_warnings(
    model: nn.Module, objective: Objective, source: AnySource, transform: Transform, world: World
) -> list[str]:
    """Return the warning for parameters that get a gradient of the losses and are no part of the model.

    `model` is whole; its forward pass runs once, with two samples. Empty where there are none, or where it fails.
    """
    found: list[nn.Parameter] = []
    with suppress(Exception), torch.enable_grad(), eagerly():
        samples = TriedSamples(source, transform, world, 2)
        seed_dropout(world, mix("untrained"))
        own = {id(each) for each in model.parameters()}
        leaves = _leaves(objective.loss_sum(model, samples.batch(*range(len(samples)))))
        found = [each for each in leaves if isinstance(each, nn.Parameter) and id(each) not in own]
    if not found:
        return []
    names = _names(objective)
    listed = some(names.get(id(each), f"one of shape {tuple(each.shape)}") for each in found)
    return [
        f"{objective.name} has parameters that are no part of the model ({listed}): no optimizer trains them, "
        "and no checkpoint holds them. What is to be trained belongs into the model; freeze what is not by "
        "requires_grad_(False)"
    ]


def _leaves(value: Tensor) -> Iterator[Tensor]:
    """Yield the leaves that the gradient of a tensor reaches."""
    waiting, seen = [value.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            yield leaf
        waiting += [before for before, _ in node.next_functions]


def _names(objective: Objective) -> dict[int, str]:
    """Return the names of the parameters that a task or a loss has on itself."""
    holder = objective.loss.function if isinstance(objective.loss, UserLoss) else objective.holds
    if isinstance(holder, nn.Module):
        return {id(each): name for name, each in holder.named_parameters()}
    found: dict[int, str] = {}
    for name, value in (holder if isinstance(holder, Mapping) else {}).items():
        parts = value.named_parameters() if isinstance(value, nn.Module) else [("", value)]
        found |= {id(each): f"{name}.{part}".rstrip(".") for part, each in parts if isinstance(each, nn.Parameter)}
    return found
