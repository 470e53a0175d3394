"""Models as graphs, opened by what others use: they compute what the model computes, and tell how they are used."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from runs import cli, train, write_recipe
from torch import Tensor, nn
from torch.nn import functional as F

from distrain.checkpoint import find_checkpoint
from distrain.config import UserError
from distrain.inference.graphs import export_graph
from distrain.inference.trained import trained_model
from distrain.networks.calling import forward


class Residual(nn.Module):
    """Convolutions with batch norm, and a block that adds to what it reads."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.stem, self.block = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(6), nn.BatchNorm2d(6)])
        self.head = nn.Linear(6, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.norms[0](self.stem(images)))
        x = F.relu(x + self.norms[1](self.block(x)))
        return self.head(x.mean((2, 3)))


class Chooses(Residual):
    """What it computes depends on its values."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) if images.sum() > 0 else super().forward(-images)


class Counts(Residual):
    """Depends on the number of samples that it was traced with."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * torch.ones(len(images), 1)


class Draws(Residual):
    """Draws at random when it predicts."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) + torch.rand(images.shape[0], 1)


class Switches(Residual):
    """Computes something else for large batches."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * (2 if images.shape[0] > 8 else 1)


class SwitchesByLength(nn.Module):
    """Computes something else for short texts, and takes no more than 40 tokens."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.embedding, self.head = nn.Embedding(vocab_size, 8), nn.Linear(8, vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:
        if tokens.shape[1] > 40:
            raise ValueError("too long")
        return self.head(self.embedding(tokens).cumsum(1) * (2 if tokens.shape[1] > 8 else 1))


DIGITS = "task: classification\ndata: {name: digits, split: [0.7, 0.15, 0.15]}"
TEXT = "task: language_modeling\ndata: {name: text, path: data.txt, seq_len: 32}"
KINDS = {
    "mlp": (DIGITS, "{name: mlp, hidden: [16]}"),
    "residual": (DIGITS, '{name: "test_graphs:Residual"}'),
    "gpt": (TEXT, "{name: gpt, n_layer: 2, n_head: 2, d_model: 16}"),
    "transformers": (
        TEXT,
        '{name: "transformers:AutoModelForCausalLM", config: {model_type: llama, hidden_size: 16, '
        "intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2, max_position_embeddings: 32}}",
    ),
    "chooses": (DIGITS, '{name: "test_graphs:Chooses"}'),
    "counts": (DIGITS, '{name: "test_graphs:Counts"}'),
    "draws": (DIGITS, '{name: "test_graphs:Draws"}'),
    "switches": (DIGITS, '{name: "test_graphs:Switches"}'),
    "lengths": (TEXT, '{name: "test_graphs:SwitchesByLength"}'),
    "rotary": (TEXT, "{name: gpt, n_layer: 1, n_head: 2, d_model: 16, positions: rotary}"),
}


GRAPHS, SLOW = ("mlp", "residual", "gpt", "transformers"), ("transformers", "pt2")


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            (folder / "data.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
            data, model = KINDS[kind]
            rest = "optim: {lr: 1.0e-2}\nbatch: {global: 8}\ntrain: {steps: 3, ema: 0.5}\neval: {metrics: []}\n"
            recipe = write_recipe(folder, f"name: {kind}\n{data}\nmodel: {model}\n{rest}")
            train(1, recipe, folder / "run")
            made[kind] = folder / "run"
        return made[kind]

    return make


def batches(kind: str) -> list[Tensor]:
    """Return inputs of two batch sizes, and of two lengths, that the graph was not traced with."""
    torch.manual_seed(3)
    if KINDS[kind][0] == DIGITS:
        return [torch.randn(count, 1, 8, 8) for count in (1, 5)]
    return [torch.randint(0, 256, shape) for shape in ((1, 9), (5, 32))]


def opened(file: Path) -> Callable[[Tensor], Tensor]:
    if file.suffix == ".pt2":
        module = torch.export.load(file).module()
        return lambda inputs: module(inputs)[0]
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return lambda inputs: torch.from_numpy(np.asarray(session.run(None, {"inputs": inputs.numpy()})[0]))


def run_code(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run the code of a model card where it says; returns the names that it made."""
    code = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert len(code) == 1
    monkeypatch.chdir(folder)
    made: dict[str, Any] = {}
    exec(code[0], made)
    return made


@pytest.mark.parametrize(
    ("kind", "format"),
    # both formats are made from one graph, and that of a transformers model takes long
    [(kind, format) for format in ("onnx", "pt2") for kind in KINDS if kind in GRAPHS and (kind, format) != SLOW],
)
def test_graphs_compute_what_the_model_computes(run_of, tmp_path, monkeypatch, kind: str, format: Any) -> None:
    checkpoint = find_checkpoint(run_of(kind))
    out = tmp_path / "out"
    export_graph(checkpoint, out, format=format, ema=True)
    model, graph = trained_model(checkpoint), opened(out / f"model.{format}")
    for inputs in batches(kind):
        with torch.no_grad():
            torch.testing.assert_close(graph(inputs), forward(model, inputs).logits, rtol=1e-5, atol=1e-5)
    shape = run_code(out, monkeypatch)["logits"].shape
    assert tuple(shape) == ((1, 10) if KINDS[kind][0] == DIGITS else (1, 4, 256))
    if format == "pt2":
        with zipfile.ZipFile(out / "model.pt2") as file:
            contents = {name: file.read(name) for name in file.namelist()}
        assert not [name for name, content in contents.items() if content[:2] in (b"PK", b"\x80\x02")], "pickles"
        assert b'"use_pickle": true' not in b"".join(contents.values())
    hugging_face = ["config.json"] if kind == "transformers" else []
    facts = "distrain.json" if hugging_face else "config.json"
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [*hugging_face, facts, "README.md", "recipe.yaml", f"model.{format}"]
    )


@pytest.mark.parametrize("kind", ["mlp", "residual", "transformers"])
def test_a_folder_of_weights_has_what_is_needed_to_use_them(run_of, tmp_path, monkeypatch, kind: str) -> None:
    out, run = tmp_path / "out", run_of(kind)
    ended = cli("export", run, "-o", out, "--ema")
    assert ended.status == 0, ended.err
    made = run_code(out, monkeypatch)
    model = trained_model(find_checkpoint(run))
    assert {name: each.tolist() for name, each in made["model"].state_dict().items()} == {
        name: each.tolist() for name, each in model.state_dict().items()
    }
    facts = json.loads((out / ("distrain.json" if kind == "transformers" else "config.json")).read_text())
    assert facts["step"] == 3
    assert facts["averaged"]
    card = (out / "README.md").read_text()
    if kind == "transformers":
        assert facts["data"]["vocab_size"] == 256
        assert json.loads((out / "config.json").read_text())["model_type"] == "llama"
    else:
        assert facts["data"]["input_shape"] == [1, 8, 8]
        assert facts["data"]["class_names"] == [*"0123456789"]
        assert re.search(r"On split `test`, at step 3:\n\n.*\n.*\n\| loss \| \d", card)
        assert "Samples: test 269, train 1,258, valid 270. SHA-256" in card
    assert "moving average, decay 0.5" in card
    assert "Its evaluation was of the moving average" not in card
    again = cli("export", run, "-o", out)
    assert again.status == 1
    assert "exists already" in again.err
    assert cli("export", run, "-o", out, "--overwrite").status == 0
    assert "Its evaluation was of the moving average" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("chooses", "cannot be traced as a graph: .+torch.export needs"),
        ("counts", r"constant \(2\).+x.shape\[0\]"),
        ("draws", "differ by up to"),
        ("switches", r"chooses by sizes, and was traced where inputs.shape\[0\] <= 8"),
    ],
)
def test_a_model_that_is_no_graph_leaves_nothing(run_of, tmp_path, capsys, kind: str, why: str) -> None:
    checkpoint = find_checkpoint(run_of(kind))
    capsys.readouterr()
    with pytest.raises(UserError, match=why) as error:
        export_graph(checkpoint, tmp_path / "model.pt2", format="pt2")
    assert "\n" not in str(error.value)
    assert capsys.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())


def test_a_graph_takes_no_sizes_for_which_the_model_computes_otherwise(run_of, tmp_path) -> None:
    found = export_graph(find_checkpoint(run_of("lengths")), tmp_path / "fixed", format="onnx")
    assert found.notes == (
        "the graph takes texts of 32 tokens alone: its forward chooses by sizes, and was traced where "
        "inputs.shape[1] > 8",
    )
    graph = opened(tmp_path / "fixed" / "model.onnx")
    assert graph(torch.zeros(5, 32, dtype=torch.long)).shape == (5, 32, 256)
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument):
        graph(torch.zeros(5, 8, dtype=torch.long))

    assert export_graph(find_checkpoint(run_of("rotary")), tmp_path / "bounded", format="onnx").notes == ()
    (inputs,) = json.loads((tmp_path / "bounded" / "config.json").read_text())["inputs"]
    assert inputs["shape"] == ["batch", "inputs_tokens"]
    assert inputs["most_tokens"] == 32  # more would be computed, with positions that it was not trained at
    assert "named sizes may vary, inputs_tokens up to 32." in (tmp_path / "bounded" / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("-o", "model.pt", "--format", "onnx"), "--format onnx does not write a .pt file"),
        (("-o", "model.onnx", "--format", "pt2"), "--format pt2 does not write a .onnx file"),
        (("-o", "model", "--format", "ptt"), "no format 'ptt'; did you mean 'pt'"),
        (("-o", "model", "--format", "onnx", "--trust"), "--trust is for other trainers' checkpoints"),
        (("-o", "model", "--format", "hf"), "--format hf is for models of the transformers library"),
        (("-o", "model.pt", "--format", "hf"), "--format hf writes a folder"),
    ],
)
def test_names_that_are_not_of_the_format(run_of, tmp_path, arguments: tuple[str, ...], why: str) -> None:
    flag, name, *rest = arguments
    ended = cli("export", run_of("mlp"), flag, tmp_path / name, *rest)
    assert ended.status == 1
    assert why in ended.err
    assert not list(tmp_path.iterdir())


def test_weights_are_not_graphs(run_of, tmp_path) -> None:
    ended = cli("export", run_of("mlp"), "-o", tmp_path / "model.onnx", "--dtype", "bf16")
    assert ended.status == 1
    assert "--dtype is for weights alone" in ended.err
    file = tmp_path / "model.safetensors"
    assert cli("export", run_of("mlp"), "-o", file).status == 0
    assert [*tmp_path.iterdir()] == [file]
    foreign = cli("export", file, "-o", tmp_path / "model.onnx", "--format", "onnx")
    assert foreign.status == 1
    assert "--format onnx is for checkpoints of distrain's own" in foreign.err
