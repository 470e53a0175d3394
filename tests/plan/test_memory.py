"""The memory of a process under each strategy: what is held is theory, to the byte; what comes and goes is followed."""

from __future__ import annotations

import numpy as np
import pytest

from distrain.plan.facts import ModelFacts, OptimizerFacts, ParameterFacts, Trace
from distrain.plan.memory import STRATEGIES, Setting, plan_memory

ADAM = OptimizerFacts("AdamW", 8.0, 0, 0.0, together=False)
NUMEL = 1000 * 1000
"""Of each of three parameters: one in no block, and two blocks."""


def model(optimizer: OptimizerFacts = ADAM, *, trained: bool = True, cast: bool = False) -> ModelFacts:
    parameters = [
        ParameterFacts(f"w{unit}", (1000, 1000), 4, trained=trained or unit == 2, unit=unit, cast=cast)
        for unit in range(3)
    ]
    return ModelFacts(tuple(parameters), 0, optimizer)


def trace(live: int = 5 * NUMEL) -> Trace:
    """Ten operations: activations grow to `live` and go again; gradients come from the last block on."""
    along = np.array([1, 2, 3, 4, 5, 5, 4, 3, 2, 1]) * (live // 5)
    none = np.zeros(10)
    kinds = [none.astype(bool)] * 3
    arrivals = {"w2": 7, "w1": 9, "w0": 10}
    return Trace(1, 0, along, none, none, none, *kinds, 5, arrivals, ((1, 3), (3, 5)))


def held(strategy: str, ranks: int = 4, nodes: int = 1, **more: bool) -> dict[str, float]:
    """Return weights and optimizer state, in whole models of fp32."""
    parts = plan_memory(model(), trace(), Setting(strategy, ranks, nodes, gpu=False, **more)).parts
    return {name: parts.get(name, 0) / (12 * NUMEL) for name in ("weights", "optimizer", "average")}


@pytest.mark.parametrize(
    ("strategy", "weights", "optimizer"),
    [
        ("ddp", 1, 2),
        ("zero1", 1 + 1 / 4, 2 / 4),
        ("zero2", 1 + 1 / 4, 2 / 4),
        ("zero3", 2 / 4, 2 / 4),
        ("fsdp2", 1 / 4, 2 / 4),
        ("hsdp", 1 / 2, 2 / 2),
    ],
)
def test_what_is_held_is_the_share_that_theory_says(strategy: str, weights: float, optimizer: float) -> None:
    found = held(strategy, 4, 2, ema=True)
    assert found["weights"] == pytest.approx(weights, abs=1e-6)
    assert found["optimizer"] == pytest.approx(optimizer, abs=1e-6)
    assert found["average"] == pytest.approx(optimizer / 2, abs=1e-6)


def test_state_and_average_are_where_the_rows_of_the_weights_are() -> None:
    """Of 5 rows on 4 ranks the first have 2, and all of a single one."""
    parameters = (ParameterFacts("five", (5, 1000), 4), ParameterFacts("one", (1, 1000), 4))
    given = ModelFacts(parameters, 0, ADAM)
    parts = plan_memory(given, trace(), Setting("fsdp2", 4, gpu=False, ema=True)).parts
    assert (parts["weights"], parts["optimizer"], parts["average"]) == (12_000, 24_000, 12_000)


@pytest.mark.parametrize(
    ("strategy", "average"),
    [("single", 3), ("ddp", 3), ("zero1", 1 / 4 + 2), ("zero2", 1 / 4 + 2), ("zero3", 3 / 4), ("fsdp2", 3 / 4)],
)
def test_what_is_frozen_has_an_average_where_its_weights_are(strategy: str, average: float) -> None:
    ranks = 1 if strategy == "single" else 4
    held = [
        plan_memory(model(trained=False), trace(), Setting(strategy, ranks, ema=True, refers=refers)).parts["average"]
        for refers in (False, True)
    ]
    assert held[0] / (4 * NUMEL) == pytest.approx(average)
    assert held[1] / (4 * NUMEL) == pytest.approx(1 if strategy in ("single", "ddp") else 1 / 4)


def test_one_process_holds_gradients_as_they_come_and_several_buckets_for_all() -> None:
    single = plan_memory(model(), trace(), Setting("single", 1, gpu=False))
    ddp = plan_memory(model(), trace(), Setting("ddp", 2, gpu=False))
    waiting = plan_memory(model(), trace(), Setting("single", 1, accumulation=2, gpu=False))
    # the first gradient comes after 7 operations, when 3/5 of the activations are left: 3 + 4 > 5
    assert single.parts == {"weights": 12 * NUMEL, "optimizer": 24 * NUMEL, "gradients": 12 * NUMEL}
    assert single.moment == "the optimizer's step"
    assert ddp.parts["gradients"] == waiting.parts["gradients"] == 12 * NUMEL
    assert ddp.parts["activations"] == 5 * NUMEL
    assert ddp.total == waiting.total


def test_an_optimizer_that_steps_all_at_a_time_needs_room_for_all() -> None:
    one = OptimizerFacts("A", 4.0, 0, 1.0, together=False)
    many = OptimizerFacts("A", 4.0, 0, 1.0, together=True)
    few = trace(live=0)
    steps = [
        plan_memory(model(each), few, Setting("single", 1, gpu=False)).parts["optimizer step"] for each in (one, many)
    ]
    assert steps == [4 * NUMEL, 12 * NUMEL]


def test_what_is_not_trained_has_no_gradient_and_no_state() -> None:
    found = plan_memory(model(trained=False), trace(), Setting("ddp", 2, gpu=False)).parts
    assert found["weights"] == 12 * NUMEL
    assert found["gradients"] == 4 * NUMEL
    assert found["optimizer"] == 8 * NUMEL


def test_weights_that_are_cast_before_they_are_gathered_are_half() -> None:
    wide, narrow = (
        plan_memory(model(cast=True), trace(10**9), Setting("fsdp2", 4, gpu=False, narrow=each)).parts
        for each in (False, True)
    )
    assert wide["gathered weights"] == 2 * narrow["gathered weights"] > 0


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name not in ("single", "ddp")])
@pytest.mark.parametrize("gpu", [True, False])
def test_more_ranks_never_take_more(strategy: str, gpu: bool) -> None:
    nodes = 2 if strategy == "hsdp" else 1
    totals = [plan_memory(model(), trace(), Setting(strategy, ranks, nodes, gpu=gpu)).total for ranks in (4, 8, 64)]
    assert totals == sorted(totals, reverse=True)
    assert totals[-1] < plan_memory(model(), trace(), Setting("ddp", 4, gpu=gpu)).total


def test_a_gpu_has_a_context_and_fragments_beside_tensors() -> None:
    found = plan_memory(model(), trace(), Setting("ddp", 2, gpu=True))
    assert found.allocated < found.total
    assert found.total - found.allocated == found.parts["fragments"] + found.parts["CUDA and NCCL"]
