"""Writes the tables of keys in docs/recipe.md from the JSON schema of recipes: python docs/keys.py

Each table stands between `<!-- keys: SECTION -->` and `<!-- end -->`. A test fails while they differ from it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from distrain.recipe_file import json_schema

PAGE = Path(__file__).with_name("recipe.md")
_TABLE = re.compile(r"(<!-- keys: ([A-Za-z.]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_DURATION = "a number and a unit"
_KINDS = {"integer": "whole number", "number": "number", "boolean": "true or false", "string": "text", "null": "null"}


def sections(schema: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the schema of each mapping of a recipe by its dotted key; the recipe itself is `recipe`."""
    found = {"recipe": schema}
    waiting = [("", schema)]
    while waiting:
        prefix, section = waiting.pop(0)
        for key, value in section["properties"].items():
            for inner in _mappings(value, schema):
                # something built by name, such as a loss, has no keys of its own but its name
                if inner["properties"].keys() != {"name"} and f"{prefix}{key}" not in found:
                    found[f"{prefix}{key}"] = inner
                    waiting.append((f"{prefix}{key}.", inner))
    return found


def _mappings(value: dict[str, Any], schema: dict[str, Any]) -> list[dict[str, Any]]:
    if "$ref" in value:
        value = schema["$defs"][value["$ref"].rpartition("/")[2]]
    if "properties" in value:
        return [value]
    inner = [*value.get("anyOf", []), *value.get("oneOf", []), *([value["items"]] if "items" in value else [])]
    return [found for each in inner for found in _mappings(each, schema)]


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


def table(section: dict[str, Any], schema: dict[str, Any]) -> str:
    """Return the Markdown table of a section's keys."""
    lines = ["| key | what it may be | default | meaning |", "|---|---|---|---|"]
    for key, value in section["properties"].items():
        default = "required" if key in section.get("required", []) else f"`{json.dumps(value.get('default'))}`"
        if isinstance(value.get("default"), dict):
            default = ""
        inner = schema["$defs"].get(value.get("$ref", "").rpartition("/")[2], {})
        # a schema repeats no sentence that a section says of itself, and writes null as Python does
        meaning = re.sub(r"\bNone\b", "null", value.get("description", inner.get("description", "")))
        meaning = meaning.replace("\n", " ").replace("|", "\\|")
        lines.append(f"| `{key}` | {kind(value)} | {default} | {meaning} |")
    return "\n".join(lines) + "\n"


def with_tables(page: str) -> str:
    """Return the page with every table as the schema has it; raises KeyError for a section that there is not."""
    schema = json_schema()
    found = sections(schema)
    return _TABLE.sub(lambda match: f"{match[1]}{table(found[match[2]], schema)}{match[3]}", page)


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
