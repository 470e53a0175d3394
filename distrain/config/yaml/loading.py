"""Load, dump and show recipes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from distrain.config import Recipe
from distrain.config.yaml.document import Document, read_text, read_tree
from distrain.config.yaml.strict_yaml import Tree, dotted, leaves, to_yaml
from distrain.config.yaml.validation import validate
from distrain.system.output import one_line


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe and where each of its values came from."""

    recipe: Recipe
    origins: Mapping[str, str]
    """For each dotted key of the whole recipe: "default", "FILE:LINE" or "command line"."""
    folder: Path
    """The recipe file's folder, against which its relative paths were resolved."""


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Read, override and validate the recipe at `path`.

    Each of `overrides` is `dotted.key=value`, the value written as in the file: `optim.lr=3e-4`,
    `data.split=[0.7,0.3]`, `model.layers.2.p=0.1`, `optim.clip_norm=null`. It replaces the entire value of the key; the
    last of several wins. Relative paths in the file start from its folder, those in overrides from the current one.

    Raises RecipeError with every problem and its place.
    """
    return _loaded(_document(path, overrides), Path(path).parent)


def given_values(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return what a recipe and overrides say, without defaults: bare names as mappings, and paths absolute.

    `values_text` of it is a recipe that further overrides change as they would change this one, in any folder. Raises
    RecipeError where `load_recipe` does.
    """
    document = _document(path, overrides)
    _loaded(document, Path(path).parent)
    return document.value


def values_text(values: Mapping[str, Any]) -> str:
    """Return values as YAML."""
    return to_yaml(dict(values))


def _document(path: str | Path, overrides: Sequence[str]) -> Document:
    document = Document(str(path), read_tree(read_text(Path(path)), str(path)))
    for override in overrides:
        document.override(override)
    return document


def _loaded(document: Document, folder: Path) -> LoadedRecipe:
    document.resolve(folder)
    recipe = validate(document)
    origins = {dotted(place): document.origin(place) for place, _ in leaves(recipe.model_dump(mode="json"))}
    return LoadedRecipe(recipe, origins, Path(os.path.abspath(folder)))


def build_recipe(base: str | Path | Mapping[str, Any], changes: Mapping[str, Any]) -> LoadedRecipe:
    """Return the recipe of a file, or of values in Python, with `changes` by dotted key.

    Values are of JSON's types. Each change replaces the entire value of its key. Relative paths in values of Python
    start from the current folder. Raises RecipeError with every problem and its place.
    """
    if isinstance(base, Mapping):
        document = Document("the recipe", Tree({}))
        for key, value in base.items():
            document.put(key, value)
        folder = Path.cwd()
    else:
        document = Document(str(base), read_tree(read_text(Path(base)), str(base)))
        folder = Path(base).parent
    for key, value in changes.items():
        document.put(key, value)
    return _loaded(document, folder)


def parse_recipe(text: str, source: str, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe in `text`, written by `dump_recipe` with absolute paths; `source` names it in errors.

    `overrides`: as in `load_recipe`.
    """
    document = Document(source, read_tree(text, source))
    for override in overrides:
        document.override(override)
    document.resolve(Path.cwd())
    return validate(document)


@lru_cache(maxsize=8)
def _yaml_of(values: str) -> str:
    """Return JSON as YAML, remembered: every checkpoint of a run holds the same recipe."""
    return to_yaml(json.loads(values))


def dump_recipe(recipe: Recipe, origins: Mapping[str, str] | None = None) -> str:
    """Return the recipe as YAML that loads as an equal one; with `origins`, each line ends with its origin."""
    text = _yaml_of(recipe.model_dump_json())
    if origins is None:
        return text
    lines = text.splitlines()
    tree = Tree.parse(text)
    for place, _ in leaves(tree.value):
        lines[tree.lines[place] - 1] += f"  # {one_line(origins[dotted(place)])}"  # a file may be called anything
    return "\n".join(lines) + "\n"


def shown_value(key: str, value: object) -> str:
    """Return the value of a key for a message; of `loss`, what null means."""
    if value is None or value == "null":
        return "null (the task's own loss)" if key == "loss" else "null"
    return str(value)


def show(loaded: LoadedRecipe) -> list[tuple[str, str, str]]:
    """Return (key, value, origin) for every value of a recipe; `key=value` is how an override would write it."""
    return [
        (key, to_yaml([value], flow=True).strip()[1:-1], loaded.origins[key])
        for place, value in leaves(loaded.recipe.model_dump(mode="json"))
        for key in [dotted(place)]
    ]
