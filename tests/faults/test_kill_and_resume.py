"""Runs that are killed at any moment, as often as that may be, end as if nothing had happened."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
from runs import assert_same_run, last, rows, train, train_rank, write_recipe
from worlds import running_world

from distrain.checkpoint import list_checkpoints, verify
from distrain.rundir import RunDir

RECIPE = """
name: killed
task: classification
data: {name: digits, split: [0.7, 0.15, 0.15]}
model: {name: mlp, hidden: [48], dropout: 0.2, norm: batch}
optim: {name: adamw, lr: 3.0e-3, clip_norm: 1.0}
schedule: {name: cosine, warmup: 10 steps}
batch: {global: 16, micro: 4}
train: {steps: 600, ema: 0.99}
eval: {every: 50 steps, metrics: [accuracy]}
checkpoint: {every: 4 steps, keep: 3}
log: {every: 1 steps}
"""


@pytest.mark.slow
@pytest.mark.parametrize("which", ["all ranks", "one rank"])
@pytest.mark.fault(11)
def test_a_run_killed_at_random_moments_ends_as_an_uninterrupted_one(tmp_path: Path, which: str) -> None:
    recipe = write_recipe(tmp_path, RECIPE)
    whole, run = tmp_path / "whole", tmp_path / "run"
    train(2, recipe, whole)
    chance = random.Random(2)
    reached = []
    for trial in range(10):
        before = sum(1 for _ in RunDir(run).rows())
        with running_world(2, train_rank, str(recipe), [], str(run), None, False) as world:
            # once it trains, at any moment of a step or of a save; now and then while it still starts
            until = time.monotonic() + 30
            while trial % 5 and sum(1 for _ in RunDir(run).rows()) == before and time.monotonic() < until:
                time.sleep(0.005)
            time.sleep(chance.uniform(0, 0.3 if trial % 5 else 0.8))
            assert RunDir(run).finished is None, "the run is too short for so many kills"
            if which == "all ranks":
                world.kill()
            else:
                world.kill(trial % 2)
            codes = world.wait(30)
        assert codes.count(-9) == (2 if which == "all ranks" else 1), "the rank that is left ends by itself"
        folder = run / "checkpoints"
        found = list_checkpoints(folder) if folder.exists() else []
        assert [problem for info in found for problem in verify(info.path)] == []
        reached.append(found[0].step if found else 0)
    train(2, recipe, run)
    assert reached == sorted(reached)
    assert reached[-1] > 20, "the kills came while it trained"
    assert last(run).name == "step-00000600"
    assert_same_run(whole, run)
    assert len({(row["event"], row["step"]) for row in rows(run)}) == len(rows(run))
    assert [entry.name for entry in (run / "checkpoints").iterdir() if entry.name.startswith(".")] == []
