"""A pretrained folder, opened with its weights and, on the meta device, without them."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anonymous import Peak
from logged import logged
from runs import captured, last, losses, state, train, write_recipe
from safetensors.torch import load_file, save_file
from test_meta_device import check
from test_models import recipe_of
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from worlds import in_world

from distrain.config import UserError
from distrain.config.yaml import load_recipe
from distrain.datasets.base import DataMeta
from distrain.launchers import open_run
from distrain.models import build_model, tied_names
from distrain.networks.huggingface import _ties
from distrain.networks.meta_device import build_on_meta
from distrain.run.folder import Launch, RunDir

transformers = pytest.importorskip("transformers")

TINY = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 160, "intermediate_size": 192}
WORDS = {"vocab_size": 300, "pad_token_id": None}
GPT2 = {"model_type": "gpt2", "n_layer": 2, "n_head": 4, "n_embd": 160, **WORDS}
LLAMA = {"model_type": "llama", **TINY, "num_key_value_heads": 2, **WORDS}
BERT = {"model_type": "bert", **TINY, **WORDS}
T5 = {"model_type": "t5", "num_layers": 2, "num_heads": 2, "d_model": 160, "d_ff": 200, **WORDS}
VIT = {"model_type": "vit", **TINY, "image_size": 32, "patch_size": 8}
BART = {
    "model_type": "bart",
    "d_model": 160,
    **{f"{part}_{key}": 2 for part in ("encoder", "decoder") for key in ("layers", "attention_heads")},
    **WORDS,
}
MIXTRAL = {"model_type": "mixtral", **TINY, "num_key_value_heads": 2, "num_local_experts": 3, **WORDS}
TEXT = DataMeta(input_shape=(16,), vocab_size=300, pad_id=0, num_classes=7)
IMAGES = DataMeta(input_shape=(3, 32, 32), num_classes=7)
HEAD, LM = "ForSequenceClassification", "ForCausalLM"


@functools.cache
def pretrained(kind: str, items: tuple[tuple[str, Any], ...]) -> nn.Module:
    config = dict(items)
    config_class = transformers.CONFIG_MAPPING[config.pop("model_type")]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = getattr(transformers, f"AutoModel{kind}").from_config(config_class(**config))
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor), alpha=0.1)  # biases and norms too
    return model


def save(folder: Path, kind: str, config: dict[str, Any], dtype: torch.dtype = torch.float32, **how: Any) -> nn.Module:
    model = pretrained(kind, tuple(config.items())).to(dtype)
    model.save_pretrained(folder, **how)
    return model.float()


def same(folder: Path, kind: str, meta: DataMeta = TEXT, differs: str | None = None, **recipe: Any) -> nn.Module:
    """Return the model after asserting that it is the same on the meta device, but for its weights."""
    asked = recipe_of({"name": f"transformers:AutoModel{kind}", "path": str(folder)}, **recipe)
    found = check(lambda: build_model(asked, meta))
    assert found is None if differs is None else differs in str(found)
    return build_model(asked, meta)


CASES: list[tuple[str, dict[str, Any], str]] = [
    (LM, GPT2, LM),
    (LM, GPT2, ""),
    ("", GPT2, LM),
    (LM, GPT2 | {"tie_word_embeddings": False}, LM),
    (LM, LLAMA, LM),
    ("", LLAMA, HEAD),
    (LM, LLAMA | {"tie_word_embeddings": True}, HEAD),
    ("", BERT, HEAD),
    ("ForMaskedLM", BERT, ""),
    ("ForMaskedLM", BERT, HEAD),
    (HEAD, BERT | {"num_labels": 7}, HEAD),
    ("ForSeq2SeqLM", T5, "ForSeq2SeqLM"),
    ("ForSeq2SeqLM", T5 | {"tie_word_embeddings": False}, ""),
    ("ForSeq2SeqLM", T5, HEAD),
    (LM, MIXTRAL, LM),
    (LM, MIXTRAL, HEAD),
]


@pytest.mark.parametrize(("saved", "config", "opened"), CASES, ids=[f"{b['model_type']}-{a}-{c}" for a, b, c in CASES])
def test_folders(tmp_path: Path, saved: str, config: dict[str, Any], opened: str) -> None:
    model = save(tmp_path, saved, config)
    ordinary = same(tmp_path, opened)
    theirs = {name.partition(".")[2]: value for name, value in model.state_dict().items()} | model.state_dict()
    mine = {name.partition(".")[2]: value for name, value in ordinary.state_dict().items()} | ordinary.state_dict()
    common = [name for name in mine if name in theirs and mine[name].shape == theirs[name].shape]
    assert sum(torch.equal(mine[name], theirs[name]) for name in common) > len(model.state_dict()) / 2


def test_weights_are_not_rounded_to_the_dtype_in_config_json(tmp_path: Path) -> None:
    model = save(tmp_path, LM, LLAMA)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    found = same(tmp_path, LM)
    assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_a_folder_of_which_no_weight_is_the_models(tmp_path: Path) -> None:
    save(tmp_path, LM, LLAMA)
    asked = recipe_of({"name": f"transformers:AutoModel{LM}", "path": str(tmp_path)})
    state = load_file(tmp_path / "model.safetensors")
    save_file({f"module.{name}": tensor for name, tensor in state.items()}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"no tensor in .* is one of .*: found module\.lm_head\.weight"):
        build_model(asked, TEXT)


@pytest.mark.parametrize("saved", ["", "ForImageClassification"])
def test_images(tmp_path: Path, saved: str) -> None:
    save(tmp_path, saved, VIT | {"num_labels": 7})
    same(tmp_path, "ForImageClassification", IMAGES)


MASKED = "ForMaskedLM"
ARCHITECTURES: list[tuple[str, str, dict[str, Any]]] = [
    (LM, "", {"model_type": "opt", **TINY, "ffn_dim": 192, "word_embed_proj_dim": 160, **WORDS}),
    (LM, HEAD, {"model_type": "qwen2", **TINY, "num_key_value_heads": 2, **WORDS}),
    (LM, LM, {"model_type": "qwen3_moe", **TINY, "num_experts": 4, "moe_intermediate_size": 100, **WORDS}),
    (LM, LM, {"model_type": "gemma2", **TINY, "num_key_value_heads": 2, "head_dim": 40, **WORDS}),
    (LM, LM, {"model_type": "mamba", "num_hidden_layers": 2, "hidden_size": 160, **WORDS}),
    *((LM, LM, {"model_type": name, **TINY, **WORDS}) for name in ("gpt_neox", "phi3", "bloom")),
    *((MASKED, HEAD, {"model_type": name, **TINY, **WORDS}) for name in ("roberta", "deberta-v2", "modernbert")),
    (MASKED, HEAD, {"model_type": "albert", **TINY, "embedding_size": 100, **WORDS}),
    ("ForSeq2SeqLM", "", BART),
    ("", "ForImageClassification", {"model_type": "swin", "embed_dim": 48, "depths": [1, 1], "num_heads": [3, 6]}),
    ("", "ForImageClassification", {"model_type": "convnext", "hidden_sizes": [32, 64, 96, 128], "depths": [1] * 4}),
    ("", "ForImageClassification", {"model_type": "resnet", "hidden_sizes": [64, 128], "depths": [1, 1]}),
    ("", "", {"model_type": "wav2vec2", **TINY, "num_conv_pos_embedding_groups": 4}),
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("saved", "opened", "config"), ARCHITECTURES, ids=[c["model_type"] for *_, c in ARCHITECTURES])
def test_architectures(tmp_path: Path, saved: str, opened: str, config: dict[str, Any], dtype: torch.dtype) -> None:
    given = dict(config)
    config_class = transformers.CONFIG_MAPPING[given.pop("model_type")]
    model = getattr(transformers, f"AutoModel{saved}").from_config(config_class(**given))
    model.to(dtype).save_pretrained(tmp_path)
    same(tmp_path, opened, TEXT if "vocab_size" in config else IMAGES)


def as_one_bin(folder: Path, state: dict[str, torch.Tensor], *, old: bool = False) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not old)


def as_several_bins(folder: Path, state: dict[str, torch.Tensor]) -> None:
    (folder / "model.safetensors").unlink()
    files = {name: f"pytorch_model-0000{1 + place % 2}-of-00002.bin" for place, name in enumerate(state)}
    for file in set(files.values()):
        torch.save({name: value for name, value in state.items() if files[name] == file}, folder / file)
    index = {"metadata": {}, "weight_map": files}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("files", ["one", "sharded", "bin", "bins"])
@pytest.mark.parametrize(("saved", "config", "opened"), [(LM, GPT2, LM), ("", BERT, HEAD), ("", LLAMA, HEAD)])
def test_files(tmp_path: Path, saved: str, config: dict[str, Any], opened: str, files: str, dtype: torch.dtype) -> None:
    model = save(tmp_path, saved, config, dtype, **({"max_shard_size": "300KB"} if files == "sharded" else {}))
    assert (len(list(tmp_path.glob("*.safetensors"))) > 2) == (files == "sharded")
    if "bin" in files:
        state = {name: value.to(dtype) for name, value in model.state_dict().items()}
        (as_one_bin if files == "bin" else as_several_bins)(tmp_path, state)
    # whether tied weights that are both in a file are one is seen from their values
    tied_twice = "bin" in files and config is GPT2
    ordinary = same(tmp_path, opened, differs="lm_head" if tied_twice else None)
    assert {p.dtype for p in ordinary.parameters()} == {torch.float32}


def test_double_precision(tmp_path: Path) -> None:
    save(tmp_path, "", BERT, torch.bfloat16)
    ordinary = same(tmp_path, HEAD, precision="fp64")
    assert {p.dtype for p in ordinary.parameters()} == {torch.float64}


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (GPT2, "lm_head.weight"),
        (T5, "encoder.embed_tokens.weight"),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)  # fmt: skip
def test_tied_weights_that_differ(tmp_path: Path, config: dict[str, Any], name: str) -> None:
    kind = LM if config is GPT2 else "ForSeq2SeqLM"
    state = {each: tensor.clone() for each, tensor in save(tmp_path, kind, config).state_dict().items()}
    state[name] += 1
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"config.json ties {name} to another tensor, and the weights there differ"):
        build_model(recipe_of({"name": f"transformers:AutoModel{kind}", "path": str(tmp_path)}), TEXT)


def test_ties_of_a_model_that_looks_at_values_as_it_is_built() -> None:
    class Looks(GPT2LMHeadModel):
        def __init__(self, config: GPT2Config) -> None:
            super().__init__(config)
            self.rate = float(torch.linspace(0, 1, 3).sum())

    config = GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9)
    assert _ties(GPT2LMHeadModel(config), Looks, config) == {"lm_head.weight": "transformer.wte.weight"}


def test_the_other_of_tied_weights(tmp_path: Path) -> None:
    state = dict(save(tmp_path, LM, GPT2).state_dict())
    del state["transformer.wte.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ordinary = same(tmp_path, LM)
    assert tied_names(ordinary)
    assert torch.equal(ordinary.lm_head.weight, state["lm_head.weight"])


def test_what_is_not_in_the_file_depends_on_the_seed(tmp_path: Path) -> None:
    save(tmp_path, "", BERT)
    one, other = (same(tmp_path, HEAD, seed=seed) for seed in (0, 1))
    assert torch.equal(one.bert.pooler.dense.weight, other.bert.pooler.dense.weight)
    assert not torch.equal(one.classifier.weight, other.classifier.weight)


def broken_file(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


def other_shape(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state["bert.pooler.dense.weight"] = torch.zeros(3, 3)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def no_file(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("harm", [broken_file, other_shape, no_file], ids=lambda harm: harm.__name__)
def test_what_cannot_be_opened_is_named(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    save(tmp_path, HEAD, BERT | {"num_labels": 7})
    harm(tmp_path)
    recipe = recipe_of({"name": f"transformers:AutoModel{HEAD}", "path": str(tmp_path)})
    with pytest.raises(UserError) as found:
        build_model(recipe, TEXT)
    assert str(tmp_path) in str(found.value)


def test_the_environment_is_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, LM, GPT2)
    for value in ("0", None):
        if value is None:
            monkeypatch.delenv("HF_DEACTIVATE_ASYNC_LOAD")
        else:
            monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", value)
        before = dict(os.environ)
        same(tmp_path, LM)
        assert dict(os.environ) == before


def grown(folder: str) -> float:
    """Return by how many MiB this process grows when it opens the folder on the meta device."""
    recipe = recipe_of({"name": f"transformers:AutoModel{HEAD}", "path": folder})
    with Peak() as peak:
        build_on_meta(lambda: build_model(recipe, TEXT))
    return peak.most / 2**20


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("files", ["one", "bin"])
def test_memory_does_not_grow_with_the_model(tmp_path: Path, files: str) -> None:
    wide = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 5}
    model = save(tmp_path, "", BERT | wide)
    if files == "bin":
        as_one_bin(tmp_path, dict(model.state_dict()))
    assert sum(parameter.numel() * 4 for parameter in model.parameters()) > 240 * 2**20
    pretrained.cache_clear()
    (most,) = in_world(1, grown, str(tmp_path))
    assert most < 80, "of 240 MiB, the largest 16"


# --------------------------------------------------------------------------------------------------------------------
# Among processes

RAM_EFFICIENT = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
"""What makes transformers leave the model empty on all ranks but the first, which is to send its weights."""

FINE_TUNING = """
name: tuned
task: language_modeling
data: {name: python_source, seq_len: 8, max_bytes: 3_000, split: [0.9, 0.1]}
model: {name: "transformers:AutoModelForCausalLM", path: FOLDER}
optim: {name: adamw, lr: 1.0e-3, clip_norm: 0.5}
batch: {global: 8, micro: 2}
train: {steps: 3}
eval: {every: null}
checkpoint: {every: 3 steps, async: false}
log: {every: 1 steps}
"""


def tune(strategy: str, run_dir: str) -> list[str]:
    """Train in this world; returns what build and the engine say of it."""
    from distrain.loop import train
    from distrain.parallel import StrategySpec, open_world

    os.environ.update(RAM_EFFICIENT)
    world = open_world("fp32", StrategySpec(strategy))
    try:
        with logged() as lines:
            ended = captured(lambda: int(train(RunDir(run_dir), world) is None))
    finally:
        world.close()
    return [*lines, *(ended.out + ended.err).splitlines()]


@pytest.mark.slow
def test_every_rank_has_the_weights(tmp_path: Path) -> None:
    small = {"hidden_size": 64, "intermediate_size": 300, "num_hidden_layers": 1, "tie_word_embeddings": False}
    save(tmp_path / "folder", "", LLAMA | small, torch.bfloat16)
    recipe = write_recipe(tmp_path, FINE_TUNING.replace("FOLDER", str(tmp_path / "folder")))
    runs = {}
    for strategy in ("ddp", "fsdp2", "zero3"):
        runs[strategy] = tmp_path / strategy
        open_run(RunDir(runs[strategy]), load_recipe(recipe, []), Launch.describe(2, strategy))
        said = in_world(2, tune, strategy, str(runs[strategy]))
        assert any("108,480 parameters" in line for line in said[0]), said
        assert not any("builds it on the CPU" in line for rank in said for line in rank), said
    for strategy in ("fsdp2", "zero3"):
        assert losses(runs[strategy]) == pytest.approx(losses(runs["ddp"]), rel=1e-5)
        mine, theirs = state(last(runs[strategy])), state(last(runs["ddp"]))
        assert mine.keys() == theirs.keys()
        assert "model/lm_head.weight" in mine
        assert all(np.abs(mine[name] - theirs[name]).max() < 1e-5 for name in mine if name.startswith("model/"))


def digests(folder: str) -> list[tuple[str, float]]:
    """Open the folder in a process group whose environment asks for loading on the first rank alone."""
    torch.distributed.init_process_group("gloo")
    os.environ.update(RAM_EFFICIENT)
    try:
        recipe = recipe_of({"name": f"transformers:AutoModel{LM}", "path": folder})
        named = build_model(recipe, TEXT).state_dict()
        assert os.environ.items() >= RAM_EFFICIENT.items()
        return [(name, value.double().sum().item()) for name, value in named.items()]
    finally:
        torch.distributed.destroy_process_group()


def test_every_rank_has_the_weights_in_a_process_group_of_others(tmp_path: Path) -> None:
    save(tmp_path, "", LLAMA | {"tie_word_embeddings": False})
    ordinary = build_model(recipe_of({"name": f"transformers:AutoModel{LM}", "path": str(tmp_path)}), TEXT)
    expected = [(name, value.double().sum().item()) for name, value in ordinary.state_dict().items()]
    assert in_world(2, digests, str(tmp_path)) == [expected, expected]


SMALL_GPT2 = {"vocab_size": 64, "n_embd": 8, "n_layer": 1, "n_head": 2}
SMALL_T5 = {"vocab_size": 64, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}


@pytest.mark.parametrize(
    ("kind", "config", "missing"),
    [
        ("GPT2", SMALL_GPT2, "pad_token_id"),
        ("T5", SMALL_T5, "decoder_start_token_id"),
        ("T5", SMALL_T5 | {"decoder_start_token_id": 0}, "pad_token_id"),
        ("T5", SMALL_T5 | {"decoder_start_token_id": 0, "pad_token_id": 0}, None),
    ],
)
def test_a_special_token_that_a_model_misses_is_named(
    tmp_path: Path, kind: str, config: dict[str, Any], missing: str | None
) -> None:
    (tmp_path / "parts.py").write_text(SENTENCES)
    written = write_recipe(tmp_path, OF_SENTENCES.replace("KIND", kind).replace("CONFIG", json.dumps(config)))
    [ended] = train(1, written, tmp_path / "run", status=0 if missing is None else 1)
    said = f"the model needs a {missing} and its configuration has none"
    assert (said in " ".join(ended.err.split())) == (missing is not None)


SENTENCES = """
import torch

class Sentences(torch.utils.data.Dataset):
    def __init__(self, split):
        self.words = torch.randint(2, 60, (16, 8), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.words)

    def __getitem__(self, index):
        return {"input_ids": torch.cat((self.words[index], torch.ones(1, dtype=torch.long)))}, int(index % 2)
"""
OF_SENTENCES = """
name: sentences
task: classification
data: {name: "parts.py:Sentences"}
model: {name: "transformers:KINDForSequenceClassification", config: CONFIG}
batch: {global: 8}
train: {steps: 1, precision: fp32}
"""
