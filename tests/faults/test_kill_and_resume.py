"""Runs that are killed at any moment, as often as that may be, end as if nothing had happened."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import assert_same_run, last, rows, train, train_rank, write_recipe
from worlds import running_world

from distrain.checkpoint import list_checkpoints, verify
from distrain.run.folder import RunDir

KILLS = int(os.environ.get("DISTRAIN_KILLS", "8"))
"""How often a run is killed, and half as often one that is sharded, whose steps take several times as long;
DISTRAIN_KILLS=100 makes some more hundreds of them."""

RECIPE = """
name: killed
task: classification
data: {name: digits, split: [0.7, 0.15, 0.15]}
model: {name: mlp, hidden: [48], dropout: 0.2, norm: batch}
optim: {name: adamw, lr: 3.0e-3, clip_norm: 1.0}
schedule: {name: cosine, warmup: 10 steps}
batch: {global: 16, micro: 4}
train: {steps: STEPS, ema: 0.99}
eval: {every: 50 steps, batch: 48, metrics: [accuracy]}
checkpoint: {every: 4 steps, keep: 3}
log: {every: 1 steps}
"""


@pytest.mark.slow
@pytest.mark.timeout(600 + 20 * KILLS)
@pytest.mark.parametrize(
    ("strategy", "which"),
    [
        pytest.param("ddp", "all ranks", marks=pytest.mark.more),
        ("ddp", "one rank"),
        pytest.param(
            "zero3", "all ranks", marks=pytest.mark.more
        ),  # test_anomalies kills it around a step that is skipped
        ("fsdp2", "all ranks"),
    ],
)
@pytest.mark.fault(11)
def test_a_run_killed_at_random_moments_ends_as_an_uninterrupted_one(
    tmp_path: Path, strategy: str, which: str, record_property: Callable[[str, object], None]
) -> None:
    kills = KILLS if strategy == "ddp" else KILLS // 2
    steps = 100 + 30 * kills if strategy == "ddp" else 60 + 20 * kills
    recipe = write_recipe(tmp_path, RECIPE.replace("STEPS", str(steps)))
    whole, run = tmp_path / "whole", tmp_path / "run"
    train(2, recipe, whole, strategy=strategy, timeout_s=120 + 10 * kills)
    chance = random.Random(2)
    reached, lost = [], 0
    for trial in range(kills):
        before = sum(1 for _ in RunDir(run).rows())
        with running_world(2, train_rank, str(recipe), [], str(run), None, False, strategy) as world:
            # now and then while it still starts, otherwise some steps later, at any moment of a step or of a save
            # (a rank that waits for one that never came is ended by a launcher, and here is none)
            starts = trial % 5 == 0 and which == "all ranks"
            wanted = 0 if starts else before + chance.randrange(1, 25)
            until = time.monotonic() + 120
            while sum(1 for _ in RunDir(run).rows()) < wanted and time.monotonic() < until:
                time.sleep(0.005)
            time.sleep(chance.uniform(0, 0.8 if starts else 0.05))
            assert RunDir(run).finished is None, "the run is too short for so many kills"
            if which == "all ranks":
                world.kill()
            else:
                world.kill(trial % 2)
            codes = world.wait(30)
        assert codes.count(-9) == (2 if which == "all ranks" else 1), (
            f"kill {trial}: the rank that is left ends by itself"
        )
        folder = run / "checkpoints"
        found = list_checkpoints(folder) if folder.exists() else []
        assert [problem for info in found for problem in verify(info.path)] == []
        reached.append(found[0].step if found else 0)
        lost = max(lost, max((row["step"] for row in RunDir(run).rows()), default=0) - reached[-1])
    train(2, recipe, run, timeout_s=120 + 10 * kills)
    record_property("trials", kills)
    record_property("steps_lost", lost)
    assert reached == sorted(reached)
    assert reached[-1] > 0, "the kills came while it trained"
    assert last(run).name == f"step-{steps:08d}"
    assert_same_run(whole, run)
    assert len({(row["event"], row["step"]) for row in rows(run)}) == len(rows(run))
    assert [entry.name for entry in (run / "checkpoints").iterdir() if entry.name.startswith(".")] == []
