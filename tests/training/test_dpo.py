"""Preferences: the loss is the published formula, and answers that are preferred become likelier."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chats import CHATML, save_tokenizer, write_lines
from runs import assert_close, assert_same_run, cli, rows, train, write_recipe

from distrain.config.yaml import parse_recipe
from distrain.data import build_data
from distrain.datasets.order import SampleOrder
from distrain.models import build_model
from distrain.networks.flops import training_flops, without_storage
from distrain.run.folder import RunDir
from distrain.training.tasks import TaskContext, build_objective

RECIPE = """
name: preferences
task: {{name: dpo, beta: 0.5}}
data:
  name: preference
  path: {base}/pairs.jsonl
  tokenizer: {base}/tokenizer
  seq_len: 64
  split: [0.75, 0.25]
model: {{name: gpt, n_layer: 1, n_head: 2, d_model: 16, dropout: 0.1}}
optim: {{name: adamw, lr: 1.0e-2}}
batch: {{global: 4}}
train: {{steps: 6, precision: fp64}}
eval: {{every: 3 steps}}
checkpoint: {{every: 3 steps, keep: 9, async: false}}
log: {{every: 1 steps}}
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    save_tokenizer(folder / "tokenizer", CHATML)
    pairs = [
        {"prompt": "p" * (1 + n % 3), "chosen": "yes" * (1 + n % 2), "rejected": "no" * (1 + n % 4)} for n in range(16)
    ]
    write_lines(folder / "pairs.jsonl", pairs)
    return folder


def log_probability(model: torch.nn.Module, tokens: list[int], targets: list[int]) -> float:
    """Return that of one answer, token by token."""
    logits = model(torch.tensor([tokens]))[0].log_softmax(-1)
    return sum(logits[at, target].item() for at, target in enumerate(targets) if target >= 0)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_the_formula_of_each_pair(base: Path, smoothing: float) -> None:
    recipe = parse_recipe(
        RECIPE.format(base=base).replace("beta: 0.5", f"beta: 0.5, label_smoothing: {smoothing}"), "here"
    )
    data = build_data(recipe)
    model, reference = (build_model(recipe, data.meta).eval() for _ in range(2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    objective: Any = build_objective(recipe, data.meta)
    objective.bind(model, TaskContext(recipe, data.meta, torch.device("cpu"), lambda: reference))
    source: Any = data.splits["train"]
    batch = source.fetch(np.arange(4))
    found = objective.loss_sum(model, batch)
    expected, margins = [], []
    for index in range(4):
        one = source.fetch(np.array([index]))
        reward = {}
        for side in ("chosen", "rejected"):
            document = one["inputs"][side]["input_ids"][0].tolist(), one["targets"][side][0].tolist()
            reward[side] = 0.5 * (log_probability(model, *document) - log_probability(reference, *document))
        margins.append(reward["chosen"] - reward["rejected"])
        ahead, behind = (math.log(1 + math.exp(-sign * margins[-1])) for sign in (1, -1))
        expected.append((1 - smoothing) * ahead + smoothing * behind)
    assert found.item() == pytest.approx(sum(expected), rel=1e-9)
    assert objective.task.logged["margin"].sum.item() == pytest.approx(sum(margins), rel=1e-9)
    assert objective.task.logged["accuracy"].sum.item() == sum(each > 0 for each in margins)
    assert min(map(abs, margins)) > 1e-3


def of(run: Path, event: str, name: str) -> list[float]:
    return [row[name] for row in rows(run) if row["event"] == event]


def test_the_margin_grows_alike_on_any_number_of_processes_and_resumes_to_the_bit(base: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, RECIPE.format(base=base))
    train(1, recipe, tmp_path / "one", "model.dropout=0")
    train(2, recipe, tmp_path / "two", "model.dropout=0")
    train(2, recipe, tmp_path / "sharded", "model.dropout=0", strategy="fsdp2")
    for other in ("two", "sharded"):
        assert_close(tmp_path / "one", tmp_path / other, 1e-9)
    assert of(tmp_path / "one", "train", "loss")[0] == pytest.approx(math.log(2))
    assert of(tmp_path / "one", "train", "margin")[0] == 0
    for name in ("margin", "accuracy"):
        assert of(tmp_path / "two", "eval", name) == pytest.approx(of(tmp_path / "one", "eval", name))
    margins = of(tmp_path / "one", "eval", "margin")
    assert margins[-1] > margins[0] > 0
    assert of(tmp_path / "one", "eval", "accuracy")[-1] == 1
    train(1, recipe, tmp_path / "whole")
    train(1, recipe, tmp_path / "cut", stop_after=3)
    train(1, recipe, tmp_path / "cut")
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_model_is_not_compared_with_other_weights_than_those_it_began_with(base: Path, tmp_path: Path) -> None:
    recipe = parse_recipe(RECIPE.format(base=base), "here")
    weights = build_model(recipe, build_data(recipe).meta).state_dict()
    file = tmp_path / "w.pt"
    torch.save(weights, file)
    text = RECIPE.format(base=base).replace("dropout: 0.1}", f"weights: {file}}}")
    train(1, write_recipe(tmp_path, text), tmp_path / "run", "train.steps=1", "eval.every=null")
    torch.save({name: each + 0.5 for name, each in weights.items()}, file)
    ended = cli("evaluate", tmp_path / "run")
    assert ended.status == 1
    assert "task dpo compares with the initial weights, and those in" in ended.err
    assert "weights file model.weights: w.pt: " in ended.err


def test_the_operations_of_a_step_are_those_of_the_model_and_of_the_frozen_one(base: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, RECIPE.format(base=base))
    train(1, recipe, tmp_path / "run", "log.peak_tflops=0.001", "train.steps=1")
    (row,) = (row for row in RunDir(tmp_path / "run").rows() if row["event"] == "train")
    counted = row["mfu"] / row["samples_per_s"] * 0.001 * 1e12 * 4
    parsed = parse_recipe(recipe.read_text(), "here")
    data = build_data(parsed)
    targets: Any = data.splits["train"].fetch(SampleOrder(12, parsed.seed).at(0, 4)[1])["targets"]
    longest = max(each.shape[1] for each in targets.values())
    model = without_storage(build_model(parsed, data.meta))
    assert model is not None
    trained = training_flops(
        model, lambda model, each: model(each["inputs"]).sum(), {"inputs": torch.zeros(8, longest).long()}
    )
    assert trained is not None
    assert counted == pytest.approx(trained * 4 / 3, rel=0.1)  # the frozen one goes forward alone
