"""A recipe from a file, a dict or another recipe, with the objects that are given in Python and what is changed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distrain.api.objects import Objects, plain
from distrain.config import Recipe, UserError
from distrain.config.yaml import LoadedRecipe, build_recipe
from distrain.system.numbers import a_kind

_COMPONENTS = ("task", "data", "model", "loss", "optim", "schedule")
_LISTS = {("eval", "metrics"): "metrics", ("log", "trackers"): "trackers"}


def read_recipe(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    objects: Objects,
    given: Mapping[str, Any],
    overrides: Mapping[str, Any],
) -> LoadedRecipe:
    """Return the recipe; `objects` gets what it holds that has no name.

    `given` takes the place of whole sections: task, model, data, loss, metrics, callbacks. `overrides`: keys,
    `optim={"lr": 0.1}`, `optim__lr=0.1` or `**{"optim.lr": 0.1}`. Raises RecipeError, and UserError for an object.
    """
    if isinstance(recipe, Recipe):
        recipe = recipe.model_dump(mode="json")
    base: str | Path | dict[str, Any]
    if isinstance(recipe, Mapping):
        base = {str(key): _section(str(key), value, objects) for key, value in recipe.items()}
    elif isinstance(recipe, str | Path):
        base = recipe
    else:
        raise UserError(
            f"recipe: found {a_kind(recipe)}; expected the path of a recipe or of a run, a dict or a Recipe"
        )
    changes: dict[str, Any] = {}
    for key, value in given.items():
        if key in _COMPONENTS:
            changes |= _changes(key, value, objects)
        else:
            changes["eval.metrics" if key == "metrics" else key] = _components(key, value, objects)
    for key, value in overrides.items():
        for changed, to in _changes(key.replace("__", "."), value, objects).items():
            if changed in changes and changes[changed] != to:
                raise UserError(f"{changed}: given twice, as {changes[changed]!r} and {to!r}; remove one of them")
            changes[changed] = to
    return build_recipe(base, changes)


def _section(key: str, value: Any, objects: Objects) -> Any:
    """Return a value of a recipe's top level, with specs in place of objects."""
    if key in _COMPONENTS and value is not None:
        return objects.component(key, value)
    if key == "callbacks" and value is not None:
        return _components(key, value, objects)
    if isinstance(value, Mapping):
        return {
            str(name): _components(_LISTS[key, str(name)], each, objects)
            if (key, str(name)) in _LISTS and each is not None
            else plain(each, f"{key}.{name}")
            for name, each in value.items()
        }
    return plain(value, key)


def _components(key: str, value: Any, objects: Objects) -> list[Any]:
    if isinstance(value, str) or not isinstance(value, list | tuple):
        raise UserError(f"{key}: found {value!r}; expected a list, as in {key}=[...]")
    return [objects.component(key, each) for each in value]


def _changes(key: str, value: Any, objects: Objects) -> dict[str, Any]:
    """Return what an override changes by dotted key: of a section only the keys that it holds.

    One that names another component takes the place of the section, whose further keys were the other's arguments.
    """
    section, _, inner = key.partition(".")
    if not inner:
        found = _section(key, value, objects)
        if isinstance(found, dict) and "name" not in found:
            return {f"{key}.{name}": each for name, each in found.items()}
        return {key: found}
    if (section, inner) in _LISTS:
        return {key: _components(_LISTS[section, inner], value, objects) if value is not None else None}
    if inner == "name" and section in _COMPONENTS:
        found = objects.component(section, value)
        return {f"{section}.{name}": each for name, each in found.items()} if isinstance(found, dict) else {key: found}
    return {key: plain(value, key)}
