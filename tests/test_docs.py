"""What the pages say is so: their commands run, their links lead somewhere, and they leave nothing out.

How a page is read, from top to bottom, in a folder of its own that holds copies of recipes/, launch/ and
accelerate_configs/:

- a fenced block of yaml, python or text whose first line is a comment with a file name is written to that file;
- in a fenced block of console, each line that begins with `$ ` is run. What is shown below it must be among what it
  prints, in that order and up to numbers; `...` stands for anything. It must succeed, unless what is shown begins with
  `error`. `make` and `git clone` are not run: make's targets must exist.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from runs import cli, script

from distrain.config import registry
from distrain.config.yaml import json_schema

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))
import keys  # noqa: E402

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
by_name = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FILE_NAME = re.compile(r"# (\S+\.(?:yaml|py|txt|csv|tsv|jsonl))\n")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
IMAGE = re.compile(r'<img[^>]*\ssrc="([^"]+)"')
NUMBER = re.compile(r"[+-]?\d[\d,_]*(?:\.\d+)?(?:e[+-]?\d+)?")
ECHOED = '; echo "exit status $?"'
LOOP = re.compile(r"for (\w+) in ([^;]+); do (distrain [^;|&<>]+); done")
RUNS = "/home/you/distrain"
"""The folder that the pages say they are in."""


@dataclass(frozen=True)
class File:
    """A file that a page shows."""

    name: str
    text: str


@dataclass(frozen=True)
class Command:
    """A command that a page shows, and the lines below it."""

    line: str
    shown: tuple[str, ...]

    @property
    def fails(self) -> bool:
        """Whether the page shows it failing."""
        return bool(self.shown) and self.shown[0].startswith("error")


def story(text: str) -> Iterator[File | Command]:
    """Yield what a page shows, in its order."""
    for language, body in FENCE.findall(text):
        if language in ("yaml", "python", "text") and (match := FILE_NAME.match(body)):
            # JSON has no comments
            yield File(match[1], body.removeprefix(match[0]) if match[1].endswith(".jsonl") else body)
        if language == "console":
            lines = body.replace("\\\n", "").splitlines()
            starts = [index for index, line in enumerate(lines) if line.startswith("$ ")]
            assert lines
            assert starts[:1] == [0], f"a console block begins with a command: {lines[0]!r}"
            for start, stop in zip(starts, [*starts[1:], len(lines)], strict=True):
                shown = [line for line in lines[start + 1 : stop] if line.strip()]
                yield Command(lines[start][2:].partition("  #")[0].strip(), tuple(shown))


def plain(line: str, folder: Path) -> str:
    """Return a line without what differs from run to run."""
    line = line.replace(str(folder), RUNS)
    return " ".join(NUMBER.sub("0", line).split())


def run(command: Command, folder: Path) -> tuple[int, str]:
    """Return the exit status of a command and what it printed.

    `distrain`, Python scripts and the processes that they start take no time for their imports; all else is started as
    it is typed.
    """
    if loop := LOOP.fullmatch(command.line):
        name, values, body = loop.groups()
        ends = [run(Command(body.replace(f"${name}", value), ()), folder) for value in values.split()]
        return ends[-1][0], "".join(printed for _, printed in ends)
    line = command.line.removesuffix(ECHOED)
    words = shlex.split(line) if not re.search(r"[|&;<>$]", line) else []
    if words[:1] == ["distrain"] or (words[:1] == ["python"] and words[1].endswith(".py")):
        ended = cli(*words[1:]) if words[0] == "distrain" else script(*words[1:])
        printed = ended.out + ended.err
        return (0, f"{printed}exit status {ended.status}\n") if line != command.line else (ended.status, printed)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", command.line],
        cwd=folder,
        env={**os.environ, "PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout


@pytest.mark.slow
@by_name
def test_what_a_page_shows_is_what_happens(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("recipes", "launch", "accelerate_configs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("prepared", "__pycache__"))
    monkeypatch.chdir(tmp_path)
    for item in story(page.read_text(encoding="utf-8")):
        if isinstance(item, File):
            (tmp_path / item.name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / item.name).write_text(item.text, encoding="utf-8")
            continue
        if item.line.startswith(("git clone", "cd ")):
            continue
        if item.line.startswith("make"):
            targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert set(item.line.split()[1:]) <= set(targets), item.line
            continue
        status, printed = run(item, tmp_path)
        assert (status != 0) == item.fails, f"$ {item.line}\nended with {status}\n{printed}"
        rest = iter([plain(line, tmp_path) for line in printed.splitlines()])
        # `in` reads on from the line that was found before
        missing = [line for line in item.shown if line.strip() != "..." and plain(line, tmp_path) not in rest]
        assert not missing, f"$ {item.line}\ndid not print\n{missing[0]}\nbut\n{printed}"


@by_name
def test_links_and_images_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    prose = FENCE.sub("", text)
    for link in [*LINK.findall(prose), *IMAGE.findall(prose)]:
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {link}"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target.read_text(encoding="utf-8")), f"{page.name} links to {link}"


def anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_is_reached_from_the_readme() -> None:
    links = LINK.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    assert {f"docs/{page.name}" for page in PAGES[1:]} <= {link.partition("#")[0] for link in links}


def test_the_tables_of_keys_are_those_of_the_schema() -> None:
    page = keys.PAGE.read_text(encoding="utf-8")
    assert page == keys.with_tables(page), "docs/recipe.md is behind the schema: python docs/keys.py"
    # found by other means than the tables are made by
    schema = json_schema()
    tables = dict(re.findall(r"<!-- keys: (\S+) -->\n(.*?)<!-- end -->", page, re.DOTALL))
    assert len(tables) == page.count("<!-- keys: ") == page.count("<!-- end -->")
    for name, table in tables.items():
        rows = re.findall(r"^\| `(\w+)` \|.*\S \|$", table, re.MULTILINE)
        forms = keys.sections(schema)[name]
        assert set(rows) == {key for form in forms for key in form["properties"]}, name
        assert rows, name
    described = {key for section in schema["$defs"].values() for key in section.get("properties", ())}
    assert [key for key in described if f"| `{key}` |" not in page] == []
    missing = [name for name in keys.sections(schema) if f"<!-- keys: {name} -->" not in page]
    assert not missing, f"docs/recipe.md has no table of {missing}"


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("data.md", registry.datasets.names()),
        ("metrics.md", registry.metrics.names()),
        ("models.md", registry.models.names()),
        ("models.md", registry.optimizers.names()),
        ("models.md", registry.losses.names()),
    ],
    ids=["datasets", "metrics", "models", "optimizers", "losses"],
)
def test_every_name_is_on_its_page(page: str, names: dict[str, str]) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert [name for name in names if f"`{name}`" not in text] == []


@by_name
def test_fragments_of_recipes_have_keys_of_recipes(page: Path) -> None:
    """Those that are shown for their section alone, which nothing trains."""
    schema = json_schema()
    recipe = schema["properties"].keys()
    for language, body in FENCE.findall(page.read_text(encoding="utf-8")):
        if language != "yaml":
            continue
        shown = yaml.safe_load(body)
        if not isinstance(shown, dict) or not shown.keys() <= recipe:
            continue  # of a site, a GPU or a chat
        for name, value in shown.items():
            if isinstance(value, dict):
                forms = keys.sections(schema).get(name, [])
                known = {key for form in forms for key in form["properties"]}
                takes_any = name in ("data", "model", "loss", "optim", "schedule", "task")
                assert takes_any or value.keys() <= known, f"{page.name}: {name} has no {value.keys() - known}"


def test_files_named_in_the_pages_are_there() -> None:
    for page in PAGES:
        prose = FENCE.sub("", page.read_text(encoding="utf-8"))
        for name in re.findall(
            r"`((?:recipes|tests|launch|docs|accelerate_configs|benchmarks|distrain)/[\w./-]+)`", prose
        ):
            assert (ROOT / name).exists(), f"{page.name} names {name}"
