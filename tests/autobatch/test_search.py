"""`batch.micro: auto`: the largest that fits is found by trying, remembered, and found anew elsewhere."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from places import IMPORTABLE
from runs import Ended, captured, cli_rank, rows, train, write_recipe
from warm import warm_children
from worlds import WorldFailed, in_world

from distrain.autobatch.search import largest, needs_search, take_steps
from distrain.config import BatchSection
from distrain.config.yaml import load_recipe
from distrain.datasets.batch_sizes import accumulation_steps, batch_shape, micro_batch_sizes
from distrain.run.folder import RunDir
from distrain.run.micro_batch import CachedMicroBatch, CacheKey, cache_micro_batch, cached_micro_batch, copy_cache
from distrain.system import memory

RECIPE = """
name: hungry
task: classification
data: {name: digits, split: [0.8, 0.2]}
model: {name: "hungry_parts:Hungry", mib: 2048}
optim: {name: adamw, lr: 0.01}
batch: {global: 8}
train: {steps: 2, precision: fp32}
eval: {every: null, batch: 64}
checkpoint: {every: null}
log: {every: 1 steps}
"""
ROOM = 16 * memory.GIB
"""Of addresses, of which the largest part may be used: enough for four samples of 2 GiB, and not for eight."""


def start_in_little_room(recipe: str, run_dir: str, overrides: list[str], room: int, options: dict[str, Any]) -> Ended:
    """Do what `distrain train` does, with a limit on the address space of each process."""
    from distrain.launchers import start

    resource.setrlimit(resource.RLIMIT_AS, (room, resource.RLIM_INFINITY))
    os.environ["PYTHONPATH"] = IMPORTABLE
    with warm_children():
        return captured(lambda: start(recipe, overrides, run_dir=run_dir, **options).status)


def start(folder: Path, *overrides: str, room: int = ROOM, status: int = 0, **options: Any) -> Ended:
    recipe = write_recipe(folder, RECIPE)
    arguments = (str(recipe), str(folder / "run"), list(overrides), room, options)
    (ended,) = in_world(1, unlaunched, *arguments, timeout_s=300, launched=False)
    assert ended.status == status, ended.out + ended.err
    return ended


def test_processes_that_will_be_refused_try_nothing(tmp_path: Path) -> None:
    (ended,) = in_world(1, with_one_gpu, str(write_recipe(tmp_path, RECIPE)), str(tmp_path / "run"), launched=False)
    assert ended.status == 1
    assert "there are to be 2 processes on this machine, which has 1 GPU; nothing was written" in ended.err
    assert "trying" not in ended.out
    assert not (tmp_path / "run").exists()


def with_one_gpu(recipe: str, run: str) -> Ended:
    os.environ["CUDA_VISIBLE_DEVICES"] = "0"
    return cli_rank(["train", recipe, "--run-dir", run, "--processes", "2", "batch.micro=auto"])


def unlaunched(*arguments: Any) -> Ended:
    return start_in_little_room(*arguments)


def kept(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "run" / "micro_batch.json").read_text())


# --------------------------------------------------------------------------------------------------------------------
# By trying


@pytest.mark.slow
def test_the_largest_that_fits_is_found_remembered_and_found_anew_elsewhere(tmp_path: Path) -> None:
    ended = start(tmp_path)
    assert "batch.micro auto: 8 does not fit" in ended.out
    assert "batch.micro auto: 4 fits" in ended.out
    assert "8 = 1 x 4 x 2 accumulated (batch.micro auto: the largest that fits, by trying 3 sizes" in ended.out
    (found,) = kept(tmp_path)
    assert found["micro_batch_size"] == 4
    assert found["tried"] == [[8, False], [2, True], [4, True]]
    assert found["peak"] <= 0.9 * found["limit"] == 0.9 * ROOM
    assert [row["step"] for row in rows(tmp_path / "run") if row["event"] == "train"] == [1, 2]

    # what is known is gone by
    ended = start(tmp_path, "train.steps=4", update=True)
    assert "trying sizes" not in ended.out
    assert "8 = 1 x 4 x 2 accumulated" in ended.out

    # less memory than it was found in, in which it would not fit
    ended = start(tmp_path, "train.steps=6", update=True, room=10 * memory.GIB)
    assert "batch.micro auto: 2 fits" in ended.out
    assert [each["micro_batch_size"] for each in kept(tmp_path)] == [2]

    # another number of processes is another question
    ended = start(tmp_path, "train.steps=8", update=True, processes=2)
    assert "batch.micro auto: 4 fits" in ended.out
    assert "8 = 2 x 4 (batch.micro auto: global / processes, which fits, by trying 1 size" in ended.out
    assert sorted((each["key"]["processes"], each["micro_batch_size"]) for each in kept(tmp_path)) == [(1, 2), (2, 4)]
    assert RunDir(tmp_path / "run").finished is not None


@pytest.mark.slow
def test_where_not_even_one_sample_fits_it_reports_what_takes_less(tmp_path: Path) -> None:
    ended = start(tmp_path, "model.mib=16384", "batch.global=2", status=1)
    assert "not even a micro-batch of 1 fits" in ended.err
    assert "out of memory on" in ended.err
    assert "train.activation_checkpointing: true" in ended.err
    assert "Traceback" not in ended.err
    assert not (tmp_path / "run" / "micro_batch.json").exists()


@pytest.mark.slow
def test_the_run_itself_reports_errors_other_than_memory(tmp_path: Path) -> None:
    ended = start(
        tmp_path, "model={name: 'own_parts:Faulty', how: raise, at: 1, rank: 0, width: 64, classes: 10}", status=1
    )
    assert "batch.micro auto: not found by trying, and taken as global / processes" in ended.out
    assert "ArithmeticError: the model broke" in ended.err


# --------------------------------------------------------------------------------------------------------------------
# Without trying


@pytest.mark.parametrize(
    ("optim", "asked"),
    [
        ("{d: {params: 'd.*'}, g: {params: 'g.*', every: 50}}", "of the generator"),
        ("{name: 'adversarial_parts:Greedy', freeze: [{params: 'g.*', until: 50 steps}]}", "of all gradients"),
    ],
)
def test_a_try_trains_what_is_trained_later(tmp_path: Path, optim: str, asked: str) -> None:
    task = "Demanding" if "every" in optim else "Sole"
    write_recipe(
        tmp_path,
        f"{{name: later, task: 'adversarial_parts:{task}', data: 'adversarial_parts:NoisyPoints', "
        f"model: {{name: 'adversarial_parts:Pair'}}, optim: {optim}, batch: {{global: 12, micro: 4}}, "
        "train: {steps: 60}, eval: {every: null}, checkpoint: {every: null}}",
    )
    (tmp_path / "how.json").write_text(json.dumps({"strategy": "single", "offload": "none", "replicate": 1}))
    with pytest.raises(WorldFailed, match=asked):
        in_world(1, take_steps, tmp_path)


def test_nothing_is_tried_where_nothing_limits_the_memory(tmp_path: Path) -> None:
    if any(limit.set_by_someone for limit in memory.limits()):
        pytest.skip("the memory is limited here")
    recipe = load_recipe(write_recipe(tmp_path, RECIPE)).recipe
    assert not needs_search(recipe, gpus=0)
    assert needs_search(recipe, gpus=1)
    ended = train(1, write_recipe(tmp_path, RECIPE), tmp_path / "run", "model.mib=0")
    assert "8 = 1 x 8 (batch.micro auto: global / processes; nothing limits the memory here" in ended[0].out
    assert not (tmp_path / "run" / "micro_batch.json").exists()


def test_another_launcher_and_another_run_go_by_what_is_known(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, RECIPE)
    recipe = load_recipe(path, ["model.mib=0"]).recipe
    run, other_run = tmp_path / "run", tmp_path / "other"
    run.mkdir()
    known = CachedMicroBatch(CacheKey.of(recipe, 2, "ddp", "none"), 2, "cpu", 2**34, 2**33, ((4, False), (2, True)))
    cache_micro_batch(RunDir(run), known)
    assert cached_micro_batch(RunDir(run), known.key) == known
    # a run folder of the first version
    text = RunDir(run).micro_batch_path.read_text()
    RunDir(run).micro_batch_path.write_text(text.replace('"key":', '"where":'))
    assert cached_micro_batch(RunDir(run), known.key) == known
    assert cached_micro_batch(RunDir(run), CacheKey.of(recipe, 4, "ddp", "none")) is None
    for change in ("optim.lr=0.1", "train.precision=bf16", "model.mib=1", "batch.global=16"):
        other = load_recipe(path, ["model.mib=0", change]).recipe
        assert cached_micro_batch(RunDir(run), CacheKey.of(other, 2, "ddp", "none")) is None, change
    for change in ("seed=3", "log.every=2 steps", "train.steps=9", "schedule=cosine"):
        other = load_recipe(path, ["model.mib=0", change]).recipe
        assert cached_micro_batch(RunDir(run), CacheKey.of(other, 2, "ddp", "none")) == known, change
    # before there is a run: as a proof does with its trial runs
    copy_cache(RunDir(run), RunDir(other_run))
    copy_cache(RunDir(run), RunDir(other_run))
    ended = train(2, path, other_run, "model.mib=0")
    assert "8 = 2 x 2 x 2 accumulated (batch.micro auto: the largest that fits, by trying 2 sizes" in ended[0].out
    effect = RunDir(other_run).effect()
    assert effect is not None
    assert effect["accumulation"] == 2


def test_the_largest_is_found_in_few_tries() -> None:
    tried: list[int] = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= 100

    sizes = [2**power for power in range(12)]
    assert largest(sizes, fits) == 64
    assert len(tried) <= 5
    for guess, tries in ((64, 2), (32, 4), (128, 2), (5, 5)):
        tried.clear()
        assert largest(sizes, fits, guess) == 64
        assert len(tried) <= tries
        assert tried[0] == (guess if guess in sizes else 2048)
    assert largest([1], lambda size: True) == 1
    assert largest([3, 5], lambda size: False) is None


@given(st.lists(st.integers(1, 10**6), min_size=1, unique=True), st.integers(0, 10**6), st.integers(0, 10**6))
def test_the_largest_is_the_largest(sizes: list[int], limit: int, place: int) -> None:
    sizes.sort()
    expected = max((size for size in sizes if size <= limit), default=None)
    assert largest(sizes, lambda size: size <= limit) == expected
    assert largest(sizes, lambda size: size <= limit, sizes[place % len(sizes)]) == expected


@given(st.integers(1, 4000), st.integers(1, 16))
def test_sizes_are_those_that_accumulate_to_the_batch(total: int, world_size: int) -> None:
    sizes = micro_batch_sizes(total, world_size)
    wanted_sizes = [size for size in range(1, total + 1) if total % (size * world_size) == 0]
    assert sizes == wanted_sizes
    for size in sizes:
        section = BatchSection(global_batch_size=total, micro_batch_size=size)
        assert batch_shape(section, world_size) == (size, accumulation_steps(total, size, world_size))
