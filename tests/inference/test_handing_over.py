"""Folders of weights, opened where distrain is not installed; and all that stands in them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import cli, train, write_recipe

from distrain.checkpoint import find_checkpoint
from distrain.config.yaml import load_recipe
from distrain.data import build_transform
from distrain.inference.trained import trained_model
from distrain.networks.calling import forward

DIGITS = "task: classification\ndata: {name: digits, transforms: {eval: [{name: Normalize, mean: [0.5], std: [2.0]}]}}"
TEXT = "task: language_modeling\ndata: {name: text, path: data.txt, seq_len: 16, tokenizer: ./words/tokenizer.json}"
CONFIG = (
    "config: {model_type: llama, hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1, num_attention_heads: 2}"
)
KINDS = {
    "torchvision": (DIGITS, "{name: mobilenet_v3_small, dropout: 0.1}", "safetensors"),
    "timm": (DIGITS, "{name: 'timm:vit_tiny_patch16_224', embed_dim: 8, depth: 1, num_heads: 2, patch_size: 4}", "pt"),
    "file": (DIGITS, "{name: 'my-net.py:Net', width: 5}", "safetensors"),
    "package": (DIGITS, "{name: 'nets.small:Net', width: 5}", "pt"),
    "transformers": (TEXT, f"{{name: 'transformers:AutoModelForCausalLM', {CONFIG}}}", "safetensors"),
    "transformers-pt": (TEXT, f"{{name: 'transformers:LlamaForCausalLM', {CONFIG}}}", "pt"),
}
NET = """
import torch
from torch import nn

from PLACE.parts import head


class Net(nn.Module):
    def __init__(self, num_classes, input_shape, width):
        super().__init__()
        assert isinstance(input_shape, tuple)
        self.first, self.head = nn.Linear(input_shape[-1], width), head(width, num_classes)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, images):
        return self.head(self.first(images).relu().mean((1, 2))) * self.scale
"""
PARTS = "from torch import nn\n\n\ndef head(width, count):\n    return nn.Linear(width, count)\n"
LOADS = """
import os, sys
import torch
sys.modules["distrain"] = None  # importing it raises
folder, *kinds = sys.argv[1:]
path = [*sys.path]
for kind in kinds:
    os.chdir(f"{folder}/{kind}/out")
    sys.path[:] = ["", *path]
    sys.path_importer_cache.clear()
    made = {}
    exec(open("code.txt").read(), made)
    model, inputs = made["model"], torch.load("../inputs.pt")
    assert not model.training
    with torch.no_grad():
        found = model(inputs)
    torch.save(getattr(found, "logits", found), "../outputs.pt")
    for name in [name for name in sys.modules if name.partition(".")[0] in ("nets", "parts", "my-net")]:
        del sys.modules[name]
try:
    import distrain
except ImportError:
    print("without distrain")
"""


def code_of(folder: Path) -> str:
    """Return the code of a model card."""
    code = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert len(code) == 1
    return str(code[0])


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of a kind: its run is `run`, and what was exported `out`."""
    folder, made = tmp_path_factory.mktemp("exported"), set()

    def make(kind: str) -> Path:
        data, model, format = KINDS[kind]
        if kind not in made:
            made.add(kind)
            with pytest.MonkeyPatch.context() as patch:
                (folder / kind).mkdir()
                patch.chdir(folder / kind)
                patch.syspath_prepend(folder / kind)
                for place, file in (("my-net.py", "parts.py"), ("nets/small.py", "nets/parts.py")):
                    Path("nets").mkdir(exist_ok=True)
                    Path(place).write_text(NET.replace("PLACE.", "nets." if "/" in place else ""))
                    Path(file).write_text(PARTS)
                Path("my-net.py").write_text(NET.replace("from PLACE.parts", "from parts"))
                Path("data.txt").write_text("the quick brown fox jumps over the quick brown fox " * 20)
                write_tokenizer(Path("words"))
                rest = "optim: {lr: 1.0e-2}\nbatch: {global: 4}\ntrain: {steps: 1}\neval: {metrics: []}\n"
                train(1, write_recipe(Path(), f"name: it\n{data}\nmodel: {model}\n{rest}"), Path("run"))
                ended = cli("export", "run", "-o", "out", "--format", format)
                assert ended.status == 0, ended.err
        return folder / kind

    return make


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[UNK]", "the", "quick", "brown", "fox", "jumps", "over", "<eos>"]
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize(
    "kinds",
    [
        ["torchvision", "timm", "file", "transformers"],
        pytest.param(["package", "transformers-pt"], marks=pytest.mark.more),
    ],
)
def test_models_of_others_load_where_distrain_is_not_installed(exported, kinds: list[str]) -> None:
    expected = {}
    for kind in kinds:
        folder = exported(kind)
        out = folder / "out"
        assert "without distrain" in (out / "README.md").read_text()
        assert "distrain" not in code_of(out)
        (out / "code.txt").write_text(code_of(out))
        torch.manual_seed(1)
        inputs = torch.randn(3, 1, 8, 8) if KINDS[kind][0] == DIGITS else torch.randint(0, 7, (2, 9))
        torch.save(inputs, folder / "inputs.pt")
        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            patch.chdir(folder)
            patch.syspath_prepend(folder)
            expected[kind] = forward(trained_model(find_checkpoint(folder / "run")), inputs).logits
        if kind in ("file", "package"):
            shutil.rmtree(folder / "nets")
            (folder / "my-net.py").unlink()
    done = subprocess.run(
        [sys.executable, "-c", LOADS, str(folder.parent), *kinds], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "without distrain\n"
    for kind, logits in expected.items():
        found = torch.load(exported(kind) / "outputs.pt", weights_only=True)
        torch.testing.assert_close(found, logits, rtol=0, atol=1e-5, msg=kind)
        if kind in ("file", "package"):
            code = exported(kind) / "out/code"
            assert sorted(file.relative_to(code).as_posix() for file in code.rglob("*.py")) == (
                ["my-net.py", "parts.py"] if kind == "file" else ["nets/parts.py", "nets/small.py"]
            )


def test_preprocessing_classes_and_tokenizer_are_there_to_be_opened(exported) -> None:
    from tokenizers import Tokenizer

    out = exported("torchvision") / "out"
    facts = json.loads((out / "config.json").read_text())
    recipe = load_recipe(out / "recipe.yaml").recipe
    assert [{"name": each.name, **each.args} for each in recipe.data.transforms.eval] == (
        facts["preprocessing"]["transforms"]
    )
    images = torch.rand(4, 1, 8, 8)
    batch = {"inputs": images.clone(), "ids": torch.arange(4)}
    prepared = build_transform(recipe, "eval")(batch, np.zeros(4, dtype=np.int64))["inputs"]
    torch.testing.assert_close(prepared, (images - 0.5) / 2)
    assert facts["data"]["class_names"] == [*"0123456789"]
    assert facts["model_call"]["arguments"]["num_classes"] == 10
    out = exported("transformers") / "out"
    assert json.loads((out / "distrain.json").read_text())["files"] == ["tokenizer.json"]
    assert Tokenizer.from_file(str(out / "tokenizer.json")).encode("the fox").ids == [1, 4]


def test_the_card_leads_from_a_row_to_a_prediction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sklearn.datasets import load_diabetes

    monkeypatch.chdir(tmp_path)
    data = "task: regression\ndata: {name: diabetes, split: [0.8, 0.2], standardize_target: true}"
    train(
        1,
        write_recipe(tmp_path, f"name: it\n{data}\nmodel: {{name: mlp}}\nbatch: {{global: 64}}\ntrain: {{steps: 2}}\n"),
        Path("run"),
    )
    rows = load_diabetes(scaled=False).data[:5]
    np.savetxt("rows.csv", rows, delimiter=",", header=",".join(load_diabetes().feature_names), comments="")
    for words in (["export", "run", "-o", "out"], ["predict", "run", "rows.csv", "-o", "p.npy"]):
        assert cli(*words).status == 0
    card = Path("out/README.md").read_text()
    assert "| preprocessing | by what was fitted on the training split (`preprocessing.fitted_on_train`) |" in card
    assert "`(value - feature_mean) / feature_std`" in card
    assert "`output * target_std + target_mean`" in card
    monkeypatch.chdir("out")
    made: dict[str, Any] = {}
    exec(code_of(Path()), made)
    fitted = json.loads(Path("config.json").read_text())["preprocessing"]["fitted_on_train"]
    inputs = torch.from_numpy((rows - fitted["feature_mean"]) / fitted["feature_std"]).float()
    outputs = made["model"](inputs).detach().double().numpy() * fitted["target_std"] + fitted["target_mean"]
    np.testing.assert_allclose(outputs[:, 0], np.load("../p.npy").reshape(-1), rtol=1e-6)


def test_code_that_has_changed_or_needs_distrain_is_said(exported, monkeypatch) -> None:
    folder = exported("torchvision")
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    for name, text in {"own_net": "import distrain\n" + NET.replace("PLACE.", ""), "parts": PARTS}.items():
        Path(f"{name}.py").write_text(text)
    rest = "batch: {global: 4}\ntrain: {steps: 1}\neval: {metrics: []}\n"
    recipe = write_recipe(Path(), f"name: it\n{DIGITS}\nmodel: {{name: 'own_net.py:Net', width: 3}}\n{rest}")
    train(1, recipe, Path("own"))
    assert cli("export", "own", "-o", "own-out").status == 0
    card = Path("own-out/README.md").read_text()
    assert "It imports distrain, which has to be installed: `own_net.py`." in card
    assert "without distrain" not in card
    assert "has changed" not in card
    Path("parts.py").write_text(PARTS + "MORE = 1\n")
    refused = cli("export", "own", "-o", "own-out")
    assert "exists already" in refused.err
    assert cli("export", "own", "-o", "own-out", "--overwrite").status == 0
    assert "It has changed since the training: `parts.py`." in Path("own-out/README.md").read_text()
    Path("parts.py").unlink()
    Path("own_net.py").unlink()
    assert cli("export", "own", "-o", "without").status == 0, "the code is gone"
    assert "Where `own_net` can be imported" in Path("without/README.md").read_text()
