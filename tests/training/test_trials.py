"""What is tried before the first step: whether a model reads padding, and whether a task's losses are sums."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import cli, rows, train, write_recipe

RECIPE = """
name: ragged
task: {task}
data: {{name: "ragged_parts:{data}", split: {split}{more}}}
model: "ragged_parts:{model}"
optim: {{name: sgd, lr: 0.1}}
batch: {{global: 16}}
train: {{steps: 1, precision: fp64}}
eval: {{every: 1 steps}}
"""
READS, NO_SUM = "reads padding, so that metrics", "is not what its parts have together"
COMPANY = "computes something else of a sample where other samples are beside it"


def said(tmp_path: Path, task: str, data: str, model: str, *overrides: str, strategy: str = "auto") -> str:
    name, _, kind = data.partition(" ")
    split = "null" if name == "Stream" else "[0.8, 0.2]"
    text = RECIPE.format(task=task, data=name, split=split, more=kind and f", kind: {kind}", model=model)
    world_size = 1 if strategy == "auto" else 2
    ended = train(world_size, write_recipe(tmp_path, text), tmp_path / "run", *overrides, strategy=strategy)
    return " ".join((ended[0].out + ended[0].err).split())


@pytest.mark.parametrize(
    ("data", "model", "reads"),
    [
        ("Sequences", "Mean", True),
        ("Sequences", "MeanOfTokens", False),
        ("Sequences sorted", "Mean", True),
        ("Sequences features", "MeanOfFeatures", True),
        ("Sequences waves", "MeanOfWave", True),
        ("Sequences waves", "MeanOfLoud", False),
        ("Stream", "Mean", True),
        ("Stream", "MeanOfTokens", False),
    ],
)
def test_what_reads_padding_is_warned_of(tmp_path: Path, data: str, model: str, reads: bool) -> None:
    assert (READS in said(tmp_path, "classification", data, model)) is reads


def test_what_reads_padding_is_warned_of_where_it_evaluates_and_predicts(tmp_path: Path) -> None:
    said(tmp_path, "classification", "Sequences features", "MeanOfFeatures")
    for arguments in (
        ["evaluate", tmp_path / "run"],
        ["predict", tmp_path / "run", "test", "-o", tmp_path / "out.csv"],
    ):
        ended = cli(*arguments)
        assert READS in " ".join((ended.out + ended.err).split()), ended


@pytest.mark.parametrize(
    ("model", "strategy", "warned"),
    [("Centred", "fsdp2", True), ("MeanOfTokens", "fsdp2", False), ("Dropped", "auto", False)],
)
def test_what_looks_at_other_samples_is_warned_of(tmp_path: Path, model: str, strategy: str, warned: bool) -> None:
    assert (COMPANY in said(tmp_path, "classification", "Sequences", model, strategy=strategy)) is warned


def test_what_looks_at_other_samples_is_warned_of_once_and_wherever_it_computes(tmp_path: Path) -> None:
    found = said(tmp_path, "classification", "Sequences", "Centred", "train.steps=3")
    assert found.count(COMPANY) == 1
    for arguments in (
        ["evaluate", tmp_path / "run"],
        ["predict", tmp_path / "run", "test", "-o", tmp_path / "out.csv"],
    ):
        ended = cli(*arguments)
        assert " ".join((ended.out + ended.err).split()).count(COMPANY) == 1, ended


@pytest.mark.parametrize(
    ("task", "model", "strategy"),
    [
        ("MeanOverTokens", "Next", "auto"),
        ("MeanOverTokens", "Next", "fsdp2"),
        ("Contrastive", "MeanOfTokens", "auto"),
    ],
)
def test_losses_that_are_no_sums_over_samples_are_warned_of(
    tmp_path: Path, task: str, model: str, strategy: str
) -> None:
    data = "Sequences next" if model == "Next" else "Sequences"
    assert NO_SUM in said(tmp_path, f'"ragged_parts:{task}"', data, model, strategy=strategy)


@pytest.mark.parametrize("task", ["SumOverTokens", "Drawn"])
def test_losses_that_are_sums_are_not(tmp_path: Path, task: str) -> None:
    assert NO_SUM not in said(tmp_path, f'"ragged_parts:{task}"', "Sequences next", "Next")


@pytest.mark.parametrize("strategy", ["fsdp2", pytest.param("zero3", marks=pytest.mark.more)])
def test_a_trial_that_fails_leaves_nothing_gathered(tmp_path: Path, strategy: str) -> None:
    said(tmp_path, "classification", "Sequences", "Windows", "train.precision=fp32", strategy=strategy)


def test_losses_and_metrics_that_count_padding_are_warned_of(tmp_path: Path) -> None:
    found = said(
        tmp_path,
        "language_modeling",
        "Sequences next",
        "Next",
        "loss=ragged_parts:mean_of_all",
        "eval.metrics=[ragged_parts:hits_of_all, ragged_parts:hits]",
        "train.steps=20",
        "eval.every=10 steps",
    )
    assert "loss ragged_parts:mean_of_all of a sample is another number where a longer one is beside it" in found
    assert "metric hits_of_all counts padding" in found
    assert found.count("counts padding") == 2


def test_numbers_that_are_padding_are_warned_of(tmp_path: Path) -> None:
    found = said(tmp_path, "regression", "Sequences numbers", "Number")
    assert "loss mse of a sample is another number where a longer one is beside it: it counts padding" in found


@pytest.mark.parametrize("data", ["Sequences", "Sequences broken"])
def test_a_batch_of_ones_own_holds_no_padding(tmp_path: Path, data: str) -> None:
    found = []
    for strategy, batch in (("auto", 8), ("ddp", 8), ("ddp", 3)):
        more = "data.split=[0.825,0.175]", "data.skip_corrupt=10", f"eval.batch={batch}", "batch.micro=8"
        folder = tmp_path / f"{strategy}-{batch}"
        folder.mkdir()
        said(folder, '"ragged_parts:Bags"', data, "SumOfBags", *more, strategy=strategy)
        (row,) = [each for each in rows(folder / "run") if each["event"] == "eval"]
        found.append([row["loss"], row["largest"], row["samples"]])
    assert found[1] == pytest.approx(found[0], rel=1e-12)
    assert found[2] == pytest.approx(found[0], rel=1e-12)


RARE = """
import distrain
import torch
from torch.nn.functional import cross_entropy

def points():
    classes = torch.zeros(64, dtype=torch.int64)
    classes[5::16] = 1
    inputs = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    return {"train": (inputs, classes), "test": (inputs, classes)}

def weighted(outputs, targets):
    return cross_entropy(outputs, targets, weight=torch.tensor([1.0, 9.0]))

def single(outputs, targets):
    return cross_entropy(outputs, targets, weight=torch.tensor([1.0, 9.0]), reduction="none")

class Weighted(distrain.Task):
    form = "classification"

    def losses(self, model, batch):
        return {"entropy": weighted(model(batch["inputs"]), batch["targets"])}

class Single(Weighted):
    def losses(self, model, batch):
        return {"entropy": single(model(batch["inputs"]), batch["targets"])}
"""
RARELY = """
name: rare
task: {task}
data: "rare.py:points"
model: {{name: mlp, hidden: [4], num_outputs: 2}}
{loss}
batch: {{global: 12, micro: 3}}
train: {{steps: 1}}
"""


@pytest.mark.parametrize(
    ("task", "loss", "words"),
    [
        ("classification", "weighted", "is no mean over samples"),
        ("classification", "single", ""),
        ("Weighted", "", NO_SUM),
        ("Single", "", ""),
    ],
)
def test_a_mean_by_classes_is_found_where_the_first_samples_are_of_one(
    tmp_path: Path, task: str, loss: str, words: str
) -> None:
    (tmp_path / "rare.py").write_text(RARE)
    text = RARELY.format(
        task=task if task == "classification" else f'"rare.py:{task}"', loss=loss and f'loss: "rare.py:{loss}"'
    )
    (ended,) = train(1, write_recipe(tmp_path, text), tmp_path / "run")
    found = " ".join((ended.out + ended.err).split())
    assert words in found
    assert words or ("another number" not in found and "no mean over" not in found)
