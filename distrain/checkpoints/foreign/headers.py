"""The header of a safetensors file by anybody, read strictly."""

from __future__ import annotations

import math
import os
from typing import Any

from distrain.checkpoints.dtypes import ITEM_SIZES
from distrain.checkpoints.format import parse_json, take
from distrain.config import UserError

_MAX_HEADER = 100_000_000  # the limit that the safetensors library sets itself

Header = dict[str, tuple[str, tuple[int, ...], int, int]]
"""For each tensor: dtype, shape, offset in the file in bytes, bytes."""


def read_header(descriptor: int, size: int) -> tuple[Header, dict[str, Any]]:
    """Return the tensors of a safetensors file of `size` bytes, and its metadata; raises UserError.

    The tensors must fill the file, each once, as the format demands.
    """
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    if size < 8 or length > min(size - 8, _MAX_HEADER):
        raise UserError(f"it is not a safetensors file: its header would have {length:,} bytes, and it has {size:,}")
    content = parse_json(os.pread(descriptor, length, 8))
    metadata = content.pop("__metadata__", None) or {}
    found: Header = {}
    for name, item in content.items():
        dtype, shape, offsets = take(item, "dtype", str), take(item, "shape", list), take(item, "data_offsets", list)
        if dtype not in ITEM_SIZES:
            raise UserError(f"tensor {name!r} has the dtype {dtype[:20]!r}, which is not read here")
        plain = len(shape) <= 64 and all(type(n) is int and 0 <= n < 2**62 for n in [*shape, *offsets])
        if item or not plain or len(offsets) != 2:
            raise UserError(f"tensor {name!r} is not described as a tensor is")
        begin, end = offsets
        if end - begin != math.prod(shape) * ITEM_SIZES[dtype] or 8 + length + end > size:
            raise UserError(f"tensor {name!r} does not have the bytes that its shape needs, within the file")
        found[name] = (dtype, tuple(shape), 8 + length + begin, end - begin)
    reached = 8 + length
    for name, (_, _, offset, nbytes) in sorted(found.items(), key=lambda entry: entry[1][2:]):
        if offset != reached:
            raise UserError(f"tensor {name!r} does not lie where the one before it ends")
        reached += nbytes
    if reached != size:
        raise UserError(f"its header speaks of {reached:,} bytes, and it has {size:,}")
    return found, metadata
