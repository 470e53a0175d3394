"""What comes out of other trainers' folders is to the bit what their own converters, and their own states, hold."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import foreign_folders
import pytest
import safetensors.torch
import torch
from foreign_folders import ZERO
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from worlds import in_world

from distrain.checkpoint import Reader, verify
from distrain.checkpoints.export import export, import_checkpoint
from distrain.checkpoints.export.opening import open_foreign
from distrain.config import UserError

TIED = {"head.weight": "embed.weight"}


def imported(path: Path, out: Path, **options: Any) -> dict[str, torch.Tensor]:
    """Import a folder; return every tensor of the checkpoint, and check that it verifies and exports the same."""
    done = import_checkpoint(path, out / "run", **options)
    assert verify(done.path) == []
    tensors = {}
    with Reader(done.path) as reader:
        for name, spec in reader.manifest.specs.items():
            dtype = {"F32": torch.float32, "BF16": torch.bfloat16, "I64": torch.int64}[spec.dtype]
            raw = reader.read(name, 0, spec.numel)
            tensors[name] = (
                torch.from_numpy(raw.copy()).view(dtype).reshape(spec.shape)
                if spec.numel
                else torch.empty(spec.shape, dtype=dtype)
            )
        for alias, name in reader.manifest.aliases.items():
            tensors[alias] = tensors[name]
    direct = safetensors.torch.load_file(export(path, out / "direct.safetensors").paths[0])
    through = safetensors.torch.load_file(export(done.path, out / "through.safetensors").paths[0])
    model = {name.removeprefix("model/"): tensor for name, tensor in tensors.items() if name.startswith("model/")}
    same(direct, model)
    same(through, model)
    return tensors


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name], tensor), name


def with_prefix(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def convert_zero(paths: dict[str, str], out: str) -> None:
    """Run DeepSpeed's own converter on each folder, in one process, because importing it takes long."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_state_dict

    for kind, path in paths.items():
        convert_zero_checkpoint_to_state_dict(path, str(Path(out) / kind))


@pytest.fixture(scope="session")
def converted(written, tmp_path_factory):
    """Return the folder of what DeepSpeed's converter makes of each kind of folder."""
    out = tmp_path_factory.mktemp("converted")
    in_world(1, convert_zero, {kind: str(written(kind).path) for kind in ZERO}, str(out), launched=False)
    return out


@pytest.mark.parametrize("kind", ZERO)
def test_zero_folders_hold_what_deepspeeds_converter_finds(kind, written, converted, tmp_path):
    path = written(kind).path
    tensors = imported(path, tmp_path)
    model = with_prefix(tensors, "model/")
    theirs = torch.load(converted / kind / "pytorch_model.bin", weights_only=True)
    if ZERO[kind][1] == 1:  # it loses what is frozen under ZeRO-1
        assert model["frozen.weight"].dtype == torch.float32
        assert set(model) - set(theirs) == {"frozen.weight"}
        frozen = foreign_folders.build_model().frozen.weight.detach()
        expected = frozen.bfloat16().float() if "bf16" in kind else frozen
        theirs["frozen.weight"] = expected
    same(model, {name: tensor.contiguous() for name, tensor in theirs.items()})
    foreign_folders.build_model().load_state_dict(model, strict=True)


def test_an_export_of_whole_weights_needs_no_arrays(written, tmp_path):
    code = "import sys; from distrain.checkpoints.export import export\n"
    for kind in ("zero1", "zero2", "zero3"):
        code += f"export({str(written(kind).path)!r}, {str(tmp_path / kind)!r} + '.safetensors')\n"
    code += "print(sorted({'numpy', 'torch'} & set(sys.modules)))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert ended.stdout == "[]\n", ended.stderr


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32]
)
def test_a_tensor_of_one_element_is_a_number(dtype, tmp_path):
    values = {
        "one": torch.tensor([-3], dtype=dtype),
        "half": torch.tensor(0.5 if dtype.is_floating_point else 7, dtype=dtype),
    }
    torch.save({**values, "two": torch.zeros(2, dtype=dtype)}, tmp_path / "model.pt")
    with open_foreign(tmp_path / "model.pt") as source:
        assert {name: source.number(f"model/{name}") for name in values} == {n: v.item() for n, v in values.items()}
        assert source.number("model/two") is None


@cache
def trained_by_torch(world_size: int) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, Any]]]:
    """Return the weights and the optimizer's state of the same training in one process of plain torch."""
    model = foreign_folders.build_model()
    optimizer = torch.optim.AdamW(foreign_folders.groups(model), lr=1e-2)
    for step in range(foreign_folders.STEPS):
        optimizer.zero_grad()
        for rank in range(world_size):
            (foreign_folders.loss_of(model, step, rank) / world_size).backward()
        optimizer.step()
    states = {name: optimizer.state[p] for name, p in model.named_parameters() if p.requires_grad}
    return {name: p.detach() for name, p in model.named_parameters()}, states


@pytest.mark.parametrize("kind", ZERO)
def test_zero_folders_hold_what_the_same_training_leads_to(kind, written, tmp_path):
    """Weights and moments, each under its own parameter's name: as torch has them after the same steps."""
    tensors = imported(written(kind).path, tmp_path)
    weights, states = trained_by_torch(ZERO[kind][0])
    expected = {f"{name}/{key}": value for name, state in states.items() for key, value in state.items()}
    found = with_prefix(tensors, "optimizer/")
    assert sorted(found) == sorted(expected)
    for name, value in [*expected.items(), *weights.items()]:
        tensor = found[name] if name in found else tensors[f"model/{name}"]
        assert (tensor.shape, tensor.dtype) == (value.shape, value.dtype)
        if name.endswith("/step"):
            assert tensor.item() == foreign_folders.STEPS
        elif "bf16" in kind:
            assert (tensor - value).norm() <= 0.1 * value.norm(), name
        else:
            torch.testing.assert_close(tensor, value, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", ["SHARDED_STATE_DICT", "FULL_STATE_DICT", "FSDP1"])
def test_fsdp_folders_hold_what_the_ranks_held(kind, written, tmp_path):
    folder = written("fsdp1" if kind == "FSDP1" else "fsdp")
    tensors = imported(folder.path / (kind if kind != "FSDP1" else ""), tmp_path)
    same(with_prefix(tensors, "model/"), folder.state["model"])
    state = folder.state
    if kind == "FSDP1":
        dcp_to_torch_save(folder.path / "optimizer_0", tmp_path / "optimizer.pt")
        state = torch.load(tmp_path / "optimizer.pt", weights_only=True)
    expected = {
        f"{name}/{key}": value
        for name, entries in state["optimizer"]["state"].items()
        for key, value in entries.items()
    }
    same(with_prefix(tensors, "optimizer/"), expected)
    foreign_folders.build_model().load_state_dict(with_prefix(tensors, "model/"), strict=True)


def test_accelerates_merge_finds_the_same(written, tmp_path):
    from accelerate.utils import merge_fsdp_weights

    path = written("fsdp").path / "SHARDED_STATE_DICT"
    merge_fsdp_weights(str(path / "pytorch_model_fsdp_0"), str(tmp_path), safe_serialization=False)
    merged = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    same(with_prefix(imported(path, tmp_path / "ours"), "model/"), merged)


def test_torchs_own_converter_finds_the_same(written, tmp_path):
    folder = written("dcp")
    dcp_to_torch_save(folder.path, tmp_path / "merged.pt")
    merged = torch.load(tmp_path / "merged.pt", weights_only=True)["model"]
    tensors = with_prefix(imported(folder.path, tmp_path), "model/")
    same(tensors, merged)
    same(tensors, folder.state)


def test_ties_are_found_in_state_dicts_and_told_for_others(written, tmp_path):
    plain = written("plain")
    with Reader(import_checkpoint(plain.path / "bin", tmp_path / "a", step=1).path) as reader:
        assert reader.manifest.aliases == {"model/head.weight": "model/embed.weight"}
    same(with_prefix(imported(plain.path / "bin", tmp_path), "model/"), plain.state["model"])
    sharded = written("fsdp").path / "SHARDED_STATE_DICT"
    told = import_checkpoint(sharded, tmp_path / "b", tied=TIED, buffers=["mean"])
    with Reader(told.path) as reader:
        assert reader.manifest.aliases == {"model/head.weight": "model/embed.weight"}
        assert reader.manifest.specs["model/mean"].role == "buffer"
        assert "model/head.weight" not in reader.manifest.specs
    assert (told.parameters, told.buffers) == (9, 2)


def test_from_pretrained_opens_what_was_exported(tmp_path):
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=8, n_layer=2, n_head=2))
    model.save_pretrained(tmp_path / "theirs", max_shard_size="5KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
    done = import_checkpoint(tmp_path / "theirs", tmp_path / "run", step=0, tied={})
    out = export(done.path, tmp_path / "ours", shards="5KB")
    assert tmp_path / "ours" / "config.json" in out.paths
    torch.save(model.state_dict(), tmp_path / "model.pt")
    for folder in (tmp_path / "theirs", tmp_path / "ours"):
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert isinstance(loaded, GPT2LMHeadModel)
        same(loaded.state_dict(), model.state_dict())
        assert loaded.lm_head.weight is loaded.transformer.wte.weight


def test_torchvisions_own_class_accepts_the_export(tmp_path):
    from torchvision.models import resnet18

    model = resnet18(num_classes=4)
    torch.save(
        {"state_dict": {f"module.{n}": t for n, t in model.state_dict().items()}, "epoch": 3}, tmp_path / "m.pth"
    )
    done = import_checkpoint(tmp_path / "m.pth", tmp_path / "run")
    assert any("module." in note for note in done.notes)
    assert any("epoch" in what for what in done.skipped)
    assert (done.parameters, done.buffers) == (len(list(model.parameters())), len(list(model.buffers())))
    for suffix in ("safetensors", "pt"):
        path = export(done.path, tmp_path / f"out.{suffix}").paths[0]
        loaded = safetensors.torch.load_file(path) if suffix == "safetensors" else torch.load(path, weights_only=True)
        other = resnet18(num_classes=4)
        other.load_state_dict(loaded, strict=True)
        same(other.state_dict(), model.state_dict())


def test_folders_of_accelerate_with_deepspeed(written, tmp_path):
    """Accelerate puts DeepSpeed's tag beside its own files, under a name of its own."""
    path = tmp_path / "state"
    shutil.copytree(written("zero2").path, path)
    tag = next(entry for entry in path.iterdir() if entry.is_dir())
    tag.rename(path / "pytorch_model")
    (path / "latest").write_text("pytorch_model")
    (path / "random_states_0.pkl").write_bytes(pickle.dumps(os.getcwd))  # is not opened
    done = import_checkpoint(path, tmp_path / "run")
    assert re.match(r"DeepSpeed ZeRO-2 of 2 ranks", done.description)
    assert any("random_states_0.pkl" in what for what in done.skipped)
    assert done.step == foreign_folders.STEPS
    # an overflow skips a step, which neither optimizer nor schedule counts
    model = path / "pytorch_model" / "mp_rank_00_model_states.pt"
    content = torch.load(model, weights_only=False)
    torch.save(content | {"global_steps": foreign_folders.STEPS + 2, "skipped_steps": 2}, model)
    assert import_checkpoint(path, tmp_path / "skipped").step == foreign_folders.STEPS
    torch.save(content | {"global_steps": foreign_folders.STEPS + 2}, model)
    with pytest.raises(UserError, match="it records global_steps 5, and its optimizer counted 3 steps"):
        import_checkpoint(path, tmp_path / "differs")
