"""A rank that is killed in any phase costs no more than the steps since the last checkpoint."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import TINY, Ended, assert_same_run, last, rows, train, train_rank, write_recipe
from torch import nn
from worlds import running_world

from distrain import Callback
from distrain.checkpoint import list_checkpoints, verify
from distrain.run.folder import RunDir

RECIPE = TINY.replace("data: {name: digits, split: [0.7, 0.15, 0.15]}", 'data: {name: "own_parts:Points", samples: 48}')
"""Twelve steps; evaluated and saved every four."""


def on_call(count: int, owner: Any, name: str, action: Callable[[], None]) -> None:
    """Let call number `count` of a function, from 1, begin with `action`."""
    original, calls = getattr(owner, name), 0

    def counted(*args: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            action()
        return original(*args, **named)

    setattr(owner, name, counted)


class InSeventhStep(Callback):
    """Does something in the forward or backward pass of the seventh step, or in the second evaluation; on one rank."""

    def __init__(self, rank: int, phase: str, action: Callable[[], None]) -> None:
        self.rank, self.phase, self.action, self.evaluations = rank, phase, action, 0

    def on_start(self, run: Any) -> None:
        self.run = run
        run.model.register_forward_hook(self.forward)

    def due(self, phase: str) -> bool:
        return phase == self.phase and self.run.rank == self.rank

    def forward(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        if module.training and self.run.step == 6:
            if self.due("forward"):
                self.action()
            if self.due("backward"):
                output.register_hook(lambda gradient: self.action())

    def on_evaluate(self, split: str, values: Any) -> None:
        self.evaluations += 1
        if self.evaluations == 2 and self.due("evaluate"):
            self.action()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_in(phase: str, recipe: str, run_dir: str) -> Ended:
    """Train; in about the seventh step, or at the second save or evaluation, rank 1 is killed in `phase`."""
    import own_parts

    if os.environ["RANK"] == "1" and phase == "data":
        on_call(125, own_parts.Points, "__getitem__", die)  # 6 a step, 49 in an evaluation, 30 before
    if os.environ["RANK"] == "1" and phase == "save":
        on_call(3, os, "fsync", die)  # of what it writes; the rehearsal writes one file as well
    return train_rank(recipe, [], run_dir, None, False, callbacks=[InSeventhStep(1, phase, die)])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    train(2, write_recipe(folder, RECIPE), folder / "run")
    return folder / "run"


@pytest.mark.fault(6)
@pytest.mark.parametrize("phase", ["data", "forward", "backward", "save", "evaluate"])
def test_a_rank_that_is_killed_costs_the_steps_since_the_last_checkpoint(
    tmp_path: Path, whole: Path, phase: str, record_property: Callable[[str, object], None]
) -> None:
    recipe = write_recipe(tmp_path, RECIPE)
    run = tmp_path / "run"
    with running_world(2, killed_in, phase, str(recipe), str(run)) as world:
        codes = world.wait(60)
    assert codes[1] == -signal.SIGKILL
    assert codes[0] != -signal.SIGKILL, "the other rank ends by itself"
    found = list_checkpoints(run / "checkpoints")
    assert [verify(info.path) for info in found] == [[]]
    assert found[0].step == 4
    reached = max(row["step"] for row in rows(run))
    assert reached >= 6 or phase == "data"
    record_property("steps_lost", reached - found[0].step)
    train(2, recipe, run)
    assert_same_run(whole, run)


def hanging(recipe: str, run_dir: str) -> Ended:
    """Train; the seventh step never ends."""
    sleep = InSeventhStep(int(os.environ["RANK"]), "forward", lambda: time.sleep(600))
    return train_rank(recipe, [], run_dir, None, False, callbacks=[sleep])


@pytest.mark.fault(3)
def test_a_grace_time_that_is_too_short_costs_the_steps_since_the_last_checkpoint(
    tmp_path: Path, whole: Path, record_property: Callable[[str, object], None]
) -> None:
    recipe = write_recipe(tmp_path, RECIPE)
    run = tmp_path / "run"
    with running_world(2, hanging, str(recipe), str(run)) as world:
        until = time.monotonic() + 60
        while sum(row["event"] == "train" for row in RunDir(run).rows()) < 6 and time.monotonic() < until:
            time.sleep(0.01)
        world.signal(signal.SIGTERM)
        time.sleep(0.5)
        world.kill()
        world.wait(30)
    assert RunDir(run).preempted is None, "nothing was saved for it"
    assert last(run).name == "step-00000004"
    record_property("steps_lost", 2)
    said = train(2, recipe, run)[0].out
    assert "resumes  step-00000004" in said
    assert_same_run(whole, run)


def signalled_in_a_save(recipe: str, run_dir: str) -> Ended:
    """Train; each rank is told twice to stop while it writes the first checkpoint."""
    left = [signal.SIGUSR1, signal.SIGTERM]

    def signal_once(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and left and ".tmp-step-00000004" in str(arguments[0]):
            for number in [left.pop(0), left.pop(0)]:
                os.kill(os.getpid(), number)

    sys.addaudithook(signal_once)
    return train_rank(recipe, [], run_dir, None, False)


@pytest.mark.fault(5)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_signals_during_a_save_leave_it_whole_and_stop_with_the_next_step(
    tmp_path: Path, whole: Path, asynchronous: bool
) -> None:
    recipe = write_recipe(tmp_path, RECIPE.replace("async: false", f"async: {str(asynchronous).lower()}"))
    run = tmp_path / "run"
    with running_world(2, signalled_in_a_save, str(recipe), str(run)) as world:
        assert [ended.status for ended in world.results(60)] == [0, 0]
    marker = RunDir(run).preempted
    assert marker is not None
    found = list_checkpoints(run / "checkpoints")
    assert [verify(info.path) for info in found] == [[]] * len(found)
    assert {info.step for info in found} >= {4, marker["step"]}
    assert marker["step"] <= 6
    train(2, recipe, run)
    assert [row for row in rows(run) if row["event"] != "checkpoint"] == [
        row for row in rows(whole) if row["event"] != "checkpoint"
    ]
