"""What a user sees when something fails: one message with the cause, on all ranks the end, and the state as it was."""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from runs import TINY, assert_same_run, checkpoint, last, rows, train, train_rank, write_recipe
from worlds import in_world, running_world

from distrain.checkpoint import Reader, difference, list_checkpoints, verify
from distrain.run.folder import RunDir

FAULTY = """
name: faulty
task: classification
data: {name: "own_parts:Points", samples: 48}
model: {name: "own_parts:Faulty", how: raise, at: 5, rank: 1}
optim: {name: sgd, lr: 0.1}
batch: {global: 12}
train: {steps: 12}
eval: {every: null}
checkpoint: {every: 2 steps, async: false}
log: {every: 1 steps}
"""


def said(ended: list[Any]) -> str:
    """What all ranks together wrote to standard error."""
    return "".join(rank.err for rank in ended)


@pytest.mark.parametrize("world_size", [2, 3])
def test_an_exception_in_one_rank_ends_all_and_is_reported_once(tmp_path: Path, world_size: int) -> None:
    recipe = write_recipe(tmp_path, FAULTY)
    run = tmp_path / "run"
    ended = train(world_size, recipe, run, f"batch.global={6 * world_size}", status=1)
    err = said(ended)
    assert err.count("error (rank 1)") == 1
    assert err.count("error") == 1, err
    assert err.count("Traceback") == 1
    assert "ArithmeticError: the model broke" in err
    failed = RunDir(run).failed
    assert failed is not None
    assert (failed["rank"], failed["error"], failed["message"]) == (1, "ArithmeticError", "the model broke")
    assert "own_parts.py" in failed["traceback"]
    assert "ArithmeticError: the model broke" in (run / "log-rank-1.txt").read_text()
    assert all((run / f"log-rank-{rank}.txt").read_text() for rank in range(world_size))
    assert RunDir(run).finished is None
    assert list_checkpoints(run / "checkpoints"), "what was saved stays"


def test_the_cause_is_reported_every_time(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, FAULTY)
    for attempt in range(6):
        ended = train(2, recipe, tmp_path / str(attempt), status=1)
        assert "error (rank 1)" in said(ended)
        assert "error (rank 0)" not in said(ended)


def test_a_failure_before_the_first_step_is_reported_after_an_earlier_one(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, FAULTY)
    run = tmp_path / "run"
    train(2, recipe, run, status=1)
    before = (run / "FAILED.json").read_text()
    # another recipe: refused, on the terminal, and the run's own record stays
    ended = train(2, recipe, run, "optim.lr=0.2", status=1)
    assert said(ended).count("optim.lr: was 0.1, now 0.2") == 1
    assert "Traceback" not in said(ended)
    assert (run / "FAILED.json").read_text() == before


def test_a_failed_run_resumes_when_its_cause_is_gone(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, FAULTY)
    train(2, recipe, tmp_path / "whole", "model.at=1000")
    run = tmp_path / "run"
    train(2, recipe, run, status=1)
    # the pass at which it fails is counted anew in each process, and lies beyond the end now
    train(2, recipe, run, "model.at=1000", update=True)
    assert RunDir(run).failed is None
    assert RunDir(run).finished is not None
    assert difference(last(run), last(tmp_path / "whole")).identical


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.fault(19)
def test_a_loss_that_is_nan_or_infinite_stops_all_ranks(tmp_path: Path, value: str) -> None:
    recipe = write_recipe(tmp_path, FAULTY)
    run = tmp_path / "run"
    ended = train(2, recipe, run, f"model.how='{value}'", "log.every=100 steps", status=1)
    assert said(ended).count("the loss of step 5 is nan") == 1
    assert "Traceback" not in said(ended)
    assert last(run) == checkpoint(run, 4)
    assert verify(last(run)) == []
    failed = RunDir(run).failed
    assert failed is not None
    assert failed["traceback"] is None


@pytest.mark.fault(19)
def test_a_gradient_that_is_nan_or_infinite_is_never_saved(tmp_path: Path) -> None:
    # the root of nothing has an infinite slope, so the loss of the step is a number and its gradient is not
    text = FAULTY.replace('"own_parts:Faulty", how: raise, at: 5, rank: 1', '"own_parts:Rooted", at: 5')
    recipe = write_recipe(tmp_path, text)
    run = tmp_path / "run"
    ended = train(2, recipe, run, "optim.clip_norm=1.0", "checkpoint.every=1 steps", status=1)
    assert "the norm of the gradient of step 5 is nan" in said(ended)
    assert last(run) == checkpoint(run, 4)


@pytest.mark.fault(19)
def test_nan_or_infinite_weights_are_never_saved(tmp_path: Path) -> None:
    text = FAULTY.replace('"own_parts:Faulty", how: raise, at: 5, rank: 1', '"own_parts:Rooted", at: 5')
    recipe = write_recipe(tmp_path, text)
    run = tmp_path / "run"
    # without clipping nobody looks at the gradient
    ended = train(2, recipe, run, "checkpoint.every=1 steps", "checkpoint.async=true", status=1)
    assert said(ended).count("after step 5 the model has weights that are not finite") == 1
    assert last(run) == checkpoint(run, 4)


def test_a_user_error_is_reported_once_without_a_traceback(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    ended = train(3, recipe, tmp_path / "run", "batch.global=10", "data.name=digit", status=1)
    err = said(ended)
    assert err.count("did you mean 'digits'") == 1
    assert err.count("error:") == 1
    assert "Traceback" not in err


@pytest.mark.fault(22)
def test_a_world_that_does_not_divide_the_batch_is_refused(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    err = said(train(3, recipe, tmp_path / "run", "batch.global=10", status=1))
    assert err.count("batch.global 10 is not a multiple of the 3 processes; try 9 or 12") == 1


@pytest.mark.parametrize("where", ["/proc/distrain-run", "file/run"])
@pytest.mark.fault(13)
def test_a_run_folder_that_cannot_be_made_fails_before_the_first_step(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("")
    ended = train(2, write_recipe(tmp_path), tmp_path / where, status=1)
    assert said(ended).count("cannot write the run folder") == 1
    assert "Traceback" not in said(ended)
    assert "step 1" not in ended[0].out


@pytest.mark.fault(13)
def test_a_checkpoint_folder_that_cannot_be_written_fails_before_the_first_step(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    run = tmp_path / "run"
    train(2, recipe, run, stop_after=1)
    away = run / "away"
    (run / "checkpoints").rename(away)
    (run / "checkpoints").write_text("a file where a folder should be")
    ended = train(2, recipe, run, status=1)
    assert "checkpoints" in said(ended)
    assert "Traceback" not in said(ended)
    assert "step 1/" not in ended[0].out


# --------------------------------------------------------------------------------------------------------------------
# Stopping


def signalled(recipe: str, run_dir: str, number: int) -> None:
    """Train, and let everything that a signal needs be in place before the parent sends one."""
    ended = train_rank(recipe, ["train.steps=4000"], run_dir, None, False)
    assert ended.status == 0, ended.err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize("targets", ["all", "one"])
@pytest.mark.fault(1)
def test_a_signal_stops_all_ranks_at_one_step(tmp_path: Path, number: int, targets: str) -> None:
    recipe = write_recipe(tmp_path, TINY.replace("every: 4 steps, keep", "every: 1000 steps, keep"))
    run = tmp_path / "run"
    with running_world(2, signalled, str(recipe), str(run), number) as world:
        until = time.monotonic() + 30
        while sum(1 for _ in RunDir(run).rows()) < 3 and time.monotonic() < until:
            time.sleep(0.01)
        if targets == "all":
            world.signal(number)
        else:
            os.kill(world.processes[1].pid, number)
        world.results(30)
    marker = json.loads((run / "PREEMPTED").read_text())
    assert marker["step"] == list_checkpoints(run / "checkpoints")[0].step
    assert marker["step"] == max(row["step"] for row in rows(run))
    wanted = signal.Signals(number).name if targets == "all" else "a request on another rank"
    assert marker["reason"] == wanted
    assert RunDir(run).finished is None
    assert RunDir(run).failed is None


def test_a_file_stops_all_ranks_and_is_gone_with_the_next_start(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, TINY.replace("every: 4 steps, keep", "every: 1000 steps, keep"))
    run = tmp_path / "run"
    with running_world(2, signalled, str(recipe), str(run), 0) as world:
        until = time.monotonic() + 30
        while sum(1 for _ in RunDir(run).rows()) < 3 and time.monotonic() < until:
            time.sleep(0.01)
        (run / "STOP").touch()
        world.results(30)
    marker = RunDir(run).preempted
    assert marker is not None
    assert marker["reason"] == "the file STOP"
    assert marker["step"] == list_checkpoints(run / "checkpoints")[0].step
    train(2, recipe, run, f"train.steps={marker['step'] + 2}", update=True)
    assert RunDir(run).finished is not None
    assert not (run / "STOP").exists()


EVALUATED = """
name: evaluated
task: classification
data: {name: "own_parts:Points", samples: 48}
model: {name: "own_parts:SlowToScore", seconds: 0.2}
optim: {name: sgd, lr: 0.1}
batch: {global: 12}
train: {steps: 6, precision: fp64}
eval: {every: 3 steps, batch: 1}
checkpoint: {every: 100 steps, keep: 100, keep_best: 2, async: false}
log: {every: 1 steps}
"""
"""An evaluation takes seconds; training does not."""


def scoring(recipe: str, run_dir: str, strategy: str) -> int:
    from distrain.launchers import work

    return work(recipe, [], run_dir=run_dir, strategy=strategy)


@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.more), "fsdp2"])
def test_a_stop_does_not_wait_for_the_end_of_an_evaluation(tmp_path: Path, strategy: str) -> None:
    recipe = write_recipe(tmp_path, EVALUATED)
    run = tmp_path / "run"
    assert in_world(2, scoring, str(recipe), str(run), strategy) == [0, 0]
    marker = RunDir(run).preempted
    assert marker is not None
    assert marker["step"] == 3
    assert [row["event"] for row in rows(run) if row["step"] == 3] == ["checkpoint", "train"], "saved and not scored"
    train(2, recipe, run, "model.seconds=0", update=True)
    train(2, recipe, tmp_path / "whole", "model.seconds=0")
    events = [(row["event"], row["step"]) for row in rows(run) if row["event"] != "update"]
    assert events == [(row["event"], row["step"]) for row in rows(tmp_path / "whole")], (
        "scored by the start that went on"
    )
    scores = [Reader(info.path).manifest.score for info in list_checkpoints(run / "checkpoints")]
    assert None not in scores


@pytest.mark.fault(5)
def test_a_second_signal_while_it_stops_changes_nothing(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    run = tmp_path / "run"
    with running_world(2, signalled, str(recipe), str(run), signal.SIGTERM) as world:
        until = time.monotonic() + 30
        while sum(1 for _ in RunDir(run).rows()) < 3 and time.monotonic() < until:
            time.sleep(0.01)
        for _ in range(3):
            world.signal(signal.SIGTERM)
            time.sleep(0.005)
        world.results(30)
    assert (run / "PREEMPTED").exists()
    assert verify(last(run)) == []


def test_a_preempted_run_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    train(2, recipe, tmp_path / "whole")
    run = tmp_path / "run"
    # at steps that are saved anyway, nothing at all is left of the stop
    train(2, recipe, run, stop_after=3)
    train(2, recipe, run, stop_after=7)
    train(2, recipe, run)
    assert_same_run(tmp_path / "whole", run)


def test_a_stop_with_the_last_step_is_finished_by_the_next_start(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, TINY.replace("eval: {every: 4 steps", "eval: {every: 5 steps"))
    train(2, recipe, tmp_path / "whole")
    run = tmp_path / "run"
    train(2, recipe, run, stop_after=11)
    assert (run / "PREEMPTED").exists()
    train(2, recipe, run)
    assert RunDir(run).finished is not None
    assert rows(run) == rows(tmp_path / "whole"), "the last evaluation is made up for"


def rank_killed(recipe: str, run_dir: str) -> None:
    train_rank(recipe, ["train.steps=4000"], run_dir, None, False)


@pytest.mark.fault(6)
def test_other_ranks_end_and_report_it_when_one_is_killed(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    run = tmp_path / "run"
    with running_world(2, rank_killed, str(recipe), str(run)) as world:
        until = time.monotonic() + 30
        while sum(1 for _ in RunDir(run).rows()) < 3 and time.monotonic() < until:
            time.sleep(0.01)
        world.kill(1)
        assert world.wait(30) == [0, -9]
    failed = RunDir(run).failed
    assert failed is not None
    assert failed["rank"] == 0


def two_starts(recipe: str, run_dir: str) -> Any:
    return train_rank(recipe, [], run_dir, None, False)


def test_a_finished_run_is_shown_and_not_trained_again(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    run = tmp_path / "run"
    train(2, recipe, run)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    for world_size in (2, 1):
        ended = in_world(world_size, two_starts, str(recipe), str(run))
        assert "test accuracy" in ended[0].out
        assert "is finished; choose another --run-dir to train anew, or --update to continue" in ended[0].out
        assert all(rank.status == 0 for rank in ended)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before


def elsewhere(recipe: str, folder: str) -> Any:
    """Train in a folder that only this rank has."""
    return train_rank(recipe, [], f"{folder}/{os.environ['RANK']}", None, False)


@pytest.mark.fault(18)
def test_ranks_that_see_different_folders_are_refused(tmp_path: Path) -> None:
    ended = in_world(2, elsewhere, str(write_recipe(tmp_path)), str(tmp_path))
    assert [rank.status for rank in ended] == [1, 1]
    assert said(ended).count("all ranks must see the same run folder") == 1, said(ended)
    assert "Traceback" not in said(ended)
    assert not list((tmp_path / "0" / "checkpoints").iterdir())


@pytest.mark.fault(12)
@pytest.mark.parametrize("world_size", [1, 2])
def test_training_continues_without_a_checkpoint_where_the_recipe_allows_it(tmp_path: Path, world_size: int) -> None:
    recipe = write_recipe(tmp_path)
    run = tmp_path / "run"
    ended = in_world(world_size, on_a_full_disk, str(recipe), str(run), "continue")
    assert [rank.status for rank in ended] == [0] * world_size, said(ended)
    assert "the disk is full" in ended[0].out
    assert "training continues without it, as checkpoint.on_failure says" in ended[0].out
    assert [row["step"] for row in rows(run) if row["event"] == "checkpoint_failed"] == [4, 8]
    assert [info.step for info in list_checkpoints(run / "checkpoints")] == [12]


@pytest.mark.fault(12)
def test_a_full_disk_stops_a_run_with_its_last_checkpoint(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    run = tmp_path / "run"
    ended = in_world(2, on_a_full_disk, str(recipe), str(run), "stop")
    assert [rank.status for rank in ended] == [1, 1]
    assert said(ended).count("the disk is full; free some space") == 1
    assert "Traceback" not in said(ended)
    train(2, recipe, run)
    assert RunDir(run).finished is not None


def on_a_full_disk(recipe: str, run_dir: str, on_failure: str) -> Any:
    """Train, while the disk is full when the first two checkpoints are written by rank 0."""
    sync, calls = os.fsync, 0

    def full(descriptor: int) -> None:
        nonlocal calls
        if Path(os.readlink(f"/proc/self/fd/{descriptor}")).name.startswith("rank-00000-of"):
            calls += 1
            if calls in (2, 3):  # the first is the rehearsal
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    os.fsync = full  # type: ignore[assignment]
    return train_rank(recipe, [f"checkpoint.on_failure={on_failure}"], run_dir, None, False)
