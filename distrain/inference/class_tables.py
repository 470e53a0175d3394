"""Counts of what is predicted for what is true: the confusion matrix, each class, and calibration."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from distrain.config import Form
from distrain.datasets.base import DataMeta
from distrain.optim.losses.classes import class_dim

_BINS = 10
_MOST = 64
"""Classes of a confusion matrix that is returned whole."""
_PAIRS, _LISTED = 10, 200
"""Confused pairs and classes that are listed."""
_COUNTED = 4096
"""Classes up to which a matrix is counted: 128 MiB."""


class ClassTables:
    """Counts over batches, of what metrics count. Each method takes tensors on the CPU."""

    def __init__(self, form: Form, meta: DataMeta, is_probability: bool, ignored: int | None = None):
        """`ignored`: the target that the loss ignores, which may be the number of a class."""
        self._form, self._meta, self._is_probability, self._ignored = form, meta, is_probability, ignored
        self._matrix: np.ndarray | None = None
        """(classes, classes) int64, true by predicted; of multilabel (labels, 2, 2)."""
        self._bins = np.zeros((_BINS, 3))
        """(bins, 3): how many, the sum of how sure, how many right."""

    def add(self, values: Tensor, targets: Tensor, keep: Tensor) -> None:
        """Count a batch: outputs (batch, ...), `targets` (batch, ...), and `keep` (batch,) bool."""
        form = self._form
        values, targets = values[keep].double(), targets[keep]
        if not len(targets):
            return
        if form in ("classification", "segmentation", "token_classification"):
            if targets.is_floating_point():
                return  # shares of classes, of which none is the true one
            classes = values.movedim(class_dim(values, targets, form), -1).flatten(0, -2)
            flat = targets.flatten()
            there = (flat >= 0) & (flat < classes.shape[-1])
            if self._ignored is not None:
                there &= flat != self._ignored
            top = classes[there].softmax(-1).max(-1)
            self._count(flat[there], top.indices, classes.shape[-1])
            self._calibrate(top.values, top.indices == flat[there])
        elif form == "binary":
            two = values.dim() == 2 and values.shape[1] == 2
            score = values[:, 1] - values[:, 0] if two else values.reshape(len(values), -1)[:, 0]
            if values.dim() > 2 or targets.numel() != len(score):
                return
            sure = score if self._is_probability else score.sigmoid()
            guess, true = (sure > 0.5).long(), (targets.reshape(-1) > 0.5).long()
            self._count(true, guess, 2)
            self._calibrate(torch.where(guess == 1, sure, 1 - sure), guess == true)
        elif form == "multilabel" and values.dim() == 2 and targets.shape == values.shape:
            sure = values if self._is_probability else values.sigmoid()
            guess, true = (sure > 0.5).long(), (targets > 0.5).long()
            if self._matrix is None:
                self._matrix = np.zeros((values.shape[1], 2, 2), np.int64)
            for label in range(values.shape[1]):
                self._matrix[label] += _pairs(true[:, label], guess[:, label], 2)
            self._calibrate(torch.where(guess == 1, sure, 1 - sure).flatten(), (guess == true).flatten())

    def _count(self, true: Tensor, guess: Tensor, classes: int) -> None:
        if classes > _COUNTED:
            return
        if self._matrix is None:
            self._matrix = np.zeros((classes, classes), np.int64)
        self._matrix += _pairs(true, guess, classes)

    def _calibrate(self, sure: Tensor, right: Tensor) -> None:
        place = (sure * _BINS).long().clamp(0, _BINS - 1)
        for column, weight in enumerate((None, sure, right.double())):
            self._bins[:, column] += torch.bincount(place, weights=weight, minlength=_BINS).double().numpy()

    def found(self) -> dict[str, Any]:
        """Return `classes`, `confusion`, `confused`, `per_class` and `calibration`; {} where there are no classes.

        - `classes`: names; `confusion`: a row for each true class with the number of each predicted one, absent with
          more than 64 classes and for labels
        - `confused`: the pairs `true`, `predicted` of the greatest `count`
        - `per_class`: `name`, `support`, `predicted`, `precision`, `recall`, `f1`; `iou` of segmentation
        - `calibration`: `bins` (`low`, `high`, `count`, mean `confidence`, `accuracy`), and the expected calibration
          `error` over them (Naeini et al. 2015)
        """
        if self._matrix is None:
            return {}
        labels = self._matrix.ndim == 3
        names = self._names(len(self._matrix))
        result: dict[str, Any] = {
            "classes": names,
            "per_class": self._per_class(names),
            "calibration": self._calibration(),
        }
        if labels:
            return result
        if len(names) <= _MOST:
            result["confusion"] = self._matrix.tolist()
        wrong = self._matrix.copy()
        np.fill_diagonal(wrong, 0)
        order = np.argsort(-wrong, axis=None, kind="stable")[:_PAIRS]
        result["confused"] = [
            {"true": names[true], "predicted": names[guess], "count": int(wrong[true, guess])}
            for true, guess in zip(*np.unravel_index(order, wrong.shape), strict=True)
            if wrong[true, guess]
        ]
        return result

    def _names(self, count: int) -> list[str]:
        names = self._meta.class_names
        return list(map(str, names)) if names and len(names) == count else [str(index) for index in range(count)]

    def _per_class(self, names: list[str]) -> list[dict[str, Any]]:
        assert self._matrix is not None
        matrix = self._matrix
        if matrix.ndim == 3:
            hits, support, guessed = matrix[:, 1, 1], matrix[:, 1].sum(1), matrix[:, :, 1].sum(1)
        else:
            hits, support, guessed = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
        rows = []
        for name, hit, true, guess in zip(names, hits.tolist(), support.tolist(), guessed.tolist(), strict=True):
            row = {
                "name": name,
                "support": true,
                "predicted": guess,
                "precision": hit / guess if guess else None,
                "recall": hit / true if true else None,
                "f1": 2 * hit / (true + guess) if true + guess else None,
            }
            if self._form == "segmentation":
                union = true + guess - hit
                row["iou"] = hit / union if union else None
            rows.append(row)
        if len(rows) > _LISTED:  # those that are recognised the least
            rows = sorted(rows, key=lambda row: (row["f1"] is None, row["f1"]))[:_LISTED]
        return rows

    def _calibration(self) -> dict[str, Any]:
        total = self._bins[:, 0].sum() or 1.0
        bins = []
        for place, (count, sure, right) in enumerate(self._bins.tolist()):
            mean, share = (sure / count, right / count) if count else (0.0, 0.0)
            edges = {"low": place / _BINS, "high": (place + 1) / _BINS}
            bins.append({**edges, "count": int(count), "confidence": mean, "accuracy": share})
        error = sum(each["count"] / total * abs(each["confidence"] - each["accuracy"]) for each in bins)
        return {"bins": bins, "error": float(error)}


def _pairs(true: Tensor, guess: Tensor, classes: int) -> np.ndarray:
    counts: np.ndarray = torch.bincount(true * classes + guess, minlength=classes**2).reshape(classes, classes).numpy()
    return counts
