"""The container that `torch.save` writes: a zip archive of a pickle and of the bytes of each storage.

Only what torch writes is accepted: records that are stored, not compressed, each once, apart from each other and within
the file. Where a record's bytes lie is then all that is needed: nothing is unpacked, and a tensor is read, or copied
within the kernel, straight from the file.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from distrain.checkpoints.dtypes import ITEM_SIZES
from distrain.checkpoints.export.pickles import PickleRefused, View, read_pickle
from distrain.config import UserError

MAX_PICKLE = 256 << 20
"""Bytes of a pickle: the listing of some million tensors."""

_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_TAIL = 4096
_MOST_RECORDS = 1 << 20
_MOST_ENTRY = 1024  # bytes of the directory for each record: a short name and its sizes


class NoArchive(UserError):
    """The file is no zip archive at all."""


@dataclass(frozen=True, slots=True)
class Record:
    """A member of the archive: its bytes lie in the file as they are."""

    offset: int
    """In the file, in bytes."""
    nbytes: int
    crc32: int


@dataclass(frozen=True, slots=True)
class Archive:
    """What one `torch.save` wrote."""

    root: Any
    """What was saved; its tensors are `View`s."""
    records: dict[str, Record]
    """The bytes of each storage, by its key."""
    listing: Record | None = None
    """The pickle that `root` was read from."""

    def record(self, view: View) -> Record:
        """Return where the storage of a tensor lies; raises UserError where the tensor reaches beyond it."""
        record = self.records.get(view.storage.key)
        if record is None:
            raise UserError(f"the bytes of storage {view.storage.key!r} are not in the file")
        size = ITEM_SIZES[view.storage.dtype] if view.storage.dtype else 1
        if view.storage.numel * size > record.nbytes:
            raise UserError(
                f"storage {view.storage.key!r} is said to have {view.storage.numel * size:,} bytes, and has "
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
    folders = {name.partition("/")[0] for name in members}
    if len(folders) != 1:
        raise UserError("its records are not in one folder, as those of torch.save are")
    folder = f"{folders.pop()}/"
    plain = {name.removeprefix(folder): record for name, record in members.items()}
    if "byteorder" in plain and _bytes(descriptor, plain["byteorder"], 16) != b"little":
        raise UserError("its numbers are in big-endian order, which is not read here")
    if "data.pkl" not in plain:
        raise UserError("it has no record data.pkl: torch.save did not write it")
    if plain["data.pkl"].nbytes > MAX_PICKLE:
        raise UserError(f"its pickle has {plain['data.pkl'].nbytes:,} bytes; no listing of tensors is so large")
    try:
        root = read_pickle(_bytes(descriptor, plain["data.pkl"], MAX_PICKLE))
    except PickleRefused as error:
        raise PickleRefused(f"its pickle is not opened: {error}") from error
    storages = {name.removeprefix("data/"): record for name, record in plain.items() if name.startswith("data/")}
    return Archive(root, storages, plain["data.pkl"])


def _bytes(descriptor: int, record: Record, most: int) -> bytes:
    return os.pread(descriptor, min(record.nbytes, most), record.offset)


def _members(descriptor: int, base: int, nbytes: int) -> dict[str, Record]:
    """Return every record of the archive, checked against what stands before its bytes."""
    if os.pread(descriptor, 4, base) != b"PK\x03\x04":
        raise NoArchive("it is no zip archive")
    start = max(0, nbytes - _TAIL)
    tail = os.pread(descriptor, nbytes - start, base + start)
    count, size, offset = _directory(tail, start)
    end = nbytes - _END.size
    if count > _MOST_RECORDS or size > count * _MOST_ENTRY:
        raise UserError(
            "its directory is not where a zip archive's is, or of no file of torch.save: it would have "
            f"{size:,} bytes and {count:,} records"
        )
    if size < count * _ENTRY.size or offset + size > end:
        raise UserError("its directory is not where a zip archive's is: the file is damaged, or it was cut off")
    listing = tail[offset - start :][:size] if offset >= start else os.pread(descriptor, size, base + offset)
    found: dict[str, Record] = {}
    spans = []
    at = 0
    for _ in range(count):
        name, compressed, stored, crc, header, at = _entry(listing, at)
        if name in found:
            raise UserError(f"record {name!r} is there twice")
        if compressed or stored is None:
            raise UserError(f"record {name!r} is compressed or encrypted, and torch.save does neither")
        local = os.pread(descriptor, _LOCAL.size + len(name.encode()), base + header) if header < offset else b""
        if len(local) < _LOCAL.size or not local.startswith(b"PK\x03\x04"):
            raise UserError(f"record {name!r} is not where the directory says: the file is damaged")
        *_, name_length, extra_length = _LOCAL.unpack_from(local)
        first = header + _LOCAL.size + name_length + extra_length
        if local[_LOCAL.size :] != name.encode() or name_length != len(name.encode()) or first + stored > offset:
            raise UserError(f"record {name!r} is not as the directory says: the file is damaged")
        found[name] = Record(base + first, stored, crc)
        spans.append((header, first + stored, name))
    spans.sort()
    for (_, stop, one), (begin, _, other) in pairwise(spans):
        if begin < stop:
            raise UserError(f"records {one!r} and {other!r} lie over each other")
    return found


def _directory(tail: bytes, start: int) -> tuple[int, int, int]:
    """Return (records, bytes, offset) of the directory, from the last bytes of an archive."""
    at = len(tail) - _END.size
    if at < 0 or not tail.startswith(b"PK\x05\x06", at):
        raise UserError("it does not end as a zip archive does: it was cut off, or something was put behind it")
    _, disk, _, _, count, size, offset, _ = _END.unpack_from(tail, at)
    locator = at - _LOCATOR.size
    if locator >= 0 and tail.startswith(b"PK\x06\x07", locator):
        _, _, where, _ = _LOCATOR.unpack_from(tail, locator)
        where -= start
        if not 0 <= where <= locator - _END64.size or not tail.startswith(b"PK\x06\x06", where):
            raise UserError("its end does not say where its directory is: the file is damaged")
        *_, count, size, offset = _END64.unpack_from(tail, where)
    elif disk:
        raise UserError("it is one part of a zip archive in several")
    return count, size, offset


def _entry(listing: bytes, at: int) -> tuple[str, bool, int | None, int, int, int]:
    """Return (name, compressed, bytes, checksum, offset of the local header, where the next entry is)."""
    if len(listing) < at + _ENTRY.size or not listing.startswith(b"PK\x01\x02", at):
        raise UserError("its directory is damaged")
    (_, _, _, flags, method, _, _, crc, packed, stored, n, e, c, _, _, _, header) = _ENTRY.unpack_from(listing, at)
    begin = at + _ENTRY.size
    try:
        name = listing[begin : begin + n].decode()
    except UnicodeDecodeError as error:
        raise UserError("a record's name is no text") from error
    extra = listing[begin + n : begin + n + e]
    wide = _wide_sizes(extra)
    try:
        stored, packed, header = (next(wide) if value == 0xFFFFFFFF else value for value in (stored, packed, header))
    except RuntimeError as error:  # what a generator makes of the StopIteration
        raise UserError(f"record {name!r} does not say its size") from error
    plain = stored if method == 0 and packed == stored and not flags & 0x41 else None
    return name, method != 0, plain, crc, header, begin + n + e + c


def _wide_sizes(extra: bytes) -> Any:
    at = 0
    while at + 4 <= len(extra):
        kind, size = struct.unpack_from("<2H", extra, at)
        if kind == 1 and at + 4 + size <= len(extra):
            return iter(struct.unpack_from(f"<{size // 8}Q", extra, at + 4))
        at += 4 + size
    return iter(())
