"""Recipe files: strict YAML to a validated `Recipe` with the origin of every value, and back. Imports no torch.

strict_yaml  text -> values with their lines, and values -> text
document     a file and overrides as one tree, with absolute paths
validation   tree -> `Recipe`, or all problems at once; `json_schema`
loading      `load_recipe`, `build_recipe`, `parse_recipe`, `dump_recipe`, `show`
"""

from __future__ import annotations

from distrain.config.yaml.loading import (
    LoadedRecipe,
    build_recipe,
    dump_recipe,
    given_values,
    load_recipe,
    parse_recipe,
    show,
    shown_value,
    values_text,
)
from distrain.config.yaml.validation import json_schema

__all__ = [
    "LoadedRecipe",
    "build_recipe",
    "dump_recipe",
    "given_values",
    "json_schema",
    "load_recipe",
    "parse_recipe",
    "show",
    "shown_value",
    "values_text",
]
