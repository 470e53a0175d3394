"""The folders that wandb writes offline for one run: one for each start, which together hold every row once.

wandb writes a file anew at each start and cannot continue one, and what it had not flushed when it was killed is
lost. So a start cuts the newest file to the rows that stay, and puts what follows them into its own folder. wandb
uploads the folders of a run in the order of their starts, each behind the one before.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from distrain.run.json_files import write_atomically

_BLOCK = 1 << 15
_HEADER = 7
"""Bytes of the header of the file, and of each piece of a record: checksum, length, kind."""
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


class OfflineRuns:
    """The folders `offline-run-*` of the wandb run `run_id` below `folder`/wandb."""

    def __init__(self, folder: Path, run_id: str):
        self._folder, self._id = folder / "wandb", run_id
        self._list = folder / "starts.json"
        self._starts: list[tuple[str, int]] = []
        """(folder, number of its first row) of those that count, in order."""

    def cut(self, rows: int) -> int:
        """Take out all behind the first `rows` rows; returns how many of these are there, none missing between.

        Reads of the newest file what lies behind them, and of older ones nothing.
        """
        self._starts = self._read() if rows else []
        held = 0
        while self._starts and not held:
            name, first = self._starts[-1]
            if first < rows:
                held = cut(self._folder / name / f"run-{self._id}.wandb", rows)
            if held <= first:
                held = 0
                self._starts.pop()
        self._write()
        counting = {name for name, _ in self._starts}
        for old in self._folder.glob(f"offline-run-*-{self._id}*"):
            if old.name not in counting:
                shutil.rmtree(old)
        return held

    def begin(self, folder: Path, row: int) -> None:
        """Note the folder of a start whose first row is number `row`, before that is written."""
        self._starts.append((folder.name, row))
        self._write()

    def _read(self) -> list[tuple[str, int]]:
        try:
            starts = [(Path(str(name)).name, int(first)) for name, first in json.loads(self._list.read_text())]
        except (OSError, ValueError, TypeError):
            return []
        firsts = [first for _, first in starts]
        return starts if firsts == sorted(set(firsts)) and firsts[:1] == [0] else []

    def _write(self) -> None:
        write_atomically(self._list, json.dumps(self._starts) + "\n")


def cut(path: Path, rows: int) -> int:
    """Cut a .wandb file behind the last row whose number is below `rows`, and return the number after it.

    0 where there is none, or no such file: it is left as it is. Reads from the end, no more than has to go.
    """
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]  # by the version of protobuf

    try:
        file = path.open("r+b")
    except FileNotFoundError:
        return 0
    with file:
        blocks = -(-file.seek(0, os.SEEK_END) // _BLOCK)
        for block in reversed(range(blocks)):
            for end, content in reversed(list(_records(file.fileno(), block))):
                row = Record.FromString(content).history
                if row.HasField("step") and row.step.num < rows:
                    file.truncate(end)
                    return int(row.step.num) + 1
    return 0


def _records(descriptor: int, block: int) -> Iterator[tuple[int, bytes]]:
    """Yield (end in the file, content) of the records that begin in a block, up to one that a kill left in part.

    The format is that of LevelDB's log: blocks of 32 KiB, and in them pieces of records, none across a border.
    """
    first, parts = block, list[bytes]()
    at = _HEADER if block == 0 else 0
    data = os.pread(descriptor, _BLOCK, block * _BLOCK)
    while True:
        if at + _HEADER > _BLOCK:
            if not parts:
                return
            block, at = block + 1, 0
            data = os.pread(descriptor, _BLOCK, block * _BLOCK)
        if at + _HEADER > len(data):
            return
        checksum, length, kind = struct.unpack_from("<IHB", data, at)
        begin, at = at + _HEADER, at + _HEADER + length
        if at > len(data) or zlib.crc32(data[begin - 1 : at]) != checksum:
            return
        if kind in (_FULL, _FIRST):
            parts = []
        elif not parts:  # of a record that begins before
            continue
        parts.append(data[begin:at])
        if kind in (_FULL, _LAST):
            yield block * _BLOCK + at, b"".join(parts)
            parts = []
            if block > first:
                return
