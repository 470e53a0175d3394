"""What a batch is, what a data set gives, and how one is found by its name.

To add one, write in any module of this folder a function decorated with `datasets.register(NAME, tasks=...)`,
`datasets` being that of `distrain.config.registry`. Its first parameter is the `DataRequest`; its further parameters
are the keys that the recipe's `data` section may hold beside its own. Its first docstring line is what
`distrain list datasets` prints.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from distrain.config import DataSection, FoldSplit, Task, UserError, mix
from distrain.config.arguments import argument_problems
from distrain.config.registry import Entry, datasets
from distrain.datasets.labels import Labels

if TYPE_CHECKING:
    from typing_extensions import TypeIs

# --------------------------------------------------------------------------------------------------------------------
# What a data set gives

Batch = dict[str, Any]
"""`inputs`: a tensor (batch, ...) or a dict of them; `targets`: a tensor (batch, ...); `ids`: (batch,) int64."""


@dataclass(frozen=True)
class DataMeta:
    """What models, losses and metrics may take from the data. None: does not apply, or is not known."""

    input_shape: tuple[int, ...] | None = None
    """Shape of one sample after the transforms, without the batch dimension."""
    num_classes: int | None = None
    class_names: tuple[str, ...] | None = None
    num_targets: int | None = None
    """Numbers predicted for each sample (regression, multilabel)."""
    vocab_size: int | None = None
    """Different input tokens."""
    target_vocab_size: int | None = None
    """Different target tokens (seq2seq)."""
    pad_id: int | None = None
    bos_id: int | None = None
    eos_id: int | None = None
    tokens_per_sample: int | None = None
    """Tokens in each sample where all have the same number."""
    bytes_per_token: float | None = None
    """Bytes of text for each token, for bits per byte."""
    feature_names: tuple[str, ...] | None = None
    """Names of the input columns (tables)."""
    decode: Callable[[Sequence[int]], str] | None = None
    """Target ids -> text."""
    target_mean: tuple[float, ...] | None = None
    """What standardised targets must be multiplied with `target_std` and added to, to be in their own units."""
    target_std: tuple[float, ...] | None = None
    padding: Mapping[str, float] | None = None
    """By the key of an input, or for `targets`: what sequences of different lengths are filled up with (own data)."""


class Source(Protocol):
    """One split whose samples are reached by number."""

    def __len__(self) -> int: ...

    def fetch(self, ids: np.ndarray) -> Batch:
        """Return the samples `ids` (batch,) int64, each in 0..len-1, in that order; equal ids give equal batches.

        The batch is the caller's to change. A source whose samples differ from epoch to epoch also has
        `fetch_at(ids, epochs)`, and one whose samples have names of their own `keys(ids)`: see `keys_of`. For a sample
        that is damaged it raises Undecodable. Images of different sizes are a list in `inputs`, for a transform to make
        equal.
        """
        ...


class StreamSource(Protocol):
    """One split that can only be walked from its beginning. A method `set_epoch(int)` is called before each pass."""

    def __iter__(self) -> Iterator[Any]:
        """Yield what `collate` takes of one sample after the other."""
        ...

    def collate(self, samples: list[Any]) -> Batch:
        """Return samples as one batch, without its `ids`."""
        ...


AnySource = Source | StreamSource


class CorruptSample(UserError):
    """The sample with this number is damaged; to read it again would not help."""

    def __init__(self, sample: int, message: str):
        super().__init__(message)
        self.sample = sample

    @staticmethod
    def is_why(error: Exception) -> bool:
        """Whether an error comes of what was read, and not of reading: a disk that is away may come back."""
        return not isinstance(error, MemoryError) and not (isinstance(error, OSError) and error.errno is not None)


def warnings_of(source: AnySource) -> tuple[str, ...]:
    """Return what a person should know of a split or a file that was read, a sentence each."""
    return tuple(getattr(source, "warnings", ()))


def is_stream(source: AnySource) -> TypeIs[StreamSource]:
    """Whether a source can only be walked."""
    return not hasattr(source, "fetch")


def keys_of(source: AnySource, ids: np.ndarray) -> dict[str, Sequence[Any]]:
    """Return what a person knows the samples `ids` (n,) by, besides their numbers: by column, n texts or numbers."""
    keys = getattr(source, "keys", None)
    return keys(ids) if keys is not None else {}


@dataclass(frozen=True)
class Data:
    """A data set: its splits, what is known about it, and what was fitted on its training split."""

    splits: dict[str, AnySource]
    """`train`, and `valid` and `test` where there are such."""
    meta: DataMeta
    state: dict[str, Any] = field(default_factory=dict)
    """JSON values fitted on the training split alone (statistics, vocabularies, class names). Given back to the builder
    at evaluation and prediction, they are used and never fitted again."""
    read: Callable[[Path], Source] | None = None
    """Reads a file of inputs for prediction, encoded as the training split was; targets may be absent."""
    files: Sequence[Path] = ()
    """The files that the splits are read from, by which the data are known again; empty where there are none, or where
    they are not known."""
    warnings: tuple[str, ...] = ()
    """What a person should know of how it was read, a sentence each. A source has `warnings` of its own."""


class TensorSource:
    """Samples held in memory: `inputs` (n, ...) or a dict of such, and `targets` (n, ...) or None for prediction."""

    def __init__(
        self,
        inputs: torch.Tensor | Mapping[str, torch.Tensor],
        targets: torch.Tensor | None,
        warnings: tuple[str, ...] = (),
        names: Mapping[str, Sequence[Any]] | None = None,
    ):
        """`names`: see `keys_of`, of all samples."""
        self.inputs = inputs
        self.targets = targets
        self.warnings = warnings
        self.names = names or {}
        tensors = list(inputs.values()) if isinstance(inputs, Mapping) else [inputs]
        lengths = {len(tensor) for tensor in (tensors if targets is None else [*tensors, targets])}
        assert len(lengths) == 1, f"tensors of different lengths: {sorted(lengths)}"
        self._length = lengths.pop()

    def __len__(self) -> int:
        return self._length

    def fetch(self, ids: np.ndarray) -> Batch:
        index = torch.from_numpy(ids)
        inputs = self.inputs
        batch: Batch = {
            "inputs": {key: tensor.index_select(0, index) for key, tensor in inputs.items()}
            if isinstance(inputs, Mapping)
            else inputs.index_select(0, index)
        }
        if self.targets is not None:
            batch["targets"] = self.targets.index_select(0, index)
        batch["ids"] = index
        return batch

    def keys(self, ids: np.ndarray) -> dict[str, Sequence[Any]]:
        """Return what the samples are known by; see `keys_of`."""
        return {column: [values[index] for index in ids.tolist()] for column, values in self.names.items()}

    def select(self, ids: np.ndarray) -> TensorSource:
        """Return a source of these samples alone, copied."""
        batch = self.fetch(ids)
        return TensorSource(batch["inputs"], batch.get("targets"), names=self.keys(ids))


class SubsetSource:
    """The samples `indices` (n,) int64 of another source, numbered from 0."""

    def __init__(self, source: Source, indices: np.ndarray):
        self.source = source
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def fetch(self, ids: np.ndarray) -> Batch:
        return {**self.source.fetch(self.indices[ids]), "ids": torch.from_numpy(ids)}

    def keys(self, ids: np.ndarray) -> dict[str, Sequence[Any]]:
        """Return the other source's."""
        return keys_of(self.source, self.indices[ids])


# --------------------------------------------------------------------------------------------------------------------
# By name


@dataclass(frozen=True)
class DataRequest:
    """What a builder is asked for."""

    section: DataSection
    task: Task
    seed: int
    base: Path = Path()
    """The folder that relative paths start from."""
    state: dict[str, Any] | None = None
    """Values fitted by an earlier build; given, nothing is fitted again."""
    dtype: torch.dtype = torch.float32
    """Of what is computed with: float64 where the run's arithmetic is."""
    labels: Callable[[str, int | None], Labels] = lambda split, known: Labels()
    """(split, the classes or tokens that the data set speaks of) -> what its targets may be."""

    def path(self, expected: str) -> Path:
        """Return data.path, which must exist. `expected` says what should be there, for the error."""
        name = self.section.name
        if self.section.path is None:
            raise UserError(f"data set {name!r} needs data.path: {expected}")
        path = self.base / self.section.path
        if not path.exists():
            raise UserError(f"data.path: there is nothing at {path}; data set {name!r} expects {expected}")
        return path


def find_dataset(section: DataSection, task: Task) -> Entry[Callable[..., Any]]:
    """Return the data set of a recipe's section; raises UserError with all that is wrong with its name and arguments.

    The arguments of a person's own are checked where it is called, which may be with more of them.
    """
    entry = datasets.find(section.name, task)
    if entry.registered:
        problems = argument_problems(
            entry.value,
            section.args,
            "data",
            f"data set {section.name!r}",
            given=list(inspect.signature(entry.value).parameters)[:1],
            section_keys=DataSection.model_fields,
        )
        if problems:
            raise UserError("\n".join(problems))
    return entry


# --------------------------------------------------------------------------------------------------------------------
# Splits


def split_indices(
    length: int,
    section: DataSection,
    seed: int,
    labels: np.ndarray | None = None,
    default: Sequence[float] = (0.8, 0.2),
) -> dict[str, np.ndarray]:
    """Return the sample numbers of each split, sorted, int64; every number in 0..length-1 occurs exactly once.

    Fractions give the counts by largest remainder, of the whole or, with `data.stratify`, of each class in `labels`
    (length,). Folds differ by at most one sample. `default` is used where data.split is None. Depends on `seed` alone.
    Raises UserError for fractions that do not add up to 1, for a split that would be empty, and for folders or files.
    """
    if isinstance(section.split, dict):
        raise UserError(
            f"data.split: data set {section.name!r} is one piece; give fractions such as [0.8, 0.2], or {{fold, of}}"
        )
    if section.stratify and labels is None:
        raise UserError(
            f"data.stratify: the samples of data set {section.name!r} have no classes to keep the shares of"
        )
    generator = np.random.Generator(np.random.PCG64(mix(seed, "split")))
    shuffled = generator.permutation(length)
    groups = [shuffled]
    if section.stratify and labels is not None:
        groups = [shuffled[labels[shuffled] == label] for label in np.unique(labels)]

    if isinstance(section.split, FoldSplit):
        fold, of = section.split.fold, section.split.of
        if fold > of:
            raise UserError(f"data.split: fold {fold} of {of} does not exist; folds are numbered from 1 to {of}")
        if of > length:
            raise UserError(f"data.split: {of} folds of {length} samples leave some empty; take at most {length}")
        # Dealing class after class like cards keeps both the classes and the totals even.
        dealt = np.concatenate(groups)
        held_out = np.arange(length) % of == fold - 1
        return {"train": np.sort(dealt[~held_out]), "test": np.sort(dealt[held_out])}

    fractions = list(section.split or default)
    names = {1: ["train"], 2: ["train", "test"], 3: ["train", "valid", "test"]}.get(len(fractions))
    if names is None or abs(sum(fractions) - 1) > 1e-6:
        raise UserError(
            f"data.split: {fractions} should be the fractions of [train, test] or [train, valid, test], and add up to 1"
        )
    parts: list[list[np.ndarray]] = [[] for _ in names]
    behind = np.zeros(len(names))  # by how many samples each split is short of its share so far
    for group in groups:
        exact = np.array(fractions) * len(group)
        counts = np.floor(exact + 1e-9).astype(np.int64)
        # Rounded, so that equal remainders are equal and the split that is short is served first.
        order = np.lexsort((-np.round(behind, 9), -np.round(exact - counts, 9)))
        counts[order[: len(group) - counts.sum()]] += 1
        behind += exact - counts
        for part, piece in zip(parts, np.split(group, np.cumsum(counts)[:-1]), strict=True):
            part.append(piece)
    splits = {name: np.sort(np.concatenate(part)) for name, part in zip(names, parts, strict=True)}
    if empty := [name for name, indices in splits.items() if not len(indices)]:
        raise UserError(f"data.split: {fractions} of {length} samples leave {' and '.join(empty)} without a sample")
    return splits
