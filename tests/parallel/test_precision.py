"""What `train.precision` means: what is computed on each machine, and the scale of the loss under fp16."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from logged import logged
from torch import Tensor, nn

from distrain.config import UserError
from distrain.parallel.precision import LossScale, MixedPrecision, float32_products, load_scales, resolve

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def switches_as_before() -> Iterator[None]:
    yield
    resolve("fp32", CPU)


# --------------------------------------------------------------------------------------------------------------------
# What it is, by machine


class Card:
    """A GPU as torch describes it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Some GPU")
        # torch says that older ones have bf16 too, which is then emulated
        monkeypatch.setattr(
            torch.cuda,
            "is_bf16_supported",
            lambda including_emulation=True: including_emulation or capability >= (8, 0),
        )


@pytest.mark.parametrize(
    ("precision", "autocast", "weights", "scaled"),
    [
        ("fp32", None, torch.float32, False),
        ("bf16", torch.bfloat16, torch.float32, False),
        ("fp16", torch.float16, torch.float32, True),
        ("fp64", None, torch.float64, False),
    ],
)
def test_what_a_cpu_can(precision: str, autocast: torch.dtype | None, weights: torch.dtype, scaled: bool) -> None:
    found = resolve(precision, CPU)
    assert (found.name, found.autocast, found.weights, found.scaled) == (precision, autocast, weights, scaled)
    assert bool(found.note) == (precision in ("bf16", "fp16"))
    assert set(float32_products().values()) == {"ieee"}


def test_auto_is_fp32_on_a_cpu() -> None:
    found = resolve("auto", CPU)
    assert (found.name, found.autocast) == ("fp32", None)
    assert found.note == "auto: a CPU has no fast bf16"


@pytest.mark.parametrize(
    ("capability", "precision", "name"),
    [
        ((9, 0), "auto", "bf16"),
        ((8, 0), "auto", "bf16"),
        ((7, 5), "auto", "fp32"),  # torch would emulate bf16 there
        ((8, 0), "tf32", "tf32"),
        ((7, 0), "fp16", "fp16"),
        ((7, 0), "bf16", "bf16"),
        ((9, 0), "fp32", "fp32"),
    ],
)
def test_what_gpus_can(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], precision: str, name: str) -> None:
    Card(monkeypatch, capability)
    found = resolve(precision, GPU)
    assert found.name == name
    assert set(float32_products().values()) == {"tf32" if name == "tf32" else "ieee"}
    slow = "Some GPU of compute capability 7.0 computes bf16 no faster than fp32, and mostly slower"
    assert (found.note == slow) == ((capability, precision) == ((7, 0), "bf16"))


def test_tf32_is_refused_where_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"tf32 needs an NVIDIA GPU of .* and this is a CPU; take fp32"):
        resolve("tf32", CPU)
    Card(monkeypatch, (7, 5))
    with pytest.raises(UserError, match=r"this is Some GPU of compute capability 7\.5; take fp32"):
        resolve("tf32", GPU)


def test_fp8_reports_all_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelerate.utils.imports.is_torchao_available", lambda: False)
    with pytest.raises(UserError, match=r"(?s)capability 8\.9 .* this is a CPU; and the package torchao.*pip install"):
        resolve("fp8", CPU)
    Card(monkeypatch, (9, 0))
    with pytest.raises(UserError, match=r"fp8 needs the package torchao.*Take bf16"):
        resolve("fp8", GPU)
    monkeypatch.setattr("accelerate.utils.imports.is_torchao_available", lambda: True)
    assert resolve("fp8", GPU) == MixedPrecision("fp8", torch.bfloat16, torch.float32, scaled=False)
    Card(monkeypatch, (8, 6))
    with pytest.raises(UserError, match=r"needs a GPU of compute capability 8\.9 .*capability 8\.6\. Take bf16"):
        resolve("fp8", GPU)


def test_the_switches_agree_with_the_older_ones(monkeypatch: pytest.MonkeyPatch, recwarn: Any) -> None:
    """torch.compile reads the older ones, and torch raises where the two kinds do not say the same."""
    Card(monkeypatch, (8, 0))
    for precision, allowed in (("tf32", True), ("fp32", False), ("tf32", True), ("bf16", False)):
        resolve(precision, GPU)
        assert torch.backends.cuda.matmul.allow_tf32 == allowed
        assert torch.backends.cudnn.allow_tf32 == allowed
        assert torch.get_float32_matmul_precision() == ("high" if allowed else "highest")
    assert [str(each.message) for each in recwarn if "tf32" in str(each.message).lower()] == []


def test_switches_that_something_else_sets_are_found() -> None:
    mixed = resolve("fp32", CPU)
    mixed.check_kept()
    torch.set_float32_matmul_precision("high")
    with pytest.raises(UserError, match=r"train.precision is fp32, .* set torch to: matmul tf32\. Take"):
        mixed.check_kept()


# --------------------------------------------------------------------------------------------------------------------
# The forward pass


class Layers(nn.Module):
    """One of each kind of layer that most models are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(9, 8)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.batch_norm = nn.BatchNorm1d(8)
        self.gru = nn.GRU(8, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        y = self.norm(x)
        x = x + self.attention(y, y, y)[0]
        x = x + torch.relu(self.batch_norm(self.conv(x.transpose(1, 2)))).transpose(1, 2)
        return self.head(self.gru(x)[0])


@pytest.mark.parametrize(("precision", "eps"), [("fp32", 0.0), ("bf16", 2.0**-7), ("fp16", 2.0**-9), ("fp64", 1e-6)])
def test_usual_layers_go_forward_and_backward(precision: str, eps: float) -> None:
    torch.manual_seed(0)
    model = Layers()
    reference = copy.deepcopy(model)
    mixed = resolve(precision, CPU)
    with logged() as said:
        mixed.fit(model, CPU)
    assert said == []
    model.to(mixed.weights)
    tokens = torch.randint(0, 9, (4, 6))
    with mixed.context("cpu"):
        outputs = model(tokens)
    assert outputs.dtype == (mixed.autocast or mixed.weights)
    expected = reference(tokens)
    outputs.float().square().mean().backward()
    expected.square().mean().backward()
    assert (outputs.float() - expected).abs().max() <= 4 * eps * expected.abs().max()
    for (name, parameter), (_, other) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        assert parameter.grad is not None
        assert other.grad is not None
        assert parameter.grad.dtype == mixed.weights, name
        assert (parameter.grad.float() - other.grad).norm() <= 0.02 + 16 * eps * other.grad.norm(), name


def test_a_cast_is_kept_or_not() -> None:
    layer = nn.Linear(4, 4)
    casts = []
    for cache in (True, False):
        with resolve("bf16", CPU).context("cpu", cache=cache), torch.profiler.profile() as profile:
            layer(layer(torch.ones(1, 4, dtype=torch.bfloat16)))
        casts.append(sum(event.count for event in profile.key_averages() if event.key == "aten::_to_copy"))
    assert casts == [2, 4]  # of the weight and the bias, once or for each use


class Recurrent(nn.Module):
    """An LSTM that gets fp32 inputs, also packed, and its state from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 6, num_layers=2, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor, packed: bool) -> Tensor:
        state = (torch.zeros(4, len(x), 6), torch.zeros(4, len(x), 6))
        if packed:
            packed_x = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([3, 2]), batch_first=True)
            return nn.utils.rnn.pad_packed_sequence(self.lstm(packed_x, state)[0], batch_first=True)[0]
        return self.lstm(x, state)[0]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_lstms_in_half_precision(precision: str, packed: bool) -> None:
    torch.manual_seed(0)
    model = Recurrent()
    mixed = resolve(precision, CPU)
    inputs = torch.randn(2, 3, 4)
    expected = model(inputs, packed)
    mixed.fit(model, CPU)
    with mixed.context("cpu"):
        outputs = model(inputs, packed)
    outputs.float().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    torch.testing.assert_close(outputs.float(), expected, atol=0.01, rtol=0.01)
    torch.testing.assert_close(model(inputs, packed), expected)  # without autocast nothing is cast


def test_fp8_changes_the_layers_and_not_the_weights() -> None:
    pytest.importorskip("torchao", reason="fp8 is computed by torchao")
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(4)))
    reference = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    mixed = MixedPrecision("fp8", torch.bfloat16, torch.float32, scaled=False)
    with logged() as said:
        mixed.fit(model, CPU)
    assert said == ["fp8 in 2 of 4 linear layers; the rest, and all other layers, in bf16"]
    assert list(model.state_dict()) == list(reference.state_dict())
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    inputs = torch.randn(64, 32)
    with mixed.context("cpu"):
        outputs, expected = model(inputs).float(), reference(inputs).float()
    error = (outputs - expected).abs().max() / expected.abs().max()
    assert 0.005 < error < 0.15  # three bits of mantissa
    with pytest.raises(UserError, match="of this model's 2 there are none; take bf16"):
        mixed.fit(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)), CPU)


# --------------------------------------------------------------------------------------------------------------------
# The scale of the loss


def trajectory(overflows: list[bool], start: float = 65536.0) -> list[tuple[float, int]]:
    """Return torch's own (scale, growth tracker) after each step."""
    scaler = torch.amp.GradScaler("cpu", init_scale=start)
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    steps = []
    for overflow in overflows:
        loss = scaler.scale(parameter.sum())
        loss.backward()
        assert parameter.grad is not None
        if overflow:
            parameter.grad.fill_(torch.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        steps.append((scaler.get_scale(), scaler._get_growth_tracker()))
    return steps


@pytest.mark.parametrize(
    ("overflows", "start"),
    [
        ([False] * 4001, 65536.0),
        ([True, True, *[False] * 1999, True, *[False] * 2001, True], 65536.0),
        ([False] * 2001, 2.0**127),  # no further than fp32 goes
    ],
)
def test_the_scale_follows_torch_s_own_rule(overflows: list[bool], start: float) -> None:
    scale = LossScale(start)
    found = []
    for overflow in overflows:
        scale.update(overflow)
        found.append((scale.scale, scale.good_steps))
    assert found == trajectory(overflows, start)


def test_a_loss_scale_is_restored_from_its_state() -> None:
    overflows = [True, *[False] * 1500, True, *[False] * 2500]
    straight = LossScale()
    for overflow in overflows:
        straight.update(overflow)
    stopped = LossScale()
    for overflow in overflows[:1777]:
        stopped.update(overflow)
    resumed = LossScale()
    resumed.load(stopped.state())
    for overflow in overflows[1777:]:
        resumed.update(overflow)
    assert resumed.state() == straight.state() == {"scale": 32768.0, "good_steps": 500}


@pytest.mark.parametrize("state", [{}, {"scale": 0.0, "good_steps": 1}, {"scale": float("nan"), "good_steps": 1}])
def test_a_state_that_cannot_be_is_refused(state: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="the stored scale of the loss is"):
        LossScale().load(state)


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        (None, {"": 65536.0}),
        ({"scale": 8.0, "good_steps": 3}, {"": 8.0}),
        ({"scale": 8.0, "good_steps": 3}, {"scale": 8.0, "other": 8.0}),
        ({"scale": {"scale": 4.0, "good_steps": 0}}, {"scale": 4.0, "other": 65536.0}),
        ({"d": {"scale": 4.0, "good_steps": 0}}, {"": 65536.0}),
    ],
    ids=["none", "one", "one for each", "by optimizer", "by optimizers that are gone"],
)
def test_scales_are_those_of_the_checkpoint(stored: dict | None, expected: dict[str, float]) -> None:
    scales = {name: LossScale() for name in expected}
    load_scales(scales, stored)
    assert {name: scale.scale for name, scale in scales.items()} == expected


def test_gradients_that_are_never_finite_end_the_run() -> None:
    scale = LossScale()
    for _ in range(26):
        scale.update(True)
    with pytest.raises(UserError, match=r"not finite whatever the loss is scaled by.*Take train\.precision bf16"):
        scale.update(True)
