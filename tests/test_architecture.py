"""The floors of the house, from the imports themselves."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from runs import train, write_recipe

import distrain

PACKAGE = Path(distrain.__file__).parent
FLOORS = [
    [
        "output",
        "screen",
        "config",
        "environment",
        "bounded",
        "recipe_file",
        "tokens",
        "memory",
        "rundir",
        "probed",
        "lease",
        "heartbeat",
        "stacks",
    ],
    ["checkpoint", "consolidate", "datasets", "data", "inputs", "networks", "models", "optim", "metrics", "strategy"],
    ["watchdog", "offline_runs", "telemetry", "loop", "predictions", "inference"],
    ["probing", "launcher", "slurm", "status", "plan", "report", "doctor", "prove", "project"],
    ["cli_options", "cli_cluster", "cli"],
]
"""The rooms of each floor: a room imports from lower floors, and from those before it on its own."""

PLACE = {room: (floor, place) for floor, rooms in enumerate(FLOORS) for place, room in enumerate(rooms)}
NO_TORCH = [
    *(
        "output",
        "config",
        "bounded",
        "environment",
        "memory",
        "rundir",
        "probed",
        "probing",
        "lease",
        "heartbeat",
        "stacks",
        "watchdog",
        "recipe_file",
        "tokens",
        "inputs",
        "checkpoint",
        "consolidate",
        "launcher",
        "slurm",
        "status",
        "prove",
        "project",
        "cli",
    ),
]


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield (module, line) of every absolute import, also those within functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports within distrain are absolute"
            assert node.module is not None
            # `from distrain import config` names a room as well
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


SOURCES = sorted(file for file in PACKAGE.rglob("*.py") if "share" not in file.parts and file.parent.name != "sites")


def test_every_room_has_a_place() -> None:
    assert {room_of(file) for file in SOURCES} - {"__init__"} <= set(PLACE)


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_room_imports_only_from_below(file: Path) -> None:
    room = room_of(file)
    for module, line in imports(ast.parse(file.read_text())):
        if not module.startswith("distrain."):
            continue
        other = module.split(".")[1]
        if other == room or other not in PLACE:
            assert other == room or hasattr(distrain, other), f"{file}:{line} imports {module}, which has no place"
            continue
        assert PLACE[other] < PLACE[room], f"{file}:{line}: {room} may not import {other}"


def test_the_rule_can_be_broken() -> None:
    found = dict(imports(ast.parse("def f():\n    from distrain.loop import train\n    import distrain.cli")))
    assert found == {"distrain.loop.train": 2, "distrain.cli": 3}
    assert PLACE["loop"] > PLACE["data"]


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_rooms_without_torch_stay_without_it() -> None:
    there = [room for room in NO_TORCH if (PACKAGE / room).is_dir() or (PACKAGE / f"{room}.py").is_file()]
    assert there == NO_TORCH
    names = ", ".join(f"distrain.{room}" for room in there)
    heavy = "{'torch', 'accelerate', 'pandas', 'sklearn', 'wandb'}"
    assert python(f"import sys, {names}; print(sorted({heavy} & set(sys.modules)))").strip() == "[]"


def test_help_imports_no_torch_and_nothing_slow() -> None:
    began = time.perf_counter()
    out = python(
        "import sys; sys.argv = ['distrain', '--help']\n"
        "from distrain.cli import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "print(sorted({'torch', 'accelerate', 'pandas', 'numpy', 'wandb'} & set(sys.modules)))"
    )
    print(f"distrain --help took {time.perf_counter() - began:.2f} s")
    assert "Usage" in out
    assert out.strip().endswith("[]")


def test_commands_on_checkpoints_import_no_torch(tmp_path: Path) -> None:
    train(1, write_recipe(tmp_path), tmp_path / "run")
    script = (
        "import sys; from typer.testing import CliRunner; from distrain.cli import app\n"
        "for arguments in (['ls', RUN], ['verify', RUN], ['export', RUN, '-o', OUT], ['import', OUT, OUT + '-run']):\n"
        "    done = CliRunner().invoke(app, ['checkpoint', *arguments])\n"
        "    assert done.exit_code == 0, done.output\n"
        "assert 'torch' not in sys.modules"
    )
    names = f"RUN, OUT = {str(tmp_path / 'run')!r}, {str(tmp_path / 'model.safetensors')!r}\n"
    python(names + script)
