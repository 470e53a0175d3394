"""What a model does with the samples of a split, against what predictions and evaluations of the same say."""

from __future__ import annotations

import base64
import functools
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluations import PAIRS, write_pairs
from PIL import Image
from runs import TINY, captured, train, write_recipe
from worlds import in_world

from distrain.config import UserError
from distrain.datasets.base import DataMeta
from distrain.inference import evaluate_checkpoint, examine, predict_table
from distrain.inference.class_tables import ClassTables
from distrain.inference.generation import unpadded
from distrain.inference.sample_contents import as_picture

LANGUAGE = """
name: words
task: language_modeling
data: {name: text, path: TEXT, seq_len: 16}
model: {name: gpt, n_layer: 1, n_head: 2, d_model: 16}
batch: {global: 4}
train: {epochs: null, steps: 2}
"""
REGRESSION = """
name: sizes
task: regression
data: {name: diabetes, split: [0.8, 0.2]}
model: {name: mlp, hidden: [8]}
batch: {global: 32}
train: {epochs: null, steps: 2}
"""
BINARY = REGRESSION.replace("regression", "binary").replace("diabetes", "breast_cancer")


def looked_at(run: Path, options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """Return what `examine`, `evaluate_checkpoint` and `predict_table` say, in a process of their own."""
    table = None if options.pop("writes", False) else predict_table(run, "test").to_dict("list")
    return examine(run, "test", **options), evaluate_checkpoint(run, "test"), table


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a run of a recipe, trained once."""

    @functools.cache
    def run_of(recipe: str) -> Path:
        folder = tmp_path_factory.mktemp("run")
        train(1, write_recipe(folder, recipe), folder / "run")
        return folder / "run"

    return run_of


def in_one(run: Path, **options: Any) -> tuple[dict[str, Any], dict[str, Any], Any]:
    [found] = in_world(1, looked_at, run, options)
    json.dumps(found[0])  # JSON values alone
    return found


def test_classes_are_counted_as_the_evaluation_counts_them(trained: Callable[[str], Path]) -> None:
    found, values, table = in_one(trained(TINY), samples=3)
    matrix = np.array(found["confusion"])
    count = len(table["prediction"])
    assert (found["samples"], found["of"], matrix.sum()) == (count, count, count)
    assert matrix.trace() / count == pytest.approx(values["accuracy"])
    wrong = [(true, guess) for true, guess in zip(table["target"], table["prediction"], strict=True) if true != guess]
    top = found["confused"][0]
    assert top["count"] == max(wrong.count(pair) for pair in wrong) == wrong.count((top["true"], top["predicted"]))
    for row in found["per_class"]:
        assert row["support"] == table["target"].count(row["name"])
        assert row["predicted"] == table["prediction"].count(row["name"])
    bins = found["calibration"]["bins"]
    assert sum(each["count"] for each in bins) == count
    mean = sum(each["count"] * each["confidence"] for each in bins) / count
    assert mean == pytest.approx(np.mean(table["probability"]))
    losses = [-np.log(table[f"probability_{true}"][row]) for row, true in enumerate(table["target"])]
    order = np.argsort(losses)
    assert [each["row"] for each in found["worst"]] == order[::-1][:3].tolist()
    assert [each["row"] for each in found["best"]] == order[:3].tolist()
    assert found["worst"][0]["loss"] == pytest.approx(max(losses))
    assert found["worst"][0]["target"] == table["target"][order[-1]]
    picture = found["worst"][0]["picture"].removeprefix("data:image/png;base64,")
    assert Image.open(io.BytesIO(base64.b64decode(picture))).size == (8, 8)


def test_no_more_samples_are_looked_at_than_asked_for(trained: Callable[[str], Path]) -> None:
    found, _, _ = in_one(trained(REGRESSION), samples=2, limit=10)
    assert (found["samples"], found["of"]) == (10, 88)
    assert len(found["worst"]) == len(found["best"]) == 2
    assert len(found["scatter"]["target"]) == 10
    assert found["worst"][0]["features"][0][0] == "age"


def test_numbers_are_compared_in_the_units_of_the_targets(trained: Callable[[str], Path]) -> None:
    found, values, table = in_one(trained(REGRESSION))
    assert found["scatter"]["numbers"]["mean absolute error"] == pytest.approx(values["mae"])
    assert sorted(found["scatter"]["target"]) == pytest.approx(sorted(table["target"]))


def test_of_two_classes_both_are_counted(trained: Callable[[str], Path]) -> None:
    found, values, table = in_one(trained(BINARY))
    matrix = np.array(found["confusion"])
    assert matrix.trace() / matrix.sum() == pytest.approx(values["accuracy"])
    assert all(each["confidence"] >= 0.5 for each in found["worst"])
    assert len(table["target"]) == matrix.sum()


def test_what_is_written_is_shown_beside_its_own_source(tmp_path: Path) -> None:
    pairs, run = write_pairs(tmp_path), tmp_path / "run"
    train(1, write_recipe(tmp_path, PAIRS.format(path=pairs, steps=1)), run)
    found, _, _ = in_one(run, limit=4, writes=True)
    shown = [f"{each['prompt']}\t{each['reference']}" for each in found["generations"]]
    assert len(set(shown) & set(pairs.read_text().splitlines())) == 4


def test_prompts_have_no_padding() -> None:
    tokens = torch.tensor([[5, 6, 0, 7], [8, 0, 0, 0]])
    positions = torch.tensor([[0, 1, 0, 1], [0, -3, -2, -1]])
    batches: list[Any] = [
        {"inputs": tokens},
        {"inputs": {"source": tokens, "target": tokens}},
        {"inputs": {"input_ids": tokens, "attention_mask": torch.tensor([[1, 1, 0, 1], [1, 0, 0, 0]])}},
        {"inputs": {"input_ids": tokens, "position_ids": positions}},
        {"inputs": tokens, "lengths": torch.tensor([3, 2])},
    ]
    found = [unpadded(batch, DataMeta(pad_id=0), pairs=number == 1) for number, batch in enumerate(batches)]
    assert found == [
        *[[[5, 6, 0, 7], [8]]] * 2,
        [[5, 6, 7], [8]],
        [[5, 6], [8]],
        [[5, 6, 0], [8, 0]],
    ]
    assert unpadded(batches[0], DataMeta(), pairs=False) == tokens.tolist(), "it is known of no padding"


def test_a_model_that_writes_is_shown_writing_and_data_that_are_gone_are_said(tmp_path: Path) -> None:
    text, run = tmp_path / "words.txt", tmp_path / "run"
    words = "a language of few words & <b>marks</b>. " * 60
    text.write_text(words)
    train(1, write_recipe(tmp_path, LANGUAGE.replace("TEXT", str(text))), run)
    found, values, _ = in_one(run, samples=2, writes=True)
    assert found["worst"][0]["loss"] >= values["loss"] >= found["best"][0]["loss"]
    assert len(found["generations"]) == 4
    assert all(each["prompt"] and each["text"] for each in found["generations"])
    assert found["worst"][0]["text"] in words
    assert "confusion" not in found
    text.unlink()
    ended = in_world(1, reported, run)[0]
    assert ended.status == 0, ended.err
    assert "the model was not looked at" in ended.err
    assert "words.txt" in (run / "report.html").read_text()


def reported(run: Path) -> Any:
    from distrain.cli.main import app

    return captured(lambda: app(["report", str(run), "--split", "test"], standalone_mode=False) or 0)


# --------------------------------------------------------------------------------------------------------------------


def test_labels_are_counted_one_by_one() -> None:
    tables = ClassTables("multilabel", DataMeta(class_names=("sun", "rain")), False)
    values = torch.tensor([[2.0, -1.0], [1.0, 3.0], [-2.0, 1.0]])
    targets = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    tables.add(values, targets, torch.tensor([True, True, False]))
    sun, rain = tables.found()["per_class"]
    assert (sun["name"], sun["support"], sun["predicted"], sun["precision"], sun["recall"]) == ("sun", 1, 2, 0.5, 1.0)
    assert (rain["support"], rain["predicted"], rain["f1"]) == (1, 1, 1.0)


@pytest.mark.parametrize("form", ["binary", "multilabel"])
def test_probabilities_as_targets_are_counted_as_metrics_count_them(form: Any) -> None:
    tables = ClassTables(form, DataMeta(), False)
    targets = torch.tensor([[0.7], [0.2], [1.0]])
    tables.add(torch.tensor([[1.0], [1.0], [-1.0]]), targets, torch.ones(3, dtype=torch.bool))
    assert [row["support"] for row in tables.found()["per_class"]] == ([1, 2] if form == "binary" else [2])
    assert tables.found()["per_class"][-1]["precision"] == 0.5


def test_a_class_that_the_loss_ignores_is_not_counted() -> None:
    tables = ClassTables("classification", DataMeta(num_classes=3), False, ignored=0)
    tables.add(torch.eye(3), torch.tensor([0, 1, 1]), torch.ones(3, dtype=torch.bool))
    assert tables.found()["confusion"] == [[0, 0, 0], [0, 1, 1], [0, 0, 0]]


def test_pixels_are_counted_and_ignored_ones_are_not() -> None:
    tables = ClassTables("segmentation", DataMeta(num_classes=2), False)
    targets = torch.tensor([[[0, 1], [1, -100]]])
    values = torch.nn.functional.one_hot(torch.tensor([[[0, 1], [0, 1]]]), 2).movedim(-1, 1).float()
    tables.add(values, targets, torch.tensor([True]))
    found = tables.found()
    assert found["confusion"] == [[1, 0], [1, 1]]
    assert [row["iou"] for row in found["per_class"]] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("image", "size"),
    [
        (torch.zeros(3, 300, 200, dtype=torch.uint8), (107, 160)),
        (torch.randn(1, 8, 9), (9, 8)),
        (torch.full((3, 8, 8), float("nan")), (8, 8)),
        (torch.zeros(2, 8, 8), None),
        (torch.zeros(8), None),
        ({"a": torch.zeros(3, 8, 8)}, None),
    ],
    ids=["bytes", "numbers", "NaN", "two channels", "a row", "a dict"],
)
def test_what_can_be_a_picture_is_one(image: Any, size: tuple[int, int] | None) -> None:
    picture = as_picture(image)
    if size is None:
        assert picture is None
        return
    assert picture is not None
    assert Image.open(io.BytesIO(base64.b64decode(picture.partition(",")[2]))).size == size


def test_a_split_that_is_not_there_is_said(trained: Callable[[str], Path]) -> None:
    assert (
        in_world(1, refused, trained(BINARY))[0] == "data set 'breast_cancer' has no split 'valid'; it has train, test"
    )


def refused(run: Path) -> str:
    with pytest.raises(UserError) as error:
        examine(run, "valid")
    return str(error.value)
