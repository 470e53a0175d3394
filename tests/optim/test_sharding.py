"""Which optimizers give the same result on pieces of their parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import pytest
import torch
from steps import backward_and_apply
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from worlds import in_world

from distrain.config import OptimSection
from distrain.config.registry import optimizers
from distrain.optim.sharding import dtensor_problem, is_elementwise, odd_states, sharding_problem

ZERO = ("zero1", "zero2", "zero3")
WHOLE_MATRICES = ("adafactor", "muon")
GATHERS = ("muon",)
"""Is given whole matrices by the strategies that shard."""
REFUSED = {"adafactor"}
UNKNOWN_TO_OLDER_TORCH = {"rprop": "raises NotImplementedError: Operator aten.index_put_.default does not have"}
"""What torch 2.11 cannot do with the shards of fsdp2, and what is said of it."""
VARIANTS: list[dict[str, Any]] = [
    *({"name": name} for name in optimizers.names()),
    {"name": "adam", "amsgrad": True},
    {"name": "adamw", "fused": False},
    {"name": "adagrad", "fused": True},
    {"name": "rmsprop", "momentum": 0.9, "centered": True},
    {"name": "sgd", "momentum": 0.9},
    {"name": "sgd", "momentum": 0.9, "nesterov": True},
    {"name": "sgd", "momentum": 0.9, "fused": True},
    {"name": "muon", "adjust_lr_fn": "match_rms_adamw", "others": {"params": ["0.bias"], "lr": 0.003}},
]


def variant_name(variant: dict[str, Any]) -> str:
    return "-".join(str(value) if key == "name" else key for key, value in variant.items())


def section_of(variant: dict[str, Any]) -> OptimSection:
    return OptimSection(**{"lr": 0.01, "weight_decay": 0.0 if variant["name"] == "rprop" else 0.1, **variant})


def unknown_to_older_torch(name: str, problem: str) -> bool:
    return name in UNKNOWN_TO_OLDER_TORCH and UNKNOWN_TO_OLDER_TORCH[name] in problem


every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=variant_name)


# --------------------------------------------------------------------------------------------------------------------
# Classes that are not in torch


class Base(Optimizer, ABC):
    """What each of these does with a gradient is its `direction`."""

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(group["lr"] * self.direction(parameter, parameter.grad))

    @abstractmethod
    def direction(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        """Return what is taken off the parameter, before the learning rate."""


class Signs(Base):
    """Elementwise."""

    def direction(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        return gradient.sign()


class ClipsLarge(Base):
    """Looks at the norm of a parameter's gradient, where that is large."""

    def direction(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        norm = gradient.norm()
        return gradient / norm if norm > 50 else gradient


class Trust(Base):
    """Looks at the norms of a parameter and of its gradient, as LARS and LAMB do."""

    def direction(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        return gradient * (parameter.norm() / gradient.norm())


class Together(Base):
    """Looks at the norm of all gradients together."""

    def direction(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        return gradient / sum(p.grad.norm() for group in self.param_groups for p in group["params"])


class History(Base):
    """Elementwise, with a state that is not of the parameter's shape."""

    def direction(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        state = self.state[parameter]
        old = state.get("history", torch.zeros(2, *gradient.shape, dtype=gradient.dtype))
        state["history"] = torch.stack([gradient, old[0]])
        return gradient + old.sum(0)


class OwnPart(Base):
    """Looks at the norm of what this rank has of a gradient, which is the whole only where nothing is sharded."""

    def direction(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        return gradient / (gradient.to_local() if isinstance(gradient, DTensor) else gradient).norm()


def own(kind: type[Base]) -> dict[str, Any]:
    return {"name": f"{__file__}:{kind.__name__}"}


# --------------------------------------------------------------------------------------------------------------------
# Flat pieces


@every_variant
def test_torch_s_optimizers_on_flat_pieces(variant: dict[str, Any]) -> None:
    section = section_of(variant)
    assert is_elementwise(section) == (variant["name"] not in WHOLE_MATRICES)
    for strategy in ZERO:
        problem = sharding_problem(section, strategy)
        if variant["name"] not in REFUSED:
            assert problem is None
        else:
            assert problem is not None
            assert problem.startswith(f"optim.name: {variant['name']} uses whole matrices")
            assert f"{strategy} gives it flat pieces" in problem
            assert problem.endswith("; use ddp, or adamw")
    assert sharding_problem(section, "ddp") is sharding_problem(section, "single") is None


@pytest.mark.parametrize(
    ("kind", "elementwise"),
    [(Signs, True), (ClipsLarge, False), (Trust, False), (Together, False), (History, True)],
)
def test_own_optimizers_on_flat_pieces(kind: type[Base], elementwise: bool) -> None:
    section = section_of(own(kind))
    assert is_elementwise(section) == elementwise
    odd = odd_states(section)
    assert odd == ({"history": (2, 6, 5)} if kind is History else {})
    problem = sharding_problem(section, "zero2")
    assert (problem is None) == (kind is Signs)
    if problem is not None:
        expected = "for (6, 5): history (2, 6, 5)" if kind is History else "zero2 gives it flat pieces"
        assert expected in problem
        assert problem.endswith("use ddp or fsdp2, or adamw")


def test_what_names_parameters_is_no_matter() -> None:
    section = OptimSection.model_validate(
        {"freeze": ["head.*"], "groups": [{"params": "encoder.*", "weight_decay": 0.3}], "lr": 0.1}
    )
    assert is_elementwise(section)


def test_adafactor_s_rows_and_columns_are_not_of_the_shape() -> None:
    assert odd_states(section_of({"name": "adafactor"})) == {"row_var": (6, 1), "col_var": (1, 5)}


# --------------------------------------------------------------------------------------------------------------------
# DTensors


def try_all_on_dtensors(sections: list[OptimSection]) -> list[str | None]:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    problems = [dtensor_problem(section, mesh) for section in sections]
    dist.barrier()
    dist.destroy_process_group()
    return problems


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [pytest.param(2, marks=pytest.mark.more), 3])
def test_optimizers_on_the_shards_of_fsdp2(world_size: int) -> None:
    """What torch's do was seen here; a version of torch in which it is otherwise fails this test."""
    owns = (Signs, Trust, Together)
    tried = [variant for variant in VARIANTS if variant["name"] not in GATHERS]  # the others are given whole matrices
    sections = [section_of(variant) for variant in [*tried, *map(own, owns)]]
    first, *others = in_world(world_size, try_all_on_dtensors, sections)
    assert all(other == first for other in others)
    for section, problem in zip(sections, first, strict=True):
        print(f"{section.name:12} {section.args} {problem}")
    found = dict(zip([*map(variant_name, tried), *owns], first, strict=True))
    refused = {
        name for name, problem in found.items() if problem is not None and not unknown_to_older_torch(name, problem)
    }
    assert refused == {"adafactor", "adagrad-fused", "sgd-momentum-fused"}
    assert not [problem for problem in first if problem is not None and ".;" in problem]
    # known before a world is there
    for variant, section in zip(tried, sections, strict=False):
        assert (sharding_problem(section, "fsdp2") is not None) == (variant_name(variant) in refused)


def test_what_is_refused_under_fsdp2_is_reported() -> None:
    assert sharding_problem(section_of({"name": "adafactor"}), "fsdp2") == (
        "optim.name: adafactor uses whole matrices, which torch's cannot do with the shards of fsdp2; use ddp, or adamw"
    )
    assert sharding_problem(section_of({"name": "sgd", "fused": True}), "fsdp2") == (
        "optim.fused: torch has no fused sgd for the shards of fsdp2; remove it"
    )


def built_with_own_optimizer(strategy: str, section: OptimSection) -> str | None:
    """Return why an engine with this optimizer is refused, or None."""
    from distrain.config import UserError
    from distrain.optim import build_optimizer
    from distrain.parallel import BuildSpec, StrategySpec, build_strategy, open_world

    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Linear(5, 7)

    world = open_world("fp32", StrategySpec(strategy))
    plan = BuildSpec(
        model=model,
        optimizer=lambda built: build_optimizer(built, section),
        loss_sum=lambda built, index: built(torch.ones(2, 5)).sum(),
        micro_batch_size=2,
        accumulation=1,
        clip_norm=None,
        ema=None,
        sections={"": section},
    )
    try:
        build_strategy(world, plan)
    except UserError as error:
        return str(error)
    finally:
        world.close()
    return None


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "fsdp2"])
def test_an_own_optimizer_that_is_wrong_on_shards_is_refused(strategy: str) -> None:
    said = in_world(2, built_with_own_optimizer, strategy, section_of(own(OwnPart)))
    assert said[0] == said[1]
    if strategy == "ddp":
        assert said[0] is None
    else:
        assert said[0] is not None
        assert "use ddp" in said[0]


# --------------------------------------------------------------------------------------------------------------------
# In an engine


class OwnAdagrad(torch.optim.Adagrad):
    """A class of one's own that is torch's; another weight decay would show that torch's had taken its place."""

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0):
        super().__init__(params, lr=lr, weight_decay=2 * weight_decay)


STEPPED = [*VARIANTS, own(OwnAdagrad)]


def step_each(strategy: str) -> list[tuple[str, list[float]] | str]:
    """Return the class that steps, and the weights after three steps, for each optimizer; or why it is refused."""
    from distrain.config import UserError
    from distrain.optim import build_optimizer, set_lr
    from distrain.parallel import BuildSpec, StrategySpec, build_strategy, open_world

    generator = torch.Generator().manual_seed(3)
    batches = torch.randn(3, 4, 5, generator=generator)

    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 7, bias=False))

    def loss(built: Any, batch: Tensor) -> Tensor:
        return built(batch).square().sum()

    world = open_world("fp32", StrategySpec(strategy))
    found: list[tuple[str, list[float]] | str] = []
    for variant in STEPPED:
        groups = [] if variant["name"] == "rprop" else [{"params": "2.*", "lr_scale": 0.3, "weight_decay": 0.2}]
        # the two matrices in two groups; decayed, both
        section = section_of(variant | {"groups": groups})
        plan = BuildSpec(
            model=model,
            optimizer=lambda built, section=section: build_optimizer(built, section),  # type: ignore[misc]
            loss_sum=lambda built, index: loss(built, batches[0]),
            micro_batch_size=2,
            accumulation=1,
            clip_norm=1.0,
            ema=None,
            sections={"": section},
        )
        try:
            engine = build_strategy(world, plan)
        except UserError as error:
            found.append(str(error))
            continue
        engine.model.train()
        rows = 4 // world.world_size
        for batch in batches:
            set_lr(engine.optimizer, 0.05)
            with engine.micro_batch(last=True):
                value = loss(engine.wrapped, batch[rows * world.rank : rows * (world.rank + 1)])
                backward_and_apply(engine, value, torch.tensor(float(world.world_size)), clip_norm=1.0)
        with engine.unsharded():
            weights = torch.cat([parameter.detach().flatten() for parameter in engine.model.parameters()]).tolist()
        found.append((engine.effect()["optimizer"], weights))
    world.close()
    return found


@pytest.fixture(scope="module")
def stepped_alone() -> list[tuple[str, list[float]] | str]:
    return in_world(1, step_each, "single")[0]


# zero1 is zero2's class
@pytest.mark.parametrize("strategy", ["ddp", pytest.param("zero1", marks=pytest.mark.more), "zero2", "zero3", "fsdp2"])
def test_every_optimizer_steps_as_in_one_process_or_is_refused(
    stepped_alone: list[tuple[str, list[float]] | str], strategy: str
) -> None:
    first, second = in_world(2, step_each, strategy)
    refused = set()
    for variant, alone, one, other in zip(STEPPED, stepped_alone, first, second, strict=True):
        assert isinstance(alone, tuple)
        if isinstance(one, str):
            assert one == other
            assert variant_name(variant).partition("-")[0] in one
            if not unknown_to_older_torch(variant_name(variant), one):
                refused.add(variant_name(variant))
            continue
        assert one == other
        assert one[0] == alone[0]
        assert one[1] == pytest.approx(alone[1], rel=1e-4, abs=1e-5), variant_name(variant)
    expected = {
        "ddp": set(),
        "fsdp2": {*REFUSED, "adagrad-fused", "sgd-momentum-fused"},
    }
    assert refused == expected.get(strategy, REFUSED)
