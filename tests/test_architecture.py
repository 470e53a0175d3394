"""The floors of the house, from the imports themselves."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from runs import train, write_recipe

import distrain

ROOT = Path(distrain.__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))
import house  # noqa: E402
from house import FLOORS, imports, room_of, sources  # noqa: E402

PACKAGE = Path(distrain.__file__).parent
PLACE = {room: (floor, place) for floor, rooms in enumerate(FLOORS) for place, room in enumerate(rooms)}
NO_TORCH = [
    "system",
    "config",
    "run",
    "checkpoints",
    "checkpoints.export",
    "checkpoint",
    "datasets.tokens",
    "fingerprints",
    "diagnose.hang_diagnosis",
    "autobatch",
    "launchers",
    "launchers.slurm",
    "report",
    "prove",
    "project",
    "cli",
]
"""What a command may import that has nothing to compute."""


def test_every_room_has_a_place() -> None:
    assert {room_of(file) for file in sources()} - {"__init__"} <= set(PLACE)


@pytest.mark.parametrize("file", sources(), ids=lambda file: str(file.relative_to(PACKAGE)))
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


def test_the_drawing_of_the_house_is_that_of_the_imports() -> None:
    assert house.DRAWING.read_text() == house.drawing(), "python docs/house.py draws it anew"


def test_no_files_import_each_other_in_a_circle() -> None:
    modules = {
        ".".join(("distrain", *file.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): file
        for file in sources()
    }
    graph: dict[str, set[str]] = {}
    for module, file in modules.items():
        # what a function imports when it is called, and what only types need, can wait for the other
        eager = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        graph[module] = set()
        for name, _ in imports(ast.Module(body=[*eager], type_ignores=[])):
            known = name if name in modules else name.rpartition(".")[0]
            if known in modules and known != module:
                graph[module].add(known)
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError with the circle


def test_the_rule_can_be_broken() -> None:
    found = dict(imports(ast.parse("def f():\n    from distrain.loop import train\n    import distrain.cli")))
    assert found == {"distrain.loop.train": 2, "distrain.cli": 3}
    assert PLACE["loop"] > PLACE["data"]


def without_torch(module: str) -> bool:
    """Whether this module, or the room that it is in, is to import no torch."""
    return any(f"{module}.".startswith(f"{room}.") for room in NO_TORCH)


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_needs_no_torch_imports_none() -> None:
    modules = [
        ".".join(("distrain", *file.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
        for file in sources()
        if file.name != "__main__.py"
    ]
    names = ", ".join(name for name in modules if without_torch(name.removeprefix("distrain.")))
    heavy = "{'torch', 'accelerate', 'pandas', 'sklearn', 'wandb'}"
    assert python(f"import sys, {names}; print(sorted({heavy} & set(sys.modules)))").strip() == "[]"


NOT_OF_EVERY_RUN = "pandas scipy sklearn torchmetrics torchvision transformers deepspeed wandb tensorboard"
"""Imported by the runs that use them only: together they take longer than a first run."""


@pytest.mark.parametrize(
    ("recipe", "used"),
    [
        ("name: t\ntask: classification\ndata: {name: iris}\nmodel: {name: mlp}\n", ""),
        ("name: t\ntask: classification\ndata: {name: digits}\nmodel: {name: resnet18}\n", "torchvision"),
    ],
    ids=["a table", "an image model"],
)
def test_a_run_imports_only_the_libraries_it_uses(recipe: str, used: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe + "batch: {global: 16}\ntrain: {epochs: null, steps: 1}\n")
    out = python(
        f"import sys; sys.argv = ['distrain', 'train', {str(path)!r}, '--run-dir', {str(tmp_path / 'run')!r}]\n"
        "from distrain.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code\n"
        f"print('imported:', *sorted(set({NOT_OF_EVERY_RUN!r}.split()) & set(sys.modules)))"
    )
    assert out.splitlines()[-1].split()[1:] == used.split()


def test_help_imports_no_torch_and_nothing_slow() -> None:
    began = time.perf_counter()
    out = python(
        "import sys; sys.argv = ['distrain', '--help']\n"
        "from distrain.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "print(sorted({'torch', 'accelerate', 'pandas', 'numpy', 'wandb'} & set(sys.modules)))"
    )
    print(f"distrain --help took {time.perf_counter() - began:.2f} s")
    assert "Usage" in out
    assert out.strip().endswith("[]")


def test_commands_on_checkpoints_import_no_torch(tmp_path: Path) -> None:
    train(1, write_recipe(tmp_path), tmp_path / "run")
    script = (
        "import sys; from typer.testing import CliRunner; from distrain.cli.main import app\n"
        "for arguments in (['ls', RUN], ['verify', RUN], ['export', RUN, '-o', OUT], ['import', OUT, OUT + '-run']):\n"
        "    done = CliRunner().invoke(app, ['checkpoint', *arguments])\n"
        "    assert done.exit_code == 0, done.output\n"
        "assert 'torch' not in sys.modules"
    )
    names = f"RUN, OUT = {str(tmp_path / 'run')!r}, {str(tmp_path / 'model.safetensors')!r}\n"
    python(names + script)
