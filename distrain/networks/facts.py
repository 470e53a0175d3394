"""Facts of the data that a model may need: numbers of classes, channels, tokens."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from distrain.config import Form
from distrain.datasets.base import DataMeta

HEAD_NAMES = ("num_outputs", "num_classes", "num_labels", "out_features")
_DERIVED = ("in_features", "in_channels", "image_size", "seq_len", "cardinalities")


def num_outputs(task: Form, meta: DataMeta) -> int | None:
    """Return the outputs of the last layer (for each token, if tokens are predicted); None: unknown."""
    if task in ("classification", "segmentation", "token_classification"):
        return meta.num_classes
    if task == "binary":
        return 1
    if task == "multilabel":
        return meta.num_targets
    if task == "regression":
        return meta.num_targets or 1
    if task == "custom":
        return meta.num_classes or meta.num_targets or meta.vocab_size
    return meta.vocab_size if task == "language_modeling" else meta.target_vocab_size


def facts(task: Form, meta: DataMeta) -> dict[str, Any]:
    """Return the default arguments of a model, by parameter name.

    They are the known fields of `meta`; `num_outputs`, `num_classes`, `num_labels` and `out_features`, all the size of
    the last layer; and from the shape of a sample `in_features` (its numbers; of a table with `cardinalities` the
    numeric columns), `in_channels` and `image_size` (square images), or `seq_len` (tokens).
    """
    known = {field.name: getattr(meta, field.name) for field in dataclasses.fields(meta)}
    known |= dict.fromkeys(HEAD_NAMES, num_outputs(task, meta))
    shape = meta.input_shape
    if meta.vocab_size is not None:
        known["seq_len"] = meta.tokens_per_sample if shape is None else shape[0]
    elif shape is not None:
        known["in_features"] = math.prod(shape)
        if len(shape) >= 2:
            known["in_channels"] = shape[0]
        if len(shape) == 3 and shape[1] == shape[2]:
            known["image_size"] = shape[1]
    elif known.get("cardinalities") is not None and meta.feature_names is not None:
        known["in_features"] = len(meta.feature_names) - len(known["cardinalities"])
    return {name: value for name, value in known.items() if value is not None}


FACT_NAMES = {field.name for field in dataclasses.fields(DataMeta)} | {*HEAD_NAMES, *_DERIVED}
