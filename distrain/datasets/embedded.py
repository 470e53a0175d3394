"""Small real data sets that come with scikit-learn: nothing to download, for first runs and tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from distrain.config import UserError, close_names
from distrain.config.registry import datasets
from distrain.datasets.base import AnySource, Data, DataMeta, DataRequest, Source, TensorSource, split_indices
from distrain.datasets.images import ImageFiles, image_paths, pixels_from_npy
from distrain.datasets.table_numbers import parse_numbers
from distrain.system.output import error_line


@datasets.register("digits", tasks=("classification",))
def digits(request: DataRequest) -> Data:
    """Handwritten digits: 1 797 grey images of 8 × 8 in 10 classes, inputs (1, 8, 8) float32 in [0, 1].

    For prediction: an image or a folder of them, light strokes on dark ground, or a .npy of pixels 0..16.
    """
    from distrain.datasets.sklearn_files import load_digits

    bunch = load_digits()
    labels = bunch.target.astype(np.int64)
    images = torch.from_numpy(bunch.data.reshape(-1, 1, 8, 8) / 16).to(request.dtype)
    whole = TensorSource(images, torch.from_numpy(labels))
    cut = split_indices(len(whole), request.section, request.seed, labels)
    names = tuple(map(str, bunch.target_names))
    meta = DataMeta(input_shape=(1, 8, 8), num_classes=len(names), class_names=names)

    def read(path: Path) -> Source:
        if path.suffix == ".npy":
            return TensorSource(pixels_from_npy(path, (8, 8), "gray", (0, 16)).to(request.dtype) / 16, None)
        return ImageFiles(image_paths(path), None, (8, 8), "gray", root=path if path.is_dir() else None)

    return Data({name: whole.select(indices) for name, indices in cut.items()}, meta, {}, read)


@datasets.register("iris", tasks=("classification",))
def iris(request: DataRequest, standardize: bool = True) -> Data:
    """Iris: 150 flowers in 3 species, inputs (4,) float32: lengths and widths in cm, standardised."""
    from distrain.datasets.sklearn_files import load_iris

    return _table(request, load_iris(), standardize)


@datasets.register("wine", tasks=("classification",))
def wine(request: DataRequest, standardize: bool = True) -> Data:
    """Wine: 178 wines of 3 growers, inputs (13,) float32: chemical analyses, standardised."""
    from distrain.datasets.sklearn_files import load_wine

    return _table(request, load_wine(), standardize)


@datasets.register("breast_cancer", tasks=("binary", "classification"))
def breast_cancer(request: DataRequest, standardize: bool = True) -> Data:
    """Breast cancer: 569 tumours, malignant (0) or benign (1), inputs (30,) float32, standardised."""
    from distrain.datasets.sklearn_files import load_breast_cancer

    return _table(request, load_breast_cancer(), standardize)


@datasets.register("diabetes", tasks=("regression",))
def diabetes(request: DataRequest, standardize: bool = True, standardize_target: bool = False) -> Data:
    """Diabetes: 442 patients, inputs (10,) float32, standardised; the target is the progression in a year, 25 to 346.

    With `standardize_target` the model sees targets of mean 0 and deviation 1; metrics stay in the target's own units.
    """
    from distrain.datasets.sklearn_files import load_diabetes

    return _table(request, load_diabetes(), standardize, standardize_target)


def _table(request: DataRequest, bunch: Any, standardize: bool, standardize_target: bool = False) -> Data:
    """Split a table and standardise it by the mean and deviation of the training rows alone."""
    features = bunch.data.astype(np.float64)
    regression = request.task == "regression"
    labels = None if regression else bunch.target.astype(np.int64)
    cut = split_indices(len(features), request.section, request.seed, labels)
    if request.state is None:
        state = _moments(features[cut["train"]], "feature") if standardize else {}
        if standardize_target:
            state |= _moments(bunch.target[cut["train"], None], "target")
    else:
        state = dict(request.state)

    targets = torch.from_numpy(bunch.target).to(torch.int64 if request.task == "classification" else request.dtype)
    if "target_mean" in state:
        standardised = (bunch.target - state["target_mean"][0]) / state["target_std"][0]
        targets = torch.from_numpy(standardised).to(request.dtype)
    inputs = _standardized(features, state, request.dtype)
    splits: dict[str, AnySource] = {
        name: TensorSource(inputs[indices], targets[indices]) for name, indices in cut.items()
    }
    names = tuple(map(str, bunch.feature_names))
    classes = () if regression else tuple(map(str, bunch.target_names))
    meta = DataMeta(
        input_shape=(len(names),),
        num_classes=len(classes) or None,
        class_names=classes or None,
        num_targets=1 if regression else None,
        feature_names=names,
        target_mean=tuple(state.get("target_mean", ())) or None,
        target_std=tuple(state.get("target_std", ())) or None,
    )
    return Data(splits, meta, state, lambda path: _read_rows(path, names, state, request.dtype))


def _moments(values: np.ndarray, what: str) -> dict[str, list[float]]:
    deviation = values.std(axis=0)
    # a constant column carries no information; dividing by 1 leaves it at 0
    deviation[deviation == 0] = 1
    return {f"{what}_mean": values.mean(axis=0).tolist(), f"{what}_std": deviation.tolist()}


def _standardized(features: np.ndarray, state: dict[str, Any], dtype: torch.dtype) -> torch.Tensor:
    if "feature_mean" in state:
        features = (features - np.array(state["feature_mean"])) / np.array(state["feature_std"])
    return torch.from_numpy(features).to(dtype)


def _read_rows(path: Path, names: tuple[str, ...], state: dict[str, Any], dtype: torch.dtype) -> Source:
    """Read a CSV or Parquet file with a column for every feature; ignores other columns."""
    import pandas as pd
    import pyarrow as pa

    if path.suffix not in (".csv", ".parquet"):
        raise UserError(f"{path}: expected a .csv or .parquet file with the columns {', '.join(names)}")
    try:
        frame = pd.read_csv(path, dtype=str) if path.suffix == ".csv" else pd.read_parquet(path)
    except Exception as error:
        raise UserError(f"{path} cannot be read: {error_line(error)}") from error
    if missing := [name for name in names if name not in frame.columns]:
        each = ", ".join(f"{name!r}{close_names(name, map(str, frame.columns))}" for name in missing)
        raise UserError(f"{path} lacks the columns {each}")
    if path.suffix == ".csv":
        texts = [pa.chunked_array([pa.array(frame[name], pa.string(), from_pandas=True)]) for name in names]
        values = np.column_stack([parse_numbers(each) for each in texts])
    else:
        values = frame[list(names)].apply(pd.to_numeric, errors="coerce").to_numpy(np.float64)
    if not np.isfinite(values).all():
        row, column = np.argwhere(~np.isfinite(values))[0]
        raise UserError(f"{path}: row {row + 1}, column {names[column]!r} is not a finite number")
    return TensorSource(_standardized(values, state, dtype), None)
