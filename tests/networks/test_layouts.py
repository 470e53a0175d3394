"""Whether a model computes on images with the channels last."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from distrain.networks.layouts import channels_last_problem, lay_channels_last


class Net(nn.Module):
    """Flattens what a convolution gives in one of several ways."""

    def __init__(self, how: str):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.conv = nn.Conv2d(3, 4, 3)
        self.up = nn.ConvTranspose2d(4, 4, 2)
        self.head = nn.Linear(4 * 49, 5)
        self.how, self.calls = how, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.up(self.conv(self.norm(x)))
        ways = {
            "view": lambda: x.view(len(x), -1),
            "flatten": lambda: x.flatten(1),
            "reshape": lambda: x.reshape(2, -1),
        }
        return self.head(ways[self.how]())


@pytest.mark.parametrize(("how", "problem"), [("flatten", None), ("reshape", None), ("view", "view size is not")])
def test_a_model_is_tried_and_not_changed(how: str, problem: str | None) -> None:
    model = Net(how)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = channels_last_problem(model, (3, 8, 8), torch.device("cpu"), torch.autocast("cpu", dtype=torch.bfloat16))
    assert (found is None) if problem is None else (found is not None and problem in found)
    assert model.calls == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.is_contiguous() for parameter in model.parameters())


def test_weights_of_convolutions_alone_are_laid_out() -> None:
    model = Net("flatten")
    lay_channels_last(model)
    laid = {name for name, p in model.named_parameters() if not p.is_contiguous()}
    assert laid == {"conv.weight", "up.weight"}
