"""Pickles that only Python itself can open: `torch.load` in a process of its own, which writes their tensors.

Files older than torch's archives (1.6) are opened with `weights_only`, which runs no code. A file that holds more than
tensors, and that the user trusts, runs its code in that process. This process then reads a safetensors file and a
listing.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from distrain.checkpoints.files import open_descriptor
from distrain.checkpoints.foreign.archive import Archive, Record
from distrain.checkpoints.foreign.pickles import Made, Storage, View
from distrain.checkpoints.headers import read_header
from distrain.checkpoints.sources import row_major
from distrain.system.errors import UserError

_SCRIPT = """
import json, os, sys, torch, safetensors.torch
path, out, trust = sys.argv[1], sys.argv[2], sys.argv[3] == "trust"
if trust:  # a pickle may name classes of modules beside it; behind all others, they stand in for none
    sys.path.append(os.getcwd())
root = torch.load(path, map_location="cpu", weights_only=not trust)
if isinstance(root, torch.nn.Module):
    root = root.state_dict()
tensors, keys = {}, {}

def encode(value, depth=0):
    if depth > 50:
        return ["o", "too deep"]
    if isinstance(value, torch.nn.Module):
        value = value.state_dict()
    if isinstance(value, torch.Tensor):
        if value.layout is not torch.strided or value.is_quantized:
            return ["o", f"a tensor of layout {value.layout}"]
        value = value.detach()
        same = (value.untyped_storage().data_ptr(), value.storage_offset(), value.dtype, value.shape, value.stride())
        same = same if value.numel() else len(tensors)
        if same not in keys:
            keys[same] = str(len(tensors))
            tensors[keys[same]] = value.clone(memory_format=torch.contiguous_format)
        return ["T", keys[same]]
    if isinstance(value, dict):
        return ["d", [[encode(k, depth + 1), encode(v, depth + 1)] for k, v in value.items()]]
    if isinstance(value, (list, tuple, set, frozenset)):
        return ["l" if isinstance(value, list) else "t", [encode(v, depth + 1) for v in value]]
    if value is None or isinstance(value, (bool, int, float, str)):
        return ["v", value]
    return ["o", f"{type(value).__module__}.{type(value).__qualname__}"]

structure = encode(root)
safetensors.torch.save_file(tensors, out + "/tensors.safetensors")
with open(out + "/structure.json", "w") as file:
    json.dump(structure, file)
"""


TRUST = "Where you trust it, `distrain checkpoint import` with --trust opens it in a process of its own, which runs it"
_NAMED = re.compile(r"GLOBAL ([\w.]+)")
_CODES = re.compile(r"\x1b\[[0-9;]*m")  # torch makes some of its words bold


def open_in_process(path: Path, folder: Path, *, trust: bool) -> tuple[Path, Archive]:
    """Have a process of its own write the tensors of `path` to a file in `folder`; return the file, and what it holds.

    Runs the code in `path` only with `trust`. Raises UserError if torch cannot open it.
    """
    place = folder / str(len(list(folder.iterdir())))
    place.mkdir()
    done = subprocess.run(
        # -P: the folder that the user stands in may be a stranger's, and hold a json.py
        [sys.executable, "-P", "-c", _SCRIPT, str(path), str(place), "trust" if trust else "weights_only"],
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        error = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
        reason = error if trust or (named := _NAMED.search(done.stderr)) is None else f"it names {named[1]}"
        reason = _CODES.sub("", reason)
        raise UserError(
            f"{path}: torch does not open it{'' if trust else ' without running what is in it'}: {reason}"
            + ("" if trust else f". {TRUST}")
        )
    tensors = place / "tensors.safetensors"
    descriptor = open_descriptor(tensors)
    try:
        listing = read_header(descriptor, os.fstat(descriptor).st_size)[0]
    finally:
        os.close(descriptor)
    records, views = {}, {}
    for key, (dtype, shape, offset, nbytes) in listing.items():
        records[key] = Record(offset, nbytes, -1)  # just written: there is nothing to compare it to
        views[key] = View(Storage(key, None, nbytes), dtype, 0, shape, row_major(shape) if shape else ())
    return tensors, Archive(_decode(json.loads((place / "structure.json").read_text()), views), records)


def _decode(coded: Any, views: dict[str, View]) -> Any:
    kind, value = coded
    match kind:
        case "T":
            return views[value]
        case "d":
            pairs = [(_decode(key, views), _decode(item, views)) for key, item in value]
            return {key: item for key, item in pairs if isinstance(key, str | int | float | bool | None)}
        case "l":
            return [_decode(item, views) for item in value]
        case "t":
            return tuple(_decode(item, views) for item in value)
        case "o":
            return Made(value, ())
    return value
