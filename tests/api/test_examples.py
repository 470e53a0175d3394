"""The examples run as they are: scripts, and a notebook in a kernel of its own."""

from __future__ import annotations

import ast
import re
import shutil
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from runs import script

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
NOTEBOOK = EXAMPLES / "first_run.ipynb"

FIGURES = {
    "diffusion.py": ((r"nearest digit at ([\d.]+)", 2.0, 5.0), (r"of noise at ([\d.]+)", 8.0, 10.0)),
    "gan.py": (
        (r"accuracy (0\.\d+)", 0.6, 0.95),  # of the discriminator; 0.5 where it sees nothing
        (r"to the digits ([\d.]+)", 0.0, 5.0),
        (r"untrained ([\d.]+)", 40.0, 50.0),
    ),
    "reinforce.py": ((r"stands for ([\d.]+)", 80, 100), (r"greedily ([\d.]+)", 90, 100)),  # 28 after 5 steps
    "distillation.py": ((r"teacher ([\d.]+), student", 0.93, 1), (r"student (0\.\d+)", 0.8, 1)),
}
"""What a script prints, the last time, and between which bounds it is."""


@pytest.mark.parametrize(
    ("name", "arguments", "shown"),
    [
        ("own_model.py", (), "BestEvaluation(metric='accuracy'"),
        ("own_parts.py", ("--processes", 2), "watched: step 20, loss"),
        ("compare.py", (), "lr 0.1: loss"),
        ("two_towers.py", (), "found among 180: 0.2"),  # by chance 0.006
        ("diffusion.py", (), "nearest digit at"),
        pytest.param("gan.py", (), "distance to the digits", marks=pytest.mark.more),  # docs/tasks.md trains one
        ("reinforce.py", (), "step 30: the pole stands"),
        ("distillation.py", (), "parameters: teacher 9,610, student 610"),
    ],
)
def test_a_script_runs(
    name: str, arguments: tuple[Any, ...], shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "recipes", "recipes", ignore=shutil.ignore_patterns("prepared", "prepare"))
    shutil.copytree(EXAMPLES, "examples")
    ended = script(f"examples/{name}", *arguments)
    assert ended.status == 0, ended.err
    assert shown in ended.out
    for pattern, least, most in FIGURES.get(name, ()):
        figures = re.findall(pattern, ended.out)
        assert figures, pattern
        assert least <= float(figures[-1]) <= most, f"{pattern}: {figures}"


def test_every_example_is_run_and_named_in_the_docs() -> None:
    tested = Path(__file__).read_text()
    page = (ROOT / "docs" / "python.md").read_text()
    names = [path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")]
    assert len(names) >= 4
    assert [name for name in names if name not in tested or f"examples/{name}" not in page] == []


INTERRUPTED = """
import os, signal

class Stop(distrain.Callback):
    def on_step_end(self, step, metrics):
        if step == 7:
            os.kill(os.getpid(), signal.SIGINT)  # as the interrupt button does

def stopped():
    data, short = (pixels / 16, digits), {"epochs": 1}
    return distrain.train(
        recipe, model=network, data=data, train=short, callbacks=[Stop()], run_dir="runs/stopped"
    )

states = [stopped().status, stopped().status]
states
"""


def test_the_notebook_runs_is_interrupted_and_shows_its_progress(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, 4)
    lines = [line for cell in notebook.cells if cell.cell_type == "code" for line in cell.source.splitlines()]
    assert len([line for line in lines if line.strip()]) < 20
    notebook.cells.append(nbformat.v4.new_code_cell(INTERRUPTED))
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    outputs = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    results = [each.data["text/plain"] for cell in outputs for each in cell if each.output_type == "execute_result"]
    assert "finished" in results[0]
    assert ast.literal_eval(results[-1]) == ["stopped", "finished"]
    progress = [each.data["text/plain"] for cell in outputs for each in cell if each.output_type == "display_data"]
    assert len(progress) == 4  # one line for each training, renewed in its place
    assert re.match(r"step 68/68  █+  0:00 left  loss ", progress[0])
    text = "".join(each.text for cell in outputs for each in cell if each.output_type == "stream") + "".join(progress)
    assert [letter for letter in text if not letter.isprintable() and letter != "\n"] == []
    assert "IProgress" not in text
    # what the run has left is a run like any other
    assert (tmp_path / "runs" / "notebook" / "FINISHED").exists()
