from __future__ import annotations

import argparse
import gc
import json
import random
import weakref
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from chats import save_tokenizer
from logged import logged
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn

from distrain.config import OptimSection, Recipe, UserError
from distrain.config.registry import models
from distrain.datasets.base import DataMeta
from distrain.models import build_model, check_model, load_weights, tied_names
from distrain.networks.attention import rotary, sinusoids
from distrain.networks.builders import torchvision_names
from distrain.networks.calling import ModelOutput, calling_convention, compiled_in_place, forward, unwrap_model
from distrain.networks.facts import facts, num_outputs
from distrain.networks.summary import describe_model
from distrain.optim import frozen_names

IMAGES = DataMeta(input_shape=(1, 8, 8), num_classes=10)
TEXT = DataMeta(input_shape=(16,), vocab_size=20, tokens_per_sample=16)
PAIRS = DataMeta(vocab_size=13, target_vocab_size=11, pad_id=0, bos_id=1, eos_id=2)


def recipe_of(model: Any, task: str = "classification", seed: int = 0, **train: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "test",
            "task": task,
            "data": "digits",
            "model": model,
            "batch": {"global": 8},
            "train": {"steps": 1, **train},
            "seed": seed,
        }
    )


def build(model: Any, meta: DataMeta = IMAGES, task: str = "classification", **options: Any) -> nn.Module:
    return build_model(recipe_of(model, task), meta, **options)


def gpt(**args: Any) -> Any:
    model = build({"name": "gpt", "n_layer": 2, "n_head": 2, "d_model": 32, **args}, TEXT, "language_modeling")
    # GPT-2's initial weights are so small that no token would matter
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    return model.eval()


# --------------------------------------------------------------------------------------------------------------------
# What the data say


def test_num_outputs() -> None:
    meta = DataMeta(num_classes=2, num_targets=3, vocab_size=5, target_vocab_size=7)
    tasks = (
        *("classification", "binary", "multilabel", "regression", "language_modeling", "seq2seq"),
        *("segmentation", "token_classification"),
    )
    assert [num_outputs(task, meta) for task in tasks] == [2, 1, 3, 3, 5, 7, 2, 2]
    assert num_outputs("regression", DataMeta()) == 1


def test_facts() -> None:
    known = facts("classification", IMAGES)
    assert known["in_features"] == 64
    assert known["in_channels"] == 1
    assert known["image_size"] == 8
    assert {known[key] for key in ("num_outputs", "num_classes", "num_labels", "out_features")} == {10}
    assert facts("language_modeling", TEXT)["seq_len"] == 16


# --------------------------------------------------------------------------------------------------------------------
# Initial weights


def weights_of(model: nn.Module) -> list[torch.Tensor]:
    return list(model.state_dict().values())


@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet18"])
def test_initial_weights_depend_on_the_seed_alone(name: str) -> None:
    first = weights_of(build(name))
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    second = weights_of(build(name))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    other = weights_of(build_model(recipe_of(name, seed=1), IMAGES))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_own_code_draws_from_the_seed_too(tmp_path: Path) -> None:
    file = tmp_path / "net.py"
    file.write_text(
        "import random\nimport numpy as np\nimport torch\nfrom torch import nn\n\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, in_features, num_classes, scale=2.0):\n"
        "        super().__init__()\n"
        "        self.drawn = random.random(), float(np.random.rand()), scale\n"
        "        self.layer = nn.Linear(in_features, num_classes)\n"
        "    def forward(self, x):\n"
        "        return {'logits': self.layer(x.flatten(1))}\n"
    )
    first, second = (build({"name": f"{file}:Net", "scale": 3.0}) for _ in range(2))
    assert first.drawn == second.drawn
    assert first.drawn[2] == 3.0
    assert torch.equal(first.layer.weight, second.layer.weight)
    assert forward(first, torch.zeros(4, 1, 8, 8)).logits.shape == (4, 10)
    assert "needs_this" in check_model(recipe_of({"name": f"{file}:Net", "needs_this": 1}))[0]


def test_precision_fp64() -> None:
    model = build_model(recipe_of("mlp", precision="fp64"), IMAGES)
    assert {p.dtype for p in model.parameters()} == {torch.float64}


@pytest.mark.parametrize(("precision", "expected"), [("fp64", torch.complex128), ("fp32", torch.complex64)])
def test_complex_tensors_keep_their_imaginary_part(tmp_path: Path, precision: str, expected: torch.dtype) -> None:
    file = tmp_path / "net.py"
    file.write_text(
        "import torch\nfrom torch import nn\n\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, num_classes):\n"
        "        super().__init__()\n"
        "        self.wave = nn.Parameter(torch.tensor([1 + 2j]))\n"
        "        self.layer = nn.Linear(2, num_classes, dtype=torch.float64)\n"
        "        self.register_buffer('turn', torch.tensor([3 - 1j, 2j]))\n"
        "        self.register_buffer('count', torch.tensor(7))\n"
    )
    model = build_model(recipe_of({"name": f"{file}:Net"}, precision=precision), IMAGES)
    assert {each.dtype for each in model.layer.parameters()} == {expected.to_real()}
    assert model.wave.dtype == model.turn.dtype == expected
    assert [*model.wave.tolist(), *model.turn.tolist(), model.count.item()] == [1 + 2j, 3 - 1j, 2j, 7]


# --------------------------------------------------------------------------------------------------------------------
# sequential

LAYERS: list[tuple[Any, tuple[int, ...], tuple[int, ...]]] = [
    ({"Linear": [6, 4]}, (6,), (4,)),
    ("Flatten", (2, 3), (6,)),
    ({"Dropout": 0.5}, (6,), (6,)),
    ({"Embedding": {"num_embeddings": 5, "embedding_dim": 3}}, (7,), (7, 3)),
    ({"Conv1d": [2, 3, 3]}, (2, 8), (3, 6)),
    ({"Conv2d": [2, 3, 3]}, (2, 8, 8), (3, 6, 6)),
    ({"Conv3d": [2, 3, 3]}, (2, 8, 8, 8), (3, 6, 6, 6)),
    ({"MaxPool1d": 2}, (2, 8), (2, 4)),
    ({"MaxPool2d": 2}, (2, 8, 8), (2, 4, 4)),
    ({"MaxPool3d": 2}, (2, 8, 8, 8), (2, 4, 4, 4)),
    ({"BatchNorm1d": 2}, (2, 8), (2, 8)),
    ({"BatchNorm2d": 2}, (2, 8, 8), (2, 8, 8)),
    ({"BatchNorm3d": 2}, (2, 4, 4, 4), (2, 4, 4, 4)),
    ({"RNN": [3, 5]}, (7, 3), (7, 5)),
    ({"name": "LSTM", "input_size": 3, "hidden_size": 5, "bidirectional": True}, (7, 3), (7, 10)),
    ({"GRU": {"input_size": 3, "hidden_size": 5, "num_layers": 2}}, (7, 3), (7, 5)),
    ("ReLU", (6,), (6,)),
    ("Sigmoid", (6,), (6,)),
    ({"Tanh": None}, (6,), (6,)),
    ({"LayerNorm": [[2, 3]]}, (2, 3), (2, 3)),
    ({"MultiheadAttention": [8, 2]}, (7, 8), (7, 8)),
    ({"TransformerEncoderLayer": {"d_model": 8, "nhead": 2}}, (7, 8), (7, 8)),
    (
        {"TransformerEncoder": {"encoder_layer": {"TransformerEncoderLayer": [8, 2]}, "num_layers": 2}},
        (7, 8),
        (7, 8),
    ),
    ({"Unflatten": [1, [2, 3]]}, (6,), (2, 3)),
    ({"Sequential": [{"Linear": [6, 4]}, "ReLU"]}, (6,), (4,)),
    ({"Residual": [{"Linear": [6, 6]}, "ReLU"]}, (6,), (6,)),
    ("Last", (7, 3), (3,)),
    ("Mean", (7, 3), (3,)),
    ("Transpose", (7, 3), (3, 7)),
    ({"LazyConv2d": [4, 3]}, (2, 8, 8), (4, 6, 6)),
    ({"torch.nn:Linear": [6, 4]}, (6,), (4,)),
]


@pytest.mark.parametrize(("layer", "shape", "expected"), LAYERS, ids=[str(layer)[:30] for layer, _, _ in LAYERS])
def test_layers(layer: Any, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    recipe = recipe_of({"name": "sequential", "layers": [layer]})
    assert check_model(recipe) == []
    model = build_model(recipe, DataMeta(input_shape=shape))
    tokens = isinstance(model[0], nn.Embedding)
    sample = torch.zeros(4, *shape, dtype=torch.int64) if tokens else torch.randn(4, *shape)
    assert forward(model, sample).logits.shape == (4, *expected)


def test_sequential_reads_sequences_batch_first_by_default_only() -> None:
    args = {"input_size": 3, "hidden_size": 5}
    assert build({"name": "sequential", "layers": [{"GRU": args}]}, DataMeta())[0].batch_first
    assert not build({"name": "sequential", "layers": [{"GRU": args | {"batch_first": False}}]}, DataMeta())[
        0
    ].batch_first


def test_sequential_has_plain_names_and_leaves_buffers_alone() -> None:
    layers = [{"Conv2d": [1, 4, 3]}, "LazyBatchNorm2d", "ReLU", {"Residual": [{"Conv2d": [4, 4, 1]}]}, "Flatten"]
    model = build({"name": "sequential", "layers": [*layers, {"LazyLinear": 10}]})
    assert list(model.state_dict())[:2] == ["0.weight", "0.bias"]
    assert "3.0.weight" in model.state_dict()
    assert type(model[1]) is nn.BatchNorm2d
    assert int(model[1].num_batches_tracked) == 0
    assert model.training


# --------------------------------------------------------------------------------------------------------------------
# Errors

ERRORS: list[tuple[Any, str, list[str]]] = [
    ("resnt18", "classification", ["no model 'resnt18'; did you mean 'resnet18'", "? Your own is"]),
    ("zzzz", "classification", ["no model 'zzzz'; there are", "mlp"]),
    ("gpt", "classification", ["'gpt' is for language_modeling", "mlp"]),
    ({"name": "mlp", "hiden": 3}, "classification", ["model.hiden", "'hidden'"]),
    ({"name": "mlp", "weights_strct": True}, "classification", ["'weights_strict'"]),
    ({"name": "mlp", "activation": "Relu"}, "classification", ["model.activation", "'ReLU'"]),
    ({"name": "resnet18", "num_clases": 3}, "classification", ["'num_classes'"]),
    ({"name": "resnet18", "num_classes": 3}, "classification", ["num_classes: 3", "10 classes"]),
    ({"name": "resnet18", "pretrained": True}, "classification", ["never downloaded", "model.weights"]),
    ({"name": "inception_v3", "aux_logits": True}, "classification", ["auxiliary head"]),
    ({"name": "resnet18", "groups": 2}, "classification", ["cannot be built", "groups=1"]),
    ("fasterrcnn_resnet50_fpn", "classification", ["detection"]),
    ("rnn", "classification", ["(seq, features)", "(1, 8, 8)"]),
    ("torch.nn:functional", "classification", ["not a class or function"]),
    ("builtins:dict", "classification", ["returned dict"]),
    (
        {"name": "torch.nn:Linear", "in_features": 64, "out_features": 10, "device": "meta"},
        "classification",
        ["leaves weight, bias on the meta device, without values"],
    ),
    ({"name": "sequential", "layers": []}, "classification", ["model.layers: []", "list of layers"]),
    ({"name": "sequential"}, "classification", ["model.layers: sequential needs"]),
    ({"name": "sequential", "layers": ["Flaten", "Relu"]}, "classification", ["layers[0]", "'Flatten'", "layers[1]"]),
    ({"name": "sequential", "layers": [{"Linear": {"in_feature": 3}}]}, "classification", ["'in_features'", "bias"]),
    (
        {"name": "sequential", "layers": [{"LSTM": {"hiden_size": 3}}]},
        "classification",
        ["'hidden_size'", "input_size"],
    ),
    ({"name": "sequential", "layers": ["Bilinear"]}, "classification", ["does not map one tensor to one"]),
    ({"name": "sequential", "layers": [{"Linear": 1, "ReLU": 2}]}, "classification", ["is not a layer", "expected"]),
    (
        {"name": "sequential", "layers": ["Flatten", {"Linear": [63, 10]}]},
        "classification",
        ["model.layers[1]: Linear(63, 10) received (batch, 64)", "63x10"],
    ),
    (
        {"name": "sequential", "layers": ["Flatten", {"Residual": [{"Linear": [64, 10]}]}]},
        "classification",
        ["model.layers[1].Residual", "(batch, 64)", "(batch, 10)"],
    ),
    (
        {"name": "sequential", "layers": ["Flatten", {"Linear": [64, 9]}]},
        "classification",
        ["gives (batch, 9)", "needs 10 outputs"],
    ),
    ({"name": "cnn", "kernel": 4}, "classification", ["model.kernel: 4", "3 or 5"]),
    ({"name": "cnn", "pooling": "mean"}, "classification", ["model.pooling", "'max' or 'avg'"]),
    ({"name": "cnn", "channels": []}, "classification", ["model.channels: []", "at least 1 item"]),
    ({"name": "mlp", "hidden": 64, "dropout": 1.5}, "classification", ["model.hidden: 64", "model.dropout: 1.5"]),
    ({"name": "mlp", "norm": "bach"}, "classification", ["'batch' or 'layer'"]),
    ({"name": "gpt", "n_layer": 0}, "language_modeling", ["model.n_layer: 0", "greater than or equal to 1"]),
    ({"name": "gpt", "positions": "rotory"}, "language_modeling", ["'learned' or 'rotary'"]),
    ({"name": "gpt", "d_model": 30, "n_head": 4}, "language_modeling", ["d_model 30", "n_head 3 or 5"]),
    ({"name": "transformers:AutoModelForCausaLM"}, "language_modeling", ["'AutoModelForCausalLM'"]),
    ({"name": "transformers:AutoModelForCausalLM"}, "language_modeling", ["`config`", "`path`", "neither"]),
    (
        {"name": "transformers:AutoModelForCausalLM", "config": {"model_type": "gtp2"}},
        "language_modeling",
        ["'gtp2'", "'gpt2'"],
    ),
    (
        {"name": "transformers:AutoModelForCausalLM", "config": {"model_type": "gpt2", "n_layers": 2}},
        "language_modeling",
        ["n_layers", "'n_layer'"],
    ),
    (
        {"name": "transformers:AutoModelForCausalLM", "path": "absent"},
        "language_modeling",
        ["no config.json", "absent"],
    ),
    ({"name": "mlp", "weights": "absent.safetensors"}, "classification", ["there is no file absent.safetensors"]),
]


@pytest.mark.parametrize(("model", "task", "parts"), ERRORS)
def test_errors_teach(model: Any, task: str, parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        build(model, TEXT if task == "language_modeling" else IMAGES, task)
    for part in parts:
        assert part in str(caught.value)


def test_check_finds_every_problem_without_data() -> None:
    layers = ["Flaten", {"Linear": [64, 10]}, {"Linear": {"in_feature": 3}}]
    problems = check_model(recipe_of({"name": "sequential", "layers": layers, "shape": 3}))
    assert len(problems) == 3
    assert check_model(recipe_of("resnet18")) == []
    assert check_model(recipe_of("rnn")) == []


def test_own_code_that_fails_keeps_its_own_error(tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text("def net(num_classes):\n    raise KeyError(num_classes)\n")
    with pytest.raises(KeyError) as caught:
        build(f"{file}:net")
    assert "net(num_classes=10)" in caught.value.__notes__[0].replace(str(file) + ":", "")


# --------------------------------------------------------------------------------------------------------------------
# torchvision


def test_every_classifier_of_torchvision_is_known() -> None:
    from torchvision import models

    names = models.list_models(module=models)
    assert set(names) <= set(torchvision_names())
    for name in torchvision_names():
        assert check_model(recipe_of({"name": name, "num_classes": 3})) == [], name


def test_torchvision_takes_classes_and_channels_from_the_data() -> None:
    with logged() as said:
        model = build("resnet18")
    assert forward(model, torch.randn(2, 1, 32, 32)).logits.shape == (2, 10)
    assert "conv1" in said[0]
    with logged() as said:
        colour = build("resnet18", DataMeta(input_shape=(3, 32, 32), num_classes=4))
    assert forward(colour, torch.randn(2, 3, 32, 32)).logits.shape == (2, 4)
    assert said == []


def test_no_parameter_of_googlenet_is_without_gradient() -> None:
    model = build("googlenet", DataMeta(input_shape=(3, 32, 32), num_classes=4))
    forward(model, torch.randn(2, 3, 32, 32)).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_vision_transformers_take_the_size_of_the_data() -> None:
    from distrain.networks.builders import _torchvision_builder

    assert _torchvision_builder("vit_b_16").parameters["image_size"].default == 224
    assert "patch_size" not in _torchvision_builder("vit_b_16").parameters


# --------------------------------------------------------------------------------------------------------------------
# mlp, cnn, rnn


@pytest.mark.parametrize("norm", [None, "batch", "layer"])
def test_mlp_shapes(norm: str | None) -> None:
    model = build({"name": "mlp", "hidden": [16, 8], "norm": norm, "activation": "GELU", "dropout": 0.1})
    assert forward(model, torch.randn(4, 1, 8, 8)).logits.shape == (4, 10)


def test_mlp_over_a_table() -> None:
    from distrain.datasets.tables import TableMeta

    meta = TableMeta(feature_names=("a", "b", "c", "d", "e"), cardinalities=(4, 100), num_targets=1)
    model = build({"name": "mlp", "hidden": [8]}, meta, "regression")
    inputs = {"numeric": torch.randn(5, 3), "categorical": torch.tensor([[0, 99]] * 5)}
    outputs = forward(model, inputs).logits
    assert outputs.shape == (5, 1)
    assert [table.embedding_dim for table in model.embeddings] == [2, 50]
    for key in inputs:
        assert not torch.equal(forward(model, inputs | {key: inputs[key] // 2}).logits, outputs)


@pytest.mark.parametrize("shape", [(3, 17), (1, 8, 8), (2, 4, 5, 6)])
def test_cnn_shapes(shape: tuple[int, ...]) -> None:
    for args in ({}, {"pooling": "avg", "norm": "group"}, {"pooling": None, "norm": None, "kernel": 5}):
        model = build({"name": "cnn", **args}, DataMeta(input_shape=shape, num_classes=3))
        assert forward(model, torch.randn(2, *shape)).logits.shape == (2, 3)


@pytest.mark.slow
def test_cnn_reads_digits() -> None:
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    targets = torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:1437], order[1437:]
    model = build("cnn")
    steps = 8 * (1437 // 64)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        rows = train[torch.randint(len(train), (64,), generator=generator)]
        optimizer.zero_grad()
        F.cross_entropy(model(images[rows]), targets[rows]).backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        accuracy = (model(images[test]).argmax(1) == targets[test]).float().mean().item()
    assert accuracy >= 0.98


@pytest.mark.parametrize("kind", ["rnn", "lstm", "gru"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_rnn_does_not_see_padding(kind: str, bidirectional: bool) -> None:
    meta = DataMeta(input_shape=(6,), vocab_size=9, pad_id=0, num_classes=3)
    args = {"kind": kind, "bidirectional": bidirectional, "layers": 2, "hidden": 8, "embedding": 4}
    model = build({"name": "rnn", **args}, meta).eval()
    tokens = torch.tensor([[3, 4, 5, 0, 0, 0], [1, 2, 0, 7, 8, 6]])
    outputs = forward(model, tokens).logits
    assert outputs.shape == (2, 3)
    assert torch.allclose(outputs[:1], forward(model, tokens[:1, :3]).logits, atol=1e-6)
    assert torch.allclose(outputs, forward(model, F.pad(tokens, (0, 5))).logits, atol=1e-6)


def test_bidirectional_rnn_equals_packed_sequences() -> None:
    meta = DataMeta(input_shape=(6,), vocab_size=9, pad_id=0, num_classes=3)
    model = build({"name": "rnn", "kind": "gru", "bidirectional": True, "hidden": 8, "embedding": 4}, meta).eval()
    tokens = torch.tensor([[3, 4, 5, 0, 0, 0], [1, 2, 3, 7, 8, 6]])
    reference = nn.GRU(4, 8, batch_first=True, bidirectional=True)
    there, back = (half[0].state_dict() for half in (model.recurrent.forwards, model.recurrent.backwards))
    reference.load_state_dict(there | {f"{name}_reverse": tensor for name, tensor in back.items()})
    packed = nn.utils.rnn.pack_padded_sequence(model.embedding(tokens), torch.tensor([3, 6]), True, False)
    outputs, ends = reference(packed)
    outputs, _ = nn.utils.rnn.pad_packed_sequence(outputs, batch_first=True)
    ours, our_ends = model.recurrent(model.embedding(tokens), torch.tensor([3, 6]))
    assert torch.allclose(ours[0, :3], outputs[0, :3], atol=1e-6)
    assert torch.allclose(ours[1], outputs[1], atol=1e-6)
    assert torch.allclose(our_ends, ends.transpose(0, 1).flatten(1), atol=1e-6)


@pytest.mark.parametrize("shape", [(12,), (12, 3)])
def test_rnn_over_numbers(shape: tuple[int, ...]) -> None:
    model = build("rnn", DataMeta(input_shape=shape), "regression")
    assert forward(model, torch.randn(4, *shape)).logits.shape == (4, 1)


# --------------------------------------------------------------------------------------------------------------------
# gpt


@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-13), (torch.float32, 1e-4)])
def test_positions_have_the_precision_of_what_they_are_added_to(dtype, near):
    places, width = torch.arange(300), 8
    angles = places[:, None].double() * 10000.0 ** (torch.arange(0, width, 2, dtype=torch.float64) / -width)
    for found, wanted in (
        (rotary(places, width, dtype), torch.stack([angles.cos(), angles.sin()])),
        (sinusoids(places, width, dtype), torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)),
    ):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=near)
    model = gpt(positions="rotary").double().eval()
    tokens = torch.arange(6)[None] % 5
    with torch.no_grad():
        # a model that rotates by float32 is that far from one that does not
        later = model(torch.cat([tokens, tokens], dim=1))[:, :6]
        torch.testing.assert_close(model(tokens), later, rtol=0, atol=1e-13)


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_gpt_sees_no_later_token(positions: str) -> None:
    model = gpt(positions=positions)
    tokens = torch.randint(20, (2, 16))
    changed = tokens.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 20
    first, second = forward(model, tokens).logits, forward(model, changed).logits
    assert first.shape == (2, 16, 20)
    assert torch.allclose(first[:, :9], second[:, :9], atol=1e-5)
    assert not torch.allclose(first[:, 9:], second[:, 9:], atol=1e-2)


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_gpt_knows_positions(positions: str) -> None:
    model = gpt(positions=positions)
    tokens = torch.tensor([[1, 2, 3, 4], [2, 1, 3, 4]])
    logits = forward(model, tokens).logits[:, -1]
    assert not torch.allclose(logits[0], logits[1], atol=1e-3)


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_gpt_generates_what_full_passes_would(positions: str) -> None:
    model = gpt(positions=positions)
    tokens = torch.randint(20, (3, 5), generator=torch.Generator().manual_seed(0))
    model.train()
    generated = model.generate(tokens, 20)
    assert model.training
    model.eval()
    context, expected = tokens, tokens
    for _ in range(20):
        new = forward(model, context).logits[:, -1:].argmax(-1)
        expected = torch.cat([expected, new], dim=1)
        # a full context continues from its last half
        context = expected[:, -8:] if context.shape[1] == 16 else torch.cat([context, new], dim=1)
    assert torch.equal(generated, expected)


def test_gpt_stops_at_the_end() -> None:
    model = gpt()
    tokens = torch.randint(20, (2, 3), generator=torch.Generator().manual_seed(0))
    free = model.generate(tokens, 10)
    eos = int(free[0, 5])
    stopped = model.generate(tokens, 10, eos_id=eos)
    first = int((stopped[0, 3:] == eos).nonzero()[0]) + 3
    assert torch.equal(stopped[0, : first + 1], free[0, : first + 1])
    assert bool((stopped[0, first:] == eos).all())


def test_gpt_draws_with_a_generator() -> None:
    model = gpt()
    tokens = torch.zeros(2, 1, dtype=torch.int64)
    one, two = (model.generate(tokens, 8, 1.0, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, two)


def test_gpt_in_mixed_precision() -> None:
    model = gpt(positions="rotary")
    with torch.autocast("cpu", torch.bfloat16):
        assert forward(model, torch.zeros(1, 4, dtype=torch.int64)).logits.isfinite().all()


def test_gpt_starts_at_chance_and_ties_its_embedding() -> None:
    model = build({"name": "gpt", "n_layer": 4, "n_head": 2, "d_model": 64}, TEXT, "language_modeling")
    tokens = torch.randint(20, (8, 16))
    loss = F.cross_entropy(forward(model, tokens).logits.flatten(0, 1), tokens.roll(-1, 1).flatten())
    assert abs(loss.item() - np.log(20)) < 0.1
    assert tied_names(model) == {"head.weight": "tokens.weight"}
    down = dict(model.named_parameters())["blocks.0.down.weight"]
    assert down.std().item() == pytest.approx(0.02 / np.sqrt(8), rel=0.05)
    assert tied_names(gpt(tied=False)) == {}


def test_gpt_refuses_longer_samples() -> None:
    with pytest.raises(UserError, match="17 tokens"):
        forward(gpt(), torch.zeros(1, 17, dtype=torch.int64))


# --------------------------------------------------------------------------------------------------------------------
# seq2seq


def pairs(kind: str) -> tuple[Any, torch.Tensor, torch.Tensor]:
    model = build({"name": "seq2seq", "kind": kind, "d_model": 32, "n_layer": 2}, PAIRS, "seq2seq").eval()
    return model, torch.tensor([[3, 4, 5, 6, 0], [7, 8, 9, 10, 11]]), torch.tensor([[1, 3, 4, 0], [1, 5, 6, 7]])


@pytest.mark.parametrize("kind", ["gru", "transformer"])
def test_seq2seq_does_not_see_padding(kind: str) -> None:
    model, source, target = pairs(kind)
    logits = forward(model, {"source": source, "target": target}).logits
    assert logits.shape == (2, 4, 11)
    longer = {"source": F.pad(source, (0, 4)), "target": F.pad(target, (0, 3))}
    assert torch.allclose(forward(model, longer).logits[:, :4], logits, atol=1e-5)
    alone = {"source": source[:1, :4], "target": target[:1, :3]}
    assert torch.allclose(forward(model, alone).logits, logits[:1, :3], atol=1e-5)
    # a batch padded with empty samples stays finite
    empty = {"source": torch.zeros(2, 4, dtype=torch.int64), "target": target}
    assert forward(model, empty).logits.isfinite().all()


@pytest.mark.parametrize("kind", ["gru", "transformer"])
def test_seq2seq_sees_no_later_token(kind: str) -> None:
    model, source, target = pairs(kind)
    changed = target.clone()
    changed[:, 2:] = 8
    first, second = (forward(model, {"source": source, "target": t}).logits for t in (target, changed))
    assert torch.allclose(first[:, :2], second[:, :2], atol=1e-5)
    other = forward(model, {"source": source.flip(0), "target": target}).logits
    assert not torch.allclose(first, other, atol=1e-3)


@pytest.mark.parametrize("kind", [pytest.param("gru", marks=pytest.mark.more), "transformer"])
def test_seq2seq_learns_to_reverse_and_generates_what_full_passes_would(kind: str) -> None:
    model, _, _ = pairs(kind)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)

    def batch(size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        source = torch.randint(3, 11, (size, 5), generator=generator)
        lengths = torch.randint(2, 6, (size, 1), generator=generator)
        place = torch.arange(5)
        source = source.masked_fill(place >= lengths, 0)
        back = torch.where(place < lengths, lengths - 1 - place, place)
        target = F.pad(source.gather(1, back), (1, 1))
        target[:, 0] = 1
        return source, target[:, :-1], target[:, 1:].scatter(1, lengths, 2)

    for _ in range(150):
        source, target, expected = batch(64)
        logits = forward(model, {"source": source, "target": target}).logits
        optimizer.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), expected.flatten(), ignore_index=0).backward()
        optimizer.step()
    model.eval()
    source, _, expected = batch(16)
    written = model.generate(source, 9)
    assert (F.pad(written, (0, 9))[:, :6] == F.pad(expected, (0, 9))[:, :6]).all(1).float().mean() > 0.6
    so_far = torch.ones(16, 1, dtype=torch.int64)
    done = torch.zeros(16, 1, dtype=torch.bool)
    for _ in range(written.shape[1]):
        new = forward(model, {"source": source, "target": so_far}).logits[:, -1:].argmax(-1).masked_fill(done, 0)
        done = done | (new == 2)
        so_far = torch.cat([so_far, new], dim=1)
    assert torch.equal(written, so_far[:, 1:])
    assert model.generate(source, 0).shape == (16, 0)


def test_seq2seq_ties_its_output() -> None:
    assert tied_names(pairs("transformer")[0]) == {"head.weight": "target_tokens.weight"}


# --------------------------------------------------------------------------------------------------------------------
# Calling


class Takes(nn.Module):
    """Returns what `give` makes of what it was called with."""

    def __init__(self, give: Any):
        super().__init__()
        self.give = give

    def forward(self, x: Any) -> Any:
        return self.give(x)


class TakesPair(nn.Module):
    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return source + target


class TakesOthers(nn.Module):
    def forward(self, src: torch.Tensor, tgt: torch.Tensor) -> torch.Tensor:
        return src + tgt


@pytest.mark.parametrize(
    "give",
    [
        lambda x: x,
        lambda x: (x, None),
        lambda x: [x],
        lambda x: {"logits": x},
        lambda x: {"out": x},
        lambda x: ModelOutput(x),
        lambda x: namedtuple("Found", "features logits")(x + 1, x),
    ],
)
def test_what_a_model_may_return(give: Any) -> None:
    x = torch.randn(2, 3)
    output = forward(Takes(give), x)
    assert output.logits is x
    assert output.aux_loss is None


def test_auxiliary_losses_are_kept() -> None:
    x, aux = torch.randn(2, 3), torch.tensor(1.5)
    assert forward(Takes(lambda x: ModelOutput(x, aux)), x).aux_loss is aux
    assert forward(Takes(lambda x: {"logits": x, "aux_loss": aux}), x).aux_loss is aux
    output = forward(Takes(lambda x: namedtuple("Found", "logits aux_loss features")(x, aux, x + 1)), x)
    assert output.aux_loss is aux
    assert [each.tolist() for each in output.others] == [(x + 1).tolist()]


@pytest.mark.parametrize("give", [lambda x: None, lambda x: {"prediction": x}, lambda x: ("a", x)])
def test_what_a_model_may_not_return(give: Any) -> None:
    with pytest.raises(UserError, match="expected a tensor"):
        forward(Takes(give), torch.zeros(1))


def test_how_mappings_are_passed() -> None:
    inputs = {"source": torch.ones(2), "target": torch.ones(2)}
    assert forward(TakesPair(), inputs).logits.tolist() == [2, 2]
    assert forward(Takes(lambda x: x["target"]), inputs).logits.tolist() == [1, 1]
    with pytest.raises(UserError, match=r"takes \(src: .*source, target"):
        forward(TakesOthers(), inputs)


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_modules_are_compiled_in_place_and_leave_no_name(whole: bool) -> None:
    layers = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    x, calls = torch.randn(2, 3), []
    expected = layers(x)

    def backend(graph: Any, inputs: Any) -> Any:
        calls.append(graph)
        return graph.forward

    given = torch.compile(layers, backend=backend) if whole else nn.Sequential(torch.compile(layers, backend=backend))
    model = compiled_in_place(given)  # type: ignore[arg-type]
    assert not [name for name, _ in model.named_modules() if "_orig_mod" in name]
    assert not isinstance(model, type(torch.compile(layers)))
    assert torch.equal(model(x), expected)
    assert calls


def test_conventions_hold_on_wrappers() -> None:
    model = TakesPair()
    call = calling_convention(model)
    wrapped = torch.compile(model, backend="eager")
    assert unwrap_model(nn.DataParallel(wrapped)) is model
    inputs = {"source": torch.ones(2), "target": torch.ones(2)}
    assert call(wrapped, inputs).logits.tolist() == [2, 2]
    assert calling_convention(wrapped)(wrapped, inputs).logits.tolist() == [2, 2]


@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (TakesPair, {"source": torch.ones(2), "target": torch.ones(2)}),
        (
            lambda: build({"name": "transformers:AutoModelForCausalLM", "config": GPT2}, TEXT, "language_modeling"),
            torch.ones(1, 4, dtype=torch.int64),
        ),
    ],
    ids=["own", "transformers"],
)
def test_a_model_that_was_called_is_freed(make: Callable[[], nn.Module], inputs: Any) -> None:
    model = make()
    forward(model, inputs)
    held = weakref.ref(model)
    del model
    gc.collect()
    assert held() is None


# --------------------------------------------------------------------------------------------------------------------
# Weights


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_weights_are_loaded(tmp_path: Path, suffix: str, prefix: str) -> None:
    state = build_model(recipe_of("mlp", seed=5), IMAGES).state_dict()
    path = tmp_path / f"weights{suffix}"
    saved = {prefix + name: tensor for name, tensor in state.items()}
    if suffix == ".pt":
        torch.save({"state_dict": saved, "step": 3}, path)
    else:
        save_file(saved, path)
    with logged() as said:
        model = build({"name": "mlp", "weights": path.name}, base=tmp_path)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    taken = [
        *(["module."] if prefix.startswith("module.") else []),
        *(["those of torch.compile and FSDP wrappers"] if "_orig_mod." in prefix else []),
    ]
    note = f"; removed from the names: {' and '.join(taken)}" if taken else ""
    assert said == [f"loaded 6 tensors from {path}{note}"]
    assert not torch.equal(
        build({"name": "mlp", "weights": path.name}, weights=False).state_dict()["layers.0.weight"],
        state["layers.0.weight"],
    )


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("key", [None, "state_dict"])
def test_averages_that_torch_took_are_weights(tmp_path: Path, key: str | None, strict: bool) -> None:
    average = torch.optim.swa_utils.AveragedModel(build_model(recipe_of("mlp", seed=5), IMAGES))
    state = average.state_dict()
    torch.save(state if key is None else {key: state}, tmp_path / "average.pt")
    with logged() as said:
        model = build({"name": "mlp", "weights": "average.pt", "weights_strict": strict}, base=tmp_path)
    assert all(torch.equal(state[f"module.{name}"], tensor) for name, tensor in model.state_dict().items())
    assert "the weights are an average, without its counter n_averaged" in said[0]
    assert "not in the model" not in said[0]


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    state = build({"name": "mlp", "hidden": [128, 64]}).state_dict()
    state["more"] = state.pop("layers.0.bias")
    save_file(state, path)
    with pytest.raises(UserError) as caught:
        build({"name": "mlp", "weights": str(path)})
    message = str(caught.value)
    assert "not in the file: layers.0.bias (1)" in message
    assert "not in the model: more (1)" in message
    assert "layers.2.weight (found (64, 128), expected (128, 128))" in message
    assert "weights_strict: false" in message
    model = build("mlp")
    report = load_weights(model, path, strict=False)
    assert report.loaded == ("layers.0.weight", "layers.4.bias")
    assert set(report.mismatched) == {"layers.2.weight", "layers.2.bias", "layers.4.weight"}
    assert torch.equal(model.layers[0].weight, state["layers.0.weight"])
    save_file({"nothing": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="no tensor"):
        load_weights(model, path, strict=False)


def test_strict_weights_change_nothing_when_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    model = build("mlp")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file({"layers.0.weight": torch.zeros(128, 64)}, path)
    with pytest.raises(UserError, match="not in the file"):
        load_weights(model, path)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_one_name_of_tied_weights_is_enough(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    state = gpt().state_dict()
    for left_out in ("head.weight", "tokens.weight"):
        save_file({name: tensor for name, tensor in state.items() if name != left_out}, path)
        model = gpt()
        nn.init.zeros_(model.tokens.weight)
        assert not load_weights(model, path).problems
        assert torch.equal(model.tokens.weight, state["tokens.weight"])


class Kinds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.register_buffer("ids", torch.zeros(3, dtype=torch.int64))
        self.register_buffer("few", torch.zeros(1, dtype=torch.int32))


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"weight": torch.ones(2, dtype=torch.int8)}, "weight: found I8, expected float32: whole numbers"),
        ({"weight": torch.ones(2, dtype=torch.complex64)}, "weight: found C64, expected float32: the imaginary part"),
        (
            {"weight": torch.ones(2).to(torch.float8_e4m3fn), "weight_scale": torch.ones(1)},
            "with its scale in weight_scale: it is quantised",
        ),
        ({"few": torch.tensor([2**40 + 5])}, "few: found I64, expected int32: it has numbers that are not"),
        (
            {"weight": torch.tensor([1.0, 1e300], dtype=torch.float64)},
            "weight: found F64, expected float32: .*would be infinite",
        ),
        ({"weight": torch.ones(2).double(), "ids": torch.tensor([7, 1, 2]).short(), "few": torch.tensor([9])}, ""),
        ({"ids": torch.tensor([0.5, 1, 2])}, "ids: found F32, expected int64: it has numbers that are not"),
        ({"weight": torch.ones(2).to(torch.float8_e4m3fn), "ids": torch.tensor([7.0, 1, 2]).half()}, ""),
    ],
)
def test_numbers_of_another_kind_are_refused(tmp_path: Path, changed: dict[str, Tensor], problem: str) -> None:
    path = tmp_path / "weights.safetensors"
    model = Kinds()
    save_file({**model.state_dict(), **changed}, path)
    if problem:
        with pytest.raises(UserError, match=problem):
            load_weights(model, path, strict=False)
        assert not model.weight.any()
    else:
        load_weights(model, path)
        assert model.weight.tolist() == [1, 1]
        assert model.ids.tolist() == [7, 1, 2]


def test_two_tensors_for_tied_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    state = {name: tensor.clone() for name, tensor in gpt().state_dict().items()}
    save_file(state, path)
    assert not load_weights(gpt(), path).problems
    save_file(state | {"head.weight": state["head.weight"] + 1}, path)
    with pytest.raises(
        UserError, match=r"\w+.weight and \w+.weight are one tensor in the model and differ in the file"
    ):
        load_weights(gpt(), path, strict=False)


def _lightning(state: dict[str, Tensor]) -> dict[str, Any]:
    """Return what Lightning's Trainer.save_checkpoint writes, with an optimizer that keeps what nobody else does."""
    from collections import deque

    return {
        "epoch": 1,
        "global_step": 30,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": state,
        "hyper_parameters": argparse.Namespace(lr=1e-3, path=Path("data"), shape=(3, 8), recent=deque([1])),
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(0.5)}},
        "optimizer_states": [{"state": {0: {"exp": [1, 2]}}, "param_groups": [{"params": [0, 1, 2, 3, 4, 5, 6]}]}],
        "lr_schedulers": [],
        "loops": {"fit_loop": {"state_dict": {}}},
    }


def _as_lightning(folder: Path, state: dict[str, Tensor], name: str) -> Path:
    torch.save(_lightning(state), folder / name)
    return folder / name


def _as_index(folder: Path, state: dict[str, Tensor], name: str) -> Path:
    names = sorted(state)
    shards = {"a.bin": names[:2], "b.bin": names[2:]} if "bin" in name else {"a.safetensors": names}
    for file, part in shards.items():
        tensors = {key: state[key] for key in part}
        save_file(tensors, folder / file) if file.endswith("safetensors") else torch.save(tensors, folder / file)
    weight_map = {key: file for file, part in shards.items() for key in part}
    (folder / name).write_text(json.dumps({"weight_map": weight_map}))
    return folder / name


def _as_file(folder: Path, state: dict[str, Tensor], name: str) -> Path:
    save_file(state, folder / name) if name.endswith(".safetensors") else torch.save(state, folder / name)
    return folder / name


@pytest.mark.parametrize("prefix", ["model.", "net.", "backbone.body.", "model.module."])
@pytest.mark.parametrize(
    ("write", "name"),
    [
        (_as_lightning, "last.ckpt"),
        (_as_lightning, "weights.pt"),
        (_as_file, "weights.bin"),
        (_as_file, "weights.safetensors"),
        (_as_index, "pytorch_model.bin.index.json"),
        (_as_index, "model.safetensors.index.json"),
    ],
)
def test_weights_of_others_are_loaded_without_their_prefix(
    tmp_path: Path, write: Callable[..., Path], name: str, prefix: str
) -> None:
    state = build_model(recipe_of("mlp", seed=5), IMAGES).state_dict()
    path = write(tmp_path, {prefix + key: tensor for key, tensor in state.items()}, name)
    with logged() as said:
        found = build({"name": "mlp", "weights": str(path)}).state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) for key in state)
    assert f"loaded 6 tensors from {path}; removed from the names: {prefix.partition('module.')[0]}" in said[-1]


def test_a_prefix_stays_where_not_all_names_fit_without_it(tmp_path: Path) -> None:
    state = {f"model.{key}": tensor for key, tensor in build("mlp").state_dict().items()}
    path = _as_lightning(tmp_path, state | {"loss.weight": torch.ones(3)}, "last.ckpt")
    for strict in (True, False):
        with pytest.raises(UserError) as caught:
            load_weights(build("mlp"), path, strict=strict)
        assert "6 of its 7 tensors fit without the prefix 'model.'" in str(caught.value)
        assert "weights_strict" not in str(caught.value), "it would load nothing"
    # where the model's own names begin so, nothing is taken off
    module = nn.ModuleDict({"model": nn.Linear(2, 2)})
    torch.save(module.state_dict(), path)
    assert load_weights(module, path).notes == ()


@pytest.mark.parametrize("old", [False, True])
def test_a_file_that_names_code_is_refused(tmp_path: Path, old: bool) -> None:
    path = tmp_path / "last.ckpt"
    content = _lightning({"a": torch.zeros(2)}) | {"callbacks": Code()}
    torch.save(content, path, _use_new_zipfile_serialization=not old)
    with pytest.raises(UserError, match=r"names \w+\.\w+.*`distrain checkpoint import` with --trust") as caught:
        load_weights(build("mlp"), path)
    assert str(caught.value).isprintable()


class Code:
    def __reduce__(self) -> Any:
        return (print, ("code ran",))


def test_weights_with_code_are_not_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"layers.0.weight": Code()}, path)
    with pytest.raises(UserError, match=r"names builtins\.print.*`distrain checkpoint import` with --trust opens it"):
        load_weights(build("mlp"), path)
    assert "code ran" not in capsys.readouterr().out
    torch.save({"step": 3}, path)
    with pytest.raises(UserError, match="found step; expected a state dict"):
        load_weights(build("mlp"), path)


# --------------------------------------------------------------------------------------------------------------------
# transformers

GPT2 = {"model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 16}
BERT = {
    "model_type": "bert",
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "hidden_size": 16,
    "intermediate_size": 16,
}
BART = {
    "model_type": "bart",
    "d_model": 16,
    **{f"{part}_{key}": 2 for part in ("encoder", "decoder") for key in ("layers", "attention_heads", "ffn_dim")},
}


PROPHETNET = {
    "model_type": "prophetnet",
    "hidden_size": 16,
    "activation_dropout": 0.0,
    **{f"num_{part}_{key}": 2 for part in ("encoder", "decoder") for key in ("layers", "attention_heads")},
    **{f"{part}_ffn_dim": 16 for part in ("encoder", "decoder")},
}
XLNET = {"model_type": "xlnet", "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 16}


@pytest.mark.parametrize(
    ("name", "config"), [("AutoModelForSeq2SeqLM", PROPHETNET), ("AutoModelForSequenceClassification", XLNET)]
)
def test_models_that_calculate_with_a_mask_get_numbers(name: str, config: dict[str, Any]) -> None:
    pytest.importorskip("transformers")
    pairs = name == "AutoModelForSeq2SeqLM"
    meta, task = (PAIRS, "seq2seq") if pairs else (replace(TEXT, num_classes=2), "classification")
    model = build({"name": f"transformers:{name}", "config": config}, meta, task).eval()
    # xlnet sums a text up at its end
    padded, begin = ([3, 4, 5, 6, 0], 0) if pairs else ([0, 3, 4, 5, 6], 1)
    tokens, target = torch.tensor([padded, [7, 8, 9, 10, 3]]), torch.tensor([[1, 3], [1, 5]])

    def outputs(rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        inputs = {"source": rows, "target": targets} if pairs else {"input_ids": rows, "attention_mask": rows != 0}
        return forward(model, inputs).logits

    alone = outputs(tokens[:1, begin : begin + 4], target[:1])
    assert torch.allclose(outputs(tokens, target)[:1], alone, atol=1e-5)


def test_a_model_may_pass_over_no_other_padding_than_the_datas() -> None:
    pytest.importorskip("transformers")
    model = {"name": "transformers:AutoModelForSeq2SeqLM", "config": {**BART, "pad_token_id": 5}}
    with pytest.raises(UserError, match="pad_token_id is 5, and the data are padded with 0"):
        build(model, PAIRS, "seq2seq")


def test_transformers_language_model_opens_again(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    name = "transformers:AutoModelForCausalLM"
    model = build_model(recipe_of({"name": name, "config": GPT2}, "language_modeling", seed=1), TEXT)
    assert model.config.vocab_size == 20
    assert model.config.eos_token_id is None
    assert model.config.pad_token_id is None
    tokens = torch.randint(20, (2, 16))
    logits = forward(model.eval(), tokens).logits
    assert logits.shape == (2, 16, 20)
    assert "lm_head.weight" in tied_names(model)
    model.config.save_pretrained(tmp_path)
    aliases = tied_names(model)
    save_file(
        {n: t for n, t in model.state_dict().items() if n not in aliases},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True).eval()
    assert torch.allclose(again(tokens).logits, logits)
    ours = build({"name": name, "path": tmp_path.name}, TEXT, "language_modeling", base=tmp_path.parent).eval()
    assert torch.allclose(forward(ours, tokens).logits, logits)
    assert ours.config.vocab_size == 20
    bare = build({"name": name, "path": str(tmp_path)}, TEXT, "language_modeling", weights=False).eval()
    assert not torch.allclose(forward(bare, tokens).logits, logits)


def test_transformers_classifier_does_not_see_padding() -> None:
    pytest.importorskip("transformers")
    meta = DataMeta(input_shape=(8,), vocab_size=20, pad_id=5, num_classes=3)
    model = build({"name": "transformers:AutoModelForSequenceClassification", "config": BERT}, meta).eval()
    tokens = torch.tensor([[1, 2, 3, 0]])
    logits = forward(model, tokens).logits
    assert logits.shape == (1, 3)
    assert torch.allclose(forward(model, F.pad(tokens, (0, 4), value=5)).logits, logits, atol=1e-5)


@pytest.mark.parametrize(
    ("task", "other", "meta", "probabilities"),
    [
        (
            "classification",
            "multilabel",
            replace(TEXT, num_classes=3, class_names=tuple("cab")),
            lambda logits: logits.softmax(-1),
        ),
        ("multilabel", "classification", replace(TEXT, num_targets=3), lambda logits: logits.sigmoid()),
        ("regression", "classification", replace(TEXT, num_targets=1), lambda logits: logits),
        ("binary", "regression", replace(TEXT, class_names=("no", "yes")), lambda logits: logits.sigmoid()),
    ],
)
def test_a_pipeline_of_transformers_reads_the_logits_of_a_task_as_the_task_does(
    tmp_path: Path, task: str, other: str, meta: DataMeta, probabilities: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """Also where it begins with a folder whose configuration is of another task."""
    transformers = pytest.importorskip("transformers")
    save_tokenizer(tmp_path / "tokenizer")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    meta, name = replace(meta, vocab_size=len(tokenizer)), "transformers:AutoModelForSequenceClassification"
    built = build({"name": name, "config": BERT}, meta, task).eval()
    of_other = build({"name": name, "config": BERT}, replace(meta, num_classes=2, num_targets=2), other)
    of_other.save_pretrained(tmp_path / "other")
    for model in (built, build({"name": name, "path": str(tmp_path / "other")}, meta, task, weights=False).eval()):
        made = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer, top_k=None)
        found = {each["label"]: each["score"] for each in made("red lamp")[0]}
        logits = model(**tokenizer("red lamp", return_tensors="pt")).logits[0]
        expected = probabilities(logits.detach()).tolist()
        labels = {"binary": ["yes"]}.get(task, meta.class_names) or [f"LABEL_{at}" for at in range(len(expected))]
        assert [found[label] for label in labels] == pytest.approx(expected, abs=1e-6)


def test_transformers_encoder_decoder() -> None:
    pytest.importorskip("transformers")
    model = build({"name": "transformers:AutoModelForSeq2SeqLM", "config": BART}, PAIRS, "seq2seq").eval()
    source, target = torch.tensor([[3, 4, 5]]), torch.tensor([[1, 3, 4, 5]])
    logits = forward(model, {"source": source, "target": target}).logits
    assert logits.shape == (1, 4, 13)
    padded = forward(model, {"source": F.pad(source, (0, 2)), "target": target}).logits
    assert torch.allclose(padded, logits, atol=1e-5)


def test_damaged_weights_are_refused_or_whole(tmp_path: Path) -> None:
    model, path, chance = nn.Linear(40, 40), tmp_path / "model.pt", random.Random(0)
    torch.save(model.state_dict(), path)
    good, refused = path.read_bytes(), 0
    for trial in range(150):
        damaged = bytearray(good)
        if trial % 3 == 0:
            damaged = damaged[: chance.randrange(len(damaged))]
        else:
            damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        other = nn.Linear(40, 40)
        try:
            load_weights(other, path)
        except UserError:
            refused += 1
        else:  # a bit of the archive that says nothing of the tensors, such as a time
            assert all(torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters(), strict=True))
    assert refused > 120


def test_weights_that_differ_by_wrappers_alone(tmp_path: Path) -> None:
    state = nn.Linear(2, 2).state_dict()
    torch.save(state | {"module.weight": torch.zeros(2, 2)}, tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"two tensors 'weight' without .*'module\.weight'; expected one"):
        load_weights(nn.Linear(2, 2), tmp_path / "model.pt")


# --------------------------------------------------------------------------------------------------------------------
# Describing


def test_describe_model() -> None:
    model = build({"name": "mlp", "hidden": [8], "norm": "batch"})
    model.layers[0].weight.requires_grad_(False)
    summary = describe_model(model)
    assert summary.parameters == 64 * 8 + 8 + 16 + 8 * 10 + 10
    assert summary.trainable == summary.parameters - 64 * 8
    assert summary.by_dtype == {"float32": summary.parameters}
    assert summary.bytes == 4 * summary.parameters + 4 * 16 + 8
    assert "trainable" in str(summary)


def test_what_the_recipe_freezes_is_not_trainable() -> None:
    model = build({"name": "mlp", "hidden": [8], "norm": "batch"})
    model.layers[0].bias.requires_grad_(False)
    frozen = frozen_names(model, OptimSection(freeze=["layers.0.*", "layers.1.weight"]))
    summary = describe_model(model, frozen)
    assert summary.parameters == 64 * 8 + 8 + 16 + 8 * 10 + 10
    assert summary.trainable == 8 + 8 * 10 + 10
    tied = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    tied[1].weight = tied[0].weight
    summary = describe_model(tied, frozen_names(tied, OptimSection()))
    assert (summary.parameters, summary.trainable) == (9, 9)


def test_names() -> None:
    texts = ["text_classifier", "token_classifier"]
    assert models.names() == ["cnn", "gpt", "mlp", "rnn", "seq2seq", "sequential", *texts]
