"""The facts of data as JSON values: what a checkpoint keeps, so that its model can be built without the data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from distrain.config import UserError
from distrain.datasets.base import DataMeta
from distrain.datasets.tables import TableMeta


def meta_to_json(meta: DataMeta) -> dict[str, Any]:
    """Return the facts as JSON values that `meta_from_json` reads: all but how to decode."""
    values = {field.name: getattr(meta, field.name) for field in fields(meta) if field.name != "decode"}
    return {key: [*each] if isinstance(each, tuple) else each for key, each in values.items() if each is not None}


def meta_from_json(values: Mapping[str, Any]) -> DataMeta:
    """Return the facts that `meta_to_json` wrote, of the class that has all of them."""
    kind = next(
        (each for each in (DataMeta, TableMeta) if values.keys() <= {field.name for field in fields(each)}), None
    )
    if kind is None:
        unknown = sorted(values.keys() - {field.name for field in fields(TableMeta)})
        raise UserError(f"the checkpoint was written with facts of the data that are not known: {', '.join(unknown)}")
    known: dict[str, Any] = {key: tuple(each) if isinstance(each, list) else each for key, each in values.items()}
    return kind(**known)
