"""A tree of values as a `Recipe`, or all its problems, in the terms of a recipe."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic.json_schema import GenerateJsonSchema

from distrain.config import Duration, Recipe, close_names
from distrain.config.agreement import ATTRIBUTES, Known, disagreements
from distrain.config.yaml.document import Document
from distrain.config.yaml.strict_yaml import Place, dotted, found_text, scalar


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of a recipe for editors, with a sentence about every key."""
    schema = Recipe.model_json_schema(schema_generator=_SchemaGenerator)
    for section in schema["$defs"].values():
        section.pop("title", None)
    return {"$schema": GenerateJsonSchema.schema_dialect, **schema, "title": "distrain recipe"}


class _SchemaGenerator(GenerateJsonSchema):
    def field_title_should_be_set(self, schema: Any) -> bool:
        return False  # the titles that remain describe the expected value

    def tagged_union_schema(self, schema: Any) -> Any:
        found = super().tagged_union_schema(schema)
        # what tells the forms apart is not in the schema, and one that takes further keys may allow another one's
        return {"anyOf": found.pop("oneOf"), **found} if "oneOf" in found else found

    def dict_schema(self, schema: Any) -> Any:
        found = super().dict_schema(schema)
        return {**found, "additionalProperties": False} if "patternProperties" in found else found

    def encode_default(self, dft: Any) -> Any:
        return str(dft) if isinstance(dft, Duration) else super().encode_default(dft)


def validate(document: Document) -> Recipe:
    """Return the recipe of a document; raises RecipeError with all its problems."""
    problems = list(document.problems)
    invalid = {place for place, _ in problems if place}
    try:
        recipe = Recipe.model_validate(document.value, by_alias=True, by_name=False)
        if not problems and not document.refused:
            return recipe
    except ValidationError as error:
        describe = _ErrorText(json_schema())
        described: dict[Place, str] = {}
        for item in error.errors():
            if item["type"] != "disagreement":  # found again below, with those that it hides
                described.setdefault(*describe(item))  # the first: each allowed form of a value reports an error
        meant = {(*place[:-1], key) for place, text in described.items() for key in _suggested(text)}
        for place, problem in described.items():
            if place in meant and problem.startswith("is missing"):
                continue  # present under a misspelt name
            if not any(place[: len(bad)] == bad for bad in invalid):
                problems.append((place, problem))
        invalid |= {place for place, _ in problems if place}
    known = Known(_valid_sections(document.value, invalid), {dotted(place) for place in invalid})
    problems += [(_place(key), problem) for key, problem in disagreements(known)]
    raise document.error(problems)


def _place(key: str) -> Place:
    return tuple(int(step) if step.isdecimal() else step for step in key.split("."))


def _suggested(problem: str) -> list[str]:
    return re.findall("'([^']*)'", problem.partition("did you mean")[2]) if problem.startswith("unknown key") else []


def _valid_sections(tree: dict[str, Any], invalid: set[Place]) -> dict[str, Any]:
    """Return the sections that are valid without their invalid values."""
    tree = copy.deepcopy(tree)
    for place in invalid:
        # all of `section.key` goes with an invalid part, as the rest could mean something else
        section = str(place[0])
        holder = tree.get(section) if place[1:] else tree
        if isinstance(holder, dict):
            holder.pop(str(place[:2][-1]), None)
    sections = {}
    for name, info in Recipe.model_fields.items():
        if name not in tree:
            if not info.is_required():
                sections[name] = info.get_default(call_default_factory=True)
            continue
        adapter: TypeAdapter[Any] = TypeAdapter(info.rebuild_annotation())
        try:
            sections[name] = adapter.validate_python(tree[name], by_alias=True, by_name=False)
        except ValidationError:
            continue  # a required key is among the invalid ones
    return sections


class _ErrorText:
    """Describes pydantic's errors in the terms of a recipe."""

    def __init__(self, schema: dict[str, Any]):
        self.schema = schema

    def __call__(self, error: Any) -> tuple[Place, str]:
        """Return the place and the description of one of pydantic's errors."""
        place: Place = ()
        schema = self.schema
        for step in error["loc"]:
            if isinstance(step, str) and step.startswith("<"):
                continue  # the form of data.split that pydantic chose
            inner = self._at(schema, step)
            if inner is None:
                break
            place, schema = (*place, step), inner
        kind = error["type"]
        if kind == "extra_forbidden":
            key = str(error["loc"][-1])
            return (*place, key), self._unknown(key, place, self._keys(schema))
        if error["loc"][-1:] == ("[key]",):
            parent = self.schema
            for step in place[:-1]:
                parent = self._at(parent, step) or {}
            return place, self._unknown(str(place[-1]), place[:-1], self._keys(parent))
        if kind == "missing":
            about = schema.get("description", "").split("\n")[0].rstrip(".")
            return place, f"is missing, expected {self._expected(schema)}{f' ({about})' if about else ''}"
        if kind == "value_error":
            return place, str(error["ctx"]["error"])
        value = error["input"]
        expected = self._expected(schema, kind.startswith("less_than"))
        return place, f"found {found_text(value)}, expected {expected}{self._hint(value, schema)}"

    def _unknown(self, key: str, place: Place, keys: Sequence[str]) -> str:
        if "." in key:
            return f"unknown key {key!r}; dotted keys are for the command line; write a mapping for each '.'"
        for alias, attribute in ATTRIBUTES.items():
            if key == attribute and alias in keys:
                return f"unknown key {key!r}; did you mean {alias!r}?"
        if hint := close_names(key, keys):
            return f"unknown key {key!r}{hint}"
        elsewhere = [
            dotted((section, key))
            for section in self.schema["properties"]
            if (section,) != place[:1] and key in self._keys(self._at(self.schema, section) or {})
        ]
        if elsewhere:
            return f"unknown key {key!r}; did you mean {' or '.join(elsewhere)}?"
        return f"unknown key {key!r}, expected one of {', '.join(keys)}"

    def _variants(self, schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if "$ref" in schema:
            yield from self._variants(self.schema["$defs"][schema["$ref"].rpartition("/")[2]])
        for variants in ("anyOf", "oneOf"):
            for variant in schema.get(variants, ()):
                yield from self._variants(variant)
        if "$ref" not in schema and "anyOf" not in schema and "oneOf" not in schema:
            yield schema

    def _at(self, schema: dict[str, Any], step: str | int) -> dict[str, Any] | None:
        for variant in self._variants(schema):
            inner = variant.get("items") if isinstance(step, int) else variant.get("properties", {}).get(step)
            if inner is None and isinstance(step, str) and "propertyNames" in variant:
                inner = variant["additionalProperties"]
            if inner is None and isinstance(step, str):
                patterns = variant.get("patternProperties", {}).items()
                inner = next((held for pattern, held in patterns if re.fullmatch(pattern, step)), None)
            if inner is not None:
                return inner
        return None

    def _keys(self, schema: dict[str, Any]) -> list[str]:
        keys = (
            key
            for variant in self._variants(schema)
            for key in [*variant.get("properties", ()), *variant.get("propertyNames", {}).get("enum", ())]
        )
        return list(dict.fromkeys(keys))

    def _expected(self, schema: dict[str, Any], all_bounds: bool = False) -> str:
        if "title" in schema:
            return schema["title"]
        variants = list(self._variants(schema))
        if len(variants) > 1:
            return " or ".join(dict.fromkeys(self._expected(variant, all_bounds) for variant in variants))
        schema = variants[0]
        if "title" in schema:
            return schema["title"]
        if "const" in schema:
            return repr(schema["const"])
        if "enum" in schema:
            return f"one of {', '.join(map(repr, schema['enum']))}"
        kind = schema.get("type")
        if kind == "object":
            return f"a mapping of {', '.join(self._keys(schema))}"
        if kind in ("integer", "number"):
            signs = (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
            # a very large upper bound is shown only if it is exceeded
            bounds = [
                f"{sign} {schema[key]:.16g}"
                for key, sign in signs
                if key in schema and (all_bounds or schema[key] < 1e9)
            ]
            return f"a {'whole ' if kind == 'integer' else ''}number {' and '.join(bounds)}".rstrip()
        if kind == "array":
            return f"a list, each item {self._expected(schema['items'])}"
        return {"boolean": "true or false", "null": "null", "string": "text"}.get(str(kind), str(kind))

    def _hint(self, value: Any, schema: dict[str, Any]) -> str:
        if not isinstance(value, str):
            return ""
        variants = list(self._variants(schema))
        choices = [
            choice for item in variants for choice in item.get("enum", [item["const"]] if "const" in item else [])
        ]
        if hint := close_names(value, choices):
            return hint
        wanted = {item.get("type") for item in variants}
        try:
            meant = type(scalar(value))
        except ValueError:
            return ""
        if (meant in (int, float) and wanted & {"integer", "number"}) or (meant is bool and "boolean" in wanted):
            return "; remove the quotes"
        if wanted & {"integer", "number"} and re.fullmatch(r"[-+]?0+[1-9][0-9]*", value):
            return "; remove the leading zero"
        return ""
