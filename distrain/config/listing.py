"""Names of what is registered and a line about each, read from the sources: nothing is imported, PyTorch neither.

Names are literals where they are registered: `@models.register("mlp")` over a class or function, or, in a loop over a
dict that is written out, `for _name, _value in _TABLE.items(): losses.register(_name, …)`, where the line about a name
is the first text in its value.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

_ROOT = Path(__file__).parents[2]
_MODEL = re.compile(r"^@register_model\b(?:\(\))?\n.*?^def (\w+)", re.MULTILINE | re.DOTALL)


def registered(table: str, modules: Iterable[str]) -> dict[str, str]:
    """Return the names that modules, or every module of `package.*`, register in a table, with a line about each.

    Raises OSError where there are no sources.
    """
    found: dict[str, str] = {}
    for module in modules:
        place = _ROOT.joinpath(*module.removesuffix(".*").split("."))
        if module.endswith(".*"):
            files = sorted(place.glob("*.py"))
        else:
            files = [place / "__init__.py" if place.is_dir() else place.with_suffix(".py")]
        if not files:
            raise FileNotFoundError(place)
        for file in files:
            text = file.read_text(encoding="utf-8")
            if f"{table}.register(" in text:
                found |= _of_module(ast.parse(text), table)
    return dict(sorted(found.items()))


def _of_module(tree: ast.Module, table: str) -> Iterator[tuple[str, str]]:
    written = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            for call in _calls(node.decorator_list, table):
                given = {each.arg: each.value for each in call.keywords}
                about = _text(given["about"]) if "about" in given else ast.get_docstring(node)
                yield _text(call.args[0]), (about or "").partition("\n")[0]
        elif isinstance(node, ast.For) and isinstance(node.iter, ast.Call):
            looped = written.get(ast.unparse(node.iter.func).removesuffix(".items"))
            calls = list(_calls(ast.walk(node), table))
            # a refused name is only there to say what to write instead
            if looped is not None and calls and not any(each.arg == "refused" for each in calls[0].keywords):
                for key, value in zip(looped.keys, looped.values, strict=True):
                    yield _text(key), next(_texts(value))


def _calls(nodes: Iterable[ast.AST], table: str) -> Iterator[ast.Call]:
    for node in nodes:
        if isinstance(node, ast.Call) and ast.unparse(node.func) == f"{table}.register":
            yield node


def _texts(node: ast.AST) -> Iterator[str]:
    return (each.value for each in ast.walk(node) if isinstance(each, ast.Constant) and isinstance(each.value, str))


def _text(node: ast.AST | None) -> str:
    assert isinstance(node, ast.Constant), "names are written out where they are registered"
    return str(node.value)


def library_models(package: str, *folders: str) -> list[str]:
    """Return the models that torchvision or timm register below some of their folders; none where it is missing."""
    spec = importlib.util.find_spec(package)
    root = Path(spec.origin).parent if spec is not None and spec.origin else None
    files = (file for folder in folders for file in (root / folder).glob("*.py")) if root is not None else ()
    names = {name for file in files for name in _MODEL.findall(file.read_text(encoding="utf-8"))}
    return sorted(names, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])
