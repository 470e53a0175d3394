"""CSV, JSON Lines and Parquet files as rows with their file and number, and the numbers and labels of their columns."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from distrain.config import UserError
from distrain.datasets.base import SPLIT_NAMES, DataRequest, split_indices
from distrain.datasets.table_numbers import Numbers, beyond_whole, parse_numbers
from distrain.system.errors import some

if TYPE_CHECKING:  # imported where they are used: other data sets should not wait for them
    import pyarrow as pa

_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".pq")
EXPECTED = "a .csv, .tsv, .jsonl or .parquet file, or a folder of them"
_DELIMITERS = ",;\t|"
"""What may part the columns of a CSV file whose first line has one column by the delimiter of its suffix."""
_NO_NAME = re.compile(r"\s*|__index_level_\d+__|Unnamed: \d+(_level_\d+)?")
"""Names of unnamed columns: of pandas' index, and of pandas itself."""


@dataclass(frozen=True)
class Frame:
    """Rows of a table, with their files."""

    table: pa.Table
    rows: np.ndarray
    """(rows,) int64: the number of each row, counted over all files."""
    files: tuple[tuple[Path, int], ...]
    """Each file and its number of rows, in order."""
    unnamed: Mapping[str, str] = field(default_factory=dict)
    """The unnamed columns, with a description."""

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
        """Return a row's file and number, from 1 and without the header, for errors."""
        row = int(self.rows[index])
        for path, count in self.files:
            if row < count:
                return f"{path}, row {row + 1}"
            row -= count
        raise AssertionError("a row of no file")

    def places(self, mask: np.ndarray) -> str:
        """Return the places of the first few rows of `mask` (rows,), and the number of the rest."""
        found = np.flatnonzero(mask)
        shown = "; ".join(self.place(index) for index in found[:5])
        return shown + (f"; and {len(found) - 5} more rows" if len(found) > 5 else "")

    def parse(self, name: str) -> tuple[Numbers, np.ndarray]:
        """Return (the numbers of a column, the mask (rows,) of values that are not numbers)."""
        import pandas as pd
        import pyarrow as pa

        column = self._column(name)
        kind = column.type
        absent = Numbers(np.full(len(self), np.nan))
        if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
            values = column.cast(pa.float64(), safe=False).to_numpy()
            exact = column.fill_null(0).to_numpy() if pa.types.is_integer(kind) and beyond_whole(values) else None
            return Numbers(values, exact), np.zeros(len(self), dtype=bool)
        if pa.types.is_null(kind):
            return absent, np.zeros(len(self), dtype=bool)
        present = ~column.is_null().to_numpy()
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            return absent, present
        values = parse_numbers(column)
        exact = None
        if beyond_whole(values):
            integers = pd.to_numeric(column.to_pandas()[present], errors="coerce")
            if integers.dtype.kind in "iu":
                exact = np.zeros(len(self), integers.dtype)
                exact[present] = integers
        return Numbers(values, exact), present & np.isnan(values)

    def indistinct(self, name: str, numbers: Numbers) -> tuple[str, str] | None:
        """Return two different numbers of a column that are one as float64; None where there are none."""
        known: dict[float, Decimal] = {}
        for value, text in zip(numbers.values.tolist(), self._column(name).to_pylist(), strict=True):
            if text is None or math.isnan(value):
                continue
            with suppress(InvalidOperation):  # what pandas reads and is no decimal number
                number = Decimal(text)
                if (other := known.setdefault(value, number)) != number:
                    return str(other), str(number)
        return None

    def with_leading_zero(self, name: str) -> str | None:
        """Return a text of a column that begins with a zero and another digit; None where there is none."""
        import pyarrow as pa
        import pyarrow.compute as pc

        column = self._column(name)
        if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
            return None
        found = column.filter(pc.match_substring_regex(column, r"^\s*[+-]?0\d"))
        return str(found[0].as_py()) if len(found) else None

    def numbers(
        self, name: str, what: str, or_else: str = "list the column under data.categorical, or drop it"
    ) -> Numbers:
        """Return the numbers of a column; raises UserError for text and infinities.

        `or_else`: what can be done besides correcting a text.
        """
        numbers, bad = self.parse(name)
        if bad.any():
            index = int(np.flatnonzero(bad)[0])
            raise UserError(
                f"{what} {name!r} should hold numbers, and {self.place(index)} holds {self.text(name, index)!r}; "
                f"correct it, {or_else}"
            )
        if (infinite := np.isinf(numbers.values)).any():
            raise UserError(f"{what} {name!r} is infinite at {self.places(infinite)}; correct or remove these rows")
        return numbers

    def labels(self, name: str) -> np.ndarray:
        """Return a column as objects (rows,): text, or None where missing."""
        import pyarrow as pa

        column = self._column(name)
        if pa.types.is_nested(column.type) or pa.types.is_binary(column.type):
            raise UserError(
                f"{self.title}: column {name!r} is of type {column.type}, expected numbers or categories; list it "
                "under data.drop"
            )
        # Python's text of a value is what pandas writes into a CSV file, so both forms of a table are equal
        return np.array(
            [None if value is None or value != value else str(value) for value in column.to_pylist()], dtype=object
        )

    def text(self, name: str, index: int) -> str:
        return str(self.table.column(name)[index].as_py())

    def _column(self, name: str) -> pa.ChunkedArray:
        import pyarrow as pa

        column = self.table.column(name)
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
                raise UserError(f"{file} and {files[0]} should have the same columns, but differ in {listed(odd)}")
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
        from pyarrow import json, parquet

        suffix = path.suffix.lower()
        if suffix not in _SUFFIXES:
            raise UserError(f"{path}: a table is {EXPECTED}, not {suffix or 'a file without an ending'}")
        try:
            with path.open("rb") as file:  # opened here, as pyarrow takes no path that is not UTF-8
                if suffix in (".parquet", ".pq"):
                    _check_once(path, parquet.read_schema(file).names)
                    file.seek(0)
                    result = parquet.read_table(file)
                elif suffix in (".jsonl", ".ndjson"):
                    size = path.stat().st_size  # a line longer than a block is refused
                    result = json.read_json(file, json.ReadOptions(block_size=min(max(size, 1 << 20), 1 << 30)))
                else:
                    result = self._read_csv(path, file, suffix)
        except UnicodeDecodeError as error:
            found = error.object[error.start : error.end]
            raise UserError(f"{path} is not UTF-8 text: {error.reason} {found!r}; save it as UTF-8") from error
        except (pa.ArrowException, csv.Error) as error:
            raise UserError(f"{path} cannot be read: {_in_rows_from_1(str(error))}") from error
        if not result.num_rows:
            raise UserError(f"{path} has no rows")
        return result

    def _read_csv(self, path: Path, binary: IO[bytes], suffix: str) -> pa.Table:
        import pyarrow as pa
        from pyarrow import csv as arrow_csv

        delimiter = self.delimiter or ("\t" if suffix == ".tsv" else ",")
        header = _header(path, delimiter)
        if not self.delimiter and len(header) == 1:
            found = [each for each in _DELIMITERS if len(_header(path, each)) > 1]
            if len(found) == 1:
                delimiter, header = found[0], _header(path, found[0])
        names = header
        if sum(not name.strip() for name in header) > 1:  # named as pandas does
            names = [name if name.strip() else f"Unnamed: {at}" for at, name in enumerate(header)]
        _check_once(path, names)

        def read(threads: bool) -> pa.Table:
            return arrow_csv.read_csv(
                binary,
                arrow_csv.ReadOptions(use_threads=threads),
                arrow_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
                arrow_csv.ConvertOptions(
                    column_types={name: pa.string() for name in header},
                    null_values=list(self.missing_values),
                    strings_can_be_null=True,
                ),
            )

        try:
            result = read(True)
        except pa.ArrowInvalid:  # one thread counts the rows, and so names the one that is wrong
            binary.seek(0)
            result = read(False)
        return result.rename_columns(names)


def _in_rows_from_1(problem: str) -> str:
    """Return what PyArrow says of a file, to which the first row is 0 in JSON and 2 in CSV, rows counted from 1."""
    problem = re.sub(r"(?<=in row )\d+$", lambda found: str(int(found[0]) + 1), problem)
    return re.sub(r"Row #(\d+)", lambda found: f"row {int(found[1]) - 1}", problem)


def _check_once(path: Path, names: Sequence[str]) -> None:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{path} names {listed(twice)} more than once; rename the columns")


def _header(path: Path, delimiter: str) -> list[str]:
    """Return the names of a CSV file's columns; raises UserError where it is empty."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        header = next((row for row in csv.reader(file, delimiter=delimiter) if row), None)
    if header is None:
        raise UserError(f"{path} is empty; its first line should name the columns")
    return header


def _unnamed(table: pa.Table) -> dict[str, str]:
    """Return the unnamed columns of a file's table, with a description of each."""
    # pandas stores a default index as a range in the metadata, not as a column
    index = (table.schema.pandas_metadata or {}).get("index_columns", [])
    found = {name: "the index of the pandas table" for name in table.column_names if name in index}
    return found | {
        name: "a column without a name, as pandas writes its index"
        for name in table.column_names
        if name not in found and _NO_NAME.fullmatch(name)
    }


def split_frames(request: DataRequest, reader: TableReader, targets: Sequence[str]) -> tuple[Frame, dict[str, Frame]]:
    """Return the files' rows that hold the training rows, and the rows of each split."""
    section = request.section
    if paths := request.split_paths():
        frames = {path: reader.read(path) for path in dict.fromkeys(paths.values())}
        return frames[paths["train"]], {name: frames[path] for name, path in paths.items()}
    rows = reader.read(request.path(EXPECTED))
    labels = rows.labels(targets[0]).astype(str) if section.stratify and targets[0] in rows.names else None
    indices = split_indices(len(rows), section, request.seed, labels)
    return rows, {name: rows.take(index) for name, index in indices.items()}


def pooled(frame: Frame) -> list[str]:
    """Return a warning where a folder's files are called as splits are, and are cut anew all the same."""
    named = [path.name for path, _ in frame.files if path.stem.lower() in {*SPLIT_NAMES, "dev", "eval"}]
    if len(frame.files) < 2 or not named:
        return []
    names, folder = [path.name for path, _ in frame.files[:8]], frame.title
    return [
        f"the rows of {', '.join(names)} in {folder} are joined, and data.split cuts them anew; if "
        f"{' and '.join(named)} should stay what the name says, name the file of each split in place of data.path, as "
        f"in data.split: {{train: {folder}/train.csv, test: {folder}/test.csv}}"
    ]


def listed(names: Sequence[str], most: int = 12) -> str:
    """Return names for a message, at most `most` of them."""
    return some(map(repr, names), most)
