"""A step whose loss or gradient is no number, or far too large: all ranks act alike, and so do resumed runs."""

from __future__ import annotations

import functools
import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from covering import covering
from runs import assert_same_run, captured, checkpoint, last, rows, state, write_recipe
from worlds import in_world, running_world

from distrain.checkpoint import difference, list_checkpoints, verify
from distrain.config import UserError
from distrain.config.yaml import load_recipe
from distrain.datasets.order import SampleOrder
from distrain.launchers import open_run
from distrain.report.history import History
from distrain.report.ui.details import happened
from distrain.run.folder import Launch, RunDir

RECIPE = """
name: spoiled
task: classification
data: {name: "anomalous_parts:Spoiled", samples: 48, bad: [17]}
model: {name: "anomalous_parts:Normed"}
optim: {name: adamw, lr: 1.0e-2, weight_decay: 0.05}
schedule: {name: cosine, warmup: 2 steps}
batch: {global: 12, micro: 3}
train: {steps: 14, precision: fp32, ema: 0.9}
eval: {every: 4 steps, batch: 12, metrics: [accuracy]}
checkpoint: {every: 4 steps, keep: 100, async: false}
log: {every: 1 steps}
"""
MORE = [pytest.param(name, marks=pytest.mark.more) for name in ("zero1", "zero2")]
"""One class with one way of stepping; the tests below have zero2 skip and roll back."""
STRATEGIES = ["ddp", *MORE, "zero3", "fsdp2"]


def steps_with(sample: int, *, steps: int = 14) -> list[tuple[int, int, int]]:
    """Return (step, rank, micro-batch) of each time that a sample is consumed, in a world of two."""
    order = SampleOrder(48, 0)
    found = []
    for step in range(steps):
        ids = order.at(step * 12, step * 12 + 12)[1].tolist()
        if sample in ids:
            place = ids.index(sample) // 3
            found.append((step + 1, place % 2, place // 2))
    return found


def new_run(folder: Path, name: str, *overrides: str, text: str = RECIPE, processes: int = 2) -> str:
    """Make the folder of a run that has not begun."""
    loaded = load_recipe(write_recipe(folder, text), list(overrides))
    open_run(RunDir(folder / name), loaded, Launch.describe(processes, "ddp"))
    return str(folder / name)


def train_each(strategy: str, run_dirs: list[str], die_after: int | None = None) -> list[tuple[str, str]]:
    """Train each run in this world; returns what each said and raised. Every rank is killed after step `die_after`."""
    from distrain import Callback, loop
    from distrain.parallel import StrategySpec, open_world

    class Die(Callback):
        def on_step_end(self, step: int, metrics: Any) -> None:
            if die_after is not None and step == die_after + 1:
                os.kill(os.getpid(), signal.SIGKILL)

    world = open_world(load_recipe(RunDir(run_dirs[0]).recipe_path).recipe.train.precision, StrategySpec(strategy))
    raised: list[str] = []

    def go(run_dir: str) -> int:
        try:
            loop.train(RunDir(run_dir), world, callbacks=[Die()])
        except UserError as error:
            raised.append(str(error))
        else:
            raised.append("")
        return 0

    try:
        said = [captured(functools.partial(go, run_dir)).out for run_dir in run_dirs]
        return list(zip(said, raised, strict=True))
    finally:
        world.close()


def killed(strategy: str, run_dir: str, die_after: int, world_size: int = 2) -> None:
    """Train a run whose ranks are all killed after a step."""
    with running_world(world_size, train_each, strategy, [run_dir], die_after) as world:
        assert set(world.wait(60)) == {-signal.SIGKILL}


def written(run_dir: str | Path) -> list[dict[str, Any]]:
    """Return the rows of anomalies.jsonl."""
    return [json.loads(line) for line in (Path(run_dir) / "anomalies.jsonl").read_text().splitlines()]


def assert_finite(run_dir: str | Path) -> None:
    assert all(math.isfinite(value) for tensor in state(last(Path(run_dir))).values() for value in tensor)


# --------------------------------------------------------------------------------------------------------------------
# What every strategy does


@pytest.mark.fault(19)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_all_ranks_act_alike_where_one_has_a_nan_sample(tmp_path: Path, strategy: str) -> None:
    expected = steps_with(17)
    assert len(expected) >= 2
    first_step, rank, micro_batch = expected[0]
    names = ("stop", "skip", "rollback")
    runs = {name: new_run(tmp_path, name, f"anomalies.nonfinite={name}") for name in names}
    runs["clipped"] = new_run(tmp_path, "clipped", "anomalies.nonfinite=skip", "optim.clip_norm=0.5")
    ranks = in_world(2, train_each, strategy, list(runs.values()))
    outs = dict(zip(runs, ranks[0], strict=True))

    assert all(each[0][1] == outs["stop"][1] for each in ranks), "all ranks raise the same"
    assert f"the loss of step {first_step} is nan: not finite on rank {rank}" in outs["stop"][1]
    (row,) = written(runs["stop"])
    assert (row["step"], row["action"], row["what"], row["value"]) == (first_step, "stop", "loss", "nan")
    assert [value == "nan" for value in row["ranks"]] == [rank == 0, rank == 1]
    assert [(each["rank"], each["micro_batch"], 17 in each["samples"]) for each in row["suspects"]] == [
        (rank, micro_batch, True)
    ]
    wanted = SampleOrder(48, 0).at((first_step - 1) * 12, first_step * 12)[1].tolist()
    assert row["samples"] == wanted, "in the order of the data"
    assert all(info.step < first_step for info in list_checkpoints(Path(runs["stop"]) / "checkpoints"))

    for name in ("skip", "rollback", "clipped"):
        assert outs[name][1] == ""
        assert [row["step"] for row in written(runs[name])] == [step for step, _, _ in expected]
        assert RunDir(runs[name]).finished is not None
        assert_finite(runs[name])
        told = [row["step"] for row in rows(Path(runs[name])) if row["event"] == "anomaly"]
        assert told == [step for step, _, _ in expected]
        shown = happened(History(runs[name]))["rollbacks"]
        assert shown == (told if name == "rollback" else []), "what the pages mark"
    # to the bit: what led up to the step is made again, and the step has changed nothing
    found = difference(last(Path(runs["skip"])), last(Path(runs["rollback"])))
    assert found.identical, "\n".join(found.lines())


@pytest.mark.slow
@pytest.mark.fault(19)
@pytest.mark.parametrize(("strategy", "action"), covering(["ddp", "zero3", "fsdp2"], ["skip", "rollback"]))
def test_a_run_killed_around_a_nan_step_ends_as_an_uninterrupted_one(
    tmp_path: Path, strategy: str, action: str
) -> None:
    whole, run = (new_run(tmp_path, name, f"anomalies.nonfinite={action}") for name in ("whole", "run"))
    in_world(2, train_each, strategy, [whole])
    second = steps_with(17)[1][0]
    # when it is not known yet, and when it is
    killed(strategy, run, second - 2)
    killed(strategy, run, second)
    before = written(run)
    assert before[-1]["step"] == second
    in_world(2, train_each, strategy, [run])
    assert_same_run(Path(whole), Path(run))
    assert written(run)[: len(before)] == before
    assert [row["step"] for row in written(run)] == [step for step, _, _ in steps_with(17)], "each is decided once"


# --------------------------------------------------------------------------------------------------------------------
# What was decided holds


@pytest.mark.fault(19)
@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_a_skipped_step_stays_skipped_when_its_reason_does_not_recur(tmp_path: Path, action: str) -> None:
    text = RECIPE.replace("bad: [17]", "bad: []").replace("micro: 3", "micro: 6")
    runs = [
        new_run(
            tmp_path,
            name,
            f"model={{name: 'anomalous_parts:Once', marker: '{tmp_path / name}.marker', at: 6}}",
            f"anomalies.nonfinite={action}",
            text=text,
        )
        for name in ("whole", "run")
    ]
    in_world(2, train_each, "ddp", runs[:1])
    (row,) = written(runs[0])
    assert (row["step"], row["ranks"][1]) == (6, "nan")
    killed("ddp", runs[1], 6)
    in_world(2, train_each, "ddp", runs[1:])
    assert [row["step"] for row in written(runs[1])] == [6]
    assert [row["step"] for row in rows(Path(runs[1])) if row["event"] == "anomaly"] == [6]
    ours, theirs = state(last(Path(runs[0]))), state(last(Path(runs[1])))
    assert all((ours[name] == theirs[name]).all() for name in ours)


@pytest.mark.fault(19)
def test_another_world_skips_the_same_steps(tmp_path: Path) -> None:
    whole = new_run(tmp_path, "whole", "anomalies.nonfinite=skip", "model=mlp", "train.precision=fp64")
    run = new_run(tmp_path, "run", "anomalies.nonfinite=skip", "model=mlp", "train.precision=fp64")
    in_world(2, train_each, "ddp", [whole])
    second = steps_with(17)[1][0]
    killed("ddp", run, second)
    in_world(1, train_each, "single", [run])
    found = [(row["step"], row["processes"]) for row in written(run)]
    # the second one was known already
    assert found == [(step, 2 if step <= second else 1) for step, _, _ in steps_with(17)]
    ours, theirs = state(last(Path(run))), state(last(Path(whole)))
    assert all(abs(ours[name] - theirs[name]).max() < 1e-9 for name in ours)


@pytest.mark.fault(19)
def test_too_many_skipped_steps_stop_the_run(tmp_path: Path) -> None:
    run = new_run(
        tmp_path, "run", "anomalies.nonfinite=skip", "anomalies.max_skips=3", "data.bad=[1, 2, 3, 4, 5, 6, 7, 8]"
    )
    ((_, raised),) = in_world(2, train_each, "ddp", [run])[0]
    assert "as 3 of the 50 steps before it already are: anomalies.max_skips" in raised
    assert [row["action"] for row in written(run)] == ["skip", "skip", "skip", "stop"]


def test_a_changed_recipe_decides_later_steps_anew(tmp_path: Path) -> None:
    run = new_run(tmp_path, "run", "anomalies.nonfinite=skip")
    first, second = (step for step, _, _ in steps_with(17)[:2])
    killed("ddp", run, second)
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("bad: [17]", "bad: []"))
    loaded = load_recipe(tmp_path / "recipe.yaml", ["anomalies.nonfinite=skip"])
    open_run(RunDir(run), loaded, Launch.describe(2, "ddp"), update=True)
    in_world(2, train_each, "ddp", [run])
    found = [row["step"] for row in rows(Path(run)) if row["event"] == "anomaly"]
    # those up to the checkpoint that it goes on from are done
    assert found == [first]
    assert second in [row["step"] for row in rows(Path(run)) if row["event"] == "train"]


# --------------------------------------------------------------------------------------------------------------------
# Gradients, spikes, and a scaled loss


EDGED = RECIPE.replace("Normed", "Edged").replace("bad: [17]", "bad: [17], factor: '1e4'")


@pytest.mark.fault(19)
@pytest.mark.parametrize("strategy", ["ddp", "zero2", "fsdp2"])
def test_a_gradient_that_is_nan_or_infinite_is_found_without_clipping(tmp_path: Path, strategy: str) -> None:
    run = new_run(tmp_path, "run", "anomalies.nonfinite=skip", text=EDGED)
    ((_, raised),) = in_world(2, train_each, strategy, [run])[0]
    assert raised == ""
    found = written(run)
    assert [row["step"] for row in found] == [step for step, _, _ in steps_with(17)]
    assert {(row["what"], row["value"]) for row in found} == {("norm of the gradient", "nan")}
    assert all(math.isfinite(value) for row in found for value in row["ranks"])
    assert_finite(run)


@pytest.mark.fault(19)
@pytest.mark.parametrize("strategy", ["ddp", pytest.param("zero2", marks=pytest.mark.more), "zero3"])
def test_a_scaled_loss_keeps_its_scale_over_a_skipped_step(tmp_path: Path, strategy: str) -> None:
    fp16 = ("train.precision=fp16", "model.name='anomalous_parts:Normed'")
    runs = [
        new_run(tmp_path, "skip", "anomalies.nonfinite=skip", *fp16),
        new_run(tmp_path, "rollback", "anomalies.nonfinite=rollback", *fp16),
    ]
    for out, raised in in_world(2, train_each, strategy, runs)[0]:
        assert raised == "", out
    for run in runs:
        assert [row["step"] for row in written(run)] == [step for step, _, _ in steps_with(17)]
        scales = {row["step"]: row["loss_scale"] for row in rows(Path(run)) if row["event"] == "train"}
        left_out = written(run)[-1]["step"]
        # the step after it may overflow by itself
        assert scales[left_out + 1] >= scales[left_out - 1] / 4
    assert difference(last(Path(runs[0])), last(Path(runs[1]))).identical


@pytest.mark.fault(19)
def test_a_step_whose_gradient_no_scale_makes_finite_is_skipped(tmp_path: Path) -> None:
    run = new_run(tmp_path, "run", "anomalies.nonfinite=skip", "train.precision=fp16", text=EDGED)
    ((out, raised),) = in_world(2, train_each, "ddp", [run])[0]
    assert raised == "", out
    assert [row["step"] for row in written(run)] == [step for step, _, _ in steps_with(17)]
    # it was halved until that could not be the reason, and put back
    scales = {row["step"]: row["loss_scale"] for row in rows(Path(run)) if row["event"] == "train"}
    left_out = written(run)[-1]["step"]
    assert scales[left_out - 1] == scales[left_out + 1] > 1
    assert_finite(run)


@pytest.mark.fault(19)
@pytest.mark.parametrize(("strategy", "action"), covering(["ddp", "zero3", "fsdp2"], ["stop", "skip", "rollback"]))
def test_a_spike_is_found_and_handled_alike_after_a_resume(tmp_path: Path, strategy: str, action: str) -> None:
    overrides = (f"anomalies.spike={action}", "anomalies.window=4", "anomalies.factor=20", "data.factor='1e4'")
    # without normalisation, which would hide it
    text = RECIPE.replace('"anomalous_parts:Normed"', "mlp, hidden: [8]")
    whole, run = (new_run(tmp_path, name, *overrides, text=text) for name in ("whole", "run"))
    ((_, raised),) = in_world(2, train_each, strategy, [whole])[0]
    later = [step for step, _, _ in steps_with(17) if step > 4]
    found = written(whole)
    assert found[0]["step"] == later[0]
    assert found[0]["value"] > 20 * found[0]["median"] > 0
    if action == "stop":
        assert f"of step {later[0]} is" in raised
        assert "times its median of" in raised
        return
    assert raised == ""
    assert [row["step"] for row in found] == later
    # the window that it is judged by comes from the checkpoint
    killed(strategy, run, later[0] - 1)
    in_world(2, train_each, strategy, [run])
    assert_same_run(Path(whole), Path(run))
    assert checkpoint(Path(run), 8).is_dir()
    assert all(verify(info.path) == [] for info in list_checkpoints(Path(run) / "checkpoints"))
