"""One language: the field's words in public names and on the pages, and none of those that they have replaced."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from places import ROOT

sys.path.insert(0, str(ROOT / "docs"))
from house import sources

RETIRED_NAMES = {
    *("Asked", "Wish", "Stated", "Engine", "Replicated", "Fsdp2", "Zero", "Training", "Own", "StepNumbers", "Feed"),
    *("Setup", "Waited", "Every", "Best", "Held", "OwnTensors", "Witness", "Verdict", "Probed", "Leg", "Undecodable"),
    *("plain_name", "plain_model", "imagine_without_gradient", "announcement", "lockstep", "build_engine", "probed"),
    *("align_buffers", "averaged", "autopsy"),
}
"""What classes, functions and modules were called, and are no more."""

RETIRED_PHRASES = [
    r"go(es)? on from",
    r"gone on (from|with)",
    r"(is|are|was) no number",
    r"lockstep",
    r"plain names?",
    r"straight run",
    r"trains? straight",
    r"autopsy",
    r"left out",
    r"leaves? out",
    r"(is|are|was|were|be) told",
    r"lets? go of",
    r"rehearse",
    r"without a word",
    r"far too large",
    r"a score",
]
"""What pages and messages said, in words that only this project had."""


def public_names() -> Iterator[tuple[Path, str]]:
    for file in sources():
        yield file, file.stem
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith(
                "_"
            ):
                yield file, node.name


def test_no_public_name_is_a_retired_one() -> None:
    found = [f"{file.relative_to(ROOT)}: {name}" for file, name in public_names() if name in RETIRED_NAMES]
    assert not found, "\n".join(found)


def test_no_function_takes_a_way_to_say_something() -> None:
    found = [
        f"{file.relative_to(ROOT)}:{node.lineno}: {argument.arg}; log it, as docs/contributing.md describes"
        for file in sources()
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
        if argument.arg in ("say", "tell")
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("file", sources(), ids=lambda file: str(file.relative_to(ROOT)))
def test_no_message_or_docstring_speaks_in_retired_words(file: Path) -> None:
    found = [
        f"{node.lineno}: {phrase}: {node.value[:100]!r}"
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        for phrase in RETIRED_PHRASES
        if re.search(rf"\b{phrase}\b", node.value, re.I)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name
)
def test_no_page_speaks_in_retired_words(page: Path) -> None:
    prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    prose = re.sub(r"<!-- keys:.*?<!-- end -->", "", prose, flags=re.DOTALL)
    prose = re.sub(r"`[^`\n]*`", "", prose)
    found = [
        line for line in prose.splitlines() for phrase in RETIRED_PHRASES if re.search(rf"\b{phrase}\b", line, re.I)
    ]
    assert not found, "\n".join(found)
