"""What a model's own code writes into its parameters stays, as often as it is written in one process, or is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import writing_parts
from runs import Ended, last, rows, state, train, write_recipe
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from distrain.parallel.parameter_writes import Written, restored
from distrain.parallel.unused_parameters import unused_parameters

RECIPE = """
name: writing
task: regression
data: {name: "writing_parts:Points", split: [0.75, 0.25]}
model: {name: "writing_parts:MODEL"}
optim: {name: sgd, lr: 1.0e-6}
batch: {global: 12}
train: {steps: 3}
eval: {every: null}
checkpoint: {every: null, keep: 3, async: false}
"""
OVERFLOWS = "train.precision=fp16"
SKIPPED = ("anomalies.nonfinite=skip", "data.bad=5", "train.epochs=1", "train.steps=null")
LOOKS_AHEAD = ('task="writing_parts:Together"', "batch.micro=3")


def recipe_of(folder: Path, model: str) -> Path:
    return write_recipe(folder, RECIPE.replace("MODEL", model), f"{model}.yaml")


def told(ranks: list[Ended]) -> str:
    """Return what the ranks said: the first to fail reports it."""
    return " ".join(" ".join(rank.err for rank in ranks).split())


@pytest.mark.parametrize(
    ("way", "overrides", "passes"),
    [
        ("single", (), 3),
        ("ddp", (), 3),  # which passes once more to see what is used
        ("zero1", (), 3),
        ("single", (OVERFLOWS,), 3),  # makes steps again
        pytest.param("ddp", (OVERFLOWS,), 3, marks=pytest.mark.more),
        ("single", LOOKS_AHEAD, 12),
        pytest.param("ddp", LOOKS_AHEAD, 6, marks=pytest.mark.more),
    ],
)
def test_a_pass_that_is_made_again_writes_once(
    way: str, overrides: tuple[str, ...], passes: int, tmp_path: Path
) -> None:
    recipe, run = recipe_of(tmp_path, "Counted"), tmp_path / "run"
    train(1 if way == "single" else 2, recipe, run, *overrides, strategy=way)
    assert state(last(run))["model/passes"].tolist() == [passes]


def test_a_step_that_is_skipped_writes_nothing(tmp_path: Path) -> None:
    recipe, run = recipe_of(tmp_path, "Counted"), tmp_path / "run"
    train(1, recipe, run, *SKIPPED)
    assert [row["event"] for row in rows(run)].count("anomaly") == 1
    assert state(last(run))["model/passes"].tolist() == [2]


@pytest.mark.parametrize(
    ("after", "by_data", "passes"),
    [
        (3, False, 3),
        (5, True, 1),
        (4, False, None),  # in the pass of a step that is skipped, when nothing was kept
        (3, True, None),  # in the one before, in which only values would have told it
    ],
)
def test_a_step_that_is_skipped_writes_nothing_where_the_model_has_begun_to_write_late(
    tmp_path: Path, after: int, by_data: bool, passes: int | None
) -> None:
    recipe, run = recipe_of(tmp_path, "CountedLate"), tmp_path / "run"
    late = f"model.after={after}", f"model.by_data={by_data}".lower()
    status = int(passes is None)
    ended = train(1, recipe, run, *SKIPPED[:-2], "train.steps=9", *late, status=status)
    if passes is None:
        assert "has begun to write into passes, and has done so in passes of a step that is skipped" in told(ended)
        return
    assert [row["event"] for row in rows(run)].count("anomaly") == 3
    assert state(last(run))["model/passes"].tolist() == [passes]


REPLACED = "has put another Parameter in the place of layer.weight"
ADDED = "the model's code has made {} in a forward pass"
LOST = "writes into parameter {}, and under {} it has a copy"


@pytest.mark.parametrize(
    ("way", "model", "said"),
    [
        ("fsdp2", "Normalised", LOST.format("layer.weight", "fsdp2")),
        ("fsdp2", "Assigned", LOST.format("layer.weight", "fsdp2")),
        pytest.param("fsdp2", "Counted", LOST.format("passes", "fsdp2"), marks=pytest.mark.more),
        ("fsdp2", "Replacing", REPLACED),
        ("zero1", "Normalised", LOST.format("layer.weight", "zero1")),
        pytest.param("zero2", "Assigned", LOST.format("layer.weight", "zero2"), marks=pytest.mark.more),
        pytest.param("zero1", "Replacing", REPLACED, marks=pytest.mark.more),
        ("zero3", "Counted", LOST.format("passes", "zero3")),
        ("zero3", "Replacing", REPLACED),
        ("zero2", "NormalisedLate", LOST.format("layer.weight", "zero2")),
        pytest.param("zero3", "NormalisedLate", LOST.format("layer.weight", "zero3"), marks=pytest.mark.more),
        pytest.param("ddp", "Replacing", REPLACED, marks=pytest.mark.more),
        ("zero3", "Scaled", LOST.format("scale", "zero3")),  # branches on a value: nothing can be seen without values
        pytest.param("fsdp2", "Scaled", LOST.format("scale", "fsdp2"), marks=pytest.mark.more),
        ("zero3", "HalvedOnce", LOST.format("layer.weight", "zero3")),
        ("ddp", "Late", ADDED.format("head.weight, head.bias")),
        pytest.param("zero1", "Late", ADDED.format("head.weight, head.bias"), marks=pytest.mark.more),
        ("zero3", "Late", ADDED.format("head.weight, head.bias")),
        ("zero3", "LateScale", ADDED.format("LateScale.scale")),
        ("fsdp2", "Late", "head.bias: absent at the start, parameter F32 [2] now"),
        ("ddp", "Centred", "passes differ between the ranks"),
    ],
)
def test_what_would_be_lost_is_refused_by_name(way: str, model: str, said: str, tmp_path: Path) -> None:
    ranks = train(2, recipe_of(tmp_path, model), tmp_path / "run", "train.steps=5", strategy=way, status=1)
    assert said in told(ranks)


@pytest.mark.parametrize("way", ["zero1", "fsdp2", pytest.param("zero3", marks=pytest.mark.more)])
def test_what_is_written_by_data_and_would_be_lost_is_refused_by_twice_the_steps(way: str, tmp_path: Path) -> None:
    late = "model.after=4", "model.by_data=true", "train.steps=8"
    ranks = train(2, recipe_of(tmp_path, "NormalisedLate"), tmp_path / "run", *late, strategy=way, status=1)
    assert LOST.format("layer.weight", way) in told(ranks)


@pytest.mark.parametrize("way", ["ddp", "fsdp2", "zero1", pytest.param("zero3", marks=pytest.mark.more)])
def test_what_a_callback_writes_is_trained_or_refused(way: str, tmp_path: Path) -> None:
    recipe, run = recipe_of(tmp_path, "Still"), tmp_path / "run"
    refused = way.startswith("zero")
    ranks = train(2, recipe, run, 'callbacks=["writing_parts:Clamp"]', strategy=way, status=int(refused))
    if refused:
        assert LOST.format("layer.weight and 1 others", way) in told(ranks)
    else:
        assert abs(state(last(run))["model/layer.weight"]).max() <= 0.05 + 1e-6


@pytest.mark.parametrize(
    ("way", "model", "callbacks"),
    [("fsdp2", "Masked", ""), ("zero3", "Masked", ""), ("fsdp2", "Still", '"writing_parts:Hook"')],
)
def test_a_hook_on_a_gradient_that_nothing_would_call_is_refused(
    way: str, model: str, callbacks: str, tmp_path: Path
) -> None:
    recipe, run = recipe_of(tmp_path, model), tmp_path / "run"
    ranks = train(2, recipe, run, f"callbacks=[{callbacks}]", strategy=way, status=1)
    said = "has a hook on its gradient (register_hook), and " + way
    assert f"parameter layer.weight{' and 1 others' * bool(callbacks)} {said}" in told(ranks)


def test_a_hook_on_a_gradient_is_called_where_parameters_stay(tmp_path: Path) -> None:
    recipe, run = recipe_of(tmp_path, "Masked"), tmp_path / "run"
    train(2, recipe, run, "optim.weight_decay=0", "checkpoint.every=1 steps", strategy="ddp")
    first, end = (state(run / f"checkpoints/step-0000000{step}")["model/layer.weight"] for step in (1, 3))
    same = (first == end).reshape(2, 5).all(0)
    assert same.tolist() == [True, False, True, False, False]  # the point has a zero there


@pytest.mark.parametrize(("kind", "names"), [("Counted", ["passes"]), ("Normalised", ["layer.weight"]), ("Still", [])])
def test_writes_are_seen_without_values(kind: str, names: list[str]) -> None:
    model: nn.Module = getattr(writing_parts, kind)().to("meta")
    written = Written()
    device = torch.device("cpu")
    unused = unused_parameters(model, lambda model: model(torch.ones(2, 5)).sum(), device, written)
    assert unused == set()
    assert [*written.names] == names


class Clones(TorchDispatchMode):
    """Counts the elements of the tensors that are cloned."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.clone.default:
            self.numel += args[0].numel()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("kind", "copied"), [("Counted", 1), ("Normalised", 10), ("Assigned", 0), ("Still", 0)])
def test_a_trial_restores_what_it_has_written_and_copies_no_more(kind: str, copied: int) -> None:
    model: nn.Module = getattr(writing_parts, kind)()
    before = {name: (each.data_ptr(), each.detach().clone()) for name, each in model.named_parameters()}
    with Clones() as clones, restored(model, model.parameters()):
        model(torch.ones(2, 5)).sum().backward()
        model(torch.ones(2, 5))
    for name, each in model.named_parameters():
        assert each.data_ptr() == before[name][0]
        assert torch.equal(each, before[name][1])
        assert each.grad is None
    assert clones.numel == copied
