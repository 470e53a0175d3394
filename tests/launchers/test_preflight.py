"""How a strategy is asked for: by option, by a launcher's configuration, by the run itself; and who owns what."""

from __future__ import annotations

import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from places import SCRIPT
from runs import TINY, Ended, captured, cli, losses, train, typed, write_recipe
from worlds import free_port, in_world, running_world

import distrain
from distrain.cli.options import Offload, StrategyName
from distrain.config import UserError
from distrain.config.yaml import load_recipe
from distrain.launchers import asked_for, configuration_file, join_launcher, work, work_evaluation
from distrain.parallel import (
    OFFLOADS,
    STRATEGIES,
    SourcedValue,
    StrategyHint,
    StrategySpec,
    disagreements,
    read_configuration,
    resolve_strategy,
    strategy_wishes,
    take_over,
    unused,
)
from distrain.run.folder import Launch, RunDir

CONFIGS = Path(distrain.__file__).parent.parent / "accelerate_configs"
OTHER_WAYS = {"cpu": "single", "gpu": "single", "multi_cpu": "ddp", "zero2_offload": "zero2", "zero3_offload": "zero3"}
"""Configurations that are not named by their strategy."""


def strategy_of(config: Path) -> str:
    return OTHER_WAYS.get(config.stem, config.stem.removesuffix("_multinode"))


# --------------------------------------------------------------------------------------------------------------------
# What places say, and whether they agree


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("world_size", [1, 3])
def test_a_strategy_is_stated_in_one_place(strategy: str, world_size: int) -> None:
    if strategy == "single" and world_size > 1:
        with pytest.raises(UserError, match="single is one process, found 3; nothing was written"):
            resolve_strategy(world_size, [StrategyHint("--strategy", strategy)])
        return
    expected = "single" if strategy == "ddp" and world_size == 1 else strategy
    assert resolve_strategy(world_size, [StrategyHint("--strategy", strategy)]) == StrategySpec(expected)


def test_the_default_is_one_process_or_ddp() -> None:
    assert resolve_strategy(1, []) == StrategySpec("single")
    assert resolve_strategy(2, [StrategyHint("--strategy"), StrategyHint("--offload")]) == StrategySpec("ddp")


def test_places_that_differ_are_all_named() -> None:
    with pytest.raises(UserError) as caught:
        resolve_strategy(
            2,
            [
                StrategyHint("--strategy", "zero2"),
                StrategyHint("a.yaml: distributed_type", "fsdp2"),
                StrategyHint("launch.json", "zero2"),
            ],
        )
    for line in ("zero2      --strategy", "fsdp2      a.yaml: distributed_type", "zero2      launch.json"):
        assert f"\n  {line}\n" in str(caught.value)
    assert "nothing was written" in str(caught.value)
    with pytest.raises(UserError, match=r"the offload differs between 2 places(.|\n)*all .*--off(.|\n)*none .*a\.y"):
        resolve_strategy(
            1, [StrategyHint("--offload", "zero3", "all"), StrategyHint("a.yaml: offload_param_device", None, "none")]
        )


def test_single_and_ddp_are_the_same_wish_in_worlds_of_different_sizes() -> None:
    assert resolve_strategy(1, [StrategyHint("--strategy", "single"), StrategyHint("a.yaml", "ddp")]) == StrategySpec(
        "single"
    )
    assert resolve_strategy(2, [StrategyHint("--strategy", "ddp"), StrategyHint("a.yaml", "ddp")]) == StrategySpec(
        "ddp"
    )


def test_a_run_resumes_as_it_was_started_unless_options_change_it() -> None:
    earlier = StrategyHint("launch.json", "zero2", "optimizer")
    assert resolve_strategy(2, [], earlier) == StrategySpec("zero2", True)
    assert resolve_strategy(1, [StrategyHint("--offload", None, "none")], earlier) == StrategySpec("zero2")
    assert resolve_strategy(2, [StrategyHint("--strategy", "fsdp2")], earlier) == StrategySpec("fsdp2")
    assert resolve_strategy(2, [StrategyHint("--strategy", "zero2")], earlier) == StrategySpec("zero2")
    for replicated in ("single", "ddp"):
        assert resolve_strategy(2, [], StrategyHint("launch.json", replicated, "none")) == StrategySpec("ddp")
    hybrid = StrategyHint("launch.json", "fsdp2", "none", "2")
    assert resolve_strategy(4, [], hybrid) == StrategySpec("fsdp2", replicate=2)
    assert resolve_strategy(4, [StrategyHint("--replicate", replicate="auto")], hybrid).replicate == "auto"
    assert resolve_strategy(4, [StrategyHint("--offload", offload="all")], hybrid).replicate == 2
    assert resolve_strategy(4, [StrategyHint("--strategy", "fsdp2")], hybrid) == StrategySpec("fsdp2")
    with pytest.raises(UserError, match=r"found 3 processes, expected a multiple of 2; .*Say --replicate 1"):
        resolve_strategy(3, [], hybrid)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("replicate", ["1", "2", "auto"])
def test_only_fsdp2_makes_replicas(strategy: str, replicate: str) -> None:
    if strategy == "fsdp2" or replicate == "1":
        asked = StrategySpec.of(strategy, "none", replicate)
        assert str(asked.replicate) == replicate
        assert asked.options == ("--strategy", strategy, "--offload", "none", "--replicate", replicate)
        return
    with pytest.raises(UserError, match=f"--replicate {replicate} is for fsdp2, found {strategy}, which"):
        StrategySpec.of(strategy, "none", replicate)


@pytest.mark.parametrize("replicate", ["0", "-1", "two", "2.0", "", "Auto", "\u0662"])
def test_a_number_of_replicas_that_is_none(replicate: str) -> None:
    with pytest.raises(UserError, match=r"--replicate: found '.*', expected a whole number from 1, or auto"):
        StrategySpec.of("fsdp2", "none", replicate)


OFFERED = {
    **dict.fromkeys(("single", "ddp"), ("none",)),
    **dict.fromkeys(("zero1", "zero2"), ("none", "optimizer")),
    "zero3": ("none", "optimizer", "all"),
    "fsdp2": ("none", "all"),
}


@pytest.mark.parametrize(("strategy", "offload"), itertools.product(STRATEGIES, OFFLOADS))
def test_what_each_strategy_offloads(strategy: str, offload: str) -> None:
    if offload in OFFERED[strategy]:
        asked = StrategySpec.of(strategy, offload)
        assert (asked.strategy, asked.offload) == (strategy, offload)
        assert asked.offload_parameters == (offload == "all")
        return
    with pytest.raises(UserError, match=rf"{strategy} cannot offload '{offload}', expected none"):
        StrategySpec.of(strategy, offload)


def test_names_that_there_are_not() -> None:
    with pytest.raises(UserError, match=r"no strategy 'zero4'; expected one of single, .*; did you mean 'zero"):
        resolve_strategy(1, [StrategyHint("--strategy", "zero4")])
    with pytest.raises(UserError, match=r"no offload 'optimiser'; expected .*did you mean 'optimizer'"):
        resolve_strategy(1, [StrategyHint("--strategy", "zero3", "optimiser")])
    assert [*StrategyName] == ["auto", *STRATEGIES]
    assert [*Offload] == [*OFFLOADS]


# --------------------------------------------------------------------------------------------------------------------
# A launcher's configuration


def accelerate(*arguments: object) -> list[str]:
    return ["/usr/bin/python3", "/venv/bin/accelerate", "launch", *map(str, arguments)]


def written(folder: Path, content: dict[str, Any], name: str = "a.yaml") -> Path:
    path = folder / name
    path.write_text(json.dumps(content) if path.suffix == ".json" else yaml.safe_dump(content))
    return path


def wishes_of(folder: Path, content: dict[str, Any], *flags: object) -> tuple[str | None, str | None]:
    argv = accelerate("--config_file", written(folder, content), *flags, "train.py", "--zero_stage", "9")
    wishes = strategy_wishes(read_configuration(argv, {}))
    for wish in wishes:
        assert str(folder) in wish.place or wish.place.startswith("accelerate launch --")
    (strategy,) = {wish.strategy for wish in wishes if wish.strategy} or {None}
    (offload,) = {wish.offload for wish in wishes if wish.offload} or {None}
    return strategy, offload


DEEPSPEED: dict[str, Any] = {"distributed_type": "DEEPSPEED"}
FSDP: dict[str, Any] = {"distributed_type": "FSDP"}


@pytest.mark.parametrize(
    ("content", "flags", "expected"),
    [
        ({"distributed_type": "NO"}, [], ("single", None)),
        ({"distributed_type": False}, [], ("single", None)),
        ({"distributed_type": "MULTI_GPU"}, [], ("ddp", None)),
        ({"distributed_type": "MULTI_CPU"}, [], ("ddp", None)),
        (DEEPSPEED, [], ("zero2", None)),
        (DEEPSPEED | {"deepspeed_config": {"zero_stage": 1}}, [], ("zero1", None)),
        (DEEPSPEED | {"deepspeed_config": {"zero_stage": 1}}, ["--zero_stage", 3], ("zero3", None)),
        (DEEPSPEED | {"deepspeed_config": {"zero_stage": 1}}, ["--zero-stage=3"], ("zero3", None)),
        (DEEPSPEED | {"deepspeed_config": {"zero_stage": 1}}, ["--cpu"], ("single", None)),
        (DEEPSPEED | {"deepspeed_config": {"offload_optimizer_device": "cpu"}}, [], ("zero2", "optimizer")),
        (
            DEEPSPEED | {"deepspeed_config": {"offload_optimizer_device": "none", "offload_param_device": "none"}},
            [],
            ("zero2", "none"),
        ),
        (
            DEEPSPEED | {"deepspeed_config": {"zero_stage": 3}},
            ["--offload_optimizer_device", "cpu", "--offload_param_device", "cpu"],
            ("zero3", "all"),
        ),
        # of another type, so accelerate passes it over
        ({"distributed_type": "MULTI_GPU", "deepspeed_config": {"zero_stage": 0}}, [], ("ddp", None)),
        (FSDP | {"fsdp_config": {"fsdp_version": 2}}, [], ("fsdp2", None)),
        (FSDP | {"fsdp_config": {"version": 2, "offload_params": True}}, [], ("fsdp2", "all")),
        (FSDP | {"fsdp_config": {"fsdp_version": 2}}, ["--fsdp_offload_params", "false"], ("fsdp2", "none")),
        ({"distributed_type": "MULTI_GPU"}, ["--use_fsdp", "--fsdp_version", 2], ("fsdp2", None)),
    ],
)
def test_the_strategy_of_a_configuration(
    tmp_path: Path, content: dict[str, Any], flags: list[Any], expected: tuple[str, str | None]
) -> None:
    assert wishes_of(tmp_path, content, *flags) == expected


def hybrid(config: dict[str, Any], **sizes: int) -> dict[str, Any]:
    found = FSDP | {"fsdp_config": {"fsdp_version": 2} | config}
    if sizes:
        found |= {"use_parallelism_config": True}
        found["parallelism_config"] = {f"parallelism_config_{name}_size": size for name, size in sizes.items()}
    return found


@pytest.mark.parametrize(
    ("content", "flags", "replicate"),
    [
        (hybrid({"fsdp_sharding_strategy": "HYBRID_SHARD"}), [], "auto"),
        (hybrid({"sharding_strategy": 4}), [], "auto"),
        (hybrid({"fsdp_sharding_strategy": "FULL_SHARD"}), [], 1),
        (hybrid({"fsdp_sharding_strategy": "FULL_SHARD"}), ["--fsdp_sharding_strategy", "HYBRID_SHARD"], "auto"),
        (hybrid({}, dp_replicate=2, dp_shard=4), [], 2),
        (hybrid({}, dp_replicate=4), [], 4),
        (hybrid({}, dp_shard=4), [], 2),
        (hybrid({}, dp_replicate=1, dp_shard=8), [], 1),
        (hybrid({}, dp_shard=4), ["--parallelism_config_dp_shard_size", 2], 4),
    ],
)
def test_the_replicas_of_a_configuration(
    tmp_path: Path, content: dict[str, Any], flags: list[Any], replicate: int | str
) -> None:
    argv = accelerate("--config_file", written(tmp_path, content), *flags, "train.py")
    configuration = read_configuration(argv, {})
    assert resolve_strategy(8, strategy_wishes(configuration, 8)) == StrategySpec("fsdp2", replicate=replicate)
    # FULL_SHARD is what stands there in any case
    said = [place for place in unused(configuration) if "sharding_strategy" in place]
    assert bool(said) == (content["fsdp_config"].get("fsdp_sharding_strategy") == "FULL_SHARD" and not flags)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (hybrid({}, dp_replicate=2, dp_shard=2), r"2 .*dp_replicate_size\n  4 .*dp_shard_size"),
        (
            hybrid({"fsdp_sharding_strategy": "HYBRID_SHARD"}, dp_replicate=2),
            r"auto .*sharding_strategy\n  2 .*dp_repl",
        ),
        (hybrid({}, dp_shard=3), r"dp_shard_size is 3, found 8 processes, expected a number that divides theirs"),
        (hybrid({}, dp_replicate=3), r"asks for 3 replicas, found 8 processes"),
        (hybrid({}, dp_replicate=2, tp=2), r"tp_size: found 2; tensor, context"),
        (hybrid({}, tp=2), r"use_parallelism_config: found True; tensor, context"),
        (hybrid({"fsdp_sharding_strategy": "HYBRID_SHARD_ZERO2"}), r"found 'HYBRID_SHARD_ZERO2'; weights are freed"),
        ({"distributed_type": "MULTI_GPU", "use_parallelism_config": True}, r"use_parallelism_config: found True"),
    ],
)
def test_replicas_of_a_configuration_that_cannot_be(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    configuration = read_configuration(accelerate("--config_file", written(tmp_path, content), "train.py"), {})
    with pytest.raises(UserError, match=message) as caught:
        resolve_strategy(8, strategy_wishes(configuration, 8))
    assert "nothing was written" in str(caught.value)


def test_the_file_that_accelerate_config_wrote_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.commands.config import config_args

    default = written(tmp_path, DEEPSPEED | {"deepspeed_config": {"zero_stage": 3}}, "default_config.yaml")
    monkeypatch.setattr(config_args, "default_config_file", str(default))
    (wish,) = strategy_wishes(read_configuration(accelerate("train.py"), {}))
    assert wish == StrategyHint(f"{default}: deepspeed_config.zero_stage", "zero3")
    assert read_configuration(["/usr/bin/torchrun", "train.py"], {}) == {}


def test_a_file_of_deepspeed(tmp_path: Path) -> None:
    stage = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu", "nvme_path": None}}
    file = written(tmp_path, {"zero_optimization": stage, "train_batch_size": "auto"}, "ds.json")
    content = DEEPSPEED | {"deepspeed_config": {"deepspeed_config_file": str(file)}}
    assert wishes_of(tmp_path, content) == ("zero3", "all")
    # as torchrun's processes get it
    variables = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}
    assert resolve_strategy(1, strategy_wishes(read_configuration([], variables))) == StrategySpec("zero3", True, True)
    content["deepspeed_config"]["zero_stage"] = 2
    with pytest.raises(UserError, match=r"zero2 .*a\.yaml: deepspeed_config\.zero_stage\n  zero3 .*ds\.json: zero_opt"):
        resolve_strategy(
            1, strategy_wishes(read_configuration(accelerate("--config_file", written(tmp_path, content), "x"), {}))
        )
    for broken in ("{", "[1]"):
        file.write_text(broken)
        with pytest.raises(UserError, match=r"the launcher's configuration .*ds\.json"):
            read_configuration([], variables)


def test_the_environment_where_there_is_no_file() -> None:
    deepspeed = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}
    assert strategy_wishes(read_configuration([], deepspeed))[0].strategy == "zero1"
    fsdp = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}
    assert resolve_strategy(2, strategy_wishes(read_configuration([], fsdp))) == StrategySpec("fsdp2", True, True)
    sizes = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2"}
    fsdp.pop("FSDP_OFFLOAD_PARAMS")
    for more in (sizes, {"PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2"}, {"FSDP_SHARDING_STRATEGY": "HYBRID_SHARD"}):
        asked = resolve_strategy(4, strategy_wishes(read_configuration([], fsdp | more), 4))
        assert asked.replicate == ("auto" if "FSDP_SHARDING_STRATEGY" in more else 2)
    # what accelerate fills in where nobody said anything
    filled = {"FSDP_SHARDING_STRATEGY": "FULL_SHARD", "PARALLELISM_CONFIG_DP_SHARD_SIZE": "1"}
    assert read_configuration([], filled) == {}
    filled = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO", "FSDP_OFFLOAD_PARAMS": "false"}
    assert read_configuration([], filled) == {}
    said = read_configuration([], {"ACCELERATE_MIXED_PRECISION": "bf16"})
    assert said == {"mixed_precision": SourcedValue("bf16", "environment: ACCELERATE_MIXED_PRECISION")}


def with_file(content: dict[str, Any]) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 2}} | content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (FSDP, r"distributed_type, without fsdp_version: FSDP version 1 is superseded; set fsdp_version: 2"),
        (FSDP | {"fsdp_config": {"fsdp_version": 1}}, r"fsdp_config\.fsdp_version: FSDP version 1"),
        (FSDP | {"fsdp_config": {"fsdp_version": 2, "fsdp_reshard_after_forward": False}}, "found False; weights are"),
        (DEEPSPEED | {"deepspeed_config": {"zero_stage": 0}}, r"zero_stage: found stage 0; take 1, 2 or 3"),
        (DEEPSPEED | {"deepspeed_config": {"offload_optimizer_device": "nvme"}}, "found nvme, expected none or cpu"),
        (
            DEEPSPEED | {"deepspeed_config": {"zero_stage": 3, "offload_param_device": "cpu"}},
            "set offload_optimizer_device: cpu too",
        ),
        (DEEPSPEED | {"deepspeed_config": {"deepspeed_moe_layer_cls_names": "Experts"}}, "found 'Experts'; layers of"),
        ({"distributed_type": "MEGATRON_LM"}, "found MEGATRON_LM, expected NO, MULTI_GPU, DEEPSPEED or FSDP"),
        ({"distributed_type": "XLA"}, "found XLA, expected NO"),
        ({"distributed_type": "NO", "downcast_bf16": "yes"}, "it is for TPUs"),
        (
            FSDP | {"fsdp_config": {"fsdp_version": 2}, "parallelism_config": {"parallelism_config_tp_size": 2}},
            r"parallelism_config\.parallelism_config_tp_size: found 2; tensor, context",
        ),
    ],
)
def test_what_there_is_not_here_is_refused(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        wishes_of(tmp_path, content)
    assert "nothing was written" in str(caught.value)
    assert str(tmp_path / "a.yaml") in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        {"zero_optimization": {"stage": 2, "zero_quantized_weights": True}},
        with_file({"amp": {"enabled": True}}),
        with_file({"gradient_predivide_factor": 2.0}),
        with_file({"tensor_parallel": {"autotp_size": 2}}),
    ],
)
def test_what_deepspeed_would_compute_otherwise_is_refused(tmp_path: Path, content: dict[str, Any]) -> None:
    file = written(tmp_path, content, "ds.json")
    with pytest.raises(UserError, match=r"ds\.json: \S+: found \S+, which has no counterpart in a recipe; take it out"):
        strategy_wishes(read_configuration([], {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}))


def test_settings_without_a_part_are_named(tmp_path: Path) -> None:
    # as `accelerate config` writes them
    content = FSDP | {
        "fsdp_config": {
            "fsdp_version": 2,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "fsdp_offload_params": False,
            "fsdp_reshard_after_forward": True,
            "fsdp_activation_checkpointing": False,
            "fsdp_state_dict_type": "SHARDED_STATE_DICT",
        },
        "downcast_bf16": "no",
        "num_processes": 2,
    }
    path = written(tmp_path, content)
    configuration = read_configuration(accelerate("--config_file", path, "train.py"), {})
    assert resolve_strategy(2, strategy_wishes(configuration)) == StrategySpec("fsdp2")
    names = ("fsdp_auto_wrap_policy", "fsdp_state_dict_type")
    assert sorted(unused(configuration)) == [f"{path}: fsdp_config.{name}" for name in names]
    zero = {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 5e8, "offload_optimizer": {"device": "cpu"}}
    file = written(tmp_path, {"zero_optimization": zero, "fp16": {"enabled": False, "loss_scale": 0}}, "ds.json")
    configuration = read_configuration([], {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)})
    names = ("fp16.loss_scale", "zero_optimization.overlap_comm", "zero_optimization.reduce_bucket_size")
    assert sorted(unused(configuration)) == [f"{file}: {name}" for name in names]


def test_what_was_read_does_not_act_again() -> None:
    settings = {
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
        "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
        "FSDP_VERSION": "2",
    }
    kept = {"RANK": "0", "ACCELERATE_USE_CPU": "True", "ACCELERATE_DEBUG_MODE": "true", "PATH": "/bin"}
    variables = settings | kept
    take_over(variables)
    assert variables == kept


# --------------------------------------------------------------------------------------------------------------------
# What the recipe owns


RECIPE = """
name: tiny
task: classification
data: {name: digits, split: [0.8, 0.2]}
model: {name: mlp, hidden: [8]}
optim: {name: adamw, lr: 1.0e-3, weight_decay: 0.1, clip_norm: 0.5, betas: [0.9, 0.95]}
batch: {global: 24, micro: 4}
train: {steps: 2, precision: bf16}
"""

EQUAL = {
    "mixed_precision": "bf16",
    "dynamo_backend": "NO",
    "gradient_accumulation_steps": "3",
    "gradient_clipping": 0.5,
    "fsdp_activation_checkpointing": False,
    "deepspeed.train_batch_size": 24,
    "deepspeed.train_micro_batch_size_per_gpu": 4,
    "deepspeed.gradient_accumulation_steps": 3,
    "deepspeed.gradient_clipping": "0.5",
    "deepspeed.communication_data_type": "fp32",
    "deepspeed.bf16.enabled": True,
    "deepspeed.fp16.enabled": False,
    "deepspeed.optimizer.type": "AdamW",
    "deepspeed.optimizer.params.lr": 1e-3,
    "deepspeed.optimizer.params.weight_decay": 0.1,
    "deepspeed.optimizer.params.betas": [0.9, 0.95],
    "zero_stage": 2,
    "num_processes": 8,
}
"""Settings that say what the recipe above makes of two processes, and some that it does not own."""

DIFFERENT = {
    "mixed_precision": ("no", "train.precision", "bf16"),
    "dynamo_backend": ("INDUCTOR", "train.compile", "no"),
    "gradient_accumulation_steps": (1, "batch.global", "3"),
    "gradient_clipping": (1.0, "optim.clip_norm", "0.5"),
    "fsdp_activation_checkpointing": (True, "train.activation_checkpointing", "false"),
    "deepspeed.train_batch_size": (32, "batch.global", "24"),
    "deepspeed.train_micro_batch_size_per_gpu": (12, "batch.micro", "4"),
    "deepspeed.gradient_accumulation_steps": (6, "batch.global", "3"),
    "deepspeed.gradient_clipping": (0, "optim.clip_norm", "0.5"),
    "deepspeed.communication_data_type": ("bf16", "train.precision", "fp32"),
    "deepspeed.bf16.enabled": (False, "train.precision", "true"),
    "deepspeed.fp16.enabled": (True, "train.precision", "false"),
    "deepspeed.optimizer.type": ("Lion", "optim.name", "adamw"),
    "deepspeed.optimizer.params.lr": (3e-4, "optim.lr", "0.001"),
    "deepspeed.optimizer.params.weight_decay": (0, "optim.weight_decay", "0.1"),
    "deepspeed.optimizer.params.betas": ([0.9, 0.999], "optim.betas", "[0.9, 0.95]"),
    "deepspeed.optimizer.params.eps": (1e-6, "optim.eps", "not there"),
    "deepspeed.scheduler.type": ("WarmupLR", "schedule.name", "constant"),
    "deepspeed.scheduler.params.warmup_num_steps": (10, "schedule", "not there"),
}


def stated(values: dict[str, Any]) -> dict[str, SourcedValue]:
    return {key: SourcedValue(value, f"a.yaml: {key}") for key, value in values.items()}


def test_settings_that_say_the_same_are_fine(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, RECIPE)).recipe
    assert disagreements(stated(EQUAL), recipe, 2) == []
    assert disagreements(stated({"gradient_clipping": "auto"}), recipe, 2) == []


@pytest.mark.parametrize("key", DIFFERENT)
def test_a_setting_that_differs_is_reported_with_both_values(tmp_path: Path, key: str) -> None:
    loaded = load_recipe(write_recipe(tmp_path, RECIPE))
    value, own, expected = DIFFERENT[key]
    (line,) = disagreements(stated(EQUAL | {key: value}), loaded.recipe, 2, origins=loaded.origins)
    shown = json.dumps(value) if isinstance(value, bool | list) else str(value)
    assert line.startswith(f"a.yaml: {key} is {shown}; the recipe's {own}")
    assert line.endswith(f" makes it {expected}")
    if own == "optim.lr":
        assert "(" in line
        assert f"{tmp_path / 'recipe.yaml'}:6" in line


def test_all_that_differs_is_reported_at_once(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, RECIPE)).recipe
    assert len(disagreements(stated({key: row[0] for key, row in DIFFERENT.items()}), recipe, 2)) == len(DIFFERENT)


def test_accumulation_is_that_of_the_world(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, RECIPE)).recipe
    explicit = stated({"gradient_accumulation_steps": 3})
    assert [len(disagreements(explicit, recipe, world_size)) for world_size in (1, 2, 3)] == [1, 0, 1]


@pytest.mark.parametrize(
    ("precision", "auto", "same"),
    [("fp32", "fp32", "no"), ("fp64", "fp32", "no"), ("auto", "fp32", "no"), ("auto", "bf16", "bf16")],
)
def test_each_precision_has_a_name_at_accelerate(tmp_path: Path, precision: str, auto: str, same: str) -> None:
    recipe = load_recipe(write_recipe(tmp_path, RECIPE), [f"train.precision={precision}"]).recipe
    found = [
        value
        for value in ("no", "bf16", "fp16", "fp8")
        if not disagreements(stated({"mixed_precision": value}), recipe, 2, auto=auto)
    ]
    assert found == [same]


# --------------------------------------------------------------------------------------------------------------------
# The configurations that come along

GIVEN = """
import json, os, sys
known = {key: value for key, value in os.environ.items() if key.startswith(("ACCELERATE_", "FSDP_", "RANK", "WORLD_"))}
with open(os.path.join(sys.argv[1], os.environ.get("RANK", "0")), "w") as file:
    json.dump(known, file)
"""


def accelerate_rank(arguments: list[str]) -> Ended:
    """Run the command `accelerate` in this process."""
    from accelerate.commands.accelerate_cli import main

    sys.argv = ["accelerate", *arguments]
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    os.environ["OMP_NUM_THREADS"] = "1"
    return captured(lambda: main() or 0)


def test_every_way_to_run_has_its_configuration() -> None:
    names = {path.stem for path in CONFIGS.glob("*.yaml")}
    spread = {"ddp", "zero1", "zero2", "zero3", "fsdp2"}
    assert names == spread | {f"{name}_multinode" for name in spread} | OTHER_WAYS.keys()
    for strategy in [*STRATEGIES][1:]:
        assert strategy_of(configuration_file(strategy)) == strategy


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_a_configuration_leaves_to_the_recipe_what_the_recipe_owns(config: Path, tmp_path: Path) -> None:
    configuration = read_configuration(accelerate("--config_file", config, "train.py"), {})
    assert not {"mixed_precision", "dynamo_backend", *DIFFERENT} & configuration.keys()
    assert unused(configuration) == []
    asked = resolve_strategy(1 if strategy_of(config) == "single" else 2, strategy_wishes(configuration))
    assert asked.strategy == strategy_of(config)
    amount = "all" if asked.strategy == "zero3" else "optimizer"
    assert asked.offload == (amount if config.stem.endswith("_offload") else "none")


@pytest.mark.parametrize(
    "config",
    sorted(path for path in CONFIGS.glob("*.yaml") if "multinode" not in path.stem),
    ids=lambda path: path.name,
)
def test_a_configuration_starts_its_processes(config: Path, tmp_path: Path) -> None:
    script = tmp_path / "given.py"
    script.write_text(GIVEN)
    (tmp_path / "out").mkdir()
    strategy = strategy_of(config)
    count = 1 if strategy == "single" else 2
    arguments = ["launch", "--config_file", config, "--num_processes", count, "--main_process_port", 0, script]
    (ended,) = in_world(1, accelerate_rank, [*map(str, arguments), str(tmp_path / "out")], launched=False)
    assert ended.status == 0, ended.err
    check_given(tmp_path / "out", strategy, count, offload=config.stem.endswith("_offload"))


def check_given(folder: Path, strategy: str, count: int, *, offload: bool = False) -> None:
    """Each process was told its rank and the strategy, in the words of Accelerate."""
    given = [json.loads((folder / str(rank)).read_text()) for rank in range(count)]
    assert len([*folder.iterdir()]) == count
    for rank, variables in enumerate(given):
        if count > 1:
            assert (variables["RANK"], variables["WORLD_SIZE"]) == (str(rank), str(count))
        sharded = [name for name in variables if name.startswith(("ACCELERATE_USE_", "FSDP_"))]
        if strategy in ("single", "ddp"):
            assert [name for name in sharded if name != "ACCELERATE_USE_CPU"] == []
            continue
        # what launch/train.py makes of it when the files are out of reach
        asked = resolve_strategy(count, strategy_wishes(read_configuration([], variables)))
        assert asked == StrategySpec(strategy, offload, offload and strategy == "zero3")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3", "fsdp2"])
def test_a_configuration_joins_two_machines(tmp_path: Path, strategy: str) -> None:
    script = tmp_path / "given.py"
    script.write_text(GIVEN)
    (tmp_path / "out").mkdir()
    common = ["launch", "--config_file", CONFIGS / f"{strategy}_multinode.yaml", "--num_machines", 2]
    common += ["--num_processes", 4, "--main_process_ip", "127.0.0.1", "--main_process_port", free_port()]
    machines = [
        running_world(
            1,
            accelerate_rank,
            [*map(str, common), "--machine_rank", str(rank), str(script), str(tmp_path / "out")],
            launched=False,
        )
        for rank in (0, 1)
    ]
    with machines[0] as first, machines[1] as second:
        for machine in (second, first):
            (ended,) = machine.results()
            assert ended.status == 0, ended.err
    check_given(tmp_path / "out", strategy, 4)


# --------------------------------------------------------------------------------------------------------------------
# Runs


def work_rank(variables: dict[str, str], arguments: dict[str, Any]) -> Ended:
    """Train as launch/train.py does, under a launcher that set these variables."""
    os.environ.update(variables)
    return captured(lambda: work(**arguments))


def score_rank(variables: dict[str, str], run: str) -> Ended:
    """Score as launch/evaluate.py does, under a launcher that set these variables."""
    os.environ.update(variables)
    return captured(lambda: work_evaluation(run, "test"))


def test_settings_of_a_launcher_that_differ_from_the_recipe_stop_the_run(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    variables = {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}
    arguments = {"target": str(recipe), "run_dir": str(tmp_path / "run")}
    first, second = in_world(2, work_rank, variables, arguments)
    assert (first.status, second.status, second.err) == (1, 1, "")
    lines = [
        f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS is 4; the recipe's batch.global ({recipe}:8) makes it 1",
        f"ACCELERATE_MIXED_PRECISION is bf16; the recipe's train.precision ({recipe}:9) makes it no",
    ]
    assert [line for line in first.err.splitlines() if line.startswith("  - ")] == [
        f"  - environment: {line}" for line in lines
    ]
    assert not (tmp_path / "run").exists()


def test_settings_of_a_launcher_that_are_the_recipes_change_nothing(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, TINY.replace("global: 12", "global: 12, micro: 3"))
    train(2, recipe, tmp_path / "wanted")
    variables = {
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2",
        "ACCELERATE_GRADIENT_CLIPPING": "0.5",
        "ACCELERATE_MIXED_PRECISION": "no",
        "ACCELERATE_DYNAMO_BACKEND": "NO",
    }
    ended = in_world(2, work_rank, variables, {"target": str(recipe), "run_dir": str(tmp_path / "run")})
    assert [rank.status for rank in ended] == [0, 0], ended[0].err
    assert losses(tmp_path / "run") == losses(tmp_path / "wanted")


def test_a_launcher_and_an_option_that_differ_stop_the_run(tmp_path: Path) -> None:
    variables = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    arguments = {"target": str(write_recipe(tmp_path)), "run_dir": str(tmp_path / "run"), "strategy": "zero2"}
    first, second = in_world(2, work_rank, variables, arguments)
    assert (first.status, second.status, second.err) == (1, 1, "")
    assert "zero2      --strategy\n" in first.err
    assert "fsdp2      environment: ACCELERATE_USE_FSDP\n" in first.err
    assert not (tmp_path / "run").exists()


def test_several_processes_are_not_single(tmp_path: Path) -> None:
    ended = cli(
        "train", write_recipe(tmp_path), "--run-dir", tmp_path / "run", "--processes", 2, "--strategy", "single"
    )
    assert ended.status == 1
    assert "the strategy single is one process, found 2" in ended.err
    assert not (tmp_path / "run").exists()


def test_ddp_in_one_process_is_reported_to_be_single(tmp_path: Path) -> None:
    run = tmp_path / "run"
    ended = cli("train", write_recipe(tmp_path), "--run-dir", run, "--processes", 1, "--strategy", "ddp")
    assert ended.status == 0, ended.err
    assert "--strategy ddp in one process is single" in ended.out
    assert (RunDir(run).launch().strategy, RunDir(run).launch().offload) == ("single", "none")


def test_what_cannot_be_offloaded_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    ended = cli("train", write_recipe(tmp_path), "--run-dir", tmp_path / "run", "--processes", 2, "--offload", "all")
    assert ended.status == 1
    assert "ddp cannot offload 'all', expected none; zero3 can" in ended.err
    assert not (tmp_path / "run").exists()


def recorded(folder: Path, processes: int, strategy: str, offload: str = "none") -> RunDir:
    run = RunDir(folder / "run")
    run.create("", Launch.describe(processes, strategy, offload))
    return run


def test_a_run_that_is_named_resolves_to_its_recorded_request(tmp_path: Path) -> None:
    run = recorded(tmp_path, 2, "zero2", "optimizer")
    fsdp2 = {
        "distributed_type": SourcedValue("FSDP", "a.yaml: distributed_type"),
        "fsdp_version": SourcedValue(2, "a.yaml"),
    }
    assert asked_for(run, 2, "auto", None, {}, resumes=True) == StrategySpec("zero2", True)
    assert asked_for(run, 2, "fsdp2", None, {}, resumes=True) == StrategySpec("fsdp2")
    assert asked_for(run, 2, "auto", "none", {}, resumes=True) == StrategySpec("zero2")
    with pytest.raises(UserError, match=r"zero2 .*launch\.json\n  fsdp2 .*a\.yaml: distributed_type"):
        asked_for(run, 2, "auto", None, fsdp2, resumes=True)
    # by its recipe: then the record is only of an earlier start
    assert asked_for(run, 2, "auto", None, {}) == StrategySpec("zero2", True)
    assert asked_for(run, 2, "auto", None, fsdp2) == StrategySpec("fsdp2")


def test_the_replicas_of_a_run_that_is_named(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.create("", Launch.describe(4, "fsdp2", replicate=2))
    for resumes in (True, False):
        assert asked_for(run, 4, "auto", None, {}, resumes=resumes) == StrategySpec("fsdp2", replicate=2)
        assert asked_for(run, 4, "auto", None, {}, replicate="1", resumes=resumes) == StrategySpec("fsdp2")
        assert asked_for(run, 4, "ddp", None, {}, resumes=resumes) == StrategySpec("ddp")
    with pytest.raises(UserError, match=r"--replicate 2 is for fsdp2, found ddp, which keeps everything on each"):
        asked_for(run, 4, "ddp", None, {}, replicate="2")
    content = json.loads(run.launch_path.read_text())
    del content["replicate"]  # as it was written before there were replicas
    run.launch_path.write_text(json.dumps(content))
    assert asked_for(run, 4, "auto", None, {}, resumes=True) == StrategySpec("fsdp2")


def test_a_run_of_one_process_resumes_in_several(tmp_path: Path) -> None:
    run = recorded(tmp_path, 1, "single")
    assert asked_for(run, 2, "auto", None, {}, resumes=True) == StrategySpec("ddp")
    assert asked_for(run, 2, "zero3", "all", {}) == StrategySpec("zero3", True, True)


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = 2
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0 if os.environ["CUDA_VISIBLE_DEVICES"] == "" else gpus)
    world = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "0,1"}
    for name, value in (world | {"MASTER_ADDR": "n1", "MASTER_PORT": "29500"}).items():
        monkeypatch.setenv(name, value)
    assert join_launcher(4).processes == 4, "two machines of two"
    gpus = 1
    with pytest.raises(
        UserError, match="there are to be 2 processes on this machine, which has 1 GPU; nothing was written"
    ):
        join_launcher(None)
    # a configuration for the CPU is meant, also where there are GPUs
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert join_launcher(None).processes == 4
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_evaluation_keeps_the_precision_of_the_recipe_and_needs_no_strategy(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(1, write_recipe(tmp_path), run)
    cases = {
        "ACCELERATE_MIXED_PRECISION is bf16; the recipe's train.precision": {"ACCELERATE_MIXED_PRECISION": "bf16"},
        "asks for zero3, and an evaluation has the whole model on each process": {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
        },
    }
    for message, variables in cases.items():
        first, second = in_world(2, score_rank, variables, str(run))
        assert (first.status, second.status, second.err) == (1, 1, "")
        assert message in first.err
    first, _ = in_world(2, score_rank, {"ACCELERATE_MIXED_PRECISION": "no"}, str(run))
    assert first.status == 0, first.err
    assert "accuracy" in first.out


SHARDED = """
name: tiny
task: classification
data: {name: digits, split: [0.8, 0.2]}
model: {name: mlp, hidden: [16]}
optim: {name: adamw, lr: 1.0e-2, clip_norm: 0.5}
batch: {global: 12, micro: 3}
train: {steps: 4, precision: fp32}
eval: {every: null}
log: {every: 1 steps}
"""


@pytest.mark.slow
@pytest.mark.parametrize("config", [pytest.param("zero3_offload", marks=pytest.mark.more), "fsdp2"])
def test_accelerate_starts_a_run_sharded_as_its_file_sets(tmp_path: Path, config: str) -> None:
    recipe = write_recipe(tmp_path, SHARDED)
    file = CONFIGS / f"{config}.yaml"
    command = ["accelerate", "launch", "--config_file", file, "--num_processes", 2, "--main_process_port", 0, SCRIPT]
    done = typed(*command, recipe, "--run-dir", "run", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    run = RunDir(tmp_path / "run")
    strategy = strategy_of(file)
    offload = "all" if config == "zero3_offload" else "none"
    assert (run.launch().strategy, run.launch().offload) == (strategy, offload)
    effect = run.effect()
    assert effect is not None
    assert effect["strategy"] == strategy
    assert effect["engine"] == ("FSDPModule" if strategy == "fsdp2" else "DeepSpeedEngine")
    assert effect.get("stage") == (None if strategy == "fsdp2" else int(strategy[-1]))
    train(2, recipe, tmp_path / "ddp")
    assert losses(run.path) == pytest.approx(losses(tmp_path / "ddp"), rel=1e-5)


@pytest.mark.slow
def test_distrain_train_starts_resumes_and_shows_a_sharded_run(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, SHARDED)
    first = [recipe, "--run-dir", tmp_path / "run", "--processes", 2, "--strategy", "zero3", "--offload", "optimizer"]
    ended = cli("train", *first)
    assert ended.status == 0, ended.err
    run = RunDir(tmp_path / "run")
    launch = run.launch()
    assert (launch.processes, launch.strategy, launch.offload) == (2, "zero3", "optimizer")
    assert launch.argv[1:] == ["train", *map(str, first)], "as typed, not as passed on"
    # nothing said: as it was started before, in one process
    more = ["train", recipe, "--run-dir", run.path, "--update", "--processes", 1]
    ended = cli(*more, "train.steps=6")
    assert ended.status == 0, ended.err
    assert "written by 2 x zero3; resumes with 1 x zero3" in ended.out
    assert run.launch().offload == "optimizer"
    ended = cli(*more, "train.steps=8", "--strategy", "fsdp2")
    assert ended.status == 0, ended.err
    assert "written by 1 x zero3; resumes with 1 x fsdp2" in ended.out
    assert (run.launch().strategy, run.launch().offload) == ("fsdp2", "none")
    assert len(losses(run.path)) == 8
    shown = cli("train", run.path)
    assert "took effect: strategy fsdp2, engine FSDPModule," in shown.out


@pytest.mark.slow
@pytest.mark.more
def test_settings_are_named_by_the_file_they_are_in(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    # a type that starts one process whatever number is written
    settings = {"distributed_type": "MULTI_CPU", "num_processes": 2, "use_cpu": True, "mixed_precision": "bf16"}
    config = written(tmp_path, settings)
    command = ["accelerate", "launch", "--config_file", config.name, "--main_process_port", 0]
    done = typed(*command, SCRIPT, recipe, "--run-dir", "run", folder=tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("a.yaml: num_processes asks for 2 processes, found 1") == 1, done.stderr
    assert done.stderr.count("a.yaml: mixed_precision is bf16; the recipe's train.precision") == 1, done.stderr
    assert not (tmp_path / "run").exists()
