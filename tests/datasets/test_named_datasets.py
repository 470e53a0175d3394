from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distrain.config import DataSection, UserError
from distrain.config.arguments import argument_problems
from distrain.config.registry import datasets
from distrain.datasets.base import (
    DataRequest,
    TensorSource,
    split_indices,
)
from distrain.datasets.user import named_data


def section(**keys: Any) -> DataSection:
    return DataSection.model_validate({"name": "mine", **keys})


def test_every_data_set_has_a_summary_and_is_found() -> None:
    names = datasets.summaries()
    assert {"digits", "iris", "cifar10", "image_folder"} <= set(names)
    for name, summary in names.items():
        assert len(summary) > 20
        assert datasets.find(name).name == name


def test_a_task_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match="'digits' is for classification, and the recipe's task is regression"):
        named_data(DataRequest(section(name="digits"), "regression", 0))


def builder(request: DataRequest, size: int, mode: Literal["a", "b"] = "a", names: list[str] | None = None) -> Any:
    return size, mode, names


def test_arguments_are_checked_all_at_once() -> None:
    args = {"mod": "a", "worker": 3, "mode": "c", "request": 1}
    keys = DataSection.model_fields
    assert argument_problems(builder, args, "data", "data set 'mine'", given=["request"], section_keys=keys) == [
        "data.mod: data set 'mine' has no argument 'mod'; did you mean 'mode'?",
        "data.worker: data set 'mine' has no argument 'worker'; did you mean 'workers'?",
        "data.mode: 'c' does not fit: Input should be 'a' or 'b'",
        "data.request: data set 'mine' is given 'request' by distrain itself; remove it, or rename yours",
        "data.size: data set 'mine' needs it, and it was not given",
    ]
    assert argument_problems(builder, {"size": "3"}, "data", "mine", given=["request"]) == [
        "data.size: '3' does not fit: Input should be a valid integer"
    ]


def test_a_missing_path_reports_what_is_expected(tmp_path: Any) -> None:
    with pytest.raises(UserError, match=r"needs data.path: a folder of things"):
        DataRequest(section(), "regression", 0).path("a folder of things")
    with pytest.raises(UserError, match=r"there is nothing at .*gone; data set 'mine' expects a folder"):
        DataRequest(section(path="gone"), "regression", 0, tmp_path).path("a folder of things")


# ---------------------------------------------------------------------------------------------------------------------
# Sources


def test_tensors_are_fetched_in_the_order_asked_for() -> None:
    source = TensorSource({"a": torch.arange(5), "b": torch.arange(10).view(5, 2)}, torch.arange(5) * 10)
    batch = source.fetch(np.array([3, 0, 3]))
    assert batch["inputs"]["a"].tolist() == [3, 0, 3]
    assert batch["inputs"]["b"].tolist() == [[6, 7], [0, 1], [6, 7]]
    assert batch["targets"].tolist() == [30, 0, 30]
    assert batch["ids"].tolist() == [3, 0, 3]
    assert "targets" not in TensorSource(torch.arange(5), None).fetch(np.array([1]))


def test_what_is_fetched_may_be_changed() -> None:
    source = TensorSource(torch.zeros(3, 2), torch.zeros(3))
    source.fetch(np.arange(3))["inputs"].fill_(1)
    assert source.fetch(np.arange(3))["inputs"].sum() == 0


# ---------------------------------------------------------------------------------------------------------------------
# Splits


@settings(max_examples=100)
@given(st.integers(60, 300), st.integers(0, 99), st.floats(0.05, 0.45), st.booleans())
def test_fractions_take_every_sample_once_and_as_many_as_they_say(
    length: int, seed: int, fraction: float, stratify: bool
) -> None:
    fractions = [1 - 2 * fraction, fraction, fraction]
    labels = np.arange(length) % 3
    splits = split_indices(length, section(split=fractions, stratify=stratify), seed, labels)
    assert list(splits) == ["train", "valid", "test"]
    assert sorted(np.concatenate(list(splits.values())).tolist()) == list(range(length))
    for share, indices in zip(fractions, splits.values(), strict=True):
        assert (np.diff(indices) > 0).all()
        if stratify:
            for label in range(3):
                assert abs((labels[indices] == label).sum() - share * (labels == label).sum()) < 1
        else:
            assert abs(len(indices) - share * length) < 1


def test_exact_fractions_are_exact() -> None:
    splits = split_indices(1000, section(split=[0.7, 0.1, 0.2]), 0)
    assert [len(indices) for indices in splits.values()] == [700, 100, 200]


def test_equal_remainders_are_shared_out() -> None:
    labels = np.repeat(np.arange(4), 5)
    splits = split_indices(20, section(split=[0.5, 0.5], stratify=True), 0, labels)
    assert [len(indices) for indices in splits.values()] == [10, 10]


@pytest.mark.parametrize("stratify", [False, True])
def test_folds_hold_out_every_sample_once(stratify: bool) -> None:
    labels = np.array([0] * 13 + [1] * 30 + [2] * 4)
    held_out = []
    for fold in range(1, 6):
        splits = split_indices(47, section(split={"fold": fold, "of": 5}, stratify=stratify), 9, labels)
        assert sorted([*splits["train"], *splits["test"]]) == list(range(47))
        assert len(splits["test"]) in (9, 10)
        if stratify:
            assert np.bincount(labels[splits["test"]], minlength=3)[1] == 6
        held_out += splits["test"].tolist()
    assert sorted(held_out) == list(range(47))


def test_splits_depend_on_the_seed_alone() -> None:
    first, again, other = (split_indices(100, section(), seed)["test"].tolist() for seed in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"split": [0.99, 0.01]}, "leave test without a sample"),
        ({"split": {"fold": 1, "of": 50}}, "50 folds of 10 samples"),
        ({"split": {"train": "a", "test": "b"}}, "is one piece"),
    ],
)
def test_splits_that_cannot_be_are_refused(keys: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        split_indices(10, section(**keys), 0)
