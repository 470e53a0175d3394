"""Reads the files of `torch.save`: zip archives of a pickle and of the bytes of each storage.

Only what torch writes is accepted: records that are stored, not compressed, each once, apart from each other and within
the file. Nothing is unpacked: a tensor is read, or copied within the kernel, from where its record lies.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from distrain.checkpoints.dtypes import ITEM_SIZES
from distrain.checkpoints.foreign.pickles import PickleRefused, View, read_pickle
from distrain.system.errors import UserError

MAX_PICKLE = 256 << 20
"""Bytes of a pickle: the listing of some million tensors."""

_MAX_DIRECTORY = 64 << 20
"""Bytes of an archive's directory, of about 100 for each record."""
_END = 22  # bytes of the end record
_LOCAL = struct.Struct("<4s5H3L2H")


class NoArchive(UserError):
    """The file is not a zip archive at all."""


@dataclass(frozen=True, slots=True)
class Record:
    """A member of the archive, stored uncompressed."""

    offset: int
    """In the file, in bytes."""
    nbytes: int
    crc32: int


@dataclass(frozen=True, slots=True)
class Archive:
    """The content of one `torch.save`."""

    root: Any
    """The saved object; its tensors are `View`s."""
    records: dict[str, Record]
    """The bytes of each storage, by its key."""
    listing: Record | None = None
    """The pickle that `root` was read from."""

    def record(self, view: View) -> Record:
        """Return the record of a tensor's storage; raises UserError if the tensor reaches beyond it."""
        record = self.records.get(view.storage.key)
        if record is None:
            raise UserError(f"the bytes of storage {view.storage.key!r} are not in the file")
        size = ITEM_SIZES[view.storage.dtype] if view.storage.dtype else 1
        if view.storage.numel * size > record.nbytes:
            raise UserError(
                f"storage {view.storage.key!r} should have {view.storage.numel * size:,} bytes, and has "
                f"{record.nbytes:,}"
            )
        if all(view.shape):
            last = view.offset + sum((n - 1) * stride for n, stride in zip(view.shape, view.strides, strict=True))
            if (last + 1) * ITEM_SIZES[view.dtype] > record.nbytes:
                raise UserError(f"a tensor reaches beyond the bytes of storage {view.storage.key!r}")
        return record


def read_archive(descriptor: int, base: int, nbytes: int) -> Archive:
    """Read the archive in bytes [base, base + nbytes) of an open file; raises UserError, NoArchive."""
    members = _members(descriptor, base, nbytes)
    if len({name.partition("/")[0] for name in members}) != 1:
        raise UserError("its records are not in one folder, as those of torch.save are")
    records = {name.partition("/")[2]: record for name, record in members.items()}
    if "byteorder" in records and _bytes(descriptor, records["byteorder"], 16) != b"little":
        raise UserError("its numbers are in big-endian order, which is not read here")
    listing = records.get("data.pkl")
    if listing is None:
        raise UserError("it has no record data.pkl: torch.save did not write it")
    if listing.nbytes > MAX_PICKLE:
        raise UserError(f"its pickle has {listing.nbytes:,} bytes; expected a listing of tensors, up to {MAX_PICKLE:,}")
    try:
        root = read_pickle(_bytes(descriptor, listing, MAX_PICKLE))
    except PickleRefused as error:
        raise PickleRefused(f"its pickle is not opened: {error}") from error
    storages = {name.removeprefix("data/"): record for name, record in records.items() if name.startswith("data/")}
    return Archive(root, storages, listing)


def _bytes(descriptor: int, record: Record, limit: int) -> bytes:
    return os.pread(descriptor, min(record.nbytes, limit), record.offset)


class _Part(io.RawIOBase):
    """A part of an open file, as zipfile reads it; at most `_MAX_DIRECTORY` bytes at once."""

    def __init__(self, descriptor: int, base: int, nbytes: int):
        self._descriptor, self._base, self._nbytes, self._at = descriptor, base, nbytes, 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._nbytes}[whence]
        if self._at < 0:
            raise ValueError("a place before the beginning")
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        size = max(0, min(size if size >= 0 else self._nbytes, self._nbytes - self._at))
        if size > _MAX_DIRECTORY:
            raise ValueError(f"it would have {size:,} bytes, more than the directory of any model")
        found = os.pread(self._descriptor, size, self._base + self._at)
        self._at += len(found)
        return found


def _members(descriptor: int, base: int, nbytes: int) -> dict[str, Record]:
    """Return every record of the archive, checked against the header before its bytes."""
    if os.pread(descriptor, 4, base) != b"PK\x03\x04":
        raise NoArchive("it is not a zip archive")
    if nbytes < _END or os.pread(descriptor, 4, base + nbytes - _END) != b"PK\x05\x06":
        raise UserError("it does not end as a zip archive does: it was cut off, or something was put behind it")
    try:
        with zipfile.ZipFile(_Part(descriptor, base, nbytes)) as archive:
            infos, directory = archive.infolist(), archive.start_dir
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, struct.error) as error:
        raise UserError(f"its directory is not where a zip archive's is: the file is damaged ({error})") from error
    found: dict[str, Record] = {}
    spans = []
    for info in infos:
        name = info.orig_filename
        if name in found:
            raise UserError(f"record {name!r} is there twice")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 0x41:
            raise UserError(f"record {name!r} is compressed or encrypted, and torch.save does neither")
        raw = name.encode("utf-8" if info.flag_bits & 0x800 else "cp437")
        local = os.pread(descriptor, _LOCAL.size + len(raw), base + info.header_offset)
        if len(local) < _LOCAL.size or not local.startswith(b"PK\x03\x04"):
            raise UserError(f"record {name!r} is not where the directory says: the file is damaged")
        *_, name_length, extra_length = _LOCAL.unpack_from(local)
        first = info.header_offset + _LOCAL.size + name_length + extra_length
        if local[_LOCAL.size :] != raw or name_length != len(raw) or first + info.file_size > directory:
            raise UserError(f"record {name!r} is not as the directory says: the file is damaged")
        found[name] = Record(base + first, info.file_size, info.CRC)
        spans.append((info.header_offset, first + info.file_size, name))
    for (_, stop, one), (begin, _, other) in pairwise(sorted(spans)):
        if begin < stop:
            raise UserError(f"records {one!r} and {other!r} lie over each other")
    return found
