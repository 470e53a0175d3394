"""A model without its weights has, one at a time, the weights of an ordinary build: to the bit."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import os
import random
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils as U
import torchvision
from logged import logged
from places import IMPORTABLE
from safetensors.torch import save_file
from test_models import BART, BERT, GPT2, IMAGES, PAIRS, TEXT, recipe_of
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from distrain.config import UserError
from distrain.datasets.base import DataMeta
from distrain.models import build_model, defer_model, isolated_seed, tied_names
from distrain.networks.deferred import SMALL, Deferred, defer

Build = Callable[[Callable[[str], None]], nn.Module]


def world_state() -> list[Any]:
    """What neither building nor computing weights may change."""
    drawn = np.random.get_state()
    return [torch.get_rng_state().tolist(), random.getstate(), drawn[1].tolist(), drawn[2], torch.get_default_dtype()]


def assert_same(a: Tensor, b: Tensor, name: str) -> None:
    assert a.dtype == b.dtype, name
    assert a.shape == b.shape, name
    if b.numel() * b.itemsize == b.untyped_storage().nbytes():
        assert a.stride() == b.stride(), name
    assert a.device.type == b.device.type == "cpu", name
    # as bytes: NaN is equal to itself, and -0 is not 0
    if a.is_conj() or b.is_conj():
        a, b = a.resolve_conj(), b.resolve_conj()
    assert torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)), name


def plain_tensors(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for prefix, module in model.named_modules():
        for name, value in vars(module).items():
            for place, each in enumerate(value if isinstance(value, list) else [value]):
                if isinstance(each, Tensor) and not isinstance(each, nn.Parameter):
                    found[f"{prefix}.{name}.{place}"] = each
    return found


def assert_equals(deferred: Deferred, ordinary: nn.Module) -> None:
    """The structure is that of `ordinary`, its parameters are nowhere, and the values are those of `ordinary`."""
    model, expected = deferred.model, dict(ordinary.named_parameters())
    assert {name: type(p) for name, p in model.named_parameters()} == {name: type(p) for name, p in expected.items()}
    for name, parameter in model.named_parameters():
        assert parameter.is_meta, name
        assert parameter.is_leaf
        assert (parameter.shape, parameter.dtype) == (expected[name].shape, expected[name].dtype), name
        assert parameter.requires_grad == expected[name].requires_grad, name
    assert tied_names(model) == tied_names(ordinary)
    modules = zip(model.named_modules(), ordinary.named_modules(), strict=True)
    assert all(
        (a[0], type(a[1]).__name__, a[1].training) == (b[0], type(b[1]).__name__, b[1].training) for a, b in modules
    )
    for (name, buffer), (other, wanted) in zip(model.named_buffers(), ordinary.named_buffers(), strict=True):
        assert name == other
        assert_same(buffer, wanted, name)
    before = world_state()
    found = dict(deferred.values())
    assert list(found) == list(expected)
    for name, value in found.items():
        assert_same(value, expected[name].detach(), name)
        assert not value.requires_grad
    for value in found.values():
        value.zero_()  # the caller's own: what comes next is not changed
    for name, value in deferred.values():
        assert_same(value, expected[name].detach(), name)
    assert world_state() == before


def check(make: Callable[[], nn.Module], small: int, *, why_full: str | None = None) -> Deferred:
    """Assert that `make` gives the same with and without its weights, and that they were truly left out."""

    def build() -> nn.Module:
        with isolated_seed(7):
            return make()

    before = world_state()
    with logged() as said:
        deferred = defer(build, small=small)
    assert world_state() == before
    assert deferred.is_full == (why_full is not None), said
    assert len(said) == (why_full is not None)
    if why_full is not None:
        assert said[0].startswith("model: built in full on the CPU, because ")
        assert why_full in said[0]
    ordinary = build()
    assert_equals(deferred, ordinary)
    if not deferred.is_full:
        aliases = {t.untyped_storage().data_ptr() for t in ordinary.parameters()}
        for name, tensor in plain_tensors(ordinary).items():
            if tensor.untyped_storage().data_ptr() not in aliases:
                assert_same(plain_tensors(deferred.model)[name].detach(), tensor.detach(), name)
    return deferred


SIZES = pytest.mark.parametrize("small", [SMALL, 0])
"""Small tensors as ever, and nothing as ever."""

# --------------------------------------------------------------------------------------------------------------------
# Models by name

SENTENCES = DataMeta(input_shape=(6,), vocab_size=900, pad_id=0, num_classes=3)
LAZY = {"name": "sequential", "layers": [{"LazyConv2d": [64, 3]}, "LazyBatchNorm2d", "Flatten", {"LazyLinear": 100}]}
NETWORKS: list[tuple[Any, DataMeta, str]] = [
    ({"name": "mlp", "hidden": [256, 256], "norm": "batch"}, IMAGES, "classification"),
    ("cnn", IMAGES, "classification"),
    *[({"name": "rnn", "kind": kind, "bidirectional": True}, SENTENCES, "classification") for kind in ("lstm", "gru")],
    *[
        (
            {"name": "gpt", "n_layer": 2, "n_head": 2, "d_model": 160, "positions": positions, "tied": tied},
            TEXT,
            "language_modeling",
        )
        for positions, tied in (("learned", True), ("rotary", False))
    ],
    *[({"name": "seq2seq", "kind": kind}, PAIRS, "seq2seq") for kind in ("gru", "transformer")],
    (LAZY, IMAGES, "classification"),
    ({"name": "sequential", "layers": ["Flatten", {"Linear": [64, 300]}]}, IMAGES, "classification"),
    ("resnet18", IMAGES, "classification"),
]


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize(("model", "meta", "task"), NETWORKS, ids=[str(case[0])[:60] for case in NETWORKS])
@SIZES
def test_networks(model: Any, meta: DataMeta, task: str, precision: str, small: int) -> None:
    recipe = recipe_of(model, task, precision=precision)
    with logged() as said:
        deferred = defer_model(recipe, meta, small=small)
    assert not deferred.is_full
    with logged() as expected:
        ordinary = build_model(recipe, meta)
    with logged() as again:
        assert_equals(deferred, ordinary)
    assert again == []
    assert said == expected
    assert deferred.model.training


TORCHVISION = [
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3",
    "maxvit_t", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "mvit_v1_b", "r3d_18", "regnet_x_400mf", "resnet50",
    "s3d", "shufflenet_v2_x0_5", "squeezenet1_0", "swin3d_t", "swin_t", "swin_v2_t", "vit_b_16",
    "deeplabv3_mobilenet_v3_large", "fcn_resnet50", "lraspp_mobilenet_v3_large",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name: str) -> None:
    assert name in torchvision.models.list_models()
    recipe, meta = recipe_of(name), DataMeta(input_shape=(3, 224, 224), num_classes=10)
    deferred = defer_model(recipe, meta)
    assert not deferred.is_full
    assert_equals(deferred, build_model(recipe, meta))


SHALLOW = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 160, "intermediate_size": 256}
TRANSFORMERS: list[tuple[str, dict[str, Any]]] = [
    ("AutoModelForCausalLM", GPT2 | {"n_embd": 160}),
    ("AutoModelForCausalLM", {"model_type": "llama", **SHALLOW}),
    ("AutoModelForCausalLM", {"model_type": "mixtral", **SHALLOW, "num_key_value_heads": 2, "num_local_experts": 3}),
    ("AutoModelForCausalLM", {"model_type": "mamba", "num_hidden_layers": 2, "hidden_size": 160}),
    ("AutoModelForMaskedLM", BERT | {"hidden_size": 160}),
    ("AutoModelForSeq2SeqLM", {"model_type": "t5", "num_layers": 2, "num_heads": 2, "d_model": 160, "d_ff": 200}),
    ("AutoModelForSeq2SeqLM", BART | {"d_model": 160}),
    ("AutoModelForImageClassification", {"model_type": "vit", **SHALLOW}),
    ("AutoModelForImageClassification", {"model_type": "swin", "embed_dim": 48, "depths": [1, 1], "num_heads": [3, 6]}),
    ("AutoModel", {"model_type": "wav2vec2", **SHALLOW, "num_conv_pos_embedding_groups": 4}),
]


@pytest.mark.parametrize(("kind", "config"), TRANSFORMERS, ids=[config["model_type"] for _, config in TRANSFORMERS])
@SIZES
def test_transformers(kind: str, config: dict[str, Any], small: int) -> None:
    pytest.importorskip("transformers")
    recipe = recipe_of({"name": f"transformers:{kind}", "config": config}, "language_modeling")
    deferred = defer_model(recipe, TEXT, small=small)
    assert not deferred.is_full
    assert_equals(deferred, build_model(recipe, TEXT))


def test_transformers_do_not_shard_by_themselves() -> None:
    pytest.importorskip("deepspeed")
    integration = pytest.importorskip("transformers.integrations.deepspeed")
    recipe = recipe_of({"name": "transformers:AutoModelForCausalLM", "config": GPT2}, "language_modeling")
    expected = build_model(recipe, TEXT)
    zero3 = integration.HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    assert integration.is_deepspeed_zero3_enabled()
    try:
        for name, parameter in build_model(recipe, TEXT).named_parameters():
            assert_same(parameter.detach(), expected.get_parameter(name).detach(), name)
        assert_equals(defer_model(recipe, TEXT, small=0), expected)
        assert integration.is_deepspeed_zero3_enabled()
    finally:
        integration.unset_hf_deepspeed_config()
        del zero3


# --------------------------------------------------------------------------------------------------------------------
# What constructors do

W, H = 200, 150


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape or (W, H)))


@torch.no_grad()
def no_grad(module: nn.Module, *inputs: Tensor) -> Tensor:
    return module(*inputs)[0]


def set_at(w: Tensor, at: Any, value: Any) -> None:
    w.data.normal_()
    w.data[at] = value


INITS: dict[str, Callable[[Tensor], Any]] = {
    "uniform": lambda w: nn.init.uniform_(w, -1, 1),
    "normal": nn.init.normal_,
    "normal_with_generator": lambda w: nn.init.normal_(w, generator=torch.Generator().manual_seed(3)),
    "trunc_normal": lambda w: nn.init.trunc_normal_(w, std=0.02),
    "trunc_normal_that_rejects": lambda w: nn.init.trunc_normal_(w, std=1.0, a=-1.0, b=1.0),
    "trunc_normal_far_out": lambda w: nn.init.trunc_normal_(w, std=1.0, a=1.5, b=2.0),
    "constant": lambda w: nn.init.constant_(w, 3.0),
    "ones": nn.init.ones_,
    "zeros": nn.init.zeros_,
    "eye": nn.init.eye_,
    "xavier_uniform": nn.init.xavier_uniform_,
    "xavier_normal": nn.init.xavier_normal_,
    "kaiming_uniform": lambda w: nn.init.kaiming_uniform_(w, a=math.sqrt(5)),
    "kaiming_normal": nn.init.kaiming_normal_,
    "orthogonal": nn.init.orthogonal_,
    "sparse": lambda w: nn.init.sparse_(w, 0.3),
    "bernoulli": lambda w: w.data.bernoulli_(0.3),
    "bernoulli_by_probability": lambda w: w.data.bernoulli_(torch.rand(W, H)),
    "exponential": lambda w: w.data.exponential_(),
    "rows": lambda w: w.data.zero_()[:50].normal_(),
    "columns": lambda w: w.data.fill_(1)[:, 3:9].uniform_(),
    "diagonal": lambda w: w.data.normal_().diagonal().fill_(2.0),
    "padding": lambda w: w.data.normal_()[3].zero_(),
    "transposed": lambda w: w.data.t().normal_(),
    "by_index": lambda w: w.data.zero_().index_fill_(0, torch.randperm(W)[:20], 1.0),
    "by_mask": lambda w: w.data.normal_()[torch.rand(W, H) > 0.5],
    **{
        f"set_{name}": functools.partial(set_at, at=at, value=value)
        for name, at, value in (
            ("a_row", 3, 1.0),
            ("rows_of_a_list", [1, 5, 3], 2.0),
            ("rows_of_a_tensor", torch.tensor([1, 5, 3]), torch.arange(float(H))),
            ("rows_of_an_array", np.array([1, 5, 3]), 3.0),
            ("rows_of_a_mask", torch.arange(W) % 3 == 0, 4.0),
            ("a_row_of_a_list", ([2], [3]), 2.0),
            ("columns", (slice(None), [1, 2]), torch.ones(W, 2)),
            ("places", (torch.tensor([1, 2]), torch.tensor([3, 4])), torch.tensor([5.0, 6.0])),
            ("a_place", (1, 2), torch.tensor(5.0)),
            ("everything", ..., torch.arange(float(H))),
            ("every_other", (slice(None, None, 2), slice(1, 50)), 8),
        )
    },
    "got_by_list": lambda w: w.data.zero_()[:3].add_(torch.rand(W, H)[[5, 7, 9]]),
    "got_by_array": lambda w: w.data.zero_()[:3].add_(torch.rand(W, H)[np.array([5, 7, 9])]),
    "got_by_tensor": lambda w: w.data.zero_()[:3].add_(torch.rand(W, H)[torch.tensor([5, 7, 9])]),
    "set_by_mask": lambda w: w.data.normal_().masked_fill_(torch.rand(W, H) > 0.5, 0.0),
    "scaled_by_itself": lambda w: w.data.normal_().div_(w.data.norm(dim=1, keepdim=True)),
    "scaled_by_its_sum": lambda w: w.data.uniform_().mul_(1 / w.data.sum().item()),
    "numpy_values": lambda w: w.data.copy_(torch.from_numpy(np.random.rand(W, H))),
    "python_values": lambda w: w.data.fill_(random.random()),
    "sines": lambda w: w.data.copy_(torch.outer(torch.arange(W), torch.arange(H) / H).sin()),
    "small_row": lambda w: w.data.zero_()[5].copy_(torch.arange(H)),
    "from_a_small_one_that_changes": lambda w: add_while_changing(w.data.zero_(), torch.ones(H)),
    "sorted": lambda w: w.data.copy_(torch.randn(W, H).sort(dim=1).values),
    "cat": lambda w: w.data.copy_(torch.cat([torch.randn(W, 50), torch.randn(W, H - 50)], dim=1)),
    "dropout": lambda w: w.data.copy_(F.dropout(torch.ones(W, H))),
    "repeated": lambda w: w.data.copy_(torch.randn(H).repeat(W, 1)),
    "expanded": lambda w: w.data.copy_(torch.randn(1, H).expand(W, H)),
    "convolved": lambda w: w.data.copy_(F.conv1d(torch.randn(W, 1, H), torch.ones(1, 1, 3), padding=1)[:, 0]),
    "out": lambda w: torch.randn(W, H, out=w.data),
    "add_out": lambda w: torch.add(w.data.normal_(), torch.rand(W, H), out=w.data),
    "foreach": lambda w: torch._foreach_mul_([w.data.normal_()], 2.0),
    "where": lambda w: w.data.copy_(torch.where(torch.rand(W, H) > 0.3, w.data.normal_(), torch.tensor(7.0))),
    "if_on_cpu": lambda w: w.data.normal_() if w.device.type == "cpu" and not w.is_meta and w.is_cpu else w,
    "on_its_device": lambda w: w.data.copy_(torch.randn(W, H, device=w.device)),
    "moved_there": lambda w: w.data.normal_().to("cpu").mul_(2.0),
    "like_it": lambda w: w.data.copy_(torch.randn_like(w.double()) + w.new_zeros(W, H).to(w)),
    "as_it_is": lambda w: w.data.copy_(torch.rand(W, H).double().type_as(w)),
    "new_tensor": lambda w: w.data.copy_(w.new_tensor(np.random.rand(W, H))),
    "recurrent": lambda w: w.data.copy_(no_grad(nn.LSTM(30, H, 2, dropout=0.5), torch.rand(W, 30))),
    "attention": lambda w: w.data.copy_(no_grad(nn.MultiheadAttention(H, 5, dropout=0.5), *[torch.rand(W, H)] * 3)),
    "typed": lambda w: w.data.fill_(len(w.type())).add_(torch.rand(W, H).type("torch.DoubleTensor")),
    "random_samples": lambda w: w.data.copy_(torch.distributions.Beta(2.0, 3.0).sample((W, H))),
    "gathered": lambda w: w.data.copy_(w.data.normal_().gather(1, torch.randint(0, H, (W, H)))),
    "lists": lambda w: w.data.fill_(sum(w.data.normal_().tolist()[3])),
    "a_question": lambda w: w.data.mul_(2) if w.data.normal_().sum() > 0 else w.data.mul_(3),
    "seeded_again": lambda w: (torch.manual_seed(3), w.data.normal_()),
    "state_kept": lambda w: (s := torch.get_rng_state(), w.data.normal_(), torch.set_rng_state(s), w.data.uniform_()),
}  # fmt: skip


def add_while_changing(w: Tensor, small: Tensor) -> None:
    for _ in range(3):
        w.add_(small)
        small.mul_(2)


@pytest.mark.parametrize("init", INITS)
@SIZES
def test_initialisers(init: str, small: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before = nn.Linear(W, H)
            self.weight = parameter()
            nn.init.zeros_(self.weight)
            INITS[init](self.weight)
            self.after = nn.Linear(W, H)

    check(Net, small)


def test_every_initialiser_of_torch_is_tried() -> None:
    names = {name[:-1] for name in dir(nn.init) if name.endswith("_") and not name.startswith("_")}
    assert names - {"dirac"} <= set(INITS)


class Net(nn.Module):
    """A module that `add` fills."""

    def __init__(self, add: Callable[[Any], Any]):
        super().__init__()
        add(self)


def tie(net: Any) -> None:
    net.tokens = nn.Embedding(300, 64, padding_idx=3)
    net.head = nn.Linear(64, 300, bias=False)
    net.head.weight = net.tokens.weight


def tie_data(net: Any) -> None:
    net.a, net.b = nn.Linear(W, H), nn.Linear(W, H)
    net.b.weight.data = net.a.weight.data


def views_of_one(net: Any) -> None:
    flat = torch.randn(100, 1000)
    net.rows = nn.ParameterList(row.view(10, 100) for row in flat)
    net.columns = nn.Parameter(torch.randn(300, 200).t())
    net.part = nn.Parameter(torch.randn(300, 200)[50:250, 10:])


def initialised_last(net: Any) -> None:
    net.layers = nn.Sequential(nn.Linear(W, H), nn.Conv2d(32, 64, 3), nn.BatchNorm2d(64), nn.LSTM(64, 64, 2))
    net.apply(lambda module: nn.init.normal_(module.weight) if hasattr(module, "weight") else None)
    for name, each in net.named_parameters():
        if name.endswith("weight") and each.dim() == 2:
            nn.init.trunc_normal_(each, std=0.02 / math.sqrt(8))


def dtypes(net: Any) -> None:
    net.bf16 = nn.Parameter(torch.randn(W, H).to(torch.bfloat16))
    net.fp64 = nn.Parameter(torch.rand(W, H).double())
    net.complex = nn.Parameter(torch.randn(W, H, dtype=torch.cfloat).conj())
    net.there_and_back = nn.Linear(W, H).half().float()
    torch.set_default_dtype(torch.float64)
    net.by_default = nn.Linear(W, H)
    torch.set_default_dtype(torch.float32)


def buffers(net: Any) -> None:
    net.register_buffer("mask", torch.full((W, W), -math.inf).triu(1))
    net.register_buffer("rows", net.mask[:50])
    net.register_buffer("drawn", torch.randn(W, H), persistent=False)
    net.weight = nn.Parameter(torch.randn(W, H))
    net.register_buffer("first", net.weight.detach().clone())
    net.register_buffer("average", torch.zeros(H).copy_(net.weight.detach().mean(0)))
    net.plain, net.several = torch.randn(W, H), [torch.rand(W, H), torch.zeros(3)]


def parametrized(net: Any) -> None:
    net.spectral = parametrizations.spectral_norm(nn.Linear(W, H))
    net.weighted = parametrizations.weight_norm(nn.Conv2d(32, 64, 3))
    net.orthogonal = parametrizations.orthogonal(nn.Linear(W, H))


def normed_as_of_old(net: Any) -> None:
    net.weighted = U.weight_norm(nn.Linear(W, H))
    net.spectral = U.spectral_norm(nn.Linear(W, H))


def layers_of_torch(net: Any) -> None:
    net.attention = nn.MultiheadAttention(64, 4, kdim=32, vdim=32)
    net.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128), 3, enable_nested_tensor=False)
    net.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(64, 4, 128), 2)
    net.lstm = nn.LSTM(64, 64, 2, bidirectional=True, proj_size=32)
    net.bilinear = nn.Bilinear(30, 40, 50)
    net.copied = copy.deepcopy(net.encoder)
    net.conv = nn.ConvTranspose2d(32, 64, 3).to(memory_format=torch.channels_last)
    nn.init.dirac_(net.conv.weight)


def lazily(net: Any) -> None:
    net.layers = nn.Sequential(nn.LazyConv2d(128, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(300))
    net.layers.eval()(torch.zeros(2, 3, 16, 16))
    net.train()


def from_others(net: Any) -> None:
    a, b = nn.Linear(W, H), nn.Linear(W, H)
    net.joined = nn.Parameter(torch.cat([a.weight, 2 * b.weight]).detach())
    net.mean = nn.Parameter(((a.weight + b.weight) / 2).detach())
    net.product = nn.Parameter((a.weight @ b.weight.t()).detach())
    net.standard = nn.Parameter(((net.mean - net.mean.mean()) / net.mean.std()).detach())
    net.chosen = nn.Parameter(net.mean[net.mean > 0].detach())
    net.first, net.second = map(nn.Parameter, torch.linalg.qr(a.weight.detach()))
    net.averaged = copy.deepcopy(a).requires_grad_(False)
    with torch.no_grad():
        for mine, other in zip(net.averaged.parameters(), b.parameters(), strict=True):
            mine.mul_(0.9).add_(other, alpha=0.1)
    net.loaded = nn.Linear(W, H)
    net.loaded.load_state_dict(a.state_dict())
    net.outside = nn.Parameter(torch.tensor(np.random.rand(W, H)))


def through_meta(net: Any) -> None:
    net.skipped = U.skip_init(nn.Linear, W, H)
    net.skipped.reset_parameters()
    with torch.device("meta"):
        net.moved = nn.Linear(W, H)
    net.moved.to_empty(device="cpu")
    net.moved.reset_parameters()


def looked_at_later(net: Any) -> None:
    net.several = nn.ParameterList(nn.Parameter(torch.randn(W, H)) for _ in range(4))
    net.several[3].data.fill_(sum(net.several[0].tolist()[3]))
    net.several[2].data.mul_(2 if torch.equal(net.several[0], net.several[1]) else 3)


def loss_in_constructor(net: Any) -> None:
    net.layer = nn.Linear(W, H)
    net.layer(torch.ones(3, W)).pow(2).sum().backward()
    with torch.no_grad():
        net.layer.weight -= 0.1 * net.layer.weight.grad
    net.layer.zero_grad(set_to_none=True)


WAYS = [
    tie, tie_data, views_of_one, initialised_last, dtypes, buffers, parametrized, normed_as_of_old, layers_of_torch,
    lazily, from_others, through_meta, looked_at_later, loss_in_constructor,
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@SIZES
def test_ways_to_build(way: Callable[[Any], None], small: int) -> None:
    check(lambda: Net(way), small)


def test_one_layer_in_many_copies() -> None:
    check(lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(128, 4, 256), 6, enable_nested_tensor=False), 0)


def test_the_working_set_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from distrain.networks import recorder

    monkeypatch.setattr(recorder, "WORKING_SET", 0)
    for way in (initialised_last, from_others, layers_of_torch, buffers, looked_at_later):
        check(lambda way=way: Net(way), 0)
        check(
            lambda way=way: Net(
                lambda net: (
                    way(net),
                    net.double(),
                    net.apply(lambda m: m.reset_parameters() if hasattr(m, "reset_parameters") else None),
                    net.float(),
                )
            ),
            0,
        )


# --------------------------------------------------------------------------------------------------------------------
# What cannot be followed


def through_numpy(net: Any) -> None:
    net.layer = nn.Linear(W, H)
    net.layer.weight.data.numpy()[:] = 1


def quietly_through_numpy(net: Any) -> None:
    net.layer = nn.Linear(W, H)
    try:
        net.layer.weight.data.numpy()[:] = 1
    except RuntimeError:
        net.layer.weight.data.fill_(2)


def as_of_old(net: Any) -> None:
    net.weight = nn.Parameter(torch.ones(W, H).new(W, H).uniform_())


def resized(net: Any) -> None:
    net.weight = nn.Parameter(torch.ones(W, H).resize_(2 * W, H).normal_())


def its_address(net: Any) -> None:
    net.weight = nn.Parameter(torch.ones(W, H))
    assert net.weight.data_ptr() != 0


def value_by_value(net: Any) -> None:
    net.weight = nn.Parameter(torch.ones(W, H).apply_(lambda value: 3.0))


def in_a_thread(net: Any) -> None:
    net.weight = nn.Parameter(torch.ones(W, H))
    thread = threading.Thread(target=lambda: net.weight.data.normal_())
    thread.start()
    thread.join()


def by_a_recurrent_pass(net: Any) -> None:
    net.layer = nn.LSTM(30, H)
    net.weight = nn.Parameter(net.layer(torch.rand(W, 30))[0].detach())


def by_an_array(net: Any) -> None:
    net.weight = nn.Parameter(torch.ones(W, H).numpy().sum() * torch.ones(W, H))


FULL = [
    (through_numpy, "Tensor.numpy was called on a large tensor"),
    (quietly_through_numpy, "Tensor.numpy was called"),
    (as_of_old, "Tensor.new was called"),
    (resized, "aten.resize_"),
    (its_address, "Tensor.data_ptr was called"),
    (value_by_value, "Tensor.apply_ was called"),
    (in_a_thread, "a thread was started"),
    (by_a_recurrent_pass, "lstm was called on a large tensor, with gradients"),
    (by_an_array, "Tensor.numpy was called"),
]


@pytest.mark.parametrize(("way", "reason"), FULL, ids=[way.__name__ for way, _ in FULL])
def test_what_cannot_be_followed_is_built_in_full(way: Callable[[Any], None], reason: str) -> None:
    deferred = check(lambda: Net(way), 0, why_full=reason)
    assert deferred.is_full


def test_a_full_model_is_let_go_as_it_is_read() -> None:
    held: list[weakref.ref[Tensor]] = []

    def build() -> nn.Module:
        model = nn.Sequential(Net(through_numpy), *(nn.Linear(W, H) for _ in range(3)))
        held[:] = [weakref.ref(each.untyped_storage()) for each in model.parameters()]
        return model

    deferred = defer(build, small=0)
    alive = []
    for _, value in deferred.values():
        del value
        alive.append(sum(reference() is not None for reference in held))
    assert alive == list(range(len(held) - 1, -1, -1))


def test_what_diverges_later_is_built_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    from distrain.networks import replay

    def build() -> nn.Module:
        with isolated_seed(7):
            return nn.Sequential(nn.Linear(W, H), Net(from_others), nn.Linear(W, H))

    deferred = defer(build, small=0)
    values = deferred.values()
    first = [next(values) for _ in range(2)]
    monkeypatch.setattr(replay.Ref, "fits", lambda self, t: False)
    with logged() as said:
        found = dict([*first, *values])
    assert len(said) == 1
    assert "another layout" in said[0]
    for name, parameter in build().named_parameters():
        assert_same(found[name], parameter.detach(), name)


def test_what_stays_in_memory_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    from distrain.networks import deferred

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drawn = nn.Linear(1000, 1000)
            self.read, self.copied = nn.Parameter(torch.from_numpy(np.ones((1000, 500)))), nn.Linear(1000, 500)
            self.copied.weight.data.copy_(self.read.detach().t())

    monkeypatch.setattr(deferred, "_NOTABLE", 2**20)
    with logged() as said:
        defer(Table)
    assert said == ["model: 8 MiB of values that its constructor takes from outside PyTorch stay in memory"]
    with logged() as said:
        defer(lambda: nn.Linear(1000, 1000))
    assert said == []


def test_errors_are_those_of_an_ordinary_build(tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text(
        "import torch\nfrom torch import nn\n"
        "def net(num_classes):\n    layer = nn.Linear(200, 200)\n    raise KeyError(f'{layer.weight.sum():.5f}')\n"
        "def shapes(num_classes):\n    return nn.Linear(200, 200)(torch.zeros(3, 7))\n"
    )
    for model in ("resnt18", {"name": "resnet18", "groups": 2}, f"{file}:net", f"{file}:shapes", {"name": "rnn"}):
        with pytest.raises((UserError, KeyError, RuntimeError)) as expected:
            build_model(recipe_of(model), IMAGES)
        with pytest.raises(type(expected.value)) as found:
            defer_model(recipe_of(model), IMAGES)
        assert str(found.value) == str(expected.value)


# --------------------------------------------------------------------------------------------------------------------
# Weights from a file


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@SIZES
def test_weights_are_read_one_by_one(tmp_path: Path, suffix: str, precision: str, small: int) -> None:
    path = tmp_path / f"weights{suffix}"
    state = build_model(recipe_of("resnet18", seed=5), IMAGES).state_dict()
    for tensor in state.values():
        if tensor.is_floating_point():
            tensor.normal_()
    saved = {f"module.{name}": tensor for name, tensor in state.items()}
    if suffix == ".safetensors":
        save_file(saved, path)
    else:
        torch.save({"state_dict": saved}, path, _use_new_zipfile_serialization=suffix == ".pt")
    recipe = recipe_of({"name": "resnet18", "weights": path.name}, precision=precision)
    with logged() as said:
        deferred = defer_model(recipe, IMAGES, base=tmp_path, small=small)
    with logged() as expected:
        ordinary = build_model(recipe, IMAGES, base=tmp_path)
    assert said == expected
    assert "loaded 122 tensors" in said[1]
    assert_equals(deferred, ordinary)
    assert torch.equal(ordinary.state_dict()["conv1.weight"].float(), state["conv1.weight"])
    without = defer_model(recipe, IMAGES, base=tmp_path, weights=False, small=small)
    assert_equals(without, build_model(recipe, IMAGES, base=tmp_path, weights=False))


def test_tied_weights_from_a_file(tmp_path: Path) -> None:
    model = {"name": "gpt", "n_layer": 1, "n_head": 2, "d_model": 32}
    state = build_model(recipe_of(model, "language_modeling", seed=5), TEXT).state_dict()
    both = {"head.weight": torch.ones(20, 32), "tokens.weight": torch.zeros(20, 32)}
    for order in (
        ("head.weight", "tokens.weight"),
        ("tokens.weight", "head.weight"),
        ("head.weight",),
        ("tokens.weight",),
    ):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.pt"
        rest = {name: tensor for name, tensor in state.items() if name not in both}
        torch.save({name: both[name] for name in order} | rest, path)
        recipe = recipe_of(model | {"weights": str(path)}, "language_modeling")
        assert_equals(defer_model(recipe, TEXT, small=0), build_model(recipe, TEXT))


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    state = build_model(recipe_of({"name": "mlp", "hidden": [128, 64]}), IMAGES).state_dict()
    state["more"] = state.pop("layers.0.bias")
    save_file(state, path)
    for strict in (True, False):
        recipe = recipe_of({"name": "mlp", "weights": str(path), "weights_strict": strict})
        outcomes: list[Any] = []
        for way in (build_model, defer_model):
            try:
                with logged() as said:
                    outcomes.append((way(recipe, IMAGES), said))
            except UserError as error:
                outcomes.append((None, [str(error)]))
        (ordinary, lines), (deferred, other_lines) = outcomes
        assert lines == other_lines
        assert (ordinary is None) == strict
        if not strict:
            assert_equals(deferred, ordinary)
            assert torch.equal(ordinary.layers[0].weight, state["layers.0.weight"])


# --------------------------------------------------------------------------------------------------------------------
# Memory, and use

MEMORY = """
import sys
import torch
from anonymous import Peak
from torch import nn
from distrain.models import isolated_seed
from distrain.networks.deferred import defer

class Net(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2560, 2560) for _ in range(16))
        if way == "initialised last":
            self.apply(lambda m: nn.init.normal_(m.weight) if isinstance(m, nn.Linear) else None)
        if way == "scaled last":
            for layer in self.layers:
                layer.weight.data.mul_(2)
        if way == "rejecting":
            for layer in self.layers[:4]:
                nn.init.trunc_normal_(layer.weight, std=1.0, a=-1.5, b=1.5)

def build():
    with isolated_seed(1):
        return Net(sys.argv[1])

torch.set_num_threads(1)
dict(defer(lambda: nn.Linear(200, 200)).values())
with Peak() as peak:
    deferred = defer(build)
    building = peak.next_phase()
    for name, value in deferred.values():
        pass
print(building / 2**20, peak.most / 2**20)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("way", ["plain", "initialised last", "scaled last", "rejecting"])
def test_memory_does_not_grow_with_the_model(way: str) -> None:
    program = [sys.executable, "-c", MEMORY, way]
    done = subprocess.run(
        program,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": f"{IMPORTABLE}:{Path(__file__).parent}"},
    )
    assert done.returncode == 0, done.stderr
    peaks = [float(word) for word in done.stdout.split()]
    print(f"{way}: 400 MiB of weights, the largest 25 MiB; peaks while building and of values: {peaks} MiB")
    assert len(peaks) == 2
    assert all(25 <= peak <= 7 * 25 for peak in peaks)


def test_the_model_runs_once_it_has_its_values() -> None:
    recipe = recipe_of({"name": "gpt", "n_layer": 2, "n_head": 2, "d_model": 160, "tied": False}, "language_modeling")
    deferred, ordinary = defer_model(recipe, TEXT), build_model(recipe, TEXT)
    values = dict(deferred.values())
    model = deferred.model
    model.to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        parameter.data.copy_(values[name])
    tokens = torch.randint(20, (2, 16))
    assert torch.equal(model.eval()(tokens), ordinary.eval()(tokens))


def test_two_are_independent() -> None:
    recipe = recipe_of("mlp")
    one, other = defer_model(recipe, IMAGES, small=0), defer_model(recipe_of("mlp", seed=1), IMAGES, small=0)
    expected = dict(build_model(recipe, IMAGES).named_parameters())
    for (name, mine), (_, theirs) in itertools.islice(zip(one.values(), other.values(), strict=True), 4):
        assert_same(mine, expected[name].detach(), name)
        assert not torch.equal(mine, theirs)
