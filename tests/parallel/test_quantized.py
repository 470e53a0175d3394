"""Adapters beside weights of 4 and 8 bits: what layers compute, and runs of them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import RECIPE, lora_recipe
from runs import cli, last, train
from safetensors.torch import load_file
from torch import nn

from distrain.checkpoint import Reader, difference, read_manifest
from distrain.config import LoraSection, UserError
from distrain.config.yaml import load_recipe
from distrain.datasets.stored_meta import meta_from_json
from distrain.networks import quantized
from distrain.networks.lora import add_adapters, merge_adapters
from distrain.training.checks import check_bits
from distrain.training.restored import restored_model

bnb = pytest.importorskip("bitsandbytes.functional")
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [250, 7, 1, 82, 8, 1, 8, 256]])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(33, 10), (64, 128)])
def test_a_layer_computes_with_the_numbers_that_bitsandbytes_gives_back(bits: int, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(shape[1], shape[0])
    before = layer.weight.detach().clone()
    codes, state = (
        bnb.quantize_4bit(before, quant_type="nf4") if bits == 4 else bnb.quantize_blockwise(before, blocksize=64)
    )
    numbers = bnb.dequantize_4bit(codes, state) if bits == 4 else bnb.dequantize_blockwise(codes, state)
    model: Any = nn.Sequential(layer)
    add_adapters(model, LoraSection(r=2, alpha=2, bits=bits))  # type: ignore[arg-type]
    nn.init.normal_(model[0].lora_B.weight)
    assert {name: (each.dtype, each.requires_grad) for name, each in model.named_parameters()} == {
        "0.weight": (torch.uint8, False),
        "0.weight_absmax": (torch.float32, False),
        "0.bias": (torch.float32, False),
        "0.lora_A.weight": (torch.float32, True),
        "0.lora_B.weight": (torch.float32, True),
    }
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}
    assert (
        sum(each.nbytes for each in (model[0].weight, model[0].weight_absmax)) <= before.numel() * (bits / 8 + 0.07) + 5
    )
    whole = (numbers + model[0].delta()).detach()
    assert 0 < (numbers - before).abs().max() < (0.2 if bits == 4 else 0.02) * before.abs().max()
    x = torch.randn(5, shape[1], requires_grad=True)
    found = model(x)
    torch.testing.assert_close(found, x @ whole.T + layer.bias, rtol=0, atol=1e-5)
    [gradient] = torch.autograd.grad(found.sum(), x)
    torch.testing.assert_close(gradient, whole.sum(0).expand(5, -1), rtol=0, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
        model(x).float().sum().backward()
    torch.testing.assert_close(x.grad, gradient, rtol=0, atol=0.1)
    with pytest.raises(UserError, match="casts what a layer reads"):
        model(TOKENS)
    merge_adapters(model)
    assert type(model[0]) is nn.Linear
    assert [name for name, _ in model.named_parameters()] == ["0.weight", "0.bias"]
    torch.testing.assert_close(model[0].weight, whole, rtol=0, atol=1e-6)


def run_of(folder: Path, bits: int, processes: int = 1, **options: Any) -> Path:
    recipe = lora_recipe(folder, RECIPE.replace("targets:", f"bits: {bits}, targets:"))
    train(processes, recipe, folder / f"run-{processes}", **options)
    return folder / f"run-{processes}"


@pytest.mark.parametrize("bits", [4, pytest.param(8, marks=pytest.mark.more)])
def test_a_run_resumes_to_the_bit_refers_to_what_it_froze_and_exports_what_it_computes(
    tmp_path: Path, bits: int
) -> None:
    from transformers import AutoModelForCausalLM

    run = run_of(tmp_path, bits)
    frozen = read_manifest(last(run)).frozen
    assert frozen is not None
    name = "model/model.layers.0.self_attn.q_proj.weight"
    assert (frozen.tensors[name].spec.dtype, frozen.tensors[f"{name}_absmax"].spec.dtype) == ("U8", "F32")
    assert frozen.tensors["model/model.layers.0.self_attn.o_proj.weight"].spec.dtype == "F32", "it has no adapter"
    # stopped, and resumed
    again = tmp_path / "again"
    train(1, tmp_path / "recipe.yaml", again, stop_after=2)
    train(1, tmp_path / "recipe.yaml", again)
    assert difference(last(again), last(run)).identical
    # two processes
    two = run_of(tmp_path, bits, 2, strategy="ddp")
    for tensor, each in difference_of(two, run).items():
        assert each < 1e-4, tensor
    # merged, it computes what the run computes
    with Reader(last(run)) as reader, torch.no_grad():
        meta = meta_from_json(reader.manifest.scalars["meta"])
        model: Any = restored_model(reader, load_recipe(run / "recipe.yaml").recipe, meta, averaged=False).eval()
        expected = model(TOKENS).logits
        merged = AutoModelForCausalLM.from_pretrained(run / "export").eval()
        torch.testing.assert_close(merged(TOKENS).logits, expected, rtol=0, atol=1e-5)
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
        assert (base(TOKENS).logits - expected).abs().max() > 1e-4
    weights = load_file(run / "export/model.safetensors")
    assert {each.dtype for each in weights.values()} == {torch.float32}
    assert weights.keys() == load_file(tmp_path / "base/model.safetensors").keys()
    # other initial weights are not what it was trained beside
    changed = load_file(tmp_path / "base/model.safetensors")
    changed[name.removeprefix("model/")] *= 2  # the bytes are the same, and the scales are not
    from safetensors.torch import save_file

    save_file(changed, tmp_path / "base/model.safetensors", metadata={"format": "pt"})
    wrong = cli("checkpoint", "verify", run)
    assert wrong.status == 1
    assert "q_proj.weight_absmax: found the hash" in wrong.out


def difference_of(a: Path, b: Path) -> dict[str, float]:
    tensors = [load_file(run / "export/model.safetensors") for run in (a, b)]
    return {name: float((each - tensors[1][name]).abs().max()) for name, each in tensors[0].items()}


@pytest.mark.parametrize(
    ("strategy", "overrides", "said"),
    [
        ("fsdp2", [], "use --strategy ddp"),
        ("zero2", [], "use --strategy ddp"),
        ("ddp", ["train.compile=true"], "set train.compile to false"),
    ],
)
def test_what_cannot_train_quantized_weights_is_refused(
    tmp_path, strategy: str, overrides: list[str], said: str
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("targets:", "bits: 4, targets:"))
    with pytest.raises(UserError, match=said):
        check_bits(load_recipe(path, overrides).recipe, strategy)
    ended = cli("train", path, "--run-dir", tmp_path / "run", "--processes", 2, "--strategy", strategy, *overrides)
    assert ended.status == 1
    assert said in ended.err
    assert not (tmp_path / "run").exists()
    check_bits(load_recipe(path).recipe, "ddp")


def test_layers_that_are_not_linear_and_a_missing_library_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"none of the layers with adapters is an nn.Linear \(0 is a Embedding\)"):
        add_adapters(nn.Sequential(nn.Embedding(3, 4)), LoraSection(targets=["0"], bits=4))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    with pytest.raises(UserError, match=r"pip install 'distrain\[qlora\]'"):
        quantized.check_installed()
