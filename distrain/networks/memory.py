"""The tensors of a model, and those that share memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and persistent buffers under all their names, in the order of a state dict."""
    found: dict[str, Tensor] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        start = f"{prefix}." if prefix else ""
        for key, parameter in module._parameters.items():
            if parameter is not None:
                found[start + key] = parameter
        for key, buffer in module._buffers.items():
            if buffer is not None and key not in module._non_persistent_buffers_set:
                found[start + key] = buffer
    return found


def local(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor, sharded or not."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def may_overlap(tensor: Tensor) -> bool:
    """Whether several elements may lie in the same memory, as after `expand`; exact but for odd strides."""
    if tensor.layout is not torch.strided or not tensor.numel():
        return False
    reach = 0
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def views_of_parameters(model: nn.Module) -> Iterator[str]:
    """Yield an error for each buffer that is a view of a parameter, which moving or sharding would break."""
    parameters: dict[int, list[tuple[int, int, str]]] = {}
    buffers: list[tuple[int, int, int, str]] = []
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta or not tensor.numel() or tensor.layout is not torch.strided or hasattr(tensor, "to_local"):
            continue
        size, storage = tensor.element_size(), tensor.untyped_storage().data_ptr()
        reach = sum(stride * (count - 1) for stride, count in zip(tensor.stride(), tensor.shape, strict=True))
        start = int(tensor.storage_offset()) * size
        stop = start + int(reach + 1) * size
        if isinstance(tensor, nn.Parameter):
            parameters.setdefault(storage, []).append((start, stop, name))
        else:
            buffers.append((storage, start, stop, name))
    for storage, start, stop, name in buffers:
        other = next((each for low, high, each in parameters.get(storage, ()) if low < stop and start < high), None)
        if other is not None:
            yield (
                f"buffer {name} is a view of parameter {other}, which another device or sharding would break; .clone() "
                "it, or create the view in forward()"
            )
