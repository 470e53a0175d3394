"""State that no checkpoint holds: attributes of the user's objects that are neither parameters nor saved buffers.

A counter in a module, a buffer that is not persistent, a generator of a transform: what such things hold at a step
depends on what this process has done before it, so after a resume they are others. Where two runs differ, those that
differ with them are the likely cause, and can be named.
"""

from __future__ import annotations

import functools
import random
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from distrain.config import user_files
from distrain.optim import plain_name

_DEPTH = 5
_MOST = 256  # entries of a container
_LARGE = 1 << 20  # bytes; of larger tensors only whether they were written to is looked at
_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_OF_MODULES = {*vars(nn.Module()), "training", "_compiled_call_impl"}
_OF_WRAPPERS = ("_is_accelerate", "_accelerate", "_hf_", "_ds_", "_fsdp", "ds_", "_old_forward", "_original_forward")
_OF_OPTIMIZERS = {"state", "param_groups", "defaults"}
_NOT_OF_USERS = {"torch", "torchvision", "numpy", "builtins", "collections", "accelerate", "deepspeed", "distrain"}


def hidden_state(roots: Mapping[str, Any]) -> dict[str, str]:
    """Return {path: value in words} of all that the roots hold and a checkpoint does not."""
    found: dict[str, str] = {}
    walk = _Walk(found)
    for name, root in roots.items():
        try:
            walk.visit(name, root, 0)
        except Exception as error:  # whatever a class of the user's does when it is looked at: it is only looked at
            found[name] = f"cannot be looked at: {type(error).__name__}"
    return found


class _Walk:
    def __init__(self, found: dict[str, str]):
        self.found = found
        self.seen: set[int] = set()

    def visit(self, path: str, value: Any, depth: int) -> None:
        words = _in_words(value)
        if words is not None:
            self.found[path] = words
            return
        if id(value) in self.seen or depth > _DEPTH:
            return
        self.seen.add(id(value))
        for name, part, deeper in _parts(value):
            # a leading slash: it belongs to no object, and is found from many
            inner = name[1:] if name.startswith("/") else f"{path}.{name}" if name else path
            self.visit(inner, part, depth + deeper)


def _parts(value: Any) -> Iterator[tuple[str, Any, int]]:
    """Yield (name, part, how much deeper it is) of a thing that has parts."""
    if isinstance(value, nn.Module):
        yield from _of_module(value)
    elif isinstance(value, torch.optim.Optimizer):
        yield from (
            (name, part, 1) for name, part in vars(value).items() if _counts(name) and name not in _OF_OPTIMIZERS
        )
    elif isinstance(value, functools.partial):
        for index, part in enumerate((value.func, *value.args)):
            yield ("" if index == 0 or callable(part) else str(index)), part, 0
        yield from ((name, part, 1) for name, part in value.keywords.items())
    elif isinstance(value, Mapping):
        if len(value) <= _MOST:
            yield from ((str(key), part, 1) for key, part in list(value.items()))
    elif isinstance(value, list | tuple | set | frozenset | deque):
        if len(value) <= _MOST and not isinstance(value, set | frozenset):
            yield from ((str(index), part, 1) for index, part in enumerate(value))
    elif callable(value) and hasattr(value, "__closure__"):
        yield from _of_function(value)
    elif hasattr(value, "__dict__") and not isinstance(value, type) and type(value).__module__ != "types":
        # what wraps the user's own data set is no part of its name
        inner = ("made", "dataset", "inner")
        yield from (("" if name in inner else name, part, name not in inner) for name, part in vars(value).items())
    yield from _of_class(value)


def _of_module(module: nn.Module) -> Iterator[tuple[str, Any, int]]:
    for name, part in vars(module).items():
        if name in _OF_MODULES or name.startswith(_OF_WRAPPERS) or callable(part):
            continue
        if not isinstance(part, nn.Parameter):
            yield name, part, 1
    for name in sorted(module._non_persistent_buffers_set):
        yield f"{name} (a buffer that is not persistent)", module._buffers[name], 1
    for name, parameter in module._parameters.items():
        for attribute, part in vars(parameter).items() if parameter is not None else ():
            if not attribute.startswith(("_", "ds_")) and not callable(part):
                yield f"{name}.{attribute}", part, 1
    # a deep model is no deeper than a flat one: the bound is for what hangs on a module
    yield from ((plain_name(name), child, 0) for name, child in module.named_children())


def _of_function(function: Any) -> Iterator[tuple[str, Any, int]]:
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    for name, cell in zip(names, function.__closure__ or (), strict=False):
        try:
            yield name, cell.cell_contents, 1
        except ValueError:  # not assigned yet
            continue
    if _is_users(getattr(function, "__module__", None)):
        yield from _of_globals(function.__module__, getattr(function, "__globals__", {}))


def _of_class(value: Any) -> Iterator[tuple[str, Any, int]]:
    """Yield what an object of the user's shares: attributes of its class, variables of its file."""
    kind = type(value)
    if not _is_users(kind.__module__) or isinstance(value, type):
        return
    for base in kind.__mro__:
        if _is_users(base.__module__):
            for name, part in vars(base).items():
                if _counts(name) and isinstance(part, (*_PLAIN, Tensor, np.ndarray, list, dict, *_GENERATORS)):
                    yield f"/{base.__name__}.{name} (of the class)", part, 1
    call = next((getattr(kind, name, None) for name in ("forward", "__getitem__", "__iter__", "__call__", "step")
                 if hasattr(getattr(kind, name, None), "__globals__")), None)  # fmt: skip
    if call is not None and _is_users(call.__module__):
        yield from _of_globals(call.__module__, call.__globals__)


def _of_globals(module: str, variables: Mapping[str, Any]) -> Iterator[tuple[str, Any, int]]:
    for name, part in list(variables.items()):
        if _counts(name) and isinstance(part, (*_PLAIN, Tensor, np.ndarray, list, dict, *_GENERATORS)):
            yield f"/{name} (a variable of {Path(variables.get('__file__', module)).name})", part, 1


def _counts(name: str) -> bool:
    return not name.startswith("__") and not name.endswith("_hooks") and "_hooks_" not in name


def _is_users(module: str | None) -> bool:
    if not module:
        return False
    if module.startswith(f"{user_files.__name__}."):  # a file whose plain name is somebody else's
        return True
    root = module.partition(".")[0]
    return root not in _NOT_OF_USERS and root not in sys.stdlib_module_names


_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


def _in_words(value: Any) -> str | None:
    """Return a thing without parts in words that are equal for equal things; None for one that has parts."""
    if isinstance(value, _PLAIN):
        text = repr(value)
        return text if len(text) <= 60 else f"{text[:30]}… ({_hash(text.encode())})"
    if isinstance(value, Tensor):
        if value.numel() == 1:
            return repr(value.item())
        if value.nbytes > _LARGE or value.device.type == "meta":
            return f"a tensor {tuple(value.shape)}, written to {value._version} times"
        raw = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        return f"a tensor {tuple(value.shape)} ({_hash(raw)})"
    if isinstance(value, np.ndarray | np.generic):
        if value.size == 1 and value.dtype.kind in "biufc":
            return repr(value.item())
        if value.nbytes > _LARGE or value.dtype.hasobject:
            return f"an array {value.shape}"
        return f"an array {value.shape} ({_hash(np.ascontiguousarray(value).tobytes())})"
    if isinstance(value, torch.Generator):
        return f"a torch.Generator in state {_hash(value.get_state().numpy())}"
    if isinstance(value, np.random.Generator):
        return f"a numpy Generator in state {_hash(repr(value.bit_generator.state).encode())}"
    if isinstance(value, np.random.RandomState):
        return f"a numpy RandomState in state {_hash(repr(value.get_state(legacy=False)).encode())}"
    if isinstance(value, random.Random):
        return f"a random.Random in state {_hash(repr(value.getstate()).encode())}"
    if isinstance(value, set | frozenset) or (isinstance(value, list | tuple | dict | deque) and len(value) > _MOST):
        return f"a {type(value).__name__} of {len(value)}"
    return None


def _hash(raw: Any) -> str:
    return xxhash.xxh3_64_hexdigest(raw)[:8]
