"""What a model predicts, from its outputs: classes, probabilities, numbers in the targets' own units."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distrain.config import Form, UserError
from distrain.datasets.base import DataMeta
from distrain.optim.losses.classes import class_dim, is_of_tokens
from distrain.system.numbers import a_kind

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Predictions:
    """The predictions for the samples of a batch, in the terms of the targets."""

    columns: dict[str, Any]
    """For a table: one value for each sample. Empty for predictions that have dimensions of their own."""
    values: np.ndarray | None
    """(batch, ...) the numbers of classes, 0 and 1, or numbers in the targets' own units; None for text."""
    name: str = "prediction"
    """What `values` are called in a table."""
    parts: dict[str, np.ndarray] = field(default_factory=dict)
    """In place of both: (batch, ...) for each tensor of a nested prediction, by its name."""

    def keep(self, rows: np.ndarray) -> Predictions:
        """Return the predictions for which `rows` (batch,) is true."""
        columns = {
            name: np.asarray(each, dtype=object if name == "text" else None)[rows]
            for name, each in self.columns.items()
        }
        values = None if self.values is None else self.values[rows]
        return Predictions(columns, values, self.name, {name: each[rows] for name, each in self.parts.items()})

    @property
    def in_cells(self) -> dict[str, Any]:
        """The columns of a table: of the parts those of one number for each sample, and each number of a vector."""
        found = dict(self.columns)
        for name, each in self.parts.items():
            if each.ndim == 1 or (each.ndim == 2 and each.shape[1] == 1):
                found[name] = each.reshape(-1)
            elif each.ndim == 2:
                found |= {f"{name}_{at}": each[:, at] for at in range(each.shape[1])}
        return found

    @property
    def maps(self) -> dict[str, np.ndarray]:
        """The parts that are no cells: (batch, ...) of more than two dimensions."""
        return {name: each for name, each in self.parts.items() if each.ndim > 2}


def nested(outputs: Any, count: int) -> Predictions:
    """Return a prediction of several tensors, (count, ...) each, in dicts, tuples and lists of any depth.

    A tensor is called as its place: `boxes`, `boxes_0` of a tuple in it, and `prediction_0` of a tuple itself. Raises
    UserError for anything else in it, and for a tensor of other samples.
    """
    parts: dict[str, np.ndarray] = {}
    for place, name, each in _leaves(outputs, "predictions", ""):
        if not isinstance(each, Tensor):
            raise UserError(
                f"the task's {place} is {a_kind(each)}; expected a tensor (batch, ...), or dicts, tuples and "
                "lists of them; return such from its `predictions`, or write --output embeddings"
            )
        if each.dim() == 0 or len(each) != count:
            raise UserError(
                f"the task's {place} has the shape {tuple(each.shape)}; expected ({count}, ...), a row for each of the "
                f"{count} samples of the batch"
            )
        taken = {*parts, *Predictions({}, None, parts=parts).in_cells}
        each = each.detach().cpu()
        values = (each.float() if each.dtype == torch.bfloat16 else each).numpy()
        if clash := sorted(taken & {name, *Predictions({}, None, parts={name: values}).in_cells}):
            raise UserError(f"the task's predictions have two tensors for the column {clash[0]!r}; rename one of them")
        parts[name] = values
    if not parts:
        raise UserError("the task's predictions are empty; return at least one tensor (batch, ...)")
    return Predictions({}, None, parts=parts)


def _leaves(value: Any, place: str, name: str) -> Iterator[tuple[str, str, Any]]:
    """Yield (place in the code, name of a column, value) of what a nesting holds."""
    if isinstance(value, Mapping):
        items = [(f"[{key!r}]", str(key), each) for key, each in value.items()]
    elif isinstance(value, tuple | list):
        fields = getattr(value, "_fields", range(len(value)))
        items = [(f"[{at}]", str(key), each) for at, (key, each) in enumerate(zip(fields, value, strict=True))]
        name = name or ("" if hasattr(value, "_fields") else "prediction")
    else:
        yield place, name, value
        return
    for where, key, each in items:
        yield from _leaves(each, place + where, f"{name}_{key}" if name else key)


def predicted(task: Form, outputs: Tensor, targets: Tensor | None, meta: DataMeta, is_probability: bool) -> Predictions:
    """Return what outputs (batch, k), (batch,), or with more dimensions, predict: read as losses and metrics read them.

    `targets`, where there are any, tell which dimension is that of the classes. `is_probability`: whether outputs of
    binary and multilabel are probabilities, and not logits.
    """
    outputs = outputs.double()
    if task in ("classification", "segmentation"):
        return _classes(outputs.movedim(_class_dim(outputs, targets, meta), 1), meta)
    if task == "token_classification":
        return _classes(outputs.movedim(-1, 1), meta)
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


def predicted_tags(
    outputs: Tensor, targets: Tensor | None, places: Sequence[np.ndarray], meta: DataMeta
) -> Predictions:
    """Return the tag of each token of outputs (samples, seq, classes): a list for each sample, of all its tokens.

    `places`: where each token of a sample begins; where that is -1, it was cut, and its tag is None.
    """
    found = _classes(outputs.movedim(-1, 1), meta)
    assert found.values is not None

    def tags(values: np.ndarray) -> np.ndarray:
        lists = np.empty(len(values), dtype=object)
        for row, (numbers, first) in enumerate(zip(values.tolist(), places, strict=True)):
            lists[row] = [class_label(numbers[place], meta) if place >= 0 else None for place in first.tolist()]
        return lists

    columns = {"tags": tags(found.values)}
    return Predictions(columns | ({} if targets is None else {"target": tags(targets.numpy())}), found.values)


def class_label(number: int, meta: DataMeta) -> str:
    """Return the name of a class; the number itself where there is no such class, as of a target that is ignored."""
    names = meta.class_names
    return names[number] if names is not None and 0 <= number < len(names) else str(number)


def _labels_of(numbers: Tensor, meta: DataMeta) -> list[Any]:
    """Return the classes of samples (batch,) by name; their numbers where no class has one."""
    found: list[int] = numbers.long().tolist()
    return [class_label(each, meta) for each in found] if meta.class_names else found


def raw_outputs(kind: str, values: Tensor, task: Form, meta: DataMeta, is_probability: bool) -> Predictions:
    """Return embeddings, logits or probabilities (batch, ...) as they are; those of a class or label by its name.

    Raises UserError for logits of a model whose outputs are probabilities.
    """
    if kind == "embeddings":
        return Predictions({}, values.numpy(), "embedding")
    name = {"logits": "logit", "probabilities": "probability"}[kind]
    if kind == "logits" and is_probability:
        raise UserError("--output logits: this model's outputs are probabilities; use --output probabilities")
    if kind == "probabilities" and not is_probability:
        if task in ("binary", "multilabel") and not (task == "binary" and values.dim() == 2 and values.shape[1] == 2):
            values = values.double().sigmoid()
        else:
            classes = values.dim() - 1 if is_of_tokens(task) else _class_dim(values, None, meta)
            values = values.double().softmax(classes)
    values = values.reshape(len(values), -1) if values.dim() == 1 else values
    if values.dim() > 2:
        return Predictions({}, values.numpy(), name)
    names = meta.class_names if meta.class_names and len(meta.class_names) == values.shape[1] else None
    keys = names or ([str(index) for index in range(values.shape[1])] if values.shape[1] > 1 else [""])
    columns = {f"{name}_{key}" if key else name: values[:, index].numpy() for index, key in enumerate(keys)}
    return Predictions(columns, values.numpy(), name)


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
    names = [class_label(index, meta) for index in range(outputs.shape[1])]  # a model may have more than the data
    columns: dict[str, Any] = {
        "prediction": _labels_of(top, meta),
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
    columns = {"prediction": _labels_of(probability > 0.5, meta), "probability": probability.numpy()}
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


def warn_of_classes(found: int | None, meta: DataMeta) -> None:
    """Warn where the outputs that a loss of classes has seen are for more classes than the data have."""
    if found is not None and meta.num_classes is not None and found > meta.num_classes:
        logger.warning(
            f"the model gives outputs for {found:,} classes, and the data have {meta.num_classes:,}: the others are "
            "never right. Where its forward returns features before logits, have it return the logits first, or "
            "{'logits': …}; otherwise give its last layer num_classes outputs"
        )


def target_columns(task: str, targets: Tensor, meta: DataMeta) -> dict[str, Any]:
    """Return the columns of what a batch should have been, (batch,) or (batch, k); none for more dimensions."""
    if targets.dim() > 2:
        return {}
    if task in ("classification", "binary") and targets.dim() == 1:
        # a probability is read as metrics read it
        return {"target": _labels_of(targets > 0.5 if task == "binary" else targets, meta)}
    columns = _as_in_data(targets.reshape(len(targets), -1), meta if task == "regression" else None)
    if columns.shape[1] == 1:
        return {"target": columns[:, 0]}
    names = meta.class_names if task == "multilabel" else None
    keys = names or [str(index) for index in range(columns.shape[1])]
    return {f"target_{key}": columns[:, index] for index, key in enumerate(keys)}


def _as_in_data(targets: Tensor, meta: DataMeta | None) -> np.ndarray:
    """Return targets (batch, k) as the data have them: of the numbers that were rounded to these the shortest."""
    wide = targets.double()
    values = (wide if meta is None else _unstandardized(wide, meta)).numpy()
    if not targets.is_floating_point():
        return values
    std = 1.0 if meta is None or meta.target_std is None else np.asarray(meta.target_std)
    rounded_by = torch.finfo(targets.dtype).eps / 2 * np.abs(wide.numpy()) * std
    rounded_by += 4 * np.finfo(np.float64).eps * np.abs(values)  # of computing them in the data's units
    found, open_ = values.copy(), np.isfinite(values)
    for decimals in range(16):
        shorter = np.round(values, decimals)
        fits = open_ & (np.abs(shorter - values) <= rounded_by)
        found[fits] = shorter[fits]
        open_ &= ~fits
    return found


def _unstandardized(values: Tensor, meta: DataMeta) -> Tensor:
    """Undo the standardising of targets (batch, k)."""
    if meta.target_std is None or meta.target_mean is None:
        return values
    std, mean = (torch.tensor(each, dtype=torch.float64) for each in (meta.target_std, meta.target_mean))
    return values * std + mean
