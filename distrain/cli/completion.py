"""What a shell completes behind `distrain`: keys of a recipe, runs, sites. Imports nothing slow until it is asked.

`distrain --install-completion` makes the shell ask; files are completed by the shell itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import typer

_NAMED = {
    "task": "tasks",
    "model": "models",
    "data": "datasets",
    "loss": "losses",
    "optim": "optimizers",
    "schedule": "schedules",
}
"""The kinds of which a recipe names one, as `optim` or `optim.name`."""


def overrides(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Return what may be typed for `KEY=VALUE`, behind what has been typed of it."""
    return recipe_keys(incomplete, ctx.params.get("overrides") or ())


def recipe_keys(incomplete: str, before: Sequence[str] = ()) -> list[tuple[str, str]]:
    """Return the keys of recipes that begin so, as `train.steps=`, or the names that may follow `model.name=`.

    Each has what it is beside it. bash takes the `=` for a word of its own, and asks for what follows it alone: then
    the words `before` end with it.
    """
    if before and before[-1] == "=":
        return _names(before[-2], "", incomplete) if len(before) > 1 else []
    key, equals, begun = incomplete.partition("=")
    if equals:
        return _names(key, incomplete.removesuffix(begun), begun)
    from distrain.config.yaml import json_schema

    schema = json_schema()
    found: dict[str, str] = {}
    for key, about in _keys(schema, schema["$defs"], "", set()):
        if key.startswith(incomplete):
            found.setdefault(f"{key}=", about)  # two sections that a key may hold share keys
    return list(found.items())


def _names(key: str, before: str, begun: str) -> list[tuple[str, str]]:
    """Return the names that a key may have, behind what has been typed before them."""
    kind = _NAMED.get(key.removesuffix(".name"))
    if kind is None:
        return []
    from distrain.config import registry

    found: dict[str, str] = getattr(registry, kind).summaries()
    return [(f"{before}{name}", about) for name, about in found.items() if name.startswith(begun)]


_PLAIN = ("string", "number", "integer", "boolean", "array")


def _keys(section: dict[str, Any], named: dict[str, Any], prefix: str, above: set[str]) -> Iterator[tuple[str, str]]:
    for name, value in section.get("properties", {}).items():
        about = str(value.get("description", "")).partition("\n")[0]
        inner = [each for each in _mappings(value) if each not in above]
        if not inner or _may_be_plain(value):
            yield f"{prefix}{name}", about
        for each in inner:
            yield from _keys(named[each], named, f"{prefix}{name}.", above | {each})


def _may_be_plain(value: dict[str, Any]) -> bool:
    return any("const" in each or "enum" in each or each.get("type") in _PLAIN for each in value.get("anyOf", ()))


def _mappings(value: dict[str, Any]) -> Iterator[str]:
    """Yield the names of the mappings that a value may be."""
    if "$ref" in value:
        yield value["$ref"].rpartition("/")[2]
    for each in (*value.get("anyOf", ()), *value.get("oneOf", ())):
        yield from _mappings(each)


def runs(incomplete: str) -> list[str]:
    """Return the runs and sweeps right below runs/ that begin so; other folders are completed by the shell."""
    folder = Path("runs")
    found = (f"runs/{each.name}" for each in folder.iterdir() if each.is_dir()) if folder.is_dir() else ()
    return sorted(name for name in found if name.startswith(incomplete) or name[len("runs/") :].startswith(incomplete))


def sites(incomplete: str) -> list[str]:
    """Return the clusters that have defaults and begin so."""
    from distrain.launchers.slurm.sites import sites_as_json

    return sorted(each["name"] for each in sites_as_json(None) if each["name"].startswith(incomplete))
