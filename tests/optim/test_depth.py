"""Learning rates that fall from block to block."""

from __future__ import annotations

import pytest
import torch
from runs import assert_close, checkpoint, last, state, train, write_recipe
from torch import nn
from torchvision.models import resnet18, vit_b_16
from transformers import AutoModelForCausalLM, GPT2Config

from distrain.config import OptimSection, UserError
from distrain.networks.basic import Mlp
from distrain.optim import layer_depths, parameter_plan


def _vit():
    return vit_b_16(num_classes=3)


def _gpt():
    return AutoModelForCausalLM.from_config(GPT2Config(n_layer=12, n_embd=8, n_head=2, vocab_size=11))


@pytest.mark.parametrize(
    ("build", "exponents"),
    [
        (
            _vit,  # 12 blocks: those of BEiT's rule
            {
                "class_token": 13, "conv_proj.weight": 13, "encoder.pos_embedding": 13,
                "encoder.layers.encoder_layer_0.ln_1.weight": 12, "encoder.layers.encoder_layer_11.mlp.0.weight": 1,
                "encoder.ln.weight": 0, "heads.head.weight": 0,
            },
        ),
        (
            resnet18,  # 8 blocks
            {
                "conv1.weight": 9, "bn1.bias": 9, "layer1.0.conv1.weight": 8, "layer2.0.downsample.0.weight": 6,
                "layer4.1.bn2.weight": 1, "fc.bias": 0,
            },
        ),
        (
            _gpt,  # the head is tied to the embedding, which is nearer to the input
            {
                "transformer.wte.weight": 13, "transformer.wpe.weight": 13, "transformer.h.0.attn.c_attn.weight": 12,
                "transformer.h.11.mlp.c_proj.bias": 1, "transformer.ln_f.weight": 0,
            },
        ),
    ],
)  # fmt: skip
def test_a_parameter_has_the_rate_of_its_depth(build, exponents):
    with torch.device("meta"):
        model = build()
    groups = [{"params": "*.bias", "lr_scale": 2.0}]
    section = OptimSection.model_validate({"weight_decay": 0.1, "layer_decay": 0.5, "groups": groups})
    scales = {name: plan.lr_scale for plan in parameter_plan(model, section) for name in plan.names}
    for name, exponent in exponents.items():
        assert scales[name] == 0.5**exponent * (2.0 if name.endswith(".bias") else 1.0), name
    assert len(scales) == len(list(model.parameters()))
    assert str(layer_depths(model, 0.5)).startswith(
        f"optim.layer_decay 0.5 over {12 if build is not resnet18 else 8} x "
    )


def test_what_lies_between_two_blocks_belongs_to_the_one_that_follows():
    class Block(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(2, 2))

    model = nn.Sequential(nn.Linear(2, 2), Block(), nn.LayerNorm(2), Block(), nn.Linear(2, 2))
    depths = layer_depths(model, 0.5).depths
    assert [depths[f"{name}.weight"] for name in ("0", "1.0", "2", "3.0", "4")] == [0, 1, 2, 2, 3]


def test_a_model_without_blocks_is_an_error():
    with pytest.raises(UserError, match=r"optim.layer_decay: Mlp has no repeated blocks.*optim.groups"):
        parameter_plan(Mlp(num_outputs=2, in_features=2), OptimSection(layer_decay=0.5))


GPT = """
name: tiny-gpt
task: language_modeling
data: {name: python_source, seq_len: 16, max_bytes: 20_000}
model: {name: gpt, n_layer: 3, n_head: 2, d_model: 16}
optim: {name: adamw, lr: 1.0e-2, weight_decay: 0.1, eps: 1.0e-3, layer_decay: 0.5, clip_norm: 1.0}
batch: {global: 4}
train: {steps: 4, precision: fp32}
eval: {every: null}
checkpoint: {every: 2 steps, async: false}
"""


@pytest.mark.parametrize("strategy", ["fsdp2", "zero3"])
def test_strategies_that_shard_compute_the_same(strategy, tmp_path):
    recipe = write_recipe(tmp_path, GPT)
    alone, sharded = tmp_path / "alone", tmp_path / "sharded"
    logged = train(1, recipe, alone)[0]
    assert "optim.layer_decay 0.5 over 3 x Block" in logged.out + logged.err
    train(2, recipe, sharded, strategy=strategy)
    assert_close(alone, sharded, 1e-5)


def test_a_run_resumes_with_other_groups(tmp_path):
    recipe = write_recipe(tmp_path, GPT)
    run = tmp_path / "run"
    train(1, recipe, run, "optim.layer_decay=null", stop_after=1)
    assert last(run) == checkpoint(run, 2)
    train(1, recipe, run, update=True)
    after = state(last(run))
    assert all(values[0] == 4 for name, values in after.items() if name.endswith("/step")), "the state is kept"
