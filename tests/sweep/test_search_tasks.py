"""A search on a cluster: its tasks share a folder, draw one after the other, prune themselves, and are continued."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from runs import script_rank, write_recipe
from stub_slurm import StubQueue
from typer.testing import CliRunner
from worlds import in_world, running_world

import distrain
from distrain.cli.main import app
from distrain.config import UserError
from distrain.config.yaml import load_recipe
from distrain.launchers.launcher import Job
from distrain.launchers.searches import ask_search
from distrain.launchers.slurm.submitting import Prepared, Wanted, announced, prepare, submit
from distrain.launchers.sweeps import RankedBy, SweepRecord, add_draw, read_record, run_of, sweeping
from distrain.report.status import stop_run, waiting_line
from distrain.run.folder import RunDir
from distrain.sweep.running import Share, SweepOptions
from distrain.sweep.search_runs import open_search
from distrain.sweep.tasks import run_of_task
from distrain.sweep.trials import Trials

ROOT = Path(distrain.__file__).parent.parent
IRIS = """
name: iris
task: classification
data: {name: iris, split: [0.7, 0.3]}
model: {name: mlp, hidden: [4]}
optim: {name: sgd, lr: 0.1}
batch: {global: 16}
train: {steps: 12}
eval: {every: 3 steps, metrics: [accuracy], best: accuracy}
checkpoint: {every: 6 steps}
log: {every: 6 steps}
"""
LETTERS = "a,b,c,d,e,f"


# --------------------------------------------------------------------------------------------------------------------
# Drawing


def of_letters(folder: Path) -> Trials:
    """A search over few values, begun in a folder."""
    record = SweepRecord("s", [], RankedBy("loss", False), {"space": {"model.x": LETTERS}, "seed": 0})
    folder.mkdir(exist_ok=True)
    record.write(folder)
    return Trials(folder, record, parallel=True)


def draw_in_turn(folder: str, numbers: Sequence[int]) -> list[str]:
    record = read_record(Path(folder))
    assert record is not None
    trials = Trials(Path(folder), record, parallel=True)
    runs = [trials.draw(number) for number in numbers[int(os.environ["RANK"])]]  # type: ignore[attr-defined]
    return [run.values["model.x"] for run in runs if run is not None]


def test_drawers_at_the_same_time_draw_as_one_after_the_other(tmp_path: Path) -> None:
    """Each number once, and the values of each place a function of those before, whoever comes first."""
    of_letters(tmp_path / "at-once")
    found = in_world(3, draw_in_turn, str(tmp_path / "at-once"), [(0, 3, 1), (1, 4, 3), (2, 5)])
    record = read_record(tmp_path / "at-once")
    assert record is not None
    assert sorted(run["number"] for run in record.runs) == [0, 1, 2, 3, 4, 5]
    alone = of_letters(tmp_path / "alone")
    values = [run.values["model.x"] for number in range(6) if (run := alone.draw(number)) is not None]
    assert sorted(values) == LETTERS.split(",")
    assert [run["values"]["model.x"] for run in record.runs] == values
    by_number = {run["number"]: run["values"]["model.x"] for run in record.runs}
    assert found == [[by_number[number] for number in numbers] for numbers in ((0, 3, 1), (1, 4, 3), (2, 5))]
    assert alone.draw(6) is None, "no values are left"
    assert not list((tmp_path / "at-once" / "draws").glob(".*"))


def test_a_draw_that_another_was_faster_with_is_made_again(tmp_path: Path) -> None:
    trials = of_letters(tmp_path)
    before = trials.record
    first, second = (run_of(tmp_path, "s", (), number, {"model.x": "a"}, 1000) for number in (0, 1))
    assert add_draw(tmp_path, before, first, 0)
    assert not add_draw(tmp_path, before, second, 1)
    again = trials.draw(1)
    assert again is not None
    assert again.values != first.values
    (tmp_path / "draws" / "0002" / "not seen yet").mkdir(parents=True)
    with pytest.raises(UserError, match=r"draw 2 of .* is another process's, and .* does not see it"):
        trials.draw(2, patience_s=0)
    # the answer of the file system was lost, and what it calls a failure was done
    assert add_draw(tmp_path, before, first, 0)


def draw_and_die(folder: str) -> None:
    trials = Trials(Path(folder), read_record(Path(folder)), parallel=True)  # type: ignore[arg-type]
    Path.rename = lambda self, target: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment,method-assign]
    trials.draw(0)


def test_who_dies_while_drawing_holds_up_nobody(tmp_path: Path) -> None:
    trials = of_letters(tmp_path)
    with running_world(1, draw_and_die, str(tmp_path), launched=False) as world:
        assert world.wait() == [-signal.SIGKILL]
    assert len(list((tmp_path / "draws").glob(".0000.*"))) == 1, "it had come so far"
    for number in (1, 0):
        assert trials.draw(number) is not None
    assert [run["number"] for run in trials.record.runs] == [1, 0]


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    trials = of_letters(tmp_path)
    (tmp_path / "draws").write_text("")
    with pytest.raises(UserError, match=f"cannot write what was drawn into {tmp_path}"):
        trials.draw(0)


# --------------------------------------------------------------------------------------------------------------------
# Submitting


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> StubQueue:
    """SLURM's commands, and its queue; sbatch takes everything, as jobs 100, 101, ..."""
    jobs = StubQueue(tmp_path / "slurm")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{jobs.commands}{os.pathsep}{os.environ['PATH']}")
    return jobs


def submitted(folder: Path, search: int, *overrides: str, arrays: Sequence[str] = (), **about: Any) -> Prepared:
    """Submit a search of the recipe in a folder."""
    wanted = Wanted(1, processes_per_node=about.pop("processes", 1), time="10", parallel=2)
    about = {"arrays": list(arrays) or ["optim.lr=1e-3..1:log"], "run_dir": str(folder / "search"), **about}
    prepared = prepare(str(folder / "recipe.yaml"), overrides, wanted, search=search, **about)
    submit(prepared)
    return prepared


def known_run(folder: Path, accuracies: Sequence[float], number: int) -> RunDir:
    """A finished run of a search as far as it is read."""
    record = read_record(folder)
    assert record is not None
    run = run_of(folder, record.name, (), number, {"optim.lr": f"0.0{number + 1}"}, 1000)
    assert add_draw(folder, record, run, number)
    run.folder.mkdir()
    (run.folder / "recipe.yaml").write_text(load_and_dump(folder, run.overrides))
    rows = [{"event": "eval", "step": 3 * at, "accuracy": value} for at, value in enumerate(accuracies, 1)]
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    RunDir(run.folder).mark_finished(
        {"steps": 12, "best": {"metric": "accuracy", "value": max(accuracies), "step": 12}}
    )
    return RunDir(run.folder)


def load_and_dump(folder: Path, overrides: Sequence[str]) -> str:
    from distrain.launchers import recipe_text

    return recipe_text(load_recipe(folder / "submit" / "base.yaml", overrides))


def test_the_tasks_of_a_search_are_the_runs_that_are_left(queue: StubQueue, tmp_path: Path) -> None:
    write_recipe(tmp_path, IRIS)
    folder = tmp_path / "search"
    prepared = submitted(tmp_path, 3, "train.steps=9")
    assert "#SBATCH --array=0-2%2\n" in prepared.script
    assert "3 runs in" in announced(prepared, "100")[0]
    made = run_of_task(folder, 1)
    assert made is not None
    stored = load_recipe(made / "recipe.yaml").recipe
    assert (stored.name, stored.train.steps) == ("iris-001", 9)
    assert f"001-lr={stored.optim.lr}" == made.name
    before = (made / "recipe.yaml").read_bytes()
    assert run_of_task(folder, 1) == made, "a task that was queued again finds its draw"
    assert (made / "recipe.yaml").read_bytes() == before
    (made / "launch.json").unlink()  # it died between the two
    assert run_of_task(folder, 1) == made
    assert (RunDir(made).launch().processes, RunDir(made).launch().strategy) == (1, "single")

    queue["100_0"] = Job("100_0", "PENDING")
    queue["100_1"] = Job("100_1", "RUNNING")
    assert waiting_line(folder) == "1 more of job 100, whose values are drawn when they start"
    with pytest.raises(UserError, match=r"is in the queue already, as job 100_0"):
        submitted(tmp_path, 5, "train.steps=9")
    recipe, arrays = str(tmp_path / "recipe.yaml"), ["optim.lr=1e-3..1:log"]
    here = (recipe, ["train.steps=9"], arrays, SweepOptions(search=5), Share(), str(folder))
    with pytest.raises(UserError, match=r"is in the queue, as job 100_0 \(PENDING\), whose tasks draw its runs"):
        open_search(*here)
    assert "tasks that have drawn nothing yet (1) end when they start" in stop_run(folder)[0]
    queue.clear()

    known_run(folder, [0.5], 3)
    _, runs = open_search(*here)
    assert [runs.next(), runs.next()] == [runs.trials.runs[number] for number in (1, 0)]
    RunDir(made).mark_pruned(3)
    more = submitted(tmp_path, 6, "train.steps=9")
    assert "#SBATCH --array=0,2,4-5%2\n" in more.script
    assert not (folder / "STOP").exists()
    with sweeping(folder), pytest.raises(UserError, match="a `distrain sweep` starts the runs of"):
        submitted(tmp_path, 6, "train.steps=9")


@pytest.mark.parametrize(
    ("overrides", "about", "said"),
    [
        ((), {"arrays": ["optim.lr=1e-4..1:log"]}, "is a sweep of other values"),
        (("seed=3",), {}, "is a sweep of other values"),
        (("eval.best=-loss",), {}, "RankedBy"),
        (("optim.momentum=0.5",), {}, "was started with another recipe:\n  optim.momentum"),
        ((), {"update": True}, "a search compares runs of one recipe"),
        ((), {"search": 1001}, "--search 1,001 is more than 1,000 runs"),
        ((), {"search": 1}, "all 1 runs of .* have come to their ends; a larger --search continues it"),
        ((), {"arrays": ["optim.lr=1e-3..nan"]}, "a lower number before a higher one"),
        ((), {"arrays": ["optim.lr=-1..1"]}, "optim.lr"),
    ],
)
def test_what_does_not_continue_a_search_is_refused(
    queue: StubQueue, tmp_path: Path, overrides: tuple[str, ...], about: dict[str, Any], said: str
) -> None:
    write_recipe(tmp_path, IRIS)
    submitted(tmp_path, 3)
    known_run(tmp_path / "search", [0.5], 0)
    with pytest.raises(UserError, match=f"(?s){said}"):
        submitted(tmp_path, about.pop("search", 3), *overrides, **about)


def test_options_that_go_together(queue: StubQueue, tmp_path: Path) -> None:
    write_recipe(tmp_path, IRIS)
    with pytest.raises(UserError, match="--search needs --array"):
        prepare(str(tmp_path / "recipe.yaml"), (), Wanted(time="10"), search=2)
    with pytest.raises(UserError, match="a range is what --search N draws from"):
        prepare(str(tmp_path / "recipe.yaml"), (), Wanted(time="10"), arrays=["optim.lr=1e-3..1"])
    pruning, without = (
        prepare(str(tmp_path / "recipe.yaml"), (), Wanted(time="10"), arrays=["seed=1..3"], search=2, prune=prune)
        for prune in (True, False)
    )
    assert "DISTRAIN_PRUNES=1" in pruning.script
    assert "DISTRAIN_PRUNES=1" not in without.script
    alone = CliRunner().invoke(app, ["submit", "recipe.yaml", "--no-prune", "--time", "10", "--dry-run"])
    assert "--no-prune goes with --search N" in str(alone.exception)


def test_values_that_the_recipe_refuses_are_a_run_that_failed_for_good(queue: StubQueue, tmp_path: Path) -> None:
    write_recipe(tmp_path, IRIS)
    arrays = ["batch.global=32,16", "batch.micro=16,32"]  # each is right beside the first of the other
    submitted(tmp_path, 2, arrays=arrays)
    folder = tmp_path / "search"
    record = read_record(folder)
    assert record is not None
    values = {"batch.global": "16", "batch.micro": "32"}
    add_draw(folder, record, run_of(folder, record.name, (), 0, values, 1000), 0)
    with pytest.raises(UserError, match="batch"):
        run_of_task(folder, 0)
    failed = RunDir(next(folder.glob("000-*"))).failed
    assert failed is not None
    assert failed["restart"] is False
    trials = Trials(folder, record, parallel=True)
    trials.look()
    assert trials.result(trials.runs[0]).state == "failed"
    assert ask_search(str(tmp_path / "recipe.yaml"), (), arrays, 2, str(folder), "--run-dir").left() == [1]


def test_what_a_node_lacks_is_said(queue: StubQueue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="must be on a file system that all nodes share"):
        run_of_task(tmp_path, 0)
    write_recipe(tmp_path, IRIS)
    submitted(tmp_path, 2)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r"pip install 'distrain\[search\]'"):
        run_of_task(tmp_path / "search", 0)
    assert not (tmp_path / "search" / "draws").exists()


NET = "from torch import nn\n\n\nclass Net(nn.Linear):\n    def __init__(self):\n        super().__init__(4, 3)\n"


def test_the_code_of_every_value_is_copied_and_stays(queue: StubQueue, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "net.py").write_text(NET)
    write_recipe(tmp_path, IRIS.replace("{name: mlp, hidden: [4]}", '"one/net.py:Net"'))
    arrays = ["model.name=one/net.py:Net,two/net.py:Net"]
    submitted(tmp_path, 2, arrays=arrays)
    made = [run_of_task(tmp_path / "search", number) for number in (0, 1)]
    code = tmp_path / "search" / "submit" / "code"
    names = {load_recipe(folder / "recipe.yaml").recipe.model.name for folder in made if folder is not None}
    assert names == {f"{code}/one/net.py:Net", f"{code}/two/net.py:Net"}
    for folder in made:
        assert folder is not None
        (folder / "metrics.jsonl").write_text('{"event": "train", "step": 1}\n')
    submitted(tmp_path, 2, arrays=arrays)
    (tmp_path / "two" / "net.py").write_text(NET + "\n")
    with pytest.raises(UserError, match=r"started with other code, which differs in two/net\.py"):
        submitted(tmp_path, 2, arrays=arrays)


# --------------------------------------------------------------------------------------------------------------------
# Training


def train_task(folder: str) -> Any:
    os.environ |= {"DISTRAIN_PRUNES": "1", "ACCELERATE_USE_CPU": "true"}
    return script_rank(str(ROOT / "launch" / "train.py"), [folder])


def test_a_run_that_is_worse_than_the_others_saves_and_stops_for_good(queue: StubQueue, tmp_path: Path) -> None:
    write_recipe(tmp_path, IRIS)
    submitted(tmp_path, 7, processes=2)
    for number in range(6):
        known_run(tmp_path / "search", [1.1, 1.2, 1.3, 1.4], number)
    made = run_of_task(tmp_path / "search", 6)
    assert made is not None
    ended = in_world(2, train_task, str(made))
    assert [each.status for each in ended] == [0, 0], ended[0].out + ended[0].err
    run = RunDir(made)
    assert run.pruned == 3
    assert run.preempted is not None
    assert (run.preempted["step"], run.finished) == (3, None)
    assert run.checkpoint(3).is_dir()
    record = read_record(tmp_path / "search")
    assert record is not None
    assert record.runs[6]["pruned"] == 3
    with pytest.raises(UserError, match="all 7 runs of"):
        submitted(tmp_path, 7, processes=2)
