"""The user's code: the files that a recipe names, and those of the same project that they import.

Imports are read from the text of each file, so the result does not depend on what a process has imported. Imports by a
computed name are not found.
"""

from __future__ import annotations

import ast
import importlib.machinery
import importlib.util
import os
import site
import sys
import sysconfig
import textwrap
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import xxhash

from distrain.config import Recipe, is_object_spec, registry
from distrain.config.user_files import given_key, given_object
from distrain.system.output import one_line

MAX_FILES, MAX_BYTES = 300, 1 << 20
"""Files that are followed, and bytes that are parsed: a user's package may be as large as a library."""


def named_objects(value: Any) -> Iterator[str]:
    """Yield each `package.module:name` and `path/to/file.py:name` among the values of a recipe, dumped to JSON."""
    if isinstance(value, dict | list):
        for item in [*value, *value.values()] if isinstance(value, dict) else value:
            yield from named_objects(item)
    elif isinstance(value, str) and is_object_spec(value):
        yield value


def _entry_points(recipe: Recipe) -> Iterator[str]:
    """Yield `package.module:name` of the entry points that a recipe names."""
    named: list[tuple[registry.Registry[Any], list[Any]]] = [
        (registry.models, [recipe.model]),
        (registry.datasets, [recipe.data]),
        (registry.tasks, [recipe.task]),
        (registry.losses, [recipe.loss] if recipe.loss is not None else []),
        (registry.optimizers, [*recipe.optimizers.values()]),
        (registry.schedules, [*recipe.schedules.values()]),
        (registry.metrics, recipe.eval.metrics or []),
        (registry.callbacks, recipe.callbacks),
        (registry.trackers, recipe.log.trackers),
    ]
    for table, items in named:
        for item in items:
            if not is_object_spec(item.name) and (spec := table.spec_of(item.name)) is not None:
                yield spec


@cache
def _installed() -> tuple[Path, ...]:
    return tuple(map(Path, {*site.getsitepackages(), site.getusersitepackages(), *sysconfig.get_paths().values()}))


def user_module(name: str) -> Path | None:
    """Return the folder or file of a top-level module, unless it is installed, part of Python, or distrain."""
    if name in sys.builtin_module_names or name in sys.stdlib_module_names or name == "distrain":
        return None
    try:
        spec = importlib.machinery.PathFinder.find_spec(name) or importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError):  # a module that was made without an import
        return None
    if spec is None or (spec.origin is None and not spec.submodule_search_locations):
        return None  # the check of the recipe reports it
    if spec.origin is None:  # a folder without __init__.py
        found = Path(next(iter(spec.submodule_search_locations or ())))
    else:
        found = Path(spec.origin).parent if spec.submodule_search_locations else Path(spec.origin)
    if {"site-packages", "dist-packages"} & set(found.parts):
        return None
    return None if any(found.is_relative_to(folder) for folder in _installed()) else found


def code_of(recipe: Recipe) -> dict[str, list[str]]:
    """Return {file: [hash of its bytes, hash of its syntax tree]} for the code of a recipe, without `data.prepare`.

    Files are named from the folder of the file in the recipe, or from the folder that holds the package. The syntax
    tree has no docstrings, comments or layout, and may differ between versions of Python. Beyond MAX_BYTES only bytes
    are hashed, and imports are not followed. Of an object of this process it is the text of its classes and functions
    alone. The files that `data.prepare` makes have their own fingerprint.
    """
    values = recipe.model_dump(mode="json")
    values["data"].pop("prepare", None)
    found: dict[str, list[str]] = {}
    specs = [*named_objects(values), *_entry_points(recipe)]
    for spec in specs:
        if given_key(spec) is not None:
            found |= {
                f"{name} of {spec}": [xxhash.xxh3_128_hexdigest(text.encode(errors="surrogatepass")), _tree_of(text)]
                for name, text in given_object(spec).sources.items()
            }
    for each in code_files([spec for spec in specs if given_key(spec) is None]):
        found[_free(one_line(each.name), found)] = each.hashes
    return found


@dataclass(frozen=True)
class CodeFile:
    """A file of the user's code."""

    path: Path
    name: str
    """From the folder of the file in the recipe, or the folder that holds the package."""
    hashes: list[str]
    """Of its bytes, and of its syntax tree."""
    of_distrain: bool
    """Whether it imports distrain."""


def code_files(specs: Iterable[str]) -> Iterator[CodeFile]:
    """Yield the files that `path/to/file.py:name` and `package.module:name` are in, and those that they import.

    Up to MAX_FILES of them, and of the same project alone.
    """
    seen: set[str] = set()
    size = 0
    for spec in specs:
        where = spec.rpartition(":")[0]
        if where.endswith(".py"):
            file = Path(os.path.abspath(where))
            waiting = [(file, file.parent)]
        elif (package := user_module(where.partition(".")[0])) is not None:
            waiting = [(file, package.parent) for file in _modules(package.parent, where)]
        else:
            continue
        while waiting and len(seen) < MAX_FILES:
            file, root = waiting.pop(0)
            if str(file) in seen:
                continue
            seen.add(str(file))
            try:
                text = file.read_bytes()
            except OSError:
                continue  # where it is imported, that fails
            size += len(text)
            imported, tree, of_distrain = _parse(text, file, root) if size <= MAX_BYTES else ([], "", False)
            name = file.relative_to(root).as_posix()
            yield CodeFile(file, name, [xxhash.xxh3_128_hexdigest(text), tree], of_distrain)
            waiting += imported


def _tree_of(text: str) -> str:
    """Return the hash of the syntax tree of a class or function; empty where the text is not Python alone."""
    return _parse(textwrap.dedent(text).encode(errors="surrogatepass"), Path("given.py"), Path())[1]


def _free(name: str, taken: dict[str, Any]) -> str:
    return next(each for n in range(1, MAX_FILES + 2) if (each := name + (f" ({n})" if n > 1 else "")) not in taken)


def _modules(root: Path, name: str) -> list[Path]:
    """Return the files that importing `name` from `root` runs: those of its packages, and its own."""
    found, place = [], root
    for part in name.split("."):
        place /= part
        found += [file for file in (place / "__init__.py", place.with_name(f"{part}.py")) if file.is_file()][:1]
    return found


def _parse(text: bytes, file: Path, root: Path) -> tuple[list[tuple[Path, Path]], str, bool]:
    """Return the files that a file imports of its project, each with its root, and the hash of its syntax tree.

    And whether it imports distrain.
    """
    names, tree = _syntax(text, file.relative_to(root).parts[:-1])
    imported = [found for name, relative in names for found in _resolve(name, root, relative=relative)]
    of_distrain = any(name.partition(".")[0] == "distrain" for name, relative in names if not relative)
    return imported, tree, of_distrain


@lru_cache(maxsize=32)
def _syntax(text: bytes, package: tuple[str, ...]) -> tuple[tuple[tuple[str, bool], ...], str]:
    """Return the names that a file of a package imports, each with whether from beside it, and the hash of its tree.

    Remembered: a process that trains several runs reads the same files for each of them.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # importing it has shown them
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return (), ""
    imported: list[tuple[str, bool]] = []
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                imported += [(alias.name, False) for alias in node.names]
            case ast.ImportFrom():
                base = [*package[: len(package) - node.level + 1]] if node.level else []
                start = ".".join([*base, *([node.module] if node.module else [])])
                names = [f"{start}.{alias.name}" if start else alias.name for alias in node.names]
                imported += [(name, node.level > 0) for name in names]
            case ast.Module() | ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
                if ast.get_docstring(node, clean=False) is not None:
                    node.body = node.body[1:]
    return tuple(imported), xxhash.xxh3_128_hexdigest(ast.dump(tree).encode(errors="surrogatepass"))


def _resolve(name: str, root: Path, *, relative: bool) -> list[tuple[Path, Path]]:
    """Return the files that an import runs, each with its root: of a user's module, or beside the importing file."""
    top = name.partition(".")[0]
    if not relative and (top in sys.stdlib_module_names or top == "distrain"):
        return []
    package = None if relative else user_module(top)
    if package is not None:
        root = package.parent
    elif not relative and _is_installed(top):  # Python looks beside the file last
        return []
    return [(file, root) for file in _modules(root, name)]


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError, AttributeError):
        return name in sys.modules
