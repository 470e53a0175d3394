"""The transforms of a recipe, one after the other, on whole batches.

Every transform is named as in torchvision.transforms.v2. Those that treat all samples alike run once on the whole
batch. Flips and crops draw their parameters for the whole batch at once. All others run on one sample after the other,
with the random state seeded for each. So a sample looks the same whatever batch, process or loader process it is in.
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
"""A tensor (batch, channels, height, width), or one entry for each sample while they differ in size."""
Step = Callable[[Images, np.ndarray, np.ndarray], Images]
"""(images, epochs (batch,), ids (batch,)) -> images."""


class Transform:
    """A sequence of transforms of a batch's inputs. Images that are still uint8 in the end become floats in [0, 1]."""

    def __init__(self, items: Sequence[Component], seed: int, where: str, dtype: torch.dtype = torch.float32):
        """Build from the recipe's items. `where` names their key; raises one UserError with every problem.

        `dtype` is what the run computes in: float64 in the place of every float32, also of those that items name.
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
            raise UserError(f"{self.where}: the inputs are {', '.join(images)}, and transforms are for a single tensor")
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
                f"{self.where}: the samples of a batch must have one size in the end, and these are {_shapes(images)}; "
                "add Resize or RandomResizedCrop, or give the data set a `size`"
            )
        if _is_uint8_image(images):
            images = images.to(self.dtype).mul_(1 / 255)
        # torchvision may wrap a tensor in a class of its own, which every later operation would pay for
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
    """Return the samples as one tensor where they are tensors of one shape."""
    if isinstance(images, torch.Tensor):
        return images
    first = images[0]
    if all(isinstance(image, torch.Tensor) and image.shape == first.shape for image in images):
        return torch.stack(images)
    return images
