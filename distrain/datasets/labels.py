"""What targets may be: whether those of a batch are classes, tokens, or numbers that a model can be trained on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from distrain.config import Recipe, Task
from distrain.config.registry import losses

IGNORED = -100
"""The target that torch's losses leave out."""
_LOSSES_OF_ZERO_TO_ONE = (
    "bce", "bcewithlogits", "binarycrossentropy", "binarycrossentropywithlogits", "softmargin", "hingeembedding",
    "multilabelsoftmargin",
)  # fmt: skip


@dataclass(frozen=True)
class Labels:
    """What the targets of a task may be, as far as the recipe says."""

    classes: int | None = None
    """Targets are whole numbers below; None: not known."""
    ignored: int | None = None
    """A whole number that stands for no target."""
    whole: bool = False
    """Whether they are the numbers of classes or tokens."""
    zero_to_one: bool = False
    """Whether they are 0, 1, or between."""
    finite: bool = True
    """Whether a NaN or an infinity is an error here: the recipe may have steps with such left out instead."""

    @classmethod
    def of(cls, recipe: Recipe, split: str, known: int | None) -> Labels:
        """Return what the targets of a split may be. `known`: the classes or tokens that the data set speaks of."""
        loss, task = recipe.loss, recipe.task
        name = "" if loss is None else loss.name.replace("_", "").lower().removesuffix("loss")
        own = loss is not None and losses.spec_of(loss.name) is not None
        args = {} if loss is None else loss.args
        counted = [each for each in (known, recipe.model.args.get(_SIZES.get(task, ""))) if isinstance(each, int)]
        ignored = args.get("ignore_index", IGNORED if task in TOKEN_TASKS else None)
        return cls(
            # a model may have more outputs than the data have classes
            classes=max(counted) if counted and known is not None else None,
            ignored=ignored if isinstance(ignored, int) else None,
            whole=task in ("classification", *TOKEN_TASKS) and not own and not name.startswith("multilabel"),
            zero_to_one=task in ("binary", "multilabel") and (loss is None or name in _LOSSES_OF_ZERO_TO_ONE),
            finite=split != "train" or recipe.anomalies.nonfinite == "stop",
        )

    def problem(self, targets: torch.Tensor) -> tuple[int, str] | None:
        """Return the row of the first target that is none, and what is wrong with it; None where all are fine.

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
        if not self.whole:
            return None
        least, most = (int(each) for each in targets.aminmax())
        if least >= 0 and (self.classes is None or most < self.classes):
            return None
        good = targets >= 0
        if self.classes is not None:
            good &= targets < self.classes
        if self.ignored is not None:
            good |= targets == self.ignored
        if bool(good.all()):
            return None
        expected = "0 or more" if self.classes is None else f"0 to {self.classes - 1}"
        others = f", or {self.ignored} for none" if self.ignored is not None else ""
        return self._first(targets, good, f"expected {expected}{others}")

    @staticmethod
    def _first(targets: torch.Tensor, good: torch.Tensor, expected: str) -> tuple[int, str]:
        place = int((~good).flatten().nonzero()[0])
        value = targets.flatten()[place].item()
        return place // max(1, targets[0].numel()), f"a target is {value}, {expected}"


TOKEN_TASKS: tuple[Task, ...] = ("language_modeling", "seq2seq")
_SIZES: dict[Task, str] = {
    "classification": "num_classes",
    "language_modeling": "vocab_size",
    "seq2seq": "target_vocab_size",
}
"""The argument of a model that says how many outputs it has."""
