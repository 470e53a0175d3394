"""Curves of a run: each step once over attempts and rollbacks, read further as it grows, drawn with fewer points."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distrain.config import UserError
from distrain.report.history import History, downsampled


def row(event: str, step: int, **values: Any) -> dict[str, Any]:
    return {"event": event, "step": step, "time": 1e9 + step, **values}


def write(run: Path, *rows: dict[str, Any], mode: str = "a") -> None:
    with (run / "metrics.jsonl").open(mode) as file:
        file.writelines(json.dumps(each) + "\n" for each in rows)


def test_curves_have_the_names_that_trackers_show(tmp_path: Path) -> None:
    write(
        tmp_path,
        row("train", 1, loss=2.0, lr=[0.1, 0.2]),
        row("train", 2, loss="nan", mfu=0.5, note="x", flag=True),
        row("eval", 2, split="test", accuracy=0.5),
        row("checkpoint", 2, bytes=7),
        row("final", 2, split="test", accuracy=0.75),
    )
    history = History(tmp_path)
    assert history.names == ["final/test/accuracy", "test/accuracy"] + [
        f"train/{name}" for name in ("loss", "lr/0", "lr/1", "mfu")
    ]
    steps, values, times = history.series("train/loss")
    assert steps.tolist() == [1, 2]
    assert values[0] == 2.0
    assert math.isnan(values[1])  # a NaN that was trained with is drawn, a number that a row lacks is not
    assert times.tolist() == [1e9 + 1, 1e9 + 2]
    assert history.series("train/mfu").steps.tolist() == [2]
    assert history.series("train/lr/1").values.tolist() == [0.2]
    assert history.series("final/test/accuracy").values.tolist() == [0.75]
    assert len(history.series("test/loss").steps) == 0
    assert history.step == 2
    assert history.checkpoints == [2]
    assert [each["event"] for each in history.events] == ["eval", "checkpoint", "final"]


def test_what_grows_is_read_further(tmp_path: Path) -> None:
    history = History(tmp_path)
    assert history.names == []
    assert not history.refresh()
    write(tmp_path, row("train", 1, loss=1.0))
    assert history.refresh()
    assert not history.refresh()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"event": "train", "st')
    assert not history.refresh()  # a line that is being written
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('ep": 2, "loss": 0.5}\n')
    assert history.refresh()
    assert history.series("train/loss").values.tolist() == [1.0, 0.5]


@pytest.mark.parametrize("again", [[3.5], [3.5, 4.5, 5.5]], ids=["shorter", "longer"])
def test_a_resumed_attempt_that_has_cut_the_file_replaces_what_it_cut(tmp_path: Path, again: list[float]) -> None:
    write(tmp_path, *[row("train", step, loss=float(step)) for step in range(1, 6)])
    history = History(tmp_path)
    rows = [row("train", 1, loss=1.0), row("train", 2, loss=2.0)]
    write(tmp_path, *rows, *[row("train", 3 + i, loss=loss) for i, loss in enumerate(again)], mode="w")
    assert history.refresh()
    assert history.series("train/loss").values.tolist() == [1.0, 2.0, *again]


def test_steps_trained_again_after_a_rollback_are_there_once(tmp_path: Path) -> None:
    write(tmp_path, *[row("train", step, loss=float(step)) for step in range(1, 6)], row("eval", 4, split="a", loss=1))
    write(tmp_path, row("eval", 4, split="b", loss=1), row("anomaly", 5), row("rollback", 2))
    write(tmp_path, row("train", 3, loss=30.0), row("eval", 4, split="a", loss=2), row("train", 4, loss=40.0))
    history = History(tmp_path)
    assert history.series("train/loss").steps.tolist() == [1, 2, 3, 4]
    assert history.series("train/loss").values.tolist() == [1.0, 2.0, 30.0, 40.0]
    assert history.series("a/loss").values.tolist() == [2.0]
    found = [(each["event"], each.get("split"), each.get("loss")) for each in history.events]
    assert found == [("eval", "b", 1), ("anomaly", None, None), ("rollback", None, None), ("eval", "a", 2)]


def test_rows_alike_are_read_as_they_are_one_by_one(tmp_path: Path) -> None:
    def rows() -> list[dict[str, Any]]:
        odd: list[Any] = ["nan", "-inf", None, True, 10**400, "word", [1.0], [], [2.0, 3.0], ["x"], 7]
        found = [row("train", step, loss=step / 3, lr=[1.0, step], other=odd[step % 11]) for step in range(1, 40)]
        found += [row("train", step, loss=1.0, more=2) for step in range(40, 45)]
        found += [row("eval", 44, split="s", loss=1.0), row("eval", 44, split="t", loss=2.0), row("checkpoint", 44)]
        found += [row("train", step, loss=9.0, note="word") for step in (43, 44, 45, 45, 46)]
        return [*found, row("train", 47, loss="inf"), row("train", 48, loss="nan")]

    found = []
    for part in (1, 7, 1000):  # rows that come one at a time have none beside them
        (tmp_path / str(part)).mkdir()
        history = History(tmp_path / str(part))
        every = rows()
        for begin in range(0, len(every), part):
            write(tmp_path / str(part), *every[begin : begin + part])
            assert history.refresh()
        found.append({name: [each.tolist() for each in history.series(name)] for name in history.names})
        assert [each["event"] for each in history.events] == ["eval", "eval", "checkpoint"]
    assert found[0].keys() == found[1].keys() == found[2].keys() >= {"train/lr/1", "train/other/0", "train/more"}
    assert repr(found[0]) == repr(found[1]) == repr(found[2])


def test_attempts_are_what_the_run_notes_of_them(tmp_path: Path) -> None:
    rows = [
        {"step": 0, "time": 5.0, "processes": 2, "strategy": "ddp", "host": "a", "job": None, "token": "x"},
        {"event": "update", "step": 4},
        {"step": 4, "time": 9.0, "processes": 4, "strategy": "fsdp2", "host": "b", "job": "17", "token": "y"},
    ]
    (tmp_path / "attempts.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    first, second = History(tmp_path).attempts
    assert (first.step, first.time, first.processes, first.job) == (0, 5.0, 2, None)
    assert (second.step, second.strategy, second.host, second.job) == (4, "fsdp2", "b", "17")


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"event": "train", "step": 1}\nnonsense\n')
    with pytest.raises(UserError, match="at byte 30 is not JSON"):
        History(tmp_path)


@pytest.mark.parametrize("count", [9, 1_000, 100_003])
def test_fewer_points_keep_extremes_gaps_and_ends(count: int) -> None:
    y = np.random.default_rng(count).normal(size=count)
    x = np.arange(count) * 3
    y[count // 2] = 50.0
    y[count // 3] = -50.0
    few_x, few_y = downsampled(x, y, 200)
    assert len(few_x) <= 200
    assert (few_x[0], few_x[-1]) == (x[0], x[-1])
    assert np.all(np.diff(few_x) > 0)
    assert {50.0, -50.0} <= set(few_y.tolist())
    assert np.array_equal(few_y, y[few_x // 3])
    y[count // 4] = np.nan
    few_x, few_y = downsampled(x, y, 200)
    assert len(few_x) <= 200
    assert np.isnan(few_y).sum() == 1
    assert np.nanmax(few_y) == 50.0


def test_a_curve_of_nothing_but_nan_is_drawn_as_gaps() -> None:
    x, y = downsampled(np.arange(1000), np.full(1000, np.nan), 100)
    assert len(x) <= 100
    assert np.isnan(y).all()
    with pytest.raises(ValueError, match="expected 8 or more"):
        downsampled(x, y, 7)
