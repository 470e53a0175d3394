"""A safetensors file, or a folder of them with an index, as Hugging Face lays a model out."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from distrain.checkpoints.files import open_descriptor
from distrain.checkpoints.foreign.common import add_rest, basename, canonical_names, read_json
from distrain.checkpoints.format import CheckpointError, TensorSpec
from distrain.checkpoints.headers import Header, read_header
from distrain.checkpoints.sources import Source, in_one_file
from distrain.config.registry import formats
from distrain.system.errors import UserError

INDEX = "model.safetensors.index.json"
_SHARDS = "shard-*.safetensors"
_PARTS = "DCP_SHARDING_INFO"
"""Where torch's HuggingFaceStorageWriter puts the offsets of what each rank saved; the whole shapes are nowhere."""


def is_safetensors(path: Path) -> bool:
    """Whether this is a safetensors file, an index of several, or a folder with one."""
    if path.is_dir():
        return len([*path.glob("*.safetensors")]) == 1 or any(path.glob(_SHARDS))
    if path.name.endswith(".index.json"):
        return all(name.endswith(".safetensors") for name in weight_map(path))
    descriptor = open_descriptor(path)
    start = os.pread(descriptor, 9, 0)
    os.close(descriptor)
    return start[8:] == b"{" and not start.startswith(b"PK\x03\x04")


@formats.register(
    "safetensors",
    about="a safetensors file, or a folder of them with an index",
    order=3,
    found=is_safetensors,
    folder=False,
    pickles=False,
)
def open_safetensors(source: Source, path: Path, *, trust: bool) -> None:
    """Add a file, or the files of an index or a folder, with its config.json; runs no code."""
    if path.is_file() and not path.name.endswith(".index.json"):
        open_file(source, path)
        return
    folder, index = (path, path / INDEX) if path.is_dir() else (path.parent, path)
    if index.exists():
        open_indexed(source, index)
        used = [*weight_map(index)]
    else:
        files = sorted(folder.glob("*.safetensors"))
        if len(files) != 1:
            for file in files:
                _read(source, file)
            raise UserError(f"{path}: {len(files)} safetensors files and no {index.name}; name one of them")
        open_file(source, files[0])
        used = [files[0].name]
    source.config = read_config(folder)
    if path.is_dir():
        add_rest(source, folder, used)


def open_file(source: Source, path: Path) -> None:
    """Add the tensors of one file."""
    listing, metadata = _read(source, path)
    _add(source, {path: listing})
    for alias, name in metadata.items():  # safetensors' save_model puts the other names of tied tensors there
        if name in listing and alias not in listing and alias != "format":
            canonical = canonical_names(source, [alias, name])
            source.aliases[f"model/{canonical[alias]}"] = f"model/{canonical[name]}"


def open_indexed(source: Source, index: Path) -> None:
    """Add the tensors of an index's files, each of which must hold exactly what the index lists."""
    shards = weight_map(index)
    listings = {}
    for name, expected in shards.items():
        path = index.parent / name
        listing, _ = _read(source, path)
        if set(listing) != expected:
            odd = sorted(set(listing) ^ expected)[0]
            raise UserError(f"{path}: its tensors are not those that {index.name} lists for it, such as {odd!r}")
        listings[path] = listing
    _add(source, listings)


def weight_map(index: Path) -> dict[str, set[str]]:
    """Return {file: tensors in it} of a Hugging Face index; raises UserError for names that may lead elsewhere."""
    content = read_json(index)
    mapping = content.get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise UserError(f"{index}: it has no weight_map, and is not the index of a model in several files")
    shards: dict[str, set[str]] = {}
    for name, file in mapping.items():
        shards.setdefault(basename(file, index, "a file in weight_map"), set()).add(name)
    return shards


def read_config(folder: Path) -> str | None:
    """Return the text of a transformers model's config.json; None if there is none."""
    path = folder / "config.json"
    if not path.exists():
        return None
    content = read_json(path)
    return json.dumps(content, indent=2) if "model_type" in content or "architectures" in content else None


def _read(source: Source, path: Path) -> tuple[Header, dict[str, Any]]:
    file = source.add_file(path)
    descriptor = source.open(file)
    try:
        listing, metadata = read_header(descriptor, source.files[file][1])
    except CheckpointError as error:
        raise UserError(f"{path}: {error}") from error
    finally:
        os.close(descriptor)
    parts = json.loads(metadata.get(_PARTS, "{}"))
    if parts and (len([*path.parent.glob(_SHARDS)]) > 1 or any(any(part["saved_offsets"]) for part in parts.values())):
        raise UserError(
            f"{path}: it holds the parts of tensors that one rank saved, and not how large the whole ones are; write "
            "them with enable_consolidation=True of torch's HuggingFaceStorageWriter, or join them by "
            "consolidate_safetensors_files of torch.distributed.checkpoint"
        )
    return listing, metadata


def _add(source: Source, listings: dict[Path, Header]) -> None:
    canonical = canonical_names(source, [name for listing in listings.values() for name in listing])
    for path, listing in listings.items():
        file = source.add_file(path)
        for name, (dtype, shape, offset, _) in listing.items():
            full = f"model/{canonical[name]}"
            source.tensors[full] = in_one_file(TensorSpec(shape, dtype, "parameter"), dtype, file, offset)
