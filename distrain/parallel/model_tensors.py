"""The tensors of a model: moved to a device, given to every rank, and remembered for a step that is not taken."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distrain.config import UserError
from distrain.networks.memory import may_overlap
from distrain.parallel.contents import remember_extra_state

_BUCKET_BYTES = 250 * 2**20
"""Of the buffers that are broadcast together; DDP's own."""

_MUCH = 8
"""What is more than this part of a GPU's memory is copied to the host."""

_TRAVEL = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.int8,
)


def travels(tensor: Tensor) -> bool:
    """Whether every backend of torch.distributed can send the tensor's dtype; others are sent as bytes."""
    return tensor.dtype in _TRAVEL


def as_bytes(tensor: Tensor) -> Tensor:
    """Return the memory of a contiguous tensor as bytes (uint8, 1-D)."""
    return tensor.reshape(-1).view(torch.uint8)


def share_tensors(tensors: list[Tensor]) -> None:
    """Give every rank what rank 0 has in these tensors."""
    others = [(tensor, tensor.contiguous()) for tensor in tensors if not travels(tensor)]
    sent = [tensor for tensor in tensors if travels(tensor)] + [as_bytes(whole) for _, whole in others]
    if sent:
        assert dist.group.WORLD is not None, "several processes have a group"
        dist._broadcast_coalesced(dist.group.WORLD, sent, _BUCKET_BYTES, 0)
    for tensor, whole in others:
        if whole is not tensor:
            tensor.copy_(whole)


def buffers_to(model: nn.Module, device: torch.device) -> None:
    """Move a model's buffers; one that several modules hold stays one."""
    moved: dict[int, Tensor] = {}
    for module in model.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = moved.setdefault(id(buffer), buffer.to(device))


def model_to(model: nn.Module, device: torch.device) -> nn.Module:
    """Move a model, and return it; its own `to` would make two of a buffer that two modules share.

    Parameters that have gaps in memory, being views of something larger, get memory of their own: fused optimizers step
    through memory, whatever the strides are. Raises UserError for two parameters that hold the same memory.
    """
    taken: list[tuple[int, int, str]] = []
    for name, parameter in model.named_parameters():
        if torch.empty_like(parameter, device="meta").stride() != parameter.stride():
            parameter.data = parameter.data.contiguous()
        if parameter.numel():
            start = parameter.data_ptr()
            taken.append((start, start + parameter.numel() * parameter.element_size(), name))
    taken.sort()
    for (_, stop, one), (start, _, other) in itertools.pairwise(taken):
        if start < stop:
            one, other = sorted((one, other))
            raise UserError(
                f"the parameters {one} and {other} are two tensors in the same memory, which they would not be on "
                "another device or when sharded; assign one Parameter to both modules (b.weight = a.weight), and they "
                "stay tied everywhere"
            )
    buffers_to(model, device)
    return model.to(device)


def buffer_slots(model: nn.Module) -> list[tuple[dict[str, Tensor | None], str]]:
    """Return where a model's buffers are: the dictionaries of the modules, for a module may replace one."""
    return [(module._buffers, key) for module in model.modules() for key in module._buffers]


def remember(slots: list[tuple[dict[str, Tensor | None], str]], extra: Mapping[str, nn.Module]) -> Callable[[], None]:
    """Return a function that restores buffers and extra state as they are now."""
    kept = [(buffers, key, each.clone() if (each := buffers[key]) is not None else None) for buffers, key in slots]
    restore_extra = remember_extra_state(extra)

    def restore() -> None:
        with torch.no_grad():
            for buffers, key, before in kept:
                now = buffers[key]
                if (
                    now is not None
                    and before is not None
                    and (now.shape, now.dtype) == (before.shape, before.dtype)
                    and not may_overlap(now)
                ):
                    now.copy_(before)  # in place, as others may hold the same tensor
                else:
                    buffers[key] = before
        restore_extra()

    return restore


def values_of(parameters: Iterable[nn.Parameter]) -> list[tuple[nn.Parameter, Tensor]]:
    """Return parameters with copies of their values: a model's code may write into its own.

    On the host where they are much of a GPU's memory, which a model with adapters nearly fills by itself.
    """
    held = list(parameters)
    nbytes = sum(each.nbytes for each in held if each.is_cuda)
    away = nbytes > 0 and nbytes > torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory // _MUCH
    return [(each, each.detach().to("cpu", copy=True) if away else each.detach().clone()) for each in held]


def give_back(values: Iterable[tuple[nn.Parameter, Tensor]]) -> None:
    """Write values back into their parameters."""
    for parameter, before in values:
        parameter.data.copy_(before)
