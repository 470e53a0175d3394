"""What an optimizer can use of the state of another of its family."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from distrain.config import OptimSection, UserError
from distrain.optim import build_optimizer, plan_migration


def section_of(name: str, **args: Any) -> OptimSection:
    return OptimSection(**{"name": name, "lr": 0.01, **args})


def trained(section: OptimSection, steps: int, model: nn.Module | None = None, state: Any = None) -> Any:
    """Return (model, optimizer) after that many steps, from a state by parameter if given."""
    if model is None:
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
    optimizer = build_optimizer(model, section)
    if state is not None:
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": dict(enumerate(state)), "param_groups": groups})
    for step in range(steps):
        inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def states(optimizer: Optimizer) -> list[dict[str, Any]]:
    return [copy.deepcopy(optimizer.state[p]) for group in optimizer.param_groups for p in group["params"]]


def changed(old: OptimSection, new: OptimSection) -> tuple[Any, tuple[str, ...]]:
    """Train with one optimizer and resume with the other; return (the new optimizer, the notes)."""
    model, optimizer = trained(old, 3)
    stored = states(optimizer)
    migration = plan_migration(type(optimizer).__name__, {key for state in stored for key in state}, new)
    taken = [{key: value for key, value in state.items() if key in migration.keys} for state in stored]
    return trained(new, 2, model, taken)[1], migration.notes


SAME: list[tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]] = [
    ({"name": "adam"}, {"name": "adamw"}, ("optim: AdamW resumes from the state of Adam",)),
    ({"name": "adamw"}, {"name": "radam"}, ("optim: RAdam resumes from the state of AdamW",)),
    ({"name": "radam"}, {"name": "adam"}, ("optim: Adam resumes from the state of RAdam",)),
    (
        {"name": "nadam"},
        {"name": "adamw"},
        (
            "optim: AdamW resumes from the state of NAdam",
            "optim: the stored mu_product is dropped: AdamW has none",
        ),
    ),
    (
        {"name": "adam", "amsgrad": True},
        {"name": "adam"},
        ("optim: the stored max_exp_avg_sq is dropped: Adam has none without amsgrad",),
    ),
    (
        {"name": "adam", "amsgrad": True},
        {"name": "radam"},
        (
            "optim: RAdam resumes from the state of Adam",
            "optim: the stored max_exp_avg_sq is dropped: RAdam has none",
        ),
    ),
    (
        {"name": "adamw", "amsgrad": True},
        {"name": "adam", "amsgrad": True},
        ("optim: Adam resumes from the state of AdamW",),
    ),
    ({"name": "sgd", "momentum": 0.9}, {"name": "sgd", "momentum": 0.8, "nesterov": True}, ()),
    (
        {"name": "sgd", "momentum": 0.9},
        {"name": "sgd"},
        ("optim: the stored momentum_buffer is dropped: SGD has none without momentum",),
    ),
    (
        {"name": "sgd"},
        {"name": "sgd", "momentum": 0.9},
        ("optim: momentum_buffer starts anew: the run so far was without momentum",),
    ),
    (
        {"name": "rmsprop", "centered": True},
        {"name": "rmsprop"},
        ("optim: the stored grad_avg is dropped: RMSprop has none without centered",),
    ),
    ({"name": "adam", "fused": False}, {"name": "adam", "fused": True}, ()),
    (
        {"name": "adam"},
        {"name": "adamw", "weight_decay": 0.1},
        (
            "optim: AdamW resumes from the state of Adam",
            "optim: Adam and AdamW apply weight_decay in different places; the stored moments still include it, and "
            "soon will not",
        ),
    ),
]


@pytest.mark.parametrize(("old", "new", "notes"), SAME)
def test_one_of_the_family_resumes(old: dict[str, Any], new: dict[str, Any], notes: tuple[str, ...]) -> None:
    optimizer, found = changed(section_of(**old), section_of(**new))
    assert found == notes
    for state in states(optimizer):
        assert "step" not in state or state["step"] == 5
        assert set(state) == set(states(trained(section_of(**new), 3)[1])[0])


def test_adam_s_state_in_adamw_is_adamw_s_own() -> None:
    """Without weight decay the two are the same, so changing from one to the other must not show."""
    optimizer, _ = changed(section_of("adam"), section_of("adamw"))
    straight = changed(section_of("adam"), section_of("adam"))[0]
    for state, expected in zip(states(optimizer), states(straight), strict=True):
        assert all(torch.equal(state[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            {"name": "adam"},
            {"name": "adam", "amsgrad": True},
            "no max_exp_avg_sq, the largest .*, and Adam with amsgrad",
        ),
        ({"name": "adam"}, {"name": "nadam"}, "no mu_product, the product of all its momenta so far, and NAdam cannot"),
        ({"name": "rmsprop"}, {"name": "rmsprop", "momentum": 0.9}, "no momentum_buffer, and RMSprop with momentum"),
        ({"name": "sgd", "momentum": 0.9}, {"name": "adam"}, "that of SGD, the recipe asks for Adam, .*; take SGD, or"),
        ({"name": "adam"}, {"name": "sgd"}, r"take Adam or one of its family \(AdamW, NAdam, RAdam\), or start"),
        ({"name": "adamax"}, {"name": "adam"}, "that of Adamax, the recipe asks for Adam, .*; take Adamax, or"),
        ({"name": "muon"}, {"name": "sgd", "momentum": 0.9}, "that of Muon, the recipe asks for SGD"),
    ],
)
def test_what_cannot_be_used_is_refused(old: dict[str, Any], new: dict[str, Any], message: str) -> None:
    torch.manual_seed(0)
    _, optimizer = trained(section_of(**old), 2, nn.Linear(4, 3, bias=False))
    keys = {key for state in states(optimizer) for key in state}
    with pytest.raises(UserError, match=message):
        plan_migration(type(optimizer).__name__, keys, section_of(**new))


class Late(Optimizer):
    """Keeps a tensor only from its fifth step on."""

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state["count"] = state.get("count", 0) + 1
                if state["count"] > 4:
                    state["late"] = parameter.clone()
                parameter.sub_(group["lr"] * parameter.grad)


def test_nothing_of_a_class_of_the_user_s_own_is_dropped() -> None:
    section = section_of(f"{__file__}:Late")
    migration = plan_migration("Late", {"count", "late"}, section)
    assert migration.keys == {"count", "late"}
    assert migration.notes == ()
    with pytest.raises(UserError, match="that of Late, the recipe asks for AdamW"):
        plan_migration("Late", {"count"}, section_of("adamw"))
