"""The recipe's section `tune`: what each key comes to, that it takes effect, and that nothing waits for a device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from runs import train, write_recipe
from torch import nn

from distrain.config import TuneSection, UserError
from distrain.parallel.tuning import RULES, Facts, resolve_tuning
from distrain.run.folder import RunDir

CPU = Facts("cpu", (0, 0), "fp32", autocast=False, deterministic=False, strategy="single", model=nn.Linear(2, 2))
GPU = replace(CPU, device="cuda", capability=(9, 0), precision="bf16", autocast=True)
SHARDED = replace(GPU, strategy="fsdp2", memory=8 * 24)
"""Room for the 24 bytes of the gradients of a linear layer from 2 to 2."""


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
        ("reduce_every_micro", SHARDED, False, "whole gradients are 0.0 MiB, within an eighth of"),
        ("reduce_every_micro", replace(SHARDED, memory=8 * 24 - 1), True, "whole gradients are 0.0 MiB, more than"),
        ("reduce_every_micro", replace(SHARDED, memory=0), True, "the memory of a process is not known"),
        ("reduce_every_micro", replace(SHARDED, offloads_weights=True), True, "weights are offloaded"),
        ("reduce_every_micro", replace(GPU, strategy="ddp"), False, "ddp has room for whole gradients"),
        ("reduce_every_micro", replace(GPU, strategy="zero1"), False, "zero1 has room for whole gradients"),
        ("reduce_every_micro", replace(GPU, strategy="zero2"), True, "zero2 keeps no more than its part"),
    ],
)
def test_what_auto_comes_to(key: str, facts: Facts, on: bool, why: str) -> None:
    choice = resolve_tuning(TuneSection(), facts).choices[key]
    assert (choice.on, choice.why[: len(why)]) == (on, why)


@pytest.mark.parametrize(
    ("key", "facts", "why"),
    [
        ("tf32", CPU, "TF32 needs an NVIDIA GPU of compute capability 8.0"),
        ("tf32", replace(GPU, precision="fp64", autocast=False), "under fp64 nothing is computed in fp32"),
        ("cast_before_gather", replace(GPU, strategy="ddp"), "of fsdp2 alone"),
        ("cast_before_gather", replace(SHARDED, precision="fp32", autocast=False), "under fp32 nothing is cast"),
        ("cast_before_reduce", replace(SHARDED, precision="fp16"), "train.precision is fp16"),
        ("prefetch", replace(GPU, strategy="zero3"), "of fsdp2 alone"),
        ("reduce_every_micro", replace(GPU, strategy="zero1"), "zero1 has room for whole gradients"),
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
    train(1, recipe, tmp_path / "run", "train.steps=4")
    effect = RunDir(tmp_path / "run").effect()
    assert effect is not None
    assert effect["tune"].keys() == RULES.keys()
    assert all(each["why"] for each in effect["tune"].values())
    (ended,) = train(1, recipe, tmp_path / "refused", "tune.tf32=true", status=1)
    assert "error: tune.tf32 is true, and cannot work here: TF32 needs an NVIDIA GPU" in ended.err
    (ended,) = train(1, recipe, tmp_path / "refused", "train.precision=tf32", "tune.tf32=false", status=1)
    assert "tune.tf32: found false, but train.precision is tf32" in ended.err
