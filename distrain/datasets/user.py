"""User data: a Dataset or an iterable, named in the recipe as `path/to/file.py:name`."""

from __future__ import annotations

import inspect
import itertools
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import IterableDataset

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
from distrain.datasets.labels import IGNORED, NUMBERED, Labels
from distrain.datasets.nested import graph_batch, is_graph
from distrain.datasets.randomness import isolated_randomness, seed_globally, stream_of
from distrain.system.compiler import without_compiler
from distrain.system.output import error_line

_ITEM = "(inputs, targets), a dict with 'inputs' and 'targets', or several inputs with the targets last"
_SPLITS = ("train", "valid", "test")
_SEEDS = 256  # items of a stream whose seeds are computed at a time
_TOKEN_KEYS = ("ids", "input_ids", "decoder_input_ids", "tokens", "source", "target")
_PLACE_KEYS = ("token_type_ids", "segment_ids", "position_ids", "decoder_position_ids")
"""Keys that describe tokens: the value at a padded token is ignored, so 0 is safe."""


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
    return kind(**recipe.task.args).collate if getattr(kind, "collate", None) is not None else None


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

    def form(split: str) -> _Form:
        return _Form.of(request, meta, split, first.name)

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
        raise UserError(f"predict: found a {type(inputs).__name__}; expected arrays, or a Dataset with a length")
    meta = getattr(inputs, "meta", None)
    form = _Form.of(request, meta if isinstance(meta, DataMeta) else DataMeta(), "read", made.name)
    return UserSource(made, form, mix(request.seed, "read"))


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
        self.is_stream = isinstance(self.dataset, IterableDataset) or not listed
        if self.is_stream and not hasattr(self.dataset, "__iter__"):
            raise UserError(
                f"{name} returned a {type(self.dataset).__name__}, expected a Dataset with __len__ and __getitem__, or "
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
        raise UserError(f"{spec} is a {type(made).__name__}; expected a class, or a function that returns a data set")
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


def _labels(made: _Made, form: _Form) -> np.ndarray:
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
    form = _Form.of(request, meta, "train", made.name)
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
        raise UserError(f"{made.name}: the first item has inputs and no targets; expected {_ITEM}")
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
            f"{where}: classes is a {type(classes).__name__}; expected a list of the classes' names, in the order of "
            "their numbers"
        )
    names = list(map(str, names))
    counts = Counter(names)
    return tuple(f"{name} ({at})" if counts[name] > 1 else name for at, name in enumerate(names))


# --------------------------------------------------------------------------------------------------------------------
# Sources


class UserSource:
    """A Dataset of the user, or its items `indices`, read one by one."""

    def __init__(self, made: _Made, form: _Form, seed: int, indices: np.ndarray | None = None):
        self.made, self.form, self.seed, self.indices = made, form, seed, indices
        self.is_whole = form.own is not None

    def __len__(self) -> int:
        return len(self.made.dataset) if self.indices is None else len(self.indices)

    def fetch(self, ids: np.ndarray) -> Batch:
        return self.fetch_at(ids, np.zeros_like(ids))

    def fetch_at(self, ids: np.ndarray, epochs: np.ndarray) -> Batch:
        """Return the samples `ids` as in `epochs`, both (batch,) int64: a Dataset may augment them in each epoch."""
        samples = []
        numbers = ids if self.indices is None else self.indices[ids]
        with isolated_randomness():
            seeds = stream_of(self.seed, epochs, ids).tolist()
            for sample, number, seed in zip(ids.tolist(), numbers.tolist(), seeds, strict=True):
                seed_globally(seed)
                try:
                    item = self.made.dataset[number]
                except Exception as error:
                    text = f"{self.made.name}: item {number} cannot be read: {_error_text(error)}"
                    raise (CorruptSample(sample, text) if CorruptSample.is_why(error) else UserError(text)) from error
                samples.append((item,) if self.form.own else _pair(item, f"{self.made.name}: item {number}"))
        batch = collate(samples, self.form, lambda row: f"item {numbers[row]}, sample {ids[row]} of its split")
        return {**batch, "ids": torch.from_numpy(ids)}


class UserStream:
    """An iterable of the user."""

    def __init__(self, made: _Made, form: _Form, seed: int):
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
                where = f"{self.made.name}: item {number} of the stream"
                yield *((item,) if self.form.own else _pair(item, where)), number
                number += 1
        except UserError:
            raise
        except Exception as error:
            where = f"{self.made.name}: item {number} of the stream"
            raise UserError(f"{where} cannot be read: {_error_text(error)}") from error

    def collate(self, samples: list[tuple[Any, ...]]) -> Batch:
        return collate(samples, self.form, lambda row: f"item {samples[row][-1]} of the stream")


def _pair(item: Any, name: str) -> tuple[Any, Any]:
    """Return (inputs, targets or None) of an item; `name` identifies it in the error."""
    if isinstance(item, Mapping) and "inputs" in item and set(item) <= {"inputs", "targets"}:
        return item["inputs"], item.get("targets")
    if is_graph(item):
        targets = getattr(item, "y", None)  # one row for the graph, which a batch has for each
        return item, targets[0] if isinstance(targets, torch.Tensor) and targets.shape[:1] == (1,) else targets
    if isinstance(item, tuple | list) and item:
        if len(item) > 2:  # as arrays: a tuple of numbers would be a vector
            return tuple(np.asarray(each) if isinstance(each, int | float) else each for each in item[:-1]), item[-1]
        return item[0], item[1] if len(item) == 2 else None
    found = f"a dict of {', '.join(map(str, item))}" if isinstance(item, Mapping) else f"a {type(item).__name__}"
    raise UserError(f"{name} is {found}, expected {_ITEM}")


# --------------------------------------------------------------------------------------------------------------------
# Items to batches


@dataclass(frozen=True)
class _Form:
    """How the items of a split become batches."""

    name: str
    """The data set's, for errors."""
    task: Form
    pad_id: int | None
    padding: Mapping[str, float]
    dtype: torch.dtype
    labels: Labels
    own: Callable[[list[Any]], Any] | None = None
    """Makes a batch of samples as they are; None: `collate` does."""

    @classmethod
    def of(cls, request: DataRequest, meta: DataMeta, split: str, name: str) -> _Form:
        known = {
            "language_modeling": meta.vocab_size,
            "seq2seq": meta.target_vocab_size if meta.target_vocab_size is not None else meta.vocab_size,
        }.get(request.task, meta.num_classes)
        return cls(
            name,
            request.task,
            meta.pad_id,
            meta.padding or {},
            request.dtype,
            request.labels(split, known),
            request.collate,
        )

    def image(self, value: Any) -> torch.Tensor:
        """Return an input as a tensor, black-and-white images as bytes."""
        return self.tensor(value.convert("L") if isinstance(value, Image.Image) and value.mode == "1" else value)

    def tensor(self, value: Any) -> torch.Tensor:
        if isinstance(value, Image.Image):
            if value.mode.startswith("I;16"):  # astype converts to this machine's byte order
                return torch.from_numpy(np.asarray(value).astype(np.uint16))[None]
            with without_compiler():
                from torchvision.transforms.v2 import functional
            return functional.pil_to_tensor(value)
        try:
            tensor = torch.as_tensor(value)
            if self.dtype == torch.float64 and tensor.dtype == torch.float32 and not hasattr(value, "dtype"):
                tensor = torch.as_tensor(value, dtype=self.dtype)  # Python's own numbers, which torch has rounded
        except (TypeError, ValueError, RuntimeError) as error:
            found = type(value).__name__
            raise UserError(
                f"{self.name}: a {found} cannot become a tensor ({error}); expected numbers or arrays"
            ) from error
        # float64 is NumPy's default and rarely intended; float32 weights cannot be multiplied with it
        return tensor.to(self.dtype) if tensor.dtype == torch.float64 else tensor

    def targets(self, targets: torch.Tensor) -> torch.Tensor:
        """Return targets as int64 for classes and tokens, as floats otherwise."""
        if self.task in NUMBERED:
            if targets.is_floating_point():
                raise UserError(f"{self.name}: targets are {targets.dtype}; task {self.task} expects whole numbers")
            return targets.to(torch.int64)
        if self.task == "custom" and not targets.is_floating_point():
            return targets
        return targets.to(self.dtype)


def collate(samples: Sequence[tuple[Any, ...]], form: _Form, name: Callable[[int], str]) -> Batch:
    """Return samples as one batch, without `ids`; `name` describes the sample of a row in errors.

    Sequences (one or two dimensions, time first) of different lengths are padded at the end. Images of different sizes
    become a list, for a transform to resize.
    """
    if form.own is not None:
        return _of_own(form.own([sample[0] for sample in samples]), form)
    batch: Batch = {"inputs": _collated([sample[0] for sample in samples], "inputs", form, form.image)}
    if samples[0][1] is not None:
        batch["targets"] = _collated([sample[1] for sample in samples], "targets", form, form.tensor)
        if isinstance(batch["targets"], torch.Tensor):
            batch["targets"] = form.targets(batch["targets"])
            if found := form.labels.problem(batch["targets"]):
                raise UserError(f"{form.name}: {name(found[0])}: {found[1]}; correct or remove the item")
    return batch


def _of_own(found: Any, form: _Form) -> Batch:
    """Return what a task's own collate has made; raises UserError where it is no batch."""
    if isinstance(found, tuple) and len(found) == 2:
        return {"inputs": found[0], "targets": found[1]}
    if not isinstance(found, Mapping) or "inputs" not in found:
        what = f"a dict of {', '.join(map(str, found))}" if isinstance(found, Mapping) else f"a {type(found).__name__}"
        raise UserError(
            f"{form.name}: the task's collate returned {what}; expected a dict with 'inputs' and, where there are any, "
            "'targets'"
        )
    return {key: value for key, value in found.items() if key != "ids"}


def _collated(values: list[Any], key: str, form: _Form, tensor: Callable[[Any], torch.Tensor]) -> Any:
    """Return the values of one place in each sample as one, nested as they are; `key` is their innermost."""
    first = values[0]
    if isinstance(first, Mapping):
        if odd := next((each for each in values if not isinstance(each, Mapping) or set(each) != set(first)), None):
            found = ", ".join(map(str, odd)) if isinstance(odd, Mapping) else f"a {type(odd).__name__}"
            raise UserError(f"{form.name}: {key} of one batch are dicts of {', '.join(map(str, first))} and {found}")
        return {inner: _collated([each[inner] for each in values], str(inner), form, tensor) for inner in first}
    if isinstance(first, tuple) and not all(isinstance(each, int | float) for each in first):
        if any(not isinstance(each, tuple) or len(each) != len(first) for each in values):
            raise UserError(f"{form.name}: {key} of one batch are tuples of {len(first)} and of another length")
        return tuple(_collated(list(part), key, form, tensor) for part in zip(*values, strict=True))
    if is_graph(first):
        return graph_batch(values)
    tensors = [tensor(each) for each in values]
    ragged = key == "inputs" and tensors[0].ndim == 3 and len({each.shape for each in tensors}) > 1
    return tensors if ragged else _joined(tensors, key, form)


def _joined(tensors: list[torch.Tensor], key: str, form: _Form) -> torch.Tensor:
    """Stack tensors, after padding their first dimension to the longest."""
    shapes = {tuple(tensor.shape) for tensor in tensors}
    if len(shapes) == 1:
        return torch.stack(tensors)
    what = f"{form.name}: {key}" if key in ("inputs", "targets") else f"{form.name}: inputs {key!r}"
    if len({shape[1:] for shape in shapes}) > 1 or not all(len(shape) in (1, 2) for shape in shapes):
        raise UserError(
            f"{what} of one batch have the shapes {', '.join(map(str, sorted(shapes)))}; expected equal ones"
        )
    value = _padding(tensors, key, what, form)
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)


def _padding(tensors: list[torch.Tensor], key: str, what: str, form: _Form) -> float:
    """Return the padding value for sequences of different lengths.

    It is `meta.padding` of the key; otherwise `pad_id` for tokens (0, if no token is 0), 0 for masks, positions, types
    and floats, and the target that the loss ignores for targets. All else is refused: padding must never pass for data.
    """
    if key in form.padding:
        return form.padding[key]
    give = f"give it a padding of its own, as in meta = {{'padding': {{{key!r}: 0}}}}"
    if key == "targets":
        if form.labels.ignored is not None:
            return form.labels.ignored
        raise UserError(
            f"{what} of one batch have different lengths, and the loss has no ignore_index; give targets of one "
            f"length, set loss.ignore_index if the loss has one, or {give}"
        )
    first = tensors[0]
    if first.is_floating_point():
        if key.endswith("mask") and any(bool((each < 0).any()) for each in tensors):
            raise UserError(
                f"{what} have different lengths and values below 0, like an additive mask, where 0 keeps a token; "
                f"{give.replace(': 0', ': -10000')}"
            )
        return 0
    if key == "special_tokens_mask":
        return 1
    if (key.endswith("mask") and "padding" not in key) or key in _PLACE_KEYS:
        return 0
    if key.endswith("labels"):
        return IGNORED
    if key in ("inputs", *_TOKEN_KEYS) and first.dtype != torch.bool:
        if form.pad_id is not None:
            return form.pad_id
        if any(bool((each == 0).any()) for each in tensors):
            raise UserError(
                f"{what} of one batch have different lengths, and their values include 0, the padding; set a padding "
                "id in meta, as {'pad_id': 0}, that no token has"
            )
        return 0
    raise UserError(
        f"{what} of one batch have different lengths, and their padding is unknown ({first.dtype}); {give}, with a "
        "number that no item holds"
    )
