"""Fingerprints of what a run depends on besides its recipe: data, the user's code, and the model's initial files.

    files.py      files: names, sizes, and as much of their content as is cheap
    code.py       the files of code that a recipe names, and those of the same project that they import
    items.py      a few samples of data whose files are unknown
    comparing.py  the differences between two fingerprints

A fingerprint is a mapping of JSON values. It is stored in each checkpoint and in the run's folder, and shows what has
changed. Its paths are relative to those in the recipe, so that a project may be moved. Imports no torch.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distrain.config import Recipe
from distrain.fingerprints.code import CodeFile, code_files, code_of, named_objects, user_module
from distrain.fingerprints.comparing import DRAWN_ANEW, Changes, compare, same_file
from distrain.fingerprints.files import MAX_SIZED, labelled, listing, walk
from distrain.fingerprints.items import beginning, items_of, same_item

if TYPE_CHECKING:
    from distrain.datasets.base import Data

__all__ = [
    "DRAWN_ANEW",
    "Changes",
    "CodeFile",
    "beginning",
    "changed_weights",
    "code_files",
    "compare",
    "fingerprint",
    "items_of",
    "named_objects",
    "same_file",
    "same_item",
    "user_module",
]


def fingerprint(
    recipe: Recipe, data: Data, total_steps: int | None, place: Path, *, items: bool = True
) -> dict[str, Any]:
    """Return the fingerprint of a run of this recipe.

    `place` is the run's folder, or a checkpoint in it: a folder that contains it is a project, not data. Without
    `items` there are no samples and no sizes of splits.

    - `data`: `files.listing` of the files that the data set reads
    - `model`: the same of files named in the sections of the model, loss, optimizer and evaluation
    - `arguments`: the same of files that sections name without `./`, such as `teacher.pt`, and of a schedule's; not of
      callbacks, which write files as well
    - `folder`: the same of folders that the recipe gives to the user's code, which may read any of their files
    - `splits`: the number of samples in each, None for a stream
    - `items`: a few samples, if the files that they come from are unknown (`items.items_of`)
    - `changing`: the splits of which samples are others each time that they are read
    - `code`: `code.code_of`
    - `total_steps`
    """
    from distrain.datasets.base import is_stream

    section = recipe.data
    full = section.fingerprint == "full"
    found: dict[str, Any] = {
        "total_steps": total_steps if items else None,
        "code": code_of(recipe),
        "model": listing(_model_files(recipe), full=full),
        "arguments": listing(_argument_files(recipe), full=full),
    }
    if section.fingerprint == "off":
        return found
    if items:
        found["splits"] = {name: None if is_stream(each) else len(each) for name, each in data.splits.items()}
    arguments = {key: value for key, value in section.model_dump(mode="json").items() if key not in ("path", "split")}
    roots = _roots(section.path, section.split)
    if data.files:
        read = labelled(data.files, roots) | _named(arguments, "data.")
    else:
        read, folders = _named(arguments, "data.", folders=False), _named(arguments, "data.", files=False)
        for path, label in roots.items():
            (folders if os.path.isdir(path) else read).update(_at(path, label))
        inside = os.path.abspath(place)
        holding = [root for root in (*roots, *_paths(arguments)) if inside.startswith(f"{root.rstrip(os.sep)}{os.sep}")]
        found["folder"] = listing({} if holding else folders, full=full)
        if items:
            changing: set[str] = set()
            found["items"] = items_of(data, changing)
            found["changing"] = sorted(changing)
    found["data"] = listing(read, full=full)
    return found


def changed_weights(then: dict[str, Any], recipe: Recipe, key: str) -> tuple[str, ...]:
    """Return how the files of initial weights, which `key` of the recipe names, differ from those of a fingerprint."""
    now = listing(_model_files(recipe), full=recipe.data.fingerprint == "full")
    found = compare({"model": then.get("model")}, {"model": now}).model
    return tuple(line for line in found if f" {key}: " in line)


def _roots(path: str | None, split: Any) -> dict[str, str]:
    """Return {path: prefix of its files' labels} of data.path and data.split."""
    roots = {} if path is None else {os.path.abspath(path): ""}
    for name, each in split.items() if isinstance(split, dict) else ():
        if path is not None or os.path.isabs(each):  # else a name that only the user's code can resolve
            roots[os.path.abspath(os.path.join(path or "", each))] = f"{name}/"
    return {root: label for root, label in roots.items() if os.path.exists(root)}


def _model_files(recipe: Recipe) -> dict[str, str]:
    parts = recipe.model_dump(mode="json", include={"task", "model", "loss", "optim", "eval"})
    found: dict[str, str] = {}
    for key, part in parts.items():
        found |= _named(part, f"{key}.")
    return found


def _argument_files(recipe: Recipe) -> dict[str, str]:
    sections = {"task", "model", "loss", "optim", "eval", "schedule"}
    sections |= {"data"} if recipe.data.fingerprint != "off" else set()
    found: dict[str, str] = {}
    for key, part in recipe.model_dump(mode="json", include=sections, exclude={"data": {"path", "split"}}).items():
        found |= _named(part, f"{key}.", _plain_files)
        if key == "schedule":
            found |= _named(part, f"{key}.")
    return found


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _strings(each)
    elif isinstance(value, str):
        yield value


def _is_explicit(text: str) -> bool:
    return os.path.isabs(text) or text.startswith(("./", "../"))


def _paths(value: Any) -> Iterator[str]:
    """Yield the files and folders that values of a recipe name, absolute or from `./` on."""
    for text in _strings(value):
        if _is_explicit(text) and os.path.exists(text):
            yield os.path.abspath(text)


def _plain_files(value: Any) -> Iterator[str]:
    """Yield the files that are named without `./`; a word such as a model's name is none, though a file may have it."""
    for text in _strings(value):
        if not _is_explicit(text) and (os.sep in text or os.path.splitext(text)[1]) and os.path.isfile(text):
            yield os.path.abspath(text)


def _named(
    section: Any,
    prefix: str,
    paths: Callable[[Any], Iterator[str]] = _paths,
    *,
    files: bool = True,
    folders: bool = True,
) -> dict[str, str]:
    """Return {label: path} of the files that a section names, and of those in folders that it names."""
    found: dict[str, str] = {}
    for key, value in section.items() if isinstance(section, dict) else ():
        for path in paths(value):
            if folders if os.path.isdir(path) else files:
                found.update(_at(path, f"{prefix}{key}: "))
    return found


def _at(path: str, label: str) -> dict[str, str]:
    if not os.path.isdir(path):
        return {label + os.path.basename(path): path}
    return {label + file[len(path.rstrip(os.sep)) + 1 :]: file for file in itertools.islice(walk(path), MAX_SIZED)}
