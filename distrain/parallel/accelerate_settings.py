"""What a launcher's configuration asks for, beside the recipe.

Settings of the strategy become a `StrategyHint`. Those which the recipe owns are compared with it. The rest is refused,
or named as having no part.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from distrain.config import CompileSection, OptimSection, Recipe, UserError
from distrain.datasets.batch_sizes import batch_shape
from distrain.parallel.accelerate_config import DEFAULTS, Configuration, SourcedValue, plain
from distrain.parallel.strategy_spec import StrategyHint

# --------------------------------------------------------------------------------------------------------------------
# The strategy

_NO = ("no", "false")  # without quotes NO is a YAML false
_STAGE_HINT = "take 1, 2 or 3; to keep the whole state on each process, take accelerate_configs/ddp.yaml"


def strategy_wishes(configuration: Configuration, world_size: int | None = None) -> list[StrategyHint]:
    """Return what the launcher's configuration asks for, in a world of that size where one is named.

    Raises UserError for what there is not here.
    """
    if problems := refused(configuration):
        raise UserError(
            "the launcher's configuration asks for what distrain does not do; nothing was written.\n  - "
            + "\n  - ".join(problems)
        )
    kind = configuration.get("distributed_type")
    if kind is None:
        return []
    name = plain(kind.value)
    if name in _NO:
        return [StrategyHint(kind.place, "single")]
    if name.startswith("multi_"):
        return [StrategyHint(kind.place, "ddp")]
    if name == "fsdp":
        offload = configuration.get("fsdp_offload_params")
        wishes = [StrategyHint(kind.place, "fsdp2")]
        if offload is not None:
            wishes.append(StrategyHint(offload.place, None, "all" if _true(offload.value) else "none"))
        return [*wishes, *_replicas(configuration, world_size)]
    wishes = [
        StrategyHint(stage.place, f"zero{int(stage.value)}")
        for key in ("zero_stage", "deepspeed.zero_optimization.stage")
        if (stage := configuration.get(key)) is not None
    ]
    for optimizer, parameters in _OFFLOAD_KEYS:
        if said := [configuration[key] for key in (optimizer, parameters) if key in configuration]:
            on_cpu = [key for key in (optimizer, parameters) if _device(configuration, key) == "cpu"]
            amount = "all" if parameters in on_cpu else "optimizer" if on_cpu else "none"
            wishes.append(StrategyHint(said[0].place, None, amount))
    if not any(wish.strategy for wish in wishes):
        wishes.insert(0, StrategyHint(f"{kind.place} (stage 2 where none is written)", "zero2"))
    return wishes


_HYBRID = ("hybrid_shard", "4")
_SIZES = ("parallelism_config_dp_replicate_size", "parallelism_config_dp_shard_size")


def _replicas(configuration: Configuration, world_size: int | None) -> Iterator[StrategyHint]:
    """Yield how many replicas FSDP is to have; raises UserError where that cannot be."""
    sharding = configuration.get("fsdp_sharding_strategy")
    if sharding is not None and plain(sharding.value) in _HYBRID:
        yield StrategyHint(sharding.place, None, None, "auto")
    replicas, shards = (configuration.get(key) for key in _SIZES)
    if replicas is not None:
        yield StrategyHint(replicas.place, None, None, str(replicas.value))
    # 1 is also what stands there where nobody shards
    if shards is not None and plain(shards.value) != "1" and world_size is not None:
        count = int(plain(shards.value)) if plain(shards.value).isdecimal() else 0
        if count < 1 or world_size % count:
            raise UserError(
                f"{shards.place} is {shards.value}, found {world_size} processes, expected a number that divides "
                "theirs; nothing was written. Take it out, or start others"
            )
        yield StrategyHint(shards.place, None, None, str(world_size // count))


_OFFLOAD_KEYS = (
    ("offload_optimizer_device", "offload_param_device"),
    ("deepspeed.zero_optimization.offload_optimizer.device", "deepspeed.zero_optimization.offload_param.device"),
)


def _device(configuration: Configuration, key: str) -> str:
    return plain(configuration[key].value) if key in configuration else "none"


def _true(value: Any) -> bool:
    return plain(value) in ("true", "1", "yes", "on")


def refused(configuration: Configuration) -> list[str]:
    """Return a line for each setting that asks for what distrain does not do, with what to do instead."""
    return [f"{stated.place}: {problem}" for stated, problem in _refused(configuration)]


def _refused(configuration: Configuration) -> Iterator[tuple[SourcedValue, str]]:
    kind = configuration.get("distributed_type")
    if kind is not None and not plain(kind.value).startswith((*_NO, "multi_", "deepspeed", "fsdp")):
        instead = "expected NO, MULTI_GPU, DEEPSPEED or FSDP; for models too large for ddp take zero3 or fsdp2"
        yield kind, f"found {kind.value}, {instead}"
    if kind is not None and plain(kind.value) == "fsdp":
        version = configuration.get("fsdp_version", SourcedValue(1, f"{kind.place}, without fsdp_version"))
        if plain(version.value) != "2":
            yield version, f"FSDP version {version.value} is superseded; set fsdp_version: 2"
    for key in ("zero_stage", "deepspeed.zero_optimization.stage"):
        if (stage := configuration.get(key)) is not None and plain(stage.value) not in ("1", "2", "3"):
            yield stage, f"found stage {stage.value}; {_STAGE_HINT}"
    for optimizer, parameters in _OFFLOAD_KEYS:
        for key in (optimizer, parameters):
            if (device := _device(configuration, key)) not in ("none", "cpu"):
                yield configuration[key], f"found {device}, expected none or cpu; files on an NVMe disk are not used"
        if (_device(configuration, optimizer), _device(configuration, parameters)) == ("none", "cpu"):
            yield configuration[parameters], f"parameters on the CPU go with the optimizer: set {optimizer}: cpu too"
    fsdp = kind is not None and plain(kind.value) == "fsdp"
    for key, stated in configuration.items():
        if key.startswith("deepspeed.") and not _known_to_deepspeed(key.removeprefix("deepspeed.")):
            yield stated, f"found {stated.value!r}, which has no counterpart in a recipe; take it out"
        elif fsdp and (key in _SIZES or (key == "use_parallelism_config" and configuration.keys() & _SIZES)):
            continue
        elif key in _NOT_HERE and plain(stated.value) not in _NOT_HERE[key][0]:
            yield stated, f"found {stated.value!r}; {_NOT_HERE[key][1]}"
        elif key.startswith("parallelism_config_") and str(stated.value).isdigit() and int(stated.value) > 1:
            yield stated, f"found {stated.value}; {_NOT_HERE['use_parallelism_config'][1]}"


_NOT_HERE: dict[str, tuple[tuple[str, ...], str]] = {
    "deepspeed_moe_layer_cls_names": (DEFAULTS, "layers of experts have no sharding of their own here; take it out"),
    "downcast_bf16": (DEFAULTS, "it is for TPUs; the recipe's train.precision says in which precision a model runs"),
    "fsdp_activation_checkpointing_offload": (DEFAULTS, "activations are computed again, not offloaded; take it out"),
    "fsdp_ignored_modules": (DEFAULTS, "every parameter is sharded; take it out"),
    "fsdp_reshard_after_forward": (
        ("true", "full_shard"),
        "weights are freed after each forward pass; take it out, or take zero2, which keeps them",
    ),
    "fsdp_sharding_strategy": (
        (*DEFAULTS, "full_shard", "1", "shard_grad_op", "2", "no_shard", "3", *_HYBRID),
        "weights are freed after each forward pass; take HYBRID_SHARD, or --replicate auto",
    ),
    "use_parallelism_config": (DEFAULTS, "tensor, context and sequence parallelism are not done; take zero3 or fsdp2"),
}
"""Settings that are not done: the values that say nothing, and what to do about the others."""

_ZERO_TUNING = (
    "overlap_comm",
    "contiguous_gradients",
    "reduce_scatter",
    "reduce_bucket_size",
    "allgather_partitions",
    "allgather_bucket_size",
    "sub_group_size",
    "round_robin_gradients",
    "ignore_unused_parameters",
    "use_multi_rank_bucket_allreduce",
    "offload_optimizer",
    "offload_param",
)
_DEEPSPEED_UNUSED = (
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "comms_logger",
    "flops_profiler",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "fp16",
    "bf16",
    "activation_checkpointing",
    "aio",
)


def _known_to_deepspeed(name: str) -> bool:
    section, _, rest = name.partition(".")
    if section == "zero_optimization":
        key = rest.partition(".")[0]
        return key == "stage" or key in _ZERO_TUNING or key.startswith("stage3_")
    return section in _DEEPSPEED_UNUSED or section in ("optimizer", "scheduler") or name in _BATCH_KEYS


_UNUSED = (
    "zero3_init_flag",
    "zero3_save_16bit_model",
    "fsdp_auto_wrap_policy",
    "fsdp_transformer_layer_cls_to_wrap",
    "fsdp_min_num_params",
    "fsdp_state_dict_type",
    "fsdp_cpu_ram_efficient_loading",
    "fsdp_sync_module_states",
    "fsdp_use_orig_params",
    "fsdp_backward_prefetch",
    "fsdp_forward_prefetch",
    "fsdp_sharding_strategy",
)


def unused(configuration: Configuration) -> list[str]:
    """Return where settings are written that have no part here: how Accelerate would build, wrap, save and tune."""
    return [
        stated.place
        for key, stated in configuration.items()
        if (key in _UNUSED and plain(stated.value) not in _HYBRID) or _is_tuning(key)
    ]


def _is_tuning(key: str) -> bool:
    name = key.removeprefix("deepspeed.")
    if name == key or name in _BATCH_KEYS or name.startswith(("optimizer.", "scheduler.")):
        return False
    return key not in (*_OFFLOAD_KEYS[1], "deepspeed.zero_optimization.stage") and not name.endswith("16.enabled")


# --------------------------------------------------------------------------------------------------------------------
# What the recipe owns

_ACCELERATE_PRECISION = {"fp32": "no", "tf32": "no", "fp64": "no"}
_BATCH_KEYS = {
    "train_batch_size": "batch.global",
    "train_micro_batch_size_per_gpu": "batch.micro",
    "gradient_accumulation_steps": "batch",
    "gradient_clipping": "optim.clip_norm",
    "communication_data_type": "",
}


def disagreements(
    explicit: Configuration,
    recipe: Recipe,
    world_size: int,
    *,
    auto: str = "fp32",
    origins: Mapping[str, str] | None = None,
) -> list[str]:
    """Return a line, with both values and both places, for each setting that differs from the recipe.

    `auto` is what `train.precision: auto` means on this machine. `origins`: where each of the recipe's values came
    from, by its dotted key. Raises UserError where the recipe's batch does not fit the world.
    """
    lines = []
    for stated, key, value in _owned(explicit, recipe, world_size, auto):
        if not _same(stated.value, value):
            origin = (origins or {}).get(key)
            where = f"{key} ({origin})" if origin is not None else key
            lines.append(f"{stated.place} is {_shown(stated.value)}; the recipe's {where} makes it {_shown(value)}")
    return lines


def _owned(
    explicit: Configuration, recipe: Recipe, world_size: int, auto: str
) -> Iterator[tuple[SourcedValue, str, Any]]:
    """Yield (what is stated, the recipe's key, what the recipe makes of it)."""
    micro, accumulation = batch_shape(recipe.batch, world_size)
    precision = auto if recipe.train.precision == "auto" else recipe.train.precision
    # several optimizers are no setting of a launcher's configuration
    optim, (clipping, *others) = recipe.optim, {each.clip_norm for each in recipe.optimizers.values()}
    one = optim if isinstance(optim, OptimSection) else None
    own: dict[str, tuple[str, Any]] = {
        "mixed_precision": ("train.precision", _ACCELERATE_PRECISION.get(precision, precision)),
        "dynamo_backend": ("train.compile", _compiler(recipe)),
        "fsdp_activation_checkpointing": (
            "train.activation_checkpointing",
            bool(recipe.train.activation_checkpointing),
        ),
        "gradient_accumulation_steps": ("batch.global", accumulation),
        "gradient_clipping": ("optim.clip_norm", None if others else clipping or 0.0),
        "deepspeed.train_batch_size": ("batch.global", recipe.batch.global_batch_size),
        "deepspeed.train_micro_batch_size_per_gpu": ("batch.micro", micro),
        "deepspeed.gradient_accumulation_steps": ("batch.global", accumulation),
        "deepspeed.gradient_clipping": ("optim.clip_norm", None if others else clipping or 0.0),
        "deepspeed.communication_data_type": ("train.precision", "fp64" if precision == "fp64" else "fp32"),
        "deepspeed.fp16.enabled": ("train.precision", precision == "fp16"),
        "deepspeed.bf16.enabled": ("train.precision", precision == "bf16"),
        "deepspeed.optimizer.type": ("optim.name", one and one.name),
        "deepspeed.optimizer.params.lr": ("optim.lr", one and one.lr),
        "deepspeed.optimizer.params.weight_decay": ("optim.weight_decay", one and one.weight_decay),
        "deepspeed.scheduler.type": ("schedule.name", recipe.schedule.name),
    }
    extra = one.args if one else {}
    for key, stated in explicit.items():
        if key in own:
            if plain(stated.value) != "auto":
                yield stated, *own[key]
        elif key.startswith("deepspeed.optimizer.params."):
            name = key.rpartition(".")[2]
            yield stated, f"optim.{name}", extra.get(name)
        elif key.startswith(("deepspeed.optimizer.", "deepspeed.scheduler.")):
            yield stated, "schedule" if "scheduler" in key else "optim", None


def _compiler(recipe: Recipe) -> str:
    """Return what Accelerate would call the compiler; for auto the one that is taken where any is."""
    if recipe.train.compile is False:
        return "no"
    return recipe.train.compile.backend if isinstance(recipe.train.compile, CompileSection) else "inductor"


def _same(stated: Any, value: Any) -> bool:
    if isinstance(value, bool):
        return _true(stated) == value
    if isinstance(value, int | float):
        try:
            return float(stated) == value
        except (TypeError, ValueError):
            return value == 0 and plain(stated) in DEFAULTS
    if isinstance(stated, list):
        return isinstance(value, list | tuple) and list(value) == stated
    return plain(stated) in DEFAULTS if value == "no" else plain(stated) == plain(value)


def _shown(value: Any) -> str:
    return "not there" if value is None else json.dumps(value) if isinstance(value, bool | list) else str(value)
