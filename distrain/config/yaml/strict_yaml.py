"""Strict YAML for recipes: every value with its line, and no surprising types."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

Place = tuple[str | int, ...]
"""The path of a value in a tree of mappings and lists: ("eval", "metrics", 0)."""

_DEEPEST = 64
_WORDS = {"": None, "~": None} | {
    spelled: value
    for word, value in (("null", None), ("true", True), ("false", False))
    for spelled in (word, word.capitalize(), word.upper())
}
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*(_[0-9]+)*)")
_FLOAT = re.compile(r"[-+]?((0|[1-9][0-9]*(_[0-9]+)*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|nan)", re.IGNORECASE)
_SURROGATE = re.compile("[\ud800-\udfff]")
_SYNTAX_HINTS = {
    r"'\t'": "there is a tab; indent with spaces",
    "found another document": "a recipe is one document; remove the '---'",
    "mapping values are not allowed": "there is an extra ': ', or the line before is indented differently",
    "expected alphabetic or numeric character": "text beginning with * or & needs quotes",
    "expected <block end>": "the indentation does not match the lines above",
    "that cannot start any token": "quote text that begins with this character",
}


def scalar(text: str) -> Any:
    """Return the value of unquoted `text`; raises ValueError for what a recipe cannot hold.

    YAML 1.1 would read `1e-4` as text, `off` as false, `010` as 8 and `1:30` as 90. Here numbers are Python's decimal
    numbers, only true and false are booleans, and all else is text.
    """
    if text in _WORDS:
        return _WORDS[text]
    if text == "None":
        raise ValueError("found None, expected null for nothing, or 'None' in quotes for the word")
    if _NOT_FINITE.fullmatch(text):
        raise ValueError(f"found {text}, expected a finite number")
    if _INTEGER.fullmatch(text):
        if len(text) > 20 or abs(int(text)) >= 2**63:
            raise ValueError(f"found {text[:40]}, expected a whole number below 2^63")
        return int(text)
    if _FLOAT.fullmatch(text):
        if abs(number := float(text)) == float("inf"):
            raise ValueError(f"found {text[:40]}, expected a number below 1.8e308")
        return number
    return text


class _Composer(yaml.SafeLoader):
    """Composes nodes, and notes the problem of those that a recipe cannot hold."""

    depth = 0

    def resolve(self, kind: Any, value: Any, implicit: Any) -> str:
        return "tag:yaml.org,2002:str"

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        problem = None
        if isinstance(event, yaml.AliasEvent):
            problem = f"found the alias *{event.anchor}, expected the value itself; text beginning with * needs quotes"
            mark: Any = event.start_mark
            self.get_event()
            node: Any = yaml.ScalarNode("", "", mark, mark)
        else:
            if event.anchor is not None:
                problem = f"found the anchor &{event.anchor}; remove it, as recipes have no aliases"
            elif event.tag is not None:
                problem = f"found the tag {event.tag}; remove it, or quote text beginning with '!'"
            self.depth += 1
            if self.depth > _DEEPEST:
                raise yaml.MarkedYAMLError(problem=f"nested more than {_DEEPEST} deep", problem_mark=event.start_mark)
            node = super().compose_node(parent, index)
            self.depth -= 1
        if isinstance(node.value, str) and _SURROGATE.search(node.value):
            problem = "found the escape of half a surrogate pair, expected full characters"
        node.problem = problem
        return node


@dataclass
class Tree:
    """The value of a YAML text, the line of every part, and its problems."""

    value: Any = None
    lines: dict[Place, int] = field(default_factory=dict)
    problems: list[tuple[Place, str]] = field(default_factory=list)

    @classmethod
    def parse(cls, text: str) -> Tree:
        """Parse one document; raises yaml.YAMLError."""
        loader = _Composer(text)
        try:
            node = loader.get_single_node()
        except (ValueError, OverflowError) as error:  # what PyYAML lets through for an escape such as "\U00110000"
            problem = f"an escape of no character: {error}"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=loader.get_mark()) from error
        finally:
            loader.dispose()
        tree = cls()
        if node is not None:
            tree.value = tree._value(node, ())
        return tree

    def _value(self, node: Any, place: Place) -> Any:
        self.lines[place] = node.start_mark.line + 1
        if node.problem:
            self.problems.append((place, node.problem))
            return None
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, place)
        if isinstance(node, yaml.SequenceNode):
            return [self._value(item, (*place, index)) for index, item in enumerate(node.value)]
        try:
            return scalar(node.value) if node.style is None else node.value
        except ValueError as error:
            self.problems.append((place, str(error)))
            return None

    def _mapping(self, node: Any, place: Place) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        key_lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            key = self._key(key_node, place)
            if key is None:
                continue
            inner = (*place, key)
            if key in mapping:
                lines = f"on lines {key_lines[key]} and {line}" if key_lines[key] != line else f"on line {line}"
                self.problems.append((inner, f"given twice, {lines}; remove one of them"))
                continue
            key_lines[key] = line
            mapping[key] = self._value(value_node, inner)
            self.lines[inner] = line  # the key's line, also where the value begins below it
        return mapping

    def _key(self, node: Any, place: Place) -> str | None:
        found = "a list or mapping as a key"
        if isinstance(node.value, str):
            try:
                key = scalar(node.value) if node.style is None else node.value
            except ValueError:
                key = None
            if isinstance(key, str) and not node.problem:
                return key
            found = f"the key {node.value}"
        inner = (*place, node.value if isinstance(node.value, str) else "?")
        self.lines.setdefault(inner, node.start_mark.line + 1)
        self.problems.append((inner, f"found {found}, expected text; put it in quotes"))
        return None


def syntax_problem(error: yaml.MarkedYAMLError) -> str:
    """Return PyYAML's problem, with advice."""
    problem = error.problem or str(error)
    hints = [hint for words, hint in _SYNTAX_HINTS.items() if words in problem]
    return f"is not YAML: {problem}" + (f"; {hints[0]}" if hints else "")


# --------------------------------------------------------------------------------------------------------------------
# To text


def dotted(place: Place) -> str:
    return ".".join(map(str, place))


def leaves(value: Any, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Yield the values of a recipe's keys: single values and lists of them."""
    if value and (isinstance(value, dict) or (isinstance(value, list) and not _is_flat(value))):
        for step, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, (*place, step))
    else:
        yield place, value


def _is_flat(items: list[Any]) -> bool:
    return not any(isinstance(item, dict | list) for item in items)


def found_text(value: Any) -> str:
    if isinstance(value, str):
        text = repr(value)
    elif value is None or isinstance(value, bool):
        text = json.dumps(value)
    else:
        text = to_yaml(value, flow=True).strip() if isinstance(value, dict | list) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


class _Writer(yaml.SafeDumper):
    """Writes YAML that this module and YAML 1.1 read alike: one line for a value, a block for a mapping."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        try:
            plain = scalar(data) is data
        except ValueError:
            plain = False
        style = None if plain and data.isprintable() else "'" if data.isprintable() else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)

    def represent_list(self, data: Any) -> yaml.SequenceNode:
        flow = self.default_flow_style or _is_flat(data)
        return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=flow)


_Writer.add_representer(str, _Writer.represent_str)
_Writer.add_representer(list, _Writer.represent_list)


def to_yaml(value: Any, flow: bool = False) -> str:
    return yaml.dump(
        value, Dumper=_Writer, default_flow_style=flow, sort_keys=False, allow_unicode=True, width=float("inf")
    )
