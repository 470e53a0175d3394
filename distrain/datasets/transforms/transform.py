"""The transforms of a recipe, in order, on whole batches.

Names are those of torchvision.transforms.v2. Transforms that treat all samples alike run once on the whole batch. Flips
and crops draw their parameters for the whole batch at once. All others run sample by sample, with the random state
seeded for each. So a sample looks the same in every batch, process and loader process.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from distrain.config import Component, UserError
from distrain.datasets.base import Batch
from distrain.datasets.transforms.finishing import FINISH, Finish
from distrain.system.compiler import without_compiler
from distrain.system.numbers import a_kind
from distrain.system.output import error_line

Images = torch.Tensor | list[Any]
"""A tensor (batch, channels, height, width), or a list of samples while they differ in size."""
Step = Callable[[Images, np.ndarray, np.ndarray], Images]
"""(images, epochs (batch,), ids (batch,)) -> images."""


@dataclass(frozen=True)
class Windows:
    """Where each image of a batch is cut by a RandomCrop."""

    height: int
    width: int
    draws: Sequence[tuple[int, int]]
    """For each image 64 random bits for its top and for its left."""
    channels_last: bool
    """Whether the windows lie in memory with their channels last, as decoders give them."""

    def of(self, row: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Return (top, left, bottom, right) of the window of image `row`, which has this size.

        Raises UserError if it is smaller than the window.
        """
        if height < self.height or width < self.width:
            raise UserError(too_small((self.height, self.width), (height, width)))
        down, right = self.draws[row]
        top, left = (down >> 32) * (height - self.height + 1) >> 32, (right >> 32) * (width - self.width + 1) >> 32
        return top, left, top + self.height, left + self.width


def too_small(wanted: Sequence[int], found: Sequence[int]) -> str:
    """Return the error for images that are smaller than their crop, each (height, width)."""
    (height, width), small = wanted, " × ".join(map(str, found))
    return f"RandomCrop to {height} × {width} does not fit into {small}; set padding or pad_if_needed"


@dataclass(frozen=True)
class Masks:
    """That targets are masks (batch, height, width), which move with their images."""

    fill: int | None = None
    """The class of pixels beyond the edge of an image, which the loss ignores; None: there may be none."""


_OF_A_SIZE = ("CenterCrop", "RandomCrop", "RandomResizedCrop")
_KEEP_SIZES = (
    *("AugMix", "AutoAugment", "ColorJitter", "ConvertImageDtype", "GaussianBlur", "GaussianNoise", "Grayscale"),
    *("Identity", "Normalize", "RGB", "RandAugment", "RandomErasing", "RandomGrayscale", "RandomHorizontalFlip"),
    *("RandomVerticalFlip", "ToDtype", "ToImage", "ToPureTensor", "TrivialAugmentWide"),
)


class Transform:
    """A sequence of transforms of a batch's inputs. Images that remain uint8 become floats in [0, 1].

    With `leave_bytes` images that are uint8 before the last of them, those of a `Finish`, stay so, and the batch has it
    under `FINISH`: it is called where they are copied to.
    """

    def __init__(
        self,
        items: Sequence[Component],
        seed: int,
        where: str,
        dtype: torch.dtype = torch.float32,
        masks: Masks | None = None,
    ):
        """Build the recipe's items, which are at the key `where`; raises one UserError with every problem.

        `dtype`: the run's, float32 or float64; replaces every float32, also in the items. `masks`: what targets are
        besides, if they are that; where a batch has them they are transformed as its images, with the same draws.
        """
        self.where = where
        self.dtype = dtype
        self.names = [item.name for item in items]
        self._items = items
        self._steps: list[Step] = []
        self._masks = masks
        self._leaves_bytes = False
        self.met_bytes = False
        """Whether the images of the last batch were uint8 before the last transforms."""
        problems = []
        if items:
            with without_compiler():
                from distrain.datasets.transforms.steps import are_flips, build_step, finish_of, windows_of
        for index, item in enumerate(items):
            try:
                self._steps.append(build_step(item, dtype, seed, index, masks))
            except UserError as error:
                problems.append(f"{where}, item {index + 1}: {error}")
        if problems:
            raise UserError("\n".join(problems))
        self.windows = windows_of(self._steps[0]) if items and masks is None else None
        """(epochs, ids) -> what the first step cuts of images, where it only cuts; whoever reads them may do so."""
        self._first_of_finish, self._finish = finish_of(self._steps, dtype) if items else (0, Finish(dtype))
        self._keeps_layout = self.windows is not None and are_flips(self._steps[1 : self._first_of_finish])

    def leave_bytes(self) -> None:
        """Leave the `Finish` of images of bytes to whoever copies a batch to its device; before a loader is made.

        So is their layout in memory, where they need not be turned before.
        """
        self._leaves_bytes = True
        if self.windows is not None and self._keeps_layout:
            self.windows = functools.partial(self.windows, channels_last=True)

    def gives_one_size(self, before: bool) -> bool:
        """Whether all images are known to have one size afterwards; `before`: whether they have one to begin with."""
        for item in reversed(self._items):
            size = item.args.get("size")
            if item.name in _OF_A_SIZE or (item.name == "Resize" and isinstance(size, list) and len(size) == 2):
                return True
            if item.name not in _KEEP_SIZES:
                return False
        return before

    def __call__(self, batch: Batch, epochs: np.ndarray) -> Batch:
        """Return the batch with its inputs transformed, maybe in place; `epochs` (batch,) int64."""
        return self._from_step(0, batch, epochs)

    def after_windows(self, batch: Batch, epochs: np.ndarray) -> Batch:
        """As a call, for a batch whose images are what `windows` cuts of them."""
        return self._from_step(1, batch, epochs)

    def _from_step(self, first: int, batch: Batch, epochs: np.ndarray) -> Batch:
        images = batch["inputs"]
        if not self._steps and not isinstance(images, list) and not _is_uint8_image(images):
            return batch
        if not isinstance(images, torch.Tensor | list):
            found = ", ".join(images) if isinstance(images, dict) else a_kind(images)
            raise UserError(f"{self.where}: found the inputs {found}, expected a single tensor")
        ids, cut = batch["ids"].numpy(), self._first_of_finish
        masks = _as_images(batch.get("targets")) if self._masks is not None else None
        images, masks = self._through(slice(first, cut), images, epochs, ids, masks)
        if masks is not None:
            batch["targets"] = self._as_targets(masks)
        self.met_bytes = _is_uint8_image(images)
        if self.met_bytes and self._leaves_bytes:
            batch[FINISH] = self._finish
        else:
            images = self._finished(images, epochs, ids)
        if not isinstance(images, torch.Tensor):
            raise UserError(
                f"{self.where}: the samples of a batch must end with one size, found {_shapes(images)}; add Resize or "
                "RandomResizedCrop, or give the data set a `size`"
            )
        # torchvision may wrap a tensor in its own class, which would slow every later operation
        batch["inputs"] = images if type(images) is torch.Tensor else images.as_subclass(torch.Tensor)
        return batch

    def _finished(self, images: Images, epochs: np.ndarray, ids: np.ndarray) -> Images:
        if isinstance(images, torch.Tensor) and self.met_bytes:
            try:
                return self._finish(images)  # faster than the items one by one
            except Exception:
                pass  # one of the items does not fit, and is named below
        images, _ = self._through(slice(self._first_of_finish, None), images, epochs, ids)
        return Finish(self.dtype)(images) if isinstance(images, torch.Tensor) and _is_uint8_image(images) else images

    def _as_targets(self, masks: Images) -> torch.Tensor:
        if not isinstance(masks, torch.Tensor):
            raise UserError(
                f"{self.where}: the masks of a batch must end with one size, found {_shapes(masks)}; add Resize with "
                "[height, width] or RandomResizedCrop, or give the data set a `size`"
            )
        return masks.as_subclass(torch.Tensor).squeeze(1)

    def _through(
        self, which: slice, images: Images, epochs: np.ndarray, ids: np.ndarray, masks: Images | None = None
    ) -> tuple[Images, Images | None]:
        for name, step in zip(self.names[which], self._steps[which], strict=True):
            try:
                if masks is None:
                    images = _stacked(step(images, epochs, ids))
                else:
                    from distrain.datasets.transforms.steps import on_both

                    images, masks = map(_stacked, on_both(step, images, masks, epochs, ids))
            except UserError:
                raise
            except Exception as error:
                shapes = _shapes(images)
                hint = ""
                if isinstance(images, torch.Tensor) and images.dtype == torch.uint8 and "uint8" in str(error):
                    hint = "; put {name: ToDtype, dtype: float32, scale: true} before it"
                raise UserError(f"{self.where}: {name} failed on inputs {shapes}: {error_line(error)}{hint}") from error
        return images, masks


def _as_images(masks: Any) -> Images | None:
    """Return masks (batch, height, width), or a list of (height, width), with a channel as images have it."""
    if isinstance(masks, torch.Tensor):
        return masks.unsqueeze(1) if masks.dim() == 3 else None
    return [mask[None] for mask in masks] if isinstance(masks, list) else None


def _is_uint8_image(images: Any) -> bool:
    return isinstance(images, torch.Tensor) and images.ndim == 4 and images.dtype == torch.uint8


def _shapes(images: Any) -> str:
    if isinstance(images, torch.Tensor):
        return f"{tuple(images.shape)} {images.dtype}".replace("torch.", "")
    shapes = {str(tuple(image.shape)) if isinstance(image, torch.Tensor) else type(image).__name__ for image in images}
    return ", ".join(sorted(shapes)[:4]) + (", ..." if len(shapes) > 4 else "")


def _stacked(images: Images) -> Images:
    """Return the samples as one tensor if they are tensors of one shape."""
    if isinstance(images, torch.Tensor) or not all(isinstance(image, torch.Tensor) for image in images):
        return images
    return torch.stack(images) if len({image.shape for image in images}) == 1 else images
