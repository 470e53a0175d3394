"""What one process does before any other reads the data: data.prepare, and what is encoded once and kept."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from distrain.config import Recipe, UserError, resolve_object
from distrain.datasets.base import DataRequest, find_dataset
from distrain.system.output import error_line


def prepare_data(recipe: Recipe) -> bool:
    """Call the recipe's `data.prepare` if data.path does not exist; returns whether it was called.

    One process calls this before any other reads the data. The function gets a path of the same name in a temporary
    folder, which is renamed when it returns, so an interrupted call never passes for the data. Two runs that prepare
    the same data at once use a folder each; one result is kept.
    """
    spec, path = recipe.data.prepare, recipe.data.path
    if spec is None or path is None or (target := Path(path)).exists():
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".preparing-{target.name}-", dir=target.parent) as folder:
        made = Path(folder, target.name)
        try:
            resolve_object(spec)(made)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"data.prepare: {spec} failed: {error_line(error)}") from error
        if not made.exists():
            raise UserError(f"data.prepare: {spec} returned without writing to the path that it was called with")
        try:
            os.replace(made, target)
        except OSError:
            if not target.is_dir():  # a folder that another run prepared
                raise
    return True


def encode_ahead(recipe: Recipe) -> None:
    """Have a data set that keeps what it encodes do so, before several processes would at once."""
    entry = find_dataset(recipe.data, recipe.form)
    if (encode := entry.metadata.get("encode_ahead")) is not None:
        encode(DataRequest(recipe.data, recipe.form, recipe.seed), **recipe.data.args)
