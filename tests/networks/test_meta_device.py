"""A model built on the meta device is that of an ordinary build but for its weights, or is seen to be another."""

from __future__ import annotations

import copy
import functools
import math
import random
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils as U
import torchvision
from safetensors.torch import save_file
from test_models import BART, BERT, GPT2, IMAGES, PAIRS, TEXT, recipe_of
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from distrain.config import UserError
from distrain.datasets.base import DataMeta
from distrain.models import build_model, isolated_seed, tied_names
from distrain.networks.meta_device import build_on_meta, is_building_on_meta, outline, take_values


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


def assert_same_but_for_weights(model: nn.Module, ordinary: nn.Module) -> None:
    """The parameters of `model` are nowhere, and all else is that of `ordinary`."""
    expected = dict(ordinary.named_parameters())
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
    theirs = plain_tensors(ordinary)
    for name, tensor in plain_tensors(model).items():
        assert_same(tensor.detach(), theirs[name].detach(), name)


def check(build: Callable[[], nn.Module]) -> str | None:
    """Return why `build` gives another model on the meta device, or None after asserting that it gives the same."""
    before = world_state()
    ordinary = build()
    assert world_state() == before
    try:
        model = build_on_meta(build)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        assert not is_building_on_meta()
        assert world_state() == before
        assert not nn.Linear(1, 1).weight.is_meta
    expected, found = outline(ordinary), outline(model)
    if found != expected:
        return next(f"{path} differs" for path in (*expected, *found) if found.get(path) != expected.get(path))
    assert outline(build()) == expected
    assert_same_but_for_weights(model, ordinary)
    weights = {name: parameter.detach() for name, parameter in build().named_parameters()}
    values = take_values(ordinary)
    assert list(values) == list(weights)
    for name, value in values.items():
        assert_same(value, weights[name], name)
    assert_same_but_for_weights(model, ordinary)
    return None


def seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        with isolated_seed(7):
            return make()

    return build


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
def test_networks(model: Any, meta: DataMeta, task: str, precision: str) -> None:
    recipe = recipe_of(model, task, precision=precision)
    assert check(lambda: build_model(recipe, meta)) is None


TORCHVISION = [
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3",
    "maxvit_t", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "mvit_v1_b", "r3d_18", "regnet_x_400mf", "resnet50",
    "s3d", "shufflenet_v2_x0_5", "squeezenet1_0", "swin3d_t", "swin_t", "swin_v2_t", "vit_b_16",
    "deeplabv3_mobilenet_v3_large", "fcn_resnet50", "lraspp_mobilenet_v3_large",
]  # fmt: skip


LIKE_OTHERS = (
    "alexnet", "densenet121", "efficientnet_v2_s", "googlenet", "mnasnet0_5", "mobilenet_v2", "regnet_x_400mf", "s3d",
    "squeezenet1_0", "swin3d_t", "swin_t", "mvit_v1_b", "r3d_18", "fcn_resnet50", "lraspp_mobilenet_v3_large",
)  # fmt: skip
"""Made of the layers of those that are left, and initialised as they are."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.more] if name in LIKE_OTHERS else []) for name in TORCHVISION]
)
def test_torchvision(name: str) -> None:
    assert name in torchvision.models.list_models()
    recipe, meta = recipe_of(name), DataMeta(input_shape=(3, 224, 224), num_classes=10)
    assert check(lambda: build_model(recipe, meta)) is None


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
def test_transformers(kind: str, config: dict[str, Any]) -> None:
    pytest.importorskip("transformers")
    recipe = recipe_of({"name": f"transformers:{kind}", "config": config}, "language_modeling")
    assert check(lambda: build_model(recipe, TEXT)) is None


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
        assert check(lambda: build_model(recipe, TEXT)) is None
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


REFUSED_INITS = {
    "by_index", "scaled_by_its_sum", "add_out", "where", "moved_there", "recurrent", "attention", "lists", "a_question",
}  # fmt: skip
"""Those that look at values, or compute with a weight and with another tensor at once."""


def add_while_changing(w: Tensor, small: Tensor) -> None:
    for _ in range(3):
        w.add_(small)
        small.mul_(2)


@pytest.mark.parametrize("init", INITS)
def test_initialisers(init: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before = nn.Linear(W, H)
            self.weight = parameter()
            nn.init.zeros_(self.weight)
            INITS[init](self.weight)
            self.after = nn.Linear(W, H)

    assert (check(seeded(Net)) is not None) == (init in REFUSED_INITS), check(seeded(Net))


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


WAYS = [tie, tie_data, views_of_one, initialised_last, dtypes, layers_of_torch, lazily, through_meta]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_ways_to_build(way: Callable[[Any], None]) -> None:
    assert check(seeded(lambda: Net(way))) is None


# --------------------------------------------------------------------------------------------------------------------
# What gives another model


def through_numpy(net: Any) -> None:
    net.layer = nn.Linear(W, H)
    net.layer.weight.data.numpy()[:] = 1


def quietly_on_meta(net: Any) -> None:
    net.layer = nn.Linear(W, H)
    net.was_meta = net.layer.weight.is_meta


def drawn_later(net: Any) -> None:
    net.layer = nn.Linear(W, H)
    net.scale = torch.rand(()).item()


def drawn_later_in_a_list(net: Any) -> None:
    net.layer = nn.Linear(W, H)
    net.kept = [{"orders": (torch.randperm(7), 3)}]


def drawn_later_in_an_array(net: Any) -> None:
    net.layer = nn.Linear(W, H)
    net.order = torch.randperm(7).numpy()


def drawn_later_in_a_set(net: Any) -> None:
    net.layer = nn.Linear(W, H)
    net.chosen = set(torch.randperm(10_000)[:3].tolist())


def drawn_later_in_a_function(net: Any) -> None:
    net.layer = nn.Linear(W, H)
    drawn = torch.rand(3)
    net.add = lambda x: x + drawn


def drawn_later_in_an_object(net: Any) -> None:
    net.layer = nn.Linear(W, H)
    net.helper = types.SimpleNamespace(add=functools.partial(torch.add, torch.rand(3)))


def seeding_a_generator(net: Any) -> None:
    net.layer = nn.Linear(W, H)
    net.generator = torch.Generator().manual_seed(torch.randint(1000, ()).item())


def drawn_later_in_a_hook(net: Any) -> None:
    net.layer = nn.Linear(W, H)
    net.layer.register_forward_hook(functools.partial(print, torch.rand(())))


def choosing_a_layer(net: Any) -> None:
    net.layer = nn.Linear(W, H)
    net.other = nn.Tanh() if net.layer.weight.is_meta else nn.ReLU()


def a_part_of_a_weight(net: Any) -> None:
    net.layer = nn.Linear(W, H)
    net.rows = net.layer.weight[:3].detach()


def tying_by_chance(net: Any) -> None:
    net.one, net.other = nn.Linear(W, W), nn.Linear(W, W)
    if not net.one.weight.is_meta:
        net.other.weight = net.one.weight


OTHERS: list[tuple[Callable[[Any], None], str]] = [
    (through_numpy, "TypeError"),
    (quietly_on_meta, "model.was_meta differs"),
    (drawn_later, "model.scale differs"),
    (drawn_later_in_a_list, "model.kept[0]['orders'][0] differs"),
    (drawn_later_in_an_array, "model.order differs"),
    (drawn_later_in_a_set, "model.chosen{0} differs"),
    (drawn_later_in_a_function, "model.add.drawn differs"),
    (drawn_later_in_an_object, "model.helper.state['add'].args[0] differs"),
    (seeding_a_generator, "model.generator.state differs"),
    (drawn_later_in_a_hook, "model.layer._forward_hooks[0].args[0] differs"),
    (choosing_a_layer, "model.other differs"),
    (a_part_of_a_weight, "model.rows differs"),
    (tying_by_chance, "model.other.weight differs"),
    (buffers, "NotImplementedError"),
    (parametrized, "differs"),
    (normed_as_of_old, "model.weighted.weight differs"),
    (from_others, "NotImplementedError"),
    (looked_at_later, "NotImplementedError"),
    (loss_in_constructor, "RuntimeError"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("way", "reason"), OTHERS, ids=[way.__name__ for way, _ in OTHERS])
def test_another_model_is_seen(way: Callable[[Any], None], reason: str) -> None:
    assert reason in str(check(seeded(lambda: Net(way))))


def test_a_model_that_has_no_values_is_refused() -> None:
    with torch.device("meta"):
        model = nn.Linear(3, 4)
    with pytest.raises(UserError, match="parameter weight is on the meta device, so it has no values"):
        take_values(model)


def test_a_buffer_that_is_a_view_of_a_parameter_is_refused() -> None:
    model = nn.Linear(3, 4)
    model.register_buffer("row", model.weight.detach()[1])
    with pytest.raises(UserError, match="buffer row is a view of parameter weight"):
        take_values(model)


def test_initializing_takes_no_memory_and_outlines_none() -> None:
    # 256 GiB
    model = build_on_meta(lambda: nn.Sequential(*(nn.Linear(2**13, 2**13) for _ in range(1024))))
    assert sum(parameter.numel() for parameter in model.parameters()) > 2**36
    assert len(outline(model)) > 20


# --------------------------------------------------------------------------------------------------------------------
# Weights from a file


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_of_a_file_are_left_there_and_buffers_loaded(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    state = build_model(recipe_of("resnet18", seed=5), IMAGES).state_dict()
    for tensor in state.values():
        if tensor.is_floating_point():
            tensor.normal_()
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state}, path)
    recipe = recipe_of({"name": "resnet18", "weights": path.name})
    assert check(lambda: build_model(recipe, IMAGES, base=tmp_path)) is None
    ordinary = build_model(recipe, IMAGES, base=tmp_path)
    assert torch.equal(ordinary.state_dict()["conv1.weight"], state["conv1.weight"])
