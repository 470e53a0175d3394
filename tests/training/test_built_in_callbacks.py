"""The built-in callbacks: which there are and in which order, and that what one does is done by nothing else."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from own_parts import Points
from row_logs import OneProcess
from runs import Ended, captured, rows, train_rank, write_recipe
from worlds import in_world

from distrain import Callback
from distrain.config.yaml import load_recipe, parse_recipe
from distrain.launchers import open_run
from distrain.loop import train
from distrain.parallel import open_world
from distrain.run import heartbeat
from distrain.run.folder import Launch, RunDir
from distrain.system.logs import show_on_terminal
from distrain.training.callbacks.base import HOOKS
from distrain.training.callbacks.built_in import built_in_callbacks
from distrain.training.callbacks.dispatch import Callbacks

RECIPE = f"""
name: everything
task: classification
data: {{name: "{__file__}:Damaged", skip_corrupt: 3}}
model: {{name: mlp, hidden: [4]}}
optim: {{lr: 1.0e-6}}
batch: {{global: 6}}
train: {{steps: 12}}
eval: {{every: 2 steps, early_stop: {{patience: 2, min_delta: 10}}}}
log: {{every: 1 steps, tensorboard: true}}
checkpoint: {{every: null, async: false}}
"""
"""A run for which every built-in callback has something to do."""

NAMES = ["Trace", "MetricsLog", "Terminal", "Trackers", "Banner", "TrainLog", "CorruptSamples", "EarlyStopping"]


class Damaged(Points):
    """Some points, one of which does not decode."""

    def __getitem__(self, index: int) -> Any:
        if index == 4 and len(self) == 30:
            raise ValueError("cut short")
        return super().__getitem__(index)


def train_without(recipe: str, folder: str, left_out: str) -> Ended:
    """Train with all built-in callbacks but one, in this process."""
    trace = Path(folder, "trace")
    trace.mkdir()
    os.environ["DISTRAIN_TRACE"] = json.dumps({"folder": str(trace), "last_step": None, "pause_at": None})
    loaded, run, world = load_recipe(recipe), RunDir(f"{folder}/run"), open_world("fp32")

    def go() -> int:
        show_on_terminal(converses=True)
        open_run(run, loaded, Launch.describe(1, "single"))
        kept = [each for each in built_in_callbacks(loaded.recipe) if type(each).__name__ != left_out]
        train(run, world, built_in=kept)
        return 0

    ended = captured(go)
    world.close()
    return ended


def events(run: Path, event: str) -> int:
    return sum(row["event"] == event for row in rows(run)) if RunDir(run).metrics_path.exists() else 0


def trackers_wrote(folder: Path, ended: Ended) -> bool:
    return (folder / "run" / "tensorboard").exists()


EFFECTS: dict[str, Callable[[Path, Ended], bool]] = {
    "Trace": lambda folder, ended: (folder / "trace" / "rank-0.jsonl").exists(),
    "MetricsLog": lambda folder, ended: RunDir(folder / "run").metrics_path.exists(),
    "Terminal": lambda folder, ended: "steps in" in ended.out,
    "Trackers": trackers_wrote,
    "Banner": lambda folder, ended: "  model    mlp" in ended.out,
    "TrainLog": lambda folder, ended: events(folder / "run", "train") > 0,
    "CorruptSamples": lambda folder, ended: events(folder / "run", "corrupt_samples") > 0,
    "EarlyStopping": lambda folder, ended: (RunDir(folder / "run").finished or {})["steps"] < 12,
}
NEEDED_BY = {"MetricsLog": {"Trackers", "TrainLog", "CorruptSamples"}}
"""Whose effects show only in what the other writes."""


def test_each_is_a_callback_and_their_order_is_the_documented_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTRAIN_TRACE", json.dumps({"folder": str(tmp_path), "last_step": None, "pause_at": None}))
    made = built_in_callbacks(load_recipe(write_recipe(tmp_path, RECIPE)).recipe)
    assert all(isinstance(each, Callback) for each in made)
    assert [type(each).__name__ for each in made] == NAMES
    page = (Path(__file__).parents[2] / "docs" / "callbacks.md").read_text()
    table = page.partition("## Built in")[2]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)[: len(NAMES)] == NAMES
    methods = set(re.findall(r"^\| `(on_\w+)", page, re.MULTILINE))
    assert methods == set(HOOKS), "the page lists every hook"


@pytest.mark.parametrize("left_out", ["none", *NAMES])
def test_what_one_does_is_gone_without_it_and_nothing_else_is(tmp_path: Path, left_out: str) -> None:
    recipe = write_recipe(tmp_path, RECIPE)
    (ended,) = in_world(1, train_without, str(recipe), str(tmp_path), left_out)
    assert ended.status == 0
    lacking = {name for name, shown in EFFECTS.items() if not shown(tmp_path, ended)}
    assert lacking == ({left_out} | NEEDED_BY.get(left_out, set())) - {"none"}


WATCHES = '''
import json
from distrain import Callback


class Watches(Callback):
    """Notes hooks of a step, plans a save and a stop, gathers, and reads what others write."""

    def note(self, hook, **values):
        with open(self.run.folder / f"watched-{self.run.rank}.jsonl", "a") as file:
            file.write(json.dumps({"hook": hook, **values}) + "\\n")

    def wrap_transform(self, transform):
        return transform

    def on_start(self, run):
        self.run = run
        if run.resumed_step is None:
            run.save_after(3)
            run.stop_after(7, "seen enough")
        run.summarize({"watched": True})

    def on_step_start(self, step):
        self.note("start", step=step, done=self.run.step)

    def on_batches(self, step, micro_batches):
        self.note("batches", step=step, samples=sum(len(each["ids"]) for each in micro_batches))
        if step == 2:
            self.run.gather(10 + self.run.rank)

    def on_step_taken(self, step):
        self.note("taken", step=step, done=self.run.step)

    def wants_step_end(self, step):
        return step % 5 == 0

    def on_step_end(self, step, metrics):
        self.note("end", step=step)

    def on_gather(self, values):
        self.note("gather", values=[list(each) for each in values])

    def on_row(self, row):
        self.note("row", event=row["event"])

    def on_evaluate(self, split, values):
        evaluations = self.run.evaluations
        self.note("evaluations", metric=evaluations.metric, last=evaluations.last)

    def on_close(self, outcome):
        self.note("close", kind=outcome.kind)
'''


def test_a_callback_of_ones_own_has_what_the_built_in_ones_have(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(WATCHES)
    text = RECIPE.replace(", early_stop: {patience: 2, min_delta: 10}", "") + "callbacks: [mine.py:Watches]\n"
    recipe, run = write_recipe(tmp_path, text), tmp_path / "run"
    ended = in_world(2, train_rank, str(recipe), [], str(run), None, False)
    assert [rank.status for rank in ended] == [0, 0], ended[0].err
    ranks = [[json.loads(line) for line in (run / f"watched-{rank}.jsonl").read_text().splitlines()] for rank in (0, 1)]

    def of(hook: str, rank: int = 0) -> list[dict[str, Any]]:
        return [row for row in ranks[rank] if row["hook"] == hook]

    for rank in (0, 1):
        for hook, before in (("start", -1), ("taken", 0)):
            found = of(hook, rank)
            assert [row["step"] for row in found] == list(range(1, 8))
            assert all(row["done"] == row["step"] + before for row in found)
        assert {row["samples"] for row in of("batches", rank)} == {3}
        assert [row["step"] for row in of("end", rank)] == [5]
        assert [row["values"] for row in of("gather", rank)] == [[[10], [11]]]
        assert [row["kind"] for row in of("close", rank)] == ["stopped"]
        assert {row["metric"] for row in of("evaluations", rank)} == {"loss"}
    assert {"train", "eval", "checkpoint"} <= {row["event"] for row in of("row")}
    assert not of("row", 1)
    preempted = RunDir(run).preempted
    assert preempted is not None
    assert (preempted["step"], preempted["reason"]) == (7, "seen enough")
    saved = {row["step"] for row in rows(run) if row["event"] == "checkpoint"}
    assert {3, 7} <= saved, "3 is no step of an evaluation, of which the best are kept"
    assert 5 not in saved
    in_world(2, train_rank, str(recipe), [], str(run), None, False)
    finished = RunDir(run).finished
    assert finished is not None
    assert finished["watched"] is True


def test_what_they_take_is_no_time_of_another_phase() -> None:
    phases: list[tuple[str, str]] = []

    class Notes(Callback):
        def note(self, hook: str) -> None:
            phases.append((hook, heartbeat.now().phase))

        def on_step_start(self, step: int) -> None:
            self.note("on_step_start")

        def on_batches(self, step: int, micro_batches: Any) -> None:
            self.note("on_batches")

        def on_step_taken(self, step: int) -> None:
            self.note("on_step_taken")

        def on_step_end(self, step: int, metrics: Any) -> None:
            self.note("on_step_end")

    recipe, world = parse_recipe(RECIPE, "here"), OneProcess()
    callbacks = Callbacks([Notes()], {}, recipe, world)  # type: ignore[arg-type]
    hooks: dict[str, Callable[[], None]] = {
        "on_step_start": lambda: callbacks.step_start(1),
        "on_batches": lambda: callbacks.batches(1, []),
        "on_step_taken": lambda: callbacks.step_taken(1),
        "on_step_end": lambda: callbacks.step_end(1, lambda: None),  # type: ignore[arg-type, return-value]
    }
    for hook, call in hooks.items():
        heartbeat.enter_phase("optimizer")
        call()
        assert phases.pop() == (hook, "callbacks")
