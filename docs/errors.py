"""The catalogue of errors, read from the source when the site is built: every message that tells a user what is wrong.

Each message says what was found, what was expected and what to do; the catalogue lists them by where they arise, so
that searching it for a message of the terminal finds what it is about.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "distrain"
_CODE = re.compile(r"([`<>|\\])")


@dataclass(frozen=True)
class Message:
    """One place that raises an error which a user can mend."""

    file: str
    """Of the package, such as `datasets/images.py`."""
    line: int
    function: str
    error: str
    """The class of the error."""
    text: str
    """With `…` for what is filled in."""


def error_classes(trees: dict[str, ast.Module]) -> set[str]:
    """Return the names of UserError and the classes that derive from it."""
    found = {"UserError"}
    classes = [node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    while True:
        more = {
            each.name for each in classes if any(isinstance(base, ast.Name) and base.id in found for base in each.bases)
        }
        if more <= found:
            return found
        found |= more


def parsed() -> dict[str, ast.Module]:
    """Return the syntax trees of the package's files by their path in it."""
    return {
        path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def messages() -> list[Message]:
    """Return every message, by file and line."""
    trees = parsed()
    classes = error_classes(trees)
    return [each for file, tree in trees.items() for each in _of(tree, file, classes, "")]


def _of(node: ast.AST, file: str, classes: set[str], function: str) -> Iterator[Message]:
    for child in ast.iter_child_nodes(node):
        inside = function
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            inside = f"{function}.{child.name}" if function else child.name
        if isinstance(child, ast.Call) and isinstance(child.func, ast.Name) and child.func.id in classes:
            text = " ".join(_text(child.args[0]).split()) if child.args else ""
            if not text.strip("… "):  # made elsewhere, from what is named here
                text = f"… ({ast.unparse(child.args[0])})" if child.args else "…"
            yield Message(file, child.lineno, function, child.func.id, text)
        yield from _of(child, file, classes, inside)


def _text(node: ast.expr) -> str:
    """Return what an expression says, as far as it is written there."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(_text(part) if isinstance(part, ast.Constant) else "…" for part in parts)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return (_text(left) or "…") + (_text(right) or "…")
        case ast.IfExp(body=one, orelse=other):
            return " / ".join(filter(None, (_text(one), _text(other))))
        case ast.Call(
            func=ast.Attribute(value=ast.Constant(value=str(between)), attr="join"), args=[ast.List(elts=parts)]
        ):
            return between.join(_text(part) or "…" for part in parts)
    return ""


def catalogue() -> str:
    """Return all messages as Markdown, by room."""
    found = messages()
    rooms: dict[str, list[Message]] = {}
    for each in found:
        rooms.setdefault(each.file.partition("/")[0].removesuffix(".py"), []).append(each)
    lines = [f"There are {len(found)}; `…` stands for what is filled in. Search for some words of a message."]
    for room in sorted(rooms):
        lines += ["", f"## {room}", "", _about(room), "", "| message | raised in |", "|---|---|"]
        lines += [f"| {_cell(each.text)} | `{each.file}` `{each.function}` |" for each in rooms[room]]
    return "\n".join(lines) + "\n"


def _about(room: str) -> str:
    file = PACKAGE / room / "__init__.py" if (PACKAGE / room).is_dir() else PACKAGE / f"{room}.py"
    said = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return said.partition("\n\n")[0].replace("\n", " ")


def _cell(text: str) -> str:
    return _CODE.sub(r"\\\1", text).replace("*", r"\*").replace("_", r"\_").replace("{", r"\{").replace("[", r"\[")


if __name__ == "__main__":
    print(catalogue())
