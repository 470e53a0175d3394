"""The input columns of a table, and what is fitted to each on the training rows, as JSON values."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from distrain.config import Form, UserError, close_names
from distrain.datasets.table_files import Frame, listed
from distrain.datasets.table_numbers import Moments, Numbers, beyond_whole

_KEY = re.compile(r"index|level_\d+|(.*[\W_])?(id|ID|Id)|.*[a-z](Id|ID)")
"""Names that pandas gives to an index as a column, and those of identifiers: id, user_id, PassengerId."""
_FEWEST_COUNTED = 10  # rows: among fewer, a measurement may well be 1, 2, 3
_PLAIN = r"\d+(\.\d*)?|\.\d+"
_WITH_COMMA = r"\d+,\d+|\d{1,3}(,\d{3})+\.\d+|\d{1,3}(\.\d{3})+,\d+"
_SPACED = r"\d{1,3}([ _'’\u00a0\u202f]\d{3})+([.,]\d+)?"
_MONEY = "[$€£¥]"
_DECORATED = re.compile(
    rf"\(?[+\-−]?\s?{_MONEY}?\s?[+\-−]?({_WITH_COMMA}|{_SPACED}|{_PLAIN})([eE][+\-−]?\d+)?\s?(%|‰|{_MONEY})?\)?"
)
"""Numbers that have more than digits, a sign and a point: a comma, a percent sign, that of a currency, …"""
_MOSTLY = 0.9
"""A column with a larger share of numbers was probably meant to have nothing else."""


@dataclass(frozen=True)
class Options:
    """How columns become inputs and targets: see `table`."""

    missing: Literal["mean", "median", "error"]
    missing_indicator: bool
    encode: Literal["one_hot", "index"]
    max_categories: int
    standardize_target: bool


@dataclass(frozen=True)
class Columns:
    """The columns that a recipe names."""

    targets: list[str]
    features: list[str] | None
    categorical: list[str] | None
    drop: list[str]
    id: list[str]

    def inputs(self, frame: Frame) -> list[str]:
        """Return the names of the input columns; raises one UserError with every invalid name."""
        problems = []
        for key, names in vars(self).items():
            problems += [
                f"data.{key.replace('targets', 'target')}: {frame.title} has no column {name!r}"
                + (close_names(name, frame.names) or f"; it has {listed(frame.names)}")
                for name in names or []
                if name not in frame.names
            ]
        if not self.targets:
            problems.append("data.target: no column is named")
        used = {
            **dict.fromkeys(self.drop, "data.drop"),
            **dict.fromkeys(self.id, "data.id"),
            **dict.fromkeys(self.targets, "data.target"),
        }
        problems += [f"data.id: {name!r} is also in data.target" for name in self.id if name in self.targets]
        for key, names in (("features", self.features or []), ("categorical", self.categorical or [])):
            problems += [f"data.{key}: {name!r} is also in {used[name]}" for name in names if name in used]
        inputs = [name for name in self.features or self._candidates(frame) if name not in used]
        if self.features is not None:
            outside = [name for name in self.categorical or [] if name not in self.features and name not in used]
            problems += [f"data.categorical: {name!r} is not among data.features" for name in outside]
        if not inputs:
            problems += ["no column is left for the inputs", *self.unnamed(frame)]
        if problems:
            raise UserError("\n".join(problems))
        return inputs

    def _candidates(self, frame: Frame) -> list[str]:
        """Return the columns that may be inputs without data.features."""
        return [name for name in frame.names if name not in frame.unnamed or name in (self.categorical or [])]

    def unnamed(self, frame: Frame) -> list[str]:
        """Return a warning for each column that is skipped because it has no name."""
        if self.features is not None:
            return []
        used = [*self._candidates(frame), *self.targets, *self.drop, *self.id]
        return [
            f"column {name!r} of {frame.title} is {what}, and is skipped; to use it, name it in data.features or "
            "data.categorical"
            for name, what in frame.unnamed.items()
            if name not in used
        ]


def not_trained(frames: Mapping[str, Frame], columns: Columns) -> list[str]:
    """Return a warning for the columns of each other split that the training split lacks, unless features are named."""
    if columns.features is not None:
        return []
    train = frames["train"]
    found = []
    for frame in frames.values():
        known = {*train.names, *frame.unnamed}
        if further := [name for name in frame.names if name not in known]:
            found.append(
                f"{frame.title} has columns that {train.title} has not, and that are no inputs: {listed(further)}; "
                "spell them as there or, if they are not meant, list the inputs under data.features"
            )
    return found


def row_numbers(frame: Frame, columns: Columns, state: dict[str, Any]) -> list[str]:
    """Return a warning for each input that numbers the rows, unless data.features names it."""
    if columns.features is not None or len(frame) < _FEWEST_COUNTED:
        return []
    found = []
    rows = [count for _, count in frame.files]
    for each in state["numeric"]:
        name, reaches = each["name"], abs(each["mean"]) + 4 * each["std"]
        is_key = _KEY.fullmatch(name) is not None
        if not is_key and ("base" in each or reaches < max(rows) / 2):
            continue  # without reading the column again
        values = frame.parse(name)[0].values
        if _counts(values) or all(map(_counts, np.split(values, np.cumsum(rows)[:-1]))):
            what = f"numbers the rows ({values.min():.0f} to {values.max():.0f})"
        elif is_key and _is_distinct(values):
            what = "is named like an index or an identifier, and has another integer in each row"
        else:
            continue
        found.append(
            f"column {name!r} of {frame.title} {what}, and a model can learn from it how the rows were sorted; list it "
            "under data.drop or, if it is a measurement, the inputs under data.features"
        )
    return found


def codes(frame: Frame, columns: Columns, state: dict[str, Any]) -> list[str]:
    """Return a warning for each numeric input whose texts begin with zeros, unless data.features names it."""
    names = [each["name"] for each in state["numeric"]] if columns.features is None else []
    return [
        f"column {name!r} of {frame.title} holds texts with leading zeros, such as {text!r}, and is read as numbers; "
        "list it under data.categorical if they are codes or, if it is a measurement, the inputs under data.features"
        for name in names
        if (text := frame.with_leading_zero(name)) is not None
    ]


def _is_distinct(values: np.ndarray) -> bool:
    """Whether they are distinct integers."""
    return bool((values == np.floor(values)).all()) and len(np.unique(values)) == len(values)


def _counts(values: np.ndarray) -> bool:
    """Whether they are 0, 1, 2, … or 1, 2, 3, …, in any order."""
    first = float(values.min())
    return first in (0.0, 1.0) and float(values.max()) - first == len(values) - 1 and _is_distinct(values)


def fit(frame: Frame, columns: Columns, options: Options, task: Form, several: bool, positive: Any) -> dict[str, Any]:
    """Return everything fitted to the training rows; raises UserError."""
    numeric: list[dict[str, Any]] = []
    categorical: list[dict[str, Any]] = []
    for name in columns.inputs(frame):
        if columns.categorical is not None:
            is_category = name in columns.categorical
        elif is_category := bool(frame.parse(name)[1].any()):
            _refuse_decorated(frame, name)
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
        **fit_target(frame, columns.targets, options, task, positive),
    }


def _refuse_decorated(frame: Frame, name: str) -> None:
    """Raise UserError for a column whose texts are mostly numbers with more than digits, which would be categories."""
    texts = frame.labels(name)[frame.parse(name)[1]]
    labels = [text for text in texts if _DECORATED.fullmatch(text.strip())]
    if len(labels) >= _MOSTLY * len(texts):
        raise UserError(
            f"column {name!r} of {frame.title} holds numbers such as {labels[0]!r}, which are read as text; write them "
            "with digits and a decimal point alone (no comma, space, percent sign or currency) or, if they are names, "
            "list the column under data.categorical"
        )


def almost_numbers(frame: Frame, columns: Columns, state: dict[str, Any]) -> list[str]:
    """Return a warning for each column of which a few values alone are no numbers, unless data.categorical names it."""
    if columns.categorical is not None:
        return []
    found = []
    for each in state["categorical"]:
        numbers, others = frame.parse(each["name"])
        count = np.count_nonzero(numbers.present)
        if count < max(_FEWEST_COUNTED, _MOSTLY * (count + np.count_nonzero(others))):
            continue
        labels = sorted(set(frame.labels(each["name"])[others]))
        found.append(
            f"column {each['name']!r} of {frame.title} holds numbers but for {listed(labels)} at "
            f"{frame.places(others)}, and so counts as {len(each['categories'])} categories; correct these, list them "
            "under data.missing_values, or list the column under data.categorical"
        )
    return found


def _fit_numbers(frame: Frame, name: str, options: Options) -> dict[str, Any]:
    numbers = frame.numbers(name, "column")
    present = numbers.present
    if not present.any():
        raise UserError(f"column {name!r} has no value in any training row of {frame.title}; list it under data.drop")
    if numbers.exact is None and beyond_whole(numbers.values) and (one := frame.indistinct(name, numbers)) is not None:
        raise UserError(
            f"column {name!r} holds {one[0]} and {one[1]}, which float64 cannot tell apart; list it under "
            "data.categorical or data.drop, or write less of the numbers"
        )
    moments = _moments(name, numbers)
    median = options.missing == "median"
    return {
        "name": name,
        "mean": moments.mean,
        "std": moments.std,
        "fill": float(np.median(numbers.less(moments.base)[present])) if median else moments.mean,
        "indicator": options.missing_indicator and not present.all(),
    } | ({"base": moments.base} if moments.base else {})


def _moments(name: str, numbers: Numbers) -> Moments:
    moments = numbers.moments()
    if not (np.isfinite(moments.mean) and np.isfinite(moments.std)):
        raise UserError(f"column {name!r} holds numbers that are further apart than float64 can hold; scale them")
    return moments


def spelled_alike(state: dict[str, Any]) -> list[str]:
    """Return a warning for each column with categories, or classes, that are one value in two spellings."""
    columns = [(f"column {each['name']!r}", each["categories"]) for each in state["categorical"]]
    if len(state["targets"]) == 1 and "classes" in state:
        columns.append((f"target column {state['targets'][0]!r}", state["classes"]))
    found = []
    for what, labels in columns:
        known: dict[Any, str] = {}
        pairs = [(known.setdefault(_spelling(label), label), label) for label in labels if label is not None]
        if twice := [f"{one!r} and {other!r}" for one, other in pairs if one != other]:
            more = f", and {len(twice) - 3} more" if len(twice) > 3 else ""
            found.append(
                f"{what}: {', '.join(twice[:3])}{more} differ only in how they are written, and count as different "
                "values; write them alike if they are one"
            )
    return found


def _spelling(label: str) -> Any:
    """Return what two spellings of one value share: numbers, or text without its spaces and its case."""
    try:
        return float(label)
    except ValueError:
        return "".join(label.split()).casefold()


def _fit_categories(frame: Frame, name: str, options: Options) -> dict[str, Any]:
    labels = frame.labels(name)
    found = {label for label in labels if label is not None}
    if options.encode == "one_hot" and len(found) > options.max_categories:
        raise UserError(
            f"column {name!r} has {len(found)} different values in {len(labels)} training rows, more than "
            f"data.max_categories = {options.max_categories} one-hot columns; list it under data.drop, use 'encode: "
            "index', or raise the limit"
        )
    categories: list[str | None] = [*_sorted(found)]
    if any(label is None for label in labels):
        categories.append(None)
    return {"name": name, "categories": categories}


def fit_target(frame: Frame, targets: list[str], options: Options, task: Form, positive: Any) -> dict[str, Any]:
    """Return what is fitted to the target columns of the training rows; raises UserError."""
    for key, given, needed in (
        ("positive", positive is not None, "binary"),
        ("standardize_target", options.standardize_target, "regression"),
    ):
        if given and task != needed:
            raise UserError(f"data.{key} is for task {needed}, and the recipe's task is {task}")
    if task == "multilabel":
        return {"classes": targets}
    if task == "regression":
        if not options.standardize_target:
            return {}
        columns = target_numbers(frame, targets)
        moments = [_moments(name, each) for name, each in zip(targets, columns, strict=True)]
        # summed over all columns at once: another order of summing would change the last bits of stored states
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
        raise UserError(f"data.target: task {task} has one target column, and {listed(targets)} are named")
    classes = _sorted(target_labels(frame, targets[0]))
    if task == "binary":
        if len(classes) != 2:
            raise UserError(
                f"column {targets[0]!r} has {len(classes)} classes in the training rows ({listed(classes)}), and task "
                "binary needs 2; use task: classification for more"
            )
        if positive is not None and str(positive) not in classes:
            raise UserError(
                f"data.positive: {str(positive)!r} is not a class of {targets[0]!r}, which has {listed(classes)}"
            )
        if str(positive) == classes[0]:
            classes = classes[::-1]
    elif len(classes) < 2:
        raise UserError(
            f"column {targets[0]!r} has only the class {classes[0]!r} in the training rows of {frame.title}; expected "
            "two or more: is data.target the column that is meant, and does the split for training have rows of others?"
        )
    return {"classes": classes}


def _sorted(labels: Iterable[str]) -> list[str]:
    """Return the distinct labels sorted, by value if all are numbers ('10' follows '9'), otherwise as text."""
    unique = sorted(set(labels))
    try:
        return sorted(unique, key=float)
    except ValueError:
        return unique


def target_labels(frame: Frame, name: str) -> np.ndarray:
    """Return the labels of a target column; raises UserError for missing ones."""
    labels = frame.labels(name)
    _check_present(frame, name, np.array([label is None for label in labels], dtype=bool))
    return labels


def target_numbers(frame: Frame, names: Sequence[str]) -> list[Numbers]:
    """Return the target columns; raises UserError for missing values."""
    other = "or choose a task that takes labels, such as classification"
    columns = [frame.numbers(name, "target column", other) for name in names]
    for name, numbers in zip(names, columns, strict=True):
        _check_present(frame, name, ~numbers.present)
    return columns


def _check_present(frame: Frame, name: str, absent: np.ndarray) -> None:
    if absent.any():
        raise UserError(f"target column {name!r} has no value at {frame.places(absent)}; correct or remove these rows")
