"""Using trained models: predictions by task, from splits and from files, and which checkpoint a command means."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from runs import checkpoint, cli, train, write_recipe
from safetensors.torch import load_file
from sklearn import datasets, metrics

from distrain.checkpoint import find_checkpoint, list_checkpoints
from distrain.config import UserError
from distrain.config.yaml import load_recipe
from distrain.data import build_data
from distrain.models import build_model
from distrain.system.numbers import counted

RECIPE = """
name: {name}
task: {task}
data: {{name: {name}}}
model: {{name: mlp, hidden: [16]}}
optim: {{lr: 1.0e-2}}
batch: {{global: 32}}
train: {{steps: {steps}, ema: 0.5}}
eval: {{every: null}}
checkpoint: {{every: 10 steps, async: false}}
"""


def trained(folder: Path, name: str, task: str, steps: int = 20, *overrides: str) -> Path:
    train(1, write_recipe(folder, RECIPE.format(name=name, task=task, steps=steps)), folder / "run", *overrides)
    return folder / "run"


def predict(run: Path, inputs: str | Path, out: Path) -> pd.DataFrame:
    ended = cli("predict", run, inputs, "-o", out)
    assert ended.status == 0, ended.err
    frame = pd.read_csv(out) if out.suffix == ".csv" else pd.read_parquet(out)
    assert ended.out == f"wrote {counted(len(frame), 'prediction')} to {out}\n"
    return frame


def scores(run: Path) -> dict[str, float]:
    return json.loads((run / "FINISHED").read_text())["test"]


def targets(run: Path, split: str = "test") -> np.ndarray:
    source = build_data(load_recipe(run / "recipe.yaml").recipe).splits[split]
    return source.fetch(np.arange(len(source)))["targets"].numpy()


def test_classes_of_a_split(tmp_path: Path) -> None:
    run = trained(tmp_path, "digits", "classification")
    for out in (tmp_path / "out.csv", tmp_path / "out.parquet"):
        frame = predict(run, "test", out)
        assert frame["row"].tolist() == list(range(359))
        shares = frame[[f"probability_{digit}" for digit in range(10)]].to_numpy()
        np.testing.assert_allclose(shares.sum(1), 1)
        np.testing.assert_array_equal(frame["prediction"].astype(int), shares.argmax(1))
        np.testing.assert_allclose(frame["probability"], shares.max(1))
        np.testing.assert_array_equal(frame["target"].astype(int), targets(run))
        assert metrics.accuracy_score(targets(run), frame["prediction"].astype(int)) == scores(run)["accuracy"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_classes_of_images_in_a_file(tmp_path: Path) -> None:
    run = trained(tmp_path, "digits", "classification")
    images = datasets.load_digits().images[:7]
    np.save(tmp_path / "new.npy", images)
    frame = predict(run, tmp_path / "new.npy", tmp_path / "out.csv")
    assert len(frame) == 7
    whole = pd.concat([predict(run, split, tmp_path / f"{split}.csv") for split in ("train", "test")])
    known = {tuple(np.round(row, 5)) for row in whole.filter(like="probability_").to_numpy()}
    assert {tuple(np.round(row, 5)) for row in frame.filter(like="probability_").to_numpy()} <= known


def test_the_two_classes_of_a_table(tmp_path: Path) -> None:
    run = trained(tmp_path, "breast_cancer", "binary")
    frame = predict(run, "test", tmp_path / "out.csv")
    assert set(frame["prediction"]) == {"malignant", "benign"}
    assert ((frame["probability"] > 0.5) == (frame["prediction"] == "benign")).all()
    truth = targets(run) > 0.5
    assert metrics.accuracy_score(truth, frame["prediction"] == "benign") == pytest.approx(scores(run)["accuracy"])
    bunch = datasets.load_breast_cancer()
    table = pd.DataFrame(bunch.data, columns=bunch.feature_names)
    # another order of columns, and one more
    table[[*reversed(table.columns)]].assign(comment="x").to_csv(tmp_path / "new.csv", index=False)
    whole = predict(run, tmp_path / "new.csv", tmp_path / "whole.csv")
    assert len(whole) == 569
    assert metrics.accuracy_score(bunch.target, whole["prediction"] == "benign") > 0.8
    table.drop(columns="mean radius").to_csv(tmp_path / "lacks.csv", index=False)
    ended = cli("predict", run, tmp_path / "lacks.csv", "-o", tmp_path / "no.csv")
    assert ended.status == 1
    assert "lacks the columns 'mean radius'" in ended.err
    assert not (tmp_path / "no.csv").exists()


@pytest.mark.parametrize(
    ("loss", "end"), [("bce", "{Linear: [30, 1]}, Sigmoid"), ("cross_entropy", "{Linear: [30, 2]}")]
)
def test_probabilities_of_models_that_end_otherwise(tmp_path: Path, loss: str, end: str) -> None:
    model = f"model={{name: sequential, layers: [{end}]}}"
    run = trained(tmp_path, "breast_cancer", "binary", 60, model, f"loss={loss}", "eval.metrics=[accuracy, auroc]")
    frame = predict(run, "test", tmp_path / "out.csv")
    truth, found = targets(run) > 0.5, scores(run)
    assert found["accuracy"] > 0.9
    assert metrics.accuracy_score(truth, frame["prediction"] == "benign") == pytest.approx(found["accuracy"])
    assert metrics.roc_auc_score(truth, frame["probability"]) == pytest.approx(found["auroc"])
    assert ((frame["probability"] > 0.5) == (frame["prediction"] == "benign")).all()
    assert frame["probability"].min() < 0.1


def test_a_text_ends_with_the_positions_of_a_transformers_model(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("the quick brown fox\n" * 40)
    config = "{model_type: gpt2, n_embd: 8, n_layer: 1, n_head: 1, n_positions: 24}"
    overrides = (
        "task=language_modeling",
        f"data={{name: text, path: {tmp_path}/corpus.txt, seq_len: 16}}",
        f"model={{name: 'transformers:AutoModelForCausalLM', config: {config}}}",
        "train.precision=bf16",
    )
    run = trained(tmp_path, "digits", "classification", 2, *overrides)
    ended = cli("evaluate", run, "--json")
    assert json.loads(ended.out)["loss"] == scores(run)["loss"], "computed as in training, and not as text is written"
    (tmp_path / "prompts.txt").write_text("the quick")
    frame = predict(run, tmp_path / "prompts.txt", tmp_path / "out.parquet")
    assert frame["text"][0].startswith("the quick")
    assert len(frame["text"][0].encode(errors="replace")) >= 24
    (tmp_path / "prompts.txt").write_text("the quick brown fox jumps over")
    ended = cli("predict", run, tmp_path / "prompts.txt", "-o", tmp_path / "no.csv")
    assert ended.status == 1
    assert "a prompt has 30 tokens, and the model 24 positions" in ended.err


@pytest.mark.parametrize("standardize", [False, True])
def test_numbers_in_their_own_units(tmp_path: Path, standardize: bool) -> None:
    run = trained(tmp_path, "diabetes", "regression", 60, f"data.standardize_target={str(standardize).lower()}")
    frame = predict(run, "test", tmp_path / "out.csv")
    truth = datasets.load_diabetes(scaled=False)
    table = pd.DataFrame(truth.data, columns=truth.feature_names)
    table.to_csv(tmp_path / "new.csv", index=False)
    whole = predict(run, tmp_path / "new.csv", tmp_path / "whole.csv")
    assert len(whole) == 442
    assert np.isin(frame["target"], truth.target).all(), "in their own units too"
    if standardize:
        assert whole["prediction"].between(-100, 500).all()
        assert metrics.r2_score(truth.target, whole["prediction"]) > 0.2
    else:
        wanted = metrics.mean_absolute_error(targets(run), frame["prediction"])
        assert scores(run)["mae"] == pytest.approx(wanted, rel=1e-5)
    # the split's rows are among those of the file
    known = np.sort(whole["prediction"].to_numpy())
    nearest = known[np.searchsorted(known, frame["prediction"]).clip(0, len(known) - 1)]
    assert np.abs(nearest - frame["prediction"]).max() < np.ptp(known)


def test_what_cannot_be_predicted_is_refused(tmp_path: Path) -> None:
    run = trained(tmp_path, "digits", "classification")
    ended = cli("predict", run, "nowhere", "-o", tmp_path / "x.csv")
    assert ended.status == 1
    assert "there is no file nowhere, and data set 'digits' has no such split (train, test)" in ended.err
    (tmp_path / "link.csv").symlink_to(tmp_path / "target.csv")
    ended = cli("predict", run, "test", "-o", tmp_path / "link.csv")
    assert ended.status == 1
    assert "not a symbolic link" in ended.err
    assert not (tmp_path / "target.csv").exists()


def test_which_checkpoint_a_command_means(tmp_path: Path) -> None:
    run = trained(tmp_path, "digits", "classification", 30, "eval.every=10 steps", "eval.best=accuracy")
    exported = json.loads((run / "FINISHED").read_text())["exported_step"]
    assert find_checkpoint(run) == checkpoint(run, exported)
    assert find_checkpoint(checkpoint(run, 10)) == checkpoint(run, 10)
    (run / "FINISHED").unlink()
    assert find_checkpoint(run) == checkpoint(run, 30)
    # a damaged one is passed over
    (file,) = checkpoint(run, 30).glob("rank-*")
    file.write_bytes(file.read_bytes()[:-1])
    assert find_checkpoint(run) == checkpoint(run, 20)
    for info in list_checkpoints(run / "checkpoints"):
        next(info.path.glob("rank-*")).unlink()
    with pytest.raises(UserError, match="has no checkpoint that can be used\n  step-00000030: "):
        find_checkpoint(run)


def test_a_moved_run_is_found_where_it_is_now(tmp_path: Path) -> None:
    run = trained(tmp_path, "digits", "classification")
    moved = run.rename(tmp_path / "moved")
    assert find_checkpoint(moved) == checkpoint(moved, 20)
    assert cli("evaluate", moved).status == 0


TABLE = """
name: table
task: regression
data: {name: table, target: y, standardize_target: true, split: {train: train.csv, test: test.csv}}
model: {name: mlp, hidden: [4]}
optim: {name: sgd, lr: 1.0e-2}
batch: {global: 64}
train: {epochs: 1, precision: fp64}
eval: {metrics: [mae]}
checkpoint: {async: false}
"""


def test_a_table_in_fp64_and_its_report(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    frame = pd.DataFrame({"x": draw.normal(size=40) * 1e-21, "kind": ["u", "v"] * 20, "y": 1e7 + draw.normal(size=40)})
    frame.to_csv(tmp_path / "train.csv")
    frame.assign(kind=["u", "w"] * 20).to_csv(tmp_path / "test.csv", index=False)
    (rank,) = train(1, write_recipe(tmp_path, TABLE), tmp_path / "run")
    said = [line for line in rank.out.splitlines() if line.startswith("warning: ")]
    unknown = "column 'kind': 20 of 40 rows of {} have a category that no training row has, and count as unknown: 'w'"
    assert len(said) == 3
    assert "is a column without a name, as pandas writes its index, and is skipped" in said[0]
    assert unknown.format("the split 'test'") in said[1]
    assert "train is 1 epoch, 40 samples, and the one step that is made of it takes batch.global 64" in said[2]

    ended = cli("evaluate", tmp_path / "run", "--json")
    assert "warning: " + unknown.format("the split 'test'") in ended.err
    assert json.loads(ended.out) == pytest.approx(json.loads(ended.out) | scores(tmp_path / "run"))
    frame.assign(kind="w").to_csv(tmp_path / "new.csv")
    ended = cli("predict", tmp_path / "run", tmp_path / "new.csv", "-o", tmp_path / "out.parquet")
    assert ended.status == 0
    assert f"warning: column 'kind': 40 of 40 rows of {tmp_path / 'new.csv'}" in ended.err

    weights = load_file(tmp_path / "run" / "export" / "model.safetensors")
    assert {each.dtype for each in weights.values()} == {torch.float64}
    x = torch.from_numpy((frame["x"] - frame["x"].mean()).to_numpy() / frame["x"].to_numpy().std())
    inputs = torch.cat([x[:, None], torch.zeros(40, 2, dtype=torch.float64)], dim=1)
    recipe = load_recipe(tmp_path / "run" / "recipe.yaml").recipe
    model = build_model(recipe, build_data(recipe).meta).eval()
    model.load_state_dict(weights)
    with torch.no_grad():
        wanted = model(inputs).flatten().numpy()
    y = frame["y"].to_numpy()
    wanted = wanted * (y - y[0]).std() + y.mean()
    found = pd.read_parquet(tmp_path / "out.parquet")
    np.testing.assert_allclose(found["prediction"], wanted, rtol=1e-14)
    np.testing.assert_allclose(found["target"], y, rtol=1e-15)


def test_predictions_that_mean_nothing_are_named(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\n\n\nclass Points(list):\n    classes = ('a', 'b')\n\n    def __init__(self):\n"
        "        super().__init__((torch.tensor([float(n), 1.0]), n % 2) for n in range(8))\n\n"
        "    def read(self, path):\n        return [(x / (n != 2) * (n != 2),) for n, (x, _) in enumerate(self)]\n"
    )
    overrides = (f"data={{name: '{tmp_path}/mine.py:Points', split: [0.5, 0.5]}}", "batch.global=4")
    run = trained(tmp_path, "digits", "classification", 1, *overrides)
    (tmp_path / "any").write_text("")
    ended = cli("predict", run, tmp_path / "any", "-o", tmp_path / "out.csv")
    assert ended.status == 0
    assert "gives NaN or infinity for 1 sample, whose predictions mean nothing: the rows 2; look for NaN" in ended.err
    assert pd.read_csv(tmp_path / "out.csv")["probability"].isna().tolist() == [row == 2 for row in range(8)]
