"""How many floating-point operations a model's training takes: counted once, on tensors without storage."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from distrain.datasets.base import Batch
from distrain.datasets.nested import map_tensors
from distrain.networks.undisturbed import fake_tensors, use_stand_ins
from distrain.system.output import error_line
from distrain.system.peak_flops import peak_tflops

logger = logging.getLogger(__name__)

T = TypeVar("T")


def without_storage(value: T, *modules: nn.Module) -> T | None:
    """Return a copy of a model, or of what holds `modules`, with their tensors on the meta device; None where it cannot
    be copied.

    The copy shares nothing with it, so that calling it changes nothing there.
    """
    memo: dict[int, object] = {}
    for module in (value,) if isinstance(value, nn.Module) else modules:
        for tensor in (*module.parameters(), *module.buffers()):
            meta: Tensor = tensor.detach().to("meta")
            memo[id(tensor)] = nn.Parameter(meta, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else meta
    try:
        return copy.deepcopy(value, memo)
    except Exception as error:
        what = "model" if isinstance(value, nn.Module) else "loss"
        logger.info(f"rows have no mfu: the {what} cannot be copied to count its operations: {error_line(error)}")
        return None


_META = torch.device("meta")


class _Alone(TorchDispatchMode):
    """Refuses collectives: one rank counts, and would wait for the others."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace in ("c10d", "_c10d_functional"):
            raise RuntimeError(f"the ranks exchange tensors in it ({function.overloadpacket.__name__})")
        return function(*args, **(kwargs or {}))


def training_flops(
    model: nn.Module, loss_sum: Callable[[nn.Module, Batch], Tensor], batch: Batch, device: torch.device = _META
) -> int | None:
    """Return the floating-point operations of a forward and a backward pass over `batch`; None: cannot be counted.

    `model` is that of `without_storage`; `device` is where else `loss_sum` has tensors. Matrix products, convolutions
    and attention count, two operations for each multiply-add, as `torch.utils.flop_counter` has them; what activation
    checkpointing computes again does not.
    """
    from torch.utils.flop_counter import FlopCounterMode

    try:
        # models of transformers look at values, such as those of a mask, unless tensors are known to be fake
        fakes = fake_tensors()
        with torch.enable_grad(), fakes, FlopCounterMode(display=False) as counter, _Alone():
            if device.type != "meta":
                use_stand_ins(model, device)
                for module in model.modules():
                    buffers = {key: each for key, each in module._buffers.items() if each is not None}
                    module._buffers |= {key: torch.empty_like(each, device=device) for key, each in buffers.items()}
            moved = map_tensors(lambda each: torch.empty_like(each, device=device), batch)
            torch.autograd.backward(loss_sum(model, moved).sum())
        return counter.get_total_flops() or None
    except Exception as error:
        logger.info(f"rows have no mfu: the operations cannot be counted without values: {error_line(error)}")
        return None


def peak_of(device: torch.device, precision: str, stated: float | None) -> float | None:
    """Return the TFLOP/s of one device at most: as the recipe states it, or from the table; None: not known."""
    if stated is not None or device.type != "cuda":
        return stated
    return peak_tflops(torch.cuda.get_device_name(device), precision)
