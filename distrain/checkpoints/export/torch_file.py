"""Writes the file that `torch.save` writes of a state dict, without torch and without holding the tensors.

It is a zip archive of stored records: a pickle that lists the tensors, and the bytes of each. The layout is known
before the first byte is copied, so tensors go straight to their places; the archive's checksums come last.
"""

from __future__ import annotations

import os
import pickle
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from distrain.checkpoints.dtypes import DTYPES
from distrain.checkpoints.export.copying import Output, copy_tensors
from distrain.checkpoints.export.new_files import new_file, write_at
from distrain.checkpoints.sources import THREADS, Check, Crc32, Source, row_major, update_from

_ALIGNMENT = 64
_FOLDER = "archive"
_WIDE = 0xFFFFFFFF


@dataclass
class _Record:
    name: bytes
    nbytes: int
    header: int
    """Offset of its local header."""
    data: int
    """Offset of its bytes."""
    extra: bytes
    crc: int = 0


def write_torch_file(source: Source, outputs: dict[str, Output], path: Path, checks: Sequence[Check] = ()) -> None:
    """Write the outputs as a new file that `torch.load(weights_only=True)` opens; tied tensors share their memory.

    Raises UserError, with the tensors written, if bytes of the source are not those of the `checks`.
    """
    keys: dict[str, str] = {}
    for output in outputs.values():
        keys.setdefault(output.name, str(len(keys)))
    first = {output.name: output for output in reversed(outputs.values())}
    contents = {
        "data.pkl": _state_dict(outputs, keys),
        ".format_version": b"1",
        ".storage_alignment": str(_ALIGNMENT).encode(),
        "byteorder": b"little",
        "version": b"3\n",
    }
    records = _lay_out(
        [(name, len(content)) for name, content in contents.items()]
        + [(f"data/{key}", first[name].nbytes) for name, key in keys.items()]
    )
    end = records[-1].data + records[-1].nbytes
    with new_file(path, end) as descriptor:
        for record, content in zip(records, contents.values(), strict=False):
            os.pwrite(descriptor, content, record.data)
        stored = records[len(contents) :]
        write = partial(write_at, descriptor)
        placed = [(first[name], write, record.data) for name, record in zip(keys, stored, strict=True)]
        copy_tensors(source, placed, checks)
        with ThreadPoolExecutor(THREADS) as pool:
            checksums = pool.map(lambda record: _crc32(descriptor, record), records)
            for record, crc in zip(records, checksums, strict=True):
                record.crc = crc
        for record in records:
            os.pwrite(descriptor, _local_header(record), record.header)
        listing = _directory(records, end)
        done = 0
        while done < len(listing):
            done += os.pwrite(descriptor, listing[done:], end + done)


def _crc32(descriptor: int, record: _Record) -> int:
    hashed = Crc32()
    update_from(hashed, descriptor, record.data, record.nbytes)
    return hashed.value


def _state_dict(outputs: dict[str, Output], keys: dict[str, str]) -> bytes:
    """Return the pickle (protocol 2) of a mapping of names to tensors."""
    parts = [b"\x80\x02}("]
    for name, output in outputs.items():
        key, shape, numel, dtype = keys[output.name], output.stored.spec.shape, output.stored.spec.numel, output.dtype
        known = DTYPES[dtype]
        if known.storage is not None:
            rebuild, kind, size = b"_rebuild_tensor_v2", b"ctorch\n%sStorage\n" % known.storage.encode(), numel
            tail = b""
        else:
            rebuild, kind, size = b"_rebuild_tensor_v3", b"ctorch.storage\nUntypedStorage\n", numel * known.nbytes
            tail = b"ctorch\n%s\n" % known.torch.encode()
        strides = row_major(shape) if shape else ()
        parts += [
            _pickled(name), b"ctorch._utils\n%s\n((" % rebuild,
            _pickled("storage"), kind, _pickled(key), _pickled("cpu"), _pickled(size), b"tQ",
            _pickled(0), _pickled(shape), _pickled(strides), b"\x89ccollections\nOrderedDict\n)R", tail, b"tR",
        ]  # fmt: skip
    return b"".join([*parts, b"u."])


def _pickled(value: str | int | tuple[int, ...]) -> bytes:
    return pickle.dumps(value, 2)[2:-1]  # without the protocol before it and the stop behind it


def _lay_out(sizes: Sequence[tuple[str, int]]) -> list[_Record]:
    records, reached = [], 0
    for name, nbytes in sizes:
        full = f"{_FOLDER}/{name}".encode()
        # a local header gives both sizes in the wide form, or neither
        extra = struct.pack("<2H2Q", 1, 16, nbytes, nbytes) if nbytes >= _WIDE else b""
        begin = reached + 30 + len(full) + len(extra) + 4
        padding = -begin % _ALIGNMENT
        extra += b"FB" + struct.pack("<H", padding) + b"Z" * padding
        records.append(_Record(full, nbytes, reached, begin + padding, extra))
        reached = begin + padding + nbytes
    return records


def _local_header(record: _Record) -> bytes:
    size = min(record.nbytes, _WIDE)
    fields = struct.pack(
        "<4s5H3L2H", b"PK\x03\x04", 45, 0, 0, 0, 0x21, record.crc, size, size, len(record.name), len(record.extra)
    )
    return fields + record.name + record.extra


def _directory(records: Sequence[_Record], offset: int) -> bytes:
    parts = []
    for record in records:
        wide = [value for value in (record.nbytes, record.nbytes, record.header) if value >= _WIDE]
        extra = struct.pack(f"<2H{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
        size, header = min(record.nbytes, _WIDE), min(record.header, _WIDE)
        parts.append(
            struct.pack(
                "<4s6H3L5H2L", b"PK\x01\x02", 45, 45, 0, 0, 0, 0x21, record.crc, size, size, len(record.name),
                len(extra), 0, 0, 0, 0, header,
            ) + record.name + extra
        )  # fmt: skip
    listing = b"".join(parts)
    count, after = len(records), offset + len(listing)
    return (
        listing
        + struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, len(listing), offset)
        + struct.pack("<4sLQL", b"PK\x06\x07", 0, after, 1)
        + struct.pack(
            "<4s4H2LH", b"PK\x05\x06", 0, 0, min(count, 0xFFFF), min(count, 0xFFFF), min(len(listing), _WIDE),
            min(offset, _WIDE), 0,
        )
    )  # fmt: skip
