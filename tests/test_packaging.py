"""The wheel: what is in it, and that an installed distrain finds its own files."""

import ast
import importlib.metadata as metadata
import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NOT_FOR_USERS = {"bench", "dev", "docs"}
"""Extras of which the package itself imports nothing."""
PACKAGES = {"mlflow": {"mlflow-skinny"}, "pynvml": {"nvidia-ml-py"}}
"""Of modules that are not installed here."""
NEEDS_NO_WORD = {
    "pydantic_core": "pydantic demands one version of it",
    "typing_extensions": "imported for types only",
    "IPython": "imported in a notebook, which has it",
    "torchao": "asked for by a sentence that says how to install it",
}
NO_SENTENCE = {"energy", "fast", "graphs"}
"""Extras without which something is left out or slower, or which whoever needs them has imported already."""


@pytest.mark.slow
def test_the_wheel_holds_everything_and_works_without_the_checkout(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    subprocess.run([*build, str(tmp_path), str(ROOT)], check=True, timeout=300)
    (wheel,) = tmp_path.glob("distrain-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    for folder in ("recipes", "accelerate_configs", "launch", "slurm"):
        tracked = subprocess.run(
            ["git", "ls-files", folder], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split()
        assert tracked, folder
        assert {f"distrain/share/{name}" for name in tracked} <= names
    page = {path.name for path in (ROOT / "distrain/report/ui/static").rglob("*") if path.is_file()}
    assert {"index.html", "main.js", "style.css", "uPlot.iife.min.js", "LICENSE-uPlot.txt"} <= page
    assert page == {Path(name).name for name in names if name.startswith("distrain/report/ui/static/")}
    assert not any("prepared" in name or "__pycache__" in name for name in names)

    script = (
        "import json, distrain; from distrain.launchers import shared_file; "
        "print(json.dumps([distrain.__file__, str(shared_file('recipes', 'digits.yaml')), "
        "str(shared_file('accelerate_configs', 'multi_cpu.yaml')), str(shared_file('launch', 'train.py'))]))"
    )
    site = tmp_path / "site"
    # -P: the checkout must not be found by way of the current folder
    done = subprocess.run(
        [sys.executable, "-P", "-c", script], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    paths = json.loads(done.stdout)
    assert all(Path(path).is_relative_to(site) and Path(path).exists() for path in paths), paths


def names_of(requirements: list[str]) -> set[str]:
    return {re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", each)[0]).lower() for each in requirements}


def libraries(tree: ast.AST, inside: bool = False) -> Iterator[tuple[str, bool]]:
    """Yield (module, whether a function imports it) of other projects' modules, but for types."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        found = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        tops = {each.partition(".")[0] for each in found} - sys.stdlib_module_names - {"distrain"}
        yield from ((each, inside) for each in tops)
        yield from libraries(node, inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def test_what_is_imported_is_declared() -> None:
    """A package that only comes with another may be gone, or be any version, in a user's environment."""
    always = names_of(PROJECT["dependencies"])
    extras = {name: names_of(each) for name, each in PROJECT["optional-dependencies"].items()}
    users = set().union(*(each for name, each in extras.items() if name not in NOT_FOR_USERS))
    installed = metadata.packages_distributions()
    undeclared, eager, used = [], set(), set()
    for file in sorted((ROOT / "distrain").rglob("*.py")):
        for module, inside in libraries(ast.parse(file.read_text())):
            packages = names_of(installed.get(module, [])) or PACKAGES.get(module, {module.lower()})
            used.add(module)
            if packages & always or module in NEEDS_NO_WORD:
                continue
            if not packages & users:
                undeclared.append(f"{file}: {module}")
            elif not inside:
                eager.add(f"{file.relative_to(ROOT)}: {module}")
    assert not undeclared
    # the first is tried, and done without; the second is imported by `distrain watch` alone, which names its extra
    assert eager == {"distrain/checkpoints/sources.py: zlib_ng", "distrain/report/watching.py: textual"}
    assert {"PIL", "torch", "mlflow", "scipy"} <= used


@pytest.mark.parametrize("extra", sorted({*PROJECT["optional-dependencies"]} - NOT_FOR_USERS - NO_SENTENCE))
def test_an_extra_is_named_where_it_is_missing(extra: str) -> None:
    texts = [file.read_text() for file in (ROOT / "distrain").rglob("*.py")]
    named = any(f"distrain[{extra}]" in text for text in texts)
    tracker = any(f'package = "{extra}"' in text for text in texts)  # of which the sentence is made
    assert named or tracker
