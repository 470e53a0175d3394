"""Tables: CSV, JSON Lines and Parquet files whose columns become features and targets.

A CSV file is read as text. The training rows alone decide the type of a column: numbers if every value is one,
otherwise categories. So '01' stays '01' in every file, and a file read for prediction changes no column's type.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from distrain.config import Form, UserError
from distrain.config.registry import datasets
from distrain.datasets.base import Data, DataMeta, DataRequest, TensorSource
from distrain.datasets.table_columns import (
    Columns,
    Options,
    almost_numbers,
    codes,
    fit,
    not_trained,
    row_numbers,
    spelled_alike,
    target_labels,
    target_numbers,
)
from distrain.datasets.table_files import Frame, TableReader, listed, pooled, split_frames

_TYPED = re.compile(r"[tT]rue|TRUE|[fF]alse|FALSE|\d{4}-\d\d-\d\d([ T]\d\d:\d\d.*)?")
"""Truth values, and days and times as ISO 8601 writes them."""
MISSING_VALUES = ("", "NA", "N/A", "#N/A", "n/a", "NaN", "nan", "NULL", "null", "None")


@dataclass(frozen=True)
class TableMeta(DataMeta):
    """The facts of a table with `encode: index`."""

    cardinalities: tuple[int, ...] | None = None
    """Number of indices of each categorical column, with 0 (unknown): the sizes of the embeddings."""


@datasets.register("table", tasks=["classification", "binary", "multilabel", "regression"])
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
    missing_values: list[str] = list(MISSING_VALUES),  # noqa: B006 - never changed
) -> Data:
    """Rows of CSV, JSON Lines or Parquet files: numeric columns standardised, categorical ones one-hot or as indices.

    Everything is fitted on the training rows alone. A numeric column becomes (value - mean) / std, by the mean and
    population standard deviation of the values present; `missing` replaces a missing value by the column's mean or
    median, and `missing_indicator` adds a 0/1 column if training rows lack values. Missing is a category of its own if
    training rows lack one. A category not seen in training is unknown: all zeros in one-hot columns, 0 as an index; it
    is a warning with the number of rows, and an error if it is every row of a split.

    Unnamed columns (the index of pandas) are inputs only if `features` or `categorical` names them. The column `id` is
    no input: it identifies the rows in predictions.

    `inputs` is (batch, columns) float32 or, with `encode: index`, {"numeric": (batch, numeric) float32, "categorical":
    (batch, categorical) int64}, with sizes in `meta.cardinalities`. `targets` by task: classification (batch,) int64,
    classes sorted (by value if all are numbers); binary (batch,) float32, where 1 is `positive` or else the class
    sorted last; multilabel (batch, columns) float32 from columns of 0 and 1; regression (batch,) float32, or (batch,
    columns) if `target` is a list, standardised with `standardize_target`. `train.precision: fp64` replaces float32 by
    float64.
    """
    options = Options(missing, missing_indicator, encode, max_categories, standardize_target)
    reader = TableReader(delimiter, tuple(missing_values))
    targets = [target] if isinstance(target, str) else target
    rows, frames = (None, {}) if request.inputs_only else split_frames(request, reader, targets)
    warnings: list[str] = []
    if request.state is None:
        assert rows is not None
        columns = Columns(targets, features, categorical, drop, [id] if id is not None else [])
        state = fit(frames["train"], columns, options, request.task, isinstance(target, list), positive)
        warnings += [] if request.split_paths() else pooled(rows)
        warnings += (
            not_trained(frames, columns)
            + columns.unnamed(rows)
            + row_numbers(rows, columns, state)
            + spelled_alike(state)
        )
        warnings += codes(rows, columns, state) + almost_numbers(frames["train"], columns, state)
    else:
        state = request.state
    encoder = Encoder(state, request.task, np.dtype(np.float64 if request.dtype == torch.float64 else np.float32), id)
    splits = {
        name: encoder.encode(frame, f"the split {name!r}", refuse_unknown=request.state is None)
        for name, frame in frames.items()
    }

    def read(path: Path) -> TensorSource:
        return encoder.encode(reader.read(path), str(path), need_target=False)

    files = tuple(dict.fromkeys(path for frame in frames.values() for path, _ in frame.files))
    return Data(dict(splits), _meta(state, request.task), state, read, files, tuple(warnings))


# --------------------------------------------------------------------------------------------------------------------
# Encoding: fitted state and rows -> tensors


@dataclass(frozen=True)
class Encoder:
    """Turns rows into tensors by the fitted state."""

    state: dict[str, Any]
    task: Form
    dtype: np.dtype[Any]
    """float32 or float64, of inputs and targets."""
    id: str | None = None
    """The column that identifies the rows."""

    def encode(self, frame: Frame, what: str, need_target: bool = True, refuse_unknown: bool = False) -> TensorSource:
        """Return the rows of `what`. `refuse_unknown`: whether a column with only unknown categories is an error.

        It is a warning when a trained model is used: a file for prediction may be one row, and old runs must resume.
        """
        state = self.state
        columns = [each["name"] for each in [*state["numeric"], *state["categorical"]]]
        wanted = [*columns, *(state["targets"] if need_target else [])]
        if lacking := [name for name in wanted if name not in frame.names]:
            raise UserError(
                f"{frame.title} lacks {listed(lacking)}, which the training data had; it has {listed(frame.names)}"
            )
        numeric = self._numbers(frame)
        indices, warnings = [], self._without_value(frame, what, refuse_unknown)
        for each in state["categorical"]:
            labels = frame.labels(each["name"])
            indices.append(_category_indices(each["categories"], labels))
            if unknown := _unknown(each, labels, indices[-1], what):
                if refuse_unknown and len(frame) > 1 and not indices[-1].any():
                    raise UserError(f"{unknown}; correct the column, or list it under data.drop")
                warnings.append(unknown)
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
        targets = self.targets(frame) if need_target or self.has_targets(frame) else None
        return TensorSource(inputs, targets, tuple(warnings), names)

    def _without_value(self, frame: Frame, what: str, refuse: bool) -> list[str]:
        """Return a warning for each column of numbers without a value in any row; raises UserError if `refuse`."""
        found = []
        for each in self.state["numeric"] if len(frame) > 1 else ():
            if frame.table.column(each["name"]).null_count == len(frame):
                text = (
                    f"column {each['name']!r}: none of the {len(frame):,} rows of {what} has a value, and the training "
                    f"rows' {self.state['missing']} stands in for all of them"
                )
                if refuse:
                    raise UserError(f"{text}; correct the column, or list it under data.drop")
                found.append(text)
        return found

    def _numbers(self, frame: Frame) -> np.ndarray:
        """Return the numeric columns, then the indicators, (rows, columns)."""
        columns, indicators = [], []
        for each in self.state["numeric"]:
            numbers = frame.numbers(each["name"], "column")
            absent = ~numbers.present
            if self.state["missing"] == "error" and absent.any():
                raise UserError(
                    f"column {each['name']!r} has no value at {frame.places(absent)}; correct these rows, or set "
                    "data.missing to mean or median"
                )
            values = numbers.less(each["base"]) if "base" in each else numbers.values
            scaled = (np.where(absent, each["fill"], values) - each["mean"]) / each["std"]
            columns.append(self._cast(frame, f"column {each['name']!r}", scaled))
            if each["indicator"]:
                indicators.append(absent.astype(self.dtype))
        return np.stack([*columns, *indicators], axis=1) if columns else np.zeros((len(frame), 0), self.dtype)

    def _cast(self, frame: Frame, what: str, values: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            cast = values.astype(self.dtype)
        if not (finite := np.isfinite(cast)).all():
            first = values[int(np.flatnonzero(~finite)[0])]
            raise UserError(
                f"{what} becomes {first:g} at {frame.places(~finite)}, which {self.dtype} cannot hold; correct or "
                "remove these rows, or scale the column"
            )
        return cast

    def has_targets(self, frame: Frame) -> bool:
        """Whether a file for prediction has the columns of the targets, and a value in one of them."""
        targets = self.state["targets"]
        return all(name in frame.names for name in targets) and any(
            frame.table.column(name).null_count < len(frame) for name in targets
        )

    def targets(self, frame: Frame) -> torch.Tensor:
        """Return the targets of rows, from the columns `state["targets"]`; raises UserError for what cannot be one."""
        state, targets = self.state, self.state["targets"]
        if self.task in ("classification", "binary"):
            labels = target_labels(frame, targets[0])
            index = _category_indices(state["classes"], labels) - 1
            if (index < 0).any():
                first = int(np.flatnonzero(index < 0)[0])
                raise UserError(
                    f"column {targets[0]!r} holds {labels[first]!r} at {frame.places(index < 0)}, a class that no "
                    f"training row has; they have {listed(state['classes'])}. Correct it; of rows that are split by "
                    "fractions, 'data.stratify: true' gives every split every class"
                )
            return torch.from_numpy(index if self.task == "classification" else index.astype(self.dtype))
        if self.task == "multilabel":
            ones = np.stack([_zeros_and_ones(frame, name) for name in targets], axis=1)
            return torch.from_numpy(ones.astype(self.dtype))
        columns = []
        for at, (name, numbers) in enumerate(zip(targets, target_numbers(frame, targets), strict=True)):
            values = numbers.values
            if "target_base" in state:
                values = (numbers.less(state["target_base"][at]) - state["target_offset"][at]) / state["target_std"][at]
            elif "target_mean" in state:
                values = (values - state["target_mean"][at]) / state["target_std"][at]
            columns.append(self._cast(frame, f"target column {name!r}", values))
        return torch.from_numpy(np.stack(columns, axis=1) if state["several_targets"] else columns[0])


def _unknown(column: dict[str, Any], labels: np.ndarray, index: np.ndarray, what: str) -> str:
    """Return the warning about a column's categories that no training row has; empty if there are none."""
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
                f"{text}; {label!r} here is {as_numbers[number]!r} in the training rows (pandas writes integers as "
                "decimals if some are missing), so write both alike"
            )
    return text


def _number(label: str | None) -> float | None:
    try:
        return None if label is None else float(label)
    except ValueError:
        return None


def _category_indices(categories: Sequence[str | None], labels: np.ndarray) -> np.ndarray:
    """Return (rows,) int64: 1 and up for `categories` in order, 0 for others.

    A day, a time, and true and false are text in one format of files and not in another: they are known by their value.
    """
    numbers = {category: index for index, category in enumerate(categories, start=1)}
    if others := {label for label in labels if label not in numbers and label is not None}:
        known = {value: numbers[each] for each in reversed(categories) if (value := _typed(each)) is not None}
        numbers |= {label: known[value] for label in others if (value := _typed(label)) in known}
    return np.fromiter((numbers.get(label, 0) for label in labels), np.int64, len(labels))


def _typed(label: str | None) -> datetime | bool | None:
    """Return the time or the truth that a label says; None where it says neither."""
    if label is None or not _TYPED.fullmatch(label):
        return None
    if label[0] in "tTfF":
        return label[0] in "tT"
    try:
        found = datetime.fromisoformat(label)
    except ValueError:
        return None
    return found if found.tzinfo is None else found.astimezone(UTC).replace(tzinfo=None)


def _zeros_and_ones(frame: Frame, name: str) -> np.ndarray:
    labels = np.char.lower(target_labels(frame, name).astype(str))
    ones, zeros = np.isin(labels, ["1", "1.0", "true"]), np.isin(labels, ["0", "0.0", "false"])
    if not (ones | zeros).all():
        index = int(np.flatnonzero(~(ones | zeros))[0])
        raise UserError(
            f"target column {name!r} should hold 0 and 1, and {frame.place(index)} holds {frame.text(name, index)!r}"
        )
    return ones


# --------------------------------------------------------------------------------------------------------------------


def _meta(state: dict[str, Any], task: Form) -> DataMeta:
    names = [each["name"] for each in state["numeric"]]
    names += [f"{each['name']} is missing" for each in state["numeric"] if each["indicator"]]
    one_hot = state["encode"] == "one_hot"
    for each in state["categorical"]:
        shown = ["(missing)" if category is None else category for category in each["categories"]]
        names += [f"{each['name']}={category}" for category in shown] if one_hot else [each["name"]]
    return TableMeta(
        input_shape=(len(names),) if one_hot else None,
        feature_names=tuple(names),
        cardinalities=None if one_hot else tuple(len(each["categories"]) + 1 for each in state["categorical"]),
        **target_facts(state, task),
    )


def target_facts(state: dict[str, Any], task: Form) -> dict[str, Any]:
    """Return what a `DataMeta` says of fitted targets."""
    classes: list[str] = state.get("classes", [])
    return {
        "num_classes": len(classes) if task in ("classification", "binary") else None,
        "class_names": tuple(classes) if classes else None,
        "num_targets": len(state["targets"]) if task in ("multilabel", "regression") else None,
        **{key: tuple(state[key]) for key in ("target_mean", "target_std") if key in state},
    }
