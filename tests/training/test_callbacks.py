"""Callbacks of a recipe: what they are told and when, what they keep, what they ask for, and how they fail."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import TINY, assert_same_run, checkpoint, losses, rows, state, train, write_recipe

from distrain.checkpoint import difference, read_manifest
from distrain.config import Duration, RecipeError
from distrain.config.yaml import dump_recipe, load_recipe, parse_recipe
from distrain.run.folder import RunDir
from distrain.training.callbacks.building import build_callbacks
from distrain.training.checks import check_recipe

MINE = '''
import json, os
from distrain import Callback, Duration


class Noting(Callback):
    """Writes down each call."""

    def __init__(self, label: str):
        self.label = label

    def note(self, hook, **values):
        with open(self.run.folder / f"noted-{self.run.rank}.jsonl", "a") as file:
            file.write(json.dumps({"label": self.label, "hook": hook, "done": self.run.step, **values}) + "\\n")

    def on_start(self, run):
        self.run = run
        self.note("start", world=run.world_size, total=run.total_steps, resumed=run.resumed_step, strategy=run.strategy,
                  names=[name for name, _ in run.model.named_parameters()], name=run.recipe.name,
                  tenth=run.steps("10%"))

    def on_step_end(self, step, metrics):
        self.note("step", step=step, **vars(metrics))

    def on_evaluate(self, split, values):
        self.note("evaluate", split=split, loss=values["loss"], accuracy=values["accuracy"])

    def on_checkpoint(self, saved):
        self.note("checkpoint", step=saved.step, complete=(saved.path / "MANIFEST.json").exists(), nbytes=saved.nbytes)

    def on_end(self, outcome):
        self.note("end", kind=outcome.kind, step=outcome.step, reason=outcome.reason,
                  summary=sorted(outcome.summary or ()))



class Plateau(Callback):
    """Lowers a number of the optimizer's groups by an evaluation."""

    def __init__(self, key: str):
        self.key = key

    def on_start(self, run):
        self.run = run

    def on_evaluate(self, split, values):
        if self.run.step == 4:
            for group in self.run.optimizer.param_groups:
                group[self.key] *= 0.5


class Total(Callback):
    """Adds up the losses, over resumes too."""

    def __init__(self):
        self.total, self.evaluations = 0.0, 0

    def state_dict(self):
        return {"total": self.total, "evaluations": self.evaluations}

    def load_state_dict(self, state):
        self.total, self.evaluations = state["total"], state["evaluations"]

    def on_start(self, run):
        self.run = run

    def on_step_end(self, step, metrics):
        self.total += metrics.loss
        self.run.log({"total": self.total})

    def on_evaluate(self, split, values):
        self.evaluations += 1
        self.run.log({"evaluations": self.evaluations, "best": float("nan")})


class Fails(Callback):
    """Fails in one hook, on one rank."""

    def __init__(self, hook: str, rank: int):
        self.hook, self.rank = hook, rank
        setattr(self, hook, self.fail)

    def on_start(self, run):
        self.mine = run.rank == self.rank

    def fail(self, *args):
        if self.hook == "on_start":
            self.mine = args[0].rank == self.rank
        if self.mine:
            raise ZeroDivisionError("no such number")


class Stops(Callback):
    """One rank asks for a stop."""

    def __init__(self, after: Duration, rank: int, finish: bool = False, on: str = "step"):
        self.after, self.rank, self.finish, self.on = after, rank, finish, on

    def on_start(self, run):
        self.run, self.last = run, run.steps(self.after)

    def ask(self, step, on):
        if step == self.last and self.run.rank == self.rank and self.run.resumed_step is None and on == self.on:
            self.run.request_stop("enough of it", finish=self.finish)

    def on_step_end(self, step, metrics):
        self.ask(step, "step")

    def on_evaluate(self, split, values):
        self.ask(self.run.step, "evaluate")


class Tally(Callback):
    """Counts, and keeps that nowhere."""

    def __init__(self):
        self.steps, self.seen = 0, {}

    def on_step_end(self, step, metrics):
        self.steps += 1
        self.seen["loss"] = metrics.loss


class Tallies(Tally):
    """Needs no count of an earlier attempt."""

    def state_dict(self):
        return {}

    def load_state_dict(self, state): ...


class Looks(Callback):
    """Has on itself what is kept elsewhere, or by others."""

    def on_start(self, run):
        self.run, self.model, self.optimizer, self.log = run, run.model, run.optimizer, run.log
        self.parameters, self.file = list(run.model.parameters()), open(os.devnull, "w")

    def on_step_end(self, step, metrics):
        self.file.write(f"{step}: {metrics}")


class Holds(Total):
    def state_dict(self):
        import torch

        return {"total": torch.ones(1)}


class Best(Callback):
    """Has found nothing so far, and counts what a checkpoint gives back."""

    def __init__(self):
        self.best, self.seen = float("inf"), {(0, 1): {float("-inf")}}

    def on_start(self, run):
        self.run = run

    def on_step_end(self, step, metrics):
        self.run.log({"kept": float(self.best == float("inf") and self.seen == {(0, 1): {float("-inf")}})})

    def state_dict(self):
        return {"best": self.best, "seen": self.seen, "worst": float("nan")}

    def load_state_dict(self, state):
        assert state["worst"] != state["worst"]
        self.best, self.seen = state["best"], state["seen"]


class Misspelt(Callback):
    def on_step_ended(self, step, metrics): ...


class Half(Callback):
    def state_dict(self):
        return {}


class Plain:
    pass


def make(label: Duration | None = None):
    return Noting(label)


def makes_none():
    return 3


value = 7
'''


def recipe_with(folder: Path, *callbacks: str, text: str = TINY) -> Path:
    """Write the callbacks beside a recipe that names some of them."""
    (folder / "mine.py").write_text(MINE)
    return write_recipe(folder, f"{text}\ncallbacks: [{', '.join(callbacks)}]\n")


def noted(run: Path, rank: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / f"noted-{rank}.jsonl").read_text().splitlines()]


# --------------------------------------------------------------------------------------------------------------------
# What they are told


@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_every_hook_is_called_in_order_and_alike_on_all_ranks(tmp_path: Path, asynchronous: str) -> None:
    named = [f'{{name: "mine.py:Noting", label: {label}}}' for label in "ab"]
    recipe, run = recipe_with(tmp_path, *named), tmp_path / "run"
    train(2, recipe, run, f"checkpoint.async={asynchronous}")
    ranks = [noted(run, rank) for rank in (0, 1)]
    assert ranks[0] == ranks[1]
    a, b = ([{**row, "label": ""} for row in ranks[0] if row["label"] == label] for label in "ab")
    assert a == b
    assert [row["label"] for row in ranks[0]] == ["a", "b"] * len(a), "one after the other, at each call"
    first, last = a[0], a[-1]
    assert (first["hook"], first["world"], first["total"], first["resumed"], first["strategy"]) == (
        "start", 2, 12, None, "ddp",
    )  # fmt: skip
    assert first["tenth"] == 2
    assert first["name"] == "tiny"
    stored = [name.removeprefix("model/") for name in state(checkpoint(run, 12)) if name.startswith("model/")]
    assert sorted(first["names"]) == sorted(stored)
    assert (last["hook"], last["kind"], last["step"], last["reason"]) == ("end", "finished", 12, None)
    assert {"exported_step", "test", "steps"} <= set(last["summary"])
    steps = [row for row in a if row["hook"] == "step"]
    logged = [row for row in rows(run) if row["event"] == "train"]
    assert [row["step"] for row in steps] == list(range(1, 13))
    assert [row["done"] for row in steps] == list(range(1, 13)), "on CPUs before the next step"
    for key in ("loss", "grad_norm", "lr", "samples", "epoch"):
        assert [row[key] for row in steps] == [row[key] for row in logged]
    assert not any(row["skipped"] for row in steps)
    found = [(row["done"], row["split"]) for row in a if row["hook"] == "evaluate"]
    assert found[:3] == [(4, "valid"), (8, "valid"), (12, "valid")]
    assert found[3][1] == "test"
    saved = [row for row in a if row["hook"] == "checkpoint"]
    assert [row["step"] for row in saved] == [4, 8, 12]
    assert all(row["complete"] and row["nbytes"] > 0 for row in saved)
    if asynchronous == "false":
        order = [row["hook"] for row in a if row["done"] == 4]
        assert order == ["step", "evaluate", "checkpoint"]


def test_skipped_steps_are_delivered_as_such(tmp_path: Path) -> None:
    text = (
        TINY.replace("{name: mlp, hidden: [16]}", '{name: "mine_model.py:Spoilt"}') + "anomalies: {nonfinite: skip}\n"
    )
    (tmp_path / "mine_model.py").write_text(
        "import torch\nclass Spoilt(torch.nn.Module):\n"
        "    def __init__(self):\n        super().__init__(); self.inner = torch.nn.Linear(64, 10); self.passes = 0\n"
        "    def forward(self, x):\n        self.passes += self.training\n"
        "        return self.inner(x.flatten(1)) * (float('nan') if self.training and self.passes == 3 else 1)\n"
    )
    recipe, run = recipe_with(tmp_path, '{name: "mine.py:Noting", label: a}', text=text), tmp_path / "run"
    train(1, recipe, run)
    steps = [row for row in noted(run, 0) if row["hook"] == "step"]
    assert [row["step"] for row in steps if row["skipped"]] == [3]
    assert len(steps) == 12


def test_the_end_of_a_run_that_failed(tmp_path: Path) -> None:
    named = ['{name: "mine.py:Noting", label: a}', '{name: "mine.py:Fails", hook: on_evaluate, rank: 1}']
    recipe, run = recipe_with(tmp_path, *named), tmp_path / "run"
    train(2, recipe, run, status=1)
    for rank in (0, 1):
        last = noted(run, rank)[-1]
        assert (last["hook"], last["kind"], last["step"], last["summary"]) == ("end", "failed", 4, [])
        assert "no such number" in last["reason"]


# --------------------------------------------------------------------------------------------------------------------
# What they keep


def test_state_and_rows_over_a_resume_are_those_of_one_run(tmp_path: Path) -> None:
    recipe = recipe_with(tmp_path, "mine.py:Total", "mine.py:Total")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(1, recipe, whole)
    train(2, recipe, parts, stop_after=5)
    train(1, recipe, parts)
    own = [row for row in rows(whole) if row["event"].startswith("callback/")]
    assert {row["event"] for row in own} == {
        f"callback/{name}{hook}" for name in ("Total", "Total#2") for hook in ("", "/evaluate")
    }
    totals = [row["total"] for row in own if row["event"] == "callback/Total"]
    assert totals == np.cumsum(losses(whole)).tolist()
    kept = read_manifest(checkpoint(whole, 12)).scalars["callbacks"]
    assert kept["Total"] == {"total": totals[-1], "evaluations": 3} == kept["Total#2"]
    again = tmp_path / "again"
    train(1, recipe, again, stop_after=7)  # which saves step 8, and leaves its evaluation to the resumed run
    train(1, recipe, again)
    assert_same_run(whole, again)
    resumed = read_manifest(checkpoint(parts, 12)).scalars["callbacks"]["Total"]
    assert resumed == {"total": pytest.approx(totals[-1], rel=1e-9), "evaluations": 3}
    assert len([row for row in rows(parts) if row["event"] == "callback/Total"]) == 12


def test_callbacks_that_come_and_go_say_whose_state_is_not_used(tmp_path: Path) -> None:
    recipe, run = recipe_with(tmp_path, "mine.py:Total"), tmp_path / "run"
    train(1, recipe, run, stop_after=5)
    (ended,) = train(1, recipe, run, "callbacks=[]", update=True, stop_after=8)
    assert "warning: no callback takes the state of callback Total in the checkpoint" in ended.out
    (ended,) = train(1, recipe, run, update=True)
    assert "warning: the checkpoint has no state of callback Total" in ended.out
    kept = read_manifest(checkpoint(run, 12)).scalars["callbacks"]["Total"]
    assert kept["evaluations"] < 3


@pytest.mark.parametrize(("world_size", "strategy"), [(1, "ddp"), (2, "fsdp2")])
def test_what_one_counts_and_does_not_keep_is_named(tmp_path: Path, world_size: int, strategy: str) -> None:
    names = "Tally", "Tallies", "Looks", "Total"
    recipe = recipe_with(tmp_path, *(f'"mine.py:{name}"' for name in names))
    ended = train(world_size, recipe, tmp_path / "run", "train.steps=4", strategy=strategy)
    (said,) = [line for line in (ended[0].out + ended[0].err).splitlines() if "no checkpoint holds" in line]
    changed = said.removeprefix("warning: ").partition(": changed from step to step")[0]
    assert changed == "callback.Tally.steps, callback.Tally.seen.loss"
    assert "of a callback by its methods state_dict() and load_state_dict(state)" in said


def test_a_state_of_tensors_is_refused(tmp_path: Path) -> None:
    (ended,) = train(1, recipe_with(tmp_path, "mine.py:Holds"), tmp_path / "run", status=1)
    assert "state_dict() of callback Holds[total] is a tensor; return numbers, text, None, and lists" in ended.err


def test_a_state_that_json_would_change_is_kept_as_it_is(tmp_path: Path) -> None:
    recipe, run = recipe_with(tmp_path, "mine.py:Best"), tmp_path / "run"
    train(1, recipe, run, stop_after=5)
    (ended,) = train(1, recipe, run)
    assert "warning" not in ended.out + ended.err
    kept = [row["kept"] for row in rows(run) if row["event"] == "callback/Best"]
    assert kept == [1.0] * 12


# --------------------------------------------------------------------------------------------------------------------
# What they ask for


@pytest.mark.parametrize("on", ["step", "evaluate"])
def test_a_stop_that_one_rank_asks_for_is_a_pause_of_all(tmp_path: Path, on: str) -> None:
    after = 5 if on == "step" else 4
    named = f'{{name: "mine.py:Stops", after: {after} steps, rank: 1, "on": {on}}}'
    recipe, run = recipe_with(tmp_path, named), tmp_path / "run"
    ended = train(2, recipe, run)
    preempted = RunDir(run).preempted
    assert preempted is not None
    assert (preempted["step"], preempted["reason"]) == (4 if on == "evaluate" else 6, "enough of it")
    assert "stopped by enough of it" in ended[0].out
    train(2, recipe, run)
    assert RunDir(run).finished
    assert len(losses(run)) == 12


def test_a_callback_lowers_the_learning_rate_by_its_scale_and_is_told_where_that_does_not_last(tmp_path: Path) -> None:
    ends = {}
    for name, key in (("none", None), ("lr", "lr"), ("scale", "lr_scale")):
        own = () if key is None else (f'{{name: "mine.py:Plateau", key: {key}}}',)
        (ended,) = train(1, recipe_with(tmp_path, *own), tmp_path / name)
        ends[name] = state(checkpoint(tmp_path / name, 12))
        assert ("has set a learning rate to" in " ".join((ended.out + ended.err).split())) == (name == "lr"), ended.err
    for key, value in ends["none"].items():
        assert np.array_equal(ends["lr"][key], value), "it did not last"
    assert any(not np.array_equal(ends["scale"][key], value) for key, value in ends["none"].items())
    recipe = tmp_path / "recipe.yaml"
    train(1, recipe, tmp_path / "resumed", stop_after=3)  # before the evaluation that lowers the rate
    train(1, recipe, tmp_path / "resumed")
    for step in (4, 12):
        found = difference(checkpoint(tmp_path / "resumed", step), checkpoint(tmp_path / "scale", step))
        assert found.identical, "\n".join(found.lines())


@pytest.mark.parametrize("on", ["step", "evaluate"])
def test_a_callback_can_end_training(tmp_path: Path, on: str) -> None:
    after = "50%" if on == "evaluate" else "7 steps"
    named = f'{{name: "mine.py:Stops", after: {after}, rank: 1, finish: true, "on": {on}}}'
    recipe, run = recipe_with(tmp_path, named), tmp_path / "run"
    ended = train(2, recipe, run, "eval.every=3 steps")
    last = 6 if on == "evaluate" else 8
    assert f"training ends after step {last}: enough of it" in ended[0].out
    finished = RunDir(run).finished
    assert finished is not None
    assert (finished["steps"], len(losses(run))) == (last, last)
    assert [row["step"] for row in rows(run) if row["event"] == "eval"] == sorted({3, 6, last})
    (run / "FINISHED").unlink()  # as if it had been killed just before
    train(2, recipe, run, "eval.every=3 steps")
    assert len(losses(run)) == last


# --------------------------------------------------------------------------------------------------------------------
# How they fail


@pytest.mark.parametrize("hook", ["on_start", "on_step_end", "on_evaluate", "on_checkpoint", "on_end"])
def test_a_failure_on_one_rank_ends_all_with_the_name_of_the_callback(tmp_path: Path, hook: str) -> None:
    recipe = recipe_with(tmp_path, f'{{name: "mine.py:Fails", hook: {hook}, rank: 1}}')
    run = tmp_path / "run"
    ended = train(2, recipe, run, status=1)
    said = "".join(rank.err for rank in ended)
    where = {"on_step_end": " of step 1", "on_checkpoint": " of step 4"}.get(hook, "")
    line = next(n for n, text in enumerate(MINE.splitlines(), 1) if "raise ZeroDivisionError" in text)
    expected = f"callback Fails failed in {hook}{where}: {tmp_path}/mine.py:{line}: ZeroDivisionError: no such number"
    assert expected in said
    assert not RunDir(run).finished
    reached = {"on_start": 0, "on_step_end": 2, "on_evaluate": 4, "on_checkpoint": 4, "on_end": 12}[hook]
    assert len(losses(run)) == reached


@pytest.mark.parametrize(
    ("named", "problem"),
    [
        ('{name: "mine.py:Noting", lable: a}', "callbacks.0.lable: .* has no argument 'lable'; did you mean 'label'"),
        ("mine.py:Noting", "callbacks.0.label: .* needs it, and it was not given"),
        (
            '{name: "mine.py:Stops", after: 10 stops, rank: 0}',
            "callbacks.0.after: found '10 stops', expected a number and a unit",
        ),
        ("mine.py:Nothing", "has no 'Nothing'; did you mean 'Noting'"),
        ("noting", "callbacks: no callback 'noting'; your own is 'path/to/file.py:NAME'"),
        ("mine.py:value", "callbacks.0.name: .* is 7; expected a subclass of distrain.Callback"),
        ("mine.py:Plain", "callbacks.0.name: .* is no subclass of distrain.Callback"),
        ("mine.py:Misspelt", "has a method 'on_step_ended', which nothing calls; did you mean 'on_step_end'"),
        ("mine.py:Half", "has state_dict alone; expected state_dict and load_state_dict, or neither"),
    ],
)
def test_what_is_no_callback_is_refused_before_anything_is_built(tmp_path: Path, named: str, problem: str) -> None:
    path = recipe_with(tmp_path, named)
    with pytest.raises(RecipeError, match=problem):
        check_recipe(load_recipe(path).recipe, str(path))


def test_a_function_may_make_one_and_lengths_are_parsed(tmp_path: Path) -> None:
    path = recipe_with(tmp_path, '{name: "mine.py:make", label: 10%}')
    (made,) = build_callbacks(load_recipe(path).recipe).values()
    assert made.label == Duration(10, "%")  # type: ignore[attr-defined]
    path = recipe_with(tmp_path, "mine.py:makes_none")
    check_recipe(load_recipe(path).recipe, str(path))
    with pytest.raises(Exception, match="makes_none' made an int; expected an object of a subclass"):
        build_callbacks(load_recipe(path).recipe)


# --------------------------------------------------------------------------------------------------------------------
# The recipe's record


def test_a_recipe_without_callbacks_is_stored_as_before_and_one_with_them_whole(tmp_path: Path) -> None:
    without = load_recipe(write_recipe(tmp_path)).recipe
    assert "callbacks" not in dump_recipe(without)
    recipe = load_recipe(recipe_with(tmp_path, "mine.py:Total", '{name: "mine.py:Noting", label: a}')).recipe
    assert parse_recipe(dump_recipe(recipe), "again") == recipe
    assert recipe.callbacks[0].name == f"{tmp_path}/mine.py:Total"


def test_a_changed_file_of_a_callback_is_reported(tmp_path: Path) -> None:
    recipe, run = recipe_with(tmp_path, "mine.py:Total"), tmp_path / "run"
    train(1, recipe, run, stop_after=5)
    (tmp_path / "mine.py").write_text(MINE + "\nmore = 1\n")
    (ended,) = train(1, recipe, run, status=1)
    assert "code file mine.py: changed" in ended.err


def test_importing_the_class_imports_no_torch() -> None:
    code = "import distrain, sys; distrain.Callback, distrain.Duration; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.strip() == "False"


# --------------------------------------------------------------------------------------------------------------------
# Those of the documentation


@pytest.mark.parametrize(("world_size", "strategy"), [(1, "single"), (2, "ddp"), (2, "fsdp2")])
def test_the_callbacks_of_the_page_do_what_it_says(tmp_path: Path, world_size: int, strategy: str) -> None:
    page = (Path(__file__).parents[2] / "docs" / "callbacks.md").read_text()
    code = re.search(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert code is not None
    text = TINY.replace(", ema: 0.9", "").replace("every: 4 steps, keep", "every: 1 steps, keep")
    named = ['{name: "page.py:LogGradients", every: 3 steps}', '{name: "page.py:Freeze", params: "*.bias", until: 50%}']
    recipe, run = recipe_with(tmp_path, *named, text=text), tmp_path / "run"
    (tmp_path / "page.py").write_text(code[1])
    train(world_size, recipe, run, stop_after=4, strategy=strategy)
    train(world_size, recipe, run, strategy=strategy)
    logged = [row for row in rows(run) if row["event"] == "callback/LogGradients"]
    assert [row["step"] for row in logged] == [3, 6, 9, 12]
    norms = {row["step"]: row["grad_norm"] for row in rows(run) if row["event"] == "train"}
    for row in logged:
        layers = [value for key, value in row.items() if key.startswith("grad_norm/")]
        assert len(layers) > 1
        clipped = min(norms[row["step"]], 0.5)
        assert np.linalg.norm(layers) == pytest.approx(clipped, rel=1e-5)
    states = [state(checkpoint(run, step)) for step in (1, 6, 7)]
    biases = [name for name in states[0] if name.startswith("model/") and name.endswith("bias")]
    weights = [name for name in states[0] if name.startswith("model/") and name.endswith("weight")]
    assert biases
    for name in biases + weights:
        assert np.array_equal(states[0][name], states[1][name]) == (name in biases), name
        assert not np.array_equal(states[1][name], states[2][name]), name
