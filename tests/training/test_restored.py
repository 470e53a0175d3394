"""What is made of a model with adapters: merged, and as a folder of peft."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import RECIPE, lora_recipe
from runs import TINY, cli, last, train, write_recipe
from safetensors.torch import load_file
from torch import nn

from distrain.api.exporting import export_model
from distrain.checkpoint import Reader, read_manifest
from distrain.config import UserError
from distrain.config.yaml import load_recipe
from distrain.datasets.base import DataMeta
from distrain.datasets.stored_meta import meta_from_json, meta_to_json
from distrain.datasets.tables import TableMeta
from distrain.inference.trained import trained_model
from distrain.models import build_model, load_weights
from distrain.training.restored import export_adapter, export_checkpoint, frozen_problem, restored_model

transformers = pytest.importorskip("transformers")
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [250, 7, 1, 82, 8, 1, 8, 256]])


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a language model with adapters, averaged, with dropout."""
    folder = tmp_path_factory.mktemp("tuned")
    recipe = lora_recipe(
        folder, RECIPE.replace("alpha: 4", "alpha: 4, dropout: 0.1").replace("fp32}", "fp32, ema: 0.5}")
    )
    settings = transformers.GenerationConfig(max_new_tokens=12, eos_token_id=[46, 7], repetition_penalty=1.0)
    settings.save_pretrained(folder / "base")
    train(1, recipe, folder / "run", "checkpoint.every=null", "eval.every=null")
    return folder


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.eval()(TOKENS).logits
    return found


def test_merged_weights_and_adapters_compute_the_same(tuned: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    kind = transformers.AutoModelForCausalLM
    with Reader(last(tuned / "run")) as reader:
        meta = meta_from_json(reader.manifest.scalars["meta"])
        recipe = load_recipe(tuned / "run/recipe.yaml").recipe
        expected = logits(restored_model(reader, recipe, meta, averaged=True))
        not_averaged = logits(restored_model(reader, recipe, meta, averaged=False))
    base = kind.from_pretrained(tuned / "base")
    assert (logits(base) - expected).abs().max() > 1e-3
    assert (not_averaged - expected).abs().max() > 1e-4
    # what the run itself has exported
    merged = kind.from_pretrained(tuned / "run/export")
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)
    names = load_file(tuned / "run/export/model.safetensors").keys()
    assert names == load_file(tuned / "base/model.safetensors").keys()
    for command, found in (("export", tmp_path / "one"), ("checkpoint", tmp_path / "two")):
        words = [command, "export"] if command == "checkpoint" else [command]
        assert cli(*words, tuned / "run", "-o", found, "--ema").status == 0
        assert (found / "model.safetensors").read_bytes() == (tuned / "run/export/model.safetensors").read_bytes()
    done = cli("export", tuned / "run", "-o", tmp_path / "adapter", "--format", "adapter", "--ema")
    assert done.status == 0, done.err
    opened = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(logits(opened), expected, rtol=0, atol=1e-5)
    assert opened.peft_config["default"].base_model_name_or_path == str(tuned / "base")
    assert opened.peft_config["default"].task_type == "CAUSAL_LM"
    torch.testing.assert_close(logits(opened.merge_and_unload()), expected, rtol=0, atol=1e-5)
    size = (tmp_path / "adapter/adapter_model.safetensors").stat().st_size
    assert size * 5 < (tuned / "base/model.safetensors").stat().st_size


def test_an_export_generates_in_transformers_what_the_run_does(tuned: Path) -> None:
    run = tuned / "run"
    settings = transformers.GenerationConfig.from_pretrained(run / "export")
    assert (settings.max_new_tokens, settings.eos_token_id) == (12, [46, 7])
    prompt = "the quick brown"
    done = cli("generate", run, "--prompt", prompt, "--max-new-tokens", 12, "--json")
    assert done.status == 0, done.err
    model = transformers.AutoModelForCausalLM.from_pretrained(run / "export")
    found = model.generate(torch.tensor([list(prompt.encode())]))[0, len(prompt) :].tolist()  # by its settings
    wanted = json.loads(done.out)
    assert bytes(each for each in found if each < 256).decode(errors="replace") == wanted["text"]
    assert len(found) == wanted["tokens"] > 0


@pytest.mark.fault(33)
@pytest.mark.parametrize("frozen", ["reference", "store"])
def test_another_configuration_beside_the_same_weights_is_not_computed_with(
    frozen: str, tuned: Path, tmp_path: Path
) -> None:
    shutil.copytree(tuned / "base", tmp_path / "base")
    text = (tuned / "recipe.yaml").read_text().replace(str(tuned / "base"), str(tmp_path / "base"))
    recipe, run = write_recipe(tmp_path, text), tmp_path / "run"
    train(1, recipe, run, "train.steps=1", "eval.every=null", f"checkpoint.frozen={frozen}")
    expected = logits(trained_model(last(run)))
    config = tmp_path / "base/config.json"
    before = config.read_text()
    for key, value in (("rms_norm_eps", 0.5), ("hidden_act", "relu")):
        config.write_text(json.dumps(json.loads(before) | {key: value}))
        assert torch.equal(logits(trained_model(last(run))), expected), "by the configuration that the run has kept"
        assert frozen_problem(last(run)) is None
    shutil.copy(config, run / "transformers/config.json")
    with pytest.raises(UserError, match=r"base/config\.json is not the one that .* was trained with"):
        trained_model(last(run))
    config.write_text(before)
    assert torch.equal(logits(trained_model(last(run))), expected)


def test_an_export_of_what_was_not_evaluated_says_so(tuned: Path, tmp_path: Path) -> None:
    said = [export_model(tuned / "run", tmp_path / f"{ema}.safetensors", ema=ema)[2].notes for ema in (False, True)]
    assert "evaluated by their moving average, which --ema writes" in "".join(said[0])
    assert "average" not in "".join(said[1])
    for dtype, rounded in (("bf16", True), ("fp32", False)):
        export_model(tuned / "run", tmp_path / dtype, ema=True, dtype=dtype)
        assert ("these are rounded to bfloat16" in (tmp_path / dtype / "README.md").read_text()) == rounded


def test_an_adapter_is_not_written_over(tuned: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    export_adapter(last(tuned / "run"), tmp_path / "adapter")
    with pytest.raises(UserError, match="exists already"):
        export_adapter(last(tuned / "run"), tmp_path / "adapter")
    export_adapter(last(tuned / "run"), tmp_path / "adapter", overwrite=True)


def test_a_run_with_adapters_is_no_weights_to_start_from(tuned: Path) -> None:
    recipe = load_recipe(tuned / "recipe.yaml").recipe
    model = build_model(recipe.model_copy(update={"model": recipe.model.model_copy(update={"lora": None})}), DataMeta())
    with pytest.raises(UserError, match=r"distrain export"):
        load_weights(model, tuned / "run")
    load_weights(model, tuned / "run/export/model.safetensors")


HEAD = TINY.replace("precision: fp64, ema: 0.9", "precision: fp32").replace(
    "hidden: [16]",
    "hidden: [16, 12], lora: {r: 2, targets: [layers.0, layers.2], train: [layers.4.*]}, weights: WEIGHTS",
)


def test_a_model_of_ones_own_with_a_trained_head(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    plain = TINY.replace("hidden: [16]", "hidden: [16, 12]").replace("precision: fp64, ema: 0.9", "precision: fp32")
    train(1, write_recipe(tmp_path, plain), tmp_path / "base", "train.steps=4", "eval.every=null")
    weights = tmp_path / "base/export/model.safetensors"
    recipe = write_recipe(tmp_path, HEAD.replace("WEIGHTS", str(weights)))
    train(1, recipe, tmp_path / "run", "train.steps=4", "eval.every=null")
    manifest = read_manifest(last(tmp_path / "run"))
    assert manifest.frozen is not None
    assert manifest.frozen.key == "model.weights"
    assert {name for name in manifest.tensors if name.startswith("model/") and "lora" not in name} == {
        "model/layers.4.weight", "model/layers.4.bias",
    }  # fmt: skip
    merged = load_file(tmp_path / "run/export/model.safetensors")
    export_adapter(last(tmp_path / "run"), tmp_path / "adapter")

    def model(file: Path) -> nn.Module:
        found = build_model(load_recipe(write_recipe(tmp_path, plain)).recipe, meta_from_json(manifest.scalars["meta"]))
        load_weights(found, file)
        return found.eval()

    x = torch.linspace(-1, 1, 5 * 64).view(5, 1, 8, 8)
    expected = model(tmp_path / "run/export/model.safetensors")(x)
    assert not torch.equal(merged["layers.4.weight"], load_file(weights)["layers.4.weight"])
    opened = peft.PeftModel.from_pretrained(model(weights), tmp_path / "adapter")
    torch.testing.assert_close(opened(x), expected, rtol=0, atol=1e-5)


SHARED = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.one, self.other = nn.Linear(8, 8), nn.Linear(8, 8)
        self.other.weight = self.one.weight

    def forward(self, x):
        return self.last(self.other(self.one(self.norm(self.first(x)))))
"""


def test_an_adapter_has_running_statistics_and_each_of_tied_weights(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    (tmp_path / "shared.py").write_text(SHARED)
    found: dict[str, Any] = {}
    exec(SHARED, found)
    torch.save(found["Net"]().state_dict(), tmp_path / "base.pt")
    recipe = (
        "name: shared\ntask: classification\ndata: {name: iris, split: [0.8, 0.2]}\n"
        f"model: {{name: '{tmp_path}/shared.py:Net', weights: {tmp_path}/base.pt, "
        "lora: {r: 2, targets: [first], train: [one.weight]}}\n"
        "optim: {lr: 0.1}\nbatch: {global: 10}\ntrain: {steps: 4, precision: fp32}\n"
    )
    train(1, write_recipe(tmp_path, recipe), tmp_path / "run")
    export_adapter(last(tmp_path / "run"), tmp_path / "adapter")
    merged, base = found["Net"]().eval(), found["Net"]()
    merged.load_state_dict(load_file(tmp_path / "run/export/model.safetensors"))
    base.load_state_dict(torch.load(tmp_path / "base.pt"))
    x = torch.linspace(-1, 1, 20).view(5, 4)
    opened = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(opened(x), merged(x), rtol=0, atol=1e-5)


def test_only_a_run_with_adapters_has_an_adapter(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    kept = Path(__file__).parents[1] / "support/kept_runs/fsdp2"
    shutil.copytree(kept, tmp_path / "run")
    with pytest.raises(UserError, match=r"its recipe has no model\.lora"):
        export_adapter(last(tmp_path / "run"), tmp_path / "adapter")
    with pytest.raises(UserError, match="stores all of its weights"):
        export_checkpoint(last(tmp_path / "run"), tmp_path / "model.safetensors", initial=tmp_path)


@pytest.mark.parametrize(
    "meta",
    [
        DataMeta(input_shape=(3, 4), class_names=("a", "b"), padding={"targets": -100.0}, bytes_per_token=1.5),
        TableMeta(feature_names=("x",), cardinalities=(3, 5)),
    ],
)
def test_facts_of_data_are_stored(meta: DataMeta) -> None:
    assert meta_from_json(meta_to_json(meta)) == meta
