"""What a task keeps from step to step: in checkpoints where it says so, and otherwise named."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import assert_close, assert_same_run, cli, last, rows, state, train, write_recipe

from distrain.checkpoint import Reader
from distrain.config.yaml import load_recipe
from distrain.data import build_data
from distrain.datasets.order import SampleOrder
from distrain.models import build_model
from distrain.parallel import keep_with, keeps_task

RECIPE = """
name: stateful
task: {task}
data: digits
model: {{name: mlp, hidden: [8], {model}}}
optim: {{name: sgd, lr: 0.1}}
batch: {{global: 12}}
train: {{steps: 6, precision: {precision}}}
eval: {{every: 2 steps, batch: 100}}
checkpoint: {{every: 3 steps, keep: 100, async: false}}
log: {{every: 1 steps}}
"""
MOMENTUM = RECIPE.format(task='"stateful_tasks:Momentum"', model="num_outputs: 4", precision="fp32")
ANNEALED = RECIPE.format(
    task='{name: "stateful_tasks:Annealed", kind: KIND}', model="num_outputs: 10", precision="fp32"
)


def plain(path: Path) -> Iterator[tuple[float, dict[str, torch.Tensor]]]:
    """Yield after each step of a loop of plain PyTorch its loss, and the weights of the model and of its slow copy."""
    recipe = load_recipe(path).recipe
    data = build_data(recipe)
    torch.manual_seed(0)
    model, slow = build_model(recipe, data.meta), build_model(recipe, data.meta)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    order = SampleOrder(len(data.splits["train"]), recipe.seed)
    queue = torch.zeros(0, 4, dtype=torch.float64)
    for step in range(6):
        inputs = data.splits["train"].fetch(order.at(12 * step, 12 * (step + 1))[1])["inputs"].float()
        queries = torch.nn.functional.normalize(model(inputs).double(), dim=1)
        with torch.no_grad():
            keys = torch.nn.functional.normalize(slow(inputs).double(), dim=1)
        logits = torch.cat(((queries * keys).sum(1, keepdim=True), queries @ queue.T), 1) / 0.2
        loss = torch.nn.functional.cross_entropy(logits, torch.zeros(12, dtype=torch.int64))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        queue = torch.cat((keys, queue))[:24]
        with torch.no_grad():
            for one, other in zip(slow.parameters(), model.parameters(), strict=True):
                one.lerp_(other, 0.1)
        found = {f"model/{name}": each.detach() for name, each in model.named_parameters()}
        kept = {f"state/the task's state[slow][{name}]": each for name, each in slow.named_parameters()}
        yield loss.item(), found | kept | {"state/the task's state[queue]": queue}


@pytest.fixture(scope="module")
def momentum(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a recipe of a queue and a moving copy, and its run in one process."""
    folder = tmp_path_factory.mktemp("momentum")
    recipe = write_recipe(folder, MOMENTUM)
    train(1, recipe, folder / "alone", "batch.micro=4")
    return recipe, folder / "alone"


def test_a_queue_and_a_moving_copy_are_those_of_plain_pytorch(momentum: tuple[Path, Path]) -> None:
    recipe, run = momentum
    steps = list(plain(recipe))
    trained = [row for row in rows(run) if row["event"] == "train"]
    assert [row["loss"] for row in trained] == pytest.approx([loss for loss, _ in steps], rel=1e-5)
    stored = state(last(run))
    for name, tensor in steps[-1][1].items():
        assert torch.from_numpy(stored[name]).allclose(tensor.double().flatten(), rtol=0, atol=1e-6), name


@pytest.mark.parametrize(("world_size", "micro"), [(2, 3), pytest.param(1, 12, marks=pytest.mark.more)])
def test_they_are_the_same_in_any_world_and_resumed_to_the_bit(
    momentum: tuple[Path, Path], tmp_path: Path, world_size: int, micro: int
) -> None:
    recipe, alone = momentum
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(world_size, recipe, whole, f"batch.micro={micro}")
    assert_close(alone, whole, 1e-6)
    train(world_size, recipe, cut, f"batch.micro={micro}", stop_after=2)
    train(world_size, recipe, cut, f"batch.micro={micro}")
    assert_same_run(whole, cut)


def test_an_evaluation_has_the_state_and_the_step_and_leaves_both(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, ANNEALED.replace("KIND", "right"))
    run = tmp_path / "run"
    train(2, recipe, run, "batch.micro=3")
    found = [(row["event"], row["step"], row["own"], row["so_far"]) for row in rows(run) if "own" in row]
    # two micro-batches on each rank, and none of what was tried before the first step, nor of evaluations
    assert [each[1:] for each in found if each[0] == "eval"] == [(2, 4, 2), (4, 8, 4), (6, 12, 6)]
    assert [each[2:] for each in found if each[0] == "train"] == [(2 * step + 1.5, step) for step in range(6)]
    evaluated = cli("evaluate", str(run), "--split", "test", "--json")
    assert evaluated.status == 0, evaluated.err
    ended = json.loads((run / "FINISHED").read_text())["test"]
    assert json.loads(evaluated.out)["entropy"] == pytest.approx(ended["entropy"], rel=1e-6)


@pytest.mark.parametrize("rolls_back", [False, pytest.param(True, marks=pytest.mark.more)])
def test_a_step_that_is_skipped_leaves_the_state_and_a_rollback_restores_it(tmp_path: Path, rolls_back: bool) -> None:
    recipe = write_recipe(tmp_path, ANNEALED.replace("KIND", "anomalous"))
    what = "rollback" if rolls_back else "skip"
    train(1, recipe, tmp_path / "run", "batch.micro=12", "eval.every=null", f"anomalies.nonfinite={what}")
    with Reader(last(tmp_path / "run")) as reader:
        kept = dict(map(tuple, _plain(reader.manifest.scalars["model_state"]["the task's state"])))
    assert (kept["own"], kept["taken"]) == (5, 5)


def _plain(stored: Any) -> Any:
    """Return what is stored of a value without the names of kinds."""
    ((_, content),) = stored.items()
    return [[_plain(each) for each in pair] for pair in content] if isinstance(content, list) else content


@pytest.mark.parametrize(
    ("kind", "world_size", "words"),
    [
        ("unlike", 2, "the task's state differ between the ranks"),
        ("object", 1, "the task's state[odd] is an object; have state_dict() return tensors"),
        ("lost", 1, "load_state_dict must take what state_dict gives"),
    ],
)
def test_state_that_no_checkpoint_could_give_back_is_refused(
    tmp_path: Path, kind: str, world_size: int, words: str
) -> None:
    recipe = write_recipe(tmp_path, ANNEALED.replace("KIND", kind))
    ended = train(world_size, recipe, tmp_path / "run", "batch.micro=3", status=1)
    assert words in "".join(rank.err for rank in ended)


def test_half_of_a_state_is_refused(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, MOMENTUM.replace("Momentum", "Alone"))
    ended = train(1, recipe, tmp_path / "run", status=1)
    assert "has state_dict alone; expected state_dict and load_state_dict" in ended[0].err


@pytest.mark.parametrize("kind", ["own", "inside", "step"])
def test_weights_that_change_with_each_step_are_kept(tmp_path: Path, kind: str) -> None:
    text = ANNEALED.replace("Annealed", "Fading").replace("KIND", kind)
    recipe = write_recipe(tmp_path, text)
    (ended,) = train(1, recipe, tmp_path / "alone")
    assert "no checkpoint holds it" not in ended.out + ended.err
    train(1, recipe, tmp_path / "resumed", stop_after=1)
    train(1, recipe, tmp_path / "resumed")
    assert_same_run(tmp_path / "alone", tmp_path / "resumed")
    (final,) = [row for row in rows(tmp_path / "alone") if row["event"] == "final"]
    weight = 8 / 7 if kind == "step" else 8 / 2**6  # after six steps
    assert final["loss"] == pytest.approx(final["entropy"] + weight * final["size"])
    evaluated = cli("evaluate", tmp_path / "alone", "--json")
    assert json.loads(evaluated.out)["loss"] == final["loss"], evaluated.err


def test_a_rollback_restores_weights(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, ANNEALED.replace("Annealed", "Fading").replace("KIND", "anomalous"))
    train(1, recipe, tmp_path / "back", "anomalies.nonfinite=rollback", "checkpoint.every=2 steps")
    train(1, recipe, tmp_path / "skipped", "anomalies.nonfinite=skip", "checkpoint.every=2 steps")
    one, other = (state(last(tmp_path / name)) for name in ("back", "skipped"))
    assert all((one[name] == other[name]).all() for name in one)


FORGETFUL = RECIPE.replace("{{name: mlp, hidden: [8], {model}}}", "{model}").replace(
    "data: digits", "data: digits\n{loss}"
)
NAMED = {
    "task": ("Forgetful", "mlp", "", ["task.calls", "task.mean", "the weights of task.slow"]),
    "model": (
        "classification",
        '"stateful_tasks:Counting"',
        "",
        ["model.calls", "model.seen (a buffer that is not persistent)"],
    ),
    "loss": ("classification", "mlp", 'loss: "stateful_tasks:Centred"', ["the weights of loss"]),
    "nothing": ("classification", "cnn", "", []),
    "what is kept": ("classification", '"stateful_tasks:CountingKept"', "", []),
}


@pytest.mark.parametrize(("kind", "strategy"), [*((kind, "single") for kind in NAMED), ("model", "zero3")])
def test_what_changes_and_is_not_saved_is_named(tmp_path: Path, kind: str, strategy: str) -> None:
    task, model, loss, named = NAMED[kind]
    task = task if task == "classification" else f'"stateful_tasks:{task}"'
    recipe = write_recipe(tmp_path, FORGETFUL.format(task=task, model=model, loss=loss, precision="fp32"))
    ended = train(1 if strategy == "single" else 2, recipe, tmp_path / "run", "eval.every=null", strategy=strategy)
    warnings = [line for line in (ended[0].out + ended[0].err).splitlines() if "no checkpoint holds" in line]
    assert len(warnings) == bool(named)
    for line in warnings:
        assert line.removeprefix("warning: ").partition(": changed from step to step")[0].split(", ") == named


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("Slow", "optimizer.count, optimizer.slow.0, optimizer.slow.1"),
        ("Around", "optimizer.inner.state.entry 0.momentum_buffer"),
        ("Shared", None),
    ],
)
@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp2", "zero1"])
def test_what_an_optimizer_of_ones_own_has_on_itself_is_named(
    tmp_path: Path, kind: str, named: str | None, strategy: str
) -> None:
    text = FORGETFUL.format(task="classification", model="mlp", loss="", precision="fp32")
    recipe = write_recipe(tmp_path, text.replace("name: sgd", f'name: "stateful_tasks:{kind}"'))
    world_size = 1 if strategy == "single" else 2
    ended = train(world_size, recipe, tmp_path / "run", "eval.every=null", strategy=strategy)
    warnings = [line for line in (ended[0].out + ended[0].err).splitlines() if "no checkpoint holds" in line]
    assert len(warnings) == (named is not None)
    for line in warnings:
        assert named in line
        assert "of an optimizer in its state" in line


def test_a_model_is_freed_with_the_task_that_holds_it() -> None:
    class Holds:
        def __init__(self, model: torch.nn.Module):
            self.model = model

        def state_dict(self) -> dict[str, Any]:
            return {"count": 1}

    model = torch.nn.Linear(1, 1)
    task = Holds(model)
    keep_with(model, task)
    assert keeps_task(model)
    held = weakref.ref(model)
    del model, task
    gc.collect()
    assert held() is None
