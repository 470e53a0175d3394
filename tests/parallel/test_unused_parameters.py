"""What a pass without values finds: which parameters the forward pass uses only cast."""

from __future__ import annotations

import pytest
import torch
from odd_models import Mixed
from torch import Tensor, nn
from torch.nn import functional

from distrain.parallel.unused_parameters import cast_parameters

CPU = torch.device("cpu")


def loss_of(model: nn.Module) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        outputs = model(torch.linspace(-1, 1, 20).reshape(4, 5))
    return functional.cross_entropy(outputs.float(), torch.tensor([0, 1, 2, 0]))


@pytest.mark.parametrize(
    ("start", "cast"),
    [
        ("into", True),
        ("attend", True),
        ("recur.weight_ih", True),
        ("recur.weight_hh", False),  # with each time step
        ("slide", True),
        ("turned", True),  # through a view of all of it
        ("frozen", True),  # used twice, and without a gradient
        ("blocks.0.up", True),
        ("head", True),
        ("blocks.0.norm", False),
        ("embed", False),
        ("twice", False),  # its gradient is a sum
        ("read.weight", False),
        ("sliced", False),
    ],
)
def test_what_is_only_cast(start: str, cast: bool) -> None:
    model = Mixed().to("meta")
    found = cast_parameters(model, loss_of, CPU, torch.bfloat16)
    assert found is not None
    names = [name for name, _ in model.named_parameters() if name.startswith(start)]
    assert names
    assert {name in found for name in names} == {cast}
    assert all(parameter.is_meta for parameter in model.parameters()), "left as it was"


def test_another_dtype_is_another_use() -> None:
    assert cast_parameters(Mixed(), loss_of, CPU, torch.float16) == set()


def test_a_loss_that_reads_a_weight_uses_it() -> None:
    def decayed(model: nn.Module) -> Tensor:
        return loss_of(model) + model.head.weight.square().sum()

    found = cast_parameters(Mixed(), decayed, CPU, torch.bfloat16)
    assert found is not None
    assert "head.weight" not in found
    assert "head.bias" in found


class Branching(Mixed):
    """Takes a branch by what it computes."""

    def forward(self, x: Tensor) -> Tensor:
        outputs = super().forward(x)
        return outputs if outputs.sum() > 0 else -outputs


def test_of_a_model_that_branches_on_values_nothing_is_found() -> None:
    model = Branching()
    before = dict(model.named_parameters())
    assert cast_parameters(model, loss_of, CPU, torch.bfloat16) is None
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
