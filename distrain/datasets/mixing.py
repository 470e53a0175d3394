"""MixUp and CutMix: training samples mixed in pairs, the same whatever the micro-batch and the world.

Positions 2k and 2k + 1 of the endless order of samples are a pair; as each epoch is in an order of its own, each sample
has another partner in it. Whether and how a position is mixed depends on (seed, position) alone. A partner that lies in
another micro-batch is read as well, so with an even micro-batch no sample is read twice.

MixUp: Zhang et al., "mixup: Beyond Empirical Risk Minimization", 2017. CutMix: Yun et al., "CutMix: Regularization
Strategy to Train Strong Classifiers with Localizable Features", 2019; the rectangle is torchvision's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from distrain.config import MixSection, Recipe, UserError, mix
from distrain.config.registry import losses
from distrain.datasets.base import AnySource, Batch, DataMeta, Source, is_stream
from distrain.datasets.batches import Batches, Place
from distrain.datasets.labels import takes_zero_to_one
from distrain.datasets.order import SampleOrder
from distrain.datasets.randomness import below, stream_of, uniform
from distrain.datasets.transforms import Transform

MIXED_TASKS = ("classification", "binary", "multilabel")


def mixing_problems(recipe: Recipe) -> list[str]:
    """Return why the recipe's samples cannot be mixed, as far as that shows without data."""
    given = {key: section for key in ("mixup", "cutmix") if (section := getattr(recipe.data, key)) is not None}
    if not given:
        return []
    key, problems = next(iter(given)), []
    if recipe.form not in MIXED_TASKS:
        return [f"data.{key}: mixes classes, and the task is {recipe.form}; it is for {', '.join(MIXED_TASKS)}"]
    shares = _shares(recipe)
    if sum(shares) > 1:
        problems.append(
            f"data.{key}.prob: {' and '.join(f'{each:g}' for each in shares)} are more than all samples together; give "
            "shares of mixup and cutmix that sum to at most 1"
        )
    loss = recipe.loss
    if loss is None or losses.spec_of(loss.name) is not None:
        return problems
    name = losses.fold(loss.name)
    if recipe.form == "classification":
        if name != "crossentropy":
            problems.append(
                f"data.{key}: makes a target a probability for each class, which loss {loss.name} does not take; use "
                "cross_entropy, or a loss of your own"
            )
        elif "ignore_index" in loss.args:
            problems.append(
                f"data.{key}: a mixed target is no class number, so loss.ignore_index is of none; remove one"
            )
    elif not takes_zero_to_one(loss.name):
        problems.append(
            f"data.{key}: makes targets between 0 and 1, which loss {loss.name} does not take; use bce_with_logits, or "
            "a loss of your own"
        )
    return problems


def _shares(recipe: Recipe) -> tuple[float, float]:
    """Return the shares of the samples for MixUp and for CutMix."""
    sections = recipe.data.mixup, recipe.data.cutmix
    default = 0.5 if all(sections) else 1.0
    mixup, cutmix = (0.0 if each is None else default if each.prob is None else each.prob for each in sections)
    return mixup, cutmix


@dataclass(frozen=True)
class Mixing:
    """How the samples of the training split are mixed."""

    mixup: float
    """Share of the samples that MixUp mixes."""
    cutmix: float
    """Share of the samples that CutMix mixes."""
    mixup_alpha: float
    cutmix_alpha: float
    seed: int
    classes: int | None
    """Number of classes whose numbers are targets; None where targets are shares already (binary, multilabel)."""
    dtype: torch.dtype
    """Of targets."""

    @classmethod
    def of(cls, recipe: Recipe, meta: DataMeta, dtype: torch.dtype) -> Mixing | None:
        """Return the recipe's; None if it mixes nothing. Raises UserError where it cannot."""
        mixup, cutmix = recipe.data.mixup, recipe.data.cutmix
        if mixup is None and cutmix is None:
            return None
        if problems := mixing_problems(recipe):
            raise UserError("\n".join(problems))
        if recipe.form == "classification" and meta.num_classes is None:
            raise UserError("data.mixup and data.cutmix need the number of classes, which the data set does not give")
        alphas = [(section or MixSection()).alpha for section in (mixup, cutmix)]
        classes = meta.num_classes if recipe.form == "classification" else None
        return cls(*_shares(recipe), alphas[0], alphas[1], mix(recipe.seed, "mixing"), classes, dtype)

    @property
    def keeps_bytes(self) -> bool:
        """Whether images of bytes stay bytes."""
        return not self.mixup

    def check(self, source: AnySource, inputs: object, targets: object) -> None:
        """Raise UserError where samples like the first one cannot be mixed; `inputs` and `targets` (1, ...)."""
        key = "mixup" if self.mixup else "cutmix"
        if is_stream(source):
            raise UserError(
                f"data.{key}: the samples of an iterable data set cannot be read by their number, and a partner may be "
                "in another micro-batch; write a Dataset with __len__ and __getitem__, or mix in the iterable itself"
            )
        if not isinstance(inputs, torch.Tensor) or not (
            inputs.is_floating_point() or (self.keeps_bytes and inputs.dtype == torch.uint8)
        ):
            found = (
                f"the inputs {', '.join(inputs)}" if isinstance(inputs, dict) else f"{getattr(inputs, 'dtype', inputs)}"
            )
            raise UserError(f"data.{key}: mixes inputs of one tensor of floats, and found {found}")
        if self.cutmix and inputs.dim() < 3:
            raise UserError(
                f"data.cutmix: cuts a rectangle out of images, and a sample has the shape {tuple(inputs.shape[1:])}"
            )
        if not isinstance(targets, torch.Tensor) or (self.classes is not None and targets.dim() != 1):
            found = f"the shape {tuple(targets.shape[1:])}" if isinstance(targets, torch.Tensor) else "none"
            raise UserError(f"data.{key}: mixes one class for each sample, and a target has {found}")

    def apply(self, batch: Batch, positions: np.ndarray, count: int) -> Batch:
        """Return the first `count` samples of a batch, mixed; the batch holds their partners too.

        `positions` (batch,) int64 are those of its samples in the endless order.
        """
        images, targets = batch["inputs"], self._shares_of(batch["targets"])
        own = positions[:count]
        sorter = np.argsort(positions)
        partners = sorter[np.searchsorted(positions, own ^ 1, sorter=sorter)]
        chosen = uniform(stream_of(self.seed, own, 0))
        mixed, cut = chosen < self.mixup, (chosen >= self.mixup) & (chosen < self.mixup + self.cutmix)
        factors = np.ones(count)
        result = images[:count].clone()
        if (rows := mixed.nonzero()[0]).size:
            factors[rows] = self._drawn(own[rows], self.mixup_alpha)
            result[rows] = _weighted(images, rows, partners[rows], factors[rows])
        for row in cut.nonzero()[0].tolist():
            factors[row] = self._cut(result[row], images[int(partners[row])], own[row : row + 1])
        every = np.arange(count)
        return {
            **{key: value[:count] if _is_column(value, len(positions)) else value for key, value in batch.items()},
            "inputs": result,
            "targets": _weighted(targets, every, partners, factors),
        }

    def _shares_of(self, targets: torch.Tensor) -> torch.Tensor:
        if self.classes is None:
            return targets.to(self.dtype)
        return torch.nn.functional.one_hot(targets, self.classes).to(self.dtype)

    def _drawn(self, positions: np.ndarray, alpha: float) -> np.ndarray:
        from scipy.special import betaincinv  # takes a while to import, and only what mixes needs it

        return np.asarray(betaincinv(alpha, alpha, uniform(stream_of(self.seed, positions, 1))), np.float64)

    def _cut(self, image: torch.Tensor, other: torch.Tensor, position: np.ndarray) -> float:
        """Replace a rectangle of `image` (..., height, width) by that of `other`; return the share that is left."""
        height, width = image.shape[-2:]
        factor = float(self._drawn(position, self.cutmix_alpha)[0])
        x, y = (int(below(stream_of(self.seed, position, at), side)[0]) for at, side in ((2, width), (3, height)))
        ratio = 0.5 * (1 - factor) ** 0.5
        half_width, half_height = int(ratio * width), int(ratio * height)
        left, right = max(x - half_width, 0), min(x + half_width, width)
        top, bottom = max(y - half_height, 0), min(y + half_height, height)
        image[..., top:bottom, left:right] = other[..., top:bottom, left:right]
        return 1 - (right - left) * (bottom - top) / (width * height)


def _weighted(values: torch.Tensor, rows: np.ndarray, partners: np.ndarray, factors: np.ndarray) -> torch.Tensor:
    """Return `factor * value + (1 - factor) * partner` for each of `rows` (n,)."""
    shape = (-1, *[1] * (values.dim() - 1))
    one, other = (torch.from_numpy(each).to(values.dtype).view(shape) for each in (factors, 1 - factors))
    # three roundings, by an operation each: a fused one would depend on where an element lies in its vector
    return (values[rows] * one).add_(values[partners] * other)


def _is_column(value: object, length: int) -> bool:
    return isinstance(value, torch.Tensor | list) and len(value) == length


class MixedBatches(Batches):
    """The batches of a source by place and position, mixed."""

    def __init__(self, source: Source, transform: Transform | None, tolerated: int, mixing: Mixing, order: SampleOrder):
        super().__init__(source, transform, tolerated)
        self.mixing = mixing
        self.order = order

    def batch(self, place: Place) -> Batch:
        """Return the batch of (epochs, ids, positions), each (batch,) int64."""
        epochs, ids, positions = place  # type: ignore[misc]
        partners = positions ^ 1
        missing = np.sort(partners[~np.isin(partners, positions)])
        more_epochs, more_ids = self.order.at_positions(missing)
        batch = super().batch((np.concatenate((epochs, more_epochs)), np.concatenate((ids, more_ids))))
        if "corrupt_samples" in batch:  # of another micro-batch, which reports them
            corrupt = {each: why for each, why in batch.pop("corrupt_samples").items() if each in ids}
            batch |= {"corrupt_samples": corrupt} if corrupt else {}
        return self.mixing.apply(batch, np.concatenate((positions, missing)), len(ids))
