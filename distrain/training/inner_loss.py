"""Has a model compute its loss within its own forward pass: compiled with it, or from what its last layer is given.

A call with the targets under `TARGETS` returns a `ModelOutput` whose `logits` are the sum of the loss (0-d); other
calls are what they were. So every strategy's hooks are around it as they are around any forward pass: weights that are
sharded are gathered when they are used.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn

from distrain.config import Recipe
from distrain.networks.calling import ModelOutput, model_output
from distrain.networks.heads import find_head
from distrain.optim import Loss
from distrain.parallel import World
from distrain.parallel.tuning import MANY_LOGITS, Logits

TARGETS = "loss_targets"


def logits_of(recipe: Recipe, world: World, loss: Loss | None, model: nn.Module, tokens: int | None) -> Logits:
    """Return the logits of a micro-batch of so many tokens, with the layer that makes them where that may matter.

    `tokens`: None where their number varies.
    """
    setting = recipe.tune.chunked_loss
    if setting is False:
        return Logits(obstacle="tune.chunked_loss is false")
    if loss is None:
        return Logits(obstacle=f"task {recipe.task.name} computes its losses itself")
    if not loss.takes_hidden:
        return Logits(obstacle=f"loss {loss.name} of task {recipe.form} is computed from whole logits")
    if world.mixed_precision.scaled:
        # before they are scaled most of these gradients are too small for it
        return Logits(obstacle=f"under {world.precision} gradients are computed from a scaled loss")
    vocabulary = max((each.out_features for each in model.modules() if isinstance(each, nn.Linear)), default=0)
    count = tokens * vocabulary if tokens is not None else None
    if setting == "auto" and count is not None and count <= MANY_LOGITS:
        return Logits(count=count, obstacle="")
    head, obstacle = find_head(model)
    classes = model.get_submodule(head).out_features if head else 0
    return Logits(head, None if tokens is None else tokens * int(classes), obstacle)  # type: ignore[arg-type]


def compute_loss_inside(model: nn.Module, loss: Loss, head: str = "") -> None:
    """Have `model` return its loss where it is called with targets, in place.

    With the name of its `head` the logits are never whole. Before the model is sharded, wrapped or compiled.
    """
    step = _Step(loss)
    if head:
        layer = model.get_submodule(head)
        loss.classes = len(layer.get_parameter("weight"))  # for messages: compiled code that fails leaves no note of it

        # a function: older compilers trace no bound method here
        def predict(self: nn.Linear, hidden: Tensor) -> Tensor:
            return step.predict(self, hidden)

        layer.forward = MethodType(predict, layer)
    inner = model.forward
    plain = inner.__func__ if isinstance(inner, MethodType) else None

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        targets = kwargs.pop(TARGETS, None)
        step.targets = targets if head and targets is not None and not targets.is_floating_point() else None
        taken = step.targets is not None
        try:
            raw = plain(self, *args, **kwargs) if plain is not None else inner(*args, **kwargs)
        finally:
            step.targets = None
        return raw if targets is None else step.of(model_output(raw), targets, taken=taken)

    model.forward = MethodType(forward, model)


class _Step:
    """What one forward pass is given."""

    def __init__(self, loss: Loss):
        self.loss = loss
        self.targets: Tensor | None = None

    def predict(self, head: nn.Linear, hidden: Tensor) -> Tensor:
        """Return the logits, or the sum of the loss (0-d) where there are targets."""
        if self.targets is None:
            return type(head).forward(head, hidden)
        return self.loss.of_hidden(hidden, head.weight, head.bias, self.targets)

    def of(self, output: ModelOutput, targets: Tensor, *, taken: bool) -> ModelOutput:
        """Return a model's output with the sum of the loss as its logits."""
        if taken:
            assert output.logits.dim() == 0, "what the head returns is what the model returns"
            return ModelOutput(output.logits, output.aux_loss)
        selected = _wide(self.loss.select(output))
        with torch.autocast(output.logits.device.type, enabled=False):
            return ModelOutput(self.loss.sum(selected, targets), output.aux_loss)


@convert_outputs_to_fp32
def _wide(outputs: Any) -> Any:
    """Return tensors of a narrower dtype in fp32, as a model returns them otherwise."""
    return outputs
