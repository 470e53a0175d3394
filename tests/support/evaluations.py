"""Recipes to evaluate, and the evaluation of an untrained model in this world."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from distrain.config import Recipe
from distrain.config.yaml import load_recipe
from distrain.data import build_data
from distrain.datasets.base import DataMeta
from distrain.datasets.evaluation import build_eval_loader
from distrain.metrics import build_metrics
from distrain.models import build_model
from distrain.parallel import open_world
from distrain.training.evaluation import evaluate
from distrain.training.tasks import Objective, TaskContext, build_objective

POINTS = """
name: points
task: classification
data: {{name: "own_parts:Points", tests: {tests}}}
model: {{name: mlp, hidden: [8]}}
batch: {{global: 6}}
train: {{steps: 6}}
eval: {{every: null, batch: 4, metrics: [accuracy, f1_macro, precision, recall, confusion_matrix]}}
checkpoint: {{async: false}}
"""


PAIRS = """
name: pairs
task: seq2seq
data: {{name: parallel_text, path: "{path}", split: [0.7, 0.3], source_tokenizer: chars, target_tokenizer: words}}
model: {{name: seq2seq, kind: gru, d_model: 16, n_layer: 1}}
optim: {{lr: 1.0e-2}}
batch: {{global: 12}}
train: {{steps: {steps}}}
eval: {{every: null, batch: 3, metrics: [bleu]}}
checkpoint: {{async: false}}
"""


def evaluate_untrained(
    recipe: str, load_batches: Any = build_eval_loader, overrides: Sequence[str] = (), together: bool = False
) -> dict[str, Any]:
    """Score the recipe's untrained model on its test split, in this world.

    `together`: as if a forward pass needed all ranks, as it does where they hold parts of the model.
    """
    parsed = load_recipe(recipe, overrides).recipe
    world = open_world("fp32")
    world.forward_is_collective = together
    data = build_data(parsed)
    model = build_model(parsed, data.meta)
    values = evaluate(
        model,
        bound_objective(parsed, data.meta, model),
        data.splits["test"],
        world=world,
        metrics=build_metrics(parsed, data.meta),
        batch_size=parsed.eval.batch or 4,
        meta=data.meta,
        load_batches=load_batches,
    )
    assert model.training, "as it was before"
    world.close()
    return values


def bound_objective(recipe: Recipe, meta: DataMeta, model: nn.Module) -> Objective:
    """Return what a recipe trains, with its model."""
    objective = build_objective(recipe, meta)
    objective.bind(model, TaskContext(recipe, meta, torch.device("cpu"), lambda: model))
    return objective


def write_pairs(folder: Path) -> Path:
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    random = np.random.default_rng(3)
    lines = []
    for _ in range(60):
        chosen = random.integers(0, 10, random.integers(1, 9)).tolist()
        lines.append(" ".join(str(number) for number in chosen) + "\t" + " ".join(words[number] for number in chosen))
    path = folder / "pairs.tsv"
    path.write_text("\n".join(lines) + "\n")
    return path
