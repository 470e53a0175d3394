"""CSV and Parquet files as rows that know where they come from, and the numbers and labels of their columns."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from distrain.config import UserError
from distrain.datasets.base import DataRequest, split_indices
from distrain.datasets.table_numbers import Numbers, beyond_whole

if TYPE_CHECKING:  # imported where they are used: other data sets should not wait for them
    import pyarrow as pa

_SUFFIXES = (".csv", ".tsv", ".parquet", ".pq")
EXPECTED = "a .csv, .tsv or .parquet file, or a folder of them"
_NO_NAME = re.compile(r"\s*|__index_level_\d+__|Unnamed: \d+(_level_\d+)?")
"""What a column is called that nobody has named, by pandas or by whoever wrote its table to a file."""


@dataclass(frozen=True)
class Frame:
    """Rows of a table, which know the files that they come from."""

    table: pa.Table
    rows: np.ndarray
    """(rows,) int64: the number of each row among those of all files."""
    files: tuple[tuple[Path, int], ...]
    """Each file and its number of rows, in order."""
    unnamed: Mapping[str, str] = field(default_factory=dict)
    """The columns that nobody named, and what each of them is."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def names(self) -> list[str]:
        return self.table.column_names

    @property
    def title(self) -> str:
        path = self.files[0][0]
        return str(path if len(self.files) == 1 else path.parent)

    def take(self, indices: np.ndarray) -> Frame:
        return Frame(self.table.take(indices), self.rows[indices], self.files, self.unnamed)

    def place(self, index: int) -> str:
        """Where a row is, for an error; rows are counted from 1, without the header."""
        row = int(self.rows[index])
        for path, count in self.files:
            if row < count:
                return f"{path}, row {row + 1}"
            row -= count
        raise AssertionError("a row of no file")

    def places(self, mask: np.ndarray) -> str:
        """Where the rows of `mask` (rows,) are: the first few, and how many there are."""
        found = np.flatnonzero(mask)
        shown = "; ".join(self.place(index) for index in found[:5])
        return shown + (f"; and {len(found) - 5} more rows" if len(found) > 5 else "")

    def parse(self, name: str) -> tuple[Numbers, np.ndarray]:
        """Return a column as (its numbers, the mask (rows,) of what is there and is no number)."""
        import pandas as pd
        import pyarrow as pa

        column = _plain(self.table.column(name))
        kind = column.type
        if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
            values = column.cast(pa.float64(), safe=False).to_numpy()
            exact = column.fill_null(0).to_numpy() if pa.types.is_integer(kind) and beyond_whole(values) else None
            return Numbers(values, exact), np.zeros(len(self), dtype=bool)
        if pa.types.is_null(kind):
            return Numbers(np.full(len(self), np.nan)), np.zeros(len(self), dtype=bool)
        present = ~column.is_null().to_numpy()
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            return Numbers(np.full(len(self), np.nan)), present
        texts = column.to_pandas()
        parsed = pd.to_numeric(texts, errors="coerce")
        values = parsed.to_numpy(np.float64, na_value=np.nan)
        exact = None
        if beyond_whole(values):
            whole = parsed if present.all() else pd.to_numeric(texts[present], errors="coerce")
            if whole.dtype.kind in "iu":
                exact = np.zeros(len(self), whole.dtype)
                exact[present] = whole
        return Numbers(values, exact), present & np.isnan(values)

    def numbers(self, name: str, what: str) -> Numbers:
        """Return the numbers of a column; raises UserError for other text and for infinities."""
        numbers, bad = self.parse(name)
        if bad.any():
            index = int(np.flatnonzero(bad)[0])
            raise UserError(
                f"{what} {name!r} should hold numbers, and {self.place(index)} holds {self.text(name, index)!r}; "
                "mend it, list the column under data.categorical, or drop it"
            )
        if (infinite := np.isinf(numbers.values)).any():
            raise UserError(f"{what} {name!r} is infinite at {self.places(infinite)}; mend or remove these rows")
        return numbers

    def labels(self, name: str) -> np.ndarray:
        """Return a column as objects (rows,): text, or None where missing."""
        import pyarrow as pa

        column = _plain(self.table.column(name))
        if pa.types.is_nested(column.type) or pa.types.is_binary(column.type):
            raise UserError(
                f"{self.title}: column {name!r} is of type {column.type}, which is no number and no category; "
                "list it under data.drop"
            )
        # Python's own text of a value is what pandas writes into a CSV file, so that both forms of a table are equal.
        return np.array(
            [None if value is None or value != value else str(value) for value in column.to_pylist()], dtype=object
        )

    def text(self, name: str, index: int) -> str:
        return str(self.table.column(name)[index].as_py())


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    import pyarrow as pa

    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


@dataclass(frozen=True)
class TableReader:
    """Reads files as rows."""

    delimiter: str | None
    missing_values: tuple[str, ...]

    def read(self, path: Path) -> Frame:
        """Return the rows of a file, or of all files of a folder in the order of their names."""
        import pyarrow as pa

        if not path.exists():
            raise UserError(f"there is nothing at {path}; a table is {EXPECTED}")
        files = [path]
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.suffix.lower() in _SUFFIXES)
            if not files:
                raise UserError(f"{path} holds no {', '.join(_SUFFIXES)} file; a table is {EXPECTED}")
        tables = [self._read_file(file) for file in files]
        unnamed = [_unnamed(each) for each in tables]
        named = [set(each.column_names) - set(without) for each, without in zip(tables, unnamed, strict=True)]
        for file, each in zip(files[1:], named[1:], strict=True):
            if each != named[0]:
                odd = sorted(each ^ named[0])
                raise UserError(f"{file} and {files[0]} should have the same columns, and differ in {listed(odd)}")
        shared = [name for name in tables[0].column_names if all(name in each.column_names for each in tables)]
        try:
            joined = pa.concat_tables([each.select(shared) for each in tables], promote_options="permissive")
        except pa.ArrowException as error:
            raise UserError(f"the files of {path} do not fit together: {error}") from error
        counts = [each.num_rows for each in tables]
        whys = {name: why for each in unnamed for name, why in each.items() if name in shared}
        return Frame(joined, np.arange(sum(counts)), tuple(zip(files, counts, strict=True)), whys)

    def _read_file(self, path: Path) -> pa.Table:
        import pyarrow as pa
        from pyarrow import parquet

        suffix = path.suffix.lower()
        if suffix not in _SUFFIXES:
            raise UserError(f"{path}: a table is {EXPECTED}, not {suffix or 'a file without an ending'}")
        try:
            with path.open("rb") as file:  # which may be called anything: pyarrow knows no path that is not UTF-8
                is_parquet = suffix in (".parquet", ".pq")
                result = parquet.read_table(file) if is_parquet else self._read_csv(path, file, suffix)
        except (pa.ArrowException, UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{path} cannot be read: {error}") from error
        if not result.num_rows:
            raise UserError(f"{path} has no rows")
        return result

    def _read_csv(self, path: Path, binary: IO[bytes], suffix: str) -> pa.Table:
        import pyarrow as pa
        from pyarrow import csv as arrow_csv

        delimiter = self.delimiter or ("\t" if suffix == ".tsv" else ",")
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = next((row for row in csv.reader(file, delimiter=delimiter) if row), None)
        if header is None:
            raise UserError(f"{path} is empty; its first line should name the columns")
        names = header
        if sum(not name.strip() for name in header) > 1:  # as pandas calls them when it reads such a file
            names = [name if name.strip() else f"Unnamed: {at}" for at, name in enumerate(header)]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(f"{path} names {listed(twice)} more than once; give each column a name of its own")
        result = arrow_csv.read_csv(
            binary,
            parse_options=arrow_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            convert_options=arrow_csv.ConvertOptions(
                column_types={name: pa.string() for name in header},
                null_values=list(self.missing_values),
                strings_can_be_null=True,
            ),
        )
        return result.rename_columns(names)


def _unnamed(table: pa.Table) -> dict[str, str]:
    """Return the columns of a file's table that nobody named, and what each of them is."""
    # Without a name of its own pandas notes only the range of an index, which is no column.
    index = (table.schema.pandas_metadata or {}).get("index_columns", [])
    found = {name: "the index of the pandas table" for name in table.column_names if name in index}
    return found | {
        name: "a column without a name, as pandas writes its index"
        for name in table.column_names
        if name not in found and _NO_NAME.fullmatch(name)
    }


def split_frames(request: DataRequest, reader: TableReader, targets: Sequence[str]) -> tuple[Frame, dict[str, Frame]]:
    """Return the rows that the training rows are part of, or all of, and the rows of each split."""
    section = request.section
    if isinstance(section.split, dict):
        if "train" not in section.split:
            raise UserError(f"data.split names {listed(sorted(section.split))} and no file for train")
        frames: dict[str, Frame] = {name: reader.read(request.base / path) for name, path in section.split.items()}
        return frames["train"], frames
    whole = reader.read(request.path(EXPECTED))
    labels = None
    if section.stratify and request.task in ("classification", "binary") and targets[0] in whole.names:
        labels = whole.labels(targets[0]).astype(str)
    indices = split_indices(len(whole), section, request.seed, labels)
    return whole, {name: whole.take(index) for name, index in indices.items()}


def listed(names: Sequence[str], most: int = 12) -> str:
    """Return names as a message shows them."""
    shown = ", ".join(repr(name) for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
