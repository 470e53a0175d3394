"""A recipe file and the overrides of a command line as one tree, with the origin of every value."""

from __future__ import annotations

import functools
import operator
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from distrain.config import Recipe, RecipeError, close_names, is_object_spec
from distrain.config.user_files import LIBRARIES
from distrain.config.yaml.strict_yaml import Place, Tree, dotted, found_text, syntax_problem
from distrain.system.output import in_utf8, one_line

COMMAND_LINE = "command line"
PYTHON = "Python"
_DEFAULT = "default"
_LARGEST_FILE = 1 << 20
_COMPONENTS: frozenset[Place] = frozenset({("task",), ("data",), ("model",), ("loss",), ("optim",), ("schedule",)})
_NAMELESS = _COMPONENTS - {("optim",), ("schedule",)}
"""Those without a name by default: where one is missing, it is yet to come."""
_COMPONENT_LISTS: frozenset[Place] = frozenset(
    {
        ("callbacks",),
        ("log", "trackers"),
        ("eval", "metrics"),
        ("data", "transforms", "train"),
        ("data", "transforms", "eval"),
    }
)
_PATHS: frozenset[Place] = frozenset({("data", "path"), ("model", "weights")})
_SPLIT_PATHS: frozenset[Place] = frozenset(("data", "split", split) for split in ("train", "valid", "test"))
"""Paths for built-in data sets; user code gets the value as it is."""
_NO_UTF8 = "not UTF-8, and a recipe is UTF-8 text; rename the file or folder"
_RENAMED: dict[tuple[str, str], str] = {
    ("data", "skip_undecodable"): "skip_corrupt",
    ("anomalies", "most"): "max_skips",
}
"""Keys by their earlier names, which recipes of earlier runs hold, and their names now."""
_OVERRIDE_KEY = re.compile(r"[^.\[\]\s]+(\.[^.\[\]\s]+|\[[0-9]+\])*")


def read_text(file: Path) -> str:
    """Return the text of a recipe file; raises RecipeError."""

    def refuse(problem: str) -> RecipeError:
        return RecipeError(str(file), [problem])

    try:
        with file.open("rb") as stream:
            content = stream.read(_LARGEST_FILE + 1)
    except FileNotFoundError:
        beside = [path.name for suffix in ("yaml", "yml") for path in file.parent.glob(f"*.{suffix}")]
        raise refuse(f"there is no such file{close_names(file.name, beside)}") from None
    except OSError as error:
        raise refuse(f"cannot be read: {error.strerror}") from error
    if len(content) > _LARGEST_FILE:
        raise refuse("is larger than 1 MiB; expected a recipe")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise refuse(f"{file}:{line}: is not UTF-8 text") from error


def read_tree(text: str, source: str) -> Tree:
    """Return the mapping in a recipe's text; raises RecipeError, naming `source`."""

    def refuse(problem: str, line: int | None = None) -> RecipeError:
        return RecipeError(source, [f"{source}:{line}: {problem}" if line else problem])

    try:
        tree = Tree.parse(text)
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise refuse(f"found a control character (U+{ord(text[error.position]):04X}); remove it", line) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise refuse(syntax_problem(error), mark.line + 1 if mark else None) from error
    if not isinstance(tree.value, dict):
        if tree.problems:
            raise refuse(tree.problems[0][1], tree.lines[()])
        found = "nothing" if tree.value is None else found_text(tree.value)
        raise refuse(f"found {found}, expected a mapping of {', '.join(Recipe.model_fields)}")
    return tree


def _is_component(place: Place) -> bool:
    return place in _COMPONENTS or (place[:-1] in _COMPONENT_LISTS and isinstance(place[-1], int))


class Document:
    """A recipe's values before validation, with the origin of each."""

    def __init__(self, source: str, tree: Tree):
        self.source = source
        self.value: dict[str, Any] = tree.value
        self.problems = list(tree.problems)
        self.refused: list[str] = []
        self.origins: dict[Place, str] = {place: f"{source}:{line}" for place, line in tree.lines.items()}
        self.origins[()] = source
        self._rename()

    def _rename(self) -> None:
        """Give keys their names of now."""
        for (section, key), name in _RENAMED.items():
            holder = self.value.get(section)
            if not isinstance(holder, dict) or key not in holder:
                continue
            value = holder.pop(key)
            if name in holder:
                self.problems.append(
                    ((section, key), f"is the earlier name of {name!r}, which is there as well; remove it")
                )
                continue
            holder[name] = value
            before, now = (section, key), (section, name)
            self.origins = {_moved(each, before, now): origin for each, origin in self.origins.items()}
            self.problems = [(_moved(each, before, now), problem) for each, problem in self.problems]

    def override(self, text: str) -> None:
        """Apply one `dotted.key=value` to the tree, or note its problem."""
        try:
            place, tree, kept = self._read_override(text)
        except ValueError as error:
            self.refused.append(f"{COMMAND_LINE}: {error}")
            return
        self._came_from(COMMAND_LINE, place, tree.lines, kept)
        self.problems += [((*place, *inner), problem) for inner, problem in tree.problems]
        self._rename()

    def put(self, key: str, value: Any) -> None:
        """Put a value of Python (of JSON's types, with text keys) at a dotted key, or note the problem."""
        if not _OVERRIDE_KEY.fullmatch(key):
            self.refused.append(f"{PYTHON}: found the key {key!r}, expected dotted ones, as in optim.lr")
            return
        try:
            holder, place = self._reach(key, _parts_of(key), PYTHON)
        except ValueError as error:
            self.refused.append(f"{PYTHON}: {error}")
            return
        self._came_from(PYTHON, place, places(value), self._set(holder, place, value))
        self._rename()

    def _set(self, holder: Any, place: Place, value: Any) -> set[str]:
        """Set the value at `place`; return the keys that stay: those of a section that had no component's name yet."""
        now = holder.get(place[-1]) if isinstance(holder, dict) else None
        named = {"name": value} if isinstance(value, str) else value
        holder[place[-1]] = value
        if place not in _NAMELESS or not isinstance(now, dict) or not isinstance(named, dict):
            return set()
        if "name" in now or "name" not in named:
            return set()
        holder[place[-1]] = {**now, **named}
        return now.keys() - named.keys()

    def _came_from(self, origin: str, place: Place, inner: Iterable[Place], kept: Collection[str] = ()) -> None:
        """Note where the value at `place` comes from, and those in it but the `kept` ones."""
        known = [each for each in self.origins if each[: len(place)] == place]
        for each in known:
            if each == place or each[len(place)] not in kept:
                del self.origins[each]
        if kept:  # of a bare name
            self.origins[*place, "name"] = origin
        self.origins[place] = origin
        self.origins |= {(*place, *each): origin for each in inner}

    def _read_override(self, text: str) -> tuple[Place, Tree, set[str]]:
        if in_utf8(text) != text:
            raise ValueError(f"'{one_line(text)}' is {_NO_UTF8}")
        key, equals, written = text.partition("=")
        if not equals or not _OVERRIDE_KEY.fullmatch(key):
            raise ValueError(f"found {text!r}, expected dotted.key=value, as in optim.lr=3e-4")
        if not written.strip():
            raise ValueError(f"{key}: found no value after '='; write {key}=null for nothing")
        try:
            tree = Tree.parse(written)
        except yaml.MarkedYAMLError as error:
            raise ValueError(f"{key}: {written!r} {syntax_problem(error)}") from error
        except yaml.reader.ReaderError as error:
            raise ValueError(f"{key}: {written!r} holds a control character; remove it") from error
        if not tree.value and written.lstrip()[0] in "|>#":  # an empty block, or a comment alone
            raise ValueError(f"{key}: {written!r} is nothing in YAML; write {key}=null for nothing, or text in quotes")
        holder, place = self._reach(key, _parts_of(key))
        return place, tree, self._set(holder, place, tree.value)

    def _reach(self, key: str, parts: Sequence[str], origin: str = COMMAND_LINE) -> tuple[Any, Place]:
        """Return the mapping or list that holds the last of `parts`, created if missing, and its place."""
        holder: Any = self.value
        place: Place = ()
        for number, part in enumerate(parts):
            step: str | int = part
            if isinstance(holder, list):
                if not part.isdecimal() or int(part) >= len(holder):
                    held = f"indices 0 to {len(holder) - 1}" if holder else "nothing"
                    raise ValueError(f"{key}: {dotted(place)} is a list of {held}, so it has no {part!r}")
                step = int(part)
            inner = (*place, step)
            if number == len(parts) - 1:
                return holder, inner
            child: Any = holder[int(step)] if isinstance(holder, list) else holder.get(step)
            if child is None:
                child = {}
                self.origins[inner] = origin
            elif isinstance(child, str) and _is_component(inner):
                child = {"name": child}
                self.origins[(*inner, "name")] = self.origins[inner]
            elif not isinstance(child, dict | list):
                raise ValueError(f"{key}: {dotted(inner)} is {found_text(child)}, so it has no {parts[number + 1]!r}")
            holder[step] = child
            holder, place = child, inner
        raise AssertionError("a key has at least one part")

    def resolve(self, folder: Path) -> None:
        """Replace bare names by mappings and relative paths by absolute ones."""
        for place, text in list(_texts(self.value)):
            if _is_component(place):
                _put(self.value, place, {"name": text})
                self.origins[(*place, "name")] = self.origins[place]
                place = (*place, "name")
            base = Path.cwd() if self.origins[place] in (COMMAND_LINE, PYTHON) else folder
            if place == ("model", "path") and not (base / text).exists() and Path(text).exists():
                base = Path.cwd()  # earlier recipes of runs have it as it was written
            looks_like_path = place in _SPLIT_PATHS or text.startswith(("./", "../"))
            if text and (place in _PATHS or (looks_like_path and not self._goes_to_user_code(place))):
                # no name begins like a path, and only a component knows its own keys
                _put(self.value, place, _absolute(text, base))
            elif place == ("data", "prepare") or (place[-1] == "name" and _is_component(place[:-1])):
                file, _, name = text.rpartition(":")
                if file.endswith(".py") and is_object_spec(text):
                    _put(self.value, place, f"{_absolute(file, base)}:{name}")
        for place, text in _texts(self.value):
            if in_utf8(text) != text:
                self.problems.append((place, f"'{one_line(text)}' is {_NO_UTF8}"))

    def _goes_to_user_code(self, place: Place) -> bool:
        """Whether the value at `place` is an argument of the user's class or function, which gets it as it is."""
        inner = next((place[:end] for end in range(len(place) - 1, 0, -1) if _is_component(place[:end])), None)
        if inner is None:
            return False
        holder = _get(self.value, inner)
        name = holder.get("name") if isinstance(holder, dict) else None
        return isinstance(name, str) and is_object_spec(name) and not name.startswith(LIBRARIES)

    def origin(self, place: Place) -> str:
        """Return the origin of the value at `place` of the validated recipe."""
        inside = {origin for known, origin in self.origins.items() if known[: len(place)] == place}
        for changed in (COMMAND_LINE, PYTHON):
            if changed in inside:
                return changed
        return self.origins.get(place, _DEFAULT)

    def error(self, problems: Sequence[tuple[Place, str]]) -> RecipeError:
        """Return the error that lists `problems`, each with its place in the file, in the file's order."""
        lines = [((1, 0), problem) for problem in self.refused]
        for place, problem in problems:
            # a missing key has no place of its own: name its section
            near = next(place[:end] for end in range(len(place), -1, -1) if place[:end] in self.origins)
            origin = self.origins[near]
            line = origin.rpartition(":")[2] if near else ""
            order = (1, 0) if origin in (COMMAND_LINE, PYTHON) else (0, int(line) if line.isdecimal() else 0)
            lines.append((order, f"{origin}: {dotted(place)}: {problem}"))
        return RecipeError(self.source, [line for _, line in sorted(lines, key=lambda line: line[0])])


def _parts_of(key: str) -> list[str]:
    """Return the parts of a dotted key, by their names of now."""
    parts = re.findall(r"[^.\[\]]+", key)
    if len(parts) == 2 and (name := _RENAMED.get((parts[0], parts[1]))) is not None:
        parts[1] = name
    return parts


def places(value: Any, place: Place = ()) -> Iterator[Place]:
    """Yield the place of a value and of everything in it."""
    yield place
    if isinstance(value, dict | list):
        for step, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(item, (*place, step))


def _moved(place: Place, old: Place, new: Place) -> Place:
    return (*new, *place[len(old) :]) if place[: len(old)] == old else place


def _absolute(path: str, base: Path) -> str:
    return os.path.abspath(base / os.path.expanduser(path))


def _texts(value: Any, place: Place = ()) -> Iterator[tuple[Place, str]]:
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, dict | list):
        for step, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _texts(item, (*place, step))


def _get(tree: Any, place: Place) -> Any:
    return functools.reduce(operator.getitem, place, tree)


def _put(tree: Any, place: Place, value: Any) -> None:
    _get(tree, place[:-1])[place[-1]] = value
