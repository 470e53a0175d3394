"""Keys of a recipe that decide how a run begins: a later change of them would change nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import cli, last, train, write_recipe

from distrain.checkpoint import read_manifest
from distrain.run.folder import RunDir

RECIPE = """
name: fitted
task: {task}
data: {data}
model: {model}
batch: {{global: 8}}
train: {{steps: 4, precision: fp64}}
eval: {{every: null, batch: 8}}
checkpoint: {{every: 2 steps, keep: 100, async: false}}
"""
TABLE = "{name: table, path: rows.csv, target: kind, drop: [size, row], split: [0.75, 0.25]}"
SIZES = "{name: table, path: rows.csv, target: size, drop: [kind, row], split: [0.75, 0.25]}"
IRIS = "{name: iris, split: [0.6, 0.4]}"
PAIRS = "{name: parallel_text, path: pairs.tsv, split: [0.75, 0.25]}"
MODELS = {
    "seq2seq": "{name: seq2seq, kind: gru, d_model: 8, n_layer: 1}",
    "language_modeling": "{name: gpt, d_model: 8, n_layer: 1, n_head: 2}",
}


def write_data(folder: Path) -> None:
    rows = [
        f"{7 * i % 11 if i % 5 else ''},{'uvw'[i % 3]},{['no', 'yes'][i % 7 > 3]},{0.5 * i},{i // 2}" for i in range(24)
    ]
    (folder / "rows.csv").write_text("\n".join(["width,colour,kind,size,row", *rows]) + "\n")
    words = ["one", "two", "three", "four", "five", "six", "seven"]
    pairs = [f"{words[i % 7]} {words[i % 5]}\t{words[i % 3]} {words[i % 4]}" for i in range(24)]
    (folder / "pairs.tsv").write_text("\n".join(pairs) + "\n")


def begun(folder: Path, task: str, data: str) -> tuple[Path, Path]:
    """Return a recipe and its run, which was stopped after two of four steps."""
    write_data(folder)
    model = MODELS.get(task, "{name: mlp, hidden: [4]}")
    recipe = write_recipe(folder, RECIPE.format(task=task, data=data, model=model))
    train(1, recipe, folder / "run", stop_after=1)
    assert RunDir(folder / "run").finished is None
    return recipe, folder / "run"


@pytest.mark.parametrize(
    ("task", "data", "override", "was"),
    [
        ("binary", TABLE, "positive=no", "None"),
        ("regression", SIZES, "target=row", "size"),
        ("classification", IRIS, "standardize=false", "None"),
        ("seq2seq", PAIRS, "max_vocab=3", "None"),
    ],
)
def test_an_update_that_would_change_nothing_is_refused(
    tmp_path: Path, task: str, data: str, override: str, was: str
) -> None:
    recipe, run = begun(tmp_path, task, data)
    (ended,) = train(1, recipe, run, f"data.{override}", update=True, status=1)
    key = override.partition("=")[0]
    assert f"data.{key}: was {was}, now" in ended.err
    assert "this run keeps what its model was trained with" in ended.err


@pytest.mark.parametrize("override", ["data.missing=median", "model.bias=false"])
def test_a_run_whose_update_was_refused_has_its_recipe_and_resumes(tmp_path: Path, override: str) -> None:
    recipe, run = begun(tmp_path, "binary", TABLE)
    before = RunDir(run).recipe_path.read_text()
    for _ in range(2):
        train(1, recipe, run, override, update=True, status=1)
        assert RunDir(run).recipe_path.read_text() == before
    train(1, recipe, run)
    assert RunDir(run).finished is not None
    assert not list(run.glob(".recipe*"))


def test_another_data_set_whose_facts_are_fitted_is_refused(tmp_path: Path) -> None:
    _, run = begun(tmp_path, "classification", IRIS)
    table = RECIPE.format(task="classification", data=TABLE, model=MODELS.get("", "{name: mlp, hidden: [4]}"))
    (ended,) = train(1, write_recipe(tmp_path, table), run, update=True, status=1)
    assert "data.name: was iris, now table" in ended.err


@pytest.mark.parametrize(
    ("task", "data", "override"),
    [("binary", TABLE, "id=row"), ("seq2seq", PAIRS, "max_len=9")],
)
def test_what_is_no_part_of_it_changes(tmp_path: Path, task: str, data: str, override: str) -> None:
    recipe, run = begun(tmp_path, task, data)
    (ended,) = train(1, recipe, run, f"data.{override}", update=True)
    assert f"updated  data.{override.partition('=')[0]}: was null, now" in ended.out + ended.err


def test_an_evaluation_refuses_it_too(tmp_path: Path) -> None:
    _, run = begun(tmp_path, "regression", SIZES)
    assert cli("evaluate", run, "--data", "workers=1").status == 0
    ended = cli("evaluate", run, "--data", "standardize_target=true")
    assert ended.status == 1
    assert "data.standardize_target changes what is fitted" in ended.err


HALVES = """
from distrain import Callback


class Halves(Callback):
    def on_start(self, run):
        for group in run.optimizer.param_groups if run.resumed_step is None else ():
            group["lr_scale"] *= 0.5
"""


def test_a_setting_that_a_callback_has_changed_is_said_to_last(tmp_path: Path) -> None:
    (tmp_path / "halves.py").write_text(HALVES)
    write_data(tmp_path)
    groups = "optim: {groups: [{params: '*.bias', lr_scale: 0.8}]}\ncallbacks: ['halves.py:Halves']\n"
    text = RECIPE.format(task="binary", data=TABLE, model="{name: mlp, hidden: [4]}") + groups
    recipe = write_recipe(tmp_path, text)
    train(1, recipe, tmp_path / "run", stop_after=1)
    (ended,) = train(1, recipe, tmp_path / "run", "optim.groups.0.lr_scale=0.1", "optim.weight_decay=0.1", update=True)
    said = " ".join((ended.out + ended.err).split())
    assert (
        "optim.groups.0.lr_scale changed, without effect where a callback or the optimizer has changed a group's"
        in said
    )
    assert "optim.weight_decay changed, without" not in said
    scales = [group["lr_scale"] for group in read_manifest(last(tmp_path / "run")).scalars["optimizer_groups"]]
    assert scales == [0.5, 0.4]


def test_other_initial_weights_are_said_to_be_unread(tmp_path: Path) -> None:
    recipe, run = begun(tmp_path, "classification", IRIS)
    train(1, recipe, tmp_path / "other", "seed=1")
    weights = f"model.weights={tmp_path / 'other' / 'export' / 'model.safetensors'}"
    (ended,) = train(1, recipe, run, weights, update=True)
    assert "model.weights changed, and a resumed run reads none" in ended.out + ended.err


@pytest.mark.parametrize(
    ("task", "data", "file", "kept"),
    [
        ("binary", TABLE, "rows.csv", True),
        ("seq2seq", PAIRS, "pairs.tsv", True),
        ("language_modeling", "{name: text, path: pairs.tsv, seq_len: 8, split: [0.75, 0.25]}", "pairs.tsv", False),
    ],
)
def test_that_grown_data_are_fitted_as_before_is_said(
    tmp_path: Path, task: str, data: str, file: str, kept: bool
) -> None:
    recipe, run = begun(tmp_path, task, data)
    lines = (tmp_path / file).read_text().splitlines()
    more = [line.replace("one", "eight").replace("u", "x") for line in lines[1:]]
    (tmp_path / file).write_text("\n".join([*lines, *more]) + "\n")
    (ended,) = train(1, recipe, run, update=True)
    said = ended.out + ended.err
    assert f"updated  data file {file}" in said
    assert ("stays as it was, as its model was trained with it" in " ".join(said.split())) == kept


def test_an_average_that_a_resume_would_begin_is_refused_by_its_key(tmp_path: Path) -> None:
    text = RECIPE.format(task="classification", data=IRIS, model="{name: mlp, hidden: [4]}")
    recipe, run = write_recipe(tmp_path, text), tmp_path / "run"
    train(1, recipe, run, "train.steps=2")
    [ended] = train(1, recipe, run, "train.ema=0.9", update=True, status=1)
    assert "train.ema is 0.9, and the checkpoint of step 2 holds no average of the weights" in ended.err
    train(1, recipe, run, update=True)
    assert last(run).name == "step-00000004"
