"""What is given in Python instead of names: classes, functions, models, data, losses, metrics, callbacks.

What can be imported is written into the recipe as `package.module:NAME` or `path/to/file.py:NAME`, so that any process
can resume, evaluate and load the run. Anything else becomes `object.KEY:NAME`: `distrain.config.user_files` has it in
this process, and where it can be pickled in those that this one starts.
"""

from __future__ import annotations

import ast
import copy
import dis
import functools
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from distrain.config import Duration, Recipe, UserError, registry
from distrain.config.user_files import Given, file_of, given_key, given_objects
from distrain.fingerprints import named_objects, user_module
from distrain.system.numbers import a_kind

KEYS = ("task", "model", "data", "loss", "metrics", "callbacks", "optim", "schedule")
"""What may be an object of this process, as train and load call it."""
LISTS = ("metrics", "callbacks")
_TABLES: dict[str, registry.Registry[Any]] = {
    "task": registry.tasks,
    "model": registry.models,
    "data": registry.datasets,
    "loss": registry.losses,
    "metrics": registry.metrics,
    "callbacks": registry.callbacks,
    "optim": registry.optimizers,
    "schedule": registry.schedules,
    "trackers": registry.trackers,
}
_FUNCTIONAL = {"binary_cross_entropy": "bce", "binary_cross_entropy_with_logits": "bce_with_logits"}
_SPLITS = {"train": "train", "valid": "valid", "eval": "valid", "test": "test"}
_DATA_FORMS = (
    "a Dataset, (inputs, targets) as arrays, a dict or tuple of these by split, a function that makes one, or a name"
)


class Returns:
    """Called without arguments, returns an object: a data set, a callback."""

    def __init__(self, value: Any):
        self.value = value

    def __call__(self) -> Any:
        return self.value


class Copies:
    """Called without arguments, returns a copy of a model: a run trains the copy, and the next starts as this did."""

    def __init__(self, value: Any):
        self.value = value

    def __call__(self) -> Any:
        return copy.deepcopy(self.value)


class Objects:
    """The objects of one run, each with its place in the recipe."""

    def __init__(self, given: Mapping[str, Given] | None = None):
        self.given: dict[str, Given] = dict(given or {})
        """By spec: those that only this process has, and those of the script that runs, which is not imported again."""

    def component(self, key: str, value: Any) -> Any:
        """Return what a recipe holds for a component: a name, or a mapping of `name` and arguments."""
        if isinstance(value, str):
            return value
        if isinstance(value, Mapping) and ("name" in value or key != "data" or not set(value) & set(_SPLITS)):
            if "name" not in value:
                return plain(value, key)
            named = self.component(key, value["name"])
            rest = {str(name): plain(each, f"{key}.{name}") for name, each in value.items() if name != "name"}
            return {**(named if isinstance(named, dict) else {"name": named}), **rest}
        if key == "loss" and (known := _loss_of_torch(value)) is not None:
            return known
        if (name := self._built_in(key, value)) is not None:
            return name
        if isinstance(value, functools.partial) and not value.args and (spec := self._spec(value.func)) is not None:
            return {"name": spec, **{name: plain(each, f"{key}.{name}") for name, each in value.keywords.items()}}
        if (spec := self._spec(value)) is not None:
            return spec
        if key not in KEYS:
            raise UserError(f"{key}: {value!r} cannot be imported; define it in a file, as path/to/file.py:NAME")
        name, given = as_given(key, value)
        base, number = name, 1
        while f"object.{key}:{name}" in self.given:
            number += 1
            name = f"{base}_{number}"
        self.given[f"object.{key}:{name}"] = given
        return f"object.{key}:{name}"

    def fill(self, recipe: Recipe, passed: Mapping[str, Any]) -> None:
        """Take up what is `passed` for the `object.KEY:NAME` of a run's recipe, by key; raises UserError where not."""
        wanted: dict[str, list[str]] = {}
        for spec in named_objects(recipe.model_dump(mode="json")):
            if (key := given_key(spec)) is not None:
                wanted.setdefault(key, []).append(spec)
        for key, value in passed.items():
            values = list(value) if key in LISTS else [value]
            specs = wanted.get(key, [])
            if len(values) != len(specs):
                has = ", ".join(specs) if specs else f"no {key} of a Python process"
                raise UserError(f"{key}: found {len(values)} to pass; the recipe of the run has {has}")
            for spec, each in zip(specs, values, strict=True):
                self.given[spec] = as_given(key, each)[1]

    def handed_over(self) -> dict[str, Given]:
        """Return those that other processes cannot import."""
        return {spec: given for spec, given in self.given.items() if given_key(spec) is not None}

    def here(self) -> Any:
        """Return the context in which this process resolves them."""
        return given_objects(self.given)

    def _built_in(self, key: str, value: Any) -> str | None:
        """Return the name of what distrain knows by one, as a class of torch.optim or a function of torchvision."""
        name = getattr(value, "__name__", None)
        if name is None or str(getattr(value, "__module__", "")).partition(".")[0] not in ("torch", "torchvision"):
            return None
        entry = _TABLES[key].built_in(name)
        return entry.name if entry is not None and entry.value is value else None

    def _spec(self, value: Any) -> str | None:
        """Return the spec of a class or function that other processes can import; None for anything else."""
        module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
        if not module or not name or not callable(value) or _attribute(sys.modules.get(module), name) is not value:
            return None
        if module == "__main__":
            where = _importable_main()
            if where is not None:
                self.given[f"{where}:{name}"] = Given(value)  # imported, the script would be another module
            return None if where is None else f"{where}:{name}"
        file = file_of(module) or (user_module(module) if "." not in module else None)
        if file is not None and file.suffix == ".py":
            return f"{file}:{name}"
        try:
            known = importlib.util.find_spec(module) is not None
        except (ImportError, ValueError, AttributeError):
            known = False
        return f"{module}:{name}" if known else None


def _attribute(module: Any, name: str) -> Any:
    try:
        return functools.reduce(getattr, name.split("."), module)
    except AttributeError:  # of a function in a function too: `f.<locals>.g`
        return None


def _importable_main() -> str | None:
    """Return what the running script is imported as; None for a notebook, and for a script that would run again."""
    main = sys.modules["__main__"]
    file, spec = getattr(main, "__file__", None), getattr(main, "__spec__", None)
    if file is None or not str(file).endswith(".py") or not os.path.isfile(file):
        return None
    try:
        tree = ast.parse(Path(file).read_bytes())
    except (OSError, SyntaxError, ValueError):
        return None
    guards = (node.test for node in tree.body if isinstance(node, ast.If))
    if not any(isinstance(node, ast.Name) and node.id == "__name__" for guard in guards for node in ast.walk(guard)):
        return None
    module = getattr(spec, "name", None)
    return os.path.abspath(file) if module is None else str(module)


# --------------------------------------------------------------------------------------------------------------------
# Objects that cannot be imported


def as_given(key: str, value: Any) -> tuple[str, Given]:
    """Return the name of an object and what a recipe's section gets of it. Raises UserError for what it cannot be."""
    if key == "model":
        from torch import nn

        if isinstance(value, nn.Module):
            texts = {**sources_of(*{type(each) for each in value.modules()}), "the structure": repr(value)}
            return _name_of(value), Given(Copies(value), texts)
    if key == "data":
        return _data(value)
    if key == "task" and not inspect.isclass(value):
        raise UserError(f"task: found {value!r}; give its class, and arguments beside it, as {{'name': MyTask, ...}}")
    if key == "callbacks" and not inspect.isclass(value) and not inspect.isroutine(value):
        return _name_of(value), Given(Returns(value), sources_of(type(value)))
    if key == "metrics" and any(each.__module__.startswith("torchmetrics.") for each in type(value).__mro__[:-1]):
        raise UserError(
            f"metrics: found an object of {type(value).__name__}; give the class, and its arguments beside it, as "
            f"{{'name': torchmetrics.{type(value).__name__}, ...}}"
        )
    if not callable(value):
        raise UserError(f"{key}: found {a_kind(value)}; expected a class, a function or a name")
    if key == "loss":
        from torch import nn

        value = copy.deepcopy(value) if isinstance(value, nn.Module) else value  # the next run starts as this did
    whole = inspect.isclass(value) or inspect.isroutine(value) or isinstance(value, functools.partial)
    return _name_of(value), Given(
        value, {**sources_of(value if whole else type(value)), **(values_of(value) if key != "callbacks" else {})}
    )


def _name_of(value: Any) -> str:
    value = value.func if isinstance(value, functools.partial) else value
    found = re.sub(r"\W", "", getattr(value, "__name__", None) or type(value).__name__)
    return found if found.isidentifier() else f"_{found}"


def _data(value: Any) -> tuple[str, Given]:
    from torch.utils.data import Dataset, TensorDataset

    from distrain.datasets.arrays import ArrayData, input_tensors

    def is_pair(part: Any) -> bool:
        if isinstance(part, TensorDataset):
            return len(part.tensors) == 2
        return isinstance(part, tuple | list) and len(part) == 2 and not any(map(is_data_set, part))

    def pair(part: Any) -> tuple[Any, Any]:
        first, second = part.tensors if isinstance(part, TensorDataset) else part
        return first, second

    def is_data_set(part: Any) -> bool:
        arrays = hasattr(part, "shape") or isinstance(part, Sequence | Mapping) or hasattr(part, "iloc")
        listed = hasattr(part, "__len__") and hasattr(part, "__getitem__")
        return isinstance(part, Dataset) or (not arrays and (listed or hasattr(part, "__iter__")))

    if inspect.isclass(value) or inspect.isroutine(value) or isinstance(value, functools.partial):
        return _name_of(value), Given(value, {**sources_of(value), **values_of(value)})
    splits: Mapping[str, Any] | None = None
    if isinstance(value, Mapping):
        unknown = sorted(set(map(str, value)) - set(_SPLITS))
        if unknown or "train" not in value:
            raise UserError(
                f"data: found a dict of {', '.join(map(str, value))}; expected train, eval (valid) and test"
            )
        splits = {_SPLITS[name]: part for name, part in value.items()}
        if len(splits) < len(value):
            raise UserError("data: found both eval and valid, which are one split; give one")
    elif isinstance(value, tuple | list) and len(value) in (2, 3):
        parts = list(value)
        if all(is_data_set(part) or (isinstance(part, tuple) and is_pair(part)) for part in parts):
            splits = dict(zip(("train", "test") if len(parts) == 2 else ("train", "valid", "test"), parts, strict=True))
    if splits is None and is_pair(value):
        return "arrays", Given(ArrayData({"train": pair(value)}))
    if splits is not None and all(is_pair(part) for part in splits.values()):
        return "arrays", Given(ArrayData({name: pair(part) for name, part in splits.items()}))
    for name, part in (splits or {"train": value}).items():
        if isinstance(part, Iterator):
            raise UserError(f"data: {name} is {a_kind(part)}, which ends once; give a function that makes it")
        if not is_data_set(part) and not is_pair(part):
            raise UserError(f"data: {name} is {a_kind(part)}; expected {_DATA_FORMS}")
    if splits is None:
        return _name_of(value), Given(Returns(value), sources_of(type(value)))
    import torch

    made: dict[str, Any] = {}
    for name, part in splits.items():
        if is_pair(part) and not isinstance(part, TensorDataset):
            tensors = [input_tensors(each, torch.get_default_dtype(), f"data: {name}") for each in part]
            part = TensorDataset(*tensors)
        made[name] = part
    return _name_of(made["train"]), Given(Returns(made), sources_of(*{type(part) for part in made.values()}))


def sources_of(*objects: Any) -> dict[str, str]:
    """Return the source text of classes, with those they are made of, and functions, by name; without libraries'."""
    found: dict[str, str] = {}
    for each in objects:
        each = each.func if isinstance(each, functools.partial) else each
        for part in each.__mro__ if inspect.isclass(each) else [each]:
            module = str(getattr(part, "__module__", ""))
            own = module == "__main__" or file_of(module) is not None or user_module(module.partition(".")[0])
            if own and (text := _source(part)):
                found[part.__qualname__.rpartition("<locals>.")[2]] = text
    return dict(sorted(found.items()))


def values_of(value: Any) -> dict[str, str]:
    """Return the numbers and words that a function or class uses besides its arguments, by name, as text.

    Its source does not tell them: arguments of a partial, values of the function around it, and of a notebook or script
    outside of it, and defaults. Without those that it sets itself, such as a count.
    """
    found: dict[str, Any] = {}
    while isinstance(value, functools.partial):
        found |= {f"argument {at}": each for at, each in enumerate(value.args)} | value.keywords
        value = value.func
    for each in vars(value).values() if inspect.isclass(value) else [value]:
        function = getattr(each, "fget", None) or getattr(each, "__func__", each)
        if inspect.isfunction(function):
            given = inspect.signature(function).parameters.values()
            found |= {one.name: one.default for one in given if one.default is not one.empty}
            with suppress(ValueError):  # what it is defined beside has no value yet
                used = inspect.getclosurevars(function)
                outside = {**used.nonlocals, **(used.globals if function.__module__ == "__main__" else {})}
                found |= {name: each for name, each in outside.items() if name not in _set_by(function)}
    plainly = {name: each for name, each in found.items() if isinstance(each, str | bytes | bool | int | float | tuple)}
    texts = {name: text for name, each in plainly.items() if " at 0x" not in (text := repr(each))}
    return {f"the value of {name}": text for name, text in sorted(texts.items())}


def _set_by(function: Any) -> set[str]:
    """Return the names outside of a function that it sets."""
    steps = dis.get_instructions(function)
    return {str(each.argval) for each in steps if each.opname in ("STORE_GLOBAL", "STORE_DEREF")}


def _source(value: Any) -> str:
    try:
        return inspect.getsource(value)
    except (OSError, TypeError):  # a class of a notebook has no file, and its methods have
        if not inspect.isclass(value):
            return ""
    texts = []
    for _, each in sorted(vars(value).items()):
        function = getattr(each, "fget", None) or getattr(each, "__func__", each)
        if inspect.isfunction(function):
            try:
                texts.append(inspect.cleandoc(inspect.getsource(function)))
            except (OSError, TypeError):
                continue
    return "\n".join(texts)


# --------------------------------------------------------------------------------------------------------------------
# Values of a recipe


def _loss_of_torch(value: Any) -> Any:
    """Return the recipe's loss for a loss of torch.nn, its object, or its function; None for anything else.

    By its name the mean is taken over all samples of a step, whatever the micro-batches, and counts what it ignores.
    """
    if inspect.isroutine(value) and value.__module__ == "torch.nn.functional":
        name = _FUNCTIONAL.get(value.__name__, value.__name__)
        return name if registry.losses.built_in(name) is not None else None
    kind = value if inspect.isclass(value) else type(value)
    entry = registry.losses.built_in(kind.__name__) if kind.__module__ == "torch.nn.modules.loss" else None
    if entry is None or entry.value is not kind:
        return None
    args: dict[str, Any] = {}
    for name, parameter in inspect.signature(kind).parameters.items() if value is not kind else ():
        if name in ("size_average", "reduce"):  # which torch has made `reduction` of
            continue
        found = getattr(value, name, parameter.default)
        if found is not parameter.default and (hasattr(found, "tolist") or found != parameter.default):
            args[name] = plain(found, f"loss.{name}")
    return {"name": entry.name, **args} if args else entry.name


def plain(value: Any, key: str) -> Any:
    """Return a value as a recipe holds it: text, numbers, lists, mappings. Raises UserError for others."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(name): plain(each, f"{key}.{name}") for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each, f"{key}.{index}") for index, each in enumerate(value)]
    if isinstance(value, Path | Duration):
        return str(value)
    tolist: Callable[[], Any] | None = getattr(value, "tolist", None)  # of NumPy's and torch's
    if tolist is not None:
        return plain(tolist(), key)
    raise UserError(f"{key}: found {a_kind(value)}; a recipe holds text, numbers, true and false, lists and mappings")
