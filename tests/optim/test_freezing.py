"""Parameters that are not trained before a step, under every strategy, and across a resume."""

from __future__ import annotations

import numpy as np
import pytest
from runs import TINY, assert_close, assert_same_run, checkpoint, last, rows, state, train, write_recipe
from torch import nn

from distrain.checkpoint import difference
from distrain.config import Horizon, OptimSection, UserError
from distrain.optim import build_optimizer, drop_frozen, parameter_plan

UNTIL = "optim.freeze=[{params: 'layers.0.*', until: 50%}]"  # six of TINY's twelve steps


def test_until_then_it_is_frozen_and_from_then_on_as_resumed_without_the_freezing(tmp_path):
    recipe = write_recipe(tmp_path)
    thawed, frozen = tmp_path / "thawed", tmp_path / "frozen"
    logged = train(1, recipe, thawed, UNTIL)[0]
    assert "layers.0.*: 1,040 parameters are not trained in steps 1 to 6 (50%)" in logged.out + logged.err
    train(1, recipe, frozen, "optim.freeze=['layers.0.*']", stop_after=5)
    assert last(frozen) == checkpoint(frozen, 6)
    for step in (4, 8):
        found = state(checkpoint(thawed, step))
        assert (("optimizer/layers.0.weight/exp_avg" in found), found["optimizer/layers.2.weight/step"][0]) == (
            step > 6,
            step,
        )
    assert not difference(checkpoint(thawed, 4), checkpoint(frozen, 4)).tensors
    train(1, recipe, frozen, "optim.freeze=[]", update=True)
    one, other = state(last(thawed)), state(last(frozen))
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one), "the run without the freezing is another"
    # its gradient counted in no norm: clipping at 0.5 would show it
    norms = [[row["grad_norm"] for row in rows(run) if row["event"] == "train"] for run in (thawed, frozen)]
    assert norms[0] == norms[1]


@pytest.mark.parametrize(
    "strategy",
    ["ddp", "fsdp2", "zero3", *(pytest.param(each, marks=pytest.mark.more) for each in ("zero1", "zero2"))],
)
def test_every_strategy_computes_the_same_and_resumes_across_the_step(strategy, tmp_path):
    recipe = write_recipe(
        tmp_path, TINY.replace("fp64", "fp32").replace("clip_norm: 0.5", "clip_norm: 0.1, eps: 1.0e-3")
    )
    alone, whole, halves = tmp_path / "alone", tmp_path / "whole", tmp_path / "halves"
    train(1, recipe, alone, UNTIL)
    train(2, recipe, whole, UNTIL, strategy=strategy)
    assert_close(alone, whole, 2e-6)
    train(2, recipe, halves, UNTIL, strategy=strategy, stop_after=3)
    train(2, recipe, halves, UNTIL, strategy=strategy)
    assert_same_run(whole, halves)


def _net():
    return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("freeze", "words"),
    [
        ([{"params": "0.*", "until": "100%"}], ["optim.freeze[0].until", "never ends", "'0.*' alone"]),
        ([{"params": "0.*", "until": "2 epochs"}], ["optim.freeze[0].until", "stream"]),
        ([{"params": "7.*", "until": "1 steps"}], ["optim.freeze[0]", "no parameter matches '7.*'"]),
        (["0.*", {"params": "0.b*", "until": "1 steps"}], ["optim.freeze[1]", "narrower patterns first"]),
    ],
)
def test_a_freezing_that_cannot_be_meant_is_an_error(freeze, words):
    section = OptimSection.model_validate({"freeze": freeze})
    with pytest.raises(UserError) as caught:
        build_optimizer(_net(), section, horizon=Horizon(4, None, None, 10))
    assert all(word in str(caught.value) for word in words), caught.value


def test_each_entry_thaws_at_its_own_step_and_the_first_match_applies():
    freeze = [{"params": "*.bias", "until": "2 steps"}, {"params": "0.*", "until": "40%"}]
    section = OptimSection.model_validate({"name": "sgd", "freeze": freeze})
    model = _net()
    assert {plan.freeze: plan.names for plan in parameter_plan(model, section)} == {
        0: ("0.bias", "1.bias"),
        1: ("0.weight",),
        None: ("1.weight",),
    }
    optimizer = build_optimizer(model, section, horizon=Horizon(4, None, None, 10))
    trained = {}
    for step in range(5):
        for parameter in model.parameters():
            parameter.grad = parameter.detach().clone()
        drop_frozen(optimizer, step)
        trained[step] = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    biases = {"0.bias", "1.bias"}
    assert trained == {
        0: {"1.weight"}, 1: {"1.weight"}, 2: {"1.weight"} | biases, 3: {"1.weight"} | biases,
        4: {"1.weight", "0.weight"} | biases,
    }  # fmt: skip
