"""A launcher's own configuration, read where it was written.

`accelerate launch` takes settings from a YAML file, its command line and files of DeepSpeed, and hands them to its
processes in environment variables, mixed with defaults that nobody wrote.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from distrain.config import UserError
from distrain.system.bounded_json import parse_json, read_bounded
from distrain.system.environment import SETTINGS


@dataclass(frozen=True)
class SourcedValue:
    """A value that somebody wrote."""

    value: Any
    place: str
    """Where: "FILE: section.key", an option of the launcher, an environment variable."""


Configuration = Mapping[str, SourcedValue]
"""Settings by the name that `accelerate launch` has for them; those of a DeepSpeed file as "deepspeed.section.key"."""


def read_configuration(argv: Sequence[str], variables: Mapping[str, str]) -> dict[str, SourcedValue]:
    """Return what was written for the launcher that started this process.

    `argv` is its command line, where it is known. Without `accelerate launch` there, the environment has to do.
    Raises UserError for a file that cannot be read.
    """
    start = next((place for place, part in enumerate(argv[:4]) if "accelerate" in part), None)
    if start is None:
        found = _from_environment(variables, filled=False)
    else:
        arguments = list(argv[start + 1 :])
        found = _from_accelerate(arguments[1:] if arguments[:1] == ["launch"] else arguments)
        found = _from_environment(variables, filled=True) | found
    if (file := found.get("deepspeed_config_file")) and plain(file.value) != "none":
        found |= _from_deepspeed(file)
    return found


_SECTIONS = {
    "deepspeed_config": ("", "DEEPSPEED"),
    "fsdp_config": ("fsdp_", "FSDP"),
    "dynamo_config": ("dynamo_", None),
    "fp8_config": ("fp8_", None),
    "parallelism_config": ("parallelism_config_", None),
}
"""Sections of accelerate's file: what its keys begin with on the command line, and the type that has them."""

_TYPE_FLAGS = {
    "use_deepspeed": "DEEPSPEED",
    "use_fsdp": "FSDP",
    "use_megatron_lm": "MEGATRON_LM",
    "tpu": "XLA",
    "multi_gpu": "MULTI_GPU",
}


def _from_accelerate(arguments: list[str]) -> dict[str, SourcedValue]:
    from accelerate.commands.config.config_args import default_config_file
    from accelerate.commands.launch import launch_command_parser

    options = launch_command_parser().parse_args(arguments)
    found: dict[str, SourcedValue] = {}
    file = options.config_file
    if file is None and not options.cpu and Path(default_config_file).is_file():
        file = default_config_file  # which `accelerate config` wrote, maybe long ago
    if file is not None:
        found = _from_yaml(str(file))
    for name in sorted(getattr(options, "nondefault", set()) - {"training_script", "training_script_args"}):
        found[name] = SourcedValue(getattr(options, name), f"accelerate launch --{name}")
    flag = next((flag for flag in _TYPE_FLAGS if flag in found and getattr(options, flag)), None)
    if options.cpu:  # goes before all others
        found["distributed_type"] = SourcedValue("NO", "accelerate launch --cpu")
    elif flag is not None:
        found["distributed_type"] = SourcedValue(_TYPE_FLAGS[flag], f"accelerate launch --{flag}")
    kind = found["distributed_type"].value if "distributed_type" in found else None
    unused = {key for key, stated in found.items() if isinstance(stated, _OfType) and stated.kind != kind}
    return {key: stated for key, stated in found.items() if key not in unused}


@dataclass(frozen=True)
class _OfType(SourcedValue):
    kind: str
    """The distributed type without which accelerate passes the value over."""


def _from_yaml(file: str) -> dict[str, SourcedValue]:
    content = _mapping(file, yaml.safe_load)
    found: dict[str, SourcedValue] = {}
    for key, value in content.items():
        if key in _SECTIONS and isinstance(value, dict):
            prefix, kind = _SECTIONS[key]
            for name, inner in value.items():
                option = name if name.startswith(prefix) else prefix + name
                place = f"{file}: {key}.{name}"
                found[option] = SourcedValue(inner, place) if kind is None else _OfType(inner, place, kind)
        elif key == "fp16":  # of old files
            found["mixed_precision"] = SourcedValue("fp16" if value else "no", f"{file}: fp16")
        elif value is not None:
            found[key] = SourcedValue(value, f"{file}: {key}")
    return found


_VARIABLES = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "gradient_accumulation_steps",
    "ACCELERATE_GRADIENT_CLIPPING": "gradient_clipping",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "zero_stage",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "offload_optimizer_device",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "offload_param_device",
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": "deepspeed_config_file",
    "ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES": "deepspeed_moe_layer_cls_names",
}
_FILLED_VARIABLES = {
    "ACCELERATE_MIXED_PRECISION": "mixed_precision",
    "ACCELERATE_DYNAMO_BACKEND": "dynamo_backend",
    "ACCELERATE_USE_CPU": "use_cpu",
    "FSDP_VERSION": "fsdp_version",
    "FSDP_OFFLOAD_PARAMS": "fsdp_offload_params",
    "FSDP_ACTIVATION_CHECKPOINTING": "fsdp_activation_checkpointing",
    "FSDP_RESHARD_AFTER_FORWARD": "fsdp_reshard_after_forward",
}
"""What `accelerate launch` sets in any case: only what is not its default was written by somebody."""
_SHARDING_VARIABLES = {
    "FSDP_SHARDING_STRATEGY": ("fsdp_sharding_strategy", "full_shard"),
    "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": ("parallelism_config_dp_replicate_size", "1"),
    "PARALLELISM_CONFIG_DP_SHARD_SIZE": ("parallelism_config_dp_shard_size", "1"),
}
"""The same, with what the default is of each."""

DEFAULTS = ("no", "false", "none", "")
"""How it is spelled that a setting is off."""


def _from_environment(variables: Mapping[str, str], *, filled: bool) -> dict[str, SourcedValue]:
    """Read the environment; `filled`: some of it only repeats what is known better from where it was written."""
    found = {
        name: SourcedValue(variables[key], f"environment: {key}")
        for key, name in _VARIABLES.items()
        if key in variables
    }
    if filled:
        return found
    for kind in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):
        if plain(variables.get(key := f"ACCELERATE_USE_{kind}")) == "true":
            found["distributed_type"] = SourcedValue(kind, f"environment: {key}")
    if plain(variables.get(key := "ACCELERATE_USE_PARALLELISM_CONFIG")) == "true":
        found["use_parallelism_config"] = SourcedValue(True, f"environment: {key}")
    for key, name in _FILLED_VARIABLES.items():
        if plain(variables.get(key, "")) not in DEFAULTS:
            found[name] = SourcedValue(variables[key], f"environment: {key}")
    for key, (name, default) in _SHARDING_VARIABLES.items():
        if plain(variables.get(key, "")) not in (*DEFAULTS, default):
            found[name] = SourcedValue(variables[key], f"environment: {key}")
    return found


def _from_deepspeed(file: SourcedValue) -> dict[str, SourcedValue]:
    def leaves(value: Any, name: str) -> Iterator[tuple[str, SourcedValue]]:
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from leaves(inner, f"{name}.{key}" if name else str(key))
        elif value is not None and plain(value) != "auto":
            yield f"deepspeed.{name}", SourcedValue(value, f"{file.value}: {name}")

    return dict(leaves(_mapping(str(file.value), parse_json), ""))


def _not_finite(value: Any, place: str = "") -> str | None:
    """Return where in a tree of mappings and lists a number is infinite or NaN; None where none is."""
    if isinstance(value, dict | list):
        inner = value.items() if isinstance(value, dict) else enumerate(value)
        found = (_not_finite(each, f"{place}.{key}" if place else str(key)) for key, each in inner)
        return next((each for each in found if each is not None), None)
    return place if isinstance(value, float) and not math.isfinite(value) else None


def _mapping(file: str, load: Any) -> dict[str, Any]:
    try:
        content = load(read_bounded(Path(file)))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"the launcher's configuration {file} cannot be read: {error}") from error
    if place := _not_finite(content):
        raise UserError(f"the launcher's configuration {file} has a number at {place} that is not finite; mend it")
    if not isinstance(content, dict):
        raise UserError(f"the launcher's configuration {file} holds {type(content).__name__}, expected keys and values")
    return {str(key): value for key, value in content.items()}


def plain(value: Any) -> str:
    """Return a setting as it is compared: files, options and environments spell the same in several ways."""
    return str(value).strip().lower()


def take_over(variables: MutableMapping[str, str]) -> None:
    """Take the launcher's settings out of the environment, once they were read: Accelerate would act on them again."""
    for name in [*variables]:
        if name.startswith(SETTINGS) and name != "ACCELERATE_USE_CPU":
            del variables[name]
