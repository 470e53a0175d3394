"""Sweeps on this machine: which runs there are, how they are started, stopped and resumed, and which is the best."""

from __future__ import annotations

import fcntl
import json
import math
import re
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from logged import logged
from runs import cli, cli_rank, last, train, write_recipe
from worlds import running_world

from distrain.checkpoint import difference
from distrain.config import UserError
from distrain.config.yaml import load_recipe
from distrain.launchers.request import recipe_text
from distrain.launchers.searches import ask_search
from distrain.launchers.sweeps import (
    MOST_RUNS,
    Range,
    SweepRun,
    best_of,
    expand,
    is_sweeping,
    parse_axes,
    read_record,
    run_of,
    sweeping,
)
from distrain.report.contents import build_report
from distrain.report.status import best_line, statuses, stop_run
from distrain.run.evaluations import Evaluations, best_of_evaluations
from distrain.run.folder import Launch, RunDir
from distrain.sweep.running import Share, Stopping, shares_of
from distrain.sweep.search import Result, Search
from distrain.system import numbers

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


# --------------------------------------------------------------------------------------------------------------------
# Which runs there are


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        ("optim.lr=1e-5..1e-2", Range(1e-5, 1e-2, False, False)),
        ("optim.lr=1e-5..1e-2:log", Range(1e-5, 1e-2, False, True)),
        ("model.depth=2..8", Range(2, 8, True, False)),
        ("batch.global=16..256:log", Range(16, 256, True, True)),
        ("x=-1.5...5", Range(-1.5, 0.5, False, False)),
        ("optim.lr=1e-2,1e-3", ["1e-2", "1e-3"]),
        ("model.hidden=[16],[32, 8]", ["[16]", "[32, 8]"]),
        ("data.path=../a,../b", ["../a", "../b"]),
    ],
)
def test_what_an_array_varies(tmp_path: Path, array: str, expected: Any) -> None:
    assert list(parse_axes(str(tmp_path / "r.yaml"), [], [array]).values()) == [expected]


@pytest.mark.parametrize(
    ("array", "said"),
    [
        ("optim.lr=1e-2..1e-5", "a lower number before a higher one"),
        ("optim.lr=a..b", "expected numbers"),
        ("optim.lr=0..1:log", "begins above 0"),
        ("optim.lr=0.1..inf", "a lower number"),
        ("optim.lr=1e-5..1e-2", "a range is what --search N draws from"),
    ],
)
def test_a_range_that_is_none_is_refused(tmp_path: Path, array: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        expand(str(write_recipe(tmp_path, IRIS)), [], [array], None)


@pytest.mark.parametrize("value", [1e-5, 3.14159265e-3, 0.01, 0.00999999999])
def test_a_drawn_number_is_written_within_its_range(value: float) -> None:
    axis = Range(1e-5, 9.999999e-3, False, True)
    assert axis.low <= float(axis.text(value)) <= axis.high
    assert float(axis.text(value)) == pytest.approx(min(value, axis.high), rel=1e-5)
    assert Range(2, 8, True, False).text(7.0) == "7"


# --------------------------------------------------------------------------------------------------------------------
# The machine


@pytest.mark.parametrize(
    ("parallel", "processes", "gpus", "visible", "threads"),
    [
        (1, None, [], [None], [None]),
        (3, None, [], [None] * 3, ["2"] * 3),
        (2, 2, [], [None] * 2, ["2"] * 2),
        (16, None, [], [None] * 16, ["1"] * 16),
        (2, None, "0123", ["0,1", "2,3"], ["2"] * 2),
        (2, 1, "0123", ["0,1", "2,3"], ["4"] * 2),
        (2, None, "457", ["4", "5"], ["4"] * 2),
        (3, None, "01", ["0", "1", "0"], ["2"] * 3),
    ],
)
def test_a_machine_is_divided_among_the_runs(
    parallel: int, processes: int | None, gpus: Sequence[str], visible: list[str | None], threads: list[str | None]
) -> None:
    shares = shares_of(parallel, processes, list(gpus), 8, {})
    assert [share.variables.get("CUDA_VISIBLE_DEVICES") for share in shares] == visible
    assert [share.variables.get("OMP_NUM_THREADS") for share in shares] == threads
    assert not any("OMP_NUM_THREADS" in each.variables for each in shares_of(2, 1, [], 8, {"OMP_NUM_THREADS": "1"}))


def test_a_run_with_more_processes_than_gpus_is_refused() -> None:
    with pytest.raises(UserError, match=r"leaves each run 2 of the 4 GPUs.*--parallel 1, or --processes 2"):
        shares_of(2, 4, list("0123"), 8, {})
    assert shares_of(1, 4, list("0123"), 8, {}) == [Share(tuple("0123"), {"CUDA_VISIBLE_DEVICES": "0,1,2,3"})]


# --------------------------------------------------------------------------------------------------------------------
# A search


def search(parallel: bool = False, seed: int = 3) -> Search:
    return Search(
        {"optim.lr": Range(1e-5, 1e-1, False, True), "depth": Range(2, 8, True, False), "norm": ["a", "b"]},
        seed,
        False,
        parallel,
    )


def played(asked: Search, count: int, results: Sequence[Result] = ()) -> list[Result]:
    """Search where the loss is known: lowest at lr 1e-2, depth 5, norm b, and falling with each evaluation."""
    found = list(results)
    while len(found) < count:
        values = asked.draw(found)
        assert values is not None
        loss = (
            (math.log10(float(values["optim.lr"])) + 2) ** 2 + abs(int(values["depth"]) - 5) + (values["norm"] == "a")
        )
        evaluations: list[float] = []
        pruned = False
        while len(evaluations) < 4 and not pruned:
            evaluations.append(loss + 3 - len(evaluations))
            pruned = asked.prunes(found, values, evaluations)
        found.append(Result(values, "pruned" if pruned else "complete", tuple(evaluations), min(evaluations)))
    return found


def test_a_search_finds_better_values_and_prunes_worse_ones() -> None:
    found = played(search(), 30)
    drawn_first = min(result.best for result in found[:8] if result.best is not None)
    assert min(result.best for result in found if result.best is not None) < drawn_first
    pruned = [result for result in found if result.state == "pruned"]
    assert 3 < len(pruned) < 27
    assert all(len(result.evaluations) < 4 for result in pruned)
    assert all(1e-5 <= float(result.values["optim.lr"]) <= 1e-1 for result in found)
    assert {result.values["depth"] for result in found} <= set("2345678")
    assert len({json.dumps(result.values) for result in found}) == 30


@pytest.mark.parametrize("stopped", [0, 1, 13])
def test_a_search_that_is_stopped_goes_on_as_if_it_had_not_been(stopped: int) -> None:
    whole = played(search(), 16)
    assert played(search(), 16, whole[:stopped]) == whole
    assert played(search(seed=4), 2) != whole[:2]


def test_no_values_are_drawn_twice() -> None:
    few = Search({"a": ["x", "y"]}, 0, True, True)
    first = Result({"a": "x"}, "complete", (1.0,), 1.0)
    assert few.draw([first]) == {"a": "y"}
    assert few.draw([first, Result({"a": "y"}, "running")]) is None


def test_a_run_whose_metric_is_nan_is_pruned() -> None:
    others = played(search(), 12)
    assert search().prunes(others, others[0].values, [math.nan])
    failed = [Result(each.values, "failed") for each in others]
    assert not search().prunes(failed, others[0].values, [100.0]), "a failure is no result to be compared with"


def test_runs_are_not_compared_by_losses_that_mean_something_else(tmp_path: Path) -> None:
    recipe = load_recipe(str(write_recipe(tmp_path))).recipe
    named = recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"best": "accuracy"})})
    for asked, varied, warned in (
        (recipe, ["optim.lr", "loss.label_smoothing"], True),
        (recipe, ["loss"], True),
        (recipe, ["data.standardize_target"], True),
        (recipe, ["optim.lr", "loss_scale", "data.workers"], False),
        (named, ["loss.label_smoothing"], False),
    ):
        with logged() as lines:
            best_of(asked, varied)
        assert bool(lines) == warned, varied
        assert not warned or varied[-1] in lines[0]


def test_a_range_of_whole_numbers_of_a_key_that_takes_others_is_warned_of(tmp_path: Path) -> None:
    recipe = str(write_recipe(tmp_path, IRIS))
    arrays = ["optim.weight_decay=0..1", "optim.lr=0.5..1", "batch.global=8..16"]
    with logged() as lines:
        asked = ask_search(recipe, [], arrays, 3, None, "--sweep-dir")
    [line] = lines
    assert "optim.weight_decay=0..1 draws whole numbers alone; write 0.0..1.0" in line
    assert asked.axes["optim.weight_decay"] == Range(0, 1, True, False)


def test_evaluations_are_read_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    read = Evaluations(RunDir(tmp_path), "accuracy")
    assert read.read() == []
    lines = [json.dumps({"event": "eval", "step": step, "accuracy": value}) for step, value in ((2, 0.5), (4, "nan"))]
    path.write_text(lines[0] + "\n" + json.dumps({"event": "train", "step": 3, "loss": 1}) + "\n" + lines[1][:20])
    assert read.read() == [(2, 0.5)]
    path.write_text(path.read_text()[:-20] + lines[1] + "\n")
    assert [step for step, _ in read.read()] == [2, 4]
    assert math.isnan(read.read()[1][1])
    path.write_text(lines[0] + "\n")  # a resumed run takes out what it trains again
    assert read.read() == [(2, 0.5)]
    path.write_text("".join(json.dumps({"event": "eval", "step": step, "accuracy": 0.25}) + "\n" for step in (2, 4, 6)))
    assert read.read() == [(2, 0.25), (4, 0.25), (6, 0.25)], "it has grown beyond what was read before it was cut"
    with path.open("a") as file:  # it rolled back to step 3
        file.write(json.dumps({"event": "eval", "step": 4, "accuracy": 0.75, "loss": 1.0}) + "\n")
    assert read.read() == [(2, 0.25), (4, 0.75)]
    assert best_of_evaluations([(1, 0.5), (2, math.nan), (3, 0.7), (4, 0.7)], higher=True) == (3, 0.7)
    assert best_of_evaluations([(1, math.nan)], higher=False) is None


# --------------------------------------------------------------------------------------------------------------------
# Running


OWN = """
import os
import signal
import time
from pathlib import Path

from torch import nn

from distrain import Callback


class Net(nn.Linear):
    def __init__(self, needs: str = ""):
        super().__init__(4, 3)
        self.needs = needs

    def forward(self, inputs):
        if self.needs and not Path(self.needs).exists():
            raise RuntimeError(f"there is no {self.needs}")
        return super().forward(inputs)


class LargeInEval(Net):
    'Is as accurate as it was, with a loss that is infinite.'

    def __init__(self, factor: float = 1.0):
        super().__init__()
        self.factor = factor

    def forward(self, inputs):
        outputs = super().forward(inputs)
        return outputs if self.training else outputs * self.factor


def loss(outputs, targets):
    return nn.functional.cross_entropy(outputs, targets) + 1e-9 * outputs.square().mean()


class AwaitStop(Callback):
    'After step 4 waits for what asks the run to stop, also where it came before; `sends` its sweep a signal first.'

    def __init__(self, seen: str, sends: str | None = None):
        self.seen, self.sends, self.asked = Path(seen), sends, False

    def on_start(self, run):
        noted = signal.getsignal(signal.SIGTERM)

        def note(number, frame):
            self.asked = True
            noted(number, frame)

        signal.signal(signal.SIGTERM, note)

    def on_step_end(self, step, metrics):
        if step == 4 and not self.seen.exists():
            self.seen.touch()
            if self.sends is not None:
                os.kill(os.getppid(), signal.Signals[self.sends])
            while not self.asked:
                time.sleep(0.01)
"""


def own_recipe(folder: Path, more: str = "") -> Path:
    (folder / "own.py").write_text(OWN)
    return write_recipe(folder, IRIS.replace("{name: mlp, hidden: [4]}", '{name: "own.py:Net"}') + more)


def table_of(folder: Path) -> dict[str, str]:
    return {Path(each.run).name: each.state for each in statuses(folder)}


def test_all_that_is_wrong_is_said_before_the_first_run(tmp_path: Path) -> None:
    arrays = ("--array", "optim.lr=0.1,-1", "--array", "model.name=mlp,mpl", "--sweep-dir", tmp_path / "sweep")
    ended = cli("sweep", write_recipe(tmp_path, IRIS.replace(", hidden: [4]", "")), *arrays)
    assert ended.status == 1
    for said in ("with optim.lr=0.1, model.name=mpl", "did you mean 'mlp'", "with optim.lr=-1, model.name=mlp"):
        assert said in ended.err
    assert not (tmp_path / "sweep").exists()


def test_a_sweep_is_continued_and_retries_what_failed_when_asked(tmp_path: Path) -> None:
    recipe, needed, folder = own_recipe(tmp_path), tmp_path / "needed", tmp_path / "sweep"
    command = ("sweep", recipe, "--array", f"model.needs='',{needed}", "--sweep-dir", folder)
    first = cli(*command, "--parallel", 2)
    assert first.status == 1
    assert list(table_of(folder).values()) == ["finished", "failed"]
    assert f"there is no {needed}; all of it is in {folder}/logs/1-" in first.err + first.out
    before = (next(folder.glob("0-*")) / "FINISHED").read_text()
    again = cli(*command)
    assert again.status == 1
    assert "is not run again without --retry-failed" in again.out + again.err
    assert not re.search(r"\S starts$", again.out, re.M)
    needed.touch()
    last = cli(*command, "--retry-failed", "--json")
    assert last.status == 0, last.err
    assert [(each["state"], each["rank"]) for each in json.loads(last.out)] == [("finished", 1), ("finished", 1)]
    assert (next(folder.glob("0-*")) / "FINISHED").read_text() == before
    changed = cli(*command, "optim.lr=0.3")
    assert (changed.status, changed.err.count("optim.lr: was 0.1, now 0.3")) == (1, 2)
    assert "Choose another --sweep-dir" in changed.err
    assert "--run-dir" not in changed.err
    with pytest.raises(UserError, match="is a sweep of 2 runs over other values than these 1"):
        expand(str(recipe), [], ["seed=1"], str(folder), "--sweep-dir").earlier()


def test_a_sweep_of_which_nothing_was_trained_is_ranked_as_its_recipe_says_now(tmp_path: Path) -> None:
    recipe, needed = own_recipe(tmp_path), tmp_path / "needed"
    command = ("sweep", recipe, f"model.needs={needed}", "--array", "seed=1,2", "--sweep-dir", tmp_path / "sweep")
    assert cli(*command).status == 1
    needed.touch()
    ended = cli(*command, "eval.best=-loss", "--retry-failed")
    assert ended.status == 0, ended.err
    assert {each.score["metric"] for each in statuses(tmp_path / "sweep") if each.score} == {"loss"}
    assert "(lower is better)" in ended.out


def test_the_best_of_a_sweep_says_where_the_model_is_another_steps(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, IRIS.replace("lr: 0.1}", "lr: 3}"))
    for name, more in (
        ("best", ()),
        ("last", ("checkpoint.keep_best=0", "checkpoint.every=null", "checkpoint.keep=1")),
    ):
        ended = cli("sweep", recipe, *more, "--array", "seed=1,2", "--sweep-dir", tmp_path / name)
        first = statuses(tmp_path / name)[0]
        assert first.score is not None
        assert first.score["step"] < 12, "it was better before its end"
        assert ("export/model.safetensors, which is of step 12" in ended.out) == (name == "last")


def test_a_run_without_a_best_is_none_of_a_sweeps_best(tmp_path: Path) -> None:
    recipe = own_recipe(tmp_path, 'loss: "own.py:loss"\nanomalies: {nonfinite: skip}\n')
    recipe.write_text(recipe.read_text().replace("own.py:Net", "own.py:LargeInEval"))
    folder = tmp_path / "sweep"
    ended = cli("sweep", recipe, "--array", "model.factor=1e30,1", "--sweep-dir", folder)
    assert ended.status == 0, ended.err
    good, bad = statuses(folder)
    assert (good.rank, bad.rank, bad.score) == (1, None, None)
    assert good.score == json.loads((Path(good.run) / "FINISHED").read_text())["best"]
    assert json.loads((Path(bad.run) / "FINISHED").read_text())["best"] is None
    assert all(math.isnan(value) for _, value in Evaluations(RunDir(bad.run), "accuracy").read())
    assert f"best: model.factor=1: accuracy {numbers.number(good.score['value'])} at step" in ended.out
    [row] = [
        each
        for each in build_report([Path(good.run), Path(bad.run)]).to_json()["comparison"]["outcomes"]
        if each["name"] == "best accuracy"
    ]
    assert row["values"] == [good.score["value"], None]


def test_ctrl_c_saves_what_runs_and_the_same_command_resumes_it(tmp_path: Path) -> None:
    seen, folder = tmp_path / "seen", tmp_path / "sweep"
    recipe = own_recipe(tmp_path, f'callbacks: [{{name: "own.py:AwaitStop", seen: {seen}, sends: SIGINT}}]')
    command = ("sweep", recipe, "--array", "optim.lr=0.1,0.5", "--sweep-dir", folder)
    stopped = cli(*command)
    assert stopped.status == 1
    assert table_of(folder) == {"0-lr=0.1": "stopped", "1-lr=0.5": "new"}
    assert RunDir(folder / "0-lr=0.1").preempted == {"step": 5, "reason": "SIGTERM"}
    assert "SIGINT: no further run is started" in stopped.out
    done = cli(*command)
    assert done.status == 0, done.out + done.err
    assert "0-lr=0.1 resumes" in done.out
    train(1, recipe, tmp_path / "straight", "optim.lr=0.1", "name=iris-0")
    assert difference(last(folder / "0-lr=0.1"), last(tmp_path / "straight")).identical

    found = statuses(folder)
    scores = [each.score["value"] for each in found if each.score]
    assert scores == sorted(scores, reverse=True)
    line = best_line(folder, found)
    assert line is not None
    assert f"best: optim.lr={found[0].values['optim.lr']}: accuracy" in line
    assert line.endswith("export/model.safetensors")
    assert str(best_line(folder, [replace(found[0], state="failed"), *found[1:]])).endswith("safetensors, failed")
    record = json.loads((folder / "sweep.json").read_text())
    del record["best"], record["search"]  # as sweeps were noted before
    (folder / "sweep.json").write_text(json.dumps(record))
    assert [each.rank for each in statuses(folder)] == [each.rank for each in found]


def test_the_runs_of_a_sweep_that_is_killed_save_and_stop(tmp_path: Path) -> None:
    recipe = own_recipe(tmp_path, f'callbacks: [{{name: "own.py:AwaitStop", seen: {tmp_path}/seen, sends: SIGKILL}}]')
    command = ["sweep", str(recipe), "--array", "optim.lr=0.1,0.5", "--sweep-dir", str(tmp_path / "sweep")]
    with running_world(1, cli_rank, command, launched=False) as world:
        assert world.wait() == [-signal.SIGKILL]
    # the run holds its lock for as long as it lives
    with (tmp_path / "sweep" / "0-lr=0.1" / ".in-use").open("a") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
    assert table_of(tmp_path / "sweep") == {"0-lr=0.1": "stopped", "1-lr=0.5": "new"}
    assert not is_sweeping(tmp_path / "sweep")


def known_run(recipe: Path, run: SweepRun, accuracies: Sequence[float]) -> None:
    """A finished run as far as a search reads it."""
    folder = run.folder
    RunDir(folder).create(recipe_text(load_recipe(recipe, run.overrides)), Launch.describe(1, "single"))
    rows = [{"event": "eval", "step": 3 * at, "accuracy": value} for at, value in enumerate(accuracies, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    RunDir(folder).mark_finished({"steps": 12, "best": {"metric": "accuracy", "value": max(accuracies), "step": 12}})


def test_a_run_of_a_search_that_is_worse_than_the_others_is_pruned_and_not_resumed(tmp_path: Path) -> None:
    seen, folder = tmp_path / "seen", tmp_path / "sweep"
    recipe = own_recipe(tmp_path, f'callbacks: [{{name: "own.py:AwaitStop", seen: {seen}}}]')
    rates = [f"0.0{number}" for number in range(1, 7)]
    runs = [{"folder": f"{number:03}-lr={rate}", "values": {"optim.lr": rate}} for number, rate in enumerate(rates)]
    for number, rate in enumerate(rates):
        made = run_of(folder, "iris", (), number, {"optim.lr": rate}, MOST_RUNS)
        known_run(recipe, made, [1.1, 1.2, 1.3, 1.4])
    record = {
        "name": "iris",
        "best": {"metric": "accuracy", "higher": True},
        "search": {"space": {"optim.lr": "1e-3..1:log"}, "seed": 0},
        "runs": runs,
    }
    (folder / "sweep.json").write_text(json.dumps(record))
    command = ("sweep", recipe, "--array", "optim.lr=1e-3..1:log", "--sweep-dir", folder)
    ended = cli(*command, "--search", 7)
    assert ended.status == 0, ended.out + ended.err
    assert "is pruned after step 3" in ended.out
    noted = read_record(folder)
    assert noted is not None
    assert noted.runs[:6] == runs
    pruned = noted.runs[6]
    assert pruned["pruned"] == 3
    assert 1e-3 <= float(pruned["values"]["optim.lr"]) <= 1
    run = RunDir(folder / pruned["folder"])
    assert run.preempted is not None
    assert run.preempted["step"] < 12
    assert table_of(folder)[run.path.name] == "pruned"
    assert not re.search(r"\S starts$", cli(*command, "--search", 7).out, re.M)
    other = cli("sweep", recipe, "--array", "optim.lr=1e-4..1:log", "--sweep-dir", folder, "--search", 8)
    assert "is a sweep of other values" in other.err
    RunDir(run.path).mark_finished({"steps": 12, "best": None})
    other = cli(*command, "optim.weight_decay=0.3", "--search", 8)
    assert other.status == 1
    assert re.search(r"006-.* was started with another recipe:\s+optim.weight_decay: was .*, now 0.3", other.err)


def test_one_process_starts_the_runs_of_a_sweep_and_can_be_told_to_stop(tmp_path: Path) -> None:
    expand(str(write_recipe(tmp_path, IRIS)), [], ["seed=1,2"], str(tmp_path)).record(None).write(tmp_path)
    assert not is_sweeping(tmp_path)
    with sweeping(tmp_path):
        assert is_sweeping(tmp_path)
        with pytest.raises(UserError, match="another `distrain sweep` starts the runs"), sweeping(tmp_path):
            pass
        assert "starts no further run" in stop_run(tmp_path)[0]
    assert Stopping(tmp_path).reason == "the file STOP"
    (tmp_path / "STOP").unlink()
    stop_run(tmp_path)
    assert Stopping(tmp_path).reason is None
