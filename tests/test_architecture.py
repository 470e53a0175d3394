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
PLACE["__init__"] = (len(FLOORS), 0)  # `import distrain` offers what is in the rooms
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
    "doctor",
    "report",
    "sweep",
    "prove",
    "project",
    "api",
    "cli",
]
"""What a command may import that has nothing to compute."""


def test_every_room_has_a_place() -> None:
    assert {room_of(file) for file in sources()} <= set(PLACE)


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
            # with a module come the packages that it is in, whose `__init__` runs first
            parts = name.split(".")
            for known in (".".join(parts[:length]) for length in range(2, len(parts) + 1)):
                if known in modules and not f"{module}.".startswith(f"{known}."):
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
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
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


NOT_OF_HELP = "torch accelerate pandas numpy wandb pydantic yaml distrain.config.sections distrain.launchers"
"""Imported by commands that read a recipe or train."""

NOT_OF_EVERY_RUN = (
    "pandas scipy sklearn torchmetrics torchvision transformers tokenizers deepspeed wandb tensorboard distrain.report "
    "torch._dynamo torch._inductor torch.distributed.tensor triton sympy"
)
"""Imported by the runs that use them only: together they take longer than a first run."""


@pytest.mark.parametrize(
    ("recipe", "used"),
    [
        ("task: classification\ndata: {name: iris}\nmodel: {name: mlp}\n", ""),
        ("task: classification\ndata: {name: digits}\nmodel: {name: resnet18}\n", "torchvision"),
        ("task: language_modeling\ndata: {name: text, path: TEXT, seq_len: 8}\nmodel: {name: gpt, n_layer: 1}\n", ""),
        ("task: regression\ndata: {name: table, path: TABLE, target: y}\nmodel: {name: mlp}\n", "pandas"),
    ],
    ids=["rows in memory", "an image model", "a language model", "a table"],
)
def test_a_run_imports_only_the_libraries_it_uses(recipe: str, used: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    files = {"TEXT": tmp_path / "text.txt", "TABLE": tmp_path / "table.csv"}
    files["TEXT"].write_text("a language of few words. " * 100)
    files["TABLE"].write_text("x,y\n" + "".join(f"{row},{row % 7}.5\n" for row in range(100)))
    for name, file in files.items():
        recipe = recipe.replace(name, str(file))
    path.write_text(f"name: t\n{recipe}batch: {{global: 16}}\ntrain: {{epochs: null, steps: 1}}\n")
    out = python(
        f"import sys; sys.argv = ['distrain', 'train', {str(path)!r}, '--run-dir', {str(tmp_path / 'run')!r}]\n"
        "from distrain.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code\n"
        f"print('imported:', *sorted(set({NOT_OF_EVERY_RUN!r}.split()) & set(sys.modules)))"
    )
    assert out.splitlines()[-1].split()[1:] == sorted(used.split())


SAYS_WHAT_IT_IMPORTED = f"""
import atexit, sys
from pathlib import Path
from distrain import Callback

class Imported(Callback):
    def __init__(self, folder: str):
        self.folder = folder

    def on_start(self, run):
        names = {NOT_OF_EVERY_RUN!r}.split()
        file = Path(self.folder) / str(run.rank)
        atexit.register(lambda: file.write_text(" ".join(sorted(set(names) & set(sys.modules)))))
"""


@pytest.mark.parametrize(
    ("strategy", "model", "used"),
    [
        ("ddp", "mlp", ""),
        pytest.param("ddp", "resnet18", "torchvision", marks=pytest.mark.more),
        pytest.param("zero1", "mlp", "deepspeed tokenizers transformers", marks=pytest.mark.more),
    ],
)
def test_each_of_several_processes_imports_only_what_it_uses(
    strategy: str, model: str, used: str, tmp_path: Path
) -> None:
    (tmp_path / "imported.py").write_text(SAYS_WHAT_IT_IMPORTED)
    text = (
        "name: t\ntask: classification\ndata: {name: digits}\nbatch: {global: 16}\n"
        f"model: {{name: {model}}}\noptim: {{name: adamw, lr: 0.1}}\ntrain: {{epochs: null, steps: 3}}\n"
        f"callbacks: [{{name: 'imported.py:Imported', folder: {str(tmp_path)!r}}}]\n"
    )
    recipe = write_recipe(tmp_path, text)
    options = ["--processes", "2", "--strategy", strategy, "--run-dir", str(tmp_path / "run")]
    command = [sys.executable, "-m", "distrain", "train", str(recipe), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / rank).read_text().split() for rank in ("0", "1")] == [used.split()] * 2


def test_help_imports_no_torch_and_nothing_slow() -> None:
    began = time.perf_counter()
    out = python(
        "import sys; sys.argv = ['distrain', '--help']\n"
        "from distrain.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code\n"
        f"print(sorted(set({NOT_OF_HELP!r}.split()) & set(sys.modules)))"
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


# --------------------------------------------------------------------------------------------------------------------
# What tests replace


def replaced_in(tree: ast.AST) -> set[str]:
    """Return the attributes of distrain's modules and classes that a file assigns, by setattr or `=`, but for limits.

    A constant, in capitals, may be made smaller: the same code is reached with less.
    """
    named: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "distrain":
            named |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == "distrain":
                    named[alias.asname or "distrain"] = alias.name if alias.asname else "distrain"

    def dotted(node: ast.AST) -> str:
        if isinstance(node, ast.Constant):
            return str(node.value) if str(node.value).startswith("distrain.") else ""
        if isinstance(node, ast.Name):
            return named.get(node.id, "")
        inner = dotted(node.value) if isinstance(node, ast.Attribute) else ""
        return f"{inner}.{node.attr}" if isinstance(node, ast.Attribute) and inner else ""

    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and "setattr" in (getattr(node.func, "attr", ""), getattr(node.func, "id", "")):
            owner, name = dotted(node.args[0]), node.args[1] if len(node.args) > 1 else None
            whole = isinstance(node.args[0], ast.Constant) or not isinstance(name, ast.Constant)
            found.add(owner if whole or not owner else f"{owner}.{name.value}")  # type: ignore[union-attr]
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
            found.add(dotted(node))
    others = {"shutil", "os", "sys", "ImageOps", "logger"}  # not the package's, though reached through it
    ours = {each for each in found if each and not others & set(each.split("."))}
    return {each for each in ours if not each.rpartition(".")[2].isupper() or each.endswith("._READERS")}


def test_no_test_and_no_benchmark_replaces_a_function_of_the_package() -> None:
    files = [*ROOT.glob("tests/**/*.py"), *ROOT.glob("benchmarks/**/*.py")]
    assert len(files) > 100
    for file in files:
        replaced = replaced_in(ast.parse(file.read_text()))
        assert not replaced, (
            f"{file.relative_to(ROOT)} replaces {', '.join(sorted(replaced))}: use a callback, an argument, a user's "
            "model or data set, or what the operating system does"
        )


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("from distrain import loop\nloop.train_step = f", {"distrain.loop.train_step"}),
        ("def f(m):\n    import distrain.training.saving as s\n    m.setattr(s.Saver, 'begin', 1)",
         {"distrain.training.saving.Saver.begin"}),
        ("m.setattr('distrain.loop.train', f)", {"distrain.loop.train"}),
        ("from distrain.run import lease\nm.setattr(lease, '_WATCH_S', 1)", set()),
        ("import os\nfrom distrain.checkpoints import writing\nos.fsync = f\nwriting.shutil.rmtree = f", set()),
        ("from distrain.config import registry\nregistry.f.g = 1", {"distrain.config.registry.f.g"}),
    ],
)  # fmt: skip
def test_what_is_replaced_is_found(code: str, found: set[str]) -> None:
    assert replaced_in(ast.parse(code)) == found
