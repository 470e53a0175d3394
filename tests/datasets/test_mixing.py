"""MixUp and CutMix: the same samples whatever the world, the micro-batch and the loader processes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from runs import TINY, assert_close, assert_same_run, train, write_recipe

from distrain.config import Recipe, UserError
from distrain.data import build_data, build_loader, build_transform
from distrain.datasets.base import DataMeta, TensorSource
from distrain.datasets.mixing import Mixing, mixing_problems
from distrain.datasets.order import SampleOrder

LENGTH, SIDE, CLASSES = 21, 6, 5
PIXELS = torch.randint(0, 256, (LENGTH, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
TARGETS = torch.arange(LENGTH) % CLASSES
FLIPPED = {"train": ["RandomHorizontalFlip", {"name": "RandomCrop", "size": SIDE, "padding": 1}]}


def _recipe(task: str = "classification", loss: Any = None, global_: int = 12, **data: Any) -> Recipe:
    section = {"name": "digits", "transforms": FLIPPED, **data}
    return Recipe.model_validate(
        {
            "name": "mixed", "task": task, "data": section, "model": "mlp", "batch": {"global": global_},
            "train": {"steps": 9}, "seed": 3, "loss": loss,
        }
    )  # fmt: skip


def _step_inputs(recipe: Recipe, world: int, micro: int, workers: int = 0, steps: int = 4, start: int = 0) -> list[Any]:
    """Return (inputs, targets, ids) of each step, in the order of positions, put together of all ranks' batches."""
    source, order = TensorSource(PIXELS, TARGETS), SampleOrder(LENGTH, recipe.seed)
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"workers": workers})})
    mixing = Mixing.of(recipe, DataMeta(num_classes=CLASSES), torch.float32)
    ranks = [
        list(
            build_loader(
                source, order, recipe=recipe, rank=rank, world_size=world, micro_batch_size=micro, start_step=start,
                stop_step=steps, transform=build_transform(recipe, "train"), mixing=mixing,
            )
        )
        for rank in range(world)
    ]  # fmt: skip
    return [
        tuple(
            torch.cat([batch[key] for micros in zip(*each, strict=True) for batch in micros])
            for key in ("inputs", "targets", "ids")
        )
        for each in zip(*ranks, strict=True)
    ]


BOTH = {"mixup": {"alpha": 0.4, "prob": 0.4}, "cutmix": {"prob": 0.4}}


@pytest.mark.parametrize("data", [{"mixup": {}}, {"cutmix": {"alpha": 0.7}}, BOTH])
def test_inputs_are_the_same_to_the_bit_in_any_world_and_micro_batch(data):
    recipe = _recipe(**data)
    whole = _step_inputs(recipe, 1, 12)
    for world, micro, workers in ((1, 3, 0), (2, 6, 0), (2, 1, 0), (4, 3, 0), (1, 4, 2)):
        for one, other in zip(whole, _step_inputs(recipe, world, micro, workers), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True)), (world, micro, workers)
    resumed = _step_inputs(recipe, 2, 3, start=2)
    assert all(torch.equal(a, b) for step in (0, 1) for a, b in zip(whole[step + 2], resumed[step], strict=True))


def test_a_mixed_sample_is_made_of_two_samples_as_they_look_in_this_epoch():
    recipe = _recipe(**BOTH)
    bare = _recipe()
    order, source = SampleOrder(LENGTH, recipe.seed), TensorSource(PIXELS, TARGETS)
    transform = build_transform(bare, "train")
    kinds = {"mixup": 0, "cutmix": 0, "alone": 0}
    steps, seen = 12, []
    for step, (inputs, targets, ids) in enumerate(_step_inputs(recipe, 1, 12, steps=steps)):
        positions = np.arange(step * 12, step * 12 + 12)
        for row, position in enumerate(positions.tolist()):
            epochs, pair = order.at_positions(np.sort(np.array([position, position ^ 1])))
            images = transform(source.fetch(pair), epochs)["inputs"]
            one, other = position % 2, 1 - position % 2
            assert ids[row] == pair[one]
            factor = targets[row][TARGETS[pair[one]]].item() if TARGETS[pair[0]] != TARGETS[pair[1]] else None
            expected = torch.zeros(CLASSES)
            if factor is not None:
                expected[TARGETS[pair[one]]], expected[TARGETS[pair[other]]] = factor, 1 - factor
                torch.testing.assert_close(targets[row], expected)
                seen.append(factor)
            same, theirs = inputs[row] == images[one], inputs[row] == images[other]
            if same.all() and factor == 1:
                kinds["alone"] += 1
            elif (same | theirs).all():
                kinds["cutmix"] += 1
                differs = (~same).any(0)
                if factor is not None and (images[one] != images[other]).any(0).all():
                    assert differs.sum().item() == round((1 - factor) * SIDE**2)
            else:
                kinds["mixup"] += 1
                if factor is not None:
                    torch.testing.assert_close(inputs[row], factor * images[one] + (1 - factor) * images[other])
    count = 12 * steps
    assert all(0.2 * count * share < kinds[kind] < 2 * count * share for kind, share in
               (("mixup", 0.4), ("cutmix", 0.4), ("alone", 0.2))), kinds  # fmt: skip
    assert 0.05 < np.mean([factor < 0.5 for factor in seen]) < 0.6


def test_the_factor_is_of_the_beta_distribution():
    mixing = Mixing.of(_recipe(mixup={"alpha": 0.4}), DataMeta(num_classes=CLASSES), torch.float32)
    assert mixing is not None
    drawn = mixing._drawn(np.arange(20_000), 0.4)
    assert abs(drawn.mean() - 0.5) < 0.01
    assert abs(drawn.var() - 1 / (4 * (2 * 0.4 + 1))) < 0.003


def test_shares_of_labels_and_of_both_classes_are_mixed():
    labels = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    mixing = Mixing.of(_recipe("multilabel", mixup={}), DataMeta(num_targets=2), torch.float64)
    assert mixing is not None
    batch = {"inputs": torch.tensor([[0.0], [8.0]]), "targets": labels, "ids": torch.tensor([4, 5]), "more": ["a", "b"]}
    mixed = mixing.apply(batch, np.array([10, 11]), 1)
    factor = mixed["targets"][0, 0].item()
    assert 0 < factor < 1
    assert mixed["targets"].dtype == torch.float64
    torch.testing.assert_close(mixed["inputs"], torch.tensor([[8.0 * (1 - factor)]]))
    assert (mixed["ids"].tolist(), mixed["more"]) == ([4], ["a"])


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"task": "regression", "mixup": {}}, ["data.mixup", "the task is regression"]),
        ({"loss": "nll", "cutmix": {}}, ["data.cutmix", "loss nll does not take", "cross_entropy"]),
        ({"loss": {"name": "cross_entropy", "ignore_index": 0}, "mixup": {}}, ["loss.ignore_index"]),
        ({"task": "binary", "loss": "cross_entropy", "mixup": {}}, ["bce_with_logits"]),
        ({"mixup": {"prob": 0.7}, "cutmix": {"prob": 0.7}}, ["0.7 and 0.7", "at most 1"]),
    ],
)
def test_what_cannot_be_mixed_is_an_error(recipe, words):
    problems = "\n".join(mixing_problems(_recipe(**recipe)))
    assert all(word in problems for word in words), problems
    with pytest.raises(UserError):
        Mixing.of(_recipe(**recipe), DataMeta(num_classes=3), torch.float32)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (
            {"name": "iris", "transforms": {}, "cutmix": {}},
            "cuts a rectangle out of images, and a sample has the shape",
        ),
        ({"name": "own.py:stream", "transforms": {}, "mixup": {}}, "iterable data set"),
    ],
)
def test_data_that_cannot_be_mixed_are_an_error(data, words, tmp_path):
    if ":" in data["name"]:
        (tmp_path / "own.py").write_text(
            "import torch\n"
            "class Stream(torch.utils.data.IterableDataset):\n"
            "    def __iter__(self):\n"
            "        return ((torch.ones(2), float(i % 2)) for i in range(8))\n"
            "def stream():\n    return {'train': Stream(), 'test': Stream()}\n"
        )
        data = data | {"name": f"{tmp_path}/own.py:stream"}
    with pytest.raises(UserError, match=words):
        build_data(_recipe("binary" if ":" in data["name"] else "classification", **data))


MIXED = ("data.mixup={alpha: 0.4}", "data.cutmix={}", "loss={name: cross_entropy, label_smoothing: 0.1}")


def test_runs_in_other_worlds_and_resumed_ones_are_the_same(tmp_path):
    recipe = write_recipe(tmp_path, TINY)
    alone, pair, halves = (tmp_path / name for name in ("alone", "pair", "halves"))
    train(1, recipe, alone, *MIXED, "batch.micro=4")
    train(2, recipe, pair, *MIXED, "batch.micro=3")
    assert_close(alone, pair, 1e-9)
    train(1, recipe, halves, *MIXED, "batch.micro=4", stop_after=3)
    train(1, recipe, halves, *MIXED, "batch.micro=4")
    assert_same_run(alone, halves)
