"""Optimizers, schedules as functions of the step, and averages of weights."""

from __future__ import annotations

import math
import time
from itertools import pairwise
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler
from worlds import in_world

from distrain.config import Duration, Horizon, OptimSection, OwnScheduleSection, ScheduleSection, UserError
from distrain.config.registry import optimizers
from distrain.optim import (
    Ema,
    build_optimizer,
    check_schedule,
    frozen_names,
    fused_kernel,
    lr_at,
    parameter_plan,
    resolve_schedule,
    set_lr,
    unregistered_layers,
)
from distrain.optim.optimizers import check_optimizer


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Conv1d(1, 2, 1), nn.BatchNorm1d(2))
        self.attention = nn.MultiheadAttention(4, 2)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight


# --------------------------------------------------------------------------------------------------------------------
# Optimizers


def test_every_optimizer_of_torch_has_a_name() -> None:
    classes = [each for each in vars(torch.optim).values() if isinstance(each, type)]
    found = {each.__name__ for each in classes if issubclass(each, torch.optim.Optimizer)} - {"Optimizer"}
    assert len(found) > 12
    assert {name for name in found if optimizers.built_in(name) is None} == set()


@pytest.mark.parametrize("name", [*optimizers.names(), "AdamW", "SGD", "rms_prop", "RAdam", "adam_w"])
def test_every_torch_optimizer_steps(name):
    torch.manual_seed(0)
    model = nn.Linear(3, 2, bias=False)
    optimizer = build_optimizer(model, OptimSection(name=name, lr=0.1))
    before = model.weight.detach().clone()
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert not torch.equal(before, model.weight)
    assert all(group["lr_scale"] == 1.0 for group in optimizer.param_groups)


def test_arguments_reach_the_class_and_lists_become_tuples():
    section = OptimSection.model_validate({"name": "adamw", "betas": [0.8, 0.9], "amsgrad": True, "weight_decay": 0.3})
    optimizer = build_optimizer(nn.Linear(2, 2), section)
    assert optimizer.defaults["betas"] == (0.8, 0.9)
    assert optimizer.defaults["amsgrad"] is True
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    assert build_optimizer(nn.Linear(2, 2), OptimSection(name="adafactor", eps=[None, 1e-3])).defaults["eps"] == (
        None,
        1e-3,
    )


def test_a_weight_decay_that_nothing_takes_is_refused():
    groups = [{"params": "*bias", "weight_decay": 0.5}]
    with pytest.raises(
        UserError, match=r"optim\.groups\[0\]\.weight_decay: .* never decayed, by optim\.no_decay \(bias\)"
    ):
        parameter_plan(nn.Linear(2, 2), OptimSection(groups=groups))
    (weight, bias) = parameter_plan(nn.Linear(2, 2), OptimSection(groups=groups, no_decay=["norm"]))
    assert (weight.weight_decay, bias.weight_decay) == (0.0, 0.5)
    parameter_plan(nn.Linear(2, 2), OptimSection(groups=[{"params": "*", "weight_decay": 0.5}]))


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"name": "adamvw"}, ["adamvw", "did you mean", "adamw"]),
        ({"name": "lbfgs"}, ["closure"]),
        ({"name": "SparseAdam"}, ["sparse gradients"]),
        ({"name": "adamw", "beta": [0.9, 0.99]}, ["optim.beta", "betas"]),
        ({"name": "adamw", "clip_nrom": 1.0}, ["optim.clip_nrom", "clip_norm"]),
        ({"name": "adamw", "beta": 1, "clip_nrom": 1.0}, ["optim.beta", "optim.clip_nrom"]),
        ({"name": "rprop", "weight_decay": 0.1}, ["no weight decay"]),
        ({"name": "rprop", "groups": [{"params": "*", "weight_decay": 0.1}]}, ["optim.groups[0].weight_decay"]),
        ({"name": "adamw", "betas": [0.9, 1.5]}, ["adamw", "1.5"]),
        ({"name": "adamw", "lr_scale": 2}, ["optim.lr_scale"]),
    ],
)
def test_mistakes_in_the_section_are_explained_without_a_model(section, words):
    (problems,) = ["\n".join(check_optimizer(OptimSection.model_validate(section)))]
    for word in words:
        assert word in problems
    with pytest.raises(UserError):
        build_optimizer(nn.Linear(2, 2), OptimSection.model_validate(section))


def test_own_optimizer(tmp_path):
    (tmp_path / "own.py").write_text(
        "import torch\nclass Slow(torch.optim.SGD):\n    def __init__(self, params, lr, drag=1.0):\n"
        "        super().__init__(params, lr=lr / drag)\n"
        "def make(params, lr):\n    return torch.optim.Adam(params, lr=lr)\nnumber = 3\n"
        "def none(params, lr):\n    return None\n"
    )
    own = f"{tmp_path}/own.py"
    optimizer = build_optimizer(nn.Linear(2, 2), OptimSection(name=f"{own}:Slow", lr=1.0, drag=2.0))
    assert type(optimizer).__name__ == "Slow"
    assert isinstance(build_optimizer(nn.Linear(2, 2), OptimSection(name=f"{own}:make")), torch.optim.Adam)
    assert "drag" in check_optimizer(OptimSection(name=f"{own}:Slow", dragg=2.0))[0]
    assert "expected a subclass" in check_optimizer(OptimSection(name=f"{own}:number"))[0]
    assert "NoneType" in check_optimizer(OptimSection(name=f"{own}:none"))[0]


def test_what_is_decayed():
    section = OptimSection(weight_decay=0.1)
    plans = {plan.weight_decay: set(plan.names) for plan in parameter_plan(Tied(), section)}
    assert plans[0.1] == {
        "body.0.weight",
        "body.2.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
    }
    assert "embed.weight" in plans[0.0]
    assert {"body.1.weight", "body.3.weight", "attention.in_proj_bias", "body.2.bias"} <= plans[0.0]
    everything = parameter_plan(Tied(), OptimSection(weight_decay=0.1, no_decay=[]))
    assert len(everything) == 1
    assert everything[0].numel == sum(parameter.numel() for parameter in Tied().parameters())


def test_a_norm_is_known_by_its_class_name():
    class LlamaRMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2))

    plans = parameter_plan(nn.Sequential(LlamaRMSNorm(), nn.Linear(2, 2)), OptimSection(weight_decay=1.0))
    assert {plan.weight_decay: plan.names for plan in plans} == {0.0: ("0.scale", "1.bias"), 1.0: ("1.weight",)}


def test_groups_first_match_holds_and_tied_names_count():
    groups = [{"params": "head.*", "lr_scale": 0.5}, {"params": "body.*", "lr_scale": 0.1, "weight_decay": 0.7}]
    section = OptimSection.model_validate({"weight_decay": 0.1, "groups": groups, "freeze": ["attention.*"]})
    model = Tied()
    found = {(plan.lr_scale, plan.weight_decay): plan.names for plan in parameter_plan(model, section)}
    assert found[0.5, 0.0] == ("embed.weight",)
    assert found[0.1, 0.7] == ("body.0.weight", "body.2.weight")
    assert all(not name.startswith("attention") for names in found.values() for name in names)
    assert all(parameter.requires_grad for parameter in model.parameters()), "a plan changes nothing"
    optimizer = build_optimizer(model, section)
    assert not model.attention.in_proj_weight.requires_grad
    assert frozen_names(model, section) == sorted(
        name for name, _ in model.named_parameters() if name.startswith("attention")
    )
    set_lr(optimizer, 2.0)
    assert {group["lr_scale"]: group["lr"] for group in optimizer.param_groups} == {0.5: 1.0, 0.1: 0.2}


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"freeze": ["bdy.*"]}, ["optim.freeze[0]", "bdy.*", "body.*"]),
        ({"groups": [{"params": "boddy.*"}]}, ["optim.groups[0].params", "body.*"]),
        ({"groups": [{"params": "body.*"}, {"params": "body.0.*"}]}, ["optim.groups[1].params", "narrower"]),
        ({"freeze": ["*"]}, ["nothing is left to train"]),
        ({"freeze": ["x"], "groups": [{"params": "y"}]}, ["optim.freeze[0]", "optim.groups[0]"]),
    ],
)
def test_patterns_that_do_nothing_are_errors(section, words):
    with pytest.raises(UserError) as caught:
        parameter_plan(Tied(), OptimSection.model_validate(section))
    for word in words:
        assert word in str(caught.value)


def test_groups_do_not_depend_on_wrappers():
    model = Tied()
    section = OptimSection(weight_decay=0.1)
    assert parameter_plan(torch.compile(model), section) == parameter_plan(model, section)
    model.body = torch.compile(model.body)
    assert parameter_plan(model, section) == parameter_plan(Tied(), section)


def test_set_lr_through_accelerate():
    model = nn.Linear(2, 2)
    section = OptimSection.model_validate({"groups": [{"params": "bias", "lr_scale": 0.1}]})
    optimizer = Accelerator(cpu=True).prepare(build_optimizer(model, section))
    set_lr(optimizer, 0.5)
    assert sorted(group["lr"] for group in optimizer.optimizer.param_groups) == [0.05, 0.5]


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_an_element_moves_alike_wherever_it_lies(name):
    """The default kernels give the same bits to a shard as to the whole tensor."""
    extra = {"momentum": 0.9} if name == "sgd" else {}
    generator = torch.Generator().manual_seed(0)
    start, grads = torch.randn(2003, generator=generator), torch.randn(4, 2003, generator=generator)

    def trained(cut):
        holder = nn.Module()
        holder.weight = nn.Parameter(start[cut].clone())
        optimizer = build_optimizer(holder, OptimSection(name=name, lr=0.01, weight_decay=0.1, **extra))
        for grad in grads:
            holder.weight.grad = grad[cut].clone()
            optimizer.step()
        return holder.weight.detach()

    whole = trained(slice(None))
    for cut in (slice(0, 1000), slice(3, 80), slice(1001, 2003), slice(1999, 2003)):
        assert torch.equal(whole[cut], trained(cut))
    assert build_optimizer(nn.Linear(2, 2), OptimSection(name="adamw")).defaults["fused"] is True
    assert build_optimizer(nn.Linear(2, 2), OptimSection(name="adamw", foreach=True)).defaults["fused"] is None


class Rule(nn.Module):
    def forward(self, x):
        return x


class Listed(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = layers


@pytest.mark.parametrize("keys", [{}, {"freeze": ["body.*"]}, {"groups": [{"params": "head.*"}]}])
@pytest.mark.parametrize(
    ("model", "words"),
    [
        (
            Rule(),
            "model: Rule has no parameters, so there is nothing to train. layers in a plain list need nn.ModuleList",
        ),
        (
            Listed([nn.Linear(1, 1)]),
            "model: Listed has no parameters, so there is nothing to train. layers: put layers in a",
        ),
        (Listed({"a": nn.Linear(1, 1)}), "layers: put layers in a plain list or dict into nn.ModuleList"),
        (nn.Sequential(Listed((nn.Linear(1, 1),))), "0.layers: put layers in a plain list"),
    ],
)
def test_a_model_without_parameters_is_called_that(model, words, keys):
    for check in (parameter_plan, build_optimizer):
        with pytest.raises(UserError) as caught:
            check(model, OptimSection(**keys))
        assert words in str(caught.value)
        assert "optim" not in str(caught.value)


def test_who_froze_all_of_a_model_is_named():
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    with pytest.raises(UserError, match=r"^optim.freeze: all 4 parameters are frozen, so"):
        parameter_plan(model, OptimSection(freeze=["*"]))
    model[0].requires_grad_(False)
    with pytest.raises(
        UserError, match=r"^optim.freeze: all 4 parameters are frozen, with 2 that the model itself has"
    ):
        parameter_plan(model, OptimSection(freeze=["1.*"]))
    model.requires_grad_(False)
    with pytest.raises(UserError, match=r"^model: all 4 parameters of Sequential are frozen by the model itself"):
        parameter_plan(model, OptimSection())


def test_layers_that_a_model_does_not_own_are_found():
    model = Listed([nn.Linear(1, 1)])
    model.own = nn.Linear(1, 1)
    assert unregistered_layers(model) == ["layers"]
    model.more = nn.ModuleList(model.layers)
    assert unregistered_layers(model) == [], "a list beside the layers' own place"
    assert unregistered_layers(Listed([nn.ReLU(), 3])) == []


# --------------------------------------------------------------------------------------------------------------------
# Schedules


def horizon(total):
    return Horizon(global_batch_size=4, samples_per_epoch=40, tokens_per_sample=None, total_steps=total)


def schedule(**keys):
    return ScheduleSection.model_validate(keys)


def torch_rates(total, make):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make(optimizer)
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


TORCH = {
    "cosine": (
        {"name": "cosine", "final": 0.1},
        lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=36, eta_min=0.1),
    ),
    "linear": (
        {"name": "linear", "final": 0.2},
        lambda o: lr_scheduler.LinearLR(o, start_factor=1.0, end_factor=0.2, total_iters=36),
    ),
    "step": ({"name": "step", "every": "9 steps", "gamma": 0.3}, lambda o: lr_scheduler.StepLR(o, 9, 0.3)),
    "one_cycle": (
        {"name": "one_cycle", "final": 1 / 25 / 1e4},
        lambda o: lr_scheduler.OneCycleLR(o, max_lr=1.0, total_steps=38, cycle_momentum=False),
    ),
    "one_cycle_warmup": (
        {"name": "one_cycle", "final": 1 / 25 / 1e4, "warmup": "8 steps"},
        lambda o: lr_scheduler.OneCycleLR(o, max_lr=1.0, total_steps=38, pct_start=8 / 38, cycle_momentum=False),
    ),
    "warmup_cosine": (
        {"name": "cosine", "warmup": "5 steps"},
        lambda o: lr_scheduler.SequentialLR(
            o,
            [lr_scheduler.LinearLR(o, 1 / 5, 1.0, 4), lr_scheduler.CosineAnnealingLR(o, T_max=32)],
            milestones=[4],
        ),
    ),
}


@pytest.mark.parametrize("case", TORCH)
def test_schedules_are_torchs(case):
    keys, make = TORCH[case]
    total = 38 if "cycle" in case else 37
    share = resolve_schedule(schedule(**keys), horizon(total))
    steps = total - 1 if "cycle" in case else total  # OneCycleLR refuses to step beyond its end
    assert [share(step) for step in range(steps)] == pytest.approx(torch_rates(steps, make), abs=1e-12)


@given(
    st.sampled_from(["constant", "linear", "cosine", "step", "one_cycle", "warmup_stable_decay"]),
    st.integers(1, 60),
    st.integers(0, 60),
    st.floats(0, 1),
)
@settings(max_examples=150)
def test_shape_of_every_schedule(name, total, warmup, final):
    warmup = min(warmup, total)
    keys = {"name": name, "warmup": f"{warmup} steps"}
    if name in ("linear", "cosine", "one_cycle", "warmup_stable_decay"):
        keys["final"] = final
    if name == "warmup_stable_decay":
        warmup = min(warmup, total - 1)
        keys |= {"warmup": f"{warmup} steps", "decay": f"{total - warmup} steps"}
    share = resolve_schedule(schedule(**keys), horizon(total))
    values = [share(step) for step in range(total)]
    assert all(0 <= value <= 1 for value in values)
    if warmup and name not in ("one_cycle", "step"):
        assert values[:warmup] == [(step + 1) / warmup for step in range(warmup)]
    peak = max(warmup - 1, 0)
    if name != "step" and not (name == "one_cycle" and not warmup):
        assert values[peak] == 1.0
    if "final" in keys and total - 1 > max(peak, 0.3 * total):
        assert values[-1] == final
        assert share(total + 5) == final
    after = values[peak:] if name != "one_cycle" or warmup else values[int(0.3 * total) :]
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(after))
    assert values == [lr_at(schedule(**keys), step, horizon(total)) for step in range(total)]


def test_warmup_stable_decay():
    share = resolve_schedule(schedule(name="warmup_stable_decay", warmup="10%", decay="20%", final=0.5), horizon(20))
    assert [share(step) for step in range(20)] == pytest.approx([0.5] + [1.0] * 15 + [0.875, 0.75, 0.625, 0.5])


def test_steps_fall_from_the_start_of_the_run():
    share = resolve_schedule(schedule(name="step", warmup="4 steps", every="1 epochs"), horizon(25))
    assert share(9) == 1.0
    assert share(10) == pytest.approx(0.1)
    assert share(20) == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("keys", "total", "words"),
    [
        ({"name": "cosine", "warmup": "50 steps"}, 20, ["schedule.warmup is 50", "20"]),
        ({"name": "warmup_stable_decay", "warmup": "15 steps", "decay": "6 steps"}, 20, ["decay 6"]),
        ({"name": "cosine", "gamma": 0.5}, 20, ["schedule.gamma", "'step'"]),
        ({"name": "constant", "final": 0.5, "every": "2 steps"}, 20, ["schedule.final", "schedule.every"]),
        ({"name": "cosine", "warmup": "1e6 tokens"}, 20, ["schedule.warmup", "tokens"]),
        ({"name": "cosine"}, None, ["length of the run"]),
    ],
)
def test_schedules_that_cannot_be(keys, total, words):
    with pytest.raises(UserError) as caught:
        resolve_schedule(schedule(**keys), horizon(total))
    for word in words:
        assert word in str(caught.value)


def test_a_stored_schedule_is_as_good_as_a_written_one():
    stored = schedule(name="cosine", gamma=0.1, decay=Duration(10, "%"), every="30%", final=0.0)
    assert check_schedule(stored) == []


OWN_SCHEDULES = """
import math
import torch

def half(*args, **kwargs):
    return 0.5

def falling(step, total_steps, power=1.0, *, final=0.0, every=1):
    assert type(step) is type(total_steps) is int
    return torch.tensor(max(final, (1 - step // every * every / total_steps) ** power))

def late(step, total_steps, bad):
    return float(bad) if step == total_steps - 1 else 1

def middle(step, total_steps):
    return math.nan if step == 2 else True

def fails(step, total_steps):
    raise KeyError("x\\x1b")

def one(step):
    return 1

calls = []
def counting(step, total_steps):
    calls.append(step)
    return 1 / len(calls)

class Class: ...

number = 3
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "schedules.py").write_text(OWN_SCHEDULES)
    return lambda name, **keys: OwnScheduleSection.model_validate({"name": f"{tmp_path}/schedules.py:{name}", **keys})


@pytest.mark.parametrize(
    ("name", "keys", "shares"),
    [
        ("half", {}, [0.5, 0.5, 0.5, 0.5, 0.5]),
        ("half", {"anything": "at all"}, [0.5, 0.5, 0.5, 0.5, 0.5]),
        ("half", {"warmup": "2 steps"}, [0.25, 0.5, 0.5, 0.5, 0.5]),
        ("falling", {}, [1, 0.75, 0.5, 0.25, 0.25]),
        # keys of other schedules are arguments like any
        ("falling", {"power": 2, "final": 0.5, "every": 2}, [1, 1, 0.5, 0.5, 0.5]),
        ("falling", {"warmup": "50%"}, [0.5, 0.75, 0.5, 0.25, 0.25]),
    ],
)
def test_a_schedule_of_ones_own_gives_the_share_at_each_step(own, name, keys, shares):
    assert check_schedule(own(name, **keys)) == []
    share = resolve_schedule(own(name, **keys), horizon(4))
    assert [share(step) for step in range(5)] == pytest.approx(shares)


@pytest.mark.parametrize(
    ("name", "keys", "words"),
    [
        ("falling", {"powr": 2}, "schedule.powr: S has no argument 'powr'; did you mean 'power'?"),
        ("falling", {"step": 2}, "schedule.step: S is given 'step' by distrain itself"),
        ("late", {}, "schedule.bad: S needs it, and it was not given"),
        ("one", {}, "schedule.name: S cannot be called as f(step, total_steps): too many positional arguments"),
        ("Class", {}, "schedule.name: S is a class; expected a function (step, total_steps, ...)"),
        ("number", {}, "schedule.name: S is an int; expected a function (step, total_steps, ...)"),
        ("nothing", {}, "has no 'nothing'"),
    ],
)
def test_a_schedule_of_ones_own_is_checked_with_the_recipe(own, name, keys, words):
    (problem,) = check_schedule(own(name, **keys))
    assert words in problem.replace(repr(own(name).name), "S")


@pytest.mark.parametrize(
    ("name", "keys", "words"),
    [
        (
            "late",
            {"bad": "nan"},
            "returned nan at step 3 of 4, counted from 0; expected the share of optim.lr, a finite",
        ),
        ("late", {"bad": "inf"}, "returned inf at step 3 of 4"),
        ("late", {"bad": -1}, "returned -1.0 at step 3 of 4"),
        ("late", {"bad": "x"}, "failed at step 3 of 4: ValueError: could not convert"),
        ("fails", {}, r"failed at step 0 of 4: KeyError: 'x\x1b'"),
        ("counting", {}, "returned 1 and then 0.333333 at step 0 of 4; expected a function of the step alone"),
        ("half", {"warmup": "5 steps"}, "schedule.warmup is 5 steps and the whole run only 4"),
    ],
)
def test_what_is_no_share_is_found_before_the_first_step(own, name, keys, words):
    with pytest.raises(UserError) as caught:
        resolve_schedule(own(name, **keys), horizon(4))
    assert words in str(caught.value)


def test_what_is_no_share_later_names_the_step(own):
    share = resolve_schedule(own("middle"), horizon(4))
    assert [share(0), share(1), share(3)] == [1, 1, 1]
    with pytest.raises(UserError, match="middle returned nan at step 2 of 4"):
        share(2)


def test_a_share_costs_microseconds():
    share = resolve_schedule(schedule(name="cosine", warmup="10 steps"), horizon(10**6))
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        for step in range(1000):
            share(500_000 + step)
        best = min(best, (time.perf_counter() - start) / 1000)
    assert best < 5e-6


# --------------------------------------------------------------------------------------------------------------------
# Averages


def test_ema_follows_its_formula_and_gives_the_weights_back():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).bfloat16()
    ema = Ema(model, 0.9)
    expected = {name: tensor.double() for name, tensor in model.state_dict().items()}
    for step in range(5):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
            model[1].num_batches_tracked += 1
            model[1].running_mean = model[1].running_mean + 1  # replaced, not written into
        ema.update()
        for name, tensor in model.state_dict().items():
            expected[name] = expected[name] * 0.9 + tensor.double() * 0.1
        expected["1.num_batches_tracked"] = torch.tensor(step + 1.0).double()
    found = ema.tensors()
    assert found.keys() == model.state_dict().keys()
    assert found["0.weight"].dtype == torch.float32
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-6)

    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    averages = {name: tensor.clone() for name, tensor in found.items()}
    with ema.applied():
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, averages[name].to(tensor.dtype))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(tensor, averages[name]) for name, tensor in ema.tensors().items())


def test_ema_of_equal_weights_does_not_move():
    model = nn.Linear(5, 5)
    ema = Ema(model, 0.999)
    for _ in range(10):
        ema.update()
    assert torch.equal(ema.tensors()["weight"], model.weight)


def test_ema_names_are_plain_and_tied_weights_are_held_once():
    model = Tied()
    assert "head.weight" not in Ema(model, 0.9).tensors()
    names = Ema(model, 0.9).tensors().keys()
    assert Ema(torch.compile(model), 0.9).tensors().keys() == names
    assert Ema(nn.DataParallel(model), 0.9).tensors().keys() == names
    model.register_buffer("mask", torch.ones(3), persistent=False)
    assert "mask" not in Ema(model, 0.9).tensors()


def test_ema_load_is_strict():
    model = nn.Linear(2, 2)
    ema = Ema(model, 0.9)
    ema.load({"weight": torch.full((2, 2), 3.0), "bias": torch.zeros(2)})
    assert ema.tensors()["weight"][0, 0] == 3
    with pytest.raises(UserError) as caught:
        ema.load({"weight": torch.zeros(3), "biass": torch.zeros(2)})
    for word in ("'bias' is missing", "biass", "(3,)"):
        assert word in str(caught.value)
    assert ema.tensors()["weight"][0, 0] == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda model: setattr(model, "seen", None), r"seen is gone and had the shape \[3\] at the start"),
        (lambda model: delattr(model, "seen"), r"seen is gone and had the shape \[3\] at the start"),
        (
            lambda model: setattr(model, "seen", model.seen[:2]),
            r"seen has the shape \[2\] now and had \[3\] at the start",
        ),
    ],
)
def test_ema_names_a_buffer_that_is_not_what_it_was(dtype: torch.dtype, change: Any, found: str) -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("seen", torch.zeros(3, dtype=dtype))
    ema = Ema(model, 0.9)
    ema.update()
    change(model)
    with pytest.raises(UserError, match=found):
        ema.update()


def test_ema_over_tensors_that_live_elsewhere():
    pieces = {"a": torch.zeros(3)}
    ema = Ema(pieces, 0.5)
    pieces["a"] = torch.ones(3)
    ema.update()
    assert ema.tensors()["a"].tolist() == [0.5] * 3
    with ema.applied():
        assert pieces["a"].tolist() == [0.5] * 3
    assert pieces["a"].tolist() == [1.0] * 3


def sharded_average():
    """Train a model sharded by FSDP2 beside a whole one; runs on every rank of a world."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3)))
    sharded, whole = models
    fully_shard(sharded, mesh=dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),)))
    section = OptimSection(lr=0.1, weight_decay=0.1)
    assert parameter_plan(sharded, section) == parameter_plan(whole, section)
    averages = [Ema(model, 0.9) for model in models]
    optimizers = [build_optimizer(model, section) for model in models]
    inputs = torch.randn(4, 5)
    for _ in range(3):
        for model, optimizer, ema in zip(models, optimizers, averages, strict=True):
            set_lr(optimizer, 0.05)
            model(inputs).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            ema.update()
    for (name, average), (_, expected) in zip(
        averages[0].tensors().items(), averages[1].tensors().items(), strict=True
    ):
        torch.testing.assert_close(average.full_tensor(), expected, msg=name)
    with torch.no_grad():
        # Forward passes before, inside and after: whole weights that FSDP2 holds on to must not be used again.
        own = sharded(inputs)
        for _ in range(2):
            with averages[0].applied(), averages[1].applied():
                torch.testing.assert_close(sharded(inputs), whole(inputs))
                assert not torch.allclose(sharded(inputs), own)
            assert torch.equal(sharded(inputs), own)
    dist.destroy_process_group()
    return True


def test_ema_of_a_sharded_model():
    assert in_world(2, sharded_average) == [True, True]


@pytest.mark.parametrize(
    ("section", "model", "kernel"),
    [
        ({"name": "adamw"}, nn.Linear(2, 2), "exact"),
        ({"name": "adam", "freeze": ["bias"]}, nn.Linear(2, 2), "exact"),
        ({"name": "sgd", "momentum": 0.9}, nn.Linear(2, 2), "gpu"),
        ({"name": "sgd"}, nn.Embedding(4, 2, sparse=True), None),
        ({"name": "rmsprop"}, nn.Linear(2, 2), None),
        ({"name": "adamw", "foreach": True}, nn.Linear(2, 2), "own"),
        ({"name": "adamw"}, nn.Linear(2, 2, dtype=torch.complex64), None),
    ],
)
def test_which_fused_kernel_there_is(section: dict[str, Any], model: nn.Module, kernel: str | None) -> None:
    found = OptimSection.model_validate(section)
    assert fused_kernel(found, model) == kernel
    assert (build_optimizer(model, found).defaults.get("fused") is True) == (kernel == "exact")
    if kernel == "gpu":
        assert build_optimizer(model, found, fused=True).defaults["fused"] is True
        # neither fused nor foreach is stated, so torch takes foreach on a GPU
        off = build_optimizer(model, found, fused=False).defaults
        assert (off["fused"], off["foreach"]) == (None, None)


class Exchanging(torch.optim.SGD):
    """Has other weights to evaluate than to train."""

    def train(self) -> None:
        pass

    def eval(self) -> None:
        pass


def test_an_optimizer_that_exchanges_weights_for_evaluations_is_refused():
    (problem,) = check_optimizer(OptimSection(name=f"{__name__}:Exchanging", lr=0.1))
    assert "Exchanging has methods train() and eval(), by which it exchanges the weights" in problem
