"""Passes of a model that leave nothing behind in it, and need no memory."""

from __future__ import annotations

import logging
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from functools import partial
from types import FunctionType, MethodType, ModuleType, NoneType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from distrain.config.user_files import users_modules
from distrain.networks.memory import may_overlap

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode


class Attributes:
    """What modules hold besides their parameters, buffers and modules, as it is now.

    `restore` gives attributes their values back, and lists, dicts and sets in them their items, generators their state.
    Hooks that were removed are called again, and those that were added no longer.
    What the user's files hold, and the classes and functions in them, is given back as well.
    The elements of `tensors` are for whoever restores.
    """

    def __init__(self, model: nn.Module) -> None:
        self.tensors: list[Tensor] = []
        self._restores: list[Callable[[], object]] = []
        self._known: set[int] = set()
        for module in model.modules():
            own = {key: each for key, each in vars(module).items() if _is_own(key)}
            self._restores.append(partial(_give_back, module, own))
            for key, each in vars(module).items():
                if key in own or "_hooks" in key:
                    self._note(each)
        for file in users_modules():
            self._note_shared(file)
            for each in list(vars(file).values()):
                if isinstance(each, type | FunctionType) and each.__module__ == file.__name__:
                    self._note_shared(each)

    def restore(self) -> None:
        """Give them back."""
        for restore in self._restores:
            restore()

    def _note(self, value: Any) -> None:
        if isinstance(value, _CONSTANT) or id(value) in self._known or len(self._known) > _MOST_OBJECTS:
            return
        self._known.add(id(value))
        if isinstance(value, Tensor):
            if not (value.is_inference() or may_overlap(value)):  # which nobody can write into
                self.tensors.append(value)
        elif isinstance(value, np.memmap):
            return  # a file, which may be larger than memory
        elif isinstance(value, np.ndarray) and value.flags.writeable:
            self._restores.append(partial(np.copyto, value, value.copy()))
        elif isinstance(value, torch.Generator):
            self._restores.append(partial(value.set_state, value.get_state()))
        elif isinstance(value, random.Random):
            self._restores.append(partial(value.setstate, value.getstate()))
        elif isinstance(value, np.random.Generator):
            self._restores.append(partial(setattr, value.bit_generator, "state", value.bit_generator.state))
        elif isinstance(value, np.random.RandomState):
            self._restores.append(partial(value.set_state, value.get_state()))
        elif isinstance(value, dict):
            self._note_all(value, dict(value), value.values())
        elif isinstance(value, list | set | deque):
            self._note_all(value, value.copy(), value)
        elif isinstance(value, tuple):
            for each in value:
                self._note(each)
        elif isinstance(getattr(value, "__dict__", None), dict):  # an object of the user's own, such as a meter
            self._note(vars(value))

    def _note_shared(self, holder: Any) -> None:
        held = {key: each for key, each in list(vars(holder).items()) if isinstance(each, _SHARED)}
        own = {key: each for key, each in held.items() if not key.startswith("__")}
        self._restores.append(partial(_assign, holder, own))
        for each in own.values():
            if isinstance(each, Tensor | np.ndarray):
                large = each.nbytes > _MOST_BYTES
            else:
                large = isinstance(each, Sized) and len(each) > _MOST_ITEMS
            if not large:
                self._note(each)

    def _note_all(self, container: Any, items: Any, values: Iterable[Any]) -> None:
        self._restores.append(partial(_fill, container, items))
        for each in values:
            self._note(each)


_OF_MODULES = frozenset(vars(nn.Module()))
_OF_ENGINES = ("__composable_api", "_fsdp_", "ds_", "applied_pre_backward", "_external_params", "_original_parameters")
"""How attributes begin that FSDP2 and DeepSpeed put on modules and keep themselves."""
_CONSTANT = (
    NoneType,
    bool,
    int,
    float,
    str,
    bytes,
    type,
    nn.Module,
    nn.Parameter,
    FunctionType,
    MethodType,
    ModuleType,
)
_MOST_OBJECTS = 100_000
_SHARED = (
    NoneType,
    int,
    float,
    complex,
    str,
    bytes,
    tuple,
    list,
    dict,
    set,
    deque,
    Tensor,
    np.ndarray,
    torch.Generator,
    random.Random,
    np.random.Generator,
    np.random.RandomState,
)
"""What is given back of what a file, a class or a function holds."""
_MOST_BYTES, _MOST_ITEMS = 1 << 20, 10_000
"""Of that, what is larger is data, and looked into by nobody."""


def _is_own(key: str) -> bool:
    return key not in _OF_MODULES and not key.startswith(_OF_ENGINES)


def _give_back(module: nn.Module, own: dict[str, Any]) -> None:
    for key in [key for key in vars(module) if _is_own(key) and key not in own]:
        del vars(module)[key]
    vars(module).update(own)


def _assign(holder: Any, own: dict[str, Any]) -> None:
    for key, each in own.items():
        if vars(holder).get(key) is not each:
            setattr(holder, key, each)


def _fill(container: Any, items: Any) -> None:
    if _ids(container) == _ids(items):
        return  # so that nobody else who uses it ever sees it empty
    container.clear()
    (container.extend if isinstance(container, list | deque) else container.update)(items)


def _ids(container: Any) -> list[int]:
    return [*map(id, container), *(map(id, container.values()) if isinstance(container, dict) else ())]


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Restore on leaving what the modules hold: attributes, parameters, and buffers with their values."""
    attributes = Attributes(model)
    kept = [(module, dict(vars(module)), dict(module._parameters), dict(module._buffers)) for module in model.modules()]
    buffers = [each for each in model.buffers() if not may_overlap(each)]
    values = [(tensor, tensor.clone()) for tensor in (*buffers, *attributes.tensors)]
    try:
        yield
    finally:
        attributes.restore()
        for module, held, parameters, registered in kept:
            vars(module).clear()
            vars(module).update(held)
            module._parameters.clear()
            module._parameters.update(parameters)
            module._buffers.clear()
            module._buffers.update(registered)
        with torch.no_grad():
            # what is computed from buffers alone, such as a count of batches, is computed for real
            for tensor, before in values:
                tensor.copy_(before)


def fake_tensors() -> FakeTensorMode:
    """Return a mode in which tensors have no values; whoever tries something in it tells what fails, and not torch."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # takes a while to import, and few runs need it

    logging.getLogger(FakeTensorMode.__module__).setLevel(logging.CRITICAL)
    return FakeTensorMode(allow_non_fake_inputs=True)


def use_stand_ins(model: nn.Module, device: torch.device) -> None:
    """Replace each parameter by an empty one on `device`; under FakeTensorMode these have shapes alone.

    Whatever device the parameters are on, buffers may be on another.
    """
    stand_ins: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in stand_ins:
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                    stand_ins[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                module._parameters[key] = stand_ins[id(parameter)]
