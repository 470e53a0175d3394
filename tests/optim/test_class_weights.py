"""Weights of the loss that are computed from the labels of the training split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import TINY, assert_close, assert_same_run, last, train, write_recipe
from sklearn.utils.class_weight import compute_class_weight

from distrain.checkpoint import Reader
from distrain.config import Recipe, UserError
from distrain.data import build_data
from distrain.datasets.class_counts import COUNTS
from distrain.optim import build_loss, check_loss

DATA = """import torch


class Samples(torch.utils.data.Dataset):
    def __init__(self, targets):
        self.targets = targets

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return torch.full((3,), float(index)), self.targets[index]


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return ((torch.ones(3), 0) for _ in range(8))


def classes():
    return {"train": Samples([0, 2, 1, 0, 0, 2]), "test": Samples([0, 1, 2])}


def without():
    return {"train": Samples([0, 2, 0, 0]), "test": Samples([1])}


def labels():
    targets = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
    return {"train": Samples(targets), "test": Samples(targets)}


class Broken(Samples):
    def __getitem__(self, index):
        if index in (1, 4):
            raise ValueError("broken")
        return super().__getitem__(index)


def broken():
    return {"train": Broken([0, 2, 1, 0, 0, 2]), "test": Samples([0, 1, 2])}


def stream():
    return {"train": Stream(), "test": Stream()}
"""


@pytest.fixture
def own(tmp_path: Path) -> str:
    (tmp_path / "own.py").write_text(DATA)
    return f"{tmp_path}/own.py"


def _recipe(task: str, data: Any, loss: Any) -> Recipe:
    sections = {"data": data, "model": "mlp", "loss": loss, "batch": {"global": 4}, "train": {"steps": 1}}
    return Recipe.model_validate({"name": "weighted", "task": task, **sections})


def _weights(recipe: Recipe) -> torch.Tensor:
    data = build_data(recipe)
    again = build_data(recipe, state=data.state)
    assert again.state[COUNTS] == data.state[COUNTS]
    module: Any = build_loss(recipe, data.meta)._modules["sum"]  # type: ignore[attr-defined]
    return module.weight if module.weight is not None else module.pos_weight


def test_weights_of_classes_are_those_of_scikit_learn(own):
    found = _weights(_recipe("classification", f"{own}:classes", {"name": "cross_entropy", "weight": "balanced"}))
    expected = compute_class_weight("balanced", classes=np.arange(3), y=[0, 2, 1, 0, 0, 2])
    assert found.tolist() == pytest.approx(expected.tolist())
    digits = _recipe("classification", "digits", {"name": "cross_entropy", "weight": "balanced"})
    labels = build_data(digits).splits["train"].targets.numpy()  # type: ignore[union-attr]
    expected = compute_class_weight("balanced", classes=np.arange(10), y=labels)
    assert _weights(digits).tolist() == pytest.approx(expected.tolist())


def test_positive_weights_make_both_values_of_a_label_weigh_the_same(own):
    loss = {"name": "bce_with_logits", "pos_weight": "balanced"}
    assert _weights(_recipe("multilabel", f"{own}:labels", loss)).tolist() == pytest.approx([1 / 3, 3.0])
    recipe = _recipe("binary", "breast_cancer", loss)
    labels = build_data(recipe).splits["train"].targets.numpy()  # type: ignore[union-attr]
    assert _weights(recipe).tolist() == pytest.approx([(labels == 0).sum() / (labels == 1).sum()])


def test_samples_that_are_skipped_as_corrupt_count_in_no_class(own):
    loss = {"name": "cross_entropy", "weight": "balanced"}
    with pytest.raises(UserError, match="item 1 cannot be read"):
        build_data(_recipe("classification", f"{own}:broken", loss))
    skipping = _recipe("classification", {"name": f"{own}:broken", "skip_corrupt": 2}, loss)
    assert build_data(skipping).state[COUNTS] == {"samples": 4, "counts": [2, 1, 1]}


def test_counts_of_a_checkpoint_are_used_and_not_taken_anew(own):
    recipe = _recipe("classification", f"{own}:classes", {"name": "cross_entropy", "weight": "balanced"})
    meta = build_data(recipe, state={COUNTS: {"samples": 6, "counts": [1, 2, 3]}}).meta
    assert (meta.class_counts, meta.counted_samples) == ((1, 2, 3), 6)


@pytest.mark.parametrize(
    ("task", "data", "loss", "words"),
    [
        ("classification", ":stream", {"name": "cross_entropy", "weight": "balanced"}, "no end that is known"),
        ("classification", ":without", {"name": "cross_entropy", "weight": "balanced"}, "no sample of 1"),
        ("classification", "digits", {"name": "multi_margin", "weight": "balanced"}, "cross_entropy and nll"),
        ("binary", "breast_cancer", {"name": "bce_with_logits", "weight": "balanced"}, "set pos_weight: balanced"),
        ("regression", "diabetes", {"name": "bce_with_logits", "pos_weight": "balanced"}, "binary and multilabel"),
    ],
)
def test_what_cannot_be_counted_is_an_error(task, data, loss, words, own):
    recipe = _recipe(task, own + data if data.startswith(":") else data, loss)
    problems = "\n".join(check_loss(recipe))
    if not problems:  # without data
        with pytest.raises(UserError) as caught:
            build_loss(recipe, build_data(recipe).meta)
        problems = str(caught.value)
    assert words in problems


def test_runs_in_other_worlds_and_resumed_ones_are_the_same(tmp_path):
    recipe = write_recipe(tmp_path, TINY + "loss: {name: cross_entropy, weight: balanced}\n")
    alone, pair, halves = (tmp_path / name for name in ("alone", "pair", "halves"))
    logged = train(1, recipe, alone)[0]
    assert "loss.weight: balanced by the 1,258 training samples" in logged.out + logged.err
    train(2, recipe, pair)
    assert_close(alone, pair, 1e-9)
    train(1, recipe, halves, stop_after=3)
    train(1, recipe, halves)
    assert_same_run(alone, halves)
    with Reader(last(alone)) as reader:
        assert sum(reader.manifest.scalars["data"][COUNTS]["counts"]) == 1258
