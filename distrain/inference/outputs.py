"""What a model predicts, from its outputs to files: tables of one row a sample, arrays, or a file for each sample."""

from __future__ import annotations

import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from distrain.config import Form, UserError
from distrain.datasets.base import DataMeta
from distrain.optim.losses.classes import class_dim
from distrain.system.output import in_utf8, write_csv

if TYPE_CHECKING:
    import pandas as pd

# --------------------------------------------------------------------------------------------------------------------
# From outputs to predictions


@dataclass(frozen=True)
class Predictions:
    """The predictions for the samples of a batch, in the terms of the targets."""

    columns: dict[str, Any]
    """For a table: one value for each sample. Empty for predictions that have dimensions of their own."""
    values: np.ndarray | None
    """(batch, ...) the numbers of classes, 0 and 1, or numbers in the targets' own units; None for text."""

    def keep(self, rows: np.ndarray) -> Predictions:
        """Return the predictions for which `rows` (batch,) is true."""
        columns = {
            name: np.asarray(each, dtype=object if name == "text" else None)[rows]
            for name, each in self.columns.items()
        }
        return Predictions(columns, None if self.values is None else self.values[rows])


def predicted(task: Form, outputs: Tensor, targets: Tensor | None, meta: DataMeta, is_probability: bool) -> Predictions:
    """Return what outputs (batch, k), (batch,), or with more dimensions, predict: read as losses and metrics read them.

    `targets`, where there are any, tell which dimension is that of the classes. `is_probability`: whether outputs of
    binary and multilabel are probabilities, and not logits.
    """
    outputs = outputs.double()
    if task == "classification":
        return _classes(outputs.movedim(_class_dim(outputs, targets, meta), 1), meta)
    if task == "binary":
        two = outputs.shape[-1] == 2 and (outputs.dim() == 2 if targets is None else outputs.dim() == targets.dim() + 1)
        return _binary(outputs[..., 1] - outputs[..., 0] if two else outputs, meta, is_probability)
    if task == "multilabel":
        return _labels(outputs, meta, is_probability)
    if outputs.dim() > 2:
        return Predictions({}, outputs.numpy())
    outputs = _unstandardized(outputs.reshape(len(outputs), -1), meta)
    if outputs.shape[1] == 1:
        return Predictions({"prediction": outputs[:, 0].numpy()}, outputs[:, 0].numpy())
    return Predictions(
        {f"prediction_{index}": outputs[:, index].numpy() for index in range(outputs.shape[1])}, outputs.numpy()
    )


def _class_dim(outputs: Tensor, targets: Tensor | None, meta: DataMeta) -> int:
    if targets is not None:
        return class_dim(outputs, targets, "classification")
    last = outputs.dim() - 1
    return last if outputs.shape[1] != meta.num_classes == outputs.shape[last] else 1


def _classes(outputs: Tensor, meta: DataMeta) -> Predictions:
    """Return the classes of outputs (batch, classes, ...)."""
    top = outputs.argmax(dim=1)
    values = top.numpy().astype(np.min_scalar_type(outputs.shape[1] - 1))
    if outputs.dim() > 2:
        return Predictions({}, values)
    probabilities = outputs.softmax(dim=1)
    names = meta.class_names or tuple(str(index) for index in range(outputs.shape[1]))
    columns: dict[str, Any] = {
        "prediction": [names[index] for index in top.tolist()],
        "probability": probabilities.gather(1, top[:, None])[:, 0].numpy(),
    }
    return Predictions(
        columns | {f"probability_{name}": probabilities[:, index].numpy() for index, name in enumerate(names)}, values
    )


def _binary(outputs: Tensor, meta: DataMeta, is_probability: bool) -> Predictions:
    """Return which of two classes outputs (batch,), (batch, 1), or with more dimensions, speak of."""
    probability = outputs if is_probability else outputs.sigmoid()
    if probability.dim() == 2 and probability.shape[1] == 1:
        probability = probability[:, 0]
    values = (probability > 0.5).numpy().astype(np.uint8)
    if probability.dim() > 1:
        return Predictions({}, values)
    names = meta.class_names or ("0", "1")
    columns = {"prediction": [names[each] for each in values.tolist()], "probability": probability.numpy()}
    return Predictions(columns, values)


def _labels(outputs: Tensor, meta: DataMeta, is_probability: bool) -> Predictions:
    """Return which labels outputs (batch, labels, ...) are of."""
    probabilities = outputs if is_probability else outputs.sigmoid()
    values = (probabilities > 0.5).numpy()
    if outputs.dim() > 2:
        return Predictions({}, values.astype(np.uint8))
    probabilities = probabilities.reshape(len(outputs), -1)
    names = meta.class_names or tuple(str(index) for index in range(probabilities.shape[1]))
    columns = {f"prediction_{name}": values.reshape(len(outputs), -1)[:, i] for i, name in enumerate(names)}
    columns |= {f"probability_{name}": probabilities[:, index].numpy() for index, name in enumerate(names)}
    return Predictions(columns, values.astype(np.uint8))


def target_columns(task: str, targets: Tensor, meta: DataMeta) -> dict[str, Any]:
    """Return the columns of what a batch should have been, (batch,) or (batch, k); none for more dimensions."""
    if targets.dim() > 2:
        return {}
    if task in ("classification", "binary") and targets.dim() == 1:
        names = meta.class_names
        return {"target": [names[int(each)] if names else int(each) for each in targets.tolist()]}
    targets = targets.reshape(len(targets), -1).double()
    names = meta.class_names if task == "multilabel" else None
    if task == "regression":
        targets = _unstandardized(targets, meta)
    if targets.shape[1] == 1:
        return {"target": targets[:, 0].numpy()}
    keys = names or [str(index) for index in range(targets.shape[1])]
    return {f"target_{key}": targets[:, index].numpy() for index, key in enumerate(keys)}


def _unstandardized(values: Tensor, meta: DataMeta) -> Tensor:
    """Undo the standardising of targets (batch, k)."""
    if meta.target_std is None or meta.target_mean is None:
        return values
    std, mean = (torch.tensor(each, dtype=torch.float64) for each in (meta.target_std, meta.target_mean))
    return values * std + mean


# --------------------------------------------------------------------------------------------------------------------
# To files

_FORMS = "a .csv or .parquet table, a .npy array, or FOLDER/ with a file for each sample"


class PredictionFile(ABC):
    """Collects predictions batch by batch; the file at its path is complete or absent."""

    def __init__(self, path: Path):
        """Raises UserError for a path that cannot be written to."""
        self.path = path
        self._tables: list[pd.DataFrame] = []

    @abstractmethod
    def check(self, batch: Predictions) -> None:
        """Raise UserError for predictions that this format cannot hold."""

    @abstractmethod
    def write(self) -> None:
        """Write all appended batches."""

    def discard(self) -> None:  # noqa: B027 - most have written nothing before they write all
        """Remove what was not written completely."""

    def append(self, index: Mapping[str, Any], batch: Predictions) -> None:
        """Append a batch, with the columns that identify its samples."""
        import pandas as pd

        self.check(batch)
        columns = self.columns(batch)
        if clash := sorted(index.keys() & columns.keys()):
            raise UserError(
                f"the column {clash[0]!r} that names the samples is also one of predictions; rename it in the data"
            )
        named = {in_utf8(name): _in_utf8(values) for name, values in {**index, **columns}.items()}
        self._tables.append(pd.DataFrame(named))

    def columns(self, batch: Predictions) -> dict[str, Any]:
        """Return the table columns of a batch."""
        return batch.columns

    def table(self) -> pd.DataFrame:
        """Return one row for each sample."""
        import pandas as pd

        return pd.concat(self._tables, ignore_index=True)


class PredictionTable(PredictionFile):
    """No file: `table` alone, in which a prediction may be an array."""

    def __init__(self) -> None:
        super().__init__(Path())

    def check(self, batch: Predictions) -> None:
        """Any prediction fits."""

    def columns(self, batch: Predictions) -> dict[str, Any]:
        return batch.columns or {"prediction": list(batch.values if batch.values is not None else ())}

    def write(self) -> None:
        """There is nothing to write."""


class TableFile(PredictionFile):
    """A table; in Parquet a prediction may be an array of numbers."""

    def check(self, batch: Predictions) -> None:
        if not batch.columns and self.path.suffix == ".csv":
            raise UserError(
                f"-o {self.path}: each prediction has the shape {_shape(batch)}, and a cell of a CSV file holds one "
                "value; write a .npy array, FOLDER/ with a file for each sample, or a .parquet table"
            )

    def columns(self, batch: Predictions) -> dict[str, Any]:
        if batch.columns:
            return batch.columns
        assert batch.values is not None
        return {"prediction": batch.values.tolist()}

    def write(self) -> None:
        _write_table(self.table(), self.path)


class ArrayFile(PredictionFile):
    """One array of all predictions, and beside it a table of the sample of each row."""

    def __init__(self, path: Path):
        super().__init__(path)
        self._arrays: list[np.ndarray] = []

    def check(self, batch: Predictions) -> None:
        if batch.values is None:
            raise UserError(f"-o {self.path}: text is written as a .csv or .parquet table")
        if self._arrays and batch.values.shape[1:] != self._arrays[0].shape[1:]:
            raise UserError(
                f"-o {self.path}: predictions of different shapes, {_shape(Predictions({}, self._arrays[0]))} and "
                f"{_shape(batch)}, are no array; write FOLDER/ with a file for each sample"
            )
        self._arrays.append(batch.values)

    def write(self) -> None:
        temporary = self.path.with_name(f".{self.path.name}.part")
        with temporary.open("wb") as file:
            np.save(file, np.concatenate(self._arrays), allow_pickle=False)
        temporary.replace(self.path)
        _write_table(self.table(), self.path.with_suffix(".csv"))


class PredictionFolder(PredictionFile):
    """A folder with a file for each sample, PNG for maps of classes or .npy, and predictions.csv of which it is."""

    def __init__(self, path: Path):
        super().__init__(path)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"-o {path}/: expected a folder that is empty or not there yet, for a file for each sample")
        self._folder = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        self._count = 0

    def check(self, batch: Predictions) -> None:
        if batch.values is None or batch.values.ndim < 2:
            raise UserError(f"-o {self.path}/: each prediction is one value; write a .csv or .parquet table")

    def columns(self, batch: Predictions) -> dict[str, Any]:
        assert batch.values is not None
        names = []
        for values in batch.values:
            picture = values.ndim == 2 and values.dtype in (np.uint8, np.uint16)
            names.append(f"{self._count:06d}.{'png' if picture else 'npy'}")
            if picture:
                from PIL import Image

                Image.fromarray(values).save(self._folder / names[-1])
            else:
                np.save(self._folder / names[-1], values, allow_pickle=False)
            self._count += 1
        return {"prediction": names, **batch.columns}

    def write(self) -> None:
        _write_table(self.table(), self._folder / "predictions.csv")
        mask = os.umask(0)
        os.umask(mask)
        self._folder.chmod(0o777 & ~mask)  # as mkdir would have made it; a temporary one is its owner's alone
        self._folder.replace(self.path)

    def discard(self) -> None:
        """Remove what was not written completely."""
        shutil.rmtree(self._folder, ignore_errors=True)


def open_predictions(out: str) -> PredictionFile:
    """Return the file for predictions, by the format of `out`; raises UserError for an invalid one."""
    path = Path(out)
    folder = out.endswith("/") or path.is_dir()
    kinds: dict[str, type[PredictionFile]] = {".csv": TableFile, ".parquet": TableFile, ".npy": ArrayFile}
    if path.is_symlink() or not path.parent.is_dir():
        raise UserError(f"-o {out}: expected a place in a folder that exists, and not a symbolic link")
    if not folder and path.suffix not in kinds:
        raise UserError(f"-o {out}: predictions are written as {_FORMS}")
    return PredictionFolder(path) if folder else kinds[path.suffix](path)


def _shape(batch: Predictions) -> str:
    assert batch.values is not None
    return " × ".join(map(str, batch.values.shape[1:]))


def _in_utf8(values: Any) -> Any:
    """Return a column with its text in UTF-8, in which tables are kept: files may be called anything."""
    is_text = isinstance(values, list) or (isinstance(values, np.ndarray) and values.dtype.kind in "OU")
    return [in_utf8(each) if isinstance(each, str) else each for each in values] if is_text else values


def _write_table(table: pd.DataFrame, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.part")
    if path.suffix == ".csv":
        write_csv(table, temporary)
    else:
        table.to_parquet(temporary, index=False)
    temporary.replace(path)
