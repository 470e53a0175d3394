"""Muon: what it does to a matrix, what it leaves to AdamW, and which parameters are which."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from distrain.config import OptimSection, UserError
from distrain.optim import build_optimizer, parameter_plan, plan_migration, set_lr
from distrain.optim.muon import Muon, orthogonalized


@pytest.mark.parametrize("shape", [(6, 5), (5, 6), (40, 3), (1, 7), (8, 3, 3, 3), (4, 1, 5)])
@pytest.mark.parametrize("matches_adamw", [False, True])
def test_an_update_is_about_orthogonal_and_scaled_for_its_shape(shape: tuple[int, ...], matches_adamw: bool) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = orthogonalized(matrix, matches_adamw=matches_adamw)
    assert (found.shape, found.dtype) == (matrix.shape, matrix.dtype)
    rows, columns = shape[0], math.prod(shape[1:])
    scale = 0.2 * math.sqrt(max(rows, columns)) if matches_adamw else math.sqrt(max(1, rows / columns))
    values = torch.linalg.svdvals(found.reshape(rows, columns)) / scale
    assert values.min() > 0.5
    assert values.max() < 1.3
    # it points where the matrix does: of all with such singular values the nearest has the same singular vectors
    left, _, right = torch.linalg.svd(matrix.reshape(rows, columns), full_matrices=False)
    inside = left.T @ found.reshape(rows, columns) @ right.T
    assert (inside - inside.diagonal().diag()).abs().max() < 1e-9 * scale


@pytest.mark.parametrize("adjust_lr_fn", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("shape", [(6, 5), (5, 6)])
def test_matrices_move_as_by_torch_s_class(shape: tuple[int, int], adjust_lr_fn: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    ours = nn.Parameter(torch.randn(shape, generator=generator))
    theirs = nn.Parameter(ours.detach().clone())
    settings: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1, "adjust_lr_fn": adjust_lr_fn}
    own, torchs = Muon([ours], ns_dtype="bf16", **settings), torch.optim.Muon([theirs], **settings)
    for _ in range(5):
        ours.grad = torch.randn(shape, generator=generator)
        theirs.grad = ours.grad.clone()
        own.step()
        torchs.step()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert torch.equal(own.state[ours]["momentum_buffer"], torchs.state[theirs]["momentum_buffer"])


def test_others_move_as_by_adamw() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix, ours = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(9, generator=generator))
    theirs = nn.Parameter(ours.detach().clone())
    own = Muon([matrix, ours], lr=0.02, weight_decay=0.1, others={"lr": 0.004, "betas": (0.8, 0.9), "eps": 1e-7})
    torchs = torch.optim.AdamW([theirs], lr=0.002, betas=(0.8, 0.9), eps=1e-7, weight_decay=0.1)
    set_lr_scales = [group.setdefault("lr_scale", 1.0) for group in own.param_groups]
    assert set_lr_scales == [1.0, pytest.approx(0.2)]
    set_lr(own, 0.01)  # half of the peak, of both
    for _ in range(4):
        matrix.grad = torch.randn(3, 4, generator=generator)
        ours.grad = torch.randn(9, generator=generator)
        theirs.grad = ours.grad.clone()
        own.step()
        torchs.step()
    assert torch.equal(ours, theirs)
    assert own.state.keys() == {matrix, ours}


class Tokens(nn.Module):
    """A language model of three matrices."""

    def __init__(self, tied: bool):
        super().__init__()
        self.pos = nn.Parameter(torch.zeros(8, 4))
        self.wte = nn.Embedding(11, 4)
        self.up = nn.Linear(4, 16)
        self.norm = nn.LayerNorm(16)
        self.down = nn.Linear(16, 4, bias=False)
        self.head = nn.Linear(4, 11, bias=False)
        if tied:
            self.head.weight = self.wte.weight


def convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 6), nn.Linear(6, 2))


MODELS: dict[str, Any] = {
    "untied": (lambda: Tokens(False), {"up.weight", "down.weight"}),
    "tied": (lambda: Tokens(True), {"up.weight", "down.weight"}),
    "convolutions": (convolutions, {"0.weight", "3.weight"}),
    "attention": (
        lambda: nn.TransformerEncoderLayer(4, 2, 8),
        {"self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight"},
    ),
    "one layer": (lambda: nn.Linear(3, 2), {"weight"}),
}


@pytest.mark.parametrize(("model", "matrices"), MODELS.values(), ids=MODELS)
def test_which_parameters_are_matrices(model: Any, matrices: set[str]) -> None:
    section = OptimSection.model_validate({"name": "muon", "lr": 0.02, "weight_decay": 0.1})
    plans = parameter_plan(model(), section)
    assert {name for plan in plans if not plan.others for name in plan.names} == matrices
    built = model()
    optimizer = build_optimizer(built, section)
    for parameter in built.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    names = {parameter: name for name, parameter in built.named_parameters()}
    kept = {names[each]: set(state) for each, state in optimizer.state.items()}
    assert {name for name, keys in kept.items() if keys == {"momentum_buffer"}} == matrices
    assert all(keys == {"step", "exp_avg", "exp_avg_sq"} for name, keys in kept.items() if name not in matrices)


def test_others_have_a_decay_of_their_own_and_a_group_one_that_holds() -> None:
    own = {"others": {"weight_decay": 0.5, "params": ["up.*", "pos", "head.*"]}, "no_decay": ["bias", "embedding"]}
    for general in (0.0, 0.1):  # without one of all, too
        groups = [{"params": "head.*", "weight_decay": 0.3}]
        section = OptimSection.model_validate({"name": "muon", "weight_decay": general, "groups": groups} | own)
        model = Tokens(False)
        names = {parameter: name for name, parameter in model.named_parameters()}
        optimizer = build_optimizer(model, section)
        found = {names[each]: group["weight_decay"] for group in optimizer.param_groups for each in group["params"]}
        assert found["down.weight"] == general
        assert (found["up.weight"], found["pos"], found["head.weight"], found["up.bias"]) == (0.5, 0.5, 0.3, 0.0)
    weight = nn.Parameter(torch.ones(2))
    alone = Muon([{"params": [weight], "others": True}], lr=0.02, others={"weight_decay": 0.5})
    assert alone.param_groups[0]["weight_decay"] == 0.5


def test_a_recipe_names_what_is_no_matrix() -> None:
    section = OptimSection.model_validate({"name": "muon", "others": {"params": ["up.*", "pos"]}})
    plans = parameter_plan(Tokens(False), section)
    assert {name for plan in plans if not plan.others for name in plan.names} == {"down.weight", "head.weight"}
    wrong = OptimSection.model_validate({"name": "muon", "others": {"params": ["haed.*"]}})
    with pytest.raises(UserError, match=r"optim.others.params: no parameter matches 'haed.\*'.*did you mean 'head\."):
        parameter_plan(Tokens(False), wrong)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"others": {"lrr": 1e-3}}, "others.lrr: expected one of betas, eps, lr, params, weight_decay"),
        ({"others": {"betas": [0.9, 1.5]}}, "betas that are less than 1"),
        ({"others": {"lr": "fast"}}, "expected numbers"),
        ({"momentum": 1.5}, "momentum is 1.5"),
        ({"ns_steps": 0}, "ns_steps is 0"),
        ({"adjust_lr_fn": "moonlight"}, "moonlight"),
        ({"ns_dtype": "fp8"}, "fp8"),
        ({"ns_stepz": 3}, "did you mean 'ns_steps'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(args: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        build_optimizer(nn.Linear(2, 2), OptimSection.model_validate({"name": "muon", **args}))
    assert said in str(caught.value)


def test_a_run_of_torch_s_class_resumes() -> None:
    """Which kept a momentum for all parameters, as all were matrices."""
    found = plan_migration("Muon", {"momentum_buffer"}, OptimSection(name="muon"))
    assert found.keys == {"momentum_buffer"}
    assert sorted(note.split()[1] for note in found.notes) == ["exp_avg", "exp_avg_sq", "step"]
    head = nn.Parameter(torch.zeros(2, 2))
    optimizer = Muon([{"params": [head], "others": True}])
    optimizer.state[head]["momentum_buffer"] = torch.zeros(2, 2)
    head.grad = torch.ones(2, 2)
    optimizer.step()
    assert head.max() < 0
