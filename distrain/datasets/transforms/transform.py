"""The transforms of a recipe, in order, on whole batches.

Names are those of torchvision.transforms.v2. Transforms that treat all samples alike run once on the whole batch. Flips
and crops draw their parameters for the whole batch at once. All others run sample by sample, with the random state
seeded for each. So a sample looks the same in every batch, process and loader process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from distrain.config import Component, UserError
from distrain.datasets.base import Batch
from distrain.system.output import error_line

Images = torch.Tensor | list[Any]
"""A tensor (batch, channels, height, width), or a list of samples while they differ in size."""
Step = Callable[[Images, np.ndarray, np.ndarray], Images]
"""(images, epochs (batch,), ids (batch,)) -> images."""


class Transform:
    """A sequence of transforms of a batch's inputs. Images that remain uint8 become floats in [0, 1]."""

    def __init__(self, items: Sequence[Component], seed: int, where: str, dtype: torch.dtype = torch.float32):
        """Build the recipe's items, which are at the key `where`; raises one UserError with every problem.

        `dtype`: the run's, float32 or float64; replaces every float32, also in the items.
        """
        self.where = where
        self.dtype = dtype
        self.names = [item.name for item in items]
        self._steps: list[Step] = []
        problems = []
        if items:
            from distrain.datasets.transforms.steps import build_step
        for index, item in enumerate(items):
            try:
                self._steps.append(build_step(item, dtype, seed, index))
            except UserError as error:
                problems.append(f"{where}, item {index + 1}: {error}")
        if problems:
            raise UserError("\n".join(problems))

    def __call__(self, batch: Batch, epochs: np.ndarray) -> Batch:
        """Return the batch with its inputs transformed, maybe in place; `epochs` (batch,) int64."""
        images = batch["inputs"]
        if not self._steps and isinstance(images, (torch.Tensor, dict)) and not _is_uint8_image(images):
            return batch
        if isinstance(images, dict):
            raise UserError(f"{self.where}: found the inputs {', '.join(images)}, expected a single tensor")
        ids = batch["ids"].numpy()
        for name, step in zip(self.names, self._steps, strict=True):
            try:
                images = _stacked(step(images, epochs, ids))
            except UserError:
                raise
            except Exception as error:
                shapes = _shapes(images)
                hint = ""
                if isinstance(images, torch.Tensor) and images.dtype == torch.uint8 and "uint8" in str(error):
                    hint = "; put {name: ToDtype, dtype: float32, scale: true} before it"
                raise UserError(f"{self.where}: {name} failed on inputs {shapes}: {error_line(error)}{hint}") from error
        if not isinstance(images, torch.Tensor):
            raise UserError(
                f"{self.where}: the samples of a batch must end with one size, found {_shapes(images)}; add Resize or "
                "RandomResizedCrop, or give the data set a `size`"
            )
        if _is_uint8_image(images):
            images = images.to(self.dtype).mul_(1 / 255)
        # torchvision may wrap a tensor in its own class, which would slow every later operation
        batch["inputs"] = images if type(images) is torch.Tensor else images.as_subclass(torch.Tensor)
        return batch


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
