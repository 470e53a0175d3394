"""Writes the tables of keys in docs/recipe.md from the JSON schema of recipes: python docs/keys.py

Each table stands between `<!-- keys: SECTION -->` and `<!-- end -->`. A test fails while they differ from it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from distrain.config.yaml import json_schema

PAGE = Path(__file__).with_name("recipe.md")
_TABLE = re.compile(r"(<!-- keys: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
_DURATION = "a number and a unit"
_KINDS = {"integer": "whole number", "number": "number", "boolean": "true or false", "string": "text", "null": "null"}


def sections(schema: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Return the forms of each mapping of a recipe by its dotted key, mostly one; the recipe itself is `recipe`.

    A mapping may be null or the item of a list as well.
    """
    found: dict[str, list[dict[str, Any]]] = {"recipe": [schema]}
    waiting = [("", schema)]
    while waiting:
        prefix, section = waiting.pop(0)
        for key, value in section["properties"].items():
            for inner in _mappings(value, schema):
                forms = found.setdefault(f"{prefix}{key}", [])
                # something built by name, such as a loss, has no keys of its own but its name
                if inner["properties"].keys() != {"name"} and inner not in forms:
                    forms.append(inner)
                    waiting.append((f"{prefix}{key}.", inner))
            for named in _named(value, schema):
                # of several by names of the user's: what they have besides the keys of the only one
                known = [form["properties"] for form in found[f"{prefix}{key}"]]
                own = {
                    name: each
                    for name, each in named["properties"].items()
                    if all(each != of.get(name) for of in known)
                }
                found[f"{prefix}{key}.NAME"] = [{**named, "properties": own}]
    return {key: forms for key, forms in found.items() if forms}


def _mappings(value: dict[str, Any], schema: dict[str, Any]) -> list[dict[str, Any]]:
    if "$ref" in value:
        value = schema["$defs"][value["$ref"].rpartition("/")[2]]
    if "properties" in value:
        return [value]
    if "enum" in (names := value.get("propertyNames", {})):
        return [{"properties": dict.fromkeys(names["enum"], value["additionalProperties"])}]
    inner = [*value.get("anyOf", []), *value.get("oneOf", []), *([value["items"]] if "items" in value else [])]
    return [found for each in inner for found in _mappings(each, schema)]


def _named(value: dict[str, Any], schema: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the sections of a mapping whose keys are names of the user's, in any form of a value."""
    inner = [*value.get("anyOf", []), *value.get("patternProperties", {}).values()]
    found = _mappings(inner[0], schema) if "patternProperties" in value else []
    return found or [each for form in inner for each in _named(form, schema)]


def kind(value: dict[str, Any]) -> str:
    """Return what a value may be, in words."""
    title = value.get("title", "")
    if title.startswith(_DURATION):
        return "duration"
    if title:
        return title.removeprefix("a ")
    if "enum" in value:
        return ", ".join(f"`{each}`" for each in value["enum"])
    if "const" in value:
        return f"`{value['const']}`"
    if "$ref" in value:
        return "name, or mapping" if value["$ref"].endswith("/Component") else "mapping"
    if several := value.get("anyOf", value.get("oneOf")):
        return ", or ".join(dict.fromkeys(text for each in several for text in kind(each).split(", or ")))
    if value["type"] == "array":
        return f"list of: {kind(value['items'])}"
    return _KINDS[value["type"]] + _bounds(value)


def _bounds(value: dict[str, Any]) -> str:
    low, high = value.get("minimum"), value.get("maximum", 1e9)
    parts = [f"> {value['exclusiveMinimum']}"] if "exclusiveMinimum" in value else []
    parts += [f"≥ {low}"] if low is not None else []
    parts += [f"≤ {high}"] if high < 1e9 else []
    parts += [f"< {value['exclusiveMaximum']}"] if value.get("exclusiveMaximum", 1e9) < 1e9 else []
    return f" {', '.join(parts)}" if parts else ""


def table(forms: list[dict[str, Any]], schema: dict[str, Any]) -> str:
    """Return the Markdown table of a section's keys, over all its forms."""
    lines = ["| key | what it may be | default | meaning |", "|---|---|---|---|"]
    for key in dict.fromkeys(key for form in forms for key in form["properties"]):
        having = [form for form in forms if key in form["properties"]]
        values = [form["properties"][key] for form in having]
        kinds = ", or ".join(dict.fromkeys(map(kind, values)))
        meanings = " ".join(dict.fromkeys(_meaning(value, schema) for value in values))
        lines.append(f"| `{key}` | {kinds} | {_default(key, having[0])} | {meanings} |")
    return "\n".join(lines) + "\n"


def _default(key: str, form: dict[str, Any]) -> str:
    value = form["properties"][key]
    if key in form.get("required", []):
        return "required"
    return f"`{json.dumps(value['default'])}`" if not isinstance(value.get("default", {}), dict) else ""


def _meaning(value: dict[str, Any], schema: dict[str, Any]) -> str:
    # a schema repeats no sentence that a section says of itself, and writes null as Python does
    inner = schema["$defs"].get(value.get("$ref", "").rpartition("/")[2], {})
    meaning = re.sub(r"\bNone\b", "null", value.get("description", inner.get("description", "")))
    return meaning.replace("\n", " ").replace("|", "\\|")


def with_tables(page: str) -> str:
    """Return the page with every table as the schema has it; raises KeyError for a section that there is not."""
    schema = json_schema()
    found = sections(schema)
    return _TABLE.sub(lambda match: f"{match[1]}{table(found[match[2]], schema)}{match[3]}", page)


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
