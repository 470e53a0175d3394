"""Curves for a page: few points that keep the extremes, histories read once and further, in bounded memory."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from made_runs import MadeRun

from distrain.report.history import Series
from distrain.report.ui.curves import Curves, aligned, by_hours


def drawn(x: np.ndarray, line: object) -> dict[float, float]:
    places = x if line.index is None else x[line.index]  # type: ignore[attr-defined]
    return dict(zip(places.tolist(), line.values.tolist(), strict=True))  # type: ignore[attr-defined]


def test_few_points_are_drawn_where_they_are() -> None:
    a = (np.array([1.0, 2.0, 3.0]), np.array([5.0, np.nan, 7.0]))
    b = (np.array([2.0, 10.0]), np.array([1.0, np.inf]))
    x, (one, other) = aligned([a, b], 8)
    assert x.tolist() == [1, 2, 3, 10]
    assert repr(drawn(x, one)) == repr({1.0: 5.0, 2.0: np.nan, 3.0: 7.0})
    assert repr(drawn(x, other)) == repr({2.0: 1.0, 10.0: np.nan})
    assert (one.nonfinite, other.nonfinite) == (1, 1)


@pytest.mark.parametrize("points", [8, 100, 1001])
def test_of_many_points_each_part_keeps_its_extremes(points: int) -> None:
    draw = np.random.default_rng(points)
    curves = [(np.arange(1.0, count + 1), draw.normal(size=count)) for count in (100_000, 30_000, 3)]
    curves[0][1][54_321], curves[0][1][54_400], curves[1][1][7] = 99.0, -99.0, np.nan
    x, lines = aligned(curves, points)
    assert len(x) <= points + 2
    assert np.all(np.diff(x) > 0)
    width = 100_000 / ((points - 2) // 2)
    for (own, values), line in zip(curves, lines, strict=True):
        shown = drawn(x, line)
        assert np.nanmax(list(shown.values())) == np.nanmax(values)
        assert np.nanmin(list(shown.values())) == np.nanmin(values)
        assert min(shown) - own[0] <= width
        assert own[-1] - max(shown) <= width
    at = [place for place, value in drawn(x, lines[0]).items() if value == 99.0]
    assert abs(at[0] - 54_322) <= width
    assert lines[1].nonfinite == 1


def test_means_are_those_of_the_finite_values() -> None:
    x, (line,) = aligned([(np.arange(1000.0), np.where(np.arange(1000) % 2, np.nan, 4.0))], 20, means=True)
    assert set(drawn(x, line).values()) == {4.0}
    assert line.nonfinite == 500


def test_a_part_of_a_curve_has_the_points_beside_it() -> None:
    x = np.arange(0.0, 1000.0)
    shared, (line,) = aligned([(x, x * 2)], 200, 100.5, 150.2)
    assert shared.tolist() == list(range(100, 152))
    assert line.values.tolist() == [2 * each for each in shared]
    assert [len(each.values) for each in aligned([(x[:0], x[:0]), (x[:3], x[:3])], 50, 5000, 6000)[1]] == [0, 1]


def test_hours_never_go_back() -> None:
    times = np.array([3600.0, np.nan, 7200.0, 5400.0, 10800.0])
    hours = by_hours(3600.0)(Series(np.arange(5), np.zeros(5), times))
    assert hours.tolist() == [0, 0, 1, 1, 2]


def test_what_grows_is_read_further_and_memory_is_bounded(tmp_path: Path) -> None:
    runs = [MadeRun(tmp_path / str(index), steps=400, seed=index) for index in range(4)]
    for run in runs:
        run.train(300)
    one = runs[0].run.path
    size = Curves().of_history(one, lambda history: history.nbytes)
    limit = 5 * 400 * 24
    curves = Curves(histories_bytes=int(2.5 * size), curves_bytes=limit)
    kept = curves.of_history(one, lambda history: history)
    assert len(curves.series(one, ["train/loss"])["train/loss"].steps) == 300
    runs[0].train(10)
    assert len(curves.series(one, ["train/loss"])["train/loss"].steps) == 310
    assert curves.of_history(one, lambda history: history) is kept
    for run in runs[1:]:
        curves.series(run.run.path, ["train/loss"])
    held = [entry.history is not None for entry in curves._entries.values()]
    assert held == [False, False, True, True]  # those that were asked for last
    assert sum(entry.curves_bytes for entry in curves._entries.values()) <= limit
    assert curves.of_history(one, lambda history: history) is not kept
    assert len(curves.series(one, ["train/loss"])["train/loss"].steps) == 310
    for run in runs[2:]:
        curves.of_history(run.run.path, lambda history: history)
    assert curves._entries[one].history is None  # and yet the short curves, and which there are, are known
    again = curves.series(one, ["valid/loss", "nothing"])
    assert [len(each.steps) for each in again.values()] == [15, 0]
    assert curves._entries[one].history is None
    limit = 20_000
    small = Curves(curves_bytes=limit)
    for run in runs:
        small.series(run.run.path, ["train/loss"])
    assert 10_000 < sum(entry.curves_bytes for entry in small._entries.values()) <= limit


def test_runs_that_are_not_read_yet_are_not_waited_for(tmp_path: Path) -> None:
    run, broken = MadeRun(tmp_path / "a", steps=50), MadeRun(tmp_path / "b")
    run.train()
    broken.run.metrics_path.write_text("nonsense\n")
    curves = Curves()
    asked = {made.run.path: ["train/loss", "nothing"] for made in (run, broken)}
    found = curves.series_by(time.monotonic() + 60, asked)
    series = found[run.run.path]
    assert isinstance(series, dict)
    assert [len(each.steps) for each in series.values()] == [50, 0]
    assert "is not JSON" in str(found[broken.run.path])
    curves.close()


def test_before_a_file_is_read_rows_here_and_there_give_a_sketch(tmp_path: Path) -> None:
    run = MadeRun(tmp_path / "a", steps=5000)
    run.train()
    curves = Curves()
    sketch = curves.sketch(run.run.path, "train/loss")
    assert sketch is not None
    assert curves.sketch(run.run.path, "train/loss") is sketch
    assert 80 < len(sketch.steps) <= 96
    exact = curves.series(run.run.path, ["train/loss"])["train/loss"]
    assert np.array_equal(exact.values[sketch.steps - 1], sketch.values)
    assert np.all(np.diff(sketch.steps) > 0)
    assert sketch.steps[0] == 1
    assert sketch.steps[-1] > 4800
    assert curves.sketch(run.run.path, "valid/loss") is None
    assert curves.sketch(tmp_path, "train/loss") is None
    run.run.metrics_path.write_bytes(b"nonsense\n[1]\n" * 1000)
    assert curves.sketch(run.run.path, "train/loss") is None
