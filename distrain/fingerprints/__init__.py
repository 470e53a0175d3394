"""What a run depends on besides its recipe: its data, the user's code, and the files that its model starts from.

    files.py      files: names, sizes, and as much of their content as is cheap
    code.py       the files of code that a recipe names, and those of the same project that they import
    items.py      a few samples of data of which no files are known
    comparing.py  two fingerprints, and what of them differs, in words

A fingerprint is a mapping of JSON values. It is stored in each checkpoint and in the run's folder, and holds enough to
say what has changed. Paths in it are relative to those in the recipe, so that a project may be moved as a whole. To
import this room imports no torch.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distrain.config import Recipe
from distrain.fingerprints.code import code_of, named_objects, own_module
from distrain.fingerprints.comparing import DRAWN_ANEW, Changes, compare
from distrain.fingerprints.files import MOST_STATED, listing, placed, walk
from distrain.fingerprints.items import items_of

if TYPE_CHECKING:
    from distrain.datasets.base import Data

__all__ = ["DRAWN_ANEW", "Changes", "compare", "fingerprint", "named_objects", "own_module"]


def fingerprint(
    recipe: Recipe, data: Data, total_steps: int | None, place: Path, *, items: bool = True
) -> dict[str, Any]:
    """Return what a run of this recipe depends on, as JSON values.

    `place` is the run's folder, or a checkpoint in it: a folder that holds it is that of a project, and no data.
    Without `items` there are no samples and no numbers of them.

    - `data`: `files.listing` of the files that the data set reads
    - `model`: the same of files that the sections name of which a model, a loss, an optimizer and metrics are built
    - `folder`: the same of folders that are handed to the user's own code, which reads what it likes of them
    - `splits`: the number of samples in each, None for a stream
    - `items`: a few samples, where no files are known that they come from (`items.items_of`)
    - `code`: `code.code_of`
    - `total_steps`
    """
    from distrain.datasets.base import is_stream

    section = recipe.data
    full = section.fingerprint == "full"
    found: dict[str, Any] = {
        "total_steps": total_steps if items else None,
        "code": code_of(recipe),
        "model": listing(_of_parts(recipe), full=full),
    }
    if section.fingerprint == "off":
        return found
    if items:
        found["splits"] = {name: None if is_stream(each) else len(each) for name, each in data.splits.items()}
    arguments = {key: value for key, value in section.model_dump(mode="json").items() if key not in ("path", "split")}
    roots = _roots(section.path, section.split)
    if data.files:
        read = placed(data.files, roots) | _named(arguments, "data.")[0]
    else:
        read, folders = _named(arguments, "data.", separately=True)
        for path, label in roots.items():
            (folders if os.path.isdir(path) else read).update(_at(path, label))
        inside = os.path.abspath(place)
        holding = [root for root in (*roots, *_paths(arguments)) if inside.startswith(f"{root.rstrip(os.sep)}{os.sep}")]
        found["folder"] = listing({} if holding else folders, full=full)
        if items:
            found["items"] = items_of(data)
    found["data"] = listing(read, full=full)
    return found


def _roots(path: str | None, split: Any) -> dict[str, str]:
    """Return what data.path and data.split name, each with what is put before the names of its files."""
    roots = {} if path is None else {os.path.abspath(path): ""}
    for name, each in split.items() if isinstance(split, dict) else ():
        if path is not None or os.path.isabs(each):  # else a name that the user's code knows
            roots[os.path.abspath(os.path.join(path or "", each))] = f"{name}/"
    return {root: label for root, label in roots.items() if os.path.exists(root)}


def _of_parts(recipe: Recipe) -> dict[str, str]:
    parts = {"model": recipe.model, "loss": recipe.loss, "optim": recipe.optim, "eval": recipe.eval}
    found: dict[str, str] = {}
    for key, part in parts.items():
        values = part.model_dump(mode="json") if part is not None else None
        if isinstance(values, dict):
            found |= _named(values, f"{key}.")[0]
    return found


def _paths(value: Any) -> Iterator[str]:
    """Yield the files and folders that are named in values of a recipe: absolute, or as the user's code opens them."""
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _paths(each)
    elif isinstance(value, str) and (os.path.isabs(value) or value.startswith(("./", "../"))) and os.path.exists(value):
        yield os.path.abspath(value)


def _named(section: dict[str, Any], prefix: str, separately: bool = False) -> tuple[dict[str, str], dict[str, str]]:
    """Return the files that a section names by their labels, and those in folders that it names; together, or apart."""
    files: dict[str, str] = {}
    inside: dict[str, str] = {}
    for key, value in section.items():
        for path in _paths(value):
            (inside if separately and os.path.isdir(path) else files).update(_at(path, f"{prefix}{key}: "))
    return files, inside


def _at(path: str, label: str) -> dict[str, str]:
    if not os.path.isdir(path):
        return {label + os.path.basename(path): path}
    return {label + file[len(path.rstrip(os.sep)) + 1 :]: file for file in itertools.islice(walk(path), MOST_STATED)}
