"""A model's parameters, and how many of them are trained."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class ModelSummary:
    """The size of a model; tied tensors count once."""

    parameters: int
    trainable: int
    """Of them, those that are trained."""
    by_dtype: dict[str, int]
    """Parameters by the name of their dtype, such as float32."""
    bytes: int
    """Bytes of the parameters and buffers."""

    def __str__(self) -> str:
        dtypes = ", ".join(f"{count:,} {dtype}" for dtype, count in self.by_dtype.items())
        return f"{self.parameters:,} parameters ({dtypes}), {self.trainable:,} trainable, {self.bytes / 2**20:,.1f} MiB"


def describe_model(model: nn.Module, frozen: Collection[str] = ()) -> ModelSummary:
    """Return the size of `model`. `frozen`: names of parameters that are not trained although they require grad."""
    parameters = list(model.parameters())
    by_dtype: dict[str, int] = {}
    for parameter in parameters:
        dtype = str(parameter.dtype).removeprefix("torch.")
        by_dtype[dtype] = by_dtype.get(dtype, 0) + parameter.numel()
    return ModelSummary(
        parameters=sum(by_dtype.values()),
        trainable=sum(
            parameter.numel()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and name not in frozen
        ),
        by_dtype=by_dtype,
        bytes=sum(tensor.numel() * tensor.element_size() for tensor in (*parameters, *model.buffers())),
    )
