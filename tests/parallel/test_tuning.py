"""The recipe's section `tune`: what each key comes to, that it takes effect, and that nothing waits for a device."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import assert_close, assert_same_run, cli, last, train, write_recipe
from torch import Tensor, nn
from worlds import in_world

from distrain.checkpoint import difference
from distrain.config import TuneSection, UserError
from distrain.config.yaml import load_recipe
from distrain.launchers import open_run
from distrain.loop import train_step
from distrain.parallel import open_world
from distrain.parallel.tuning import RULES, Facts, Logits, resolve_tuning, set_switches
from distrain.run.folder import Launch, RunDir
from distrain.training.run_loop import Session

CPU = Facts("cpu", (0, 0), "fp32", autocast=False, deterministic=False, strategy="single", model=nn.Linear(2, 2))
CNN = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
GPU = replace(CPU, device="cuda", capability=(9, 0), precision="bf16", autocast=True)
SHARDED = replace(GPU, strategy="fsdp2")
FOUR_GIB = nn.Linear(2**15, 2**15, bias=False, device="meta")
MORE = nn.Linear(2**15, 2**15, device="meta")
FIXED = replace(GPU, fixed_shapes=True)


def test_every_key_has_a_rule() -> None:
    assert RULES.keys() == TuneSection.model_fields.keys()
    assert all(field.default == "auto" for field in TuneSection.model_fields.values())


@pytest.mark.parametrize("key", RULES)
def test_each_is_off_by_one_word(key: str) -> None:
    for facts in (CPU, GPU):
        tuning = resolve_tuning(TuneSection.model_validate({key: False}), facts)
        assert not tuning[key]
        assert tuning.record()[key] == {"on": False, "why": f"tune.{key} is false"}


@pytest.mark.parametrize(
    ("key", "facts", "on", "why"),
    [
        ("chunked_loss", CPU, False, "the model is not trained here"),
        ("chunked_loss", replace(CPU, logits=Logits("head", 2**24, "")), False, "a micro-batch has few logits (16,777"),
        (
            "chunked_loss",
            replace(CPU, logits=Logits("head", 2**25, "")),
            True,
            "33,554,432 logits of a micro-batch, by",
        ),
        ("chunked_loss", replace(CPU, logits=Logits("head", None, "")), True, "by head, for any number of tokens"),
        ("chunked_loss", replace(GPU, logits=Logits("", 2**25, "no head")), False, "no head"),
        ("tf32", CPU, False, "TF32 needs an NVIDIA GPU"),
        ("tf32", GPU, True, "for what stays fp32 under bf16"),
        ("tf32", replace(GPU, capability=(7, 5)), False, "TF32 needs an NVIDIA GPU"),
        ("tf32", replace(GPU, precision="fp32", autocast=False), False, "train.precision is fp32"),
        ("tf32", replace(GPU, precision="tf32", autocast=False), True, "train.precision is tf32"),
        ("tf32", replace(GPU, precision="fp64", autocast=False), False, "under fp64"),
        ("cast_before_gather", SHARDED, True, "the same bits"),
        ("cast_before_gather", replace(SHARDED, precision="fp16"), True, "the same bits"),
        ("cast_before_gather", replace(SHARDED, precision="fp32", autocast=False), False, "under fp32"),
        ("cast_before_gather", replace(GPU, strategy="zero3"), False, "of fsdp2 alone"),
        ("cast_before_reduce", SHARDED, False, "its sums have eight bits"),
        ("prefetch", SHARDED, True, "one block ahead"),
        ("prefetch", replace(SHARDED, device="cpu"), False, "on a CPU"),
        ("prefetch", replace(GPU, strategy="ddp"), False, "of fsdp2 alone"),
        (
            "reduce_every_micro",
            replace(SHARDED, model=FOUR_GIB),
            False,
            "whole gradients are 4.00 GiB, within 4.00 GiB",
        ),
        ("reduce_every_micro", replace(SHARDED, model=MORE), True, "whole gradients are 4.00 GiB, over 4.00 GiB"),
        ("reduce_every_micro", replace(SHARDED, offloads_weights=True), True, "weights are offloaded"),
        ("reduce_every_micro", replace(GPU, strategy="ddp"), False, "ddp has room for whole gradients"),
        ("reduce_every_micro", replace(GPU, strategy="zero1"), False, "zero1 has room for whole gradients"),
        ("reduce_every_micro", replace(GPU, strategy="zero2"), True, "zero2 keeps no more than its part"),
        ("channels_last", GPU, False, "the model has no Conv2d"),
        ("channels_last", replace(CPU, model=CNN), False, "for GPUs"),
        ("channels_last", replace(GPU, model=CNN), False, "the inputs are not one tensor of images"),
        ("channels_last", replace(GPU, model=CNN, channels_last_problem=lambda: None), True, "convolutions on a GPU"),
        ("channels_last", replace(GPU, model=CNN, channels_last_problem=lambda: "no"), False, "tried once, the model"),
        ("channels_last", replace(GPU, model=CNN, strategy="zero2"), False, "zero2 holds flat weights"),
        ("cudnn_benchmark", replace(CPU, model=CNN), False, "cuDNN needs a GPU"),
        ("cudnn_benchmark", replace(GPU, model=CNN), False, "inputs may have many shapes"),
        ("cudnn_benchmark", replace(FIXED, model=CNN), False, "cuDNN's first choice is as fast"),
        ("cudnn_benchmark", replace(FIXED, model=CNN, autocast=False), True, "convolutions of one shape"),
        ("cudnn_benchmark", replace(FIXED, model=nn.Conv3d(1, 1, 1)), True, "convolutions of one shape"),
        ("cudnn_benchmark", replace(FIXED, model=CNN, deterministic=True), False, "train.deterministic"),
        ("uint8_inputs", GPU, False, "the inputs are no images of bytes"),
        ("uint8_inputs", replace(GPU, byte_images=True), True, "a quarter of the bytes"),
        ("uint8_inputs", replace(CPU, byte_images=True), False, "for GPUs"),
        ("copy_stream", CPU, False, "a CPU computes where the batch is"),
        ("copy_stream", GPU, True, "batches of 1 MiB or more"),
        ("fused_optimizer", CPU, False, "the optimizer has no fused kernel"),
        ("fused_optimizer", replace(CPU, fused="exact"), True, "one kernel"),
        ("fused_optimizer", replace(CPU, fused="gpu"), False, "no faster on a CPU"),
        ("fused_optimizer", replace(GPU, fused="gpu"), True, "one kernel"),
        ("fused_optimizer", replace(GPU, fused="gpu", strategy="fsdp2"), False, "its kernel may round"),
        ("fused_optimizer", replace(CPU, fused="exact", strategy="zero3"), True, "one kernel"),
        ("fused_optimizer", replace(GPU, fused="own"), False, "the recipe's section optim decides"),
        ("flash_attention", CPU, True, "where torch has a kernel"),
    ],
)
def test_what_auto_comes_to(key: str, facts: Facts, on: bool, why: str) -> None:
    choice = resolve_tuning(TuneSection(), facts).choices[key]
    assert (choice.on, choice.why[: len(why)]) == (on, why)


@pytest.mark.parametrize(
    ("key", "facts", "why"),
    [
        ("chunked_loss", replace(CPU, logits=Logits("", 2**25, "no head")), "no head"),
        ("tf32", CPU, "TF32 needs an NVIDIA GPU of compute capability 8.0"),
        ("tf32", replace(GPU, precision="fp64", autocast=False), "under fp64 nothing is computed in fp32"),
        ("cast_before_gather", replace(GPU, strategy="ddp"), "of fsdp2 alone"),
        ("cast_before_gather", replace(SHARDED, precision="fp32", autocast=False), "under fp32 nothing is cast"),
        ("cast_before_reduce", replace(SHARDED, precision="fp16"), "train.precision is fp16"),
        ("prefetch", replace(GPU, strategy="zero3"), "of fsdp2 alone"),
        ("reduce_every_micro", replace(GPU, strategy="zero1"), "zero1 has room for whole gradients"),
        ("channels_last", GPU, "the model has no Conv2d"),
        (
            "channels_last",
            replace(GPU, model=CNN, channels_last_problem=lambda: "view"),
            "the model fails with it: view",
        ),
        ("cudnn_benchmark", replace(FIXED, model=CNN, deterministic=True), "train.deterministic: the fastest"),
        ("uint8_inputs", GPU, "the inputs are no images of bytes"),
        ("copy_stream", CPU, "a CPU computes where the batch is"),
        ("fused_optimizer", GPU, "the optimizer has no fused kernel"),
    ],
)
def test_what_cannot_work_is_refused(key: str, facts: Facts, why: str) -> None:
    section = TuneSection.model_validate({key: True})
    with pytest.raises(UserError, match=f"tune.{key} is true, and cannot work here: .*{why}"):
        resolve_tuning(section, facts)
    assert not resolve_tuning(section, facts, lenient=True)[key]


@pytest.mark.parametrize(
    ("facts", "why"),
    [
        (replace(GPU, strategy="zero2"), "zero2 keeps no more than its part of a gradient"),
        (replace(SHARDED, casts_gradients=True), "reduced in bf16, gradients are added up in fp32"),
    ],
)
def test_what_cannot_be_off_is_refused(facts: Facts, why: str) -> None:
    section = TuneSection(reduce_every_micro=False)
    with pytest.raises(UserError, match=f"tune.reduce_every_micro is false, and cannot be: {why}; auto is true there"):
        resolve_tuning(section, facts)
    assert resolve_tuning(section, facts, lenient=True)["reduce_every_micro"]


def test_tf32_is_there_for_who_asks() -> None:
    assert resolve_tuning(TuneSection(tf32=True), replace(GPU, precision="fp32", autocast=False))["tf32"]


def test_a_run_states_what_each_came_to(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    (ended,) = train(1, recipe, tmp_path / "run", "train.steps=4", "eval.every=null")
    assert "  tune     fused_optimizer, flash_attention" in ended.out
    effect = RunDir(tmp_path / "run").effect()
    assert effect is not None
    assert effect["tune"].keys() == RULES.keys()
    assert all(each["why"] for each in effect["tune"].values())
    (ended,) = train(1, recipe, tmp_path / "refused", "tune.tf32=true", "tune.uint8_inputs=true", status=1)
    assert "error: tune.uint8_inputs is true, and cannot work here: the inputs are no images of bytes" in ended.err
    assert "tune.tf32 is true, and cannot work here: TF32 needs an NVIDIA GPU" in ended.err
    (ended,) = train(1, recipe, tmp_path / "refused", "train.precision=tf32", "tune.tf32=false", status=1)
    assert "tune.tf32: found false, but train.precision is tf32" in ended.err


# --------------------------------------------------------------------------------------------------------------------
# In runs

IMAGES = """
name: shapes
task: classification
data:
  name: "{folder}/shapes.py:Shapes"
  transforms:
    train: [{{name: RandomCrop, size: [12, 12], padding: 2}}, {{name: RandomHorizontalFlip}}, *to_float, *normalised]
    eval: [*to_float, *normalised]
model:
  name: sequential
  layers:
    - Conv2d: {{in_channels: 3, out_channels: 8, kernel_size: 3, bias: false}}
    - BatchNorm2d: 8
    - ReLU
    - Conv2d: [8, 4, 3]
    - Flatten
    - Linear: [256, 3]
optim: {{name: adamw, lr: 1.0e-2}}
batch: {{global: 8, micro: 2}}
train: {{steps: 4, precision: fp64, ema: 0.9}}
eval: {{every: 2 steps}}
checkpoint: {{every: 2 steps, keep: 9, async: false}}
log: {{every: 1 steps}}
"""
SHAPES = """
import numpy as np
import torch


class Shapes:
    def __init__(self, split):
        random = np.random.default_rng(len(split))
        self.images = torch.from_numpy(random.integers(0, 256, (24, 3, 12, 12), dtype=np.uint8))
        self.labels = random.integers(0, 3, 24)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, number):
        return self.images[number], int(self.labels[number])
"""


def write_images(folder: Path, *, files: bool = False) -> Path:
    """Write a recipe over images of bytes; with `files` over files, of which a loader process reads parts."""
    (folder / "shapes.py").write_text(SHAPES)
    text = IMAGES.format(folder=folder)
    if files:
        for number in range(24):
            path = folder / "images" / "abc"[number % 3] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.random.default_rng(number).integers(0, 256, (14, 16, 3), np.uint8)).save(path)
        data = f"image_folder\n  path: {folder}/images\n  split: [0.5, 0.5]\n  workers: 1"
        text = text.replace(f'"{folder}/shapes.py:Shapes"', data).replace(", padding: 2", "")
        text = text.replace("eval: [*", "eval: [{name: CenterCrop, size: 12}, *")
    text = text.replace("*to_float", "{name: ToDtype, dtype: float32, scale: true}")
    return write_recipe(
        folder, text.replace("*normalised", "{name: Normalize, mean: [0.5, 0.4, 0.3], std: [0.2, 0.3, 0.1]}")
    )


@pytest.mark.parametrize(("processes", "strategy"), [(1, "auto"), (2, "fsdp2")])
def test_channels_last_changes_no_checkpoint(tmp_path: Path, processes: int, strategy: str) -> None:
    recipe, on = write_images(tmp_path), "tune.channels_last=true"
    for name, tune in (("off", "tune.channels_last=false"), ("on", on)):
        train(processes, recipe, tmp_path / name, tune, strategy=strategy)
    assert_close(tmp_path / "off", tmp_path / "on", 1e-12)
    effect = RunDir(tmp_path / "on").effect()
    assert effect is not None
    assert effect["tune"]["channels_last"]["on"]
    # resumed, it is the same run to the bit
    shutil.copytree(tmp_path / "on", tmp_path / "again")
    for path in ("export", "FINISHED", "checkpoints/step-00000004"):
        place = tmp_path / "again" / path
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    train(processes, recipe, tmp_path / "again", on, strategy=strategy)
    found = difference(last(tmp_path / "on"), last(tmp_path / "again"))
    assert found.identical, "\n".join(found.lines())


def test_weights_and_images_have_their_channels_last(tmp_path: Path) -> None:
    seen = in_world(1, layouts, str(write_images(tmp_path)), str(tmp_path / "run"))[0]
    assert seen == {"weights": True, "inputs": True, "gradients": True, "optimizer": True}


def layouts(recipe: str, run_dir: str) -> dict[str, bool]:
    """Take a step and look at how things lie in memory."""
    loaded, world = load_recipe(recipe, ["tune.channels_last=true", "train.precision=fp32"]), open_world("fp32")
    run = RunDir(run_dir)
    open_run(run, loaded, Launch.describe(1, "single"))
    seen = {}

    def note(module: nn.Module, inputs: tuple[Tensor]) -> None:
        seen["inputs"] = is_last(inputs[0])

    def is_last(tensor: Tensor) -> bool:
        return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()

    with Session.open(run, loaded.recipe, world) as session:
        first = next(module for module in session.t.strategy.model.modules() if isinstance(module, nn.Conv2d))
        first.register_forward_pre_hook(note)
        first.weight.register_post_accumulate_grad_hook(lambda p: seen.update(gradients=is_last(p.grad)))
        train_step(session.t, next(session.batches()))
        seen["weights"] = is_last(first.weight)
        seen["optimizer"] = is_last(session.t.strategy.optimizer.state[first.weight]["exp_avg"])
    world.close()
    return seen


@pytest.mark.parametrize(("files", "precision"), [(False, "fp64"), (True, "fp32")])
def test_bytes_are_made_floats_where_they_arrive(tmp_path: Path, files: bool, precision: str) -> None:
    recipe = write_images(tmp_path, files=files)
    for name in ("false", "true"):
        train(1, recipe, tmp_path / name, f"tune.uint8_inputs={name}", f"train.precision={precision}")
    assert_same_run(tmp_path / "false", tmp_path / "true")
    found = []
    for name in ("false", "true"):
        evaluated = cli("evaluate", tmp_path / name, "--split", "test", "--json")
        cli("predict", tmp_path / name, "test", "--out", tmp_path / f"{name}.csv")
        values = json.loads(evaluated.out)
        found.append((values | {"checkpoint": ""}, (tmp_path / f"{name}.csv").read_text()))
    assert found[0] == found[1]


def test_attention_takes_the_kernels_that_it_may(tmp_path: Path) -> None:
    assert in_world(1, attention)[0] == {
        "auto": (True, True, True, True),
        "true": (True, True, True, False),
        "false": (False, False, False, True),
    }


def attention() -> dict[str, tuple[bool, ...]]:
    """Return which kernels are on for each value of the key."""
    found, kernels = {}, torch.backends.cuda
    for asked in ("auto", True, False):
        section = TuneSection.model_validate({"flash_attention": asked})
        set_switches(section, resolve_tuning(section, CPU))
        found[str(asked).lower()] = (
            kernels.flash_sdp_enabled(),
            kernels.mem_efficient_sdp_enabled(),
            kernels.cudnn_sdp_enabled(),
            kernels.math_sdp_enabled(),
        )
    return found
