"""What a run depends on is known again: every kind of data, code and weights, and what is no change of them."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_state import rewrite_manifest
from PIL import Image
from runs import Ended, checkpoint, cli, last, rows, train, write_recipe
from worlds import in_world

from distrain.checkpoint import read_manifest
from distrain.config import UserError
from distrain.config.yaml import load_recipe
from distrain.data import build_data
from distrain.datasets.base import Data, DataMeta
from distrain.fingerprints import compare, fingerprint
from distrain.fingerprints.code import code_of
from distrain.fingerprints.files import MAX_FILES, listing, walk
from distrain.fingerprints.items import items_of
from distrain.prove.trial_runs import CouldNotRun, TrialRun, TrialRunner
from distrain.run.folder import RunDir
from distrain.run.json_files import read_rows
from distrain.training.updates import noted

REST = """
batch: {global: 8}
train: {steps: 12}
eval: {every: null}
checkpoint: {every: 4 steps, async: false}
log: {every: 1 steps}
"""
POINTS = """
import random
import helper
class Points:
    "A docstring."
    classes = ("a", "b")
    def __init__(self, count=40):
        self.count = count
    def __len__(self):
        return self.count
    def __getitem__(self, index):
        return [random.random() + helper.SHIFT, float(index)], index % 2
"""
NET = """
from torch import nn
class Net(nn.Sequential):
    def __init__(self, in_features, num_classes):
        super().__init__(nn.Linear(in_features, num_classes))  # one layer
"""


@pytest.fixture(autouse=True)
def modules_as_before(tmp_path: Path) -> Iterator[None]:
    """Forget the modules of one test's project before the next: they have the same names."""
    before = list(sys.path)
    yield
    sys.path[:] = before
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def write_table(path: Path, count: int, seed: int = 0) -> None:
    draw = np.random.default_rng(seed)
    lines = [f"{a:.3f},{b:.3f},{'p' if a > b else 'n'}" for a, b in draw.random((count, 2))]
    path.write_text("\n".join(["a,b,y", *lines]) + "\n")


def reverse(path: Path) -> None:
    head, *lines = path.read_text().splitlines()
    path.write_text("\n".join([head, *lines[::-1]]) + "\n")


def write_image(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (6, 6), value).save(path, "bmp")  # all of one size


def table(folder: Path) -> str:
    write_table(folder / "t.csv", 80)
    return "task: binary\ndata: {name: table, path: t.csv, target: y}\nmodel: mlp"


def tables(folder: Path) -> str:
    (folder / "d").mkdir()
    write_table(folder / "d" / "t.csv", 80)
    return "task: binary\ndata: {name: table, path: d, target: y}\nmodel: mlp"


def split_tables(folder: Path) -> str:
    write_table(folder / "t.csv", 80)
    write_table(folder / "u.csv", 30, 1)
    return "task: binary\ndata: {name: table, split: {train: t.csv, test: u.csv}, target: y}\nmodel: mlp"


def images(folder: Path) -> str:
    for name in ("cat", "dog"):
        for number in range(10):
            write_image(folder / "d" / name / f"{number}.bmp", number)
    return "task: classification\ndata: {name: image_folder, path: d, channels: gray, size: 6}\nmodel: mlp"


def text(folder: Path) -> str:
    (folder / "d").mkdir()
    (folder / "d" / "a.txt").write_text("to be or not to be, that is the question\n" * 20)
    return "task: language_modeling\ndata: {name: text, path: d, seq_len: 8}\nmodel: {name: gpt, width: 8, heads: 1}"


def parallel(folder: Path) -> str:
    (folder / "p.tsv").write_text("".join(f"a{n} b\tc{n} d\n" for n in range(40)))
    return "task: seq2seq\ndata: {name: parallel_text, path: p.tsv}\nmodel: seq2seq"


def own(folder: Path) -> str:
    (folder / "points.py").write_text(POINTS)
    (folder / "helper.py").write_text("SHIFT = 0.0\n")
    (folder / "net.py").write_text(NET)
    return "task: classification\ndata: {name: points.py:Points}\nmodel: net.py:Net"


def known(folder: Path, recipe: str, *overrides: str) -> dict[str, Any]:
    """Return the fingerprint of a recipe as a checkpoint would hold it."""
    loaded = load_recipe(write_recipe(folder, f"name: r\n{recipe}\n{REST}"), overrides).recipe
    found = fingerprint(loaded, build_data(loaded), 12, folder / "run")
    return json.loads(json.dumps(found))


CHANGES: dict[str, tuple[Callable[[Path], str], Callable[[Path], None], str]] = {
    "a table grows": (
        table,
        lambda f: write_table(f / "t.csv", 120),
        "data samples: train 64 -> 96, test 16 -> 24; 80",
    ),
    "rows are reversed": (table, lambda f: reverse(f / "t.csv"), "data file t.csv: other content, of "),
    "one more table": (tables, lambda f: write_table(f / "d" / "u.csv", 20), "data file u.csv: one more, of "),
    "a table of a split": (split_tables, lambda f: reverse(f / "u.csv"), "data file test/u.csv: other content, of "),
    "one more image": (images, lambda f: write_image(f / "d/cat/x.bmp", 9), "data file cat/x.bmp: one more, of "),
    "an image is gone": (images, lambda f: (f / "d/dog/3.bmp").unlink(), "data file dog/3.bmp: is no longer there"),
    "another image": (images, lambda f: write_image(f / "d/dog/3.bmp", 99), "data file dog/3.bmp: other content, of "),
    "other text": (text, lambda f: (f / "d/a.txt").write_text("or" * 410), "data file a.txt: other content, of "),
    "one more text": (text, lambda f: (f / "d/b.txt").write_text("b" * 400), "data file b.txt: one more, of 400 bytes"),
    "other pairs": (parallel, lambda f: reverse(f / "p.tsv"), "data file p.tsv: other content, of "),
}


@pytest.mark.fault(33)
@pytest.mark.parametrize("kind", CHANGES)
def test_changed_files_are_named(tmp_path: Path, kind: str) -> None:
    make, change, line = CHANGES[kind]
    recipe = make(tmp_path)
    then = known(tmp_path, recipe)
    assert not compare(then, known(tmp_path, recipe))
    change(tmp_path)
    found = compare(then, known(tmp_path, recipe))
    assert any(each.startswith(line) for each in found.data), found
    assert not found.code
    assert not compare(then, known(tmp_path, recipe, "data.fingerprint=off")), "nothing is looked at"


@pytest.mark.parametrize("make", [table, tables, split_tables, images, text, parallel, own])
def test_files_that_were_copied_or_touched_are_the_same(tmp_path: Path, make: Callable[[Path], str]) -> None:
    (tmp_path / "a").mkdir()
    recipe = make(tmp_path / "a")
    then = known(tmp_path / "a", recipe)
    for file in (tmp_path / "a").rglob("*"):
        os.utime(file, (1e9, 1e9))
    shutil.copytree(tmp_path / "a", tmp_path / "elsewhere" / "b")
    for folder in (tmp_path / "a", tmp_path / "elsewhere" / "b"):
        found = compare(then, known(folder, recipe))
        assert not found.lines
        assert not found.unsure


OWN_CHANGES: dict[str, tuple[str, str, str, list[str], list[str]]] = {
    "a comment": ("net.py", "# one layer", "# a layer\n", [], []),
    "layout and a docstring": ("points.py", '"A docstring."\n', '"Another."\n\n\n', [], []),
    "code": ("net.py", "num_classes))", "num_classes, False))", ["code file net.py: changed"], []),
    "what code imports": (
        "helper.py", "0.0", "1.0",
        ["code file helper.py: changed"], [f"data: sample {n} of train is another one" for n in (0, 31, 10, 20)],
    ),
    "a length": (
        "points.py", "count=40", "count=60",
        ["code file points.py: changed"], ["data samples: train 32 -> 48, test 8 -> 12; 40 -> 60 in all"],
    ),
    "a file more": ("points.py", "import helper", "import helper, net", ["code file points.py: changed"], []),
}  # fmt: skip


@pytest.mark.parametrize("kind", OWN_CHANGES)
def test_code_of_ones_own(tmp_path: Path, kind: str) -> None:
    file, old, new, code, data = OWN_CHANGES[kind]
    # each in a process of its own: a module is imported once
    then, now = (in_world(1, known_own, str(tmp_path), change)[0] for change in (None, (file, old, new)))
    assert set(then["code"]) == {"points.py", "helper.py", "net.py"}
    found = compare(then, now)
    assert list(found.code) == code
    assert [line for line in found.data if " of test" not in line][: len(data) or None] == data


def known_own(folder: str, change: tuple[str, str, str] | None) -> dict[str, Any]:
    """Return the fingerprint of a project, written there, with a change of one of its files."""
    recipe = own(Path(folder))
    if change is not None:
        file, old, new = change
        text = Path(folder, file).read_text()
        assert old in text
        Path(folder, file).write_text(text.replace(old, new))
        os.utime(Path(folder, file), (1e9, 1e9))  # within a second and of one size, Python takes its old bytecode
    return known(Path(folder), recipe)


class Items:
    """A source of one item, given as it is fetched."""

    def __init__(self, fetch: Callable[[], Any]) -> None:
        self._fetch = fetch

    def __len__(self) -> int:
        return 1

    def fetch(self, ids: np.ndarray) -> dict[str, Any]:
        return {"inputs": self._fetch(), "ids": ids}


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (torch.arange(100.0), torch.arange(100.0).nextafter(torch.tensor(1e9)), True),
        (torch.arange(100.0), torch.arange(100.0).flip(0), False),
        (torch.arange(100.0), torch.arange(100.0).reshape(10, 10), False),
        (torch.rand(3, 64, 64), torch.rand(3, 64, 64), False),
        (torch.arange(9), torch.arange(9).roll(1), False),
        (torch.tensor([1.0, torch.inf, torch.nan]), torch.tensor([1.0, torch.inf, torch.nan]), True),
        (torch.tensor([1.0, torch.inf, torch.nan]), torch.tensor([2.0, torch.inf, torch.nan]), False),
        (torch.tensor([1j, 2.0]), torch.tensor([1j, 3.0]), False),
        ({"a": torch.ones(2, dtype=torch.bfloat16)}, {"a": torch.zeros(2, dtype=torch.bfloat16)}, False),
        ([torch.ones(2), "text"], [torch.ones(2), "other text"], False),
        (object(), object(), True),
    ],
)
def test_samples_are_known_again(one: Any, other: Any, same: bool) -> None:
    then, now = (items_of(Data({"train": Items(lambda each=each: each)}, DataMeta())) for each in (one, other))  # type: ignore[misc]
    then = json.loads(json.dumps(then, allow_nan=False))
    assert then["train"]
    assert compare({"items": then}, {"items": now}) is not same


def test_samples_that_are_drawn_each_time_are_not_compared() -> None:
    draw = np.random.default_rng()
    assert items_of(Data({"train": Items(lambda: torch.tensor(draw.normal()))}, DataMeta())) == {"train": {}}


class Stream:
    """A stream without an end, of what is drawn by a generator that is made once, or at the beginning of each pass."""

    def __init__(self, seed: int, *, anew: bool = True) -> None:
        self.seed, self.anew, self.drawn = seed, anew, np.random.default_rng(seed)

    def __iter__(self) -> Iterator[float]:
        drawn = np.random.default_rng(self.seed) if self.anew else self.drawn
        while True:
            yield drawn.normal()

    def collate(self, samples: list[float]) -> dict[str, Any]:
        return {"inputs": torch.tensor(samples)}


def test_a_stream_is_known_by_what_it_begins_with_unless_that_is_drawn_each_time() -> None:
    first, again, other = (items_of(Data({"train": Stream(seed)}, DataMeta())) for seed in (0, 0, 1))
    assert len(first["train"]) == 3
    assert not compare({"items": first}, {"items": again})
    assert compare({"items": first}, {"items": other}).data[0] == "data: sample 0 of train is another one"
    assert items_of(Data({"train": Stream(0, anew=False)}, DataMeta())) == {"train": {}}


@pytest.mark.parametrize("imported", [False, True])
def test_code_is_found_by_its_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, imported: bool) -> None:
    if imported:  # then Python looks there as well
        monkeypatch.syspath_prepend(tmp_path)
    for file, content in {
        "net.py": "import json, loose.block\nfrom parts.blocks import B\ndef f():\n    import late\nclass Net: pass",
        "late.py": "import json",
        "unused.py": "",
        "parts/__init__.py": "",
        "parts/blocks.py": "from . import norms\nfrom .deep.down import x\nclass B: pass",
        "parts/norms.py": "import net",
        "parts/deep/down.py": "x = 1",
        "parts/unused.py": "",
        "loose/block.py": "",
        "prepare.py": "def make(path): ...",
    }.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(content)
    recipe = "name: r\ntask: classification\ndata: {name: digits, path: x, prepare: prepare.py:make}\nmodel: net.py:Net"
    found = code_of(load_recipe(write_recipe(tmp_path, recipe + REST)).recipe)
    assert sorted(found) == [
        "late.py",
        "loose/block.py",
        "net.py",
        *(f"parts/{x}.py" for x in ("__init__", "blocks", "deep/down", "norms")),
    ]


def test_of_much_code_the_bytes_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distrain.fingerprints.code.MAX_BYTES", 10)
    recipe = load_recipe(write_recipe(tmp_path, f"name: r\n{own(tmp_path)}\n{REST}")).recipe
    found = [code_of(recipe)]
    (tmp_path / "net.py").write_text(NET + "# a comment\n")
    found.append(code_of(recipe))
    assert sorted(found[0]) == ["net.py", "points.py"]
    assert compare(*({"code": each} for each in found)).code == ("code file net.py: changed",)


@pytest.mark.parametrize(
    ("section", "what"),
    [
        ("loss: {name: net.py:Loss, weight: ./w.json}", "weights file loss.weight"),
        ("loss: {name: net.py:Loss, weight: w.json}", "argument file loss.weight"),
        ("loss: {name: net.py:Loss, of: {classes: [files/../w.json]}}", "argument file loss.of"),
        ("schedule: {name: net.py:rate, table: ./w.json}", "argument file schedule.table"),
        ("schedule: {name: net.py:rate, table: w.json}", "argument file schedule.table"),
    ],
)
def test_files_of_other_parts_are_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, section: str, what: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "files").mkdir()
    (tmp_path / "w.json").write_text("[1, 2]")
    recipe = f"{own(tmp_path)}\n{section}"
    then = known(tmp_path, recipe)
    (tmp_path / "w.json").write_text("[1, 3]")
    found = compare(then, known(tmp_path, recipe))
    assert found.model == (f"{what}: w.json: other content, of 6 bytes as before",)
    del then["arguments"]  # of an earlier version
    assert (not compare(then, known(tmp_path, recipe))) == what.startswith("argument")


def test_what_names_no_file_is_no_argument_to_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("adamw", "sum"):  # names that mean something else
        (tmp_path / name).write_text("")
    recipe = f"{own(tmp_path)}\nloss: {{name: net.py:Loss, by: sum, of: 1.5, at: gone.pt}}"
    assert known(tmp_path, recipe)["arguments"] == {"files": {}}


def test_a_file_that_is_read_in_parts(tmp_path: Path) -> None:
    big = tmp_path / "big.bin"
    content = np.random.default_rng(0).bytes(40 << 20)
    big.write_bytes(content)
    files = {"big.bin": str(big)}
    then, whole = ({"data": listing(files, full=full)} for full in (False, True))
    big.write_bytes(content[:5] + b"\0" + content[6:])
    assert compare(then, {"data": listing(files, full=False)}).data == (
        "data file big.bin: other content, of 41,943,040 bytes as before",
    )
    between = bytearray(content)
    between[200_000] ^= 1
    big.write_bytes(between)
    os.utime(big, (1e9, 1e9))
    found = compare(then, {"data": listing(files, full=False)})
    assert not found.data
    assert "big.bin: written again" in found.unsure[0], "it is not passed over in silence"
    assert compare(whole, {"data": listing(files, full=True)}).data, "all of it was read"


def test_many_files_are_known_by_folder(tmp_path: Path) -> None:
    for number in range(MAX_FILES + 100):
        file = tmp_path / f"c{number % 3}" / f"{number}.x"
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"{number:03}")

    def found(full: bool = False) -> dict[str, Any]:
        return {"data": listing({path[len(str(tmp_path)) + 1 :]: path for path in walk(str(tmp_path))}, full=full)}

    then, whole = found(), found(full=True)
    assert not compare(then, found()).lines
    assert len(json.dumps(then)) < 4000
    (tmp_path / "c1" / "1.x").write_text("xyz")
    os.utime(tmp_path / "c1" / "1.x", (4e9, 4e9))
    assert not compare(then, found()).data
    assert compare(then, found()).unsure == (
        "data folder c1: some files were written again, with the sizes that they had",
    )
    assert compare(whole, found(full=True)).data
    (tmp_path / "c2" / "more.x").write_text("x")
    assert compare(then, found()).data == ("data folder c2: 200 files of 600 bytes -> 201 files of 601 bytes",)
    shutil.rmtree(tmp_path / "c2")
    assert compare(then, found()).data == ("data files: 600 files of 1,800 bytes -> 400 files of 1,200 bytes",)


def test_a_folder_for_ones_own_code(tmp_path: Path) -> None:
    """What is read of it is not known: what is new in it may be anybody's, such as a cache."""
    own(tmp_path)
    (tmp_path / "points.py").write_text(POINTS.replace("count=40", "path, count=40"))
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.npy").write_bytes(b"1")
    recipe = "task: classification\ndata: {name: points.py:Points, path: %s}\nmodel: net.py:Net"
    then = known(tmp_path, recipe % "d")
    (tmp_path / "d" / "cache").write_bytes(b"2")
    found = compare(then, known(tmp_path, recipe % "d"))
    assert not found.lines
    assert found.unsure == ("data.path file cache: one more, of 1 bytes",)
    (tmp_path / "d" / "a.npy").write_bytes(b"3")
    assert compare(then, known(tmp_path, recipe % "d")).data[0].startswith("data.path file a.npy: other content")
    assert known(tmp_path, recipe % ".")["folder"] == {"files": {}}, "the project's folder holds its runs"


# --------------------------------------------------------------------------------------------------------------------
# Runs


def stopped(folder: Path, recipe: str, *overrides: str) -> Path:
    """Return the recipe of a run that was stopped after step 6."""
    path = write_recipe(folder, f"name: r\n{recipe}\n{REST}")
    train(1, path, folder / "run", *overrides, stop_after=5)  # the request travels with the next step
    assert read_manifest(checkpoint(folder / "run", 6)).scalars["inputs"]["total_steps"] == 12
    return path


def updates(run: Path) -> list[dict[str, Any]]:
    """Return the rows of updates, which both files hold."""
    found = [row for row in read_rows(run / "attempts.jsonl") if row.get("event") == "update"]
    assert found == [row for row in RunDir(run).rows() if row["event"] == "update"]
    return found


@pytest.mark.fault(33)
def test_changed_data_are_refused_until_they_are_let_in(tmp_path: Path) -> None:
    recipe, run = stopped(tmp_path, table(tmp_path)), tmp_path / "run"
    write_table(tmp_path / "t.csv", 120)
    (ended,) = train(1, recipe, run, status=1)
    assert "error: the data changed since" in ended.err
    assert "data samples: train 64 -> 96, test 16 -> 24; 80 -> 120 in all" in ended.err
    assert "--update" in ended.err
    assert "Splits are drawn anew" in ended.err
    assert updates(run) == []
    # let in, and ended before a step is saved: what was let in stays so, and is recorded once
    assert in_world(1, fail_in_step, str(recipe), ["optim.lr=0.5"], str(run))[0].status == 1
    assert not (run / "UPDATE").exists()
    train(1, recipe, run, "optim.lr=0.5", stop_after=7)
    (row,) = updates(run)
    assert row["step"] == 6
    assert row["recipe"] == {"optim.lr": {"from": 0.001, "to": 0.5}}
    assert any(line.startswith("data samples: train 64 -> 96") for line in row["inputs"])
    # from here on these are the run's data, and those before are other ones
    write_table(tmp_path / "t.csv", 80)
    (ended,) = train(1, recipe, run, "optim.lr=0.5", status=1)
    assert "train 96 -> 64" in ended.err
    write_table(tmp_path / "t.csv", 120)
    (ended,) = train(1, recipe, run, "optim.lr=0.5")
    assert "updated" not in ended.out
    assert [row["step"] for row in updates(run)] == [6]
    assert len(RunDir(run).attempts()) == 6


def test_who_starts_a_run_again_may_have_changed_their_mind(tmp_path: Path) -> None:
    recipe, run = stopped(tmp_path, images(tmp_path)), tmp_path / "run"
    write_image(tmp_path / "d" / "cat" / "x.bmp", 9)
    (run / "UPDATE").touch()  # of a start with --update that did not come so far
    (ended,) = train(1, recipe, run, status=1)
    assert "data file cat/x.bmp: one more" in ended.err
    first, second = train(2, recipe, run, update=True)
    assert "updated  data file cat/x.bmp: one more" in first.out
    assert "updated" not in second.out
    assert len(updates(run)) == 1


@pytest.mark.fault(33)
def test_every_rank_refuses(tmp_path: Path) -> None:
    recipe, run = stopped(tmp_path, own(tmp_path)), tmp_path / "run"
    (tmp_path / "helper.py").write_text("SHIFT = 2.0\n")
    first, second = train(2, recipe, run, status=1)
    assert first.err.count("the data and code files changed since") == 1
    assert "code file helper.py: changed" in first.err
    assert "code file" not in second.err


def test_a_project_that_was_moved_resumes(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    stopped(tmp_path / "a", images(tmp_path / "a"))
    shutil.move(tmp_path / "a", tmp_path / "b")
    # the recipe says where the data are, and that has changed; nothing else has
    (ended,) = train(1, tmp_path / "b" / "recipe.yaml", tmp_path / "b" / "run", update=True)
    (row,) = updates(tmp_path / "b" / "run")
    assert row["recipe"] == {"data.path": {"from": str(tmp_path / "a" / "d"), "to": str(tmp_path / "b" / "d")}}
    assert row["inputs"] == []
    assert "warning" not in ended.out


def test_a_proof_of_what_changes_meanwhile_is_none(tmp_path: Path) -> None:
    with TrialRunner("recipe.yaml", [], tmp_path, last_step=6) as runner:
        for number, size in enumerate((1, 1, 2)):
            run = RunDir(tmp_path / str(number))
            run.path.mkdir()
            run.record_inputs({"data": {"files": {"t.csv": [size, "whole-0"]}}})
            trial = TrialRun(f"run {number}", run.path)
            if size == 1:
                runner._check_inputs(trial)
                continue
            with pytest.raises(CouldNotRun, match="run 2: data or code changed while the recipe was proved"):
                runner._check_inputs(trial)


def fail_in_step(recipe: str, overrides: list[str], run_dir: str) -> Ended:
    """Begin an update that fails in its first step."""
    from runs import train_rank

    from distrain import Callback

    class Fail(Callback):
        def on_start(self, run: Any) -> None:
            raise UserError("no step")

    return train_rank(recipe, overrides, run_dir, None, True, callbacks=[Fail()])


@pytest.mark.fault(33)
def test_evaluation_and_prediction_of_changed_data(tmp_path: Path) -> None:
    recipe, run = write_recipe(tmp_path, f"name: r\n{table(tmp_path)}\n{REST}"), tmp_path / "run"
    train(1, recipe, run)
    before = json.loads(cli("evaluate", run, "--json").out)
    write_table(tmp_path / "t.csv", 120)
    for command in (["evaluate", run], ["predict", run, "test", "-o", tmp_path / "p.csv"]):
        ended = cli(*command)
        assert ended.status == 1
        assert "error: the data changed since" in ended.err
        assert "--changed-data" in ended.err
    assert not (tmp_path / "p.csv").exists()
    ended = cli("evaluate", run, "--changed-data", "--json")
    after = json.loads(ended.out)
    assert after["changed_data"]
    assert "changed_data" not in before
    assert "warning: since step-00000012 was trained: data file t.csv: " in ended.err
    assert cli("predict", run, "test", "-o", tmp_path / "p.csv", "--changed-data").status == 0
    assert cli("predict", run, tmp_path / "t.csv", "-o", tmp_path / "q.csv").status == 0, "a file is only read"


@pytest.mark.fault(33)
def test_changed_code_and_weights(tmp_path: Path) -> None:
    recipe = own(tmp_path).replace("net.py:Net", "{name: net.py:Net, weights: w.pt, weights_strict: false}")
    weights = tmp_path / "w.pt"
    torch.save({"0.weight": torch.zeros(2, 2)}, weights)
    path, run = stopped(tmp_path, recipe), tmp_path / "run"
    torch.save({"0.weight": torch.ones(2, 2)}, weights)
    (tmp_path / "net.py").write_text(NET.replace("num_classes))", "num_classes).double().float())"))
    (ended,) = train(1, path, run, status=1)
    assert "error: the code files and model's files changed since" in ended.err
    assert "code file net.py: changed" in ended.err
    assert "weights file model.weights: w.pt: other content" in ended.err
    weights.unlink()
    (ended,) = train(1, path, run, update=True)
    assert "updated  code file net.py: changed" in ended.out
    assert updates(run)[0]["inputs"] == ["code file net.py: changed"], "weights that are not read need not be there"
    (tmp_path / "net.py").write_text(NET + "\nX = 1\n")
    ended = cli("evaluate", run)
    assert ended.status == 0
    assert "warning: since step-00000012 was trained: code file net.py: changed" in ended.err


@pytest.mark.fault(33)
def test_what_ones_own_model_and_data_are_given_is_held_against_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = "def __init__(self, in_features, num_classes, scale):"
    (tmp_path / "points.py").write_text(POINTS.replace("count=40", "count=40, weights=None"))
    (tmp_path / "helper.py").write_text("SHIFT = 0.0\n")
    (tmp_path / "net.py").write_text(NET.replace("def __init__(self, in_features, num_classes):", given))
    for name in ("scale.txt", "weights.txt"):
        (tmp_path / name).write_text("1.0")
    text = "data: {name: points.py:Points, weights: weights.txt}\nmodel: {name: net.py:Net, scale: scale.txt}"
    recipe, run = write_recipe(tmp_path, f"name: r\ntask: classification\n{text}\n{REST}"), tmp_path / "run"
    train(1, recipe, run, "train.steps=1")
    (tmp_path / "scale.txt").write_text("2.0")
    ended = cli("evaluate", run)
    assert ended.status == 0, ended.err
    assert "warning: since step-00000001 was trained: argument file model.scale: scale.txt: other content" in ended.err
    (tmp_path / "weights.txt").write_text("2.0")
    ended = cli("evaluate", run)
    assert ended.status == 1
    assert "argument file data.weights: weights.txt: other content" in ended.err


def test_a_checkpoint_without_a_fingerprint_is_resumed_from(tmp_path: Path) -> None:
    ended = in_world(1, resume_old, str(tmp_path))[0]
    assert ended.status == 0, ended.err
    assert "does not say what data and code" in ended.out


def resume_old(folder: str) -> Ended:
    """Go on from a checkpoint that was written before there were fingerprints."""
    from runs import train_rank

    recipe, run = write_recipe(Path(folder), f"name: r\n{table(Path(folder))}\n{REST}"), Path(folder, "run")
    train_rank(str(recipe), [], str(run), 5, False)
    rewrite_manifest(last(run), lambda manifest: manifest["scalars"].pop("inputs"))
    (run / "inputs.json").unlink()
    return train_rank(str(recipe), [], str(run), None, False)


def test_an_update_of_the_recipe_is_a_row(tmp_path: Path) -> None:
    recipe, run = stopped(tmp_path, table(tmp_path)), tmp_path / "run"
    for rate in (0.5, 0.25):
        in_world(1, fail_in_step, str(recipe), [f"optim.lr={rate}"], str(run))
    (ended,) = train(1, recipe, run, "optim.lr=0.25")
    assert "updated  optim.lr: was 0.001, now 0.25" in ended.out
    found = [row["recipe"] for row in updates(run)]
    assert found == [{"optim.lr": {"from": 0.001, "to": rate}} for rate in (0.5, 0.25)]
    assert [row["step"] for row in rows(run) if row["event"] == "update"] == [6, 6]


def test_another_batch_size_says_which_samples_it_passes_over(tmp_path: Path) -> None:
    recipe, run = stopped(tmp_path, table(tmp_path)), tmp_path / "run"
    said = [
        in_world(1, fail_in_step, str(recipe), [f"batch.global={size}", f"train.steps={steps}"], str(run))[0].out
        for size, steps in ((16, 12), (4, 5), (8, 24))
    ]
    assert "6 steps of batch.global 8 have taken 48 samples, and the next step of 16 begins after 96" in said[0]
    assert "the 48 between are skipped" in said[0]
    assert "nothing is left" not in said[0]
    assert "the 24 between are taken again" in said[1]
    assert "the run now has 5 steps and has made 6, so nothing is left to train" in said[1]
    assert "begins after" not in said[2]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("seed=1", ["warning: seed changed. Splits are drawn anew", "warning: seed changed, and with it the order"]),
        ("data.split=[0.7,0.3]", ["warning: data.split changed. Splits are drawn anew"]),
        ("data.stratify=true", ["warning: data.stratify changed. Splits are drawn anew"]),
        ("optim.lr=0.5", []),
    ],
)
def test_splits_that_another_recipe_draws_anew_are_told(tmp_path: Path, change: str, said: list[str]) -> None:
    recipe, run = stopped(tmp_path, table(tmp_path), "data.split=[0.8,0.2]"), tmp_path / "run"
    ended = in_world(1, fail_in_step, str(recipe), ["data.split=[0.8,0.2]", change], str(run))[0]
    assert "updated  " in ended.out
    text = " ".join(ended.out.split())
    assert text.count("drawn anew") == bool(said)
    assert all(each in text for each in said), ended.out


def test_of_many_starts_those_from_the_same_step_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDir(tmp_path)
    row = {"event": "update", "step": 7, "recipe": {}, "inputs": ["x"]}
    starts = [{"step": step} for step in range(500)]
    looked_at = 0
    parse = json.JSONDecoder.decode

    def counted(*args: Any, **named: Any) -> Any:
        nonlocal looked_at
        looked_at += 1
        return parse(*args, **named)

    monkeypatch.setattr(json.JSONDecoder, "decode", counted)
    for behind, step, found, most in (
        ([{"step": 900}], 900, None, 2),
        ([{"step": 7}, row, {"step": 7}, {"step": 9}], 7, row, 3),
        ([{"step": 5}, row | {"step": 5}, {"step": 7}], 7, None, 2),
    ):
        looked_at = 0
        run.attempts_path.write_text("".join(json.dumps(each) + "\n" for each in [*starts, *behind]))
        assert noted(run, step) == found
        assert 0 < looked_at <= most
