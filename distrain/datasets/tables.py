"""Tables: CSV and Parquet files whose columns become features and targets.

A CSV file is read as text, and what a column holds is decided on the training rows alone: numbers where every value
there is one, categories otherwise. So '01' stays '01' whichever file it comes from, and a file read for prediction
cannot change how a column is understood.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from distrain.config import Task, UserError, close_names
from distrain.datasets.base import Data, DataMeta, DataRequest, TensorSource, register, split_indices

if TYPE_CHECKING:  # imported where they are used: other data sets should not wait for them
    import pyarrow as pa

_SUFFIXES = (".csv", ".tsv", ".parquet", ".pq")
_MISSING_VALUES = ("", "NA", "N/A", "#N/A", "n/a", "NaN", "nan", "NULL", "null", "None")
_EXPECTED = "a .csv, .tsv or .parquet file, or a folder of them"
_NO_NAME = re.compile(r"\s*|__index_level_\d+__|Unnamed: \d+(_level_\d+)?")
"""What a column is called that nobody has named, by pandas or by whoever wrote its table to a file."""
_RESET_INDEX = re.compile(r"index|level_\d+")
"""What pandas calls an index that it makes a column."""
_FEWEST_COUNTED = 10  # rows: among fewer, numbers of a measurement may well be 1, 2, 3
_WHOLE = 2.0**53
"""Up to here float64 holds every whole number."""
_CLOSE = 1e5
"""From this many standard deviations on, a mean is far: its own rounding can be seen in what is left without it."""


@dataclass(frozen=True)
class TableMeta(DataMeta):
    """What is known of a table with `encode: index`."""

    cardinalities: tuple[int, ...] | None = None
    """For each categorical column the number of indices, 0 (unknown) included: the sizes of the embeddings."""


@register("table", tasks=["classification", "binary", "multilabel", "regression"])
def table(
    request: DataRequest,
    target: str | list[str],
    features: list[str] | None = None,
    categorical: list[str] | None = None,
    drop: list[str] = [],  # noqa: B006 - never changed
    id: str | None = None,
    missing: Literal["mean", "median", "error"] = "mean",
    missing_indicator: bool = False,
    encode: Literal["one_hot", "index"] = "one_hot",
    max_categories: int = 1000,
    positive: str | int | float | bool | None = None,
    standardize_target: bool = False,
    delimiter: str | None = None,
    missing_values: list[str] = list(_MISSING_VALUES),  # noqa: B006 - never changed
) -> Data:
    """Rows of CSV or Parquet files: numeric columns standardised, categorical ones one-hot or as indices.

    Everything is fitted on the training rows alone. A numeric column becomes (value - mean) / std, by the mean and the
    standard deviation (of the population) of the values present; a missing value becomes the column's mean or median
    (`missing`), with a further 0/1 column where `missing_indicator` asks for it and training rows lack values. Missing
    is a category of its own where training rows lack one; a category not seen in training is unknown: all zeros in
    one-hot columns, 0 as an index. How many rows have one is a warning, and an error where all rows of a split do.

    Columns that nobody named (the index of pandas) are inputs only where `features` or `categorical` names them. The
    column `id` is no input: it names the rows, in predictions.

    `inputs` is (batch, columns) float32 or, with `encode: index`, {"numeric": (batch, numeric) float32, "categorical":
    (batch, categorical) int64}, whose sizes are in `meta.cardinalities`. `targets` by task: classification (batch,)
    int64, classes sorted (by value where all are numbers); binary (batch,) float32, where 1 is `positive` or else the
    class sorted last; multilabel (batch, columns) float32 from columns of 0 and 1; regression (batch,) float32, or
    (batch, columns) where `target` is a list, standardised with `standardize_target`. With `train.precision: fp64` all
    that is float32 here is float64.
    """
    options = _Options(missing, missing_indicator, encode, max_categories, standardize_target)
    reader = _Reader(delimiter, tuple(missing_values))
    targets = [target] if isinstance(target, str) else target
    whole, frames = _split_frames(request, reader, targets)
    said: list[str] = []
    if request.state is None:
        columns = _Columns(targets, features, categorical, drop, [id] if id is not None else [])
        state = _fit(frames["train"], columns, options, request.task, isinstance(target, list), positive)
        said += columns.unnamed(whole) + _row_numbers(whole, columns, state)
    else:
        state = request.state
    encoder = _Encoder(state, request.task, np.dtype(np.float64 if request.dtype == torch.float64 else np.float32), id)
    splits = {
        name: encoder.encode(frame, f"the split {name!r}", refuse_unknown=request.state is None)
        for name, frame in frames.items()
    }

    def read(path: Path) -> TensorSource:
        return encoder.encode(reader.read(path), str(path), need_target=False)

    files = tuple(dict.fromkeys(path for frame in frames.values() for path, _ in frame.files))
    return Data(dict(splits), _meta(state, request.task), state, read, files, tuple(said))


# --------------------------------------------------------------------------------------------------------------------
# Reading


@dataclass(frozen=True)
class _Frame:
    """Rows of a table, which know the files that they come from."""

    table: pa.Table
    rows: np.ndarray
    """(rows,) int64: the number of each row among those of all files."""
    files: tuple[tuple[Path, int], ...]
    """Each file and its number of rows, in order."""
    unnamed: Mapping[str, str] = field(default_factory=dict)
    """The columns that nobody named, and what each of them is."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def names(self) -> list[str]:
        return self.table.column_names

    @property
    def title(self) -> str:
        path = self.files[0][0]
        return str(path if len(self.files) == 1 else path.parent)

    def take(self, indices: np.ndarray) -> _Frame:
        return _Frame(self.table.take(indices), self.rows[indices], self.files, self.unnamed)

    def place(self, index: int) -> str:
        """Where a row is, for an error; rows are counted from 1, without the header."""
        row = int(self.rows[index])
        for path, count in self.files:
            if row < count:
                return f"{path}, row {row + 1}"
            row -= count
        raise AssertionError("a row of no file")

    def places(self, mask: np.ndarray) -> str:
        """Where the rows of `mask` (rows,) are: the first few, and how many there are."""
        found = np.flatnonzero(mask)
        shown = "; ".join(self.place(index) for index in found[:5])
        return shown + (f"; and {len(found) - 5} more rows" if len(found) > 5 else "")

    def parse(self, name: str) -> tuple[_Numbers, np.ndarray]:
        """Return a column as (its numbers, the mask (rows,) of what is there and is no number)."""
        import pandas as pd
        import pyarrow as pa

        column = _plain(self.table.column(name))
        kind = column.type
        if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
            values = column.cast(pa.float64(), safe=False).to_numpy()
            exact = column.fill_null(0).to_numpy() if pa.types.is_integer(kind) and _beyond_whole(values) else None
            return _Numbers(values, exact), np.zeros(len(self), dtype=bool)
        if pa.types.is_null(kind):
            return _Numbers(np.full(len(self), np.nan)), np.zeros(len(self), dtype=bool)
        present = ~column.is_null().to_numpy()
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            return _Numbers(np.full(len(self), np.nan)), present
        texts = column.to_pandas()
        parsed = pd.to_numeric(texts, errors="coerce")
        values = parsed.to_numpy(np.float64, na_value=np.nan)
        exact = None
        if _beyond_whole(values):
            whole = parsed if present.all() else pd.to_numeric(texts[present], errors="coerce")
            if whole.dtype.kind in "iu":
                exact = np.zeros(len(self), whole.dtype)
                exact[present] = whole
        return _Numbers(values, exact), present & np.isnan(values)

    def numbers(self, name: str, what: str) -> _Numbers:
        """Return the numbers of a column; raises UserError for other text and for infinities."""
        numbers, bad = self.parse(name)
        if bad.any():
            index = int(np.flatnonzero(bad)[0])
            raise UserError(
                f"{what} {name!r} should hold numbers, and {self.place(index)} holds {self.text(name, index)!r}; "
                "mend it, list the column under data.categorical, or drop it"
            )
        if (infinite := np.isinf(numbers.values)).any():
            raise UserError(f"{what} {name!r} is infinite at {self.places(infinite)}; mend or remove these rows")
        return numbers

    def labels(self, name: str) -> np.ndarray:
        """Return a column as objects (rows,): text, or None where missing."""
        import pyarrow as pa

        column = _plain(self.table.column(name))
        if pa.types.is_nested(column.type) or pa.types.is_binary(column.type):
            raise UserError(
                f"{self.title}: column {name!r} is of type {column.type}, which is no number and no category; "
                "list it under data.drop"
            )
        # Python's own text of a value is what pandas writes into a CSV file, so that both forms of a table are equal.
        return np.array(
            [None if value is None or value != value else str(value) for value in column.to_pylist()], dtype=object
        )

    def text(self, name: str, index: int) -> str:
        return str(self.table.column(name)[index].as_py())


@dataclass(frozen=True)
class _Numbers:
    """The numbers of a column."""

    values: np.ndarray
    """(rows,) float64, NaN where missing."""
    exact: np.ndarray | None = None
    """(rows,) int64 or uint64, anything where missing: whole numbers of which float64 cannot hold each."""

    @property
    def present(self) -> np.ndarray:
        """(rows,) bool."""
        return ~np.isnan(self.values)

    def less(self, base: float) -> np.ndarray:
        """Return the numbers less `base`, (rows,) float64, exact where they are close to it."""
        distances = self.values - float(base)
        if self.exact is None or not isinstance(base, int):
            return distances
        # unsigned numbers wrap round, and so does the difference back again
        exact = (self.exact - np.array(base).astype(self.exact.dtype)).view(np.int64)
        return np.where(np.abs(distances) < 2.0**62, exact, distances)

    def moments(self) -> _Moments:
        """Return mean and standard deviation (of the population) of the numbers present, of which there is one."""
        present = self.present
        values = self.values[present]
        with np.errstate(over="ignore", invalid="ignore"):
            mean, std = float(values.mean()), float(values.std())
        if 1e-140 < std < 1e140 and abs(mean) < _CLOSE * std:
            return _Moments(mean, std, usual=True)
        # What float64 cannot hold of numbers of this size must not be taken for their spread, nor be lost of it.
        base = float(values[0]) if self.exact is None else int(self.exact[present][0])
        distances = self.less(base)[present]
        if self._is_constant(values, distances):
            return _Moments(mean, 1.0) if mean == base else _Moments(0.0, 1.0, base)
        size = float(np.abs(distances).max())
        with np.errstate(invalid="ignore"):
            scaled = distances / size
            return _Moments(float(scaled.mean()) * size, float(scaled.std()) * size, base)

    def _is_constant(self, values: np.ndarray, distances: np.ndarray) -> bool:
        """Whether the numbers differ by no more than the rounding of numbers of their size."""
        spread = float(distances.max()) - float(distances.min())
        if self.exact is not None:
            return spread == 0
        largest = float(np.abs(values).max())
        if largest <= _WHOLE and bool((values == np.floor(values)).all()):
            return spread == 0
        return spread <= 4 * float(np.spacing(largest))


@dataclass(frozen=True)
class _Moments:
    mean: float
    """Of the numbers less `base`."""
    std: float
    """1 for a constant column, which is 0 where it keeps its value."""
    base: float = 0.0
    """A number among them where they are close to each other and far from 0; an int where they are whole."""
    usual: bool = False
    """Whether they are what the plain formulas give."""


def _beyond_whole(values: np.ndarray) -> bool:
    return bool((np.abs(values) > _WHOLE).any())


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    import pyarrow as pa

    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


@dataclass(frozen=True)
class _Reader:
    delimiter: str | None
    missing_values: tuple[str, ...]

    def read(self, path: Path) -> _Frame:
        """Return the rows of a file, or of all files of a folder in the order of their names."""
        import pyarrow as pa

        if not path.exists():
            raise UserError(f"there is nothing at {path}; a table is {_EXPECTED}")
        files = [path]
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.suffix.lower() in _SUFFIXES)
            if not files:
                raise UserError(f"{path} holds no {', '.join(_SUFFIXES)} file; a table is {_EXPECTED}")
        tables = [self._read_file(file) for file in files]
        unnamed = [_unnamed(each) for each in tables]
        named = [set(each.column_names) - set(without) for each, without in zip(tables, unnamed, strict=True)]
        for file, each in zip(files[1:], named[1:], strict=True):
            if each != named[0]:
                odd = sorted(each ^ named[0])
                raise UserError(f"{file} and {files[0]} should have the same columns, and differ in {_listed(odd)}")
        shared = [name for name in tables[0].column_names if all(name in each.column_names for each in tables)]
        try:
            joined = pa.concat_tables([each.select(shared) for each in tables], promote_options="permissive")
        except pa.ArrowException as error:
            raise UserError(f"the files of {path} do not fit together: {error}") from error
        counts = [each.num_rows for each in tables]
        whys = {name: why for each in unnamed for name, why in each.items() if name in shared}
        return _Frame(joined, np.arange(sum(counts)), tuple(zip(files, counts, strict=True)), whys)

    def _read_file(self, path: Path) -> pa.Table:
        import pyarrow as pa
        from pyarrow import parquet

        suffix = path.suffix.lower()
        if suffix not in _SUFFIXES:
            raise UserError(f"{path}: a table is {_EXPECTED}, not {suffix or 'a file without an ending'}")
        try:
            with path.open("rb") as file:  # which may be called anything: pyarrow knows no path that is not UTF-8
                is_parquet = suffix in (".parquet", ".pq")
                result = parquet.read_table(file) if is_parquet else self._read_csv(path, file, suffix)
        except (pa.ArrowException, UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{path} cannot be read: {error}") from error
        if not result.num_rows:
            raise UserError(f"{path} has no rows")
        return result

    def _read_csv(self, path: Path, binary: IO[bytes], suffix: str) -> pa.Table:
        import pyarrow as pa
        from pyarrow import csv as arrow_csv

        delimiter = self.delimiter or ("\t" if suffix == ".tsv" else ",")
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = next((row for row in csv.reader(file, delimiter=delimiter) if row), None)
        if header is None:
            raise UserError(f"{path} is empty; its first line should name the columns")
        names = header
        if sum(not name.strip() for name in header) > 1:  # as pandas calls them when it reads such a file
            names = [name if name.strip() else f"Unnamed: {at}" for at, name in enumerate(header)]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(f"{path} names {_listed(twice)} more than once; give each column a name of its own")
        result = arrow_csv.read_csv(
            binary,
            parse_options=arrow_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            convert_options=arrow_csv.ConvertOptions(
                column_types={name: pa.string() for name in header},
                null_values=list(self.missing_values),
                strings_can_be_null=True,
            ),
        )
        return result.rename_columns(names)


def _unnamed(table: pa.Table) -> dict[str, str]:
    """Return the columns of a file's table that nobody named, and what each of them is."""
    # Without a name of its own pandas notes only the range of an index, which is no column.
    index = (table.schema.pandas_metadata or {}).get("index_columns", [])
    found = {name: "the index of the pandas table" for name in table.column_names if name in index}
    return found | {
        name: "a column without a name, as pandas writes its index"
        for name in table.column_names
        if name not in found and _NO_NAME.fullmatch(name)
    }


def _split_frames(request: DataRequest, reader: _Reader, targets: Sequence[str]) -> tuple[_Frame, dict[str, _Frame]]:
    """Return the rows that the training rows are part of, or all of, and the rows of each split."""
    section = request.section
    if isinstance(section.split, dict):
        if "train" not in section.split:
            raise UserError(f"data.split names {_listed(sorted(section.split))} and no file for train")
        frames: dict[str, _Frame] = {name: reader.read(request.base / path) for name, path in section.split.items()}
        return frames["train"], frames
    whole = reader.read(request.path(_EXPECTED))
    labels = None
    if section.stratify and request.task in ("classification", "binary") and targets[0] in whole.names:
        labels = whole.labels(targets[0]).astype(str)
    indices = split_indices(len(whole), section, request.seed, labels)
    return whole, {name: whole.take(index) for name, index in indices.items()}


# --------------------------------------------------------------------------------------------------------------------
# Fitting: all that is learnt from the training rows, as JSON values


@dataclass(frozen=True)
class _Options:
    missing: Literal["mean", "median", "error"]
    missing_indicator: bool
    encode: Literal["one_hot", "index"]
    max_categories: int
    standardize_target: bool


@dataclass(frozen=True)
class _Columns:
    targets: list[str]
    features: list[str] | None
    categorical: list[str] | None
    drop: list[str]
    id: list[str]

    def inputs(self, frame: _Frame) -> list[str]:
        """Return the names of the input columns, or raise one UserError with every name that does not fit."""
        problems = []
        for key, names in vars(self).items():
            problems += [
                f"data.{key.replace('targets', 'target')}: {frame.title} has no column {name!r}"
                + (close_names(name, frame.names) or f"; it has {_listed(frame.names)}")
                for name in names or []
                if name not in frame.names
            ]
        if not self.targets:
            problems.append("data.target: no column is named")
        taken = {
            **dict.fromkeys(self.drop, "data.drop"),
            **dict.fromkeys(self.id, "data.id"),
            **dict.fromkeys(self.targets, "data.target"),
        }
        problems += [f"data.id: {name!r} is also in data.target" for name in self.id if name in self.targets]
        for key, names in (("features", self.features or []), ("categorical", self.categorical or [])):
            problems += [f"data.{key}: {name!r} is also in {taken[name]}" for name in names if name in taken]
        inputs = [name for name in self.features or self._candidates(frame) if name not in taken]
        if self.features is not None:
            outside = [name for name in self.categorical or [] if name not in self.features and name not in taken]
            problems += [f"data.categorical: {name!r} is not among data.features" for name in outside]
        if not inputs:
            problems += ["no column is left for the inputs", *self.unnamed(frame)]
        if problems:
            raise UserError("\n".join(problems))
        return inputs

    def _candidates(self, frame: _Frame) -> list[str]:
        """Return the columns that may be inputs where data.features names none."""
        return [name for name in frame.names if name not in frame.unnamed or name in (self.categorical or [])]

    def unnamed(self, frame: _Frame) -> list[str]:
        """Return a line for each column that is left out because nobody named it."""
        if self.features is not None:
            return []
        used = [*self._candidates(frame), *self.targets, *self.drop, *self.id]
        return [
            f"column {name!r} of {frame.title} is {what}, and is left out; to use it, name it in data.features or "
            "data.categorical"
            for name, what in frame.unnamed.items()
            if name not in used
        ]


def _row_numbers(whole: _Frame, columns: _Columns, state: dict[str, Any]) -> list[str]:
    """Return a line for each input that numbers the rows, and that the recipe does not ask for."""
    if columns.features is not None or len(whole) < _FEWEST_COUNTED:
        return []
    found = []
    rows = [count for _, count in whole.files]
    for each in state["numeric"]:
        name, reaches = each["name"], abs(each["mean"]) + 4 * each["std"]
        is_reset = _RESET_INDEX.fullmatch(name) is not None
        if "base" in each or (reaches < max(rows) / 2 and not is_reset):
            continue  # without a look at the column again
        values = whole.parse(name)[0].values
        if _counts(values) or all(map(_counts, np.split(values, np.cumsum(rows)[:-1]))):
            what = f"numbers the rows ({values.min():.0f} to {values.max():.0f})"
        elif is_reset and _is_distinct(values):
            what = "is called as pandas calls an index, and has another whole number in each row"
        else:
            continue
        found.append(
            f"column {name!r} of {whole.title} {what}, and a model can learn from it how the rows were sorted; list it "
            "under data.drop, or, if it is a measurement, the inputs under data.features"
        )
    return found


def _is_distinct(values: np.ndarray) -> bool:
    """Whether they are whole numbers, each another one."""
    return bool((values == np.floor(values)).all()) and len(np.unique(values)) == len(values)


def _counts(values: np.ndarray) -> bool:
    """Whether they are 0, 1, 2, … or 1, 2, 3, …, in any order."""
    first = float(values.min())
    return first in (0.0, 1.0) and float(values.max()) - first == len(values) - 1 and _is_distinct(values)


def _fit(
    frame: _Frame, columns: _Columns, options: _Options, task: Task, several: bool, positive: Any
) -> dict[str, Any]:
    numeric: list[dict[str, Any]] = []
    categorical: list[dict[str, Any]] = []
    for name in columns.inputs(frame):
        is_category = frame.parse(name)[1].any() if columns.categorical is None else name in columns.categorical
        if is_category:
            categorical.append(_fit_categories(frame, name, options))
        else:
            numeric.append(_fit_numbers(frame, name, options))
    return {
        "numeric": numeric,
        "categorical": categorical,
        "missing": options.missing,
        "encode": options.encode,
        "targets": columns.targets,
        "several_targets": several,
        **_fit_target(frame, columns.targets, options, task, positive),
    }


def _fit_numbers(frame: _Frame, name: str, options: _Options) -> dict[str, Any]:
    numbers = frame.numbers(name, "column")
    present = numbers.present
    if not present.any():
        raise UserError(f"column {name!r} has no value in any training row of {frame.title}; list it under data.drop")
    moments = numbers.moments()
    _check_spread(name, moments)
    median = options.missing == "median"
    return {
        "name": name,
        "mean": moments.mean,
        "std": moments.std,
        "fill": float(np.median(numbers.less(moments.base)[present])) if median else moments.mean,
        "indicator": options.missing_indicator and not present.all(),
    } | ({"base": moments.base} if moments.base else {})


def _check_spread(name: str, moments: _Moments) -> None:
    if not (np.isfinite(moments.mean) and np.isfinite(moments.std)):
        raise UserError(f"column {name!r} holds numbers that are further apart than float64 can hold; scale them")


def _fit_categories(frame: _Frame, name: str, options: _Options) -> dict[str, Any]:
    labels = frame.labels(name)
    found = {label for label in labels if label is not None}
    if options.encode == "one_hot" and len(found) > options.max_categories:
        raise UserError(
            f"column {name!r} has {len(found)} different values in {len(labels)} training rows, and one-hot columns "
            f"are made for at most data.max_categories = {options.max_categories}; list it under data.drop, use "
            "'encode: index', or raise the limit"
        )
    categories: list[str | None] = [*_sorted(found)]
    if any(label is None for label in labels):
        categories.append(None)
    return {"name": name, "categories": categories}


def _fit_target(frame: _Frame, targets: list[str], options: _Options, task: Task, positive: Any) -> dict[str, Any]:
    if positive is not None and task != "binary":
        raise UserError(f"data.positive is for task binary, and the recipe's task is {task}")
    if options.standardize_target and task != "regression":
        raise UserError(f"data.standardize_target is for task regression, and the recipe's task is {task}")
    if task == "multilabel":
        return {"classes": targets}
    if task == "regression":
        if not options.standardize_target:
            return {}
        columns = _target_numbers(frame, targets)
        moments = [each.moments() for each in columns]
        for name, each in zip(targets, moments, strict=True):
            _check_spread(name, each)
        # along the first dimension of all columns, as ever: another order of summing would give other last bits
        together = np.stack([each.values for each in columns], axis=1)
        with np.errstate(over="ignore", invalid="ignore"):
            usual = zip(together.mean(axis=0).tolist(), together.std(axis=0).tolist(), strict=True)
        fitted = [both if each.usual else (each.mean, each.std) for each, both in zip(moments, usual, strict=True)]
        state = {
            "target_mean": [float(each.base + mean) for each, (mean, _) in zip(moments, fitted, strict=True)],
            "target_std": [std for _, std in fitted],
        }
        if any(each.base for each in moments):
            state |= {"target_base": [each.base for each in moments], "target_offset": [mean for mean, _ in fitted]}
        return state
    if len(targets) != 1:
        raise UserError(f"data.target: task {task} has one target column, and {_listed(targets)} are named")
    classes = _sorted(_target_labels(frame, targets[0]))
    if task == "binary":
        if len(classes) != 2:
            raise UserError(
                f"column {targets[0]!r} has {len(classes)} classes in the training rows ({_listed(classes)}), and task "
                "binary needs 2; for more of them use task: classification"
            )
        if positive is not None and str(positive) not in classes:
            raise UserError(
                f"data.positive: {str(positive)!r} is not a class of {targets[0]!r}, which has {_listed(classes)}"
            )
        if str(positive) == classes[0]:
            classes = classes[::-1]
    elif len(classes) < 2:
        raise UserError(
            f"column {targets[0]!r} has only the class {classes[0]!r} in the training rows of {frame.title}"
        )
    return {"classes": classes}


def _sorted(labels: Iterable[str]) -> list[str]:
    """Return different labels sorted: by value where all are numbers, so that '10' follows '9'; else as text."""
    unique = sorted(set(labels))
    try:
        return sorted(unique, key=float)
    except ValueError:
        return unique


# --------------------------------------------------------------------------------------------------------------------
# Encoding: fitted values and rows -> tensors


@dataclass(frozen=True)
class _Encoder:
    """Turns rows into tensors, by what was fitted."""

    state: dict[str, Any]
    task: Task
    dtype: np.dtype[Any]
    """float32 or float64, of inputs and targets."""
    id: str | None = None
    """The column that names the rows."""

    def encode(self, frame: _Frame, what: str, need_target: bool = True, refuse_unknown: bool = False) -> TensorSource:
        """Return the rows of `what`. `refuse_unknown`: whether a column whose categories are all unknown is an error.

        It is only a warning where a model is used: a file for prediction may be one row, and an older run is resumed.
        """
        state = self.state
        columns = [each["name"] for each in [*state["numeric"], *state["categorical"]]]
        has_target = all(name in frame.names for name in state["targets"])
        if not need_target and has_target:
            has_target = any(frame.table.column(name).null_count < len(frame) for name in state["targets"])
        wanted = [*columns, *(state["targets"] if need_target else [])]
        if lacking := [name for name in wanted if name not in frame.names]:
            raise UserError(
                f"{frame.title} lacks {_listed(lacking)}, which the training data had; it has {_listed(frame.names)}"
            )
        numeric = self._numbers(frame)
        indices, said = [], []
        for each in state["categorical"]:
            labels = frame.labels(each["name"])
            indices.append(_category_indices(each["categories"], labels))
            if unknown := _unknown(each, labels, indices[-1], what):
                if refuse_unknown and len(frame) > 1 and not indices[-1].any():
                    raise UserError(f"{unknown}; mend the column, or list it under data.drop")
                said.append(unknown)
        inputs: torch.Tensor | dict[str, torch.Tensor]
        if state["encode"] == "index":
            stacked = np.stack(indices, axis=1) if indices else np.zeros((len(frame), 0), dtype=np.int64)
            inputs = {"numeric": torch.from_numpy(numeric), "categorical": torch.from_numpy(stacked)}
        else:
            widths = [len(each["categories"]) for each in state["categorical"]]
            encoded = np.zeros((len(frame), numeric.shape[1] + sum(widths)), dtype=self.dtype)
            encoded[:, : numeric.shape[1]] = numeric
            start = numeric.shape[1]
            for index, width in zip(indices, widths, strict=True):
                known = np.flatnonzero(index)
                encoded[known, start + index[known] - 1] = 1
                start += width
            inputs = torch.from_numpy(encoded)
        names = {self.id: frame.table.column(self.id).to_pylist()} if self.id in frame.names else {}
        return TensorSource(inputs, self._targets(frame) if has_target else None, tuple(said), names)

    def _numbers(self, frame: _Frame) -> np.ndarray:
        """Return the numeric columns, then the indicators, (rows, columns)."""
        columns, indicators = [], []
        for each in self.state["numeric"]:
            numbers = frame.numbers(each["name"], "column")
            absent = ~numbers.present
            if self.state["missing"] == "error" and absent.any():
                raise UserError(
                    f"column {each['name']!r} has no value at {frame.places(absent)}; mend these rows, or set "
                    "data.missing to mean or median"
                )
            values = numbers.less(each["base"]) if "base" in each else numbers.values
            scaled = (np.where(absent, each["fill"], values) - each["mean"]) / each["std"]
            columns.append(self._cast(frame, f"column {each['name']!r}", scaled))
            if each["indicator"]:
                indicators.append(absent.astype(self.dtype))
        return np.stack([*columns, *indicators], axis=1) if columns else np.zeros((len(frame), 0), self.dtype)

    def _cast(self, frame: _Frame, what: str, values: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            cast = values.astype(self.dtype)
        if not (finite := np.isfinite(cast)).all():
            first = values[int(np.flatnonzero(~finite)[0])]
            raise UserError(
                f"{what} becomes {first:g} at {frame.places(~finite)}, which {self.dtype} cannot hold; mend or remove "
                "these rows, or scale the column"
            )
        return cast

    def _targets(self, frame: _Frame) -> torch.Tensor:
        state, targets = self.state, self.state["targets"]
        if self.task in ("classification", "binary"):
            labels = _target_labels(frame, targets[0])
            index = _category_indices(state["classes"], labels) - 1
            if (index < 0).any():
                first = int(np.flatnonzero(index < 0)[0])
                raise UserError(
                    f"column {targets[0]!r} holds {labels[first]!r} at {frame.places(index < 0)}, a class that no "
                    f"training row has; those have {_listed(state['classes'])}. With 'stratify: true' every split has "
                    "every class"
                )
            return torch.from_numpy(index if self.task == "classification" else index.astype(self.dtype))
        if self.task == "multilabel":
            ones = np.stack([_zeros_and_ones(frame, name) for name in targets], axis=1)
            return torch.from_numpy(ones.astype(self.dtype))
        columns = []
        for at, (name, numbers) in enumerate(zip(targets, _target_numbers(frame, targets), strict=True)):
            values = numbers.values
            if "target_base" in state:
                values = (numbers.less(state["target_base"][at]) - state["target_offset"][at]) / state["target_std"][at]
            elif "target_mean" in state:
                values = (values - state["target_mean"][at]) / state["target_std"][at]
            columns.append(self._cast(frame, f"target column {name!r}", values))
        return torch.from_numpy(np.stack(columns, axis=1) if state["several_targets"] else columns[0])


def _unknown(column: dict[str, Any], labels: np.ndarray, index: np.ndarray, what: str) -> str:
    """Return what is to be said of a column's categories that no training row has; nothing where there are none."""
    rows = np.flatnonzero(index == 0)
    if not len(rows):
        return ""
    counts = Counter(labels[rows].tolist())
    shown = ["(missing)" if label is None else repr(label) for label, _ in counts.most_common(5)]
    more = f" and {len(counts) - 5} more" if len(counts) > 5 else ""
    text = (
        f"column {column['name']!r}: {len(rows):,} of {len(labels):,} rows of {what} have a category that no training "
        f"row has, and count as unknown: {', '.join(shown)}{more}"
    )
    as_numbers = {_number(label): label for label in column["categories"]}
    for label in counts:
        if (number := _number(label)) is not None and number in as_numbers:
            return (
                f"{text}; {label!r} is here what {as_numbers[number]!r} is there (pandas writes whole numbers as "
                "decimal ones where some are missing), so write both in one way"
            )
    return text


def _number(label: str | None) -> float | None:
    try:
        return None if label is None else float(label)
    except ValueError:
        return None


def _category_indices(categories: Sequence[str | None], labels: np.ndarray) -> np.ndarray:
    """Return (rows,) int64: 1 and up for `categories` in order, 0 for what is not among them."""
    numbers = {category: index for index, category in enumerate(categories, start=1)}
    return np.fromiter((numbers.get(label, 0) for label in labels), np.int64, len(labels))


def _target_labels(frame: _Frame, name: str) -> np.ndarray:
    labels = frame.labels(name)
    _check_present(frame, name, np.array([label is None for label in labels], dtype=bool))
    return labels


def _target_numbers(frame: _Frame, names: Sequence[str]) -> list[_Numbers]:
    """Return the target columns."""
    columns = []
    for name in names:
        numbers = frame.numbers(name, "target column")
        _check_present(frame, name, ~numbers.present)
        columns.append(numbers)
    return columns


def _zeros_and_ones(frame: _Frame, name: str) -> np.ndarray:
    labels = np.char.lower(_target_labels(frame, name).astype(str))
    ones, zeros = np.isin(labels, ["1", "1.0", "true"]), np.isin(labels, ["0", "0.0", "false"])
    if not (ones | zeros).all():
        index = int(np.flatnonzero(~(ones | zeros))[0])
        raise UserError(
            f"target column {name!r} should hold 0 and 1, and {frame.place(index)} holds {frame.text(name, index)!r}"
        )
    return ones


def _check_present(frame: _Frame, name: str, absent: np.ndarray) -> None:
    if absent.any():
        raise UserError(f"target column {name!r} has no value at {frame.places(absent)}; mend or remove these rows")


# --------------------------------------------------------------------------------------------------------------------


def _meta(state: dict[str, Any], task: Task) -> DataMeta:
    names = [each["name"] for each in state["numeric"]]
    names += [f"{each['name']} is missing" for each in state["numeric"] if each["indicator"]]
    one_hot = state["encode"] == "one_hot"
    for each in state["categorical"]:
        shown = ["(missing)" if category is None else category for category in each["categories"]]
        names += [f"{each['name']}={category}" for category in shown] if one_hot else [each["name"]]
    classes: list[str] = state.get("classes", [])
    return TableMeta(
        input_shape=(len(names),) if one_hot else None,
        num_classes=len(classes) if task in ("classification", "binary") else None,
        class_names=tuple(classes) if classes else None,
        num_targets=len(state["targets"]) if task in ("multilabel", "regression") else None,
        feature_names=tuple(names),
        target_mean=tuple(state["target_mean"]) if "target_mean" in state else None,
        target_std=tuple(state["target_std"]) if "target_std" in state else None,
        cardinalities=None if one_hot else tuple(len(each["categories"]) + 1 for each in state["categorical"]),
    )


def _listed(names: Sequence[str], most: int = 12) -> str:
    shown = ", ".join(repr(name) for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
