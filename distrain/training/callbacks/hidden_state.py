"""State that no checkpoint holds: what training calls remembers besides parameters and saved buffers.

A counter in a module, a buffer that is not persistent, a generator of a transform, a list in the user's file, a default
argument: what such things hold at a step depends on what this process has done before it, so after a resume they are
others. Where two runs differ, those that differ with them are the likely cause, and can be named.
"""

from __future__ import annotations

import array
import functools
import inspect
import itertools
import logging
import operator
import random
import sys
import types
import warnings
from collections import deque
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from distrain.config import user_files
from distrain.networks.memory import local
from distrain.optim import canonical_name
from distrain.system.numbers import a_kind

_DEPTH = 5
_ENTRIES = 20_000  # of all that is found: looked at again with each step
_MOST = 256  # entries of a container that are looked at one by one
_SAMPLED = 1024  # entries of a larger one that its digest is of
_LARGE = 1 << 20  # bytes; of larger tensors only whether they were written to is looked at
_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_OF_MODULES = {*vars(nn.Module()), "training", "_compiled_call_impl"}
_OF_WRAPPERS = (
    "_is_accelerate", "_accelerate", "_hf_", "_ds_", "_fsdp", "ds_", "_old_forward", "_original_forward",
    "_original_parameters", "applied_pre_backward_ref_cnt",
)  # fmt: skip
_OF_OPTIMIZERS = {"state", "param_groups", "defaults"}
_NOT_OF_USERS = {"torch", "torchvision", "numpy", "builtins", "collections", "accelerate", "deepspeed", "distrain"}
_CONTAINERS = (Mapping, list, tuple, deque)
_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_FUNCTIONS = (types.FunctionType, functools._lru_cache_wrapper)

Part = tuple[str, Any, int, str | None]
"""(name, part, how much deeper it is, where it belongs). None: to what it is a part of; else it is found from many, and
its name is whole."""


def hidden_state(
    roots: Mapping[str, Any], *, files: bool = True, besides: Container[int] = frozenset()
) -> dict[str, str]:
    """Return {path: value in words} of what the roots, and the user's files behind them, hold and no checkpoint does.

    A path begins with the name of a root and a dot, or ends with where it belongs, in brackets. `files`: whether
    variables of the user's files are looked at. `besides`: the ids of what checkpoints hold, wherever else it is.
    """
    walk = _Walk(besides)
    for name, root in roots.items():
        walk.visit(name, root, 0)
    if files:
        walk.visit_files()
    return walk.found


def hidden_weights(name: str, held: Any, model: nn.Module) -> dict[str, str]:
    """Return a digest of the parameters and buffers of a module, or of those in a mapping, that are not the model's."""
    parts = held if isinstance(held, Mapping) else {"": held}
    known = {id(each) for each in (*model.parameters(), *model.buffers())}
    return {
        f"the weights of {name}{'.' * bool(key)}{key}": _weights(each, known)
        for key, each in parts.items()
        if isinstance(each, nn.Module)
    }


@torch.no_grad()
def _weights(module: nn.Module, besides: set[int]) -> str:
    tensors = [each for each in (*module.parameters(), *module.buffers()) if id(each) not in besides]
    real = [torch.view_as_real(each) if each.is_complex() else each for each in map(local, tensors)]
    some = [each.detach().reshape(-1)[:: max(1, each.numel() // _SAMPLED)].double() for each in real]
    # in one copy: the host waits for a device once
    return _hash(torch.cat([each.to(some[0].device) for each in some]).cpu().numpy()) if some else "none"


def held_by_callback(callback: Any) -> dict[str, Any]:
    """Return what a callback has on itself, but for what others have made, such as its view of the run or a board."""
    held = vars(callback).items()
    return {name: each for name, each in held if isinstance(each, _KEPT) or is_of_user(type(each))}


def is_of_user(kind: type) -> bool:
    """Whether a class, or one that it inherits from, is in a file of the user's own."""
    return any(_is_users_file(base.__module__) for base in kind.__mro__)


class _Walk:
    def __init__(self, besides: Container[int]) -> None:
        self.found: dict[str, str] = {}
        self.besides = besides
        self.seen: set[int] = set()
        self.files: dict[str, types.ModuleType] = {}
        """The user's files that were come upon, by the names of their modules, in that order."""

    def visit(self, path: str, value: Any, depth: int, where: str = "", *, ours: bool = False) -> None:
        """Look at a value; `ours`: whether distrain's own things hold it, as far as it is a container."""
        if len(self.found) >= _ENTRIES or id(value) in self.besides:
            return
        try:
            words = _as_text(value)
            if words is not None:
                self.found[path + where] = words
                return
            if id(value) in self.seen or depth > _DEPTH:
                return
            self.seen.add(id(value))
            self._note_files(value)
            ours = _is_ours(type(value).__module__) or (ours and isinstance(value, _CONTAINERS))
            for name, part, deeper, belongs in _parts(value):
                if ours and (isinstance(part, tuple) or _as_text(part) is not None):
                    continue  # what distrain notes for itself decides nothing
                if belongs is not None:
                    self.visit(name, part, 1, belongs)
                else:
                    self.visit(f"{path}.{name}" if name else path, part, depth + deeper, where, ours=ours)
        except Exception as error:  # whatever a class of the user's does when it is looked at: it is only looked at
            self.found[path + where] = f"cannot be looked at: {type(error).__name__}"

    def _note_files(self, value: Any) -> None:
        kinds = value.__mro__ if isinstance(value, type) else type(value).__mro__
        for each in (value, *kinds) if isinstance(value, _FUNCTIONS) else kinds:
            self._note(sys.modules.get(getattr(each, "__module__", None) or ""))

    def _note(self, module: types.ModuleType | None) -> None:
        if module is not None and module.__name__ not in self.files and _is_users_file(module.__name__):
            self.files[module.__name__] = module

    def visit_files(self) -> None:
        """Look at the variables, functions and classes of the user's files, and of those that they import."""
        for module in _growing(self.files):
            file = Path(module.__file__ or module.__name__).name
            for name, part in list(vars(module).items()):
                if isinstance(part, types.ModuleType):
                    self._note(part)
                elif isinstance(part, (type, *_FUNCTIONS)):
                    self._note(sys.modules.get(part.__module__))
                    if part.__module__ == module.__name__:
                        self.visit(part.__qualname__, part, 1, f" (of {file})")
                elif _counts(name) and not _says_nothing(part):
                    known = isinstance(part, _LOOKED_INTO) or _is_users(type(part).__module__)
                    # of what others have made, what it says of itself and little more
                    self.visit(name, part, 1 if known else _DEPTH - 1, f" (a variable of {file})")


def _growing(files: Mapping[str, types.ModuleType]) -> Iterator[types.ModuleType]:
    done = 0
    while done < len(files):
        yield list(files.values())[done]
        done += 1


def _parts(value: Any) -> Iterator[Part]:
    """Yield the parts of a thing that has parts."""
    if isinstance(value, nn.Module):
        yield from _of_module(value)
    elif isinstance(value, torch.optim.Optimizer):
        yield from _attributes(value, _OF_OPTIMIZERS)
    elif isinstance(value, functools.partial):
        for index, part in enumerate((value.func, *value.args)):
            yield ("" if index == 0 or callable(part) else str(index)), part, 0, None
        yield from ((name, part, 1, None) for name, part in value.keywords.items())
    elif isinstance(value, Mapping):
        # what is no name or number has an address in its words, and a large number may be one: another in each process
        # to ask a mapping of another kind for what it holds may read all of that
        for index, (key, part) in enumerate(list(value.items()) if len(value) <= _MOST else []):
            named = isinstance(key, str | bool | float) or (isinstance(key, int) and abs(key) < 1 << 32)
            yield (str(key) if named else f"entry {index}"), part, 1, None
    elif isinstance(value, list | tuple | deque):
        yield from ((str(index), part, 1, None) for index, part in enumerate(list(value)))
    elif isinstance(value, types.GeneratorType):
        yield "position", -1 if value.gi_frame is None else value.gi_frame.f_lasti, 1, None
        yield from ((name, part, 1, None) for name, part in inspect.getgeneratorlocals(value).items())
    elif isinstance(value, types.MethodType):
        if value.__name__ == "collate":  # what makes batches is the task's, whatever calls it
            yield "task.collate", value.__self__, 0, ""
        else:
            yield "", value.__self__, 0, None
        yield "", value.__func__, 0, None
    elif isinstance(value, _FUNCTIONS):
        yield from _of_function(value)
    elif isinstance(value, type):
        yield from _of_class(value)
    elif not _says_nothing(value):
        # what wraps the user's own is no part of its name
        inner: tuple[str, ...] = ("made", "dataset", "inner")
        inner += ("function", "_steps", "form", "own") if _is_ours(type(value).__module__) else ()
        begun = {"_walk"} if _is_ours(type(value).__module__) else set()  # what a stream has been begun for
        for name, part, deeper, where in _attributes(value, begun):
            yield "" if name in inner else name, part, 0 if name in inner else deeper, where
    if not isinstance(value, (type, *_FUNCTIONS)):
        yield from _of_shared(type(value))


def _attributes(value: Any, besides: set[str] | frozenset[str] = frozenset()) -> Iterator[Part]:
    for name, part in list(getattr(value, "__dict__", {}).items()):
        if _counts(name) and name not in besides:
            yield name, part, 1, None
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ()) if _is_users(kind.__module__) else ()
        for name in (slots,) if isinstance(slots, str) else slots:
            if _counts(name) and name != "__weakref__" and hasattr(value, name):
                yield name, getattr(value, name), 1, None


def _of_module(module: nn.Module) -> Iterator[Part]:
    for name, part in list(vars(module).items()):
        if name in _OF_MODULES or name.startswith(_OF_WRAPPERS) or isinstance(part, nn.Parameter):
            continue
        # a function may remember something; of what else can be called, only what is the user's
        remembers = isinstance(part, (*_FUNCTIONS, types.MethodType, functools.partial)) and name != "forward"
        if not callable(part) or remembers or _is_users(type(part).__module__):
            yield name, part, 1, None
    for name in sorted(module._non_persistent_buffers_set):
        yield f"{name} (a buffer that is not persistent)", module._buffers[name], 1, None
    for name, parameter in module._parameters.items():
        for attribute, part in vars(parameter).items() if parameter is not None else ():
            if not attribute.startswith(("_", "ds_")) and not callable(part):
                yield f"{name}.{attribute}", part, 1, None
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for hook in hooks.values():  # those of torch's own, as FSDP2's are, lead to its mechanism
            if isinstance(hook, _FUNCTIONS) and _is_users(hook.__module__):
                yield "", hook, 1, None
    # a deep model is no deeper than a flat one: the bound is for what hangs on a module
    yield from ((canonical_name(name), child, 0, None) for name, child in module.named_children())


def _of_function(function: Any) -> Iterator[Part]:
    """Yield what a function remembers: what it encloses, its default arguments, its attributes."""
    if isinstance(function, functools._lru_cache_wrapper):
        yield "kept results", function.cache_info().currsize, 1, None
        yield "", function.__wrapped__, 0, None
        return
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
        try:
            yield name, cell.cell_contents, 1, None
        except ValueError:  # not assigned yet
            continue
    if not _is_users(function.__module__):
        return
    code, defaults = function.__code__, function.__defaults__ or ()
    names = code.co_varnames[: code.co_argcount]
    file = Path(code.co_filename).name
    values = dict(zip(names[len(names) - len(defaults) :], defaults, strict=True)) | (function.__kwdefaults__ or {})
    for name, part in values.items():
        yield name, part, 1, f" (a default argument of {function.__qualname__} in {file})"
    yield from ((name, part, 1, None) for name, part in vars(function).items() if not name.startswith("__"))
    if (wrapped := getattr(function, "__wrapped__", None)) is not None:
        yield "", wrapped, 0, None
    if not _is_users_file(function.__module__):
        yield from _of_globals(function.__module__, function.__globals__)


def _of_class(kind: type) -> Iterator[Part]:
    """Yield what a class of the user's holds, and what its functions remember."""
    for name, part in list(vars(kind).items()):
        function = part.fget if isinstance(part, property) else getattr(part, "__func__", part)
        if isinstance(function, _FUNCTIONS) and _is_users_file(kind.__module__):
            yield f"{kind.__qualname__}.{name}", function, 1, f" (of {_file_of(function)})"
        elif _counts(name) and not _says_nothing(part) and not callable(part):
            yield f"{kind.__name__}.{name}", part, 1, " (of the class)"


def _of_shared(kind: type) -> Iterator[Part]:
    """Yield what an object of the user's shares with others: what its classes hold, and variables of their files."""
    for base in kind.__mro__:
        if _is_users(base.__module__):
            yield "", base, 0, None
    call = next((getattr(kind, name, None) for name in ("forward", "__getitem__", "__iter__", "__call__", "step")
                 if hasattr(getattr(kind, name, None), "__globals__")), None)  # fmt: skip
    if call is not None and _is_users(call.__module__) and not _is_users_file(call.__module__):
        yield from _of_globals(call.__module__, call.__globals__)


def _of_globals(module: str, variables: Mapping[str, Any]) -> Iterator[Part]:
    for name, part in list(variables.items()):
        if _counts(name) and isinstance(part, (*_PLAIN, Tensor, np.ndarray, list, dict, *_GENERATORS)):
            yield name, part, 1, f" (a variable of {Path(variables.get('__file__', module)).name})"


def _counts(name: str) -> bool:
    return not name.startswith("__") and not name.endswith("_hooks") and "_hooks_" not in name


def _file_of(function: Any) -> str:
    code = getattr(inspect.unwrap(function), "__code__", None)
    return Path(code.co_filename).name if code is not None else str(function.__module__)


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] == "distrain" and not _is_users(module)


def _is_users(module: str | None) -> bool:
    if not module:
        return False
    if module.startswith(f"{user_files.__name__}."):  # a file whose plain name is somebody else's
        return True
    root = module.partition(".")[0]
    return root not in _NOT_OF_USERS and root not in sys.stdlib_module_names


@functools.cache
def _is_users_file(module: str) -> bool:
    """Whether a module is a file of the user's own, and no package that is installed."""
    file = getattr(sys.modules.get(module), "__file__", None)
    return _is_users(module) and file is not None and user_files.is_users_path(file)


def _says_nothing(value: Any) -> bool:
    """Whether a thing is a mechanism: looked into, it would say nothing of the training."""
    return isinstance(value, _MECHANISMS) or type(value).__module__ == "typing"


_MECHANISMS = (types.ModuleType, types.CodeType, types.FrameType, types.GenericAlias, types.UnionType, staticmethod,
               classmethod, property, type(sys.stdout), logging.Logger, logging.Handler)  # fmt: skip
_LOOKED_INTO = (*_PLAIN, Tensor, np.ndarray, Mapping, list, tuple, set, frozenset, deque, nn.Module, functools.partial,
                types.GeneratorType, types.SimpleNamespace, types.MethodType, *_GENERATORS)  # fmt: skip
_KEPT = (*_PLAIN, Tensor, np.ndarray, np.generic, list, tuple, set, dict, deque, *_GENERATORS)
_EMPTY: tuple[Iterable[Any], ...] = ([], (), {}, set(), "", b"", range(0), deque())
_KINDS: list[type] = [
    itertools.cycle, itertools.chain, itertools.islice, itertools.accumulate, itertools.repeat, map, filter, zip,
    enumerate, reversed,
]  # fmt: skip
_ITERATORS = (*_KINDS, *(type(iter(each)) for each in _EMPTY))


def _as_text(value: Any) -> str | None:
    """Return a thing without parts in words that are equal for equal things; None for one that has parts."""
    if isinstance(value, _PLAIN):
        text = repr(value)
        return text if len(text) <= 60 else f"{text[:30]}… ({_hash(text.encode())})"
    if isinstance(value, Tensor):
        value = local(value)
        if value.layout is torch.strided and value.numel() and value.untyped_storage().nbytes() == 0:
            return f"a tensor {tuple(value.shape)} without memory"  # that was given back, and must not be read
        if value.numel() == 1 and value.device.type != "meta":
            return repr(value.item())
        if value.nbytes > _LARGE or value.device.type == "meta":
            return f"a tensor {tuple(value.shape)}, written to {value._version} times"
        # of a copy: a tensor that was seen by NumPy cannot be resized any more, and FSDP2 resizes what it gathers
        raw = value.detach().clone().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        return f"a tensor {tuple(value.shape)} ({_hash(raw)})"
    if isinstance(value, np.ndarray | np.generic):
        if value.size == 1 and value.dtype.kind in "biufc":
            return repr(value.item())
        if value.dtype.hasobject:
            return f"an array {value.shape}"
        flat = np.asarray(value).reshape(-1) if value.nbytes <= _LARGE or value.flags.c_contiguous else value.flat
        some = flat[:: max(1, value.nbytes // _LARGE)] if value.nbytes > _LARGE else flat
        return f"an array {value.shape} ({_hash(np.ascontiguousarray(some).tobytes())})"
    if isinstance(value, torch.Generator):
        return f"a torch.Generator in state {_hash(value.get_state().numpy())}"
    if isinstance(value, np.random.Generator):
        return f"a numpy Generator in state {_hash(repr(value.bit_generator.state).encode())}"
    if isinstance(value, np.random.RandomState):
        return f"a numpy RandomState in state {_hash(repr(value.get_state(legacy=False)).encode())}"
    if isinstance(value, random.Random):
        return f"a random.Random in state {_hash(repr(value.getstate()).encode())}"
    if isinstance(value, bytearray | array.array):
        return f"{a_kind(value)} of {len(value)} ({_hash(bytes(value[:_LARGE]))})"
    if isinstance(value, itertools.count):
        return repr(value)
    if isinstance(value, _ITERATORS):
        return _iterator(value)
    if isinstance(value, set | frozenset | list | tuple | dict | deque):
        return _container(value)
    return None


def _container(value: Any) -> str | None:
    """Return a set, or a container of many, in words; None for one whose entries are looked at one by one."""
    unordered = isinstance(value, set | frozenset)
    if not unordered and len(value) <= _MOST:
        return None
    name = f"{a_kind(value)} of {len(value)}"
    if unordered and len(value) > _SAMPLED:
        return name
    step = 1 if isinstance(value, dict | set | frozenset | deque) else -(-len(value) // _SAMPLED)
    some = list(itertools.islice(value.items() if isinstance(value, dict) else value, 0, step * _SAMPLED, step))
    texts = [repr(each) for each in some if isinstance(each, (*_PLAIN, tuple))]
    # the words of anything else may hold its address, which is another in each process
    if len(texts) < len(some) or any(" at 0x" in text for text in texts):
        return name
    return f"{name} ({_hash('|'.join(sorted(texts) if unordered else texts).encode())})"


def _iterator(value: Any) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python 3.14 will not say where an iterator of itertools is
        try:
            return f"{a_kind(value)} at {_position(value)}"
        except (TypeError, AttributeError):
            return f"{a_kind(value)} with {operator.length_hint(value, -1)} left"


def _position(value: Any, depth: int = 0) -> Any:
    """Return the numbers that say where an iterator, and those that it is made of, have come to."""
    if isinstance(value, int):
        return value
    if isinstance(value, (*_ITERATORS, tuple)) and depth < _DEPTH:
        parts = value if isinstance(value, tuple) else value.__reduce__()[1:]
        return [place for part in parts if (place := _position(part, depth + 1)) not in (None, [])]
    return len(value) if isinstance(value, list) else None


def _hash(raw: Any) -> str:
    return xxhash.xxh3_64_hexdigest(raw)[:8]
