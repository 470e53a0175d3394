"""Checks that outputs fit targets, and sums of the rows that are kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distrain.config import UserError
from distrain.optim.losses.interface import Outputs


def fitted(outputs: Tensor, targets: Tensor, what: str) -> Tensor:
    """Return outputs in the shape of the targets: as they are, or (..., 1) without its last dimension.

    Raises UserError for any other shape, which would be broadcast: (n, 1) against (n,) is n * n differences.
    """
    if outputs.shape == targets.shape:
        return outputs
    if outputs.shape == (*targets.shape, 1):
        return outputs.squeeze(-1)
    raise UserError(
        f"{what} compares outputs and targets one by one, and outputs have shape {tuple(outputs.shape)}, targets "
        f"{tuple(targets.shape)}; make the model's last layer fit, or use a loss or metric for such outputs"
    )


def single(outputs: Outputs, name: str) -> Tensor:
    return outputs if isinstance(outputs, Tensor) else several(outputs, 1, name)[0]


def several(outputs: Outputs, expected: int, name: str) -> Sequence[Tensor]:
    found = [outputs] if isinstance(outputs, Tensor) else outputs
    if not isinstance(found, (list, tuple)) or len(found) != expected:
        tensors = "one tensor" if expected == 1 else f"{expected} tensors"
        raise UserError(f"loss: {name} takes {tensors} from the model, which returned {shapes(outputs)}")
    return found


def shapes(outputs: Any) -> str:
    if isinstance(outputs, Tensor):
        return f"{tuple(outputs.shape)}"
    if isinstance(outputs, (list, tuple)):
        return f"{len(outputs)}: {', '.join(shapes(each) for each in outputs)}"
    return type(outputs).__name__


def equal_shapes(inputs: Sequence[Tensor], name: str) -> Sequence[Tensor]:
    if any(each.shape != inputs[0].shape for each in inputs):
        raise UserError(f"loss: {name} compares outputs of one shape; the model returned {shapes(inputs)}")
    return inputs


def of_rows(targets: Tensor, outputs: Tensor, name: str) -> Tensor:
    if targets.shape != outputs.shape[:1]:
        raise UserError(
            f"loss: {name} takes one target for each row, and targets have shape {tuple(targets.shape)}, outputs "
            f"{tuple(outputs.shape)}"
        )
    return targets


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor in fp32, one in fp64 as it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def along(keep: Tensor, like: Tensor) -> Tensor:
    return keep.view(-1, *[1] * (like.dim() - 1))


def repeated(keep: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if keep is None else keep.repeat_interleave(len(rows) // len(keep), output_size=len(rows))


def kept_sum(losses: Tensor, keep: Tensor) -> Tensor:
    # not a product: a padding row may be infinite
    return losses.where(along(keep, losses), 0.0).sum()
