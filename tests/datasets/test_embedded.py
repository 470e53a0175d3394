from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn import datasets as sklearn_datasets
from sklearn.datasets import load_diabetes, load_iris

from distrain.config import DataSection, UserError
from distrain.datasets import sklearn_files
from distrain.datasets.base import Data, DataRequest, Source
from distrain.datasets.user import named_data


def build(name: str, task: Any, state: dict | None = None, **keys: Any) -> Data:
    section = DataSection.model_validate({"name": name, **keys})
    return named_data(DataRequest(section, task, 0, state=state))


def everything(source: Any) -> dict[str, Any]:
    return source.fetch(np.arange(len(source)))


@pytest.mark.parametrize("name", ["digits", "iris", "wine", "breast_cancer", "diabetes"])
def test_the_tables_are_those_that_scikit_learn_loads(name: str) -> None:
    found = getattr(sklearn_files, f"load_{name}")()
    options = {"scaled": False} if name == "diabetes" else {}
    expected = getattr(sklearn_datasets, f"load_{name}")(**options)
    for key in ("data", "target"):
        assert getattr(found, key).dtype == expected[key].dtype
        np.testing.assert_array_equal(getattr(found, key), expected[key])
    assert list(found.feature_names) == list(expected.feature_names)
    assert list(found.target_names) == list(map(str, expected.get("target_names", [])))


def test_digits_are_images_between_0_and_1() -> None:
    data = build("digits", "classification")
    assert {name: len(source) for name, source in data.splits.items()} == {"train": 1438, "test": 359}
    batch = everything(data.splits["train"])
    assert batch["inputs"].shape == (1438, 1, 8, 8)
    assert batch["inputs"].dtype == torch.float32
    assert (batch["inputs"].min(), batch["inputs"].max()) == (0, 1)
    assert batch["targets"].dtype == torch.int64
    assert data.meta.num_classes == 10


@pytest.mark.parametrize(
    ("name", "task", "features", "classes"),
    [
        ("iris", "classification", 4, 3),
        ("wine", "classification", 13, 3),
        ("breast_cancer", "classification", 30, 2),
        ("breast_cancer", "binary", 30, 2),
        ("diabetes", "regression", 10, None),
    ],
)
def test_tables_are_standardised_by_their_training_rows(
    name: str, task: str, features: int, classes: int | None
) -> None:
    data = build(name, task, split=[0.6, 0.2, 0.2])
    assert list(data.splits) == ["train", "valid", "test"]
    batch = everything(data.splits["train"])
    assert torch.allclose(batch["inputs"].mean(0), torch.zeros(features), atol=1e-5)
    assert torch.allclose(batch["inputs"].std(0, correction=0), torch.ones(features), atol=1e-4)
    assert not torch.allclose(everything(data.splits["test"])["inputs"].mean(0), torch.zeros(features), atol=1e-3)
    assert batch["targets"].dtype == (torch.int64 if task == "classification" else torch.float32)
    assert batch["targets"].ndim == 1
    assert data.meta.num_classes == classes
    assert data.meta.input_shape == (features,)
    assert len(data.meta.feature_names or ()) == features


def test_fitted_values_are_used_and_not_fitted_again() -> None:
    state = {"feature_mean": [0.0] * 4, "feature_std": [2.0] * 4}
    inputs = everything(build("iris", "classification", state=state, split={"fold": 1, "of": 3}).splits["test"])[
        "inputs"
    ]
    assert {round(float(value) * 2, 3) for value in inputs[:, 0]} <= {round(v, 3) for v in load_iris().data[:, 0]}


def test_tables_can_be_left_as_they_are() -> None:
    data = build("diabetes", "regression", standardize=False)
    assert data.state == {}
    assert everything(data.splits["train"])["inputs"][:, 0].max() > 70


def test_standardised_targets_can_be_reported_in_their_own_units() -> None:
    data = build("diabetes", "regression", standardize_target=True)
    targets = everything(data.splits["train"])["targets"]
    assert abs(float(targets.mean())) < 1e-5
    assert data.meta.target_mean is not None
    assert data.meta.target_std is not None
    own = targets * data.meta.target_std[0] + data.meta.target_mean[0]
    assert {round(float(value)) for value in own} <= {round(value) for value in load_diabetes().target}


def test_splits_can_keep_the_shares_of_classes() -> None:
    data = build("iris", "classification", split=[0.8, 0.2], stratify=True)
    assert torch.bincount(everything(data.splits["test"])["targets"]).tolist() == [10, 10, 10]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_rows_for_prediction_are_encoded_as_in_training(tmp_path: Path, suffix: str) -> None:
    data = named_data(DataRequest(DataSection(name="iris"), "classification", 0, dtype=torch.float64))
    frame = load_iris(as_frame=True).data.iloc[[0, 5]] + 0.1234567890123456  # pandas may not read its last digit
    frame = frame[frame.columns[::-1]].assign(comment="x")  # columns in another order, and one more
    path = tmp_path / f"rows{suffix}"
    frame.to_csv(path, index=False) if suffix == ".csv" else frame.to_parquet(path)
    assert data.read is not None
    batch = everything(data.read(path))
    rows = load_iris().data[[0, 5]] + 0.1234567890123456
    assert np.array_equal(batch["inputs"], (rows - data.state["feature_mean"]) / data.state["feature_std"])
    assert "targets" not in batch


def test_files_for_prediction_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    read = build("iris", "classification").read
    assert read is not None
    frame = load_iris(as_frame=True).data.iloc[:3]
    frame.rename(columns={"sepal width (cm)": "sepal width"}).to_csv(tmp_path / "a.csv")
    with pytest.raises(UserError, match=r"lacks the columns 'sepal width \(cm\)'; did you mean .*'sepal width'"):
        read(tmp_path / "a.csv")
    frame.astype(object).replace(5.1, "tall").to_csv(tmp_path / "b.csv")
    with pytest.raises(UserError, match=r"row 1, column 'sepal length \(cm\)' is not a finite number"):
        read(tmp_path / "b.csv")
    (tmp_path / "c.csv").write_bytes(b"")
    with pytest.raises(UserError, match="cannot be read"):
        read(tmp_path / "c.csv")
    with pytest.raises(UserError, match=r"expected a .csv or .parquet"):
        read(tmp_path / "d.txt")
    pd.DataFrame({name: [] for name in frame.columns}).to_csv(tmp_path / "e.csv")
    assert len(read(tmp_path / "e.csv")) == 0


def test_digits_for_prediction(tmp_path: Path) -> None:
    data = build("digits", "classification")
    assert data.read is not None
    pixels = (everything(data.splits["test"])["inputs"][:3, 0] * 16).numpy()
    np.save(tmp_path / "some.npy", pixels)
    source: Source = data.read(tmp_path / "some.npy")
    assert torch.equal(everything(source)["inputs"], everything(data.splits["test"])["inputs"][:3])
    Image.fromarray((pixels[0] * 15.9).astype(np.uint8)).save(tmp_path / "one.png")
    image = everything(data.read(tmp_path / "one.png"))["inputs"]
    assert image.shape == (1, 1, 8, 8)
    np.save(tmp_path / "bright.npy", pixels * 10)
    with pytest.raises(UserError, match="expected pixels from 0 to 16"):
        data.read(tmp_path / "bright.npy")
    np.save(tmp_path / "wide.npy", np.zeros((2, 9, 8)))
    with pytest.raises(UserError, match=r"shape \(2, 9, 8\); expected \(n, 1, 8, 8\)"):
        data.read(tmp_path / "wide.npy")
