"""Headers of safetensors files: written, and read strictly, whoever wrote the file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

from distrain.checkpoints.dtypes import ITEM_SIZES, in_safetensors
from distrain.checkpoints.format import CheckpointError, fields, has_exactly, parse_json, quoted

_MAX_HEADER = 100_000_000  # the safetensors library has the same limit

_ENTRY: dict[str, Any] = {"dtype": str, "shape": list, "data_offsets": list}

Header = dict[str, tuple[str, tuple[int, ...], int, int]]
"""For each tensor: dtype, shape, offset in the file in bytes, bytes."""


def flat_entry(dtype: str, numel: int) -> tuple[str, tuple[int]]:
    """Return the safetensors dtype and shape of a one-dimensional range of elements."""
    name, shape = in_safetensors(dtype, (numel,))
    return name, (math.prod(shape),)


def pack_header(tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str] | None = None) -> bytes:
    """Return the header of {name: (dtype, shape)}, laid end to end, with its length, padded to align the data."""
    return padded(header_text(tensors.items(), metadata))


def header_text(
    tensors: Iterable[tuple[str, tuple[str, tuple[int, ...]]]], metadata: dict[str, str] | None = None
) -> str:
    """Return what a header says."""
    # written by hand: json takes several times as long, for as many dicts as there are tensors
    items = [] if metadata is None else [f'"__metadata__":{json.dumps(metadata, separators=(",", ":"))}']
    end = 0
    for name, (dtype, shape) in tensors:
        begin, end = end, end + math.prod(shape) * ITEM_SIZES[dtype]
        sizes = ",".join(map(str, shape))
        items.append(f'{quoted(name)}:{{"dtype":"{dtype}","shape":[{sizes}],"data_offsets":[{begin},{end}]}}')
    return f"{{{','.join(items)}}}"


def padded(text: str) -> bytes:
    """Return a header of that text, with its length before it and spaces behind it that align the data."""
    content = text.encode()
    content += b" " * (-(8 + len(content)) % 64)
    return len(content).to_bytes(8, "little") + content


def read_header(descriptor: int, size: int) -> tuple[Header, dict[str, Any]]:
    """Return the tensors of a safetensors file of `size` bytes, and its metadata.

    Raises CheckpointError unless the tensors fill the file, each byte once, as the format demands.
    """
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    if size < 8 or length > min(size - 8, _MAX_HEADER):
        raise CheckpointError(
            f"it is not a safetensors file: its header would have {length:,} bytes, and it has {size:,}"
        )
    content = parse_json(os.pread(descriptor, length, 8))
    metadata = content.pop("__metadata__", None) or {}
    found: Header = {}
    for name, item in content.items():
        if not has_exactly(item, _ENTRY):
            fields(item, f"tensor {name!r}", **_ENTRY)
        dtype, shape, offsets = item["dtype"], item["shape"], item["data_offsets"]
        if dtype not in ITEM_SIZES:
            raise CheckpointError(f"tensor {name!r} has the dtype {dtype[:20]!r}, which is not read here")
        numbers = [*shape, *offsets]
        are_sizes = {*map(type, numbers)} == {int} and min(numbers) >= 0 and max(numbers) < 2**62
        if not are_sizes or len(shape) > 64 or len(offsets) != 2:
            raise CheckpointError(f"tensor {name!r} has a shape or offsets that are not sizes")
        begin, end = offsets
        if end - begin != math.prod(shape) * ITEM_SIZES[dtype] or 8 + length + end > size:
            raise CheckpointError(f"tensor {name!r} does not have the bytes that its shape needs, within the file")
        found[name] = (dtype, tuple(shape), 8 + length + begin, end - begin)
    reached = 8 + length
    for name, (_, _, offset, nbytes) in sorted(found.items(), key=lambda entry: entry[1][2:]):
        if offset != reached:
            raise CheckpointError(f"tensor {name!r} does not lie where the one before it ends")
        reached += nbytes
    if reached != size:
        raise CheckpointError(f"its header lists {reached:,} bytes, and it has {size:,}")
    return found, metadata
