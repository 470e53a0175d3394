"""Rows of different lengths, encoded once and memory-mapped at every start. Imports no torch.

A folder holds

    index.json     what was encoded, facts about it, and for each column its dtype, rows and number of values
    NAME.bin       the values of a column's rows, one after the other, little-endian
    NAME.ends.bin  where each row ends, int64

It is found by a hash of everything that it was made from, so what has changed is encoded anew, beside it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import xxhash
from numpy.typing import ArrayLike, DTypeLike

from distrain.config import UserError
from distrain.datasets.tokens import INDEX_NAME, hash_file
from distrain.run.json_files import fsync
from distrain.system.bounded_json import SUMMARY, read_json
from distrain.system.processes import umask

FOLDER = ".distrain"
"""Beside the data, for what is encoded of them."""
_FORMAT = 1

Row = Mapping[str, np.ndarray]
"""One value of each column: (values,)."""


class Ragged:
    """Rows of different lengths in one array."""

    def __init__(self, values: np.ndarray, ends: np.ndarray):
        """`values` (all values,); `ends` (rows,) int64."""
        self.values, self.ends = values, ends
        self.starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]]) if len(ends) else ends

    @classmethod
    def of(cls, rows: Sequence[ArrayLike], dtype: DTypeLike | None = None) -> Ragged:
        """Return at least one row, each (values,), in one array."""
        parts = [np.asarray(row, dtype) for row in rows]
        return cls(np.concatenate(parts), np.cumsum([len(part) for part in parts], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def row(self, index: int) -> np.ndarray:
        return self.values[self.starts[index] : self.ends[index]]

    def take(self, indices: np.ndarray) -> Ragged:
        """Return these rows (n,) alone, copied."""
        return Ragged.of([self.row(index) for index in indices.tolist()])

    @property
    def lengths(self) -> np.ndarray:
        """(rows,) int64."""
        lengths: np.ndarray = self.ends - self.starts
        return lengths

    def sums(self) -> np.ndarray:
        """Return the sum of each row, (rows,) int64."""
        total = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.values, dtype=np.int64)])
        sums: np.ndarray = total[self.ends] - total[self.starts]
        return sums


@dataclass(frozen=True)
class Encoded:
    """What was encoded of one file."""

    facts: dict[str, Any]
    """JSON values."""
    columns: dict[str, Ragged]


def encoded(
    file: Path,
    cache: Path | None,
    made_from: Mapping[str, Any],
    dtypes: Mapping[str, str],
    encode: Callable[[Callable[[Row], None]], dict[str, Any]],
) -> Encoded:
    """Return what is encoded of `file`, mapped; encode it first where that was not done before.

    `made_from`: all that decides about the result besides the content of the file, as JSON values. `encode` is given a
    function to call with each row, and returns the facts. `cache`: the folder for the result, by default `.distrain`
    beside the file. Processes that start together may each encode it; one result is kept, and it is complete or absent.
    Raises UserError for a folder that cannot be written to, and for a result that was changed.
    """
    about = {"format": _FORMAT, "columns": dict(dtypes), **made_from}
    digest = xxhash.xxh3_128(json.dumps(about, sort_keys=True).encode())
    digest.update(hash_file(file).encode())
    # with its ending, which decides on how the file is read
    folder = (cache or file.parent / FOLDER) / f"{file.name}-{digest.hexdigest()}"
    if not folder.is_dir():
        _write(folder, about, dtypes, encode)
    return _open(folder)


def _write(
    folder: Path, about: dict[str, Any], dtypes: Mapping[str, str], encode: Callable[..., dict[str, Any]]
) -> None:
    part: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".tmp-{folder.name}-", dir=folder.parent))
        with contextlib.ExitStack() as stack:
            writers = {name: _Column(part, name, dtype, stack) for name, dtype in dtypes.items()}

            def add(row: Row) -> None:
                for name, writer in writers.items():
                    writer.add(row[name])

            facts = encode(add)
        columns = {
            name: {"dtype": each.dtype.str, "rows": each.rows, "values": each.end} for name, each in writers.items()
        }
        (part / INDEX_NAME).write_text(json.dumps({"made_from": about, "facts": facts, "columns": columns}) + "\n")
        for path in part.iterdir():
            fsync(path)
        fsync(part)
        part.chmod(0o777 & ~umask())  # mkdtemp makes folders for one user only
        try:
            part.rename(folder)
        except OSError:
            if not folder.is_dir():  # one that another process has made
                raise
        fsync(folder.parent)
    except OSError as error:
        raise UserError(
            f"what is encoded of the data cannot be kept in {folder.parent}: {error.strerror or error}; name a folder "
            "that can be written to in data.cache"
        ) from error
    finally:
        if part is not None:
            shutil.rmtree(part, ignore_errors=True)


class _Column:
    def __init__(self, folder: Path, name: str, dtype: str, stack: contextlib.ExitStack):
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.rows = self.end = 0
        self._files: list[IO[bytes]] = [
            stack.enter_context((folder / file).open("wb")) for file in (f"{name}.bin", f"{name}.ends.bin")
        ]

    def add(self, values: np.ndarray) -> None:
        self.rows, self.end = self.rows + 1, self.end + len(values)
        self._files[0].write(values.astype(self.dtype, copy=False).tobytes())
        self._files[1].write(self.end.to_bytes(8, "little"))


def _open(folder: Path) -> Encoded:
    try:
        content = read_json(folder / INDEX_NAME, SUMMARY)
        columns = {}
        for name, each in content["columns"].items():
            values = _map(folder / f"{name}.bin", np.dtype(each["dtype"]), each["values"])
            columns[name] = Ragged(values, _map(folder / f"{name}.ends.bin", np.dtype("<i8"), each["rows"]))
        return Encoded(content["facts"], columns)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder} is not as it was written ({error}); remove it, and it is made anew") from error


def _map(path: Path, dtype: np.dtype[Any], count: int) -> np.ndarray:
    if (size := os.path.getsize(path)) != count * dtype.itemsize:
        raise ValueError(f"{path.name} has {size} bytes, expected {count * dtype.itemsize}")
    if not count:
        return np.empty(0, dtype)
    # a plain array over the map: slicing numpy's memmap class costs several times as much
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))
