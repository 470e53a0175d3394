"""A safetensors file, or a folder of them with an index, as Hugging Face lays a model out."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from distrain.checkpoints.export.sources import Source, whole
from distrain.checkpoints.foreign.common import basename, plain_names, read_json
from distrain.checkpoints.foreign.headers import Header, read_header
from distrain.checkpoints.format import CheckpointError, TensorSpec
from distrain.checkpoints.reading import open_plain
from distrain.config import UserError
from distrain.config.registry import formats

INDEX = "model.safetensors.index.json"


def is_safetensors(path: Path) -> bool:
    """Whether this is a safetensors file, an index of such, or a folder with one of them."""
    if path.is_dir():
        return sum(entry.name.endswith(".safetensors") for entry in path.iterdir()) == 1
    if path.name.endswith(".index.json"):
        return all(name.endswith(".safetensors") for name in weight_map(path))
    descriptor = open_plain(path)
    start = os.pread(descriptor, 9, 0)
    os.close(descriptor)
    return start[8:] == b"{" and not start.startswith(b"PK\x03\x04")


@formats.register(
    "safetensors",
    about="a safetensors file, or a folder of such with an index",
    order=3,
    found=is_safetensors,
    folder=False,
    pickles=False,
)
def open_safetensors(source: Source, path: Path, *, trust: bool) -> None:
    """Add a file, or what an index or a folder names, with its config.json; nothing in it is run."""
    if path.is_file() and not path.name.endswith(".index.json"):
        open_file(source, path)
        return
    folder, index = (path, path / INDEX) if path.is_dir() else (path.parent, path)
    if index.exists():
        open_indexed(source, index)
    else:
        files = sorted(folder.glob("*.safetensors"))
        if len(files) != 1:
            raise UserError(f"{path}: {len(files)} safetensors files and no {index.name}; name one of them")
        open_file(source, files[0])
    source.config = read_config(folder)


def open_file(source: Source, path: Path) -> None:
    """Add the tensors of one file."""
    listing, metadata = _read(source, path)
    _add(source, {path: listing})
    for alias, name in metadata.items():  # where safetensors' own save_model puts the further names of tied tensors
        if name in listing and alias not in listing and alias != "format":
            plain = plain_names(source, [alias, name])
            source.aliases[f"model/{plain[alias]}"] = f"model/{plain[name]}"


def open_indexed(source: Source, index: Path) -> None:
    """Add the tensors of the files that an index names; each must hold exactly what the index says."""
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
    """Return {file: tensors in it} of an index of Hugging Face's; raises UserError where it names odd files."""
    content = read_json(index)
    mapping = content.get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise UserError(f"{index}: it has no weight_map, and is not the index of a model in several files")
    shards: dict[str, set[str]] = {}
    for name, file in mapping.items():
        shards.setdefault(basename(file, index, "a file in weight_map"), set()).add(name)
    return shards


def read_config(folder: Path) -> str | None:
    """Return the text of the config.json of a model of transformers; None where there is none."""
    path = folder / "config.json"
    if not path.exists():
        return None
    content = read_json(path)
    return json.dumps(content, indent=2) if "model_type" in content or "architectures" in content else None


def _read(source: Source, path: Path) -> tuple[Header, dict[str, Any]]:
    file = source.add_file(path)
    descriptor = source.open(file)
    try:
        return read_header(descriptor, source.files[file][1])
    except (UserError, CheckpointError) as error:
        raise UserError(f"{path}: {error}") from error
    finally:
        os.close(descriptor)


def _add(source: Source, listings: dict[Path, Header]) -> None:
    names = [name for listing in listings.values() for name in listing]
    plain = plain_names(source, names)
    for path, listing in listings.items():
        file = source.add_file(path)
        for name, (dtype, shape, offset, _) in listing.items():
            full = f"model/{plain[name]}"
            source.tensors[full] = whole(TensorSpec(shape, dtype, "parameter"), dtype, file, offset)
