"""What a step consumes and computes, in worlds of real processes: the same for any of them."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import TINY, assert_close, assert_same_run, checkpoint, last, losses, rows, state, train, write_recipe
from torch.optim.optimizer import register_optimizer_step_pre_hook
from worlds import in_world

from distrain.checkpoint import difference
from distrain.config import Horizon, Recipe
from distrain.config.yaml import load_recipe
from distrain.data import build_data
from distrain.datasets.order import SampleOrder
from distrain.launchers import open_run, work
from distrain.optim import lr_at
from distrain.parallel import open_world
from distrain.run.folder import Launch, RunDir
from distrain.training.checks import length_warnings
from distrain.training.run_loop import Session

# --------------------------------------------------------------------------------------------------------------------
# The samples of a step


def ids_by_step(recipe: str, variants: list[list[str]], folder: str, starts: list[int]) -> list[list[list[list[int]]]]:
    """Return for each variant and start what this rank's loader gives in each step."""
    world = open_world("fp64")
    found = []
    for number, overrides in enumerate(variants):
        loaded = load_recipe(recipe, overrides)
        run = RunDir(f"{folder}/{number}")
        world.run_on_rank0(
            lambda run=run, loaded=loaded: open_run(run, loaded, Launch.describe(world.world_size, "ddp"))
        )
        with Session.open(run, loaded.recipe, world) as session:
            for start in starts:
                session.t.step = start
                steps = [[batch["ids"].tolist() for batch in micro_batches] for micro_batches in session.batches()]
                assert all(len(micro_batches) == session.setup.feed.accumulation for micro_batches in steps)
                found.append([list(chain.from_iterable(micro_batches)) for micro_batches in steps])
    world.close()
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_a_step_consumes_the_same_samples_in_any_world(tmp_path: Path, world_size: int) -> None:
    length, size, steps, starts = 97, 36, 7, [0, 1, 3, 6]
    recipe = write_recipe(
        tmp_path,
        f"""
name: order
task: classification
data: {{name: "own_parts:Points", samples: {length}}}
model: {{name: mlp, hidden: [4]}}
batch: {{global: {size}}}
train: {{steps: {steps}, precision: fp64}}
eval: {{every: null}}
checkpoint: {{async: false}}
""",
    )
    variants = [
        [f"batch.micro={size // world_size // accumulation}", f"data.workers={workers}"]
        for accumulation in (1, 3)
        for workers in (0, 2)
    ]
    ranks = in_world(world_size, ids_by_step, str(recipe), variants, str(tmp_path), starts)
    order = SampleOrder(length, seed=0)
    for index, start in enumerate(starts * len(variants)):
        merged = [sorted(chain.from_iterable(ids)) for ids in zip(*(rank[index] for rank in ranks), strict=True)]
        wanted = [sorted(order.at(step * size, (step + 1) * size)[1].tolist()) for step in range(start, steps)]
        assert merged == wanted


# --------------------------------------------------------------------------------------------------------------------
# The weights


WEIGHTED = ["loss={name: cross_entropy, weight: [1, 2, 0.5, 1, 1, 3, 1, 0.25, 1, 1]}"]
MICRO = {1: "batch.micro=12", 2: "batch.micro=2", 3: "batch.micro=2"}


@pytest.mark.parametrize("options", [WEIGHTED, ["optim.name=sgd", "optim.momentum=0.9"]], ids=["weighted", "sgd"])
def test_final_weights_do_not_depend_on_the_world(tmp_path: Path, options: list[str]) -> None:
    recipe = write_recipe(tmp_path)
    for world_size, micro in MICRO.items():
        train(world_size, recipe, tmp_path / str(world_size), micro, *options)
    for world_size in (2, 3):
        assert_close(tmp_path / "1", tmp_path / str(world_size), 1e-10)
        np.testing.assert_allclose(losses(tmp_path / str(world_size)), losses(tmp_path / "1"), rtol=0, atol=1e-10)
    roles = {name.partition("/")[0] for name in state(last(tmp_path / "1"))}
    assert roles == {"model", "optimizer", "ema"}
    norms = [row["grad_norm"] for row in rows(tmp_path / "2") if row["event"] == "train"]
    assert max(norms) > 0.5, "clipping took part"


def test_a_layer_that_is_not_used_changes_nothing(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, TINY.replace("{name: mlp, hidden: [16]}", "own_parts:Partly"))
    for world_size, micro in MICRO.items():
        train(world_size, recipe, tmp_path / str(world_size), micro)
    for world_size in (2, 3):
        assert_close(tmp_path / "1", tmp_path / str(world_size), 1e-10)
        np.testing.assert_allclose(losses(tmp_path / str(world_size)), losses(tmp_path / "1"), rtol=0, atol=1e-10)


def test_a_model_that_draws_from_python_and_numpy_resumes_to_the_same_bits(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, TINY.replace("{name: mlp, hidden: [16]}", "own_parts:Skipper"))
    train(1, recipe, tmp_path / "whole")
    train(1, recipe, tmp_path / "stopped", stop_after=5)
    train(1, recipe, tmp_path / "stopped")
    assert difference(last(tmp_path / "whole"), last(tmp_path / "stopped")).identical


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.more), 3])
def test_a_stopped_run_resumes_to_the_same_bits(tmp_path: Path, world_size: int) -> None:
    recipe = write_recipe(tmp_path)
    # random numbers, buffers, and a model of several DDP buckets' worth of order
    options = ["model.hidden=[24, 16]", "model.dropout=0.3", "model.norm=batch", "train.precision=fp32"]
    options.append(MICRO[world_size])
    whole = tmp_path / "whole"
    train(world_size, recipe, whole, *options)
    again = tmp_path / "again"
    train(world_size, recipe, again, *options)
    assert_same_run(whole, again)
    for stop, reached in ((1, 2), (4, 4), (9, 10)):
        run = tmp_path / f"stopped-{stop}"
        train(world_size, recipe, run, *options, stop_after=stop)
        found = RunDir(run)
        assert found.finished is None
        assert (run / "PREEMPTED").exists()
        assert last(run) == checkpoint(run, reached), "agreed with the next step, or in the evaluation before it"
        train(world_size, recipe, run, *options)
        assert found.finished is not None
        assert not (run / "PREEMPTED").exists()
        assert difference(last(whole), last(run)).identical
        # a checkpoint more is all that the stop left behind, where none was due
        extra = [row for row in rows(run) if row not in rows(whole)]
        assert [(row["event"], row["step"]) for row in extra] == [("checkpoint", reached)] * (reached % 4 > 0)


@pytest.mark.slow
@pytest.mark.fault(17)
def test_a_run_resumes_on_another_number_of_processes(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    train(1, recipe, tmp_path / "whole")
    run = tmp_path / "run"
    train(2, recipe, run, stop_after=3)
    said = train(1, recipe, run, stop_after=7)[0].out
    assert "step-00000004, written by 2 x ddp; resumes with 1 x single" in said
    said = train(3, recipe, run)[0].out
    assert "step-00000008, written by 1 x single; resumes with 3 x ddp" in said
    np.testing.assert_allclose(losses(run), losses(tmp_path / "whole"), rtol=0, atol=1e-6)
    assert_close(run, tmp_path / "whole", 1e-6)


# --------------------------------------------------------------------------------------------------------------------
# The learning rate and the gradient


def watched(recipe: str, run_dir: str, overrides: list[str]) -> list[tuple[float, list[np.ndarray]]]:
    """Train, and return at each optimizer step its learning rate and gradients."""
    seen: list[tuple[float, list[np.ndarray]]] = []

    def note(optimizer: Any, args: Any, kwargs: Any) -> None:
        (rate,) = {group["lr"] for group in optimizer.param_groups}
        seen.append((rate, [p.grad.numpy().copy() for group in optimizer.param_groups for p in group["params"]]))

    register_optimizer_step_pre_hook(note)
    assert work(recipe, overrides, run_dir=run_dir) == 0
    return seen


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_learning_rate_is_that_of_the_step(tmp_path: Path, schedule: str) -> None:
    recipe = write_recipe(tmp_path)
    overrides = [f"schedule.name={schedule}", "optim.lr=0.01"]
    horizon = Horizon(12, 1258, None, total_steps=12)
    wanted = [0.01 * lr_at(load_recipe(recipe, overrides).recipe.schedule, step, horizon) for step in range(12)]
    assert len(set(wanted)) > 8
    for world_size, micro in ((1, 12), (1, 4), (2, 2)):
        folder = tmp_path / f"{world_size}-{micro}"
        for rank in in_world(world_size, watched, str(recipe), str(folder), [*overrides, f"batch.micro={micro}"]):
            assert [rate for rate, _ in rank] == wanted
        assert [row["lr"] for row in rows(folder) if row["event"] == "train"] == wanted


TAGS = """
name: tags
task: language_modeling
data: {name: "own_parts:Tagged"}
model: {name: "own_parts:Tagger"}
loss: {name: cross_entropy, weight: [1, 0.25, 3, 1.5, 2, 1, 0.5, 0.75, 1, 4, 1]}
optim: {name: sgd, lr: 0.5}
batch: {global: 18}
train: {steps: 4, precision: fp64}
eval: {every: null, metrics: []}
checkpoint: {every: null, async: false}
log: {every: 1 steps}
"""


def test_the_loss_is_one_mean_over_all_tokens_of_a_step(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, TAGS)
    (whole,) = in_world(1, watched, str(recipe), str(tmp_path / "1"), [])
    cut = in_world(2, watched, str(recipe), str(tmp_path / "2"), ["batch.micro=3"])
    for step in range(4):
        for rank in cut:
            for one, other in zip(whole[step][1], rank[step][1], strict=True):
                np.testing.assert_allclose(other, one, rtol=0, atol=1e-14)
    np.testing.assert_allclose(losses(tmp_path / "2"), losses(tmp_path / "1"), rtol=1e-13)


def test_the_loss_of_the_first_step_is_torchs_own(tmp_path: Path) -> None:
    from own_parts import Tagged, Tagger

    recipe = write_recipe(tmp_path, TAGS)
    in_world(2, watched, str(recipe), str(tmp_path / "run"), ["batch.micro=3", "optim.lr=1e-12"])
    weights = state(last(tmp_path / "run"))
    model = Tagger().double()
    for name, parameter in model.named_parameters():
        parameter.data = torch.from_numpy(weights[f"model/{name}"]).reshape(parameter.shape)
    data = Tagged()
    numbers = build_data(load_recipe(recipe).recipe).splits["train"].indices
    items = [data[int(numbers[id])] for id in SampleOrder(len(numbers), 0).at(0, 18)[1]]
    logits = torch.cat([model(tokens[None])[0] for tokens, _ in items])
    tags = torch.cat([tags for _, tags in items])
    weight = torch.tensor([1, 0.25, 3, 1.5, 2, 1, 0.5, 0.75, 1, 4, 1], dtype=torch.float64)
    wanted = torch.nn.functional.cross_entropy(logits, tags, weight=weight).item()
    assert losses(tmp_path / "run")[0] == pytest.approx(wanted, abs=1e-10)


# --------------------------------------------------------------------------------------------------------------------
# How long it is


@pytest.mark.parametrize(
    ("length", "batch", "samples", "said"),
    [
        (
            {"epochs": 0.5},
            128,
            20,
            "train is 0.5 epochs, 10 samples, and the one step .* 128 (6.4 epochs); .* at most 10",
        ),
        ({"epochs": 1}, 1000, 999, "train is 1 epoch, 999 samples, and the one step .* 1,000 (1.001 epochs); .* 999"),
        ({"tokens": 64}, 9, 20, "train is 64 tokens, 8 samples, and the one step .* 9 (0.45 epochs)"),
        ({"epochs": 0.5}, 10, 20, ""),
        ({"epochs": 1}, 20, 20, ""),
        ({"epochs": 3}, 50, 20, ""),  # more than one pass in a step, and no more than was asked for
        ({"steps": 1}, 128, 20, ""),
    ],
)
def test_one_step_that_is_more_than_the_whole_training_is_reported(
    length: dict[str, float], batch: int, samples: int, said: str
) -> None:
    made = Recipe.model_validate(
        {"name": "t", "task": "classification", "data": "d", "model": "m", "batch": {"global": batch}, "train": length}
    )
    found = length_warnings(made, Horizon(batch, samples, 8))
    assert len(found) == bool(said)
    for part in said.split(" .* "):
        assert not said or part in found[0]


COUPLED = """
name: coupled
task: classification
data: {name: "own_parts:Points", samples: 48, tests: 12}
model: {name: "odd_models:Normed"}
loss: "own_parts:LOSS"
batch: {global: 12, micro: 4}
train: {steps: 2}
eval: {metrics: []}
checkpoint: {every: 1 steps, async: false}
log: {every: 1 steps}
"""


@pytest.mark.parametrize("loss", ["pairs", "scaled_by_batch", "Running", "apart"])
def test_a_loss_that_takes_samples_together_is_reported_and_its_cut_kept(tmp_path, loss):
    recipe = write_recipe(tmp_path, COUPLED.replace("LOSS", loss))
    (ended,) = train(1, recipe, tmp_path / "run", stop_after=1)
    # the model's BatchNorm, which looks across the batch as well, has no part in it
    assert ("is no mean over samples" in ended.out + ended.err) == (loss != "apart")
    if loss != "pairs":
        return
    assert "sees 4 of the 12 samples of a step at once" in ended.out + ended.err
    (ended,) = train(1, recipe, tmp_path / "run", "batch.micro=6", update=False, status=1)
    (ended,) = train(1, recipe, tmp_path / "whole", "batch.micro=12")
    assert "is no mean over samples" not in ended.out + ended.err


def test_a_cut_that_changes_on_resume_is_refused_or_let_in(tmp_path):
    recipe = write_recipe(tmp_path, COUPLED.replace("LOSS", "pairs").replace("micro: 4", "micro: auto"))
    train(1, recipe, tmp_path / "run", stop_after=1)
    refused = train(2, recipe, tmp_path / "run", status=1)
    said = refused[0].err + refused[1].err
    assert "trained with micro-batches of 12 on 1 process; micro-batches of 6 on 2 processes make another" in said
    train(2, recipe, tmp_path / "run", update=True)
    updates = [row for row in rows(tmp_path / "run") if row["event"] == "update"]
    assert updates[0]["inputs"] == ["loss: micro-batches of 12 on 1 process -> micro-batches of 6 on 2 processes"]
