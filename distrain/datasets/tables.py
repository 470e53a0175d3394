"""Tables: CSV and Parquet files whose columns become features and targets.

A CSV file is read as text, and what a column holds is decided on the training rows alone: numbers where every value
there is one, categories otherwise. So '01' stays '01' whichever file it comes from, and a file read for prediction
cannot change how a column is understood.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from distrain.config import Task, UserError, close_names
from distrain.datasets import Data, DataMeta, DataRequest, TensorSource, register, split_indices

if TYPE_CHECKING:  # imported where they are used: other data sets should not wait for them
    import pyarrow as pa

_SUFFIXES = (".csv", ".tsv", ".parquet", ".pq")
_MISSING_VALUES = ("", "NA", "N/A", "#N/A", "n/a", "NaN", "nan", "NULL", "null", "None")
_EXPECTED = "a .csv, .tsv or .parquet file, or a folder of them"


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
    one-hot columns, 0 as an index.

    `inputs` is (batch, columns) float32 or, with `encode: index`, {"numeric": (batch, numeric) float32, "categorical":
    (batch, categorical) int64}, whose sizes are in `meta.cardinalities`. `targets` by task: classification (batch,)
    int64, classes sorted (by value where all are numbers); binary (batch,) float32, where 1 is `positive` or else the
    class sorted last; multilabel (batch, columns) float32 from columns of 0 and 1; regression (batch,) float32, or
    (batch, columns) where `target` is a list, standardised with `standardize_target`.
    """
    options = _Options(missing, missing_indicator, encode, max_categories, standardize_target)
    reader = _Reader(delimiter, tuple(missing_values))
    targets = [target] if isinstance(target, str) else target
    frames = _split_frames(request, reader, targets)
    if request.state is None:
        columns = _Columns(targets, features, categorical, drop)
        state = _fit(frames["train"], columns, options, request.task, isinstance(target, list), positive)
    else:
        state = request.state
    splits = {name: _encode(state, frame, request.task) for name, frame in frames.items()}

    def read(path: Path) -> TensorSource:
        return _encode(state, reader.read(path), request.task, need_target=False)

    files = tuple(dict.fromkeys(path for frame in frames.values() for path, _ in frame.files))
    return Data(dict(splits), _meta(state, request.task), state, read, files)


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
        return _Frame(self.table.take(indices), self.rows[indices], self.files)

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

    def parse(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return a column as (values float64, NaN where missing or no number; mask of those that are no number)."""
        import pandas as pd
        import pyarrow as pa

        column = _plain(self.table.column(name))
        kind = column.type
        if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
            return column.cast(pa.float64(), safe=False).to_numpy(), np.zeros(len(self), dtype=bool)
        if pa.types.is_null(kind):
            return np.full(len(self), np.nan), np.zeros(len(self), dtype=bool)
        present = ~column.is_null().to_numpy()
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            return np.full(len(self), np.nan), present
        values = pd.to_numeric(column.to_pandas(), errors="coerce").to_numpy(np.float64, na_value=np.nan)
        return values, present & np.isnan(values)

    def numbers(self, name: str, what: str) -> np.ndarray:
        """Return a column as float64 (rows,), NaN where missing; raises UserError for other text and for infinities."""
        values, bad = self.parse(name)
        if bad.any():
            index = int(np.flatnonzero(bad)[0])
            raise UserError(
                f"{what} {name!r} should hold numbers, and {self.place(index)} holds {self.text(name, index)!r}; "
                "mend it, list the column under data.categorical, or drop it"
            )
        if np.isinf(values).any():
            raise UserError(
                f"{what} {name!r} is infinite at {self.places(np.isinf(values))}; mend or remove these rows"
            )
        return values

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
        for file, each in zip(files[1:], tables[1:], strict=True):
            if set(each.column_names) != set(tables[0].column_names):
                odd = sorted(set(each.column_names) ^ set(tables[0].column_names))
                raise UserError(f"{file} and {files[0]} should have the same columns, and differ in {_listed(odd)}")
        try:
            joined = pa.concat_tables(
                [each.select(tables[0].column_names) for each in tables], promote_options="permissive"
            )
        except pa.ArrowException as error:
            raise UserError(f"the files of {path} do not fit together: {error}") from error
        counts = [each.num_rows for each in tables]
        return _Frame(joined, np.arange(sum(counts)), tuple(zip(files, counts, strict=True)))

    def _read_file(self, path: Path) -> pa.Table:
        import pyarrow as pa
        from pyarrow import parquet

        suffix = path.suffix.lower()
        if suffix not in _SUFFIXES:
            raise UserError(f"{path}: a table is {_EXPECTED}, not {suffix or 'a file without an ending'}")
        try:
            result = parquet.read_table(path) if suffix in (".parquet", ".pq") else self._read_csv(path, suffix)
        except (pa.ArrowException, UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{path} cannot be read: {error}") from error
        if not result.num_rows:
            raise UserError(f"{path} has no rows")
        return result

    def _read_csv(self, path: Path, suffix: str) -> pa.Table:
        import pyarrow as pa
        from pyarrow import csv as arrow_csv

        delimiter = self.delimiter or ("\t" if suffix == ".tsv" else ",")
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = next((row for row in csv.reader(file, delimiter=delimiter) if row), None)
        if header is None:
            raise UserError(f"{path} is empty; its first line should name the columns")
        if twice := sorted({name for name in header if header.count(name) > 1}):
            raise UserError(f"{path} names {_listed(twice)} more than once; give each column a name of its own")
        return arrow_csv.read_csv(
            path,
            parse_options=arrow_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            convert_options=arrow_csv.ConvertOptions(
                column_types={name: pa.string() for name in header},
                null_values=list(self.missing_values),
                strings_can_be_null=True,
            ),
        )


def _split_frames(request: DataRequest, reader: _Reader, targets: Sequence[str]) -> dict[str, _Frame]:
    section = request.section
    if isinstance(section.split, dict):
        if "train" not in section.split:
            raise UserError(f"data.split names {_listed(sorted(section.split))} and no file for train")
        return {name: reader.read(request.base / path) for name, path in section.split.items()}
    whole = reader.read(request.path(_EXPECTED))
    labels = None
    if section.stratify and request.task in ("classification", "binary") and targets[0] in whole.names:
        labels = whole.labels(targets[0]).astype(str)
    indices = split_indices(len(whole), section, request.seed, labels)
    return {name: whole.take(index) for name, index in indices.items()}


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
        taken = {**dict.fromkeys(self.drop, "data.drop"), **dict.fromkeys(self.targets, "data.target")}
        for key, names in (("features", self.features or []), ("categorical", self.categorical or [])):
            problems += [f"data.{key}: {name!r} is also in {taken[name]}" for name in names if name in taken]
        inputs = [name for name in self.features or frame.names if name not in taken]
        if self.features is not None:
            outside = [name for name in self.categorical or [] if name not in self.features and name not in taken]
            problems += [f"data.categorical: {name!r} is not among data.features" for name in outside]
        if not inputs:
            problems.append("no column is left for the inputs")
        if problems:
            raise UserError("\n".join(problems))
        return inputs


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
    values = frame.numbers(name, "column")
    present = values[~np.isnan(values)]
    if not len(present):
        raise UserError(f"column {name!r} has no value in any training row of {frame.title}; list it under data.drop")
    mean, std = float(present.mean()), float(present.std())
    return {
        "name": name,
        "mean": mean,
        # A column that is constant (but for rounding) stays 0 where it keeps its value.
        "std": std if std > 1e-12 * max(1.0, abs(mean)) else 1.0,
        "fill": float(np.median(present)) if options.missing == "median" else mean,
        "indicator": options.missing_indicator and len(present) < len(values),
    }


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
        values = _target_numbers(frame, targets)
        std = values.std(axis=0)
        return {"target_mean": values.mean(axis=0).tolist(), "target_std": np.where(std > 0, std, 1.0).tolist()}
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


def _encode(state: dict[str, Any], frame: _Frame, task: Task, need_target: bool = True) -> TensorSource:
    columns = [each["name"] for each in [*state["numeric"], *state["categorical"]]]
    has_target = all(name in frame.names for name in state["targets"])
    if not need_target and has_target:
        has_target = any(frame.table.column(name).null_count < len(frame) for name in state["targets"])
    wanted = [*columns, *(state["targets"] if need_target else [])]
    if lacking := [name for name in wanted if name not in frame.names]:
        raise UserError(
            f"{frame.title} lacks {_listed(lacking)}, which the training data had; it has {_listed(frame.names)}"
        )
    numeric = _encode_numbers(state, frame)
    indices = [_category_indices(each["categories"], frame.labels(each["name"])) for each in state["categorical"]]
    inputs: torch.Tensor | dict[str, torch.Tensor]
    if state["encode"] == "index":
        stacked = np.stack(indices, axis=1) if indices else np.zeros((len(frame), 0), dtype=np.int64)
        inputs = {"numeric": torch.from_numpy(numeric), "categorical": torch.from_numpy(stacked)}
    else:
        widths = [len(each["categories"]) for each in state["categorical"]]
        encoded = np.zeros((len(frame), numeric.shape[1] + sum(widths)), dtype=np.float32)
        encoded[:, : numeric.shape[1]] = numeric
        start = numeric.shape[1]
        for index, width in zip(indices, widths, strict=True):
            known = np.flatnonzero(index)
            encoded[known, start + index[known] - 1] = 1
            start += width
        inputs = torch.from_numpy(encoded)
    return TensorSource(inputs, _encode_target(state, frame, task) if has_target else None)


def _encode_numbers(state: dict[str, Any], frame: _Frame) -> np.ndarray:
    """Return the numeric columns, then the indicators, (rows, columns) float32."""
    columns, indicators = [], []
    for each in state["numeric"]:
        values = frame.numbers(each["name"], "column")
        absent = np.isnan(values)
        if state["missing"] == "error" and absent.any():
            raise UserError(
                f"column {each['name']!r} has no value at {frame.places(absent)}; mend these rows, or set data.missing "
                "to mean or median"
            )
        columns.append((np.where(absent, each["fill"], values) - each["mean"]) / each["std"])
        if each["indicator"]:
            indicators.append(absent)
    return np.stack([*columns, *indicators], axis=1).astype(np.float32) if columns else np.zeros((len(frame), 0), "f4")


def _category_indices(categories: Sequence[str | None], labels: np.ndarray) -> np.ndarray:
    """Return (rows,) int64: 1 and up for `categories` in order, 0 for what is not among them."""
    numbers = {category: index for index, category in enumerate(categories, start=1)}
    return np.fromiter((numbers.get(label, 0) for label in labels), np.int64, len(labels))


def _encode_target(state: dict[str, Any], frame: _Frame, task: Task) -> torch.Tensor:
    targets = state["targets"]
    if task in ("classification", "binary"):
        labels = _target_labels(frame, targets[0])
        index = _category_indices(state["classes"], labels) - 1
        if (index < 0).any():
            first = int(np.flatnonzero(index < 0)[0])
            raise UserError(
                f"column {targets[0]!r} holds {labels[first]!r} at {frame.places(index < 0)}, a class that no training "
                f"row has; those have {_listed(state['classes'])}. With 'stratify: true' every split has every class"
            )
        return torch.from_numpy(index if task == "classification" else index.astype(np.float32))
    if task == "multilabel":
        values = np.stack([_zeros_and_ones(frame, name) for name in targets], axis=1)
        return torch.from_numpy(values.astype(np.float32))
    values = _target_numbers(frame, targets)
    if "target_mean" in state:
        values = (values - state["target_mean"]) / state["target_std"]
    return torch.from_numpy((values if state["several_targets"] else values[:, 0]).astype(np.float32))


def _target_labels(frame: _Frame, name: str) -> np.ndarray:
    labels = frame.labels(name)
    _check_present(frame, name, np.array([label is None for label in labels], dtype=bool))
    return labels


def _target_numbers(frame: _Frame, names: Sequence[str]) -> np.ndarray:
    """Return the target columns, (rows, columns) float64."""
    columns = []
    for name in names:
        values = frame.numbers(name, "target column")
        _check_present(frame, name, np.isnan(values))
        columns.append(values)
    return np.stack(columns, axis=1)


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
