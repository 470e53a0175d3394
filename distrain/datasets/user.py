"""User data: a Dataset or an iterable, named in the recipe as `path/to/file.py:name`."""

from __future__ import annotations

import inspect
import itertools
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from distrain.config import DataSection, FoldSplit, Form, Recipe, UserError, close_names, mix
from distrain.config.arguments import argument_problems, named_parameters, takes
from distrain.config.registry import Entry, tasks
from distrain.config.tasks import FORMS
from distrain.datasets.arrays import ArrayData, input_tensors, is_arrays
from distrain.datasets.base import (
    AnySource,
    Batch,
    CorruptSample,
    Data,
    DataMeta,
    DataRequest,
    Source,
    TensorSource,
    find_dataset,
    split_indices,
)
from distrain.datasets.randomness import isolated_randomness, seed_globally, stream_of
from distrain.datasets.user_items import (
    FILLED_ANEW,
    ITEM,
    ItemForm,
    collate,
    pair_of,
    share_memory,
    with_own_memory,
)
from distrain.system.numbers import a_kind
from distrain.system.output import error_line

_SPLITS = ("train", "valid", "test")
_SEEDS = 256  # items of a stream whose seeds are computed at a time


def named_data(request: DataRequest) -> Data:
    """Build the recipe's data set; raises UserError."""
    entry = find_dataset(request.section, request.task)
    if entry.registered or isinstance(entry.value, ArrayData):
        if request.task == "custom" and entry.tasks:
            request = replace(request, task=_only_form(entry))
        data: Data = entry.value(request, **request.section.args)
        return data
    return user_data(request, entry.value)


def own_collate(recipe: Recipe) -> Callable[[list[Any]], Any] | None:
    """Return the method `collate` of a task of one's own, where it has one."""
    if recipe.task.name in FORMS:
        return None
    kind = tasks.find(recipe.task.name).value
    if getattr(kind, "collate", None) is None:
        return None
    task = kind(**recipe.task.args)
    task._step = None
    return task.collate


def _only_form(entry: Entry[Any]) -> Form:
    """Return what the targets of a data set are; raises UserError where the task has to say that."""
    if len(entry.tasks) > 1:
        raise UserError(
            f"data.name: data set {entry.name!r} has targets of several forms; give the task's class a form, as in "
            f"`form = {entry.tasks[0]!r}`: {', '.join(entry.tasks)}"
        )
    form: Any = entry.tasks[0]
    only: Form = form
    return only


def user_data(request: DataRequest, made: Any) -> Data:
    """Build the data set of the user's class or function `made`, which is called with the section's further keys.

    It also gets `path` and `split` if it takes these; `split` is "train" and "test", or the names in data.split if that
    is {train: ..., test: ...}. Otherwise it returns one data set, to be cut by data.split, or a dict of them by split.
    A data set is

    - a Dataset: `__len__` and `__getitem__(index)`, which returns (inputs, targets) or {"inputs": ..., "targets": ...};
    - a tuple (inputs, targets) of tensors, arrays or tables with a row for each sample;
    - either with graphs of PyTorch Geometric as inputs, or as items, whose targets are then their `y`;
    - an iterable of such items: a stream, read in its own order. `set_epoch(int)`, if present, is called before a pass.

    Python's, NumPy's and PyTorch's global generators are seeded from the seed before `made` is called, the same for
    each split, and from (seed, epoch, sample) before each item: what shuffles by them is the same on every rank.

    Inputs and targets are tensors, arrays, numbers, PIL images, or dicts and tuples of these; of a sample of three or
    more the last is the targets. Sequences of different lengths are padded: see `_padding`. A task of one's own may
    collate samples itself. The facts for models come from an attribute `meta` (a `DataMeta`, or a dict of its fields),
    from `classes`, and from the first item. A method `read(path)`, if present, returns a Dataset of inputs for
    prediction.
    """
    splits_made = _made_splits(request, made)
    if all(is_arrays(each.dataset) for each in splits_made.values()):
        return ArrayData({split: each.dataset for split, each in splits_made.items()}).build(request)
    first = splits_made["train"]
    meta = _meta(first, request)

    def form(split: str) -> ItemForm:
        return ItemForm.of(request, meta, split, first.name)

    splits: dict[str, AnySource] = {}
    if list(splits_made) == ["train"] and not first.is_stream:
        labels = _labels(first, form("train")) if request.section.stratify else None
        for split, indices in split_indices(len(first.dataset), request.section, request.seed, labels).items():
            splits[split] = UserSource(first, form(split), mix(request.seed, split), indices)
    else:
        if isinstance(request.section.split, list | FoldSplit):
            found = "is a stream" if first.is_stream else "gives its splits itself"
            raise UserError(f"data.split: {request.section.name} {found}, and cannot be cut; remove data.split")
        splits = {
            split: (UserStream if each.is_stream else UserSource)(each, form(split), mix(request.seed, split))
            for split, each in splits_made.items()
        }

    def read(path: Path) -> Source:
        inputs = _Made(f"{first.name}.read", lambda: first.dataset.read(path), request.seed)
        if inputs.is_stream:
            raise UserError(f"{inputs.name} returned a stream, expected a Dataset with __len__ and __getitem__")
        return UserSource(inputs, form("read"), mix(request.seed, "read"))

    encode, chat = (getattr(first.dataset, name, None) for name in ("encode", "chat"))
    return Data(splits, meta, {}, read if hasattr(first.dataset, "read") else None, encode=encode, chat=chat)


def source_of(request: DataRequest, inputs: Any) -> Source:
    """Return arrays, or a Dataset, of inputs for prediction; raises UserError."""
    if isinstance(inputs, Mapping | Sequence | np.ndarray | torch.Tensor) or hasattr(inputs, "iloc"):
        return TensorSource(input_tensors(inputs, request.dtype, "predict"), None)
    made = _Made("predict", lambda: inputs, request.seed)
    if made.is_stream:
        raise UserError(f"predict: found {a_kind(inputs)}; expected arrays, or a Dataset with a length")
    meta = getattr(inputs, "meta", None)
    form = ItemForm.of(request, meta if isinstance(meta, DataMeta) else DataMeta(), "read", made.name)
    return UserSource(made, form, mix(request.seed, "read"))


def is_users(source: AnySource) -> bool:
    """Whether a split is read from a data set of the user's code, item by item."""
    return isinstance(source, UserSource | UserStream)


# --------------------------------------------------------------------------------------------------------------------
# The user's objects


class _Made:
    """A data set of the user's code, and the function that makes it again."""

    def __init__(self, name: str, make: Callable[[], Any], seed: int):
        self.name = name
        self.make = make
        self._walk: Any = None
        with _seeded(seed):
            self.dataset = make()
        listed = hasattr(self.dataset, "__len__") and hasattr(self.dataset, "__getitem__")
        if isinstance(self.dataset, DataLoader):
            raise UserError(
                f"{name} is a DataLoader, whose items are batches, in an order of its own; give its data set "
                "(loader.dataset): distrain makes batches (batch.global), shuffles and reads ahead (data.workers)"
            )
        self.is_stream = isinstance(self.dataset, IterableDataset) or not listed
        if self.is_stream and not hasattr(self.dataset, "__iter__"):
            raise UserError(
                f"{name} returned {a_kind(self.dataset)}, expected a Dataset with __len__ and __getitem__, or "
                "an iterable"
            )

    def walk(self) -> Iterator[Any]:
        """Start a pass over a stream. A pass exhausts a generator, so it is made again."""
        walk = iter(self.make() if isinstance(self.dataset, Iterator) else self.dataset)
        if walk is self._walk:
            raise UserError(f"{self.name}: __iter__ gave one iterator twice, read in part already; give a new one")
        self._walk = walk
        return walk


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed what the user's code may shuffle by: a data set has one order, on every rank and after a resume."""
    with isolated_randomness():
        seed_globally(mix(seed, "data"))
        yield


def _made_splits(request: DataRequest, made: Any) -> dict[str, _Made]:
    """Return the user's data sets by split; only `train` for a single one."""
    spec, wanted, seed = request.section.name, request.section.split, request.seed
    call, takes_split = _factory(request, made)
    if takes_split:
        names = wanted if isinstance(wanted, dict) else {"train": "train", "test": "test"}
        return {split: _Made(spec, lambda name=name: call(split=name), seed) for split, name in names.items()}  # type: ignore[misc]
    if isinstance(wanted, dict):
        raise UserError(f"data.split: {spec} takes no argument 'split' for {', '.join(wanted.values())}; add one")
    with _seeded(seed):
        made_data = call()
    if not isinstance(made_data, Mapping):
        return {"train": _Made(spec, _first_then(made_data, call), seed)}
    if "train" not in made_data or not set(made_data) <= set(_SPLITS):
        raise UserError(
            f"{spec} returned a dict of {', '.join(map(str, made_data))}, expected train, and maybe valid and test"
        )
    return {
        split: _Made(spec, _first_then(made_data[split], lambda split=split: call()[split]), seed)  # type: ignore[misc]
        for split in _SPLITS
        if split in made_data
    }


def _first_then(first: Any, make: Callable[[], Any]) -> Callable[[], Any]:
    """Return a function that returns `first` at its first call and calls `make` later."""
    ready = [first]
    return lambda: ready.pop() if ready else make()


def _factory(request: DataRequest, made: Any) -> tuple[Callable[..., Any], bool]:
    """Return the user's function with the recipe's checked arguments, and whether it takes `split`."""
    spec, args = request.section.name, request.section.args
    if not callable(made):
        raise UserError(f"{spec} is {a_kind(made)}; expected a class, or a function that returns a data set")
    problems = argument_problems(
        made, args, "data", spec, filled=("path", "split"), section_keys=DataSection.model_fields
    )
    named, _ = named_parameters(made)
    if request.section.path is not None:
        if takes(made, "path"):
            args["path"] = str(request.base / request.section.path)
        else:
            problems.append(f"data.path: {spec} takes no argument 'path'; add one, or remove data.path")
    elif "path" in named and named["path"].default is inspect.Parameter.empty:
        problems.append(f"data.path: {spec} needs it, and it was not given")
    if problems:
        raise UserError("\n".join(problems))

    def call(**more: Any) -> Any:
        try:
            return made(**args, **more)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{spec} failed: {_error_text(error)}") from error

    return call, "split" in named


def _error_text(error: Exception) -> str:
    """Return the error and the line of the user's code that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if frame.filename != __file__] or list(frames)
    return f"{error_line(error)} ({theirs[0].filename}:{theirs[0].lineno})"


def _labels(made: _Made, form: ItemForm) -> np.ndarray:
    """Return the class of every sample: from the Dataset's `targets`, or from its items one by one."""
    listed = getattr(made.dataset, "targets", None)
    if listed is None:
        source = UserSource(made, form, 0)
        listed = [source.fetch(np.array([number]))["targets"].item() for number in range(len(source))]
    return np.asarray(listed)


def _meta(made: _Made, request: DataRequest) -> DataMeta:
    """Return the facts of the data set's `meta`, completed from its `classes` and first item."""
    task = request.task
    given = getattr(made.dataset, "meta", None)
    if isinstance(given, Mapping):
        known = [each.name for each in fields(DataMeta)]
        if unknown := [key for key in given if key not in known]:
            raise UserError(f"{made.name}: meta has an unknown key {unknown[0]!r}{close_names(str(unknown[0]), known)}")
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in given.items()
        }
        given = DataMeta(**values)
    meta = given if isinstance(given, DataMeta) else DataMeta()
    padding = meta.padding or {}
    if not (isinstance(padding, Mapping) and all(isinstance(each, int | float) for each in padding.values())):
        raise UserError(f"{made.name}: meta's padding is {padding!r}; expected a dict of a number for each key")
    classes = meta.class_names if meta.class_names is not None else getattr(made.dataset, "classes", None)
    if classes is not None:
        meta = replace(meta, class_names=_class_names(made.name, classes))
    if meta.num_classes is None and meta.class_names is not None:
        meta = replace(meta, num_classes=len(meta.class_names))
    form = ItemForm.of(request, meta, "train", made.name)
    if made.is_stream:
        stream = UserStream(made, form, 0)
        items = list(itertools.islice(stream, 1))
        batch = stream.collate(items) if items else None
    else:
        batch = UserSource(made, form, 0).fetch(np.zeros(1, np.int64)) if len(made.dataset) else None
    if batch is None:
        raise UserError(f"{made.name}: the training {'stream' if made.is_stream else 'split'} has no samples")
    inputs, targets = batch["inputs"], batch.get("targets")
    if targets is None and task != "custom":
        raise UserError(f"{made.name}: the first item has inputs and no targets; expected {ITEM}")
    # tokens are sequences of any length and have no fixed shape
    has_shape = isinstance(inputs, torch.Tensor) and (inputs.is_floating_point() or inputs.ndim > 3)
    if meta.input_shape is None and has_shape:
        meta = replace(meta, input_shape=tuple(inputs.shape[1:]))
    if meta.num_targets is None and task in ("regression", "multilabel") and isinstance(targets, torch.Tensor):
        meta = replace(meta, num_targets=targets.shape[1] if targets.ndim > 1 else 1)
    return meta


def _class_names(where: str, classes: Any) -> tuple[str, ...]:
    """Return the name of each class in the order of their numbers; raises UserError where that order is unknown.

    `classes`: a sequence, or a dict from names to numbers or from numbers to names. A name that several classes have is
    followed by the class's number, as columns of predictions have these names.
    """
    names = classes
    if isinstance(classes, Mapping):
        by_number = {v: k for k, v in classes.items()} if all(isinstance(k, str) for k in classes) else classes
        if sorted(map(str, by_number)) != sorted(map(str, range(len(classes)))):
            raise UserError(
                f"{where}: classes is a dict, and gives no number from 0 to {len(classes) - 1} to each name"
            )
        names = [by_number[number] for number in range(len(classes))]
    elif isinstance(classes, str | set | frozenset) or not hasattr(classes, "__iter__"):
        raise UserError(
            f"{where}: classes is {a_kind(classes)}; expected a list of the classes' names, in the order of "
            "their numbers"
        )
    names = list(map(str, names))
    counts = Counter(names)
    return tuple(f"{name} ({at})" if counts[name] > 1 else name for at, name in enumerate(names))


# --------------------------------------------------------------------------------------------------------------------
# Sources


class UserSource:
    """A Dataset of the user, or its items `indices`, read one by one."""

    def __init__(self, made: _Made, form: ItemForm, seed: int, indices: np.ndarray | None = None):
        self.made, self.form, self.seed, self.indices = made, form, seed, indices
        self.is_whole = form.own is not None
        self._copies: bool | None = None
        """Whether items share memory, and are copied as they are read; None: not known yet."""

    def __len__(self) -> int:
        return len(self.made.dataset) if self.indices is None else len(self.indices)

    def fetch(self, ids: np.ndarray) -> Batch:
        return self.fetch_at(ids, np.zeros_like(ids))

    def fetch_at(self, ids: np.ndarray, epochs: np.ndarray) -> Batch:
        """Return the samples `ids` as in `epochs`, both (batch,) int64: a Dataset may augment them in each epoch."""
        numbers = ids if self.indices is None else self.indices[ids]
        items = self._read(ids, numbers, epochs)
        if not self._copies:
            different = list(dict(zip(numbers.tolist(), items, strict=True)).values())[:FILLED_ANEW]
            if self._copies is None:  # also where each batch is of one item, which a task's own collate may keep
                different += self._others(ids, FILLED_ANEW - len(different))
            if share := share_memory(different):
                items = self._read(ids, numbers, epochs, copies=True)  # these hold what was read last
            self._copies = share
        own, name = self.form.own, self.made.name
        samples = [
            (item,) if own else pair_of(item, f"{name}: item {number}")
            for item, number in zip(items, numbers.tolist(), strict=True)
        ]
        with _seeded(int(stream_of(self.seed, epochs[0], ids[0], len(ids))[0])) if own else nullcontext():
            batch = collate(samples, self.form, lambda row: f"item {numbers[row]}, sample {ids[row]} of its split")
        return {**batch, "ids": torch.from_numpy(ids)}

    def _others(self, ids: np.ndarray, count: int) -> list[Any]:
        """Return up to `count` items that are none of `ids`; without those that cannot be read."""
        found: list[Any] = []
        for sample in np.setdiff1d(np.arange(min(len(self), len(ids) + max(count, 0))), ids)[: max(count, 0)]:
            with suppress(UserError):
                which = np.array([sample])
                found += self._read(which, which if self.indices is None else self.indices[which], np.zeros_like(which))
        return found

    def _read(
        self, ids: np.ndarray, numbers: np.ndarray, epochs: np.ndarray, *, copies: bool | None = None
    ) -> list[Any]:
        copies = self._copies if copies is None else copies
        items = []
        with isolated_randomness():
            seeds = stream_of(self.seed, epochs, ids).tolist()
            for sample, number, seed in zip(ids.tolist(), numbers.tolist(), seeds, strict=True):
                seed_globally(seed)
                try:
                    item = self.made.dataset[number]
                except Exception as error:
                    text = f"{self.made.name}: item {number} cannot be read: {_error_text(error)}"
                    raise (CorruptSample(sample, text) if CorruptSample.is_why(error) else UserError(text)) from error
                items.append(with_own_memory(item) if copies else item)
        return items


class UserStream:
    """An iterable of the user."""

    def __init__(self, made: _Made, form: ItemForm, seed: int):
        self.made = made
        self.form = form
        self.seed = seed
        self.is_whole = form.own is not None
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        if hasattr(self.made.dataset, "set_epoch"):
            self.made.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        """Yield (inputs, targets or None, number) of each item; (item, number) where the task collates them.

        The global generators are seeded before each item, and left as that has them: a step seeds torch's itself, and
        to put all back would cost ten times as much.
        """
        number, epoch = 0, self._epoch
        held: list[Any] = []
        copies = True
        try:
            seed_globally(int(stream_of(self.seed, epoch)[0]))
            walk = self.made.walk()
            while True:
                if number % _SEEDS == 0:
                    seeds = stream_of(self.seed, epoch, np.arange(number, number + _SEEDS)).tolist()
                seed_globally(seeds[number % _SEEDS])
                try:
                    item = next(walk)
                except StopIteration:
                    return
                if number < FILLED_ANEW:  # held until then, so that the places of their memory are taken
                    held.append(item)
                if number == FILLED_ANEW - 1:
                    copies = share_memory(held)
                    held.clear()
                item = with_own_memory(item) if copies else item
                where = f"{self.made.name}: item {number} of the stream"
                yield *((item,) if self.form.own else pair_of(item, where)), number
                number += 1
        except UserError:
            raise
        except Exception as error:
            where = f"{self.made.name}: item {number} of the stream"
            raise UserError(f"{where} cannot be read: {_error_text(error)}") from error

    def collate(self, samples: list[tuple[Any, ...]]) -> Batch:
        return collate(samples, self.form, lambda row: f"item {samples[row][-1]} of the stream")
