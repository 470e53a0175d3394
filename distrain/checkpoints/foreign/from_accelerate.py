"""Folders of Accelerate's save_state, and of Hugging Face's save_pretrained, which lays a model out in the same way."""

from __future__ import annotations

import re
from pathlib import Path

from distrain.checkpoints.foreign import from_distributed, from_safetensors, from_torch
from distrain.checkpoints.foreign.common import TorchFile, add_rest
from distrain.checkpoints.foreign.optimizers import add_optimizer
from distrain.checkpoints.sources import Source
from distrain.config.registry import formats
from distrain.system.errors import UserError, some

_FSDP = "pytorch_model_fsdp"
_SAFETENSORS = "model.safetensors"
_BIN = "pytorch_model.bin"
_OPTIMIZER = re.compile(r"optimizer(_\d+)?\.(?:bin|pt)")
_FURTHER_MODEL = re.compile(r"(?:model|pytorch_model)_\d+\.(?:safetensors|bin)")


def is_folder(folder: Path) -> bool:
    """Whether it holds a model under a name that Accelerate or Hugging Face's libraries use."""
    names = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    fixed = {f"{_FSDP}_0", f"{_FSDP}.bin", _SAFETENSORS, from_safetensors.INDEX, _BIN, from_torch.INDEX}
    return bool(names & fixed) or any(name.startswith(f"{_FSDP}_0_rank") for name in names)


@formats.register(
    "accelerate",
    about="a folder of Accelerate's save_state, or of Hugging Face's save_pretrained",
    order=2,
    found=is_folder,
)
def open_folder(source: Source, folder: Path, *, trust: bool) -> None:
    """Add the model of a folder, and its optimizer if there is one."""
    names = {entry.name for entry in folder.iterdir()}
    used = _open_model(source, folder, names, trust)
    optimizers = sorted((n for n in names if _OPTIMIZER.fullmatch(n)), key=lambda name: (len(name), name))
    if not source.wants_optimizer:
        used |= {"optimizer_0", *optimizers} & names
    elif "optimizer_0" in names:
        from_distributed.open_folder(source, folder / "optimizer_0")
        used.add("optimizer_0")
    for name in optimizers if source.wants_optimizer else ():
        file = TorchFile(source, folder / name, trust=trust)
        add_optimizer(source, file, file.root, name)
        used.add(name)
    if further := sorted(name for name in names if _FURTHER_MODEL.fullmatch(name)):
        source.skipped.append(f"further models: {some(further)}")
        # their numbers are those of the calls that prepared them: names and shapes may fit another model's
        source.optimizer_problem = source.optimizer_problem or (
            f"there are several models, such as {further[0]}, and nothing tells which of them an optimizer trained"
        )
        used |= set(further)
    source.config = from_safetensors.read_config(folder)
    add_rest(source, folder, used)


def _open_model(source: Source, folder: Path, names: set[str], trust: bool) -> set[str]:
    """Add the model; return the names of its files."""
    if several := sorted(name for name in names if re.fullmatch(rf"{_FSDP}_[1-9]\d*(\.bin)?", name)):
        raise UserError(f"{folder}: it holds several models, such as {several[0]}; import one by its own path")
    if f"{_FSDP}_0" in names:
        source.description = "Accelerate FSDP, sharded"
        from_distributed.open_folder(source, folder / f"{_FSDP}_0")
        return {f"{_FSDP}_0"}
    if f"{_FSDP}.bin" in names:
        source.description = "Accelerate FSDP, full"
        from_torch.open_file(source, folder / f"{_FSDP}.bin", trust=trust)
        return {f"{_FSDP}.bin"}
    if ranks := sorted(name for name in names if name.startswith(f"{_FSDP}_0_rank")):
        raise UserError(
            f"{folder}: {ranks[0]} holds one rank's shards, without their places in the tensors; save with "
            "state_dict_type SHARDED_STATE_DICT (use_dcp) or FULL_STATE_DICT"
        )
    for index in (from_safetensors.INDEX, from_torch.INDEX):
        if index in names:
            source.description = "Hugging Face, in several files"
            if index == from_safetensors.INDEX:
                from_safetensors.open_indexed(source, folder / index)
            else:
                from_torch.open_indexed(source, folder / index, trust=trust)
            return {index, *from_safetensors.weight_map(folder / index)}
    source.description = "Hugging Face"
    if _SAFETENSORS in names:
        from_safetensors.open_file(source, folder / _SAFETENSORS)
        return {_SAFETENSORS, _BIN}
    from_torch.open_file(source, folder / _BIN, trust=trust)
    return {_BIN}
