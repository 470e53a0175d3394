"""Any strategy, at any world size, resumes what any other saved, and goes on as an uninterrupted run would."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from runs import captured, checkpoint, last, losses, state, write_recipe
from worlds import in_world

from distrain.config.yaml import load_recipe
from distrain.launchers import open_run
from distrain.run.folder import Launch, RunDir

if TYPE_CHECKING:
    from distrain.parallel import StrategySpec

WAYS = [
    ("single", 1),
    ("ddp", 2),
    ("zero1", 2),
    ("zero2", 2),
    ("zero3", 2),
    ("fsdp2", 2),
    ("zero3", 3),
    ("fsdp2", 3),
    ("hsdp", 4),
]
"""hsdp: fsdp2 in two replicas."""
NAMES = [f"{strategy}x{world_size}" for strategy, world_size in WAYS]

RECIPE = """
name: matrix
task: language_modeling
data: {name: python_source, seq_len: 8, max_bytes: 20_000, split: [0.9, 0.1]}
model: {name: gpt, n_layer: 2, n_head: 2, d_model: 12}
optim: {name: adamw, lr: 1.0e-2, weight_decay: 0.05, clip_norm: 0.5}
schedule: {name: cosine, warmup: 2 steps}
batch: {global: 12, micro: 2}
train: {steps: 6, precision: fp32, ema: 0.9}
eval: {every: null, batch: 64}
checkpoint: {every: 3 steps, keep: 100, async: false}
log: {every: 1 steps}
"""
TOLERANCE = 1e-5
"""Of a loss, relative; of a tensor, relative to its largest value or to 0.01, whichever is more."""

SETTINGS = {
    "adamw": ("batch.micro=2",),
    "sgd": ("batch.micro=auto", "optim.name=sgd", "optim.momentum=0.9", "optim.lr=0.3"),
}
"""With accumulation and without: two samples at a time are 6, 3 and 2 micro-batches on 1, 2 and 3 processes."""
ONE_AT_A_TIME = ("batch.micro=1",)
"""Where four processes accumulate: three micro-batches each."""


def spec(strategy: str) -> StrategySpec:
    """Return what the name of a way stands for."""
    from distrain.parallel import StrategySpec

    return StrategySpec("fsdp2", replicate=2) if strategy == "hsdp" else StrategySpec(strategy)


def train_in_turn(strategy: str, run_dirs: list[str]) -> None:
    """Train or go on with each of the runs in this world, one after the other."""
    from distrain.config.yaml import load_recipe
    from distrain.loop import train
    from distrain.parallel import open_world

    world = open_world(load_recipe(RunDir(run_dirs[0]).recipe_path).recipe.train.precision, spec(strategy))

    def go() -> int:
        for run_dir in run_dirs:
            train(RunDir(run_dir), world)
        return 0

    try:
        captured(go)
    finally:
        world.close()


def create(run_dir: Path, recipe: Path, overrides: tuple[str, ...], strategy: str, world_size: int) -> None:
    """Make the folder of a run that has not begun."""
    loaded = load_recipe(recipe, list(overrides))
    asked = spec(strategy)
    open_run(RunDir(run_dir), loaded, Launch.describe(world_size, asked.strategy, replicate=asked.replicate))


# adamw keeps most; test_strategies resumes with sgd as well
@pytest.fixture(scope="module", params=["adamw", pytest.param("sgd", marks=pytest.mark.more)])
def optimizer(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def straight(optimizer: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return an uninterrupted run of each way, by its name."""
    folder = tmp_path_factory.mktemp(f"matrix-{optimizer}")
    recipe = write_recipe(folder, RECIPE)
    runs = {}
    for name, (strategy, world_size) in zip(NAMES, WAYS, strict=True):
        runs[name] = folder / name
        settings = SETTINGS[optimizer]
        if strategy == "hsdp" and optimizer == "adamw":
            settings = ONE_AT_A_TIME
        create(runs[name], recipe, settings, strategy, world_size)
        in_world(world_size, train_in_turn, strategy, [str(runs[name])])
    return runs


def stopped_copy(run_dir: Path, out: Path, step: int, micro: int | None = None) -> Path:
    """Return a copy of a finished run as it was after `step`, to go on with micro-batches of another size."""
    run = RunDir(run_dir)
    shutil.copytree(checkpoint(run_dir, step), checkpoint(out, step))
    for path in (run.recipe_path, run.launch_path):
        shutil.copy(path, out / path.name)
    if micro is not None:
        recipe = out / run.recipe_path.name
        recipe.write_text(re.sub(r"(?m)^  micro: .*$", f"  micro: {micro}", recipe.read_text()))
    rows = [line for line in run.metrics_path.read_text().splitlines() if json.loads(line)["step"] <= step]
    (out / run.metrics_path.name).write_text("".join(f"{line}\n" for line in rows))
    return out


def assert_agrees(found: Path, expected: Path) -> None:
    """The losses and every tensor of the last checkpoint of two runs agree to the tolerance."""
    assert losses(found) == pytest.approx(losses(expected), rel=TOLERANCE)
    ours, theirs = state(last(found)), state(last(expected))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        gap = np.abs(value - theirs[name]).max(initial=0.0)
        assert gap <= TOLERANCE * max(np.abs(theirs[name]).max(initial=0.0), 1.0), f"{name}: {gap}"


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_strategy_trains_as_ddp_does(straight: dict[str, Path], name: str) -> None:
    assert_agrees(straight[name], straight["ddpx2"])


AWAY = (1, 3, 6, 8)
"""How far behind each way in the list those are from whose checkpoints it resumes."""


def sources(name: str, every_combination: bool) -> list[str]:
    """Return from whose checkpoints a way resumes: all, or a set such that each pair of classes is among the pairs."""
    if every_combination:
        return NAMES
    return [NAMES[(NAMES.index(name) + away) % len(NAMES)] for away in AWAY]


def test_each_class_of_strategy_resumes_each_and_each_way_is_on_both_sides() -> None:
    classes = {"zero1": "zero1 and zero2", "zero2": "zero1 and zero2", "hsdp": "fsdp2"}
    pairs = [(name, source) for name in NAMES for source in sources(name, every_combination=False)]
    sides = [tuple(classes.get(way.split("x")[0], way.split("x")[0]) for way in pair) for pair in pairs]
    assert len(set(pairs)) == len(pairs) == 4 * len(NAMES)
    assert all(name != source for name, source in pairs)
    assert all([source for _, source in pairs].count(name) == 4 for name in NAMES)
    kinds = {side for side, _ in sides}
    assert len(kinds) == 5
    assert set(sides) >= {(one, other) for one in kinds for other in kinds if one != other}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "way"), zip(NAMES, WAYS, strict=True), ids=NAMES)
@pytest.mark.fault(17)
def test_every_strategy_resumes_from_every_other(
    straight: dict[str, Path],
    name: str,
    way: tuple[str, int],
    every_combination: bool,
    tmp_path: Path,
) -> None:
    strategy, world_size = way
    micro = 1 if strategy == "hsdp" else None
    resumed = {
        source: stopped_copy(straight[source], tmp_path / source, step=3, micro=micro)
        for source in sources(name, every_combination)
    }
    in_world(world_size, train_in_turn, strategy, [str(run) for run in resumed.values()])
    for source, run in resumed.items():
        assert losses(run)[:3] == losses(straight[source])[:3], "they were not trained again"
        assert_agrees(run, straight["ddpx2"])
