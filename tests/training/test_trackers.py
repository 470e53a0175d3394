"""Rows and their mirrors: each row once in wandb and TensorBoard, and a tracker that fails never stops a run."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from row_logs import RowLogs
from runs import TIMED, TINY, Ended, train, train_rank, write_recipe
from wandb_file import Service, artifacts, logged
from worlds import in_world, running_world

from distrain import Callback
from distrain.config.yaml import load_recipe
from distrain.run.folder import Launch, RunDir
from distrain.run.media import media_of
from distrain.training.callbacks.tracker import Tracker, TrackerStart
from distrain.training.callbacks.trackers import Display, duration

MIRRORED = TINY.replace("log: {every: 1 steps}", "log: {every: 1 steps, wandb: offline, tensorboard: true}")
LONG = ["train.steps=60", "checkpoint.every=4 steps"]


def train_until_killed(recipe: Path, run: Path, *overrides: str) -> None:
    """Train, and SIGKILL it once it has written some more rows."""
    before = sum(1 for _ in RunDir(run).rows())
    with running_world(1, train_rank, str(recipe), list(overrides), str(run), None, False) as world:
        until = time.monotonic() + 60
        while sum(1 for _ in RunDir(run).rows()) < before + 5 and time.monotonic() < until:
            time.sleep(0.005)
        world.kill()
        assert world.wait(30) == [-9]


class Pictures(Callback):
    """Logs a picture, a table and a text every eight steps."""

    def on_start(self, run: Any) -> None:
        self.run = run

    def on_step_end(self, step: int, metrics: Any) -> None:
        if step % 8 == 0:
            self.run.log_image("shade", np.full((4, 5), step / 100), "a shade of grey")
            self.run.log_table("steps", ["step", "word"], [[step, "a|b"], [None, "c"]])
            self.run.log_text("words", f"<i>step {step}</i>")


def check_media(run: Path, rows: list[dict[str, Any]], mirror: list[dict[str, Any]], board: Any) -> None:
    """Each picture, table and text is in the run folder, and once in each mirror."""
    named = [row for row in rows if row["event"] == "callback/Pictures"]
    assert [row["step"] for row in named] == list(range(8, 61, 8))
    assert all((run / item.file).is_file() for row in named for item in media_of(row))
    there = [row for row in mirror if row["event"] == "callback/Pictures"]
    assert [row["step"] for row in there] == [row["step"] for row in named]
    kinds = {"shade": "image-file", "steps": "table-file", "words": "html-file"}
    for row in there:
        for name, kind in kinds.items():
            assert row[f"callback/Pictures/{name}._type"] == kind
            file = row[f"callback/Pictures/{name}.path"]
            assert len([*run.glob(f"wandb/wandb/offline-run-*/files/{file}")]) == 1
    assert [event.step for event in board.Images("callback/Pictures/shade")] == list(range(8, 61, 8))
    texts = board.Tensors("callback/Pictures/words/text_summary")
    assert [text.step for text in texts] == list(range(8, 61, 8))
    assert texts[0].tensor_proto.string_val[0] == b"    <i>step 8</i>"
    assert b"| 8 | a\\|b |" in board.Tensors("callback/Pictures/steps/text_summary")[0].tensor_proto.string_val[0]


@pytest.mark.slow
def test_mirrors_hold_every_row_once_across_resumes(tmp_path: Path) -> None:
    text = MIRRORED.replace("metrics: [accuracy]", "metrics: [accuracy, confusion_matrix]")
    text = text.replace("log: {", "log: {artifacts: checkpoints, ")
    recipe = write_recipe(tmp_path, f"{text}callbacks: ['{__file__}:Pictures']\n")
    run = tmp_path / "run"
    train(1, recipe, run, *LONG, stop_after=10)
    for _ in range(2):
        train_until_killed(recipe, run, *LONG)  # before anything of it was flushed
    train(1, recipe, run, *LONG)
    rows = list(RunDir(run).rows())
    assert len(rows) > 70
    assert len({(row["event"], row["step"]) for row in rows}) == len(rows)

    mirror = logged(run)
    assert len(list((run / "wandb" / "wandb").glob("offline-run-*"))) > 1, "of each start its own"
    assert [row["_step"] for row in mirror] == list(range(len(rows)))
    for row, mirrored in zip(rows, mirror, strict=True):
        assert (mirrored["event"], mirrored["step"]) == (row["event"], row["step"])
        group = row.get("split", row["event"])
        for key, value in row.items():
            if isinstance(value, int | float) and key != "step":
                assert mirrored[f"{group}/{key}"] == value

    assert [(name, kind, sorted(aliases)) for name, kind, aliases in artifacts(run)] == [
        ("run-model", "model", ["latest", "model"]),
        ("run-final", "checkpoint", ["final", "latest"]),
        ("run-best", "checkpoint", ["best", "latest"]),
    ]
    with Service() as service:
        sync = [str(Path(sys.executable).with_name("wandb")), "sync", str(run / "wandb" / "wandb")]
        there = {
            "WANDB_BASE_URL": service.url,
            "WANDB_API_KEY": "x" * 40,
            "HOME": str(tmp_path),
            "WANDB_MODE": "online",
        }
        subprocess.run(sync, env=os.environ | there, check=True, capture_output=True, timeout=100)
        uploaded = [service.rows[line] for line in sorted(service.rows)]
    assert [(row["_step"], row["event"], row["step"]) for row in uploaded] == [
        (index, row["event"], row["step"]) for index, row in enumerate(rows)
    ]

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    board.Reload()
    check_media(run, rows, mirror, board)
    shown = {tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}
    for tag, event, key in (("train/loss", "train", "loss"), ("valid/accuracy", "eval", "accuracy")):
        wanted = [(row["step"], pytest.approx(row[key], rel=1e-6)) for row in rows if row["event"] == event]
        assert shown[tag] == wanted
    assert [step for step, _ in shown["test/loss"]] == [60]


# --------------------------------------------------------------------------------------------------------------------
# Trackers that fail


class Broken(Tracker):
    """A tracker that raises where it is told to."""

    written: list[int] = []

    def __init__(self, start: TrackerStart, where: str):
        self.where = where
        if where == "init":
            raise ConnectionError("no network")

    def write(self, index: int, row: dict[str, Any]) -> None:
        if self.where == "log" and row["step"] > 2:
            raise ConnectionError("no network")
        self.written.append(index)

    def mark(self) -> None:
        if self.where == "mark":
            raise ConnectionError("no network")

    def close(self) -> None:
        if self.where == "close":
            raise ConnectionError("no network")


def train_with_broken_tracker(recipe: str, run_dir: str, where: str) -> tuple[Ended, list[int]]:
    tracker = f"log.trackers=[{{name: '{__file__}:Broken', where: {where}}}]"
    return train_rank(recipe, [tracker], run_dir, None, False), Broken.written


@pytest.mark.parametrize("where", ["init", "log", "mark", "close"])
def test_a_tracker_that_fails_does_not_stop_a_run(tmp_path: Path, where: str) -> None:
    recipe = write_recipe(tmp_path)
    ((ended, written),) = in_world(1, train_with_broken_tracker, str(recipe), str(tmp_path / "run"), where)
    assert ended.status == 0
    run = RunDir(tmp_path / "run")
    assert run.finished is not None
    said = "Broken failed and is off for the rest of this run: ConnectionError: no network"
    assert ended.out.count("Broken failed") == 1
    assert f"warning: {said}" in ended.out
    assert f"WARNING {said}" in run.log_path(0).read_text()
    rows = list(run.rows())
    assert [row["step"] for row in rows if row["event"] == "train"] == list(range(1, 13))
    assert len(written) == {"init": 0, "log": 2, "mark": 5, "close": len(rows)}[where]


def train_with_closed_port(recipe: str, run_dir: str) -> Ended:
    import os

    os.environ.pop("WANDB_MODE", None)
    os.environ |= {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "x" * 40}
    wandb_settings = {"init_timeout": 3}
    import wandb

    whole = wandb.Settings
    wandb.Settings = lambda **given: whole(**(given | wandb_settings))  # type: ignore[assignment, misc]
    return train_rank(recipe, ["log.wandb=online"], run_dir, None, False)


@pytest.mark.slow
@pytest.mark.fault(23)
def test_wandb_without_a_network_does_not_stop_a_run(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    (ended,) = in_world(1, train_with_closed_port, str(recipe), str(tmp_path / "run"))
    assert ended.status == 0
    assert RunDir(tmp_path / "run").finished is not None
    assert ended.out.count("warning: wandb failed and is off") == 1


# --------------------------------------------------------------------------------------------------------------------
# First lines

FROZEN = TINY.replace("clip_norm: 0.5", 'clip_norm: 0.5, freeze: ["layers.0.*"]').replace("{steps: 12", "{steps: 4")


@pytest.mark.parametrize(("world_size", "strategy"), [(1, "single"), (2, "fsdp2")])
def test_what_is_trained_is_counted_after_the_recipe_was_applied(
    tmp_path: Path, world_size: int, strategy: str
) -> None:
    recipe = write_recipe(tmp_path, FROZEN.replace("fp64", "fp32"))
    ended, *_ = train(world_size, recipe, tmp_path / "run", strategy=strategy)
    trained = 16 * 10 + 10
    everything = 64 * 16 + 16 + trained
    assert f"mlp: {everything:,} parameters ({everything:,} float32), {trained:,} trainable" in ended.out
    effect = RunDir(tmp_path / "run").effect()
    assert effect is not None
    assert (effect["parameters"], effect["trainable"]) == (everything, trained)


# --------------------------------------------------------------------------------------------------------------------
# Ranks, text


def test_only_rank_0_writes(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, MIRRORED)).recipe
    run = RunDir(tmp_path / "run")
    run.create("", Launch.describe(2, "ddp"))
    logs = RowLogs(run, recipe, rank=1)
    logs.write({"event": "train", "step": 1, "loss": 1.0})
    logs.write({"event": "eval", "step": 1})
    logs.close()
    assert not run.metrics_path.exists()
    assert not (run.path / "wandb").exists()


def test_a_log_file_gets_a_line_a_second_and_the_last_step(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display(100, 0)
    row = {"loss": math.nan, "lr": 0.1, "samples_per_s": 1234.5, "data_wait": 0.5, "epoch": 1.25}
    for step in range(1, 101):
        display.train(row | {"step": step})
    display.close()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["1/100", "100/100"]
    assert lines[-1] == ("step 100/100  epoch 1.25  loss nan  lr 0.1  1,234 samples/s  waiting for data 50%  ETA 0s")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (190, "3m10s"),
        (3599.7, "1h00m"),
        (7500, "2h05m"),
        (360000, "100h00m"),
    ],
)
def test_durations_are_written_as_people_do(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_timed_columns_are_those_of_the_rows(tmp_path: Path) -> None:
    train(1, write_recipe(tmp_path), tmp_path / "run")
    rows = list(RunDir(tmp_path / "run").rows())
    by_event = {row["event"]: set(row) for row in rows}
    assert by_event["train"] == {
        "event", "step", "epoch", "samples", "loss", "lr", "grad_norm", "samples_per_s", "data_wait", "time",
        "step_s", "data_s", "forward_backward_s", "optimizer_s", "agreement_s", "saving_s", "peak_memory_gib",
    }  # fmt: skip
    assert by_event["eval"] == by_event["final"] == {
        "event", "step", "split", "loss", "accuracy", "samples", "seconds", "time"
    }  # fmt: skip
    assert by_event["checkpoint"] == {"event", "step", "bytes", "seconds", "time"}
    assert set(TIMED) - {"tokens_per_s", "mfu"} <= set.union(*by_event.values())
    for row in rows:
        if row["event"] == "train":
            assert 0 <= row["data_wait"] <= 1
            assert row["samples_per_s"] > 0
            assert row["samples"] == 12 * row["step"]
            assert row["epoch"] == pytest.approx(row["samples"] / 1258)
