"""Folders of torch.distributed.checkpoint: `.metadata` and `.distcp` files, as FSDP2, torchtitan and others write them.

`.metadata` is a pickle that lists where the boxes of each tensor lie; each box is an archive of torch.save within a
`.distcp` file.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from distrain.checkpoints.files import open_descriptor
from distrain.checkpoints.foreign.archive import MAX_PICKLE
from distrain.checkpoints.foreign.common import AVERAGE_COUNT, TorchFile, basename, canonical_names
from distrain.checkpoints.foreign.from_torch import AVERAGE, MODEL, OPTIMIZER, STEP
from distrain.checkpoints.foreign.optimizers import UNNAMED, add_by_name, named_groups, names_of
from distrain.checkpoints.foreign.pickles import Made, PickleRefused, View, dtype_of, read_pickle
from distrain.checkpoints.format import CheckpointError, TensorSpec
from distrain.checkpoints.sources import Block, Source, Stored
from distrain.config.registry import formats
from distrain.system.errors import UserError, some

METADATA = ".metadata"
_KIND = "torch.distributed.checkpoint"
_TENSOR = f"{_KIND}.metadata.TensorStorageMetadata"
_BYTES = f"{_KIND}.metadata.BytesStorageMetadata"

_COUNTERS: tuple[tuple[str, ...], ...] = ((), ("train_state",))
"""Where a number of steps is: at the top, or as torchtitan keeps it."""
_Path = tuple[Any, ...]
"""Keys, texts and numbers, from the outermost mapping inwards."""


def is_folder(folder: Path) -> bool:
    """Whether it holds the listing of torch.distributed.checkpoint."""
    return folder.is_dir() and (folder / METADATA).exists()


@formats.register(
    "distributed", about="a folder of torch.distributed.checkpoint", order=0, found=is_folder, pickles=False
)
def open_distributed(source: Source, path: Path, *, trust: bool) -> None:
    """Add a folder that is imported by itself; runs no code."""
    source.description = "torch.distributed.checkpoint"
    open_folder(source, path)


def open_folder(source: Source, folder: Path) -> None:
    """Add model, optimizer, average and step of a folder, found by the keys that they were saved under."""
    listing = _Listing(source, folder)
    # parameters under no key, as torchtitan saves them: what lies in mappings beside them is no part of the model
    bare = listing.nested and any(listing.paths[name] == (name,) and "." in name for name in listing.tensors)
    if not bare:
        _unwrap(listing)
    top = {path[0] for path in listing.paths.values()}
    model = next((key for key in MODEL if key in top), None)
    bare = bare and model is None
    tensors: dict[str, dict[str, Stored]] = {"model": {}, "ema": {}}
    states: dict[tuple[int | str, str], Stored] = {}
    values: dict[tuple[int | str, str], Any] = {}
    groups: dict[int | str, dict[str, Any]] = {}
    left = []
    for name, path in listing.paths.items():
        first, rest = path[0], path[1:]
        in_model = first == model if model is not None else first not in {*AVERAGE, *OPTIMIZER, *STEP}
        in_model = in_model and not (bare and rest)
        if in_model and name in listing.tensors:
            tensors["model"][".".join(map(str, rest if model is not None else path))] = listing.stored(
                name, "parameter"
            )
        elif first in AVERAGE and rest == (AVERAGE_COUNT,):
            continue
        elif first in AVERAGE and rest and name in listing.tensors:
            tensors["ema"][".".join(map(str, rest))] = listing.stored(name, "ema")
        elif first in OPTIMIZER and (place := _parameter(rest)):
            if name in listing.tensors:
                states[place] = listing.stored(name, "optimizer")
            else:
                values[place] = listing.value(name)
        elif first in OPTIMIZER and (place := _parameter(rest, "param_groups")) and name not in listing.tensors:
            own = {"params": [place[0]]} if len(rest) == 1 else {}  # one flat name for each parameter
            groups.setdefault(place[0], own)[place[1]] = listing.value(name)
        elif path[-1] in STEP and path[:-1] in _COUNTERS and name in listing.tensors:
            source.tensors["step"] = listing.stored(name, "optimizer")
            value = source.number("step")
            del source.tensors["step"]
            if value is not None and 0 <= value < 10**18:
                source.steps[".".join(map(str, path))] = int(value)
        elif path[-1] in STEP and path[:-1] in _COUNTERS:
            value = listing.value(name)
            if type(value) is int and 0 <= value < 10**18:
                source.steps[".".join(map(str, path))] = value
        else:
            left.append(name)
    for prefix, found in tensors.items():
        canonical = canonical_names(source, found)
        source.tensors |= {f"{prefix}/{canonical[name]}": stored for name, stored in found.items()}
    if states or values or groups:
        _add_optimizer(source, folder, states, values, [groups[key] for key in sorted(groups, key=str)])
    if left:
        source.skipped.append(f"{len(left)} entries of {folder.name}: {some(left)}")
    if not tensors["model"] and not states:
        raise UserError(f"{folder}: found no tensors under {', '.join(MODEL)}; it holds {some(map(str, top), 8)}")


def _unwrap(listing: _Listing) -> None:
    """Take a model and what lies beside it out of the one mapping around both: PyTorch's `app`, Composer's `state`."""
    top = {path[0] for path in listing.paths.values()}
    outer = {path[0] for path in listing.paths.values() if len(path) > 2 and path[1] in MODEL} - {*AVERAGE, *OPTIMIZER}
    outer = top if top == {"app"} else outer
    if len(outer) == 1 and not top & {*MODEL}:
        listing.paths = {
            name: path[1:] if path[0] in outer and len(path) > 1 else path for name, path in listing.paths.items()
        }


def _add_optimizer(
    source: Source,
    folder: Path,
    states: dict[tuple[int | str, str], Stored],
    values: dict[tuple[int | str, str], Any],
    groups: list[dict[str, Any]],
) -> None:
    if any(isinstance(each, int) for group in groups for each in group.get("params") or ()):
        # the keys of a mapping become texts, and those of its lists stay
        states, values = ({(_number(n), key): v for (n, key), v in held.items()} for held in (states, values))
    names = names_of(dict.fromkeys(place[0] for place in [*states, *values]), groups)
    if names is None:
        source.skipped.append(f"{folder.name}: {UNNAMED}")
        return
    named_states, named_values = ({(names[n], key): v for (n, key), v in held.items()} for held in (states, values))
    add_by_name(source, named_states, named_values, named_groups(groups, names))


def _number(text: int | str) -> int | str:
    return int(text) if isinstance(text, str) and text.isdecimal() and len(text) < 10 else text


def _parameter(rest: _Path, kind: str = "state") -> tuple[int | str, str] | None:
    """Return (parameter or group, key) of an entry of an optimizer's state or groups, nested or in one flat name."""
    if len(rest) == 3 and rest[0] == kind:
        return rest[1], str(rest[2])
    if len(rest) == 1 and str(rest[0]).startswith(f"{kind}."):
        name, _, key = str(rest[0]).removeprefix(f"{kind}.").rpartition(".")
        return (name, key) if name else None
    return None


class _Listing:
    """The checked content of `.metadata`."""

    def __init__(self, source: Source, folder: Path):
        self.source = source
        self.folder = folder
        path = folder / METADATA
        try:
            with open(open_descriptor(path), "rb") as file:
                if os.fstat(file.fileno()).st_size > MAX_PICKLE:
                    raise UserError(f"found more than {MAX_PICKLE:,} bytes, expected a listing of tensors")
                metadata = read_pickle(file.read())
        except (UserError, CheckpointError) as error:
            raise UserError(f"{path}: {str(error).removeprefix(f'{METADATA}: ')}") from error
        content = metadata["state_dict_metadata"] if isinstance(metadata, Made) else None
        storage = metadata["storage_data"] if isinstance(metadata, Made) else None
        if not isinstance(content, dict) or not isinstance(storage, dict):
            raise UserError(f"{path}: it is not the metadata of torch.distributed.checkpoint")
        self.tensors = {name: item for name, item in content.items() if getattr(item, "kind", "") == _TENSOR}
        self.bytes = {name for name, item in content.items() if getattr(item, "kind", "") == _BYTES}
        self.places: dict[str, list[tuple[_Path | None, Made]]] = {}
        for index, info in storage.items():
            name, offset = _field(index, "fqn"), _field(index, "offset")
            if not isinstance(name, str) or not isinstance(info, Made) or not isinstance(offset, tuple | None):
                raise UserError(f"{path}: it does not list the places of its tensors as torch does")
            self.places.setdefault(name, []).append((offset, info))
        planned = metadata["planner_data"]
        self.nested = isinstance(planned, dict)
        """Whether it records the mappings that a name was in."""
        self.paths: dict[str, _Path] = {}
        for name in [*self.tensors, *self.bytes]:
            found = planned.get(name) if isinstance(planned, dict) else None
            flat = name.partition(".")
            plain = isinstance(found, tuple) and found and all(isinstance(part, str | int) for part in found)
            self.paths[name] = found if plain and found else (flat[0], flat[2]) if flat[2] else (name,)
        self.path = path

    def stored(self, name: str, role: str) -> Stored:
        """Return the tensor, with the places of its boxes."""
        item = self.tensors[name]
        shape, chunks = item["size"], item["chunks"]
        properties = item["properties"]
        state = properties.state if isinstance(properties, Made) else None
        dtype_name = state[0] if isinstance(state, tuple) and state else (state or {}).get("dtype") if state else None
        try:
            dtype = dtype_of(dtype_name)
            spec = TensorSpec(shape if isinstance(shape, tuple) else (-1,), dtype, role)
        except (PickleRefused, CheckpointError) as error:
            raise UserError(f"{self.path}: tensor {name!r}: {error}") from error
        sizes = {}
        for chunk in chunks if isinstance(chunks, list) else ():
            offsets, extent = _field(chunk, "offsets"), _field(chunk, "sizes")
            if not _is_shape(offsets, len(shape)) or not _is_shape(extent, len(shape)):
                raise UserError(f"{self.path}: tensor {name!r}: a part of it has no place")
            sizes[offsets] = extent
        grid = spec.shape or (1,)
        blocks = []
        for offset, info in self.places.get(name, ()):
            offset = offset if offset is not None else (0,) * len(shape)
            if offset not in sizes:
                raise UserError(f"{self.path}: tensor {name!r}: {list(offset)} is not where a part of it begins")
            if not all(sizes[offset]):
                continue
            file = self._open(name, info)
            view = file.root
            if not isinstance(view, View):
                raise UserError(f"{file.path}: {name!r} is not a tensor there, as {METADATA} lists it")
            if view.shape != sizes[offset] or view.dtype != dtype:
                raise UserError(f"{file.path}: tensor {name!r} is not of the shape and dtype that {METADATA} lists")
            blocks.append(Block(file.file, file.at(view), view.shape or grid, view.strides or (1,), offset or (0,)))
        return Stored(spec, dtype, grid, tuple(blocks))

    def _open(self, name: str, info: Made) -> TorchFile:
        relative, offset, length = info["relative_path"], info["offset"], info["length"]
        if info["transform_descriptors"]:
            raise UserError(f"{self.path}: {name!r} was transformed when it was written (compressed or encrypted)")
        if type(offset) is not int or type(length) is not int:
            raise UserError(f"{self.path}: {name!r} has no place in a file")
        file = self.folder / basename(relative, self.path, "a file")
        return TorchFile(self.source, file, part=(offset, length))

    def value(self, name: str) -> Any:
        """Return a value that is not a tensor."""
        places = self.places.get(name)
        return self._open(name, places[0][1]).root if places else None


def _field(value: Any, key: str) -> Any:
    return value[key] if isinstance(value, Made) else None


def _is_shape(value: Any, length: int) -> bool:
    return isinstance(value, tuple) and len(value) == length and all(type(n) is int and n >= 0 for n in value)
