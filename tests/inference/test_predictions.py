"""Predictions of outputs of any shape: as tables, arrays and files, or refused in a sentence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from runs import cli, train, write_recipe
from torch import nn
from torch.utils.data import Dataset

from distrain.config import UserError
from distrain.datasets.base import DataMeta
from distrain.inference.files import open_predictions
from distrain.training.outputs import predicted, target_columns

META = DataMeta(num_classes=3)


class Squares(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Images (1, 6, 6) with a bright square; each pixel is of the background or of the square."""

    classes = ("background", "square")

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        mask = torch.zeros(6, 6, dtype=torch.int64)
        mask[index % 4 : index % 4 + 2, 2:5] = 1
        return mask[None].float() + 0.1, mask


class PerPixel(nn.Conv2d):
    """One class for each pixel."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(1, num_classes, 1)


def test_maps_are_written_as_an_array_as_pictures_and_in_parquet(tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path,
        """
name: maps
task: classification
data: {name: "test_predictions:Squares", split: [0.8, 0.2]}
model: {name: "test_predictions:PerPixel"}
optim: {lr: 0.3}
batch: {global: 8}
train: {epochs: 12}
eval: {every: null}
""",
    )
    run = tmp_path / "run"
    train(1, recipe, run)
    refused = cli("predict", run, "test", "-o", tmp_path / "maps.csv")
    assert refused.status == 1
    assert "each prediction has the shape 6 × 6" in refused.err
    assert not (tmp_path / "maps.csv").exists()
    for out in ("maps.npy", "maps.parquet", "maps/"):
        ended = cli("predict", run, "test", "-o", f"{tmp_path}/{out}")
        assert ended.status == 0, ended.err
        assert ended.out == f"wrote 8 predictions to {tmp_path}/{out}\n"
    maps = np.load(tmp_path / "maps.npy")
    assert maps.shape == (8, 6, 6)
    assert maps.sum(axis=(1, 2)).tolist() == [6] * 8, "the square of each image, which this model learns exactly"
    assert pd.read_csv(tmp_path / "maps.csv")["row"].tolist() == list(range(8))
    frame = pd.read_parquet(tmp_path / "maps.parquet")
    np.testing.assert_array_equal(np.array([np.stack(each) for each in frame["prediction"]]), maps)
    table = pd.read_csv(tmp_path / "maps" / "predictions.csv")
    pictures = [np.asarray(Image.open(tmp_path / "maps" / name)) for name in table["prediction"]]
    np.testing.assert_array_equal(np.stack(pictures), maps)
    again = cli("predict", run, "test", "-o", f"{tmp_path}/maps/")
    assert again.status == 1
    assert "empty or not there yet" in again.err
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("task", "outputs", "targets", "shape"),
    [
        ("classification", (4, 3, 5), (4, 5), (4, 5)),
        ("classification", (4, 5, 3), (4, 5), (4, 5)),
        ("classification", (4, 5, 3), None, (4, 5)),
        ("classification", (4, 3, 2, 2), (4, 2, 2), (4, 2, 2)),
        ("classification", (4, 3), (4,), (4,)),
        ("binary", (4, 5, 6), (4, 5, 6), (4, 5, 6)),
        ("binary", (4, 5, 2), (4, 5), (4, 5)),
        ("binary", (4, 2), (4,), (4,)),
        ("binary", (4, 1), None, (4,)),
        ("multilabel", (4, 3, 5), (4, 3, 5), (4, 3, 5)),
        ("regression", (4, 2, 3, 3), (4, 2, 3, 3), (4, 2, 3, 3)),
        ("regression", (4, 2), (4, 2), (4, 2)),
    ],
)
def test_outputs_of_every_shape_that_a_task_evaluates(task, outputs, targets, shape) -> None:  # type: ignore[no-untyped-def]
    numbers = torch.randn(outputs, generator=torch.Generator().manual_seed(0))
    known = (
        None if targets is None else torch.zeros(targets, dtype=torch.float32 if task == "regression" else torch.int64)
    )
    found = predicted(task, numbers, known, META, is_probability=False)
    assert found.values is not None
    assert found.values.shape == shape
    assert bool(found.columns) == (len(outputs) == 2)
    if task == "classification":
        dim = 1 if outputs[1] == 3 else 2
        np.testing.assert_array_equal(found.values, numbers.argmax(dim).numpy())
    if task == "binary" and outputs[-1] == 2:
        np.testing.assert_array_equal(found.values, (numbers[..., 1] > numbers[..., 0]).numpy())


@pytest.mark.parametrize(
    ("task", "outputs", "targets", "names", "predictions", "truth"),
    [
        (
            "classification",
            [[0, 1, 0], [1, 0, 0], [0, 0, 1]],
            [1, -1, -100],
            ("a", "b", "c"),
            "bac",
            ["b", "-1", "-100"],
        ),
        ("classification", [[0, 1, 0], [1, 0, 0], [0, 0, 1]], [1, -1, 2], None, [1, 0, 2], [1, -1, 2]),
        ("classification", [[0, 1, 0], [1, 0, 0], [0, 0, 1]], [1, 0, 1], ("a", "b"), ["b", "a", "2"], "bab"),
        ("binary", [3, -3, 3], [0.7, 0.2, 1.0], ("no", "yes"), ["yes", "no", "yes"], ["yes", "no", "yes"]),
        ("binary", [3, -3, 3], [0.7, -1.0, 1.0], None, [1, 0, 1], [1, 0, 1]),
    ],
    ids=["ignored", "without names", "more outputs than names", "probabilities", "other signs"],
)
def test_what_is_true_is_said_in_the_terms_of_what_is_predicted(  # type: ignore[no-untyped-def]
    task, outputs, targets, names, predictions, truth
) -> None:
    meta = DataMeta(class_names=names)
    known = torch.tensor(targets)
    found = predicted(task, torch.tensor(outputs).float(), known, meta, is_probability=False)
    assert found.columns["prediction"] == list(predictions)
    assert target_columns(task, known, meta)["target"] == list(truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
@pytest.mark.parametrize("standardized", [True, False])
def test_what_is_true_is_as_the_data_have_it(dtype: torch.dtype, standardized: bool) -> None:
    rng = np.random.default_rng(0)
    data = np.stack([rng.integers(25, 346, 200), rng.normal(size=200).round(3), rng.integers(0, 9, 200) / 10], axis=1)
    if standardized:
        data += [0, 1e6, -3]  # far from 0: float32 has no room for such numbers themselves
        data = data.round(3)
    mean, std = data.mean(axis=0), data.std(axis=0)
    meta = DataMeta(target_mean=tuple(mean), target_std=tuple(std)) if standardized else DataMeta()
    if dtype == torch.int64:
        data, meta = data.round(), DataMeta()
    data[0] = data[0] if dtype == torch.int64 else np.nan
    given = torch.from_numpy((data - mean) / std if meta.target_mean else data).to(dtype)
    found = target_columns("regression", given, meta)
    np.testing.assert_array_equal(np.stack([found[f"target_{column}"] for column in range(3)], axis=1), data)


@pytest.mark.parametrize("out", ["p.txt", "p", "nowhere/p.csv", "link.csv"])
def test_where_predictions_cannot_go(tmp_path: Path, out: str) -> None:
    (tmp_path / "link.csv").symlink_to(tmp_path / "other.csv")
    with pytest.raises(UserError, match="-o "):
        open_predictions(f"{tmp_path}/{out}")


def test_predictions_of_different_shapes_are_no_array(tmp_path: Path) -> None:
    file = open_predictions(f"{tmp_path}/p.npy")
    for width in (5, 6):
        found = predicted("classification", torch.randn(4, 3, width), None, META, is_probability=False)
        if width == 5:
            file.append({"row": range(4)}, found)
        else:
            with pytest.raises(UserError, match="different shapes, 5 and 6"):
                file.append({"row": range(4)}, found)
    file.discard()
    assert not list(tmp_path.iterdir())


def test_rows_are_known_by_their_files_and_images_that_do_not_decode_are_skipped(tmp_path: Path) -> None:
    for name, value in [
        *((f"images/dark/{k}.png", k) for k in range(8)),
        *((f"images/light/{k}.png", 255 - k) for k in range(8)),
    ]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), value).save(tmp_path / name)
    recipe = write_recipe(
        tmp_path,
        """
name: shades
task: classification
data: {name: image_folder, path: images, channels: gray, size: 4}
model: {name: mlp, hidden: []}
optim: {lr: 0.1}
batch: {global: 4}
train: {epochs: 10}
eval: {every: null}
""",
    )
    run = tmp_path / "run"
    train(1, recipe, run)
    right = {"9.png": "light", "10.png": "dark", "A.png": "dark", "sub/c.png": "light"}
    (tmp_path / "new" / "sub").mkdir(parents=True)
    for name, shade in right.items():
        Image.new("L", (4, 4), 250 if shade == "light" else 5).save(tmp_path / "new" / name)
    (tmp_path / "new" / "1.png").write_bytes(b"no image")
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    ended = cli("predict", run, tmp_path / "new", "-o", tmp_path / "p.csv")
    assert ended.status == 0, ended.err
    assert ended.err.count("skipped: ") == 1
    assert f"{tmp_path}/new/1.png" in ended.err
    table = pd.read_csv(tmp_path / "p.csv")
    assert dict(zip(table["file"], table["prediction"], strict=True)) == right
    (tmp_path / "elsewhere").rename(tmp_path / "images")
    held_out = cli("predict", run, "test", "-o", tmp_path / "test.csv")
    assert held_out.status == 0, held_out.err
    table = pd.read_csv(tmp_path / "test.csv")
    assert [file.split("/")[0] for file in table["file"]] == table["target"].tolist()


def test_rows_of_a_table_are_known_by_the_column_named_as_id(tmp_path: Path) -> None:
    rows = pd.DataFrame({"patient": [f"p{number}" for number in range(30)], "x": np.arange(30.0), "y": [0, 1, 2] * 10})
    rows.to_csv(tmp_path / "rows.csv", index=False)
    recipe = write_recipe(
        tmp_path,
        """
name: rows
task: regression
data: {name: table, path: rows.csv, target: y, id: patient, split: [0.8, 0.2]}
model: {name: mlp, hidden: []}
batch: {global: 8}
train: {steps: 2}
eval: {every: null}
""",
    )
    run = tmp_path / "run"
    train(1, recipe, run)
    for inputs, ids in ((tmp_path / "rows.csv", rows["patient"].tolist()), ("test", None)):
        ended = cli("predict", run, inputs, "-o", tmp_path / "p.csv")
        assert ended.status == 0, ended.err
        table = pd.read_csv(tmp_path / "p.csv")
        assert ids is None or table["patient"].tolist() == ids
        known = rows.set_index("patient")["y"]
        assert known[table["patient"]].tolist() == table["target"].tolist()


def test_new_data_need_neither_those_of_the_training_nor_their_form(tmp_path: Path) -> None:
    rows = pd.DataFrame({"who": [f"p{number}" for number in range(30)], "x": np.arange(30.0), "y": np.arange(30.0)})
    rows.to_csv(tmp_path / "rows.csv", index=False)
    recipe = write_recipe(
        tmp_path,
        """
name: rows
task: regression
data: {name: table, path: rows.csv, target: y, id: who, split: [0.8, 0.2]}
model: {name: mlp, hidden: []}
batch: {global: 8}
train: {steps: 2}
eval: {every: null}
""",
    )
    run = tmp_path / "run"
    train(1, recipe, run)
    there = cli("predict", run, tmp_path / "rows.csv", "-o", tmp_path / "there.csv")
    assert there.status == 0, there.err
    (tmp_path / "rows.csv").unlink()
    rows.drop(columns="y").to_csv(tmp_path / "new.csv", index=False, sep=";")
    given = ("--data", f"path={tmp_path}/new.csv", "--data", "delimiter=;", "--processes", 2)
    away = cli("predict", run, *given, "-o", tmp_path / "away.csv")
    assert away.status == 0, away.err
    assert away.out == f"wrote 30 predictions to {tmp_path}/away.csv\n"
    found = pd.read_csv(tmp_path / "away.csv")
    pd.testing.assert_frame_equal(found, pd.read_csv(tmp_path / "there.csv").drop(columns="target"))
    split = cli("predict", run, "test", "-o", tmp_path / "test.csv")
    assert split.status == 1
    assert f"there is nothing at {tmp_path}/rows.csv" in split.err
