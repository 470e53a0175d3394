"""Several optimizers that act in turn: against plain PyTorch, in any world, resumed to the bit, and what is refused."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import adversarial_parts
import pytest
import torch
from runs import assert_close, assert_same_run, last, rows, state, train, write_recipe

from distrain.checkpoint import Reader
from distrain.config import UserError
from distrain.config.yaml import load_recipe
from distrain.data import build_data
from distrain.datasets.order import SampleOrder
from distrain.models import build_model
from distrain.optim import check_parts
from distrain.training.checks import check_recipe

RECIPE = """
name: pair
task: "adversarial_parts:Adversarial"
data: "adversarial_parts:NoisyPoints"
model: {name: "adversarial_parts:Pair", blocks: 1}
optim:
  d: {params: "d.*", name: adam, lr: 1.0e-2, betas: [0.5, 0.9], clip_norm: 0.2, weight_decay: 0.1, no_decay: []}
  g: {params: ["g.0.*", "g.[123].*"], name: sgd, lr: 0.2, momentum: 0.9, every: 2, schedule: {name: linear}}
batch: {global: 12}
train: {steps: 6, precision: fp64, ema: 0.9}
eval: {every: 3 steps, batch: 8}
checkpoint: {every: 3 steps, keep: 100, async: false}
log: {every: 1 steps}
"""
WASSERSTEIN = RECIPE.replace("Adversarial", "Wasserstein").replace("blocks: 1", "blocks: 0")
KINDS = {
    "adversarial": RECIPE,
    "wasserstein": WASSERSTEIN,
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def alone(kind: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a recipe, and its run in one process that accumulates three micro-batches."""
    folder = tmp_path_factory.mktemp(kind)
    recipe = write_recipe(folder, KINDS[kind])
    train(1, recipe, folder / "alone", "batch.micro=4")
    return recipe, folder / "alone"


def plain(path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """Return the weights and averages after a run in plain PyTorch, and for each step losses, rates and norms."""
    recipe = load_recipe(path).recipe
    data = build_data(recipe)
    train = data.splits["train"]
    torch.manual_seed(0)
    model = build_model(recipe, data.meta).double()
    averages = {name: each.detach().clone() for name, each in model.named_parameters()}
    d = torch.optim.Adam(model.d.parameters(), lr=1e-2, betas=(0.5, 0.9), weight_decay=0.1)
    g = torch.optim.SGD(model.g.parameters(), lr=0.2, momentum=0.9)
    task = getattr(adversarial_parts, recipe.task.name.partition(":")[2])()
    monkeypatch.setattr(adversarial_parts.distrain, "gather", lambda tensor: tensor)
    order, steps = SampleOrder(len(train), recipe.seed), []
    for step in range(6):
        ids = order.at(12 * step, 12 * (step + 1))[1]
        inputs = {key: each.double() for key, each in train.fetch(ids)["inputs"].items()}
        row = {"lr/d": 1e-2, "lr/g": 0.2 * (1 - step / 5)}
        for name, optimizer, network in (("d", d, model.d), ("g", g, model.g)):
            if name == "g" and step % 2 == 0:
                continue
            task.logged.clear()
            found = {}
            for key, loss in task.losses(model, {"inputs": inputs, "ids": torch.as_tensor(ids)}, name).items():
                found[key] = loss.mean() if isinstance(loss, torch.Tensor) else loss.sum / 12
            row |= {key: loss.item() for key, loss in found.items()}
            model.zero_grad()
            sum(task.weights.get(key, 1.0) * loss for key, loss in found.items()).backward()
            if name == "d":
                row["grad_norm/d"] = torch.nn.utils.clip_grad_norm_(network.parameters(), 0.2).item()
            optimizer.param_groups[0]["lr"] = row[f"lr/{name}"]
            optimizer.step()
        for name, each in model.named_parameters():
            averages[name].lerp_(each.detach(), 0.1)
        steps.append(row)
    found = {f"model/{name}": each.detach() for name, each in model.named_parameters()}
    return found | {f"ema/{name}": each for name, each in averages.items()}, steps


def test_it_is_the_alternating_loop_of_plain_pytorch(
    kind: str, alone: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, run = alone
    trained = assert_plain(recipe, run, monkeypatch)
    if kind == "adversarial":
        assert trained[1]["loss"] == pytest.approx(sum(trained[1][key] for key in ("on_real", "on_fake", "generator")))


def assert_plain(recipe: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Hold a run against plain PyTorch; returns its rows of training."""
    expected, steps = plain(recipe, monkeypatch)
    stored = state(last(run))
    for name, tensor in expected.items():
        assert torch.from_numpy(stored[name]).allclose(tensor.flatten(), rtol=0, atol=1e-9), name
    trained = [row for row in rows(run) if row["event"] == "train"]
    for row, numbers in zip(trained, steps, strict=True):
        reported = {key for key in row if key not in ("event", "step", "epoch", "samples", "loss", "right")}
        assert reported == numbers.keys()
        for key, value in numbers.items():
            assert row[key] == pytest.approx(value, rel=1e-9, abs=1e-12), key
    evaluated = next(row for row in rows(run) if row["event"] == "eval")
    assert {key for row in steps for key in row if "/" not in key} <= evaluated.keys()  # those of both
    return trained


@pytest.mark.parametrize(
    ("task", "world_size", "strategy"),
    [
        ("Shuffled", 2, "ddp"),
        ("Relative", 2, "ddp"),
        pytest.param("Shuffled", 2, "fsdp2", marks=pytest.mark.more),
        pytest.param("Relative", 2, "fsdp2", marks=pytest.mark.more),
        pytest.param("Relative", 1, "ddp", marks=pytest.mark.more),
    ],
)
def test_losses_in_any_order_and_of_the_whole_batch_are_those_of_plain_pytorch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, world_size: int, strategy: str
) -> None:
    recipe = write_recipe(tmp_path, RECIPE.replace("Adversarial", task))
    train(world_size, recipe, tmp_path / "run", "batch.micro=3", "eval.batch=4", strategy=strategy)
    assert_plain(recipe, tmp_path / "run", monkeypatch)


@pytest.mark.parametrize(
    ("world_size", "strategy"), [(2, "ddp"), (2, "fsdp2"), pytest.param(4, "ddp", marks=pytest.mark.more)]
)
def test_it_is_the_same_in_any_world(
    kind: str, alone: tuple[Path, Path], tmp_path: Path, world_size: int, strategy: str
) -> None:
    recipe, one = alone
    train(world_size, recipe, tmp_path / "run", f"batch.micro={12 // world_size // 3 or 3}", strategy=strategy)
    assert_close(one, tmp_path / "run", 1e-12)
    found = [[row for row in rows(run) if row["event"] in ("train", "eval")] for run in (one, tmp_path / "run")]
    for a, b in zip(*found, strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            assert value == (pytest.approx(b[key], rel=1e-9) if isinstance(value, float) else b[key]), key


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.more)])
def test_it_resumes_to_the_bit(alone: tuple[Path, Path], tmp_path: Path, world_size: int) -> None:
    recipe, one = alone
    cut = "batch.micro=4" if world_size == 1 else "batch.micro=2"
    if world_size > 1:
        one = tmp_path / "one"
        train(world_size, recipe, one, cut)
    train(world_size, recipe, tmp_path / "resumed", cut, stop_after=2)  # which saves step 3, of the discriminator alone
    train(world_size, recipe, tmp_path / "resumed", cut)
    assert_same_run(one, tmp_path / "resumed")


def test_a_checkpoint_holds_the_state_of_all(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, RECIPE)
    train(1, recipe, tmp_path / "run", "train.steps=3")
    manifest = Reader(last(tmp_path / "run")).manifest
    assert manifest.scalars["optimizers"] == {"d": "Adam", "g": "SGD"}
    kept = {name.removeprefix("optimizer/") for name in manifest.specs if name.startswith("optimizer/")}
    assert {"d.0.weight/exp_avg", "g.0.weight/momentum_buffer"} <= kept
    assert all(("momentum" in name) == name.startswith("g.") for name in kept)
    # another class that uses the state of one, and one that cannot
    train(1, recipe, tmp_path / "run", "optim.d.name=adamw", "train.steps=4", update=True)
    ended = train(
        1, recipe, tmp_path / "run", "optim.g={params: 'g.*', name: adam}", "train.steps=5", update=True, status=1
    )
    assert "the stored state is that of SGD, the recipe asks for Adam" in ended[0].err


def test_what_an_optimizer_keeps_is_held_against_a_checkpoint_once_it_has_acted(tmp_path: Path) -> None:
    text = RECIPE.replace("name: sgd, lr: 0.2, momentum: 0.9", "name: 'kept_parts:OfObjects'").replace(
        "3 steps", "6 steps"
    )
    ended = train(1, write_recipe(tmp_path, text), tmp_path / "run", status=1)
    assert "history[made] is an object, in the state of g.0" in ended[0].err
    assert [row["step"] for row in rows(tmp_path / "run") if row["event"] == "train"] == [1], (
        "not at the first checkpoint"
    )


def test_only_the_optimizer_whose_loss_is_nan_passes_over_a_step(tmp_path: Path) -> None:
    text = RECIPE.replace("Adversarial", "Breaking").replace(", every: 2", "") + "anomalies: {nonfinite: skip}\n"
    recipe = write_recipe(tmp_path, text)
    train(1, recipe, tmp_path / "run", "checkpoint.every=1 steps", "train.steps=4")
    anomalies = [row for row in rows(tmp_path / "run") if row["event"] == "anomaly"]
    assert {row["optimizer"] for row in anomalies} == {"g"}
    steps = [row["step"] for row in anomalies]
    assert 0 < len(steps) < 4
    step = steps[0]
    row = next(row for row in rows(tmp_path / "run") if row["event"] == "train" and row["step"] == step)
    assert "on_real" in row
    assert "generator" not in row
    assert math.isfinite(row["loss"])
    if step > 1:
        folder = tmp_path / "run" / "checkpoints"
        before, after = (state(folder / f"step-{at:08d}") for at in (step - 1, step))
        changed = {name for name in after if name.startswith("model/") and (after[name] != before[name]).any()}
        assert {name.split("/")[1][0] for name in changed} == {"d"}
    # a second pass over the steps follows what was decided
    train(1, recipe, tmp_path / "again", "train.steps=4", "checkpoint.every=1 steps", stop_after=1)
    train(1, recipe, tmp_path / "again", "train.steps=4", "checkpoint.every=1 steps")
    assert_same_run(tmp_path / "run", tmp_path / "again")


def test_ranks_that_evaluate_other_losses_are_told_apart(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, RECIPE.replace("Adversarial", "Unlike"))
    ended = train(2, recipe, tmp_path / "run", status=1)
    said = "".join(each.err for each in ended)  # by the rank that comes first
    assert re.search(r"reports on_real, on_fake, (generator|other), right on rank [01] and others on another", said)


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.more)])
def test_the_scale_of_a_loss_is_that_of_its_optimizer(tmp_path: Path, world_size: int) -> None:
    text = RECIPE.replace("Adversarial", "Large").replace("fp64", "fp16").replace(", every: 2", "")
    text = text.replace("lr: 0.2", "lr: 1e-5")
    recipe = write_recipe(tmp_path, text)
    run, narrow, wide = tmp_path / "run", tmp_path / "resumed", tmp_path / "wide"
    train(world_size, recipe, run)
    steps = [row for row in rows(run) if row["event"] == "train"]
    assert "loss_scale" not in steps[-1]
    assert steps[-1]["loss_scale/d"] >= 16384, "no gradient of the discriminator is lost in a scale of the other"
    assert steps[-1]["loss_scale/g"] <= 1024
    train(world_size, recipe, wide, "train.precision=fp32")
    weights, expected = state(last(run)), state(last(wide))
    worst = max(abs(weights[name] - expected[name]).max() for name in weights if name.startswith("model/"))
    assert worst < 2e-3
    train(world_size, recipe, narrow, stop_after=2)
    stored = Reader(last(narrow)).manifest.scalars["loss_scale"]
    assert stored["d"]["scale"] > 16 * stored["g"]["scale"]
    train(world_size, recipe, narrow)
    assert_same_run(run, narrow)


@pytest.mark.more
@pytest.mark.parametrize("kind", ["adversarial"], indirect=True)
def test_compiled_it_is_the_same(kind: str, alone: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, one = alone
    train(1, recipe, tmp_path / "run", "batch.micro=4", "train.compile={backend: eager}")
    assert_close(one, tmp_path / "run", 1e-12)


@pytest.mark.parametrize(
    ("optim", "said"),
    [
        ("{d: {params: 'd.*'}, g: {params: 'g.0.*'}}", "g.1.linear.weight, g.1.linear.bias, g.3.weight and 1 others"),
        ("{d: {params: 'd.*'}, g: {params: '*'}}", "are matched by the params of d and g"),
        ("{d: {params: 'd.*'}, g: {params: [g.*, h.*]}}", "optim.g.params: no parameter matches 'h.*'"),
    ],
)
def test_each_parameter_has_exactly_one_optimizer(tmp_path: Path, optim: str, said: str) -> None:
    start, end = RECIPE.index("optim:"), RECIPE.index("batch:")
    recipe = load_recipe(write_recipe(tmp_path, f"{RECIPE[:start]}optim: {optim}\n{RECIPE[end:]}")).recipe
    with pytest.raises(UserError, match="optim") as caught:
        check_parts(adversarial_parts.Pair(blocks=1), recipe.optimizers)
    assert said in str(caught.value)


def test_what_the_model_freezes_needs_no_optimizer(tmp_path: Path) -> None:
    sections = load_recipe(write_recipe(tmp_path, RECIPE)).recipe.optimizers
    model = adversarial_parts.Pair(blocks=1, spare=True)
    with pytest.raises(UserError, match=r"optim: spare\.weight, spare\.bias are trained by no optimizer"):
        check_parts(model, sections)
    model.spare.requires_grad_(False)
    check_parts(model, sections)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("every: 2", "every: 0", "optim.g.every: found 0, expected a whole number ≥ 1"),
        ("params: \"d.*\"", "every: 3", "optim.d.params: is missing, expected a shell pattern"),
        ("clip_norm: 0.2", "every: 2", "optim: each has an `every` of 2 or more, expected 1 for at least one"),
        ("clip_norm: 0.2", "layer_decay: 0.5", "optim.d.layer_decay: is found by the depth of a whole model"),
        ("clip_norm: 0.2", "momentun: 0.2", "optim.d.momentun"),
        ("name: linear", "name: linear, warmup: 100%", "optim.g.schedule.warmup: found '100%'"),
        ("name: linear", "name: lineal", "optim.g.schedule.name"),
        ("  d: {params", "  critic: {params", "found the optimizers critic and g, and the losses of task"),
        ("Adversarial", "Sole", "need losses of their own, and the losses of task"),
    ],
)  # fmt: skip
def test_a_recipe_that_is_wrong_is_told_where(tmp_path: Path, old: str, new: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        check_recipe(load_recipe(write_recipe(tmp_path, RECIPE.replace(old, new, 1))).recipe, "recipe.yaml")
    assert said in str(caught.value)


def test_losses_of_several_optimizers_need_several(tmp_path: Path) -> None:
    start, end = RECIPE.index("optim:"), RECIPE.index("batch:")
    recipe = load_recipe(write_recipe(tmp_path, RECIPE[:start] + RECIPE[end:])).recipe
    with pytest.raises(UserError, match=r"train the optimizers d and g, and the recipe has one for all parameters"):
        check_recipe(recipe, "recipe.yaml")


def test_a_loss_has_one_optimizer(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, RECIPE.replace("Adversarial", "Careless").replace(", every: 2", ""))
    ended = train(1, recipe, tmp_path / "run", status=1)
    assert "'loss_of_all', which trains another optimizer too; give each its own name" in ended[0].err


@pytest.mark.parametrize("strategy", ["zero1", pytest.param("zero3", marks=pytest.mark.more)])
def test_deepspeed_says_before_anything_starts_that_it_has_one_optimizer(tmp_path: Path, strategy: str) -> None:
    recipe = write_recipe(tmp_path, RECIPE)
    ended = train(1, recipe, tmp_path / "run", "train.precision=fp32", strategy=strategy, status=1)
    assert f"optim has 2 optimizers (d, g) and the strategy is {strategy}" in ended[0].err
    assert "Take single, ddp or fsdp2: --strategy fsdp2" in ended[0].err
    assert not (tmp_path / "run").exists()


def test_fsdp2_says_what_it_cannot_differentiate_twice(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, WASSERSTEIN.replace("blocks: 0", "blocks: 1"))
    ended = train(2, recipe, tmp_path / "run", strategy="fsdp2", status=1)
    assert "(torch.autograd.grad) through a block (gathering d.1)" in "".join(rank.err for rank in ended)


def test_old_checkpoints_of_one_optimizer_are_taken_over(tmp_path: Path) -> None:
    text = RECIPE.replace("Adversarial", "Sole")
    start, end = RECIPE.index("optim:"), RECIPE.index("batch:")
    recipe = write_recipe(
        tmp_path, text[: text.index("optim:")] + "optim: {name: adam}\n" + text[text.index("batch:") :]
    )
    train(1, recipe, tmp_path / "run", "train.steps=3")
    assert "optimizers" not in Reader(last(tmp_path / "run")).manifest.scalars
    adam = RECIPE.replace("sgd, lr: 0.2, momentum: 0.9", "adam, lr: 0.2")
    assert start < end
    train(1, write_recipe(tmp_path, adam, "two.yaml"), tmp_path / "run", "train.steps=4", update=True)
    values = Reader(last(tmp_path / "run")).manifest.scalars["optimizer_values"]
    tensors = state(last(tmp_path / "run"))
    counted: dict[str, Any] = {name: tensors.get(f"optimizer/{name}/step") for name in ("d.0.weight", "g.0.weight")}
    assert {float(each[0]) for each in counted.values()} == {4.0}, json.dumps(values)
