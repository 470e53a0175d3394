"""Models of timm, by name."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from runs import last, losses, train, write_recipe
from safetensors.torch import save_file

from distrain.config import Recipe, UserError
from distrain.config.registry import models
from distrain.datasets.base import DataMeta
from distrain.fingerprints.code import named_objects
from distrain.models import build_model, check_model
from distrain.optim import layer_depths


def _recipe(name: str, **args: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "of-timm", "task": "classification", "data": "digits", "model": {"name": name, **args},
            "batch": {"global": 4}, "train": {"steps": 1},
        }
    )  # fmt: skip


VIT = {"embed_dim": 16, "depth": 3, "num_heads": 2, "patch_size": 8}


@pytest.mark.parametrize(
    ("name", "args", "shape", "first"),
    [
        ("timm:resnet18", {}, (1, 40, 32), "conv1.weight"),
        ("timm:vit_tiny_patch16_224", VIT, (3, 32, 32), "patch_embed.proj.weight"),
        ("timm:vit_tiny_patch16_224.augreg_in21k", VIT, (1, 32, 48), "patch_embed.proj.weight"),
    ],
)
def test_a_model_is_built_for_the_data(name, args, shape, first):
    model = build_model(_recipe(name, **args), DataMeta(input_shape=shape, num_classes=7))
    assert model(torch.zeros(2, *shape)).shape == (2, 7)
    assert dict(model.named_parameters())[first].shape[1] == shape[0]
    again = build_model(_recipe(name, **args), DataMeta(input_shape=shape, num_classes=7))
    assert all(map(torch.equal, model.parameters(), again.parameters())), "initialised by the seed"
    assert len(layer_depths(model, 0.5).blocks) == (3 if args else 8)


@pytest.mark.parametrize(
    ("name", "args", "words"),
    [
        ("timm:resnt18", {}, ["no model 'resnt18'", "did you mean 'resnet18'"]),
        ("timm:resnet18.a1_in21k", {}, ["knows no 'resnet18.a1_in21k'"]),
        ("timm:resnet18", {"pretrained": True}, ["model.pretrained", "never downloaded"]),
        ("timm:vit_tiny_patch16_224", {"drop_pth_rate": 0.1}, ["model.drop_pth_rate", "'drop_path_rate'"]),
        ("resnt18d", {}, ["no model 'resnt18d'"]),
    ],
)
def test_names_and_arguments_are_checked_without_data(name, args, words):
    problems = "\n".join(check_model(_recipe(name, **args)))
    assert all(word in problems for word in words), problems


@pytest.mark.parametrize(
    ("name", "args", "words"),
    [
        (
            "timm:vit_tiny_patch16_224",
            {**VIT, "img_size": 224},
            ["model.img_size: 224 × 224", "the images are 32 × 32"],
        ),
        ("timm:efficientvit_m0", {}, ["takes images of 224 × 224", "the data have 32 × 32", "resize them"]),
    ],
)
def test_images_of_another_size_are_an_error(name, args, words):
    recipe, meta = _recipe(name, **args), DataMeta(input_shape=(3, 32, 32), num_classes=2)
    with pytest.raises(UserError) as caught:
        build_model(recipe, meta)
    assert all(word in str(caught.value) for word in words), caught.value


def test_it_is_listed_and_is_nobody_s_own_code():
    assert models.summaries()["timm:resnet18"] == "timm"
    assert models.spec_of("timm:resnet18") is None
    assert models.spec_of("own.py:Net") == "own.py:Net"
    assert [*named_objects({"name": "timm:resnet18"})] == ["timm:resnet18"]  # a module that is installed


def test_it_trains_from_local_weights_of_another_head(tmp_path):
    weights = timm.create_model(
        "vit_tiny_patch16_224", num_classes=5, in_chans=1, img_size=8, **{**VIT, "patch_size": 4}
    )
    save_file(weights.state_dict(), tmp_path / "pretrained.safetensors")
    recipe = write_recipe(
        tmp_path,
        """
name: vit
task: classification
data: {name: digits, mixup: {alpha: 0.2}}
model:
  {name: "timm:vit_tiny_patch16_224", embed_dim: 16, depth: 3, num_heads: 2, patch_size: 4, drop_path_rate: 0.1,
   weights: pretrained.safetensors, weights_strict: false}
optim: {name: adamw, lr: 1.0e-3, layer_decay: 0.75}
batch: {global: 16}
train: {steps: 3, ema: 0.9}
eval: {every: null}
log: {every: 1 steps}
""",
    )
    ended = train(1, recipe, tmp_path / "alone")[0]
    said = ended.out + ended.err
    assert "head.weight (found (5, 16), expected (10, 16))" in said
    assert "over 3 x Block, blocks.0 to blocks.2" in said
    train(2, recipe, tmp_path / "sharded", "train.precision=fp32", strategy="fsdp2")
    assert losses(tmp_path / "alone")[0] == pytest.approx(losses(tmp_path / "sharded")[0], rel=0.2)
    assert last(tmp_path / "sharded").name == "step-00000003"
