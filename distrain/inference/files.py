"""Files of predictions, written row by row: tables, lines of JSON, arrays, or a file for each sample.

Whatever the number of samples, a part of them is in memory. The file at its path is complete or absent.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from distrain.config import UserError
from distrain.system.output import in_utf8, write_csv
from distrain.system.processes import umask
from distrain.training.outputs import Predictions

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa
    from pyarrow import parquet

_FORMS = (
    "a .csv, .parquet or .jsonl table, a .npy or .npz array, a .png for one map, a .conll of tags, or FOLDER/ with a "
    "file for each sample"
)
_ROWS, _NUMBERS = 8192, 1 << 22
"""Rows, and numbers in them, that a table collects before it writes them."""
NO_TAG = "_"
"""In place of the tag of a token that the model did not read."""
_HEADER = 256
"""Bytes before the numbers of an array: its shape is known at the end."""


class PredictionFile(ABC):
    """Takes predictions batch by batch."""

    def __init__(self, path: Path):
        """Raises UserError for a path that cannot be written to."""
        self.path = path
        self.temporary = path.parent / f".{path.name}.part"

    def append(self, index: Mapping[str, Any], batch: Predictions) -> None:
        """Append a batch, with the columns that identify its samples."""
        self.check(batch)
        columns = self.columns(batch)
        if clash := sorted(index.keys() & columns.keys()):
            raise UserError(
                f"the column {clash[0]!r} that names the samples is also one of predictions; rename it in the data"
            )
        self.add({in_utf8(name): self.cells(_in_utf8(values)) for name, values in {**index, **columns}.items()})

    def cells(self, values: Any) -> Any:
        """Return the values of a column as this format holds them."""
        return values

    @abstractmethod
    def check(self, batch: Predictions) -> None:
        """Raise UserError for predictions that this format cannot hold."""

    def columns(self, batch: Predictions) -> dict[str, Any]:
        """Return the table columns of a batch, one value for each sample; writes what has a place of its own."""
        return batch.columns

    @abstractmethod
    def add(self, columns: Mapping[str, Any]) -> None:
        """Append rows to the table."""

    @abstractmethod
    def write(self) -> None:
        """Complete the file, and put it at its path."""

    def discard(self) -> None:
        """Remove what was not completed."""
        self.temporary.unlink(missing_ok=True)


class PredictionTable(PredictionFile):
    """No file: `table` alone, in memory, in which a prediction may be an array."""

    def __init__(self) -> None:
        super().__init__(Path())
        self._parts: list[pd.DataFrame] = []

    def check(self, batch: Predictions) -> None:
        """Any prediction fits."""

    def columns(self, batch: Predictions) -> dict[str, Any]:
        if batch.parts:
            return batch.in_cells | {name: list(each) for name, each in batch.maps.items()}
        return batch.columns or {batch.name: list(batch.values if batch.values is not None else ())}

    def add(self, columns: Mapping[str, Any]) -> None:
        import pandas as pd

        self._parts.append(pd.DataFrame(columns))

    def table(self) -> pd.DataFrame:
        """Return one row for each sample."""
        import pandas as pd

        return pd.concat(self._parts, ignore_index=True)

    def write(self) -> None:
        """There is nothing to write."""

    def discard(self) -> None:
        """There is nothing to remove."""


class TableFile(PredictionFile):
    """A table; but for CSV, a cell may hold an array of numbers."""

    def __init__(self, path: Path):
        super().__init__(path)
        self._pending: list[pd.DataFrame] = []
        self._rows = self._numbers = 0
        self._parts = 0

    def check(self, batch: Predictions) -> None:
        """CSV holds vectors as columns; nothing else with dimensions."""
        if self.path.suffix == ".csv" and (maps := batch.maps):
            name, values = next(iter(maps.items()))
            raise UserError(
                f"-o {self.path}: {name} of each prediction has the shape {_shape(values)}, and a cell of a CSV file "
                "holds one value; write a .npz of an array for each, FOLDER/ with a file for each sample, or a "
                ".parquet or .jsonl table"
            )
        if self.path.suffix == ".csv" and not batch.columns and batch.values is not None and batch.values.ndim != 2:
            raise UserError(
                f"-o {self.path}: each prediction has the shape {_shape(batch.values)}, and a cell of a CSV file "
                "holds one value; write a .npy array, FOLDER/ with a file for each sample, or a .parquet or .jsonl "
                "table"
            )

    def columns(self, batch: Predictions) -> dict[str, Any]:
        """A prediction with dimensions is a list, or in CSV a column for each number."""
        if batch.parts:
            self._numbers += sum(each.size for each in batch.parts.values())
            return batch.in_cells | {name: each.tolist() for name, each in batch.maps.items()}
        if batch.columns:
            return batch.columns
        assert batch.values is not None
        self._numbers += batch.values.size
        if self.path.suffix == ".csv":
            return {f"{batch.name}_{at}": batch.values[:, at] for at in range(batch.values.shape[1])}
        return {batch.name: batch.values.tolist()}

    def cells(self, values: Any) -> Any:
        """Tokens and tags are a text in CSV, with a blank between them."""
        if self.path.suffix != ".csv" or not len(values) or not isinstance(values[0], list):
            return values
        return [" ".join(NO_TAG if each is None else str(each) for each in row) for row in values]

    def add(self, columns: Mapping[str, Any]) -> None:
        import pandas as pd

        frame = pd.DataFrame(columns)
        self._pending.append(frame)
        self._rows += len(frame)
        if self._rows >= _ROWS or self._numbers >= _NUMBERS:
            self._flush()

    def _flush(self) -> None:
        import pandas as pd

        if self._pending:
            self.write_part(pd.concat(self._pending, ignore_index=True), self._parts)
            self._parts += 1
        self._pending, self._rows, self._numbers = [], 0, 0

    def write_part(self, frame: pd.DataFrame, number: int) -> None:
        """Append rows to the file; `number` counts the parts."""
        write_csv(frame, self.temporary, append=number > 0)

    def write(self) -> None:
        self._flush()
        self.temporary.replace(self.path)


class ParquetFile(TableFile):
    """A Parquet file, with a group of rows for each part."""

    def __init__(self, path: Path):
        super().__init__(path)
        self._writer: parquet.ParquetWriter | None = None

    def write_part(self, frame: pd.DataFrame, number: int) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        table = pa.Table.from_pandas(frame, preserve_index=False)
        if self._writer is None:
            self._writer = parquet.ParquetWriter(self.temporary, table.schema)
        elif not table.schema.equals(self._writer.schema):
            # a column that had no value so far, or whole numbers only
            schema = pa.unify_schemas([self._writer.schema, table.schema], promote_options="permissive")
            if not schema.equals(self._writer.schema):
                self._rewrite(schema)
            table = table.cast(schema)
        self._writer.write_table(table)

    def _rewrite(self, schema: pa.Schema) -> None:
        from pyarrow import parquet

        assert self._writer is not None
        self._writer.close()
        before = self.temporary.with_name(f"{self.temporary.name}.before")
        self.temporary.replace(before)
        self._writer = parquet.ParquetWriter(self.temporary, schema)
        try:
            with parquet.ParquetFile(before) as file:
                for group in range(file.num_row_groups):
                    self._writer.write_table(file.read_row_group(group).cast(schema))
        finally:
            before.unlink()

    def write(self) -> None:
        self._flush()
        if self._writer is not None:
            self._writer.close()
        self.temporary.replace(self.path)

    def discard(self) -> None:
        if self._writer is not None:
            self._writer.close()
        super().discard()


class _TextFile(PredictionFile):
    """Lines of text, written as they come."""

    def __init__(self, path: Path):
        super().__init__(path)
        self._file: IO[str] | None = None

    def _write(self, text: str) -> None:
        if self._file is None:
            self._file = self.temporary.open("w", encoding="utf-8", newline="\n")
        self._file.write(text)

    def write(self) -> None:
        assert self._file is not None
        self._file.close()
        self.temporary.replace(self.path)

    def discard(self) -> None:
        if self._file is not None:
            self._file.close()
        super().discard()


class LinesFile(_TextFile):
    """Lines of JSON, an object for each sample; a number that is not finite is null, as JSON has no other."""

    def check(self, batch: Predictions) -> None:
        """All can be held."""

    def columns(self, batch: Predictions) -> dict[str, Any]:
        if batch.parts or batch.columns:
            return batch.in_cells | batch.maps
        assert batch.values is not None
        return {batch.name: batch.values}

    def add(self, columns: Mapping[str, Any]) -> None:
        lists = [each.tolist() if isinstance(each, np.ndarray) else list(each) for each in columns.values()]
        for row in zip(*lists, strict=True):
            self.add_line(dict(zip(columns, row, strict=True)))

    def add_line(self, record: Mapping[str, Any]) -> None:
        """Append one object."""
        self._write(json.dumps(_finite(record), default=_plain) + "\n")


class TaggedFile(_TextFile):
    """Tokens and their tags in columns, with a blank line after each sentence, as of CoNLL."""

    def check(self, batch: Predictions) -> None:
        if "tags" not in batch.columns:
            raise UserError(f"-o {self.path}: a .conll holds a tag for each token, and predictions are something else")

    def add(self, columns: Mapping[str, Any]) -> None:
        for tokens, tags in zip(columns["tokens"], columns["tags"], strict=True):
            lines = (f"{token}\t{NO_TAG if tag is None else tag}\n" for token, tag in zip(tokens, tags, strict=True))
            self._write("".join(lines) + "\n")


class ArrayWriter:
    """A .npy file that grows by rows of one shape and kind of number."""

    def __init__(self, path: Path):
        self.path = path
        self._file: IO[bytes] | None = None
        self._dtype, self._shape = np.dtype(np.float64), (0,)
        self._rows = 0

    def append(self, rows: np.ndarray) -> None:
        """Raises UserError for rows of another shape."""
        if self._file is None:
            self._file = self.path.open("wb")
            self._file.write(bytes(_HEADER))
            self._dtype, self._shape = rows.dtype, rows.shape[1:]
        if rows.shape[1:] != self._shape:
            shapes = " and ".join(" × ".join(map(str, each)) for each in (self._shape, rows.shape[1:]))
            raise UserError(
                f"predictions of different shapes, {shapes}, are no array; write FOLDER/ with a file for each sample"
            )
        if rows.dtype != self._dtype:
            raise UserError(f"predictions of different kinds, {self._dtype} and {rows.dtype}, are no array")
        np.ascontiguousarray(rows).tofile(self._file)
        self._rows += len(rows)

    def close(self) -> None:
        """Write the header: 'The NPY format' of NumPy's documentation, version 1.0, padded with spaces."""
        assert self._file is not None
        described = {"descr": self._dtype.str, "fortran_order": False, "shape": (self._rows, *self._shape)}
        text = repr(described).encode().ljust(_HEADER - 11) + b"\n"
        self._file.seek(0)
        self._file.write(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text)
        self._file.close()

    def discard(self) -> None:
        """Remove the file."""
        if self._file is not None:
            self._file.close()
        self.path.unlink(missing_ok=True)


class ArrayFile(PredictionFile):
    """One array of all predictions, and beside it a table of the sample of each row."""

    def __init__(self, path: Path):
        super().__init__(path)
        self._array = ArrayWriter(self.temporary)
        self._table = TableFile(path.with_suffix(".csv"))

    def check(self, batch: Predictions) -> None:
        if batch.parts:
            raise UserError(
                f"-o {self.path}: a prediction of {', '.join(batch.parts)} is no single array; write a .npz of an "
                "array for each"
            )
        if batch.values is None:
            raise UserError(f"-o {self.path}: text is written as a .csv, .parquet or .jsonl table")

    def columns(self, batch: Predictions) -> dict[str, Any]:
        assert batch.values is not None
        try:
            self._array.append(batch.values)
        except UserError as error:
            raise UserError(f"-o {self.path}: {error}") from error
        return batch.columns

    def add(self, columns: Mapping[str, Any]) -> None:
        self._table.add(columns)

    def write(self) -> None:
        self._array.close()
        self.temporary.replace(self.path)
        self._table.write()

    def discard(self) -> None:
        self._array.discard()
        self._table.discard()


class ArraysFile(PredictionFile):
    """A .npz file: the predictions, and each column of the table as an array; names and text are kept in memory."""

    def __init__(self, path: Path):
        super().__init__(path)
        self._folder = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        self._arrays: dict[str, ArrayWriter] = {}
        self._lists: dict[str, list[Any]] = {}

    def check(self, batch: Predictions) -> None:
        if batch.values is None and not batch.parts:
            raise UserError(f"-o {self.path}: text is written as a .csv, .parquet or .jsonl table")

    def columns(self, batch: Predictions) -> dict[str, Any]:
        if batch.parts:
            return dict(batch.parts)
        assert batch.values is not None
        # beside the name of a class, which has the column's name
        return batch.columns | {"values" if batch.name in batch.columns else batch.name: batch.values}

    def add(self, columns: Mapping[str, Any]) -> None:
        for name, values in columns.items():
            if not (isinstance(values, np.ndarray) and values.dtype.kind in "biuf"):
                self._lists.setdefault(name, []).extend(values)
                continue
            number = len(self._arrays)
            writer = self._arrays.setdefault(name, ArrayWriter(self._folder / str(number)))
            try:
                writer.append(values)
            except UserError as error:
                raise UserError(f"-o {self.path}: {name}: {error}") from error

    def write(self) -> None:
        with zipfile.ZipFile(self.temporary, "w", allowZip64=True) as file:
            for name, writer in self._arrays.items():
                writer.close()
                file.write(writer.path, f"{name}.npy")
            for name, values in self._lists.items():
                numbers = all(each is None or isinstance(each, int | float) for each in values)
                empty = math.nan if numbers else ""
                filled = [empty if each is None else each if numbers else str(each) for each in values]
                with file.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, np.asarray(filled), allow_pickle=False)
        self.temporary.replace(self.path)
        shutil.rmtree(self._folder, ignore_errors=True)

    def discard(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        super().discard()


class PictureFile(PredictionFile):
    """A PNG of one map of classes."""

    def __init__(self, path: Path):
        super().__init__(path)
        self._picture: np.ndarray | None = None

    def check(self, batch: Predictions) -> None:
        if batch.values is None or not all(map(_is_picture, batch.values)):
            raise UserError(f"-o {self.path}: a .png holds a map of classes, and each prediction is something else")
        if self._picture is not None or len(batch.values) > 1:
            raise UserError(
                f"-o {self.path}: a .png holds one prediction, and there are more; write FOLDER/ with a file for each"
            )
        self._picture = batch.values[0]

    def add(self, columns: Mapping[str, Any]) -> None:
        """There is no table."""

    def write(self) -> None:
        from PIL import Image

        assert self._picture is not None
        Image.fromarray(self._picture).save(self.temporary, "PNG")
        self.temporary.replace(self.path)


class PredictionFolder(PredictionFile):
    """A folder with a file for each sample, PNG for maps of classes, .npy or .npz, and predictions.csv."""

    def __init__(self, path: Path):
        super().__init__(path)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"-o {path}/: expected a folder that is empty or not there yet, for a file for each sample")
        self._folder = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        self._table = TableFile(self._folder / "predictions.csv")
        self._count = 0

    def check(self, batch: Predictions) -> None:
        values = [batch.values] if batch.values is not None else [*batch.parts.values()]
        if all(each.ndim < 2 for each in values):
            raise UserError(f"-o {self.path}/: each prediction is one value; write a .csv, .parquet or .jsonl table")

    def columns(self, batch: Predictions) -> dict[str, Any]:
        if batch.parts:
            return self._nested(batch)
        assert batch.values is not None
        names = []
        for values in batch.values:
            names.append(f"{self._count:06d}.{'png' if _is_picture(values) else 'npy'}")
            if _is_picture(values):
                from PIL import Image

                Image.fromarray(values).save(self._folder / names[-1])
            else:
                np.save(self._folder / names[-1], values, allow_pickle=False)
            self._count += 1
        return {batch.name: names, **batch.columns}

    def _nested(self, batch: Predictions) -> dict[str, Any]:
        """Write what has dimensions as a .npz for each sample; the rest is columns."""
        cells = {name: each for name, each in batch.parts.items() if each.ndim == 1}
        arrays = {name: each for name, each in batch.parts.items() if each.ndim > 1}
        names = []
        for row in range(len(next(iter(arrays.values())))):
            names.append(f"{self._count:06d}.npz")
            with zipfile.ZipFile(self._folder / names[-1], "w", allowZip64=True) as file:
                for name, each in arrays.items():
                    with file.open(f"{name}.npy", "w", force_zip64=True) as member:
                        np.lib.format.write_array(member, each[row], allow_pickle=False)
            self._count += 1
        return {batch.name: names, **cells}

    def add(self, columns: Mapping[str, Any]) -> None:
        self._table.add(columns)

    def write(self) -> None:
        self._table.write()
        self._folder.chmod(0o777 & ~umask())  # as mkdir would have made it; a temporary one is its owner's alone
        self._folder.replace(self.path)

    def discard(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


_BY_ENDING: dict[str, type[PredictionFile]] = {
    ".csv": TableFile,
    ".parquet": ParquetFile,
    ".jsonl": LinesFile,
    ".npy": ArrayFile,
    ".npz": ArraysFile,
    ".png": PictureFile,
    ".conll": TaggedFile,
}


def open_predictions(out: str) -> PredictionFile:
    """Return the file for predictions, by the format of `out`; raises UserError for an invalid one."""
    path = Path(out)
    folder = out.endswith("/") or path.is_dir()
    if path.is_symlink() or not path.parent.is_dir():
        raise UserError(f"-o {out}: expected a place in a folder that exists, and not a symbolic link")
    if not folder and path.suffix not in _BY_ENDING:
        raise UserError(f"-o {out}: predictions are written as {_FORMS}")
    return PredictionFolder(path) if folder else _BY_ENDING[path.suffix](path)


def _is_picture(values: np.ndarray) -> bool:
    return values.ndim == 2 and values.dtype in (np.uint8, np.uint16)


def _shape(values: np.ndarray) -> str:
    return " × ".join(map(str, values.shape[1:]))


def _in_utf8(values: Any) -> Any:
    """Return a column with its text in UTF-8, in which tables are kept: files may be called anything."""
    is_text = isinstance(values, list) or (isinstance(values, np.ndarray) and values.dtype.kind in "OU")
    return [in_utf8(each) if isinstance(each, str) else each for each in values] if is_text else values


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    """Return a value of a table's column, such as a date, as JSON can hold it."""
    return value.item() if isinstance(value, np.generic) else str(value)
