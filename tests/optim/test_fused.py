"""The step of Adam and AdamW by their kernel alone: the bits of torch's own step, and when it is left to torch."""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from distrain.optim import FusedStep

KINDS: dict[str, tuple[type[torch.optim.Adam], dict[str, Any]]] = {
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.1}),
    "adam": (torch.optim.Adam, {"weight_decay": 0.1, "betas": (0.8, 0.9)}),
    "amsgrad": (torch.optim.AdamW, {"amsgrad": True, "maximize": True, "eps": 1e-4}),
}


def make(kind: str = "adamw", **options: Any) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    """Return five parameters in two groups of an optimizer."""
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in [(5, 7), (7,), (3, 3), (), (1,)]]
    build, more = KINDS[kind]
    groups = [{"params": parameters[:2]}, {"params": parameters[2:], "lr": 0.3, "weight_decay": 0.0}]
    return parameters, build(groups, lr=0.1, **({"fused": True} | more | options))


def give_gradients(parameters: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for each in parameters:
        each.grad = torch.randn(each.shape, generator=generator).to(each.dtype)


def torchs_steps(action: Callable[[], Any]) -> int:
    """Return how often torch's own step was called."""
    called: Counter[str] = Counter()

    def note(frame: Any, event: str, _: Any) -> None:
        called["step"] += event == "call" and frame.f_code.co_qualname == "Adam.step"

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(before)
    return called["step"]


@pytest.mark.parametrize("kind", KINDS)
def test_it_has_the_bits_of_torchs_step(kind: str) -> None:
    (mine, optimizer), (theirs, other) = make(kind), make(kind)
    step = FusedStep(optimizer)
    by_torch = []
    for number in range(12):
        if number == 5:  # as a callback may
            optimizer.param_groups[1]["lr"] = other.param_groups[1]["lr"] = 0.01
        if number == 7:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        give_gradients(mine, number)
        give_gradients(theirs, number)
        if number == 3:
            mine[1].grad = theirs[1].grad = None
        by_torch.append(torchs_steps(lambda whole=number != 3: step(whole=whole)))
        other.step()
        for one, its in zip(mine, theirs, strict=True):
            assert torch.equal(one, its)
            assert optimizer.state[one].keys() == other.state[its].keys()
            for key, value in optimizer.state[one].items():
                assert torch.equal(value, other.state[its][key])
                assert value.dtype == other.state[its][key].dtype
    # the first makes the state, the fourth lacks a gradient, and that after the loading looks again
    assert by_torch == [1, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0]


def test_a_state_that_was_exchanged_is_stepped() -> None:
    parameters, optimizer = make()
    step = FusedStep(optimizer)
    for number in range(4):
        give_gradients(parameters, number)
        if number == 2:
            optimizer.state[parameters[0]]["exp_avg"] = torch.zeros(5, 7)
        if number == 3:
            optimizer.state.clear()
        assert torchs_steps(lambda: step(whole=True)) == (number in (0, 3))
    assert torch.equal(optimizer.state[parameters[0]]["exp_avg"], parameters[0].grad * (1 - 0.9))
    assert {state["step"].item() for state in optimizer.state.values()} == {1}
    optimizer.add_param_group({"params": [more := nn.Parameter(torch.ones(2))]})
    give_gradients([*parameters, more], 4)
    step(whole=True)
    assert not torch.equal(more, torch.ones(2))


def test_whoever_watches_a_step_sees_it() -> None:
    parameters, optimizer = make()
    step = FusedStep(optimizer)
    seen: list[str] = []

    def take() -> int:
        give_gradients(parameters, 1)
        return torchs_steps(lambda: step(whole=True))

    assert [take() for _ in range(3)] == [1, 0, 0]
    for register in (
        lambda: optimizer.register_step_pre_hook(lambda *_: seen.append("before")),
        lambda: optimizer.register_step_post_hook(lambda *_: seen.append("after")),
        lambda: register_optimizer_step_pre_hook(lambda *_: seen.append("before any")),
        lambda: register_optimizer_step_post_hook(lambda *_: seen.append("after any")),
    ):
        handle = register()
        assert take() == 1
        handle.remove()
    assert seen == ["before", "after", "before any", "after any"]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        assert take() == 1
    assert "Optimizer.step#AdamW.step" in {event.key for event in profile.key_averages()}
    assert take() == 0
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)  # puts a step of its own around the optimizer's
    assert take() == 1


@pytest.mark.parametrize("options", [{"fused": False}, {"fused": None, "foreach": True}, {"capturable": True}])
def test_an_optimizer_that_states_another_way_to_step_takes_it(options: dict[str, Any]) -> None:
    parameters, optimizer = make(**options)
    step = FusedStep(optimizer)
    for number in range(2):
        give_gradients(parameters, number)
        assert torchs_steps(lambda: step(whole=True)) == 1


def test_other_optimizers_step_themselves() -> None:
    class Own(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            taken.append(1)
            return super().step(closure)

    taken: list[int] = []
    weights = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, dtype=torch.float64))]
    for optimizer in (
        torch.optim.SGD(weights, lr=0.1),
        Own(weights, lr=0.1, fused=True),
        torch.optim.AdamW(weights, lr=0.1, fused=True),
    ):
        step = FusedStep(optimizer)
        for number in range(3):
            before = [each.detach().clone() for each in weights]
            give_gradients(weights, number)
            step(whole=True)
            assert not any(map(torch.equal, weights, before))
    assert len(taken) == 3
