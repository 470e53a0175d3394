"""Arrays that a person gives in Python as a data set: `data=(X, y)`, or such a pair for each split."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distrain.config import UserError
from distrain.datasets.base import AnySource, Data, DataMeta, DataRequest, TensorSource, split_indices
from distrain.datasets.labels import NUMBERED, TOKEN_TASKS
from distrain.system.errors import some
from distrain.system.numbers import a_kind

Arrays = Any
"""A tensor (n, ...), what NumPy makes an array of, or a dict of such."""


class ArrayData:
    """The data set of `(inputs, targets)` for each split; a single one, `train`, is cut by data.split.

    Floats become the recipe's dtype, and targets int64 for classes and tokens. The number of classes of a
    classification is the greatest target and one.
    """

    def __init__(self, splits: Mapping[str, tuple[Arrays, Arrays]]):
        self.splits = dict(splits)

    def __call__(self, request: DataRequest, **args: Any) -> Data:
        """Build it; raises UserError."""
        if args or request.section.path is not None:
            key = next(iter(args), "path")
            raise UserError(f"data.{key}: {request.section.name} is arrays, which take no arguments; remove it")
        return self.build(request)

    def build(self, request: DataRequest) -> Data:
        """Build it; raises UserError."""
        name, section = request.section.name, request.section
        tensors = {split: self._tensors(split, pair, request) for split, pair in self.splits.items()}
        meta = _meta(tensors, request)
        if list(tensors) == ["train"]:
            inputs, targets = tensors["train"]
            whole = TensorSource(inputs, targets)
            cut = split_indices(len(whole), section, request.seed, targets.numpy() if targets.dim() == 1 else None)
            splits: dict[str, AnySource] = {split: whole.select(indices) for split, indices in cut.items()}
        elif section.split is not None:
            raise UserError(f"data.split: {name} gives its splits itself, and cannot be cut; remove data.split")
        else:
            splits = {split: TensorSource(*pair) for split, pair in tensors.items()}
        for split, source in splits.items():
            assert isinstance(source, TensorSource)
            assert source.targets is not None
            known = meta.num_classes if request.task not in TOKEN_TASKS else None
            if (found := request.labels(split, known).problem(source.targets)) is not None:
                raise UserError(f"{name}: sample {found[0]} of {split}: {found[1]}; correct or remove it")
        state: dict[str, Any] = {} if meta.num_classes is None else {"num_classes": meta.num_classes}
        known_columns = (request.state or {}).get("columns", columns_of(self.splits["train"][0]))
        for split, (table, _) in self.splits.items():
            check_columns(table, known_columns, f"{name}: the {split} split")
        if known_columns is not None:
            state["columns"] = known_columns
        return Data(splits, meta, state, warnings=_from_one(tensors, meta, name) if request.state is None else ())

    def _tensors(self, split: str, pair: tuple[Arrays, Arrays], request: DataRequest) -> tuple[Any, Tensor]:
        where = f"{request.section.name}: the {split} split"
        _check_index(*pair, where)
        inputs = input_tensors(pair[0], request.dtype, where)
        targets = _tensor(pair[1], f"{where}'s targets")
        if request.task in NUMBERED:
            if targets.is_floating_point():
                raise UserError(f"{where} has targets of {targets.dtype}; task {request.task} expects whole numbers")
            targets = targets.to(torch.int64)
        elif request.task != "custom" or targets.is_floating_point():
            targets = targets.to(request.dtype)
        first = next(iter(inputs.values())) if isinstance(inputs, Mapping) else inputs
        if len(first) != len(targets):
            raise UserError(f"{where} has {len(first):,} inputs and {len(targets):,} targets; expected as many")
        return inputs, targets


def _check_index(inputs: Any, targets: Any, where: str) -> None:
    """Raise UserError for tables whose rows have the same names in another order: they are paired by place."""
    one: Any = getattr(inputs, "index", None)
    other: Any = getattr(targets, "index", None)
    if not (hasattr(one, "difference") and hasattr(other, "difference") and len(one) == len(other)):
        return
    if not one.equals(other) and not len(one.difference(other, sort=False)):
        raise UserError(
            f"{where} has inputs and targets with the same index in another order, and rows are paired by their place; "
            "give targets as targets.loc[inputs.index], or both with reset_index(drop=True)"
        )


def columns_of(inputs: Any) -> list[str] | None:
    """Return the names of a table's columns; None for arrays, and where they are only counted."""
    names = getattr(inputs, "columns", None)
    if names is None or not hasattr(inputs, "shape"):
        return None
    found = [str(name) for name in names]
    return None if found == [str(number) for number in range(len(found))] else found


def check_columns(inputs: Any, expected: Sequence[str] | None, where: str) -> None:
    """Raise UserError for a table whose columns are not those of the training, in their order: they go by place."""
    found = columns_of(inputs)
    if expected is None or found is None or found == list(expected):
        return
    here, there = ([each for each in one if each not in other] for one, other in ((found, expected), (expected, found)))
    odd = [f"has {some(here)}"] * bool(here) + [f"lacks {some(there)}"] * bool(there) or ["has them in another order"]
    raise UserError(
        f"{where} {' and '.join(odd)}: the columns of the training are {some(expected, 8)}, and a model knows them by "
        "their place; give table[[...]] with these names in this order"
    )


def is_arrays(value: Any) -> bool:
    """Whether a value is `(inputs, targets)` as tensors, arrays or tables."""
    if not (isinstance(value, tuple) and len(value) == 2):
        return False
    inputs = list(value[0].values()) if isinstance(value[0], Mapping) and value[0] else [value[0]]
    return all(hasattr(each, "shape") and len(each.shape) > 0 for each in (*inputs, value[1]))


def input_tensors(inputs: Arrays, dtype: torch.dtype, where: str) -> Any:
    """Return inputs as tensors, or a dict of them, floats in `dtype`; raises UserError, naming `where`."""
    if isinstance(inputs, Mapping):
        tensors = {str(key): input_tensors(value, dtype, f"{where}'s {key!r}") for key, value in inputs.items()}
        if not tensors or len({len(each) for each in tensors.values()}) > 1:
            lengths = ", ".join(f"{key} {len(each):,}" for key, each in tensors.items()) or "nothing"
            raise UserError(f"{where} has inputs of different lengths: {lengths}; expected as many of each")
        return tensors
    tensor = _tensor(inputs, f"{where}'s inputs")
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def for_torch(array: np.ndarray) -> np.ndarray:
    """Return an array in this machine's byte order and without steps backwards, of which torch makes no tensor."""
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    return np.ascontiguousarray(array) if any(step < 0 for step in array.strides) else array


def _text_in(value: Any) -> str | None:
    """Return the first text of what becomes no tensor, or None."""
    with suppress(ValueError, TypeError):  # of rows of several lengths
        array = np.asarray(value)
        return next((str(each) for each in array.flat if isinstance(each, str)), None)
    return None


def _tensor(value: Any, what: str) -> Tensor:
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        raise UserError(f"{what} are a masked array, and some of its values are masked; fill them, or leave them out")
    try:
        if isinstance(value, Tensor):
            tensor = value.detach().cpu()
            tensor = tensor if tensor.layout == torch.strided else tensor.to_dense()
        else:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*not writable")  # nothing here writes to it
                tensor = torch.as_tensor(for_torch(np.asarray(value)))
    except (TypeError, ValueError) as error:
        if (text := _text_in(value)) is not None:
            raise UserError(
                f"{what} are texts, such as {text!r}; expected numbers. Of labels: classes, targets = "
                "numpy.unique(labels, return_inverse=True)"
            ) from error
        raise UserError(f"{what} are {a_kind(value)} that becomes no tensor: {error}") from error
    if tensor.dim() == 0:
        raise UserError(f"{what} are one number; expected an array with a row for each sample")
    return tensor


def _from_one(tensors: Mapping[str, tuple[Any, Tensor]], meta: DataMeta, name: str) -> tuple[str, ...]:
    """Return a warning where classes are numbered from 1 on, so that one more is trained."""
    if meta.num_classes is None or any(bool((targets == 0).any()) for _, targets in tensors.values()):
        return ()
    return (
        f"{name}: no target is 0, and classes count from 0, so the model has {meta.num_classes} outputs, the first of "
        "them for nothing; subtract the least target from all of them",
    )


def _meta(tensors: Mapping[str, tuple[Any, Tensor]], request: DataRequest) -> DataMeta:
    inputs, targets = tensors["train"]
    has_shape = isinstance(inputs, Tensor) and (inputs.is_floating_point() or inputs.dim() > 3)
    classes = None
    if request.task in NUMBERED and request.task not in TOKEN_TASKS:
        ignored = request.labels("train", None).ignored
        every = [each if ignored is None else each[each != ignored] for _, each in tensors.values()]
        every = [each for each in every if each.numel()]
        counted = max(int(each.max()) for each in every) + 1 if every else None
        classes = counted if request.state is None else request.state.get("num_classes", counted)
    several = request.task in ("regression", "multilabel")
    return DataMeta(
        input_shape=tuple(inputs.shape[1:]) if has_shape else None,
        num_classes=classes,
        num_targets=(targets.shape[1] if targets.dim() > 1 else 1) if several else None,
    )
