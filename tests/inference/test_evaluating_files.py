"""Evaluating files with targets: the metrics are those of a split with the same samples, whatever the data set."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from chats import CHATML, save_tokenizer, write_lines
from PIL import Image
from runs import cli, train, write_recipe

RECIPE = """
name: files
task: {task}
data: {{name: {name}, {data}, split: {{train: {folder}/train{ending}, test: {folder}/test{ending}}}}}
model: {{{model}}}
batch: {{global: 4, micro: 4}}
train: {{steps: 3}}
eval: {{every: null, metrics: {metrics}}}
checkpoint: {{every: 50%, async: false}}
"""
SMALL = "n_layer: 1, n_head: 1, d_model: 8"


def _table(place: Path, seed: int) -> None:
    generator = np.random.default_rng(seed)
    columns = {"x": generator.normal(seed, 2, 20), "k": generator.choice(["a", "b"], 20), "y": ["u", "v"] * 10}
    pd.DataFrame(columns).to_csv(place, index=False)


def _image_classes(place: Path, seed: int) -> None:
    for number, name in enumerate(["ape", "bee", "cat"] if seed == 0 else ["bee", "cat"]):  # a class may be missing
        (place / name).mkdir(parents=True)
        for each in range(5):
            pixels = np.random.default_rng([seed, number, each]).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / name / f"{each}.png")


def _masks(place: Path, seed: int) -> None:
    for kind in ("images", "masks"):
        (place / kind).mkdir(parents=True)
    for each in range(5):
        mask = np.random.default_rng([seed, each]).integers(0, 3, (4, 4), dtype=np.uint8)
        Image.fromarray(mask).save(place / "masks" / f"{each}.png")
        Image.fromarray(np.stack([mask * 60] * 3, 2)).save(place / "images" / f"{each}.png")


def _lines(seed: int, form: Callable[[str, int], Any]) -> list[Any]:
    words = ["ant", "bear", "cod", "deer", "eel"]
    return [form(words[(each + seed) % 5] + " " + words[each * (seed + 2) % 5], each) for each in range(12)]


def _text(place: Path, seed: int) -> None:
    place.write_text("".join(_lines(seed, lambda text, _: text + "\n")) * 4)


def _labelled(place: Path, seed: int) -> None:
    write_lines(place, _lines(seed, lambda text, at: {"t": text, "y": "odd" if at % 2 else "even"}))


def _tagged(place: Path, seed: int) -> None:
    place.write_text("".join(_lines(seed, lambda text, at: f"{text.split()[0]}\tO\n{text.split()[1]}\tB-X\n\n")))


def _pairs(place: Path, seed: int) -> None:
    place.write_text("".join(_lines(seed, lambda text, at: f"{text}\t{text[::-1]}\n")))


def _chat(place: Path, seed: int) -> None:
    roles = ("user", "assistant")
    messages = _lines(seed, lambda text, at: list(zip(roles, text.split(), strict=True)))
    write_lines(place, [{"messages": [{"role": who, "content": what} for who, what in each]} for each in messages])


def _preference(place: Path, seed: int) -> None:
    write_lines(place, _lines(seed, lambda text, at: {"prompt": text, "chosen": text[:3], "rejected": text[-2:]}))


KINDS: dict[str, tuple[Callable[[Path, int], None], str, str, str, str]] = {
    "table": (_table, ".csv", "classification", "target: y", "name: mlp, hidden: [4]"),
    "image_folder": (_image_classes, "", "classification", "size: 8", "name: mlp, hidden: [4]"),
    "image_masks": (_masks, "", "segmentation", "classes: 3", "name: PIXELS:Pixels"),
    "text": (_text, ".txt", "language_modeling", "seq_len: 8", f"name: gpt, {SMALL}"),
    "text_classification": (
        _labelled,
        ".jsonl",
        "classification",
        "text: t, label: y, tokenizer: TOKENIZER",
        f"name: text_classifier, {SMALL}",
    ),
    "tagged_text": (_tagged, ".conll", "token_classification", "max_len: 9", f"name: token_classifier, {SMALL}"),
    "parallel_text": (
        _pairs,
        ".tsv",
        "seq2seq",
        "source_tokenizer: chars, target_tokenizer: words",
        "name: seq2seq, kind: gru, d_model: 8, n_layer: 1",
    ),
    "chat": (_chat, ".jsonl", "language_modeling", "tokenizer: TOKENIZER, seq_len: 64", f"name: gpt, {SMALL}"),
    "preference": (_preference, ".jsonl", "dpo", "tokenizer: TOKENIZER, seq_len: 64", f"name: gpt, {SMALL}"),
}
METRICS = {"classification": "[accuracy]", "segmentation": "[mean_iou]", "token_classification": "[token_accuracy]"}

PIXELS = """
from torch import nn


class Pixels(nn.Conv2d):
    def __init__(self, num_classes):
        super().__init__(3, num_classes, 1)
"""


@pytest.mark.parametrize("name", KINDS)
def test_a_file_has_the_metrics_of_a_split_with_its_samples(tmp_path: Path, name: str) -> None:
    write, ending, task, data, model = KINDS[name]
    for seed, split in enumerate(("train", "test")):
        write(tmp_path / f"{split}{ending}", seed)
    save_tokenizer(tmp_path / "tokenizer", CHATML)
    (tmp_path / "pixels.py").write_text(PIXELS)
    text = RECIPE.format(
        task=task, name=name, data=f"path: {tmp_path}, {data}", folder=tmp_path, ending=ending, model=model,
        metrics=METRICS.get(task, "[]"),
    )  # fmt: skip
    text = text.replace("TOKENIZER", str(tmp_path / "tokenizer")).replace("PIXELS", str(tmp_path / "pixels.py"))
    run = tmp_path / "run"
    train(1, write_recipe(tmp_path, text), run)
    as_split = json.loads(cli("evaluate", run, "--json").out)
    # as data that are new: elsewhere, and nothing else is there any more
    (tmp_path / "later").mkdir()
    new = shutil.move(tmp_path / f"test{ending}", tmp_path / "later" / f"new{ending}")
    train_place = tmp_path / f"train{ending}"
    (shutil.rmtree if train_place.is_dir() else Path.unlink)(train_place)
    ended = cli("evaluate", run, new, "--json")
    assert ended.status == 0, ended.err
    found = json.loads(ended.out)
    assert found.pop("data") == str(new)
    assert as_split.pop("split") == "test"
    assert found == as_split
    assert len(found) > 3


def test_a_file_in_two_processes_and_in_another_form(tmp_path: Path) -> None:
    for seed, split in enumerate(("train", "test")):
        _table(tmp_path / f"{split}.csv", seed)
    _, ending, task, data, model = KINDS["table"]
    text = RECIPE.format(
        task=task, name="table", data=data, folder=tmp_path, ending=ending, model=model, metrics="[accuracy]"
    )
    run = tmp_path / "run"
    train(1, write_recipe(tmp_path, text), run)
    expected = json.loads(cli("evaluate", run, "--json").out)
    rows = pd.read_csv(tmp_path / "test.csv")
    rows[["y", "k", "x"]].to_csv(tmp_path / "new.csv", index=False, sep=";")
    ended = cli("evaluate", run, tmp_path / "new.csv", "--data", "delimiter=;", "--processes", 2, "--json")
    assert ended.status == 0, ended.err
    found = json.loads(ended.out)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert found["accuracy"] == expected["accuracy"]

    rows.drop(columns="y").to_csv(tmp_path / "bare.csv", index=False)
    for arguments, problem in [
        ([tmp_path / "bare.csv"], "lacks 'y', which the training data had"),
        ([tmp_path / "none.csv"], "it has train, test, and there is no such file"),
        ([tmp_path / "new.csv", "--split", "test"], "name one of them"),
        ([tmp_path / "new.csv", "--changed-data"], "leave it out"),
        (["--data", f"path={tmp_path}/new.csv"], "name the file behind the run"),
        (["--data", "delimiter"], "is not KEY=VALUE"),
    ]:
        ended = cli("evaluate", run, *arguments)
        assert (ended.status, ended.out) == (1, "")
        assert problem in ended.err


def test_a_table_of_images_and_a_folder_without_classes(tmp_path: Path) -> None:
    for seed, split in enumerate(("train", "test")):
        _image_classes(tmp_path / split, seed)
    _, ending, task, data, model = KINDS["image_folder"]
    data = f"path: {tmp_path}, {data}"
    text = RECIPE.format(
        task=task, name="image_folder", data=data, folder=tmp_path, ending=ending, model=model, metrics="[]"
    )
    run = tmp_path / "run"
    train(1, write_recipe(tmp_path, text), run)
    new = tmp_path / "new"
    new.mkdir()
    lines = ["file,label"]
    for number, picture in enumerate(sorted((tmp_path / "test").rglob("*.png"))):
        shutil.copy(picture, new / f"{number}.png")
        lines.append(f"{number}.png,{picture.parent.name}")
    (new / "list.csv").write_text("\n".join(lines))
    found = json.loads(cli("evaluate", run, new / "list.csv", "--json").out)
    assert found["loss"] == json.loads(cli("evaluate", run, "--json").out)["loss"]
    ended = cli("evaluate", run, new)
    assert (ended.status, ended.out) == (1, "")
    assert f"{new} has no folders of classes; name list.csv in it" in ended.err


OWN = """
import torch


def data(path, split):
    count = {"train": 12, "test": 8}[split] if path.endswith("old") else 5
    x = torch.arange(count * 2.0).reshape(count, 2) / count
    return x, x.sum(1)
"""


@pytest.mark.parametrize("kind", ["embedded", "own"])
def test_data_that_read_no_file_are_never_evaluated_in_its_place(tmp_path: Path, kind: str) -> None:
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "new.csv").write_text("a,b\n1,2\n")
    task, data = (
        ("classification", "name: iris")
        if kind == "embedded"
        else ("regression", f"name: {tmp_path}/own.py:data, path: old")
    )
    text = RECIPE.replace(
        "name: {name}, {data}, split: {{train: {folder}/train{ending}, test: {folder}/test{ending}}}", data
    )
    text = text.format(task=task, model="name: mlp, hidden: [4]", metrics="[]")
    run = tmp_path / "run"
    train(1, write_recipe(tmp_path, text), run)
    ended = cli("evaluate", run, tmp_path / "new.csv")
    assert (ended.status, ended.out) == (1, "")
    if kind == "embedded":
        assert "data set 'iris' is one piece, and reads no other files" in ended.err
        return
    assert "give it " in ended.err
    changed = cli("evaluate", run, "--data", "path=new", "--changed-data", "--json")
    assert changed.status == 0, changed.err
    assert json.loads(changed.out)["loss"] != json.loads(cli("evaluate", run, "--json").out)["loss"]
