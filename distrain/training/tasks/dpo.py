"""`dpo`: a language model learns which of two answers is preferred, from the pairs alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distrain.config import UserError
from distrain.config.registry import tasks
from distrain.datasets.base import Batch
from distrain.datasets.labels import IGNORED
from distrain.networks.calling import Convention, ModelOutput, calling_convention
from distrain.optim.losses.shapes import wide
from distrain.training.tasks.task import LossSum, Task, TaskContext

_SIDES = ("chosen", "rejected")


@tasks.register("dpo")
class DPO(Task):
    """Direct preference optimization (Rafailov et al. 2023); data set `preference`.

    A model's reward for an answer is `beta` times how much likelier the answer has become since the start: its
    log-probability under the model less that under the initial weights, which are kept frozen on each rank. The loss of
    a pair is -log sigmoid(margin), with the margin the reward of the chosen answer less that of the rejected one.
    `label_smoothing`: how often a pair is thought to be the wrong way round (Mitchell 2023).
    """

    form = "custom"

    def __init__(self, beta: float = 0.1, label_smoothing: float = 0.0):
        if not beta > 0:
            raise UserError(f"task.beta {beta} should be above 0")
        if not 0 <= label_smoothing < 0.5:
            raise UserError(f"task.label_smoothing {label_smoothing} should be 0 or more, and below 0.5")
        self.beta, self.label_smoothing = beta, label_smoothing

    def prepare(self, context: TaskContext) -> None:
        """Build the model with its initial weights, frozen."""
        self.reference = context.initial_model()
        self.reference_call = calling_convention(self.reference)

    def losses(self, model: Any, batch: Batch) -> Mapping[str, LossSum | Tensor]:
        """Return the loss of the pairs; report the mean margin, its parts, and how often the chosen one is ahead."""
        chosen, rejected, aux_loss = self._rewards(model, batch)
        margin = chosen - rejected
        loss = -F.logsigmoid(margin).sum()
        if self.label_smoothing:
            loss = (1 - self.label_smoothing) * loss - self.label_smoothing * F.logsigmoid(-margin).sum()
        self.log("margin", margin.detach().sum())
        self.log("accuracy", (margin > 0).sum(dtype=margin.dtype))
        self.log("chosen_reward", chosen.detach().sum())
        self.log("rejected_reward", rejected.detach().sum())
        return {"loss": LossSum(loss if aux_loss is None else loss + aux_loss * len(margin))}

    def predictions(self, model: Any, batch: Batch) -> Tensor:
        """Return the margin of each pair, (batch,)."""
        chosen, rejected, _ = self._rewards(model, batch)
        return chosen - rejected

    def _rewards(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the rewards of the chosen and of the rejected answers, each (batch,), and the model's own loss."""
        assert self.convention is not None, "the objective has set it"
        inputs, targets = _joined(batch)
        found, output = _log_probabilities(self.convention, model, inputs, targets)
        with torch.no_grad():
            initially, _ = _log_probabilities(self.reference_call, self.reference, inputs, targets)
        chosen, rejected = (self.beta * (found - initially)).chunk(2)
        return chosen, rejected, output.aux_loss


def _joined(batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
    """Return inputs and targets of all answers, first the chosen and then the rejected: one forward pass for both."""
    if not isinstance(batch["inputs"], Mapping) or not all(side in batch["inputs"] for side in _SIDES):
        raise UserError("task dpo: the data set has no chosen and rejected answers; use data set 'preference'")
    longest = max(batch["targets"][side].shape[1] for side in _SIDES)

    def joined(parts: list[Tensor], fill: int) -> Tensor:
        return torch.cat([F.pad(each, (0, longest - each.shape[1]), value=fill) for each in parts])

    inputs = {
        key: joined([batch["inputs"][side][key] for side in _SIDES], 0) for key in ("input_ids", "attention_mask")
    }
    return inputs, joined([batch["targets"][side] for side in _SIDES], IGNORED)


def _log_probabilities(
    call: Convention, model: Any, inputs: dict[str, Tensor], targets: Tensor
) -> tuple[Tensor, ModelOutput]:
    """Return the log-probability of the targets of each row (rows,), fp32 or fp64, and what the model returned."""
    output = call(model, inputs)
    each = F.cross_entropy(wide(output.logits).flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return -each.view_as(targets).sum(1), output
