"""The allowed targets of a task: classes, tokens or numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from distrain.config import Form, Recipe
from distrain.config.registry import losses

IGNORED = -100
"""The target that torch's losses ignore."""
_LOSSES_OF_ZERO_TO_ONE = (
    "bce", "bcewithlogits", "binarycrossentropy", "binarycrossentropywithlogits", "softmargin", "hingeembedding",
    "multilabelsoftmargin",
)  # fmt: skip


@dataclass(frozen=True)
class Labels:
    """The allowed targets of a split, as far as the recipe determines them."""

    classes: int | None = None
    """Number of classes or tokens; None: unknown."""
    ignored: int | None = None
    """The integer that means "no target"."""
    integer: bool = False
    """Whether targets are class or token numbers."""
    zero_to_one: bool = False
    """Whether targets lie in [0, 1]."""
    finite: bool = True
    """Whether NaN and infinity are errors; the recipe may skip steps with such targets instead."""

    @classmethod
    def of(cls, recipe: Recipe, split: str, known: int | None) -> Labels:
        """Return the allowed targets of a split. `known`: the data set's number of classes or tokens."""
        loss, task = recipe.loss, recipe.form
        name = "" if loss is None else loss.name.replace("_", "").lower().removesuffix("loss")
        is_user_loss = loss is not None and losses.spec_of(loss.name) is not None
        args = {} if loss is None else loss.args
        counted = [each for each in (known, recipe.model.args.get(_SIZES.get(task, ""))) if isinstance(each, int)]
        ignored = args.get("ignore_index", IGNORED if task in (*TOKEN_TASKS, "token_classification") else None)
        return cls(
            # a model may have more outputs than the data have classes
            classes=max(counted) if counted and known is not None else None,
            ignored=ignored if isinstance(ignored, int) else None,
            integer=task in NUMBERED and not is_user_loss and not name.startswith("multilabel"),
            zero_to_one=task in ("binary", "multilabel") and (loss is None or takes_zero_to_one(loss.name)),
            finite=split != "train" or recipe.anomalies.nonfinite == "stop",
        )

    def problem(self, targets: torch.Tensor) -> tuple[int, str] | None:
        """Return the row of the first target that is not allowed, with the problem; None if all are.

        `targets`: (batch, ...), on the CPU.
        """
        if targets.numel() == 0:
            return None
        if targets.is_floating_point():
            if self.finite and not bool((good := targets.isfinite()).all()):
                return self._first(targets, good, "expected a finite number")
            if self.zero_to_one and not bool((good := ~((targets < 0) | (targets > 1))).all()):
                return self._first(targets, good, "expected 0 or 1")
            return None
        if not self.integer:
            return None
        least, most = (int(each) for each in targets.aminmax())
        if least >= 0 and (self.classes is None or most < self.classes):
            return None
        good = (targets >= 0) & (targets < self.classes) if self.classes is not None else targets >= 0
        if self.ignored is not None:
            good |= targets == self.ignored
        if bool(good.all()):
            return None
        expected = "0 or more" if self.classes is None else f"0 to {self.classes - 1}"
        ignored = f", or {self.ignored} to ignore it" if self.ignored is not None else ""
        return self._first(targets, good, f"expected {expected}{ignored}")

    @staticmethod
    def _first(targets: torch.Tensor, good: torch.Tensor, expected: str) -> tuple[int, str]:
        place = int((~good).flatten().nonzero()[0])
        value = targets.flatten()[place].item()
        return place // max(1, targets[0].numel()), f"a target is {value}, {expected}"


def takes_zero_to_one(loss: str) -> bool:
    """Whether a loss of this name takes targets in [0, 1]."""
    return loss.replace("_", "").lower().removesuffix("loss") in _LOSSES_OF_ZERO_TO_ONE


TOKEN_TASKS: tuple[Form, ...] = ("language_modeling", "seq2seq")
NUMBERED: tuple[Form, ...] = ("classification", "segmentation", "token_classification", *TOKEN_TASKS)
"""The tasks whose targets are the numbers of classes or tokens."""
_SIZES: dict[Form, str] = {
    "classification": "num_classes",
    "segmentation": "num_classes",
    "token_classification": "num_classes",
    "language_modeling": "vocab_size",
    "seq2seq": "target_vocab_size",
}
"""The model argument for the number of outputs."""
