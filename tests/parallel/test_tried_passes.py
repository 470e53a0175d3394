"""Passes that a strategy makes before the first step, to see what they reach, leave nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import losses, write_recipe
from test_matrix import create, train_in_turn
from worlds import in_world

KEEPS = """
name: keeps
task: classification
data: {name: digits, split: [0.9, 0.1]}
model: {name: mlp, hidden: [8]}
optim: {name: sgd, lr: 0.1}
batch: {global: 30, micro: 10}
train: {steps: 3}
eval: {every: null}
checkpoint: {every: 3 steps, async: false}
log: {every: 1 steps}
"""
PLAIN = ("number", "tensor", "in_place", "listed", "named", "meter", "generator")
SHARED = ("of_file", "of_class", "of_function", "of_backward")
KEPT = {
    **{
        f"task {kind}": [f"task={{name: 'stateful_tasks:Kept', kind: {kind}}}"]
        for kind in (*PLAIN, *SHARED, "shared", "inner", "teacher")
    },
    **{f"loss {kind}": [f"loss={{name: 'stateful_tasks:KeptByLoss', kind: {kind}}}"] for kind in (*PLAIN, *SHARED)},
    **{
        f"model {kind}": [f"model={{name: 'stateful_tasks:KeptByModel', kind: {kind}}}", "loss=stateful_tasks:first"]
        for kind in (*PLAIN, *SHARED, "hooked")
    },
    **{
        f"coupled {kind}": [
            f"model={{name: 'stateful_tasks:KeptByModel', kind: {kind}}}",
            "task=stateful_tasks:Coupled",
        ]
        for kind in ("number", "tensor", "in_place", "of_class", "hooked")
    },
}


EVERY, EVEN, ODD = slice(None), slice(0, None, 2), slice(1, None, 2)


@pytest.mark.parametrize(
    ("strategy", "world_size", "precision", "taken"),
    [
        ("single", 1, "fp32", EVERY),
        ("ddp", 3, "fp32", EVEN),
        ("zero2", 1, "fp32", ODD),
        ("zero3", 1, "fp32", ODD),
        ("fsdp2", 1, "bf16", EVEN),
    ],
    ids=("single", "ddp", "zero2", "zero3", "fsdp2"),
)
def test_what_is_tried_leaves_nothing_in_a_task_a_loss_or_a_model(
    tmp_path: Path, strategy: str, world_size: int, precision: str, taken: slice, every_combination: bool
) -> None:
    recipe, runs = write_recipe(tmp_path, KEEPS), {}
    for kept in [*KEPT][EVERY if every_combination else taken]:
        overrides = KEPT[kept]
        runs[kept] = tmp_path / kept.replace(" ", "-")
        create(runs[kept], recipe, (*overrides, f"train.precision={precision}"), strategy, world_size)
    in_world(world_size, train_in_turn, strategy, [str(run) for run in runs.values()], timeout_s=300)
    accumulated = 30 // 10 // world_size
    for kept, run in runs.items():
        # a loss is the mean over the micro-batches of a step
        expected = [step * accumulated + (accumulated - 1) / 2 for step in range(3)]
        assert losses(run) == pytest.approx(expected, abs=1e-3), kept
