"""Files of predictions: the same rows in every format, written part by part; and every output of a model in them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from runs import train, write_recipe
from torch import nn
from worlds import WorldFailed, in_world

from distrain.config import UserError
from distrain.inference import files, predict_file
from distrain.inference.embeddings import Embeddings
from distrain.inference.files import open_predictions
from distrain.training.outputs import Predictions, nested

ROWS = 7


def batches() -> list[tuple[dict[str, Any], Predictions]]:
    """Return predictions of ROWS samples in three batches, of vectors, with names of many kinds."""
    values = np.arange(ROWS * 3, dtype=np.float32).reshape(ROWS, 3) / 7
    values[4, 1] = np.nan
    # a column that has no value at first, and one of whole numbers that gets others
    index = {
        "row": np.arange(ROWS),
        "who": [None, None, "é", None, "=1", "b\n", "c"],
        "age": [1, 2, 3, 4, 5.5, 6, None],
    }
    cuts = [slice(0, 2), slice(2, 3), slice(3, ROWS)]
    return [
        ({name: each[cut] for name, each in index.items()}, Predictions({}, values[cut], "embedding")) for cut in cuts
    ]


def written(out: Path) -> None:
    file = open_predictions(str(out))
    try:
        for index, found in batches():
            file.append(index, found)
        file.write()
    finally:
        file.discard()


def test_every_format_holds_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_ROWS", 1)  # each batch is a part of its own
    for out in ("t.csv", "t.parquet", "t.jsonl", "a.npy", "z.npz", "folder"):
        (tmp_path / "folder").mkdir(exist_ok=True)
        written(tmp_path / out)
    values = np.concatenate([found.values for _, found in batches() if found.values is not None])
    ages = [1, 2, 3, 4, 5.5, 6, None]
    frame = pd.read_parquet(tmp_path / "t.parquet")
    np.testing.assert_array_equal(np.stack(frame["embedding"].tolist()), values)
    assert [None if pd.isna(each) else each for each in frame["age"]] == ages
    assert [None if pd.isna(each) else each for each in frame["who"]] == [None, None, "é", None, "=1", "b\n", "c"]
    lines = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == list(range(ROWS))
    assert [line["age"] for line in lines] == ages
    assert lines[4]["embedding"][1] is None, "JSON has no NaN"
    lines[4]["embedding"][1] = np.nan
    np.testing.assert_array_equal(np.array([line["embedding"] for line in lines], np.float32), values)
    for table in (pd.read_csv(tmp_path / "t.csv"), pd.read_csv(tmp_path / "a.csv")):
        assert table["row"].tolist() == list(range(ROWS))
        assert table["who"].fillna("").tolist() == ["", "", "é", "", "'=1", "b\\n", "c"]
    vectors = pd.read_csv(tmp_path / "t.csv")[["embedding_0", "embedding_1", "embedding_2"]].to_numpy(np.float32)
    np.testing.assert_allclose(vectors, values, rtol=1e-6)
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), values)
    assert np.load(tmp_path / "a.npy", mmap_mode="r").dtype == np.float32
    arrays = np.load(tmp_path / "z.npz")
    assert sorted(arrays) == ["age", "embedding", "row", "who"]
    np.testing.assert_array_equal(arrays["embedding"], values)
    assert arrays["who"].tolist() == ["", "", "é", "", "=1", "b\n", "c"]
    table = pd.read_csv(tmp_path / "folder" / "predictions.csv")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert len(table) == ROWS
    np.testing.assert_array_equal([np.load(tmp_path / "folder" / name) for name in table["embedding"]], values)


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("x.txt", r"predictions are written as a \.csv"),
        ("none/x.csv", "expected a place in a folder that exists"),
        ("link.csv", "and not a symbolic link"),
    ],
)
def test_where_nothing_can_be_written_is_refused(tmp_path: Path, out: str, message: str) -> None:
    (tmp_path / "link.csv").symlink_to(tmp_path / "other.csv")
    with pytest.raises(UserError, match=message):
        open_predictions(f"{tmp_path}/{out}")


@pytest.mark.parametrize("out", ["t.csv", "t.parquet", "t.jsonl", "a.npy", "z.npz", "p.png", "folder"])
def test_a_file_that_is_not_completed_is_not_there(tmp_path: Path, out: str) -> None:
    (tmp_path / "folder").mkdir()
    maps = Predictions({}, np.zeros((1, 2, 2), np.uint8))
    file = open_predictions(f"{tmp_path}/{out}")
    if out == "t.csv":
        with pytest.raises(UserError, match="the shape 2 × 2, and a cell of a CSV file holds one value"):
            file.append({"row": [0]}, maps)
    else:
        file.append({"row": [0]}, maps)
    file.discard()
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert not list((tmp_path / "folder").iterdir())


def test_one_map_is_a_picture(tmp_path: Path) -> None:
    maps = np.arange(8, dtype=np.uint8).reshape(2, 2, 2)
    file = open_predictions(f"{tmp_path}/p.png")
    file.append({"row": [0]}, Predictions({}, maps[:1]))
    with pytest.raises(UserError, match="holds one prediction, and there are more; write FOLDER/"):
        file.append({"row": [1]}, Predictions({}, maps[1:]))
    file.write()
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "p.png")), maps[0])
    with pytest.raises(UserError, match="a map of classes, and each prediction is something else"):
        open_predictions(f"{tmp_path}/q.png").append({"row": [0]}, Predictions({"text": ["a"]}, None))


# --------------------------------------------------------------------------------------------------------------------
# What a layer computes


class Twice(nn.Module):
    """Two linear layers, of which one is used twice; the outputs come of a sum, or of the last."""

    def __init__(self, *, summed: bool):
        super().__init__()
        self.first, self.last, self.summed = nn.Linear(3, 3), nn.Linear(3, 2), summed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs = self.last(self.first(self.first(x)))
        return outputs + 1 if self.summed else outputs


def test_embeddings_are_what_the_output_layer_reads_or_a_layer_returns() -> None:
    from distrain.models import forward

    model, x = Twice(summed=False), torch.randn(4, 3)
    hidden = model.first(model.first(x))
    torch.testing.assert_close(Embeddings(model, None).of(lambda: forward(model, x).logits, 4), hidden)
    torch.testing.assert_close(Embeddings(model, "last").of(lambda: forward(model, x).logits, 4), model(x))
    assert not model.last._forward_hooks
    errors: list[tuple[nn.Module, str | None, str]] = [
        (model, "first", "--layer first: the model calls it 2 times"),
        (model, "lst", "the model has no layer 'lst'; did you mean 'last'?"),
        (Twice(summed=True), None, "which layer makes the model's outputs is not known (last does not)"),
        (nn.ReLU(), None, "the model has no linear layer"),
    ]
    for each, layer, message in errors:
        with pytest.raises(UserError, match=re.escape(message)):
            Embeddings(each, layer).of(lambda each=each: forward(each, x).logits, 4)  # type: ignore[misc]
    with pytest.raises(UserError, match="expected numbers for each"):
        Embeddings(model, "last").of(lambda: forward(model, x).logits, 5)


RECIPE = """
name: digits
task: classification
data: {name: digits, split: [0.7, 0.3]}
model: {name: mlp, hidden: [16]}
optim: {lr: 1.0e-2}
batch: {global: 32}
train: {steps: 20}
eval: {every: null}
"""


WRITTEN: dict[str, dict[str, Any]] = {
    "classes.parquet": {},
    "probabilities.npy": {"output": "probabilities"},
    "logits.csv": {"output": "logits"},
    "embeddings.npz": {"output": "embeddings"},
}


def outputs_of(run: str, folder: str, names: list[str]) -> None:
    """Predict in this world, by each of the options; rank 0 writes."""
    for name in names:
        found = predict_file(run, "test", f"{folder}/{name}", **WRITTEN[name])
        assert (found.samples, found.skipped) == (539, [])


def test_every_output_has_the_same_numbers_on_any_number_of_processes(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    run = tmp_path / "run"
    train(1, write_recipe(tmp_path, RECIPE), run)
    for processes, names in ((1, [*WRITTEN]), (2, ["embeddings.npz"]), (3, ["classes.parquet"])):
        (tmp_path / str(processes)).mkdir()
        in_world(processes, outputs_of, str(run), f"{tmp_path}/{processes}", names)
    assert (tmp_path / "3" / "classes.parquet").read_bytes() == (tmp_path / "1" / "classes.parquet").read_bytes()
    arrays = [dict(np.load(tmp_path / each / "embeddings.npz")) for each in "12"]
    for key, array in arrays[0].items():
        assert np.array_equal(array, arrays[1][key]), key
    assert arrays[0]["embedding"].shape == (539, 16)
    frame = pd.read_parquet(tmp_path / "1" / "classes.parquet")
    assert arrays[0]["target"].tolist() == frame["target"].tolist()
    logits = pd.read_csv(tmp_path / "1" / "logits.csv")
    weights = load_file(run / "export" / "model.safetensors")
    last = max(name for name in weights if name.endswith("weight")).removesuffix(".weight")
    layer = nn.Linear(16, 10)
    layer.load_state_dict({key: weights[f"{last}.{key}"] for key in ("weight", "bias")})
    again = layer(torch.from_numpy(arrays[0]["embedding"])).detach().numpy()
    np.testing.assert_allclose(logits.filter(like="logit_").to_numpy(), again, atol=1e-4)
    probabilities = np.load(tmp_path / "1" / "probabilities.npy")
    np.testing.assert_allclose(probabilities, frame.filter(like="probability_").to_numpy(), atol=1e-12)


NESTED = """
name: nested
task: "own_tasks:Nested"
data: {name: digits, split: [0.6, 0.39, 0.01]}
model: {name: mlp, hidden: [8]}
batch: {global: 12}
train: {steps: 1}
eval: {metrics: []}
"""
IN_CELLS = [
    *("row", "target", "class"), *(f"logits_{n}" for n in range(10)), "best_0_0", "best_0_1", "best_1_0", "best_1_1",
    *(f"maps_row_0_{n}" for n in range(8)),
]  # fmt: skip


def nested_outputs(run: str, folder: str, names: list[str]) -> None:
    for name in names:
        output: Any = "embeddings" if name.startswith("e") else None  # of the layer that makes one of the tensors
        assert predict_file(run, "test", f"{folder}/{name}", output=output).samples > 12


def test_nested_predictions_have_a_column_or_an_array_for_each_tensor(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(1, write_recipe(tmp_path, NESTED), run)
    for processes, names in ((1, ["t.jsonl", "t.parquet", "a.npz", "f/", "e.npz"]), (2, ["t.parquet"]), (2, ["a.npz"])):
        (tmp_path / str(processes)).mkdir(exist_ok=True)
        in_world(processes, nested_outputs, str(run), f"{tmp_path}/{processes}", names)
    arrays, again = (dict(np.load(tmp_path / each / "a.npz")) for each in "12")
    assert {name: each.shape[1:] for name, each in arrays.items()} == {
        "row": (), "target": (), "class": (), "logits": (10,), "best_0": (2,), "best_1": (2,),
        "maps_all": (1, 8, 8), "maps_row_0": (8,),
    }  # fmt: skip
    for name, each in arrays.items():
        assert np.array_equal(each, again[name]), name
        assert each.dtype == again[name].dtype
    assert (tmp_path / "1/t.parquet").read_bytes() == (tmp_path / "2/t.parquet").read_bytes()
    table = pd.read_parquet(tmp_path / "1/t.parquet")
    assert list(table.columns) == [*IN_CELLS, "maps_all"]
    assert table["class"].tolist() == arrays["class"].tolist()
    assert (
        table["maps_row_0_3"].tolist() == arrays["maps_row_0"][:, 3].tolist() == arrays["maps_all"][:, 0, 0, 3].tolist()
    )
    lines = [json.loads(line) for line in (tmp_path / "1/t.jsonl").read_text().splitlines()]
    assert [line["maps_all"] for line in lines] == arrays["maps_all"].tolist()
    assert [line["best_1_0"] for line in lines] == arrays["best_1"][:, 0].tolist()
    index = pd.read_csv(tmp_path / "1/f/predictions.csv")
    assert list(index.columns) == ["row", "target", "prediction", "class"]
    one = np.load(tmp_path / "1/f" / index["prediction"][3])
    assert {name: one[name].tolist() for name in one.files} == {
        name: arrays[name][3].tolist() for name in ("logits", "best_0", "best_1", "maps_all", "maps_row_0")
    }
    for out, why in {
        "t.csv": "maps_all of each prediction has the shape 1 × 8 × 8",
        "a.npy": "write a .npz of an array for each",
        "p.png": "each prediction is something else",
    }.items():
        with pytest.raises(WorldFailed, match=re.escape(why)):
            in_world(1, predict_file, str(run), "test", f"{tmp_path}/{out}")
        assert not (tmp_path / out).exists()


@pytest.mark.parametrize(
    ("outputs", "found"),
    [
        ((torch.zeros(3), torch.zeros(3, 2)), {"prediction_0": (3,), "prediction_1": (3, 2)}),
        ([{"a": torch.zeros(3, 1)}, torch.zeros(3)], {"prediction_0_a": (3, 1), "prediction_1": (3,)}),
        ({"a": torch.zeros(3, dtype=torch.bfloat16), "b": (torch.ones(3),)}, {"a": (3,), "b_0": (3,)}),
        (torch.nn.utils.rnn.PackedSequence(torch.zeros(3), torch.zeros(3)), "predictions[2] is None"),
        ({"loss": torch.zeros(())}, "predictions['loss'] has the shape (); expected (3, ...)"),
        ((torch.zeros(4),), "predictions[0] has the shape (4,); expected (3, ...)"),
        ({"text": ["a", "b", "c"]}, "predictions['text'][0] is a str; expected a tensor"),
        ({"a_0": torch.zeros(3), "a": (torch.zeros(3),)}, "two tensors for the column 'a_0'"),
        ({"a_1": torch.zeros(3), "a": torch.zeros(3, 2)}, "two tensors for the column 'a_1'"),
        ({}, "are empty"),
    ],
)
def test_what_a_task_may_predict(outputs: Any, found: Any) -> None:
    if isinstance(found, str):
        with pytest.raises(UserError, match=re.escape(found)):
            nested(outputs, 3)
    else:
        assert {name: each.shape for name, each in nested(outputs, 3).parts.items()} == found


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        (None, {}, "name what is predicted once"),
        ("test", {"data": ["path=x.npy"]}, "found test, x.npy"),
        ("test", {"data": ["path"]}, "--data 'path' is not KEY=VALUE"),
        ("test", {"layer": "head"}, "add --output embeddings"),
    ],
)
def test_options_of_predictions_that_make_no_sense_are_refused(
    tmp_path: Path, inputs: str | None, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        predict_file("nowhere", inputs, f"{tmp_path}/p.csv", **options)
