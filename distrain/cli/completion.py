"""What a shell completes behind `distrain`: keys of a recipe, runs, sites. Imports nothing slow until it is asked.

`distrain --install-completion` makes the shell ask; files are completed by the shell itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any


def recipe_keys(incomplete: str) -> list[tuple[str, str]]:
    """Return the keys of recipes that begin so, as `train.steps=`, each with what it is; none behind a `=`."""
    if "=" in incomplete:
        return []
    from distrain.config.yaml import json_schema

    schema = json_schema()
    return [
        (f"{key}=", about) for key, about in _keys(schema, schema["$defs"], "", set()) if key.startswith(incomplete)
    ]


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
    for each in (value, *value.get("anyOf", ()), *value.get("oneOf", ())):
        if "$ref" in each:
            yield each["$ref"].rpartition("/")[2]


def runs(incomplete: str) -> list[str]:
    """Return the runs and sweeps right below runs/ that begin so; other folders are completed by the shell."""
    folder = Path("runs")
    found = (f"runs/{each.name}" for each in folder.iterdir() if each.is_dir()) if folder.is_dir() else ()
    return sorted(name for name in found if name.startswith(incomplete) or name[len("runs/") :].startswith(incomplete))


def sites(incomplete: str) -> list[str]:
    """Return the clusters that have defaults and begin so."""
    from distrain.launchers.slurm.sites import sites_as_json

    return sorted(each["name"] for each in sites_as_json(None) if each["name"].startswith(incomplete))
