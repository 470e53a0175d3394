"""data.prepare: a function of the user that makes the data where there are none."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from distrain.config import Recipe, UserError, resolve_object
from distrain.system.output import error_line


def prepare_data(recipe: Recipe) -> bool:
    """Call the recipe's `data.prepare` with data.path if nothing is there; return whether it was called.

    One process calls, before any other looks. The function gets a path of the same name in a folder beside, which is
    renamed when it returns: what an interrupted one leaves is never taken for the data. Of two runs that prepare the
    same data at once, each in a folder of its own, one is taken.
    """
    spec, path = recipe.data.prepare, recipe.data.path
    if spec is None:
        return False
    if path is None:
        raise UserError("data.prepare needs data.path: it is called with it when nothing is there")
    target = Path(path)
    if target.exists():
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
            raise UserError(f"data.prepare: {spec} returned, and there is nothing at the path that it was called with")
        try:
            os.replace(made, target)
        except OSError:
            if not target.is_dir():  # another one's, with something in it
                raise
    return True
