"""A model that is sharded from the start has the initial weights of a single process, and few processes hold it."""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
from typing import Any

import pytest
import torch
from anonymous import Peak, anonymous
from logged import logged
from test_matrix import spec
from torch import Tensor, nn
from worlds import in_world

from distrain.config import UserError
from distrain.models import isolated_seed

ODD = [
    *(
        f"odd_models:{name}"
        for name in ("TiedHead", "TiedAcross", "TiedOut", "Buffered", "Scalars", "Empty", "Small", "Strided")
    ),
    *("odd_models:Listed", "odd_models:Single", "odd_constructors:Initialized", "odd_constructors:Computed"),
    *("odd_constructors:Teacher", "odd_constructors:Threaded"),
]
REFUSING = {
    "odd_constructors:Averaged": "model.mean would be another than on the CPU",
    "odd_constructors:Drawn": "model.features would be another than on the CPU",
    "odd_constructors:Chance": "model.scales['head'] would be another than on the CPU",
    "odd_constructors:Hidden": "model.shift.drawn would be another than on the CPU",
    "odd_constructors:Written": "TypeError: can't convert meta device type tensor to numpy",
    "odd_constructors:lazy": "on the meta device: its Lazy layers are sized by a sample",
}
"""What another process than the first cannot build on the meta device, and words of the reason."""


def built(name: str) -> nn.Module:
    module, _, kind = name.partition(":")
    with isolated_seed(11):
        model: nn.Module = getattr(importlib.import_module(module), kind)()
    return model


def digest(tensor: Tensor) -> str:
    values = tensor.detach().clone().contiguous().reshape(-1).view(torch.uint8)
    return f"{tuple(tensor.shape)} {tensor.dtype} {hashlib.sha256(values.numpy()).hexdigest()}"


def digests(model: nn.Module) -> dict[str, str]:
    return {
        name: digest(tensor)
        for name, tensor in (
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        )
    }


def initial(strategy: str, names: list[str], node_size: int) -> dict[str, tuple[Any, list[str]]]:
    """Return for each model the digests of its tensors, or why it is refused; and what was logged."""
    from distrain.parallel import BuildSpec, build_strategy, open_world

    local = {"LOCAL_RANK": int(os.environ["RANK"]) % node_size, "LOCAL_WORLD_SIZE": node_size}  # maybe several nodes
    os.environ.update({key: str(value) for key, value in local.items()})
    world = open_world("fp32", spec(strategy))
    points = torch.linspace(-1, 1, 20).reshape(4, 5)
    found: dict[str, tuple[Any, list[str]]] = {}
    try:
        for name in names:
            plan = BuildSpec(
                model=lambda name=name: built(name),  # type: ignore[misc]
                optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.0),
                loss_sum=lambda model, index: model(points).sum(),
                micro_batch_size=4,
                accumulation=1,
                clip_norm=None,
                ema=None,
            )
            with logged() as lines:
                try:
                    engine = build_strategy(world, plan)
                except UserError as error:
                    found[name] = (str(error), lines)
                    continue
            with engine.unsharded(), torch.no_grad():
                found[name] = (digests(engine.model), lines)
    finally:
        world.close()
    return found


@pytest.mark.parametrize(
    ("strategy", "world_size", "node_size"),
    [
        ("single", 1, 1),
        ("ddp", 2, 2),
        ("zero3", 3, 2),
        ("fsdp2", 3, 3),
        pytest.param("hsdp", 4, 2, marks=pytest.mark.more),
    ],
)
def test_initial_weights_are_those_of_one_process(strategy: str, world_size: int, node_size: int) -> None:
    names = [*ODD, *REFUSING]
    ranks = in_world(world_size, initial, strategy, names, node_size, timeout_s=300)
    for name in names:
        expected = digests(built(name))
        for rank, found in enumerate(ranks):
            got, lines = found[name]
            if strategy == "zero3" and name == "odd_models:Empty":
                assert "has no elements" in got
                continue
            assert got == expected, (name, rank)
            reasons = [line for line in lines if "built" in line]
            if rank == 0 and name in REFUSING and strategy in ("zero3", "fsdp2", "hsdp"):
                assert len(reasons) == 1
                assert reasons[0].startswith("model: each process builds it on the CPU")
                assert REFUSING[name] in reasons[0]
            else:
                assert not reasons, (name, reasons)


def growth() -> tuple[float, float, float]:
    """Return the MiB of a model, and by how much this process grew while it was built and when it was there."""
    from distrain.parallel import BuildSpec, build_strategy, open_world

    world = open_world("fp32", spec("fsdp2"))
    plan = BuildSpec(
        model=lambda: nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(32))),
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.0),
        loss_sum=lambda model, index: model(torch.ones(1, 1024)).sum(),
        micro_batch_size=1,
        accumulation=1,
        clip_norm=None,
        ema=None,
    )
    with Peak() as peak:
        engine = build_strategy(world, plan)
        after = anonymous() - peak.start
    size = sum(parameter.numel() * parameter.itemsize for parameter in engine.model.parameters())
    world.close()
    return size / 2**20, peak.most / 2**20, after / 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_process_holds_the_model_and_only_while_it_is_built() -> None:
    (size, most, after), (_, other, _) = in_world(2, growth)
    assert size > 120
    assert other < 0.5 * size + 32, "a shard, and what was in memory anyway"
    assert most < size + 32, "what was sent is let go of while the shards fill"
    assert after < 0.5 * size + 32


def cut(strategy: str, nodes: list[tuple[int, int]]) -> list[int]:
    from distrain.parallel import open_world

    first, size = nodes[int(os.environ["RANK"])]
    os.environ.update(LOCAL_RANK=str(int(os.environ["RANK"]) - first), LOCAL_WORLD_SIZE=str(size))
    world = open_world("fp32", spec(strategy))
    sources = list(world.sources)
    world.close()
    return sources


@pytest.mark.parametrize(
    ("nodes", "sources"),
    [([(0, 2), (0, 2), (2, 2), (2, 2)], [0, 0, 2, 2]), ([(0, 2), (1, 2), (1, 2), (2, 2)], [0, 1, 1, 0])],
    ids=["in blocks", "in turn"],
)
def test_each_rank_has_a_source_that_is_one(nodes: list[tuple[int, int]], sources: list[int]) -> None:
    assert in_world(4, cut, "ddp", nodes) == [sources] * 4
