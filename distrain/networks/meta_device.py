"""Models without their weights: built with parameters on the meta device, and compared with an ordinary build.

A sharding strategy has one process of each node build the model as ever; the others only need what is around the
parameters. `build_on_meta` runs the same constructor with each parameter moved to the meta device as soon as a module
registers it, so that initializing one costs neither time nor memory. All else is computed as ever. Where that makes a
difference, as random numbers are drawn in another order then, the `outline` of the two models differs.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from distrain.config import UserError
from distrain.networks.memory import views_of_parameters

_building = False


def is_building_on_meta() -> bool:
    """Whether `build_on_meta` is under way: parameters have no values then, and files of weights need not be read."""
    return _building


def build_on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """Return what `build` returns, with its parameters on the meta device and all else as `build` leaves it.

    Raises what `build` raises, which it may do for this alone: computing with the values of a parameter fails.
    """
    with _parameters_on_meta():
        model = build()
    for parameter in model.parameters():
        if not parameter.is_meta:  # registered past nn.Module, or lazy until it had a shape
            _to_meta(parameter)
    return model


def take_values(model: nn.Module) -> dict[str, Tensor]:
    """Move the model's parameters to the meta device; return their values by name, in the model's order.

    Raises UserError where a buffer is a view of a parameter, or a parameter has no values.
    """
    problems = list(views_of_parameters(model))
    problems += [
        f"parameter {name} is on the meta device, so it has no values; build it on the CPU, or initialize it after "
        "to_empty(device='cpu')"
        for name, parameter in model.named_parameters()
        if parameter.is_meta
    ]
    if problems:
        raise UserError("the model cannot be sharded:\n  - " + "\n  - ".join(problems))
    values = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        _to_meta(parameter)
    return values


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    global _building
    register = nn.Module.register_parameter

    @functools.wraps(register)
    def register_on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(module, name, param)
        if param is not None and not is_lazy(param) and not param.is_meta:
            _to_meta(param)

    _building, nn.Module.register_parameter = True, register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        _building, nn.Module.register_parameter = False, register  # type: ignore[method-assign]


def _to_meta(parameter: nn.Parameter) -> None:
    # the object stays: others refer to it, as where weights are tied
    stand_in = torch.empty_strided(parameter.size(), parameter.stride(), dtype=parameter.dtype, device="meta")
    torch._C._swap_tensor_impl(parameter, stand_in.requires_grad_(parameter.requires_grad))


# --------------------------------------------------------------------------------------------------------------------
# What a model is beside the values of its parameters


def outline(model: nn.Module) -> dict[str, str]:
    """Return {path: value} of all that can be reached from the model, but for the values of its parameters.

    Modules, names and shapes of parameters and which are tied; attributes, and those of objects among them; tensors and
    arrays by their bytes. Equal outlines of two builds mean that they differ in the values of parameters at most.
    """
    return _Outline(model).values


class _Outline:
    def __init__(self, model: nn.Module):
        self.values: dict[str, str] = {}
        self._parameters = {id(parameter) for parameter in model.parameters()}
        self._seen: dict[int, tuple[str, Any]] = {}
        """What was met, by identity: where first, and itself, so that no other object gets its identity."""
        self._look("model", model)

    def _look(self, path: str, value: Any) -> None:
        if (atom := _atom(value)) is not None:
            self.values[path] = atom
            return
        first, _ = self._seen.setdefault(id(value), (path, value))
        if first != path:
            self.values[path] = f"the same as {first}"
            return
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        if isinstance(value, Tensor):
            self.values[path] = f"{kind} {self._tensor(value)}"
            return
        self.values[path] = kind
        for key, part in self._parts(value):
            self._look(f"{path}{key}", part)

    def _tensor(self, tensor: Tensor) -> str:
        described = f"{tuple(tensor.shape)} {tensor.dtype} requires_grad={tensor.requires_grad}"
        if id(tensor) in self._parameters:
            return f"parameter {described}"
        if tensor.device.type != "cpu":
            return f"{described} on {tensor.device.type}"
        dense = tensor.detach() if tensor.layout is torch.strided else tensor.detach().to_dense()
        content = dense.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
        return f"{described} {_digest(content.numpy())}"

    @staticmethod
    def _parts(value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, nn.Module):
            for name, part in vars(value).items():
                if name in ("_parameters", "_buffers", "_modules"):
                    yield from ((f".{key}", each) for key, each in part.items())
                elif "_hooks" in name and isinstance(part, dict):
                    yield f".{name}", list(part.values())  # the keys count the hooks that this process ever had
                else:
                    yield f".{name}", part
        elif isinstance(value, Mapping):
            for place, (key, part) in enumerate(value.items()):
                plain = isinstance(key, str | int)
                if not plain:
                    yield f"[key {place}]", key
                yield f"[{key!r}]" if plain else f"[{place}]", part
        elif isinstance(value, list | tuple):
            yield from ((f"[{place}]", part) for place, part in enumerate(value))
        elif isinstance(value, set | frozenset):
            # in no order, and another one in each process
            atoms = sorted(_atom(part) or type(part).__qualname__ for part in value)
            yield from ((f"{{{place}}}", part) for place, part in enumerate(atoms))
        elif isinstance(value, types.MethodType):
            yield from ((".__func__", value.__func__), (".__self__", value.__self__))
        elif isinstance(value, types.FunctionType):
            yield ".__qualname__", f"{value.__module__}.{value.__qualname__}"
            yield ".__defaults__", (value.__defaults__, value.__kwdefaults__)
            for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
                try:
                    yield f".{name}", cell.cell_contents
                except ValueError:  # not assigned
                    yield f".{name}", None
        elif isinstance(value, functools.partial):
            yield from ((".func", value.func), (".args", value.args), (".keywords", value.keywords))
        elif isinstance(value, torch.Generator):
            yield ".state", value.get_state()
        else:
            try:
                state = value.__getstate__()
            except Exception:  # as a lock, or an open file: what it holds is no part of a model
                return
            yield ".state", state


_ATOMS = (
    type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.layout, torch.memory_format,
    type(...), np.generic, slice, range,
)  # fmt: skip
_BY_NAME = (type, types.ModuleType, types.BuiltinFunctionType, logging.Logger, torch._ops.OpOverload)


def _atom(value: Any) -> str | None:
    """Return the text of a value that has no parts."""
    if isinstance(value, _ATOMS):
        return f"{type(value).__qualname__} {value!r}"
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return f"array {value.shape} {value.dtype} {_digest(np.ascontiguousarray(value))}"
    if isinstance(value, _BY_NAME):
        return f"{type(value).__qualname__} {getattr(value, '__module__', '')}.{getattr(value, '__name__', '')}"
    return "weakref" if isinstance(value, weakref.ReferenceType) else None


def _digest(content: np.ndarray[Any, Any]) -> str:
    return hashlib.blake2b(content.reshape(-1).view(np.uint8).data, digest_size=16).hexdigest()
