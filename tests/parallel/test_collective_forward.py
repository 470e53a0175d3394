"""Scoring a model of which each rank holds a part: all make the same passes, and none is left waiting for another."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluations import PAIRS, POINTS, bound_objective, evaluate_untrained, write_pairs
from runs import rows, train, write_recipe
from steps import backward_and_apply
from test_matrix import create, train_in_turn
from torch import nn
from worlds import in_world, running_world

from distrain.config import UserError
from distrain.config.yaml import load_recipe
from distrain.data import build_data
from distrain.metrics import build_metrics
from distrain.models import build_model
from distrain.parallel import open_world
from distrain.training.evaluation import evaluate

SOON_S = 60.0
"""Far below the 600 seconds that a collective waits; most of it is the start of the processes."""


def score_sharded(recipe: str, trouble: str = "", again: bool = False) -> Any:
    """Score the recipe's untrained model, sharded by FSDP2; returns the values, or what was raised in words."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    parsed = load_recipe(recipe).recipe
    world: Any = open_world("fp32")
    data = build_data(parsed)
    model = build_model(parsed, data.meta)
    objective = bound_objective(parsed, data.meta, model)
    # the small layers on their own, so that there is a collective in each
    mesh = init_device_mesh("cpu", (world.world_size,))
    tied = {id(each.weight) for each in model.modules() if isinstance(each, nn.Embedding)}
    for layer in [each for each in model.modules() if isinstance(each, nn.Linear) and id(each.weight) not in tied]:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)

    @contextmanager
    def whole() -> Iterator[None]:
        shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for module in shards:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        yield
        for module in shards:
            module.set_reshard_after_forward(True, recurse=False)
            module.reshard()

    world.forward_is_collective = True
    metrics = build_metrics(parsed, data.meta)
    source: Any = data.splits["test"]
    if trouble and world.rank == world.world_size - 1:
        source = in_trouble(trouble, source, model, metrics)
    elif trouble.startswith(("stream", "breaks")):
        source = Stream(source, parsed.data.args["tests"])
    began = time.monotonic()

    def scored() -> Any:
        return evaluate(
            model,
            objective,
            source,
            world=world,
            metrics=metrics,
            batch_size=parsed.eval.batch or 4,
            meta=data.meta,
            unsharded=whole,
        )

    try:
        values: Any = scored()
        if again:
            assert scored() == values
    except Exception as error:
        if trouble.startswith("forward"):
            raise
        values = f"{type(error).__name__}: {error}"
    assert time.monotonic() - began < SOON_S
    world.close()
    return values


class Stream(torch.utils.data.IterableDataset[Any]):
    """A source as a stream that ends early, or breaks."""

    def __init__(self, source: Any, length: int, breaks: bool = False):
        self.source, self.length, self.breaks = source, length, breaks

    def __iter__(self) -> Iterator[Any]:
        for number in range(self.length):
            batch = self.source.fetch(torch.tensor([number]).numpy())
            yield batch["inputs"], batch["targets"]
        if self.breaks:
            raise UserError(f"sample {self.length} cannot be read")

    def collate(self, samples: list[Any]) -> dict[str, torch.Tensor]:
        return {
            key: torch.cat(each) for key, each in zip(("inputs", "targets"), zip(*samples, strict=True), strict=True)
        }


def in_trouble(trouble: str, source: Any, model: nn.Module, metrics: Any) -> Any:
    """Have something fail, on this rank alone."""
    kind, _, at = trouble.partition(" ")
    if kind == "stream":
        return Stream(source, 21 - int(at))
    if kind == "breaks":
        return Stream(source, int(at), breaks=True)
    calls = 0

    def failing(method: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > int(at or 0):
                raise UserError(f"{kind} {calls - 1} failed")
            return method(*args, **kwargs)

        return call

    if kind == "sample":
        for name in ("fetch", "fetch_at"):
            if hasattr(source, name):
                setattr(source, name, failing(getattr(source, name)))
    elif kind == "metric":
        metrics.update = failing(metrics.update)
    elif kind == "sums":
        metrics.sums = failing(metrics.sums)
    elif kind == "forward":
        layer = [each for each in model.modules() if isinstance(each, nn.Linear)][-1]
        layer.register_forward_pre_hook(lambda *_: failing(print)())
    return source


@pytest.mark.parametrize("tests", [1, 5, 97])
def test_scores_are_those_of_one_process(tmp_path: Path, tests: int) -> None:
    recipe = str(write_recipe(tmp_path, POINTS.format(tests=tests)))
    (expected,) = in_world(1, evaluate_untrained, recipe)
    for world_size in (2, 3):
        for values in in_world(world_size, score_sharded, recipe, "", True):
            assert values["loss"] == pytest.approx(expected["loss"], rel=1e-6)
            assert values | {"loss": 0} == expected | {"loss": 0}


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ("sample 0", "UserError: sample 0 failed"),
        ("sample 3", "UserError: sample 3 failed"),
        ("metric 0", "UserError: metric 0 failed"),
        ("metric 12", "UserError: metric 12 failed"),  # in the last of 13 batches
        ("sums", "UserError: sums 0 failed"),
    ],
)
def test_what_one_rank_cannot_do_all_raise(tmp_path: Path, trouble: str, message: str) -> None:
    recipe = str(write_recipe(tmp_path, POINTS.format(tests=97)))
    assert in_world(2, score_sharded, recipe, trouble) == [message] * 2


def test_streams_end_on_all_ranks_or_are_refused(tmp_path: Path) -> None:
    recipe = str(write_recipe(tmp_path, POINTS.format(tests=21)))
    (expected,) = in_world(1, evaluate_untrained, recipe)
    for values in in_world(2, score_sharded, recipe, "stream 0"):
        assert values["samples"] == 21
        assert values["confusion_matrix"] == expected["confusion_matrix"]
    refused = "RuntimeError: the stream that is evaluated ended on one rank and not on another; it must give every"
    for said in in_world(2, score_sharded, recipe, "stream 8"):
        assert said.startswith(refused)


def test_a_stream_that_breaks_on_one_rank_ends_all(tmp_path: Path) -> None:
    recipe = str(write_recipe(tmp_path, POINTS.format(tests=21)))
    assert in_world(2, score_sharded, recipe, "breaks 11") == ["UserError: sample 11 cannot be read"] * 2


def test_a_forward_pass_that_fails_on_one_rank_keeps_no_other_waiting(tmp_path: Path) -> None:
    recipe = str(write_recipe(tmp_path, POINTS.format(tests=97)))
    began = time.monotonic()
    with running_world(2, score_sharded, recipe, "forward 1") as world:
        world.wait(SOON_S)
        with pytest.raises(AssertionError, match=r"(?s)rank 0, exit code .*rank 1, .*forward 1 failed"):
            world.results(0)
    assert time.monotonic() - began < SOON_S


@pytest.mark.slow
def test_generated_text_is_scored_as_in_one_process(tmp_path: Path) -> None:
    """Sentences end after different numbers of steps on each rank."""
    recipe = str(write_recipe(tmp_path, PAIRS.format(path=write_pairs(tmp_path), steps=1)))
    (expected,) = in_world(1, evaluate_untrained, recipe)
    for world_size in (2, 3):
        for values in in_world(world_size, score_sharded, recipe, "", True):
            assert isinstance(values, dict), values
            assert values["loss"] == pytest.approx(expected["loss"], rel=1e-6)
            assert values["bleu"] == expected["bleu"]
            assert values["samples"] == expected["samples"] == 18


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gru", "transformer"])
def test_a_run_of_each_strategy_scores_the_same_text(tmp_path: Path, kind: str) -> None:
    """From weights that were trained in one process, as a step of little effect is enough then."""
    recipe = write_recipe(
        tmp_path,
        PAIRS.format(path=write_pairs(tmp_path), steps=40)
        .replace("kind: gru", f"kind: {kind}, dropout: 0.0")
        .replace("steps: 40", "steps: 40, precision: fp32"),
    )
    trained = tmp_path / "trained"
    train(1, recipe, trained)
    options = ("train.steps=1", "optim.lr=1e-6", f"model.weights={trained / 'export' / 'model.safetensors'}")
    finals = []
    for strategy, world_size in (("single", 1), ("zero3", 2), ("fsdp2", 2)):
        run = tmp_path / strategy
        create(run, recipe, options, strategy, world_size)
        in_world(world_size, train_in_turn, strategy, [str(run)], timeout_s=300)
        finals += [row for row in rows(run) if row["event"] == "final"]
    straight, *others = finals
    assert straight["bleu"] > 0
    assert len(others) == 2
    for final in others:
        assert final["loss"] == pytest.approx(straight["loss"], rel=1e-5)
        assert final["bleu"] == straight["bleu"]


def uneven_passes(strategy: str) -> list[float]:
    """Make another number of forward passes on each rank while all weights are held, and one more in step; the sums."""
    from distrain.parallel import BuildSpec, StrategySpec, build_strategy

    def model() -> torch.nn.Module:
        torch.manual_seed(0)
        # large enough that DeepSpeed does not keep it on every rank anyway
        return torch.nn.Sequential(torch.nn.Linear(400, 400), torch.nn.Linear(400, 400))

    world = open_world("fp32", StrategySpec(strategy))
    plan = BuildSpec(
        model=model,
        optimizer=lambda built: torch.optim.SGD(built.parameters(), lr=0.0),
        loss_sum=lambda built, index: built(torch.ones(1, 400)).sum(),
        micro_batch_size=1,
        accumulation=1,
        clip_norm=None,
        ema=None,
    )
    engine = build_strategy(world, plan)
    engine.model.eval()
    sums = []
    with torch.no_grad():
        with engine.unsharded():
            for _ in range(2 + 3 * world.rank):
                sums.append(engine.model(torch.ones(1, 400)).sum().item())
        sums.append(engine.model(torch.ones(1, 400)).sum().item())
        engine.reshard()
    objective = engine.wrapped(torch.ones(1, 400)).sum()
    backward_and_apply(engine, objective, torch.ones(()))
    world.close()
    return sums


@pytest.mark.parametrize("strategy", ["zero3", "fsdp2"])
def test_ranks_that_hold_all_weights_make_as_many_passes_as_they_like(strategy: str) -> None:
    first, second = in_world(2, uneven_passes, strategy, timeout_s=60)
    assert len(first) == 3
    assert len(second) == 6
    assert first + second == pytest.approx([first[0]] * 9)
