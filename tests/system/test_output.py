"""Text from outside is data wherever it goes: terminal, logs, status, CSV, trackers."""

from __future__ import annotations

import ast
import csv
import io
import logging
import os
import pty
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.live import Live
from runs import cli, train, write_recipe

import distrain
from distrain.config import UserError
from distrain.config.yaml import load_recipe
from distrain.inference.files import open_predictions
from distrain.run.folder import RunDir
from distrain.system.output import LogFormatter, csv_cell, error_text, lines, one_line, write_csv
from distrain.system.terminal import Console, ProgressLine, Table
from distrain.training.callbacks.tracker import numbers_of
from distrain.training.callbacks.trackers import Display
from distrain.training.outputs import Predictions

PACKAGE = Path(distrain.__file__).parent
HOSTILE = "\x1b[2J\x1b]0;title\x07 \u202egnp.exe \u200b\x85\u2028 :fire: [red]x[/red] \udce9\ud800"
"""Obeyed by terminals, read backwards, unseen, a line's end of its own, an emoji, markup, halves of characters."""
SHOWN = r"\x1b[2J\x1b]0;title\x07 \u202egnp.exe \u200b\x85\u2028 :fire: [red]x[/red] \xe9\ud800"


@pytest.mark.fault(41)
def test_what_others_wrote_is_escaped_and_not_dropped() -> None:
    assert one_line(HOSTILE) == lines(HOSTILE) == SHOWN
    assert one_line("a\tb\nerror: c\r") == r"a\tb\nerror: c\r"
    assert lines("a\tb\nerror: c\r", "  ") == "a\tb\n  error: c\\r"
    for kept in ("plain", "日本　語 é", "🔥 ≥ 1e-3", ""):
        assert one_line(kept) == lines(kept) == kept


@pytest.mark.fault(41)
def test_no_line_of_others_begins_as_one_of_ours() -> None:
    assert error_text("bad\nerror: all is well\n", " (rank 1)") == "error (rank 1): bad\n  error: all is well"
    assert error_text("\nTraceback\nValueError: x\n") == "error:\n  Traceback\n  ValueError: x"
    record = logging.LogRecord("distrain", logging.ERROR, "", 0, "%s", ("bad\n2026-01-01 INFO x\x1b",), None)
    first, second = LogFormatter().format(record).split("\n")
    assert first.endswith(" ERROR bad")
    assert second == "    2026-01-01 INFO x\\x1b"


@pytest.mark.parametrize("width", [40, 300])
@pytest.mark.fault(41)
def test_consoles_and_tables_show_text_as_it_is(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv("TERM", "xterm")
    file = io.StringIO()
    console = Console(file=file, width=width)
    console.print(HOSTILE)
    console.say(f"{HOSTILE}\nerror: x 12")
    table = Table(title=HOSTILE)
    table.add_column(HOSTILE)
    table.add_row(HOSTILE)
    console.print(table)
    told = file.getvalue()
    assert all(letter == "\n" or letter.isprintable() for letter in told)
    assert f"{SHOWN}\\nerror: x 12" in told
    if width == 300:
        assert told.count(SHOWN) == 5
    squeezed = "".join(told.replace("┃", "").replace("│", "").split())
    assert squeezed.count("".join(SHOWN.split())) == 5, "a cell that does not fit goes on below"


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("=1+1", "'=1+1"),
        ("@SUM(1)", "'@SUM(1)"),
        ("+cmd|' /C calc'!A0", "'+cmd|' /C calc'!A0"),
        ("-class", "'-class"),
        ("＝1", "'＝1"),
        ("\t=1", r"\t=1"),
        ("\r=1\nx", r"\r=1\nx"),
        ("-1", "-1"),
        ("+1.5e-3", "+1.5e-3"),
        ("1-2", "1-2"),
        ("caf\udce9", r"caf\xe9"),
        ("", ""),
    ],
)
@pytest.mark.fault(41)
def test_no_cell_is_computed_by_a_spreadsheet(text: str, cell: str) -> None:
    assert csv_cell(text) == cell


def test_a_table_of_any_columns_is_written_safely(tmp_path: Path) -> None:
    table = pd.DataFrame(
        {
            "number": [-1.5, 2.0],
            "=name": ["=1", "b"],
            "mixed": [-1, "=2"],
            "text": pd.array(["=3", None], dtype="string"),
            "kind": pd.Categorical(["=4", "x\x1b"]),
            "yes": [True, False],
        }
    )
    write_csv(table, tmp_path / "t.csv")
    with (tmp_path / "t.csv").open(encoding="utf-8", newline="") as file:
        assert list(csv.reader(file)) == [
            ["number", "'=name", "mixed", "text", "kind", "yes"],
            ["-1.5", "'=1", "-1", "'=3", "'=4", "True"],
            ["2.0", "b", "'=2", "", "x\\x1b", "False"],
        ]


def test_trackers_are_given_names_without_controls() -> None:
    assert numbers_of({"event": "eval", "step": 1, "split": "test", "a\x1b[2J": 1.0}) == {r"test/a\x1b[2J": 1.0}


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_no_encoding_of_the_terminal_stops_a_command(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    from distrain.system.output import echo, prepare_streams

    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    prepare_streams()
    echo("é ≥ 日 \udce9")
    Console().say("é ≥ 日 \udce9")
    sys.stdout.flush()
    assert written.getvalue().decode(encoding).count(r"\xe9") >= 2


# --------------------------------------------------------------------------------------------------------------------
# The borders


def outside(file: Path) -> Iterator[str]:
    """Yield each place of a file that prints, opens a console, logs or writes CSV without `output` and `screen`."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom | ast.Import):
            names = [f"{getattr(node, 'module', '') or ''}.{alias.name}" for alias in node.names]
            for name in names:
                if name.startswith(("rich.console.", "rich.table.", "rich.print", ".rich")):
                    yield f"{file}:{node.lineno} imports {name.strip('.')}"
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        json_alone = [ast.unparse(argument).startswith("json.dumps(") for argument in node.args] == [True]
        if called in ("print", "typer.echo", "click.echo", "typer.secho") and not json_alone:
            yield f"{file}:{node.lineno} {called}"
        if called.endswith((".to_csv", "csv.writer", "csv.DictWriter", "stdout.write", "stderr.write")):
            yield f"{file}:{node.lineno} {called}"
        if called.endswith(("logging.Formatter", "logging.StreamHandler", "logging.basicConfig")):
            yield f"{file}:{node.lineno} {called}"


def test_nothing_is_printed_past_the_one_function() -> None:
    places = [*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "launch").glob("*.py")]
    assert len(places) > 100
    free = ("output.py", "terminal.py")
    assert [found for file in places if file.name not in free for found in outside(file)] == []


PRINTING = {
    # what a command's result is printed by
    *("cli", "prove/command.py", "launchers/evaluating.py", "launchers/predicting.py"),
    # before a process of a run is there, or when it is gone
    *("launchers/local.py", "launchers/forking.py", "launchers/slurm/node.py", "system/environment.py"),
    *("system/output.py", "system/logs.py"),
}
"""Folders and files of the package that may print; all else logs."""


def test_what_a_run_has_to_say_is_logged_and_not_printed() -> None:
    found = [
        f"{file}:{node.lineno}: {ast.unparse(node.func)}"
        for file in PACKAGE.rglob("*.py")
        if not PRINTING & {file.relative_to(PACKAGE).as_posix(), file.relative_to(PACKAGE).parts[0]}
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "echo", "echo_error")
    ]
    assert not found, "\n".join(found)


def test_the_rule_can_be_broken(tmp_path: Path) -> None:
    file = tmp_path / "f.py"
    file.write_text(
        "import csv\nfrom rich.console import Console\nprint(name)\nprint(json.dumps(1))\ntable.to_csv(path)\n"
        "logging.basicConfig()\n"
    )
    assert [int(found.split(":")[1].split()[0]) for found in outside(file)] == [2, 3, 5, 6]


DATA = """
import torch
from torch.utils.data import Dataset


class Named(Dataset):
    classes = ("=1+1", "\\x1b[31mred\\nerror: forged", "@SUM(1)")

    def __init__(self, broken=-1):
        self.broken = broken

    def __len__(self):
        return 60

    def __getitem__(self, i):
        if i == self.broken:
            raise ValueError("bad file x\\x1b[2J\\x1b]0;title\\x07.jpg\\nerror: all is well")
        return torch.randn(4) + i % 3, i % 3
"""
RECIPE = """
name: r
task: classification
data: {name: "data.py:Named", split: [0.5, 0.5]}
model: {name: mlp, hidden: [4]}
batch: {global: 8}
train: {steps: 2}
"""


@pytest.mark.fault(41)
def test_an_error_of_the_data_obeys_nothing_and_forges_nothing(tmp_path: Path) -> None:
    (tmp_path / "data.py").write_text(DATA)
    (ended,) = train(1, write_recipe(tmp_path, RECIPE), tmp_path / "run", "data.broken=3", status=1)
    log = (tmp_path / "run" / "log-rank-0.txt").read_text()
    said = cli("status", tmp_path / "run").out
    shown = cli("logs", tmp_path / "run").out
    for text in (ended.out, ended.err, log, said, shown):
        assert all(letter == "\n" or letter.isprintable() for letter in text)
        assert "\nerror: all is well" not in text
    for text in (ended.err, log, said, shown):
        assert r"bad file x\x1b[2J\x1b]0;title\x07.jpg\nerror: all is well" in text


@pytest.mark.fault(41)
def test_predictions_are_safe_in_a_spreadsheet(tmp_path: Path) -> None:
    (tmp_path / "data.py").write_text(DATA)
    train(1, write_recipe(tmp_path, RECIPE), tmp_path / "run")
    assert cli("predict", tmp_path / "run", "test", "-o", tmp_path / "p.csv").status == 0
    with (tmp_path / "p.csv").open(newline="") as file:
        cells = {cell for row in csv.reader(file) for cell in row}
    assert {"'=1+1", "'@SUM(1)", r"\x1b[31mred\nerror: forged"} & cells
    assert not [cell for cell in cells if cell[:1] in ("=", "+", "@") or not cell.isprintable()]


# --------------------------------------------------------------------------------------------------------------------
# Narrow terminals


def shown_at(width: int, thing: Any, *, terminal: bool = False) -> list[str]:
    """Return the lines that a console of this width prints."""
    console = Console(file=io.StringIO(), width=width)
    console._force_terminal = terminal
    console.say(thing) if isinstance(thing, str) else console.print(thing)
    printed: str = console.file.getvalue()  # type: ignore[attr-defined]
    return re.sub(r"\x1b\[[0-9;]*m", "", printed).splitlines()


@pytest.mark.parametrize("width", [12, 30, 44, 60, 80, 100, 119, 120, 200])
@pytest.mark.parametrize("done", [0, 1234, 4000])
def test_the_progress_line_shows_first_what_matters_most(width: int, done: int) -> None:
    parts = ["step 1,234/4,000", "1:02:03 left", "loss 0.1234", "12,345 samples/s", "lr 0.001", "waiting for data 3%"]
    (line,) = shown_at(width, ProgressLine(done, 4000, lambda: parts))
    assert len(line) <= width
    whole = [part for part in parts if part in line]
    assert whole == parts[: len(whole)], "what is shown is shown whole, and nothing before it is left out"
    assert len(whole) == max((n for n in range(7) if len("  ".join(parts[:n])) <= width), default=0)
    if done and whole:
        assert ("━" in line) == (width - len("  ".join(whole)) >= 10), "the bar takes what is left"


def test_the_progress_line_counts_down_and_follows_a_rollback(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    display = Display(100, 10)
    display._live = Live(None)
    display._line = ProgressLine(10, 100, display._parts)
    assert display._parts() == ["step 10/100", "-:-- left"]
    row = {"loss": 1.0, "lr": 0.1, "samples_per_s": 10.0, "data_wait": 0.0}
    now += 10
    display.train(row | {"step": 20})
    assert display._parts()[:3] == ["step 20/100", "1:20 left", "loss 1"]
    now += 5
    assert display._parts()[1] == "1:15 left"
    display.train(row | {"step": 15})
    assert display._parts()[:2] == ["step 15/100", "-:-- left"]
    now += 1
    display.train(row | {"step": 16})
    assert display._parts()[1] == "1:24 left"
    display._live = None


@pytest.mark.parametrize("width", [40, 60, 80])
def test_lines_go_on_between_words_below_their_text(width: int) -> None:
    line = "  batch    16 = 1 x 16 (batch.micro auto: global / processes; nothing limits the memory here); 300 steps"
    first, *rest = shown_at(width, line, terminal=True)
    assert all(len(each) <= width for each in (first, *rest))
    assert first.startswith("  batch    16 = 1 x 16")
    assert all(each.startswith(" " * 11) and each[11] != " " for each in rest)
    assert " ".join([first, *(each.strip() for each in rest)]) == line
    assert shown_at(width, line) == [line], "in a file nothing is cut"
    path = f"model (best): {'/folder' * 20}"
    assert "/folder" * 20 in "".join(shown_at(width, path, terminal=True)), "a path is not cut apart"


UNTIL_TORCH = """
import os, sys

def end(event, arguments):
    if event == "import" and arguments[0] == "torch":
        os._exit(7)

sys.addaudithook(end)
from distrain.cli.main import main
main()
"""
"""The command `distrain`, up to where it begins to import PyTorch."""


@pytest.mark.parametrize("terminal", [False, True])
def test_what_is_being_started_is_reported_before_what_takes_seconds(tmp_path: Path, terminal: bool) -> None:
    command = [sys.executable, "-c", UNTIL_TORCH, "train", str(write_recipe(tmp_path)), "--processes", "1"]
    read, write = pty.openpty() if terminal else os.pipe()
    status = subprocess.run(command, stdout=write, stderr=write, cwd=tmp_path, timeout=300).returncode
    said = os.read(read, 4096).decode().replace("\r", "")
    os.close(read)
    os.close(write)
    assert (status, said) == (7, "loading PyTorch\n")


def test_where_the_recipe_is_at_fault_a_log_has_that_alone(tmp_path: Path) -> None:
    ended = cli("train", tmp_path / "none.yaml", "--processes", 1)
    assert (ended.status, ended.out) == (1, "")
    assert ended.err.startswith("error: "), ended.err
    assert "PyTorch" not in ended.err


# --------------------------------------------------------------------------------------------------------------------
# Paths that are not UTF-8

IRIS = """
name: tiny
task: classification
data: {name: iris, split: [0.8, 0.2]}
model: {name: mlp, hidden: [8]}
batch: {global: 16}
train: {steps: 4}
"""


@pytest.fixture
def latin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as a share of an older machine has it, seen from the current one."""
    monkeypatch.chdir(tmp_path)
    folder = Path("caf\udce9")
    folder.mkdir()
    return folder


def test_a_run_may_lie_where_the_path_is_not_utf8(tmp_path: Path, latin: Path) -> None:
    recipe, run = write_recipe(latin, IRIS), latin / "run"
    train(1, recipe, run, stop_after=2)
    train(1, recipe, run)
    assert r"# caf\xe9/recipe.yaml:2" in (run / "recipe.yaml").read_text(encoding="utf-8")
    for file in run.rglob("*"):
        if file.suffix in (".json", ".jsonl", ".yaml", ".txt", ".csv") or file.name in ("FINISHED", "lease.json"):
            text = file.read_bytes().decode()
            assert "\\udc" not in text, f"{file!a} holds half a character, which strict readers of JSON refuse"
    for arguments in (
        ["status", run], ["status", latin], ["logs", run], ["evaluate", run], ["checkpoint", "ls", run],
        ["export", run, "-o", latin / "m.safetensors"], ["predict", run, "test", "-o", latin / "p.csv"],
        ["train", run],
    ):  # fmt: skip
        ended = cli(*arguments)
        assert ended.status == 0, ended.err
        assert "\udce9" not in ended.out + ended.err
    assert RunDir(run).launch().processes == 1


@pytest.mark.parametrize(
    ("change", "override", "said"),
    [
        (("data: {name: iris", "data: {name: table, target: y, path: t.csv"), None, r"data.path: 'FOLDER/t.csv'"),
        (("{name: mlp, hidden: [8]}", '{name: "net.py:Net"}'), None, r"model.name: 'FOLDER/net.py:Net'"),
        (("", ""), "data.path=caf\udce9/x", r"'data.path=caf\xe9/x'"),
        (("", ""), "name=caf\udce9", r"'name=caf\xe9'"),
        (("", ""), "caf\udce9=1", r"'caf\xe9=1'"),
    ],
)
def test_what_a_recipe_cannot_keep_is_refused_in_a_sentence(
    tmp_path: Path, latin: Path, change: tuple[str, str], override: str | None, said: str
) -> None:
    recipe = write_recipe(latin, IRIS.replace(*change))
    with pytest.raises(UserError) as caught:
        load_recipe(recipe, [override] if override else [])
    _, *problems = str(caught.value).replace(f"{tmp_path}/caf\udce9", "FOLDER").splitlines()
    (problem,) = problems
    told = said.replace("FOLDER", rf"{tmp_path}/caf\xe9")
    assert f"{told} is not UTF-8, and a recipe is UTF-8 text; rename the file or folder" in problem


def test_data_files_may_be_called_anything_and_classes_may_not(tmp_path: Path, latin: Path) -> None:
    from PIL import Image

    text = "a,b,y\n" + "".join(f"{i % 7},{i % 5},{'pq'[i % 2]}\n" for i in range(40))
    for name in ("t.csv", "caf\udce9/new.csv"):
        (tmp_path / name).write_text(text)
    table = IRIS.replace("{name: iris", "{name: table, target: y, path: t.csv")
    train(1, write_recipe(tmp_path, table), tmp_path / "run")
    ended = cli("predict", "run", latin / "new.csv", "-o", "p.parquet")
    assert ended.status == 0, ended.err
    assert len(pd.read_parquet("p.parquet")) == 40

    images = Path("images")
    for folder in ("a", "b"):
        (images / folder).mkdir(parents=True)
        for number in range(8):
            Image.new("RGB", (4, 4), (number, 0, 0)).save(images / folder / f"{number}\udce9.png")
    folders = IRIS.replace("{name: iris", "{name: image_folder, path: images, size: 4")
    recipe = write_recipe(tmp_path, folders, "images.yaml")
    train(1, recipe, tmp_path / "pictures", "train.steps=1")
    (images / "b").rename(images / "caf\udce9")
    (ended,) = train(1, recipe, tmp_path / "other", status=1)
    assert r"holds the folder 'caf\xe9', whose name is not UTF-8" in ended.err


def test_tables_of_predictions_take_names_of_any_bytes(tmp_path: Path) -> None:
    for name in ("p.parquet", "p.csv"):
        output = open_predictions(str(tmp_path / name))
        texts = np.asarray(["=1", "\udce9"], object)
        output.append({"file": ["caf\udce9.png", "b"]}, Predictions({"text\udce9": texts}, None))
        output.write()
    table = pd.read_parquet(tmp_path / "p.parquet")
    assert table.to_dict("list") == {"file": [r"caf\xe9.png", "b"], r"text\xe9": ["=1", r"\xe9"]}
    assert (tmp_path / "p.csv").read_text() == "file,text\\xe9\ncaf\\xe9.png,'=1\nb,\\xe9\n"
