"""The exponential moving average of a model's weights."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distrain.config import UserError, close_names
from distrain.networks.calling import unwrap_model
from distrain.networks.memory import local

_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


def canonical_name(name: str) -> str:
    """Return a tensor's name without the parts that wrappers inside the model, such as torch.compile's, add."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


class Ema:
    """An exponential moving average of the weights: `average = decay * average + (1 - decay) * weights` at each step.

    It starts as a copy of the weights, so it needs no bias correction. Averages are fp32 (fp64 for fp64 weights),
    complex ones likewise; tensors of other dtypes are copied. Non-persistent buffers are skipped, and tied weights are
    held once. Build it when the model is on its device and sharded; averages are sharded as the weights are.

    `model` may be a mapping of canonical names to tensors, if the weights live outside the module (ZeRO-3); it is read
    again at each update. Weights that `constant` names are not averaged: they would be their own average.
    """

    def __init__(self, model: nn.Module | Mapping[str, Tensor], decay: float, constant: Collection[str] = ()):
        assert 0 < decay < 1, decay
        self.decay = decay
        self._model = unwrap_model(model) if isinstance(model, nn.Module) else None
        # the dictionaries that hold the tensors: a module may replace a buffer by assignment
        self._slots = (
            _slots(unwrap_model(model)) if isinstance(model, nn.Module) else {name: (model, name) for name in model}
        )
        for name in constant:
            self._slots.pop(name, None)
        with torch.no_grad():
            self._averages = {name: _wide_copy(holder[key]) for name, (holder, key) in self._slots.items()}
        averaged = {name for name, each in self._averages.items() if each.is_floating_point() or each.is_complex()}
        self._floating = [name for name in self._averages if name in averaged]
        self._other = [name for name in self._averages if name not in averaged]

    def tensors(self) -> dict[str, Tensor]:
        """Return the live averages by canonical name; writing into them loads an average."""
        return dict(self._averages)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy averages in. Raises UserError, changing nothing, unless names and shapes are those of the model."""
        problems = []
        for name, average in self._averages.items():
            if name not in tensors:
                problems.append(f"average {name!r} is missing{close_names(name, tensors)}")
            elif (shape := tuple(tensors[name].shape)) != tuple(average.shape):
                problems.append(f"average {name!r} has shape {shape}, and the model's tensor {tuple(average.shape)}")
        problems += [
            f"average {name!r} is of no tensor of this model" for name in tensors if name not in self._averages
        ]
        if problems:
            raise UserError("\n".join(problems))
        with torch.no_grad():
            for name, average in self._averages.items():
                average.copy_(tensors[name])

    @torch.no_grad()
    def update(self) -> None:
        """Average the current weights in."""
        averages = [local(self._averages[name]) for name in self._floating]
        with self._naming():
            weights = [
                weight if weight.dtype == average.dtype else weight.to(average.dtype)
                for average, weight in zip(averages, self._live(self._floating), strict=True)
            ]
            if averages:
                torch._foreach_lerp_(averages, weights, 1 - self.decay)
            for name, value in zip(self._other, self._live(self._other), strict=True):
                local(self._averages[name]).copy_(value)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the model its averages, and afterwards its own weights back, bit for bit."""
        self._reshard()
        with self._naming():
            live = self._live(self._slots)
        with torch.no_grad():
            own = [tensor.clone() for tensor in live]
            _copy(live, [local(average) for average in self._averages.values()])
        try:
            yield
        finally:
            self._reshard()
            with torch.no_grad():
                _copy(self._live(self._slots), own)

    def _reshard(self) -> None:
        # after a forward pass without a backward pass, FSDP2 may hold unsharded weights, and would use them again
        if self._model is None or not dist.is_initialized():
            return
        from torch.distributed.fsdp import FSDPModule  # a second to import, and only sharded models need it

        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _live(self, names: Any) -> list[Tensor]:
        return [local(holder[key].detach()) for holder, key in (self._slots[name] for name in names)]

    @contextmanager
    def _naming(self) -> Iterator[None]:
        """Raise UserError naming the tensor that is not what it was at the start, where using it fails."""
        try:
            yield
        except (AttributeError, KeyError, RuntimeError):
            for name, (holder, key) in self._slots.items():
                now, before = holder.get(key), list(self._averages[name].shape)
                if now is None or list(now.shape) != before:
                    found = "is gone" if now is None else f"has the shape {list(now.shape)} now"
                    raise UserError(
                        f"{name} {found} and had {'' if now is not None else 'the shape '}{before} at the start, so it "
                        "has no average (train.ema) and no resumed run could hold it; keep its shape, or register it "
                        "with persistent=False"
                    ) from None
            raise


def _slots(model: nn.Module) -> dict[str, tuple[Any, str]]:
    """Return, for each tensor of a state dict by canonical name, the dictionary that holds it and its key there."""
    slots: dict[str, tuple[Any, str]] = {}
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        buffers = {key: held for key, held in module._buffers.items() if key not in module._non_persistent_buffers_set}
        for holder, tensors in ((module._parameters, module._parameters), (module._buffers, buffers)):
            for key, tensor in tensors.items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    slots[canonical_name(f"{prefix}.{key}" if prefix else key)] = (holder, key)
    return slots


def _wide_copy(tensor: Tensor) -> Tensor:
    wide = tensor.dtype
    if tensor.is_floating_point() and wide.itemsize < 4:
        wide = torch.float32
    elif tensor.is_complex() and wide.itemsize < 8:
        wide = torch.complex64
    return tensor.detach().to(wide, copy=True)


def _copy(to: list[Tensor], values: list[Tensor]) -> None:
    for tensor, value in zip(to, values, strict=True):
        tensor.copy_(value)
