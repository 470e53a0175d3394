"""Tasks of one's own: what is trained, what is reported, and what is refused; the same in any world."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import assert_close, assert_same_run, cli, last, rows, state, train, write_recipe

from distrain.config import UserError
from distrain.config.yaml import load_recipe
from distrain.data import build_data
from distrain.datasets.order import SampleOrder
from distrain.models import build_model
from distrain.training.checks import check_recipe

RECIPE = """
name: own
task: {task}
data: {data}
model: {model}
optim: {{lr: 1.0e-2, clip_norm: 1.0}}
batch: {{global: {batch}}}
train: {{steps: {steps}, precision: fp64, ema: 0.9}}
eval: {{every: 3 steps, batch: 8}}
checkpoint: {{every: 3 steps, keep: 100, async: false}}
log: {{every: 1 steps}}
"""
VARIATIONAL = RECIPE.format(
    task='"own_tasks:Variational"',
    data="digits",
    model='{name: "own_tasks:Autoencoder", noise: false}',
    batch=12,
    steps=6,
)
PAIRS = RECIPE.format(
    task='"own_tasks:SumAndSign"', data='"own_tasks:Pairs"', model='"own_tasks:TwoInputs"', batch=12, steps=6
)
LETTERS = RECIPE.format(
    task='{name: "own_tasks:CountLetters", alphabet: abc}',
    data='"own_tasks:Words"',
    model="{name: mlp, hidden: [4], num_outputs: 1}",
    batch=8,
    steps=6,
)
DISTILLED = RECIPE.format(
    task='{name: "own_tasks:Distilled", share: 2.0}', data="digits", model="{name: mlp, hidden: [8]}", batch=12, steps=6
)
KINDS = {"variational": VARIATIONAL, "pairs": PAIRS, "letters": LETTERS, "distilled": DISTILLED}
REPORTED = {
    "variational": ({"bright", "kl", "all", "spread"}, {"bright", "kl", "all", "spread", "worst"}),
    "pairs": ({"square", "entropy"}, {"square", "entropy", "hits"}),
    "letters": ({"square"}, {"square"}),
    "distilled": ({"teacher"}, {"teacher", "accuracy", "f1_macro"}),
}
WAYS = (("ddp", 2), ("fsdp2", 2))


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def alone(kind: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a recipe, and its run in one process."""
    folder = tmp_path_factory.mktemp(kind)
    recipe = write_recipe(folder, KINDS[kind])
    train(1, recipe, folder / "alone")
    return recipe, folder / "alone"


def test_rows_have_each_loss_and_what_is_logged(kind: str, alone: tuple[Path, Path]) -> None:
    found = rows(alone[1])
    trained, evaluated = REPORTED[kind]
    for event, names in (("train", trained), ("eval", evaluated)):
        row = next(row for row in found if row["event"] == event)
        assert names <= set(row), f"{event}: {sorted(row)}"


@pytest.mark.parametrize(("strategy", "world_size"), WAYS)
def test_a_task_is_the_same_in_any_world(
    alone: tuple[Path, Path], tmp_path: Path, strategy: str, world_size: int
) -> None:
    recipe, one = alone
    train(world_size, recipe, tmp_path / "two", "batch.micro=2", strategy=strategy)
    assert_close(one, tmp_path / "two", 1e-9)
    found = [[row for row in rows(run) if row["event"] in ("train", "eval")] for run in (one, tmp_path / "two")]
    for a, b in zip(*found, strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            assert value == (pytest.approx(b[key], rel=1e-8) if isinstance(value, float) else b[key]), key


def test_a_task_is_the_same_under_zero(tmp_path: Path) -> None:
    recipe, single = write_recipe(tmp_path, VARIATIONAL), ("train.precision=fp32", "optim.name=sgd")
    train(1, recipe, tmp_path / "alone", *single)
    for strategy in ("zero1", "zero3"):
        train(2, recipe, tmp_path / strategy, *single, "batch.micro=2", strategy=strategy)
        assert_close(tmp_path / "alone", tmp_path / strategy, 1e-6)
        kl = [[row["kl"] for row in rows(tmp_path / run) if "kl" in row] for run in ("alone", strategy)]
        assert kl[0] == pytest.approx(kl[1], rel=1e-5)


def test_a_mean_of_the_task_decides_which_checkpoint_is_best(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, VARIATIONAL)
    for best, choose in (("-worst", min), ("worst", max)):
        train(1, recipe, tmp_path / best, f"eval.best={best}")
        values = {row["step"]: row["worst"] for row in rows(tmp_path / best) if row["event"] == "eval"}
        summary = json.loads((tmp_path / best / "FINISHED").read_text())
        assert summary["best"]["step"] == choose(values, key=values.__getitem__)
    ended = train(1, recipe, tmp_path / "highest", "eval.best=kl", "train.steps=1", status=1)
    assert "eval.best: 'kl' is a loss of the task, of which lower is better; write '-kl'" in ended[0].err
    train(1, recipe, tmp_path / "highest", "eval.best=-kl", "train.steps=2", update=True)  # nothing is lost
    ended = train(1, recipe, tmp_path / "none", "eval.best=wurst", status=1)
    assert "eval.best: 'wurst' is not among what was evaluated: loss, bright, kl" in ended[0].err


def test_a_rank_may_have_nothing_to_evaluate(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, DISTILLED.replace("data: digits", "data: {name: digits, split: [0.9994, 0.0006]}"))
    for world_size in (1, 2):
        train(world_size, recipe, tmp_path / f"{world_size}", "train.steps=2")
    one, two = ([row for row in rows(tmp_path / f"{n}") if row["event"] == "eval"] for n in (1, 2))
    assert one[-1]["samples"] == 1
    for key, value in one[-1].items():
        assert two[-1][key] == (pytest.approx(value, rel=1e-9) if isinstance(value, float) else value), key


def test_a_task_resumes_to_the_bit(alone: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, one = alone
    train(1, recipe, tmp_path / "resumed", stop_after=2)  # which saves step 3
    train(1, recipe, tmp_path / "resumed")
    assert_same_run(one, tmp_path / "resumed")


ONE_STEP = ("train.steps=1", "batch.global=300", "batch.micro=100", "optim.name=sgd", "optim.weight_decay=0")


def test_the_losses_are_torchs_own(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, VARIATIONAL)
    train(1, recipe, tmp_path / "run", *ONE_STEP)
    parsed = load_recipe(recipe, ["batch.global=300"]).recipe
    data = build_data(parsed)
    model = build_model(parsed, data.meta)
    first = next(row for row in rows(tmp_path / "run") if row["event"] == "train")
    from distrain.datasets.order import SampleOrder

    source: Any = data.splits["train"]
    _, ids = SampleOrder(len(source), parsed.seed).at_positions(torch.arange(300).numpy())
    x = source.fetch(ids)["inputs"]
    out, mean, log_std = model(x)
    bright = x > 0.5
    kl = ((mean.square() + (2 * log_std).exp() - 2 * log_std - 1).sum(1) / 2).mean()
    square = (out - x).square()[bright].mean()
    error = (out - x).abs().mean()
    expected = {"bright": square, "kl": kl, "all": error, "spread": log_std.exp().mean()}
    expected["loss"] = square + 0.25 * kl + error
    assert {key: first[key] for key in expected} == pytest.approx({k: v.item() for k, v in expected.items()}, rel=1e-10)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    expected["loss"].backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    kept = state(last(tmp_path / "run"))
    for name, parameter in model.named_parameters():
        assert kept[f"model/{name}"] == pytest.approx(parameter.detach().flatten().numpy(), abs=1e-9)


def test_a_teacher_is_in_no_checkpoint_and_what_was_trained_is_evaluated(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, DISTILLED)
    train(1, recipe, tmp_path / "run")
    names = [name for name in state(last(tmp_path / "run")) if name.startswith("model/")]
    assert len(names) == 4, "the model's two layers"
    ended = cli("evaluate", tmp_path / "run", "--split", "test", "--json")
    assert ended.status == 0, ended.err
    final = [row for row in rows(tmp_path / "run") if row["event"] == "eval"][-1]
    assert f'"teacher": {final["teacher"]}' in ended.out
    assert cli("predict", tmp_path / "run", "test", "-o", tmp_path / "found.csv").status == 0
    assert (tmp_path / "found.csv").read_text().startswith("row,prediction,probability")


REFUSED = [
    ('"own_tasks:Missing"', "no 'Missing'"),
    ('"own_tasks:Pairs"', "is no task: its `form` is None"),
    ('{name: "own_tasks:CountLetters", alfabet: a}', "did you mean 'alphabet'"),
    ("clasification", "did you mean 'classification'"),
]


@pytest.mark.parametrize(("task", "message"), REFUSED)
def test_what_is_no_task_is_refused(tmp_path: Path, task: str, message: str) -> None:
    text = RECIPE.format(task=task, data="digits", model="mlp", batch=12, steps=6)
    with pytest.raises(UserError, match=message):
        check_recipe(load_recipe(write_recipe(tmp_path, text)).recipe, "recipe")


def test_a_loss_beside_a_task_of_ones_own_is_refused(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, VARIATIONAL + "loss: mse\n")).recipe
    with pytest.raises(UserError, match="computes its losses itself"):
        check_recipe(recipe, "recipe")


ODD = {
    "none": "returned no loss",
    "list": "is a list; expected a LossSum",
    "rows": r"is a tensor \(12, 1\) for 12 samples",
    "number": "is a float; expected a LossSum",
    "count": "is over 12 in this step, and was divided by 3",
    "taken": "'lr' is a column that rows have already",
    "total": "'loss' is the sum of all losses",
    "late": "'new' is reported here and was not in the first step",
    "twice": "logs 'a' twice",
}


@pytest.mark.parametrize("kind", ODD)
def test_what_a_task_gets_wrong_is_said(tmp_path: Path, kind: str) -> None:
    text = RECIPE.format(
        task=f'{{name: "own_tasks:Odd", kind: {kind}}}',
        data="digits",
        model="mlp",
        batch=12,
        steps=6,
    )
    ended = train(1, write_recipe(tmp_path, text), tmp_path / "run", status=1)
    assert re.search(ODD[kind], ended[0].err), ended[0].err


# --------------------------------------------------------------------------------------------------------------------
# What a class changes of a task, as a loop of plain PyTorch has it


def plain(path: Path, weight: float | None, *, clamped: bool) -> dict[str, torch.Tensor]:
    """Return the weights of a loop of plain PyTorch whose loss is weighted by `weight`, or by the step."""
    recipe = load_recipe(path).recipe
    data = build_data(recipe)
    model = build_model(recipe, data.meta)
    order = SampleOrder(len(data.splits["train"]), recipe.seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(5):
        batch = data.splits["train"].fetch(order.at(12 * step, 12 * (step + 1))[1])
        loss = torch.nn.functional.cross_entropy(model(batch["inputs"].double()), batch["targets"])
        optimizer.zero_grad()
        (loss * (step / 2 if weight is None else weight)).backward()
        optimizer.step()
        if clamped:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.clamp_(-0.1, 0.1)
    return {f"model/{name}": each.detach() for name, each in model.named_parameters()}


CHANGED = """
name: changed
task: "own_tasks:{kind}"
data: digits
model: {{name: mlp, hidden: [8]}}
optim: {{name: sgd, lr: 0.5}}
batch: {{global: 12}}
train: {{steps: 5, precision: fp64}}
"""


@pytest.mark.parametrize(
    ("kind", "weight", "clamped"),
    [("Annealed", None, False), ("Prepared", 0.5, False), ("Weighted", 0.5, False), ("Halved", 0.5, False),
     ("Clamped", 1.0, True)],
)  # fmt: skip
@pytest.mark.parametrize("world_size", [1, 2])
def test_whatever_a_class_changes_of_a_task_is_trained(
    tmp_path: Path, kind: str, weight: float | None, clamped: bool, world_size: int
) -> None:
    recipe = write_recipe(tmp_path, CHANGED.format(kind=kind))
    train(world_size, recipe, tmp_path / "run", "batch.micro=3")
    found = state(last(tmp_path / "run"))
    for name, expected in plain(recipe, weight, clamped=clamped).items():
        assert torch.allclose(torch.from_numpy(found[name]), expected.flatten(), rtol=0, atol=1e-12), name


def test_the_state_of_a_task_that_changes_nothing_else_is_kept(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, CHANGED.format(kind="Keeping"))
    train(1, recipe, tmp_path / "run")
    assert "the task's state" in (last(tmp_path / "run") / "MANIFEST.json").read_text()


@pytest.mark.parametrize("workers", [0, 1])
def test_the_step_is_not_known_where_batches_are_made(tmp_path: Path, workers: int) -> None:
    recipe = write_recipe(tmp_path, LETTERS.replace("CountLetters", "LateLetters"))
    ended = train(1, recipe, tmp_path / "run", f"data.workers={workers}", status=1)
    assert "LateLetters.collate reads self.step" in ended[0].err
