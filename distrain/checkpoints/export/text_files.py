"""What lies beside a language model is what it was trained with: tokenizer, chat template, end tokens. No torch.

A run keeps the files of the folder that its model began with. Its data may have another tokenizer or template.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from distrain.checkpoints.export.companion_files import companions_of
from distrain.checkpoints.format import Manifest
from distrain.config.yaml import parse_recipe
from distrain.system.bounded_json import read_json

TEMPLATE, GENERATION = "chat_template.jinja", "generation_config.json"
_TEMPLATES = ("chat_template*", "*.jinja")
_TOKENIZERS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "*.tiktoken",
    "*.vocab", "*.codes", "normalizer.json", *_TEMPLATES,
)  # fmt: skip


def companions_as_trained(
    kept: Mapping[str, Path], manifest: Manifest, scratch: Path
) -> tuple[dict[str, Path], list[str]]:
    """Return {name: file} of what lies beside a model, and notes for the user.

    `kept`: the files of the folder that the model began with. `scratch`: the folder for those that have to be written.
    """
    files = dict(kept)
    notes: list[str] = []
    if not manifest.recipe:
        return files, notes
    recipe = parse_recipe(manifest.recipe, "the recipe")
    named, began = recipe.data.args.get("tokenizer"), recipe.model.args.get("path")
    if isinstance(named, str) and not (isinstance(began, str) and _lies_in(Path(named), Path(began))):
        own = _tokenizer_of(Path(named))
        if own or os.path.isabs(named):
            files = _without(files, _TOKENIZERS) | own
            if not own:
                notes.append(f"skipped: the tokenizer that the run was trained with, which is no longer in {named}")
    tokens = _tokens_of_its_own(recipe.data.name, recipe.data.args)
    if tokens is not None and (others := _without(files, _TOKENIZERS)) != files:
        files = others
        notes.append(f"skipped: the tokenizer of the model's folder, as the run was trained on {tokens}")
    template = manifest.scalars.get("data", {}).get("template")
    if isinstance(template, str) and recipe.data.args.get("template") is not None:
        files = _without(files, _TEMPLATES)
        files[TEMPLATE] = _written(scratch / TEMPLATE, template)
    end = manifest.scalars.get("data_facts", {}).get("eos_id")
    if GENERATION in files and isinstance(end, int):
        settings = read_json(files[GENERATION])
        ends = settings.get("eos_token_id") if isinstance(settings, dict) else end
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        if end not in ends:
            changed = json.dumps({**settings, "eos_token_id": [*ends, end] if ends else end}, indent=2)
            files[GENERATION] = _written(scratch / GENERATION, changed)
            notes.append(f"{GENERATION} has the token {end} as an end, which that of the model's folder had not")
    return dict(sorted(files.items())), notes


def _lies_in(path: Path, folder: Path) -> bool:
    """Whether a tokenizer, a folder or a file, is the one beside a model's weights."""
    folder = folder.resolve()
    return folder in (path.resolve(), path.resolve().parent)


def _tokenizer_of(path: Path) -> dict[str, Path]:
    if path.is_file():
        return {path.name: path}
    if not path.is_dir():
        return {}
    return {name: file for name, file in companions_of(path)[0].items() if _is_one(name, _TOKENIZERS)}


def _tokens_of_its_own(name: str, args: Mapping[str, Any]) -> str | None:
    """Return what a data set reads texts as without a tokenizer of transformers; None of any other data set."""
    if name in ("text", "python_source") and args.get("tokenizer", "bytes") == "bytes":
        return "bytes"
    if name == "tagged_text" and args.get("tokenizer") is None:
        return "words"
    if name == "parallel_text":
        sides = [args.get(f"{side}_tokenizer", "words") for side in ("source", "target")]
        return " and ".join(sides) if {*sides} <= {"words", "chars"} else None
    return None


def _without(files: Mapping[str, Path], patterns: tuple[str, ...]) -> dict[str, Path]:
    return {name: file for name, file in files.items() if not _is_one(name, patterns)}


def _is_one(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name.removeprefix("additional_chat_templates/"), pattern) for pattern in patterns)


def _written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path
