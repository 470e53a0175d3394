"""Batches, data sets and their splits, and the look-up of a data set by name.

To add one, write in any module of this folder a function decorated with `datasets.register(NAME, tasks=...)` from
`distrain.config.registry`. Its first parameter is the `DataRequest`; each further parameter is a key of the recipe's
`data` section. `distrain list datasets` prints the first line of its docstring.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from distrain.config import DataSection, FoldSplit, Form, UserError, mix
from distrain.config.arguments import argument_problems
from distrain.config.registry import Entry, datasets
from distrain.datasets.labels import Labels
from distrain.system.numbers import counted

if TYPE_CHECKING:
    from typing_extensions import TypeIs

# --------------------------------------------------------------------------------------------------------------------
# Data sets

Batch = dict[str, Any]
"""`inputs` and `targets`: a tensor (batch, ...), or a dict or tuple of such, nested; `ids`: (batch,) int64."""


@dataclass(frozen=True)
class DataMeta:
    """Facts about the data for models, losses and metrics. None: does not apply, or unknown."""

    input_shape: tuple[int, ...] | None = None
    """Shape of one sample after the transforms, without the batch dimension."""
    num_classes: int | None = None
    class_names: tuple[str, ...] | None = None
    num_targets: int | None = None
    """Numbers predicted for each sample (regression, multilabel)."""
    vocab_size: int | None = None
    target_vocab_size: int | None = None
    """Vocabulary of the targets (seq2seq)."""
    pad_id: int | None = None
    bos_id: int | None = None
    eos_id: int | None = None
    tokens_per_sample: int | None = None
    """Tokens in each sample, if all have the same number."""
    bytes_per_token: float | None = None
    """Bytes of text for each token, for bits per byte."""
    feature_names: tuple[str, ...] | None = None
    """Names of the input columns (tables)."""
    decode: Callable[[Sequence[int]], str] | None = None
    """Target ids -> text."""
    target_mean: tuple[float, ...] | None = None
    """Targets in their own units are `standardised * target_std + target_mean`."""
    target_std: tuple[float, ...] | None = None
    class_counts: tuple[int, ...] | None = None
    """Training samples of each class, or of each label that is 1 (multilabel), where the loss is weighted by them."""
    counted_samples: int | None = None
    """All training samples, with `class_counts`."""
    padding: Mapping[str, float] | None = None
    """Padding value by key of an input, or of `targets`, for sequences of different lengths (user data)."""


class Source(Protocol):
    """One split with random access."""

    def __len__(self) -> int: ...

    def fetch(self, ids: np.ndarray) -> Batch:
        """Return the samples `ids` (batch,) int64, each in 0..len-1, in that order; equal ids give equal batches.

        The caller may change the batch. A source whose samples differ between epochs also has `fetch_at(ids, epochs)`,
        and one with named samples `keys(ids)`: see `keys_of`. Images of different sizes are a list in `inputs`, for a
        transform to resize. Raises CorruptSample.
        """
        ...


class StreamSource(Protocol):
    """One split that can only be iterated. A method `set_epoch(int)`, if present, is called before each pass."""

    def __iter__(self) -> Iterator[Any]: ...

    def collate(self, samples: list[Any]) -> Batch:
        """Return samples, as iterated, as one batch without its `ids`."""
        ...


AnySource = Source | StreamSource


class CorruptSample(UserError):
    """The sample with this number is corrupt; reading it again would not help."""

    def __init__(self, sample: int, message: str):
        super().__init__(message)
        self.sample = sample

    @staticmethod
    def is_why(error: Exception) -> bool:
        """Whether an error is due to the content and not to reading it: a disk may come back."""
        return not isinstance(error, MemoryError) and not (isinstance(error, OSError) and error.errno is not None)


def warnings_of(source: AnySource) -> tuple[str, ...]:
    """Return the warnings of a split or a file, a sentence each."""
    return tuple(getattr(source, "warnings", ()))


def is_stream(source: AnySource) -> TypeIs[StreamSource]:
    """Whether a source can only be iterated."""
    return not hasattr(source, "fetch")


def keys_of(source: AnySource, ids: np.ndarray) -> dict[str, Sequence[Any]]:
    """Return columns that identify the samples `ids` (n,) besides their numbers, such as file names."""
    return source.keys(ids) if hasattr(source, "keys") else {}


def token_places(source: AnySource, ids: np.ndarray) -> list[np.ndarray] | None:
    """Return for the samples `ids` (n,) where in a row of `inputs` each of its tokens begins, -1 where one was cut.

    None: a row has nothing but tokens.
    """
    return source.places(ids) if hasattr(source, "places") else None


@dataclass(frozen=True)
class Data:
    """A data set: its splits, its facts, and the state fitted on its training split."""

    splits: dict[str, AnySource]
    """`train`, and if present `valid` and `test`."""
    meta: DataMeta
    state: dict[str, Any] = field(default_factory=dict)
    """JSON values fitted on the training split alone (statistics, vocabularies, class names). Evaluation and prediction
    pass them back to the builder, which then fits nothing."""
    read: Callable[[Path], Source] | None = None
    """Reads a file of inputs for prediction, encoded as the training split was; targets may be absent."""
    files: Sequence[Path] = ()
    """The files of the splits, for the fingerprint; empty if there are none or they are unknown."""
    warnings: tuple[str, ...] = ()
    """Warnings about the data set, a sentence each. A source has `warnings` of its own."""
    byte_images: bool = False
    """Whether training inputs are images of bytes (uint8) until their last transforms, which make floats of them."""
    fixed_shapes: bool = False
    """Whether all training inputs are known to have one shape after the transforms."""
    encode: Callable[[str], Sequence[int]] | None = None
    """Text -> the tokens that a model reads: a prompt to continue, or the source of a pair with its end."""
    chat: Callable[[Sequence[Mapping[str, Any]]], Sequence[int]] | None = None
    """Messages, {role, content} each, -> the tokens of a prompt for the next answer, by the chat template."""
    packed: bool = False
    """Whether a sample may hold several documents, each beginning where its `position_ids` are 0."""


class TensorSource:
    """Samples held in memory: `inputs` (n, ...) or a dict of such, and `targets` (n, ...) or None for prediction."""

    def __init__(
        self,
        inputs: torch.Tensor | Mapping[str, torch.Tensor],
        targets: torch.Tensor | None,
        warnings: tuple[str, ...] = (),
        names: Mapping[str, Sequence[Any]] | None = None,
    ):
        """`names`: the columns of `keys_of`, for all samples."""
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
            "inputs": inputs.index_select(0, index)
            if isinstance(inputs, torch.Tensor)
            else {key: tensor.index_select(0, index) for key, tensor in inputs.items()}
        }
        if self.targets is not None:
            batch["targets"] = self.targets.index_select(0, index)
        batch["ids"] = index
        return batch

    def keys(self, ids: np.ndarray) -> dict[str, Sequence[Any]]:
        return {column: [values[index] for index in ids.tolist()] for column, values in self.names.items()}

    def select(self, ids: np.ndarray) -> TensorSource:
        """Return a source of these samples alone, copied."""
        batch = self.fetch(ids)
        return TensorSource(batch["inputs"], batch.get("targets"), names=self.keys(ids))


# --------------------------------------------------------------------------------------------------------------------
# By name


@dataclass(frozen=True)
class DataRequest:
    """The arguments of every builder."""

    section: DataSection
    task: Form
    """What targets are. For `custom` a data set of one form takes its own."""
    seed: int
    base: Path = Path()
    """The folder that relative paths start from."""
    state: dict[str, Any] | None = None
    """State fitted by an earlier build, to use instead of fitting."""
    dtype: torch.dtype = torch.float32
    """Of inputs and float targets: float64 with `train.precision: fp64`."""
    labels: Callable[[str, int | None], Labels] = lambda split, known: Labels()
    """(split, the data set's number of classes or tokens) -> the allowed targets."""

    collate: Callable[[list[Any]], Any] | None = None
    """The task's own, of the samples of one's own data; None: they are stacked and padded."""
    inputs_only: bool = False
    """Whether a trained model is to be used on other inputs: with `state`, a builder that can need not open its splits,
    which may be elsewhere, and returns none."""

    def path(self, expected: str) -> Path:
        """Return data.path, which must exist; `expected` describes it in the error."""
        name = self.section.name
        if self.section.path is None:
            raise UserError(f"data set {name!r} needs data.path: {expected}")
        path = self.base / self.section.path
        if not path.exists():
            raise UserError(f"data.path: there is nothing at {path}; data set {name!r} expects {expected}")
        return path

    def split_paths(self) -> dict[str, Path] | None:
        """Return the path of each split if data.split names them, otherwise None."""
        split = self.section.split
        return {name: self.base / path for name, path in split.items()} if isinstance(split, dict) else None


def find_dataset(section: DataSection, task: Form) -> Entry[Callable[..., Any]]:
    """Return the data set of a recipe's section; raises UserError with all problems of its name and arguments.

    Arguments of user code are checked where it is called, with `path` and `split`.
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
            missing={"tokenizer": "it was not given: the folder of a tokenizer, as transformers writes it"},
        )
        if problems:
            raise UserError("\n".join(problems))
    return entry


# --------------------------------------------------------------------------------------------------------------------
# Splits


SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "valid"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""What folders, files and values of a column call the splits, in small letters."""


def split_indices(
    length: int,
    section: DataSection,
    seed: int,
    labels: np.ndarray | None = None,
    default: Sequence[float] = (0.8, 0.2),
) -> dict[str, np.ndarray]:
    """Return the sample numbers of each split, sorted, int64; each number in 0..length-1 occurs exactly once.

    Fractions give the counts by largest remainder, of all samples or, with `data.stratify`, of each class in `labels`
    (length,). Folds differ by at most one sample. `default` replaces a data.split of None. Depends on `seed` alone.
    Raises UserError for an empty split, and if data.split names folders or files.
    """
    generator = np.random.Generator(np.random.PCG64(mix(seed, "split")))
    shuffled = generator.permutation(length)
    groups = [shuffled]
    if section.stratify and labels is not None:
        # with counts, as without them NumPy imports numpy.ma
        kinds, _ = np.unique(labels, return_counts=True)
        groups = [shuffled[labels[shuffled] == label] for label in kinds]

    if isinstance(section.split, FoldSplit):
        fold, of = section.split.fold, section.split.of
        check_folds(section.split, length)
        # dealing class after class like cards keeps both the classes and the totals even
        dealt = np.concatenate(groups)
        held_out = np.arange(length) % of == fold - 1
        return {"train": np.sort(dealt[~held_out]), "test": np.sort(dealt[held_out])}

    fractions = split_fractions(section, default)
    parts: list[list[np.ndarray]] = [[] for _ in fractions]
    behind = np.zeros(len(fractions))  # samples that each split is short of its share so far
    for group in groups:
        exact = np.array(list(fractions.values())) * len(group)
        counts = np.floor(exact + 1e-9).astype(np.int64)
        # rounded, so that equal remainders are equal and the split that is short is served first
        order = np.lexsort((-np.round(behind, 9), -np.round(exact - counts, 9)))
        counts[order[: len(group) - counts.sum()]] += 1
        behind += exact - counts
        for part, piece in zip(parts, np.split(group, np.cumsum(counts)[:-1]), strict=True):
            part.append(piece)
    splits = {name: np.sort(np.concatenate(part)) for name, part in zip(fractions, parts, strict=True)}
    check_split_sizes(fractions, {name: len(indices) for name, indices in splits.items()})
    return splits


def split_fractions(section: DataSection, default: Sequence[float]) -> dict[str, float]:
    """Return the share of each split, which the recipe has checked to sum to 1; raises UserError for named paths."""
    split = section.split or list(default)
    if not isinstance(split, list):
        raise UserError(
            f"data.split: data set {section.name!r} is one piece, and reads no other files; give fractions such as "
            f"{list(default)}, or {{fold, of}}"
        )
    return dict(zip(("train", "test") if len(split) == 2 else ("train", "valid", "test"), split, strict=False))


def check_folds(split: FoldSplit, length: int) -> None:
    if split.of > length:
        raise UserError(
            f"data.split: {split.of} folds of {counted(length, 'sample')} leave some empty; take at most {length}"
        )


def check_split_sizes(fractions: Mapping[str, float], sizes: Mapping[str, int]) -> None:
    """Raise UserError for a split without samples."""
    if empty := [name for name, size in sizes.items() if not size]:
        raise UserError(
            f"data.split: {list(fractions.values())} of {sum(sizes.values())} samples leave {' and '.join(empty)} "
            "without a sample"
        )
