"""The dashboard on a terminal: what it shows of runs, in 80 columns and 24 lines, and that names of runs are text."""

from __future__ import annotations

import asyncio
import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import TINY, cli, train, write_recipe

from distrain.config import UserError
from distrain.report.history import History
from distrain.report.text_curves import draw
from distrain.report.watching import Watch, curve_names, rank_rows
from distrain.run.heartbeat import Heartbeat


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("watched")
    train(1, write_recipe(folder, TINY), folder / "runs/first", "log.every=1 steps")
    return folder / "runs/first"


async def until(pilot: Any, shown: Any) -> None:
    for _ in range(600):
        await pilot.pause(0.05)
        if shown():
            return
    raise AssertionError("it is not shown in 30 s")


def lines(app: Watch) -> list[str]:
    return ["".join(segment.text for segment in strip).rstrip() for strip in app.screen._compositor.render_strips()]


def on_screen(app: Watch, words: str) -> bool:
    return any(words in line for line in lines(app))


def test_a_run_is_shown_in_80_columns_and_24_lines(run: Path) -> None:
    async def look() -> None:
        app = Watch(run)
        async with app.run_test(size=(80, 24)) as pilot:
            await until(pilot, lambda: on_screen(app, "train/loss"))
            shown = lines(app)
            assert len(shown) == 24
            assert max(map(len, shown)) <= 80
            assert shown[0].startswith("first  finished  step ")
            assert "100%" in shown[0]
            assert "samples/s" in shown[1]
            assert any("└──" in line for line in shown), "a curve has its axes"
            assert re.search(r"^\d\d:\d\d:\d\d  \S", "\n".join(shown), re.MULTILINE), (
                "the end of the log, without its dates"
            )
            assert not on_screen(app, "next run")
            assert "…" not in shown[1], "what does not fit is left out"
            await pilot.press("l")
            await until(pilot, lambda: not app.current_theme.dark)
            await pilot.press("n")
            await until(pilot, lambda: on_screen(app, "curve 2 of"))
            await pilot.press("p", "p")
            count = len(curve_names(History(run)))
            await until(pilot, lambda: on_screen(app, f"curve {count} of {count}"))

    asyncio.run(look())


def test_runs_of_a_folder_are_listed_and_chosen(run: Path, tmp_path: Path) -> None:
    for name in ("a", "b[red]x\x1b[2J"):
        folder = tmp_path / name
        folder.mkdir()
        for file in ("recipe.yaml", "launch.json", "FINISHED", "effect.json", "attempts.jsonl", "metrics.jsonl"):
            (folder / file).write_bytes((run / file).read_bytes())
    finished = json.loads((run / "FINISHED").read_text())

    async def look() -> None:
        app = Watch(tmp_path)
        async with app.run_test(size=(120, 40)) as pilot:
            await until(pilot, lambda: on_screen(app, "train/loss"))
            assert on_screen(app, "b[red]x\\x1b[2J"), "a name is text"
            assert sum(f"{finished['steps']:,}/{finished['steps']:,}" in line for line in lines(app)) == 3
            await pilot.press("j")
            await until(pilot, lambda: on_screen(app, "b[red]x\\x1b[2J  finished"))
            with (tmp_path / "b[red]x\x1b[2J/metrics.jsonl").open("a") as file:
                row = {"event": "train", "step": 77_777, "time": time.time(), "loss": 0.0123, "samples_per_s": 1.0}
                file.write(json.dumps(row) + "\n")
            await until(pilot, lambda: on_screen(app, "77,777"))

    asyncio.run(look())


def test_the_rank_that_is_behind_comes_first() -> None:
    made = [
        Heartbeat(
            rank=rank,
            host="n1",
            pid=1,
            started=0,
            job=None,
            attempt="a",
            world_size=3,
            sequence=1,
            time=0.0,
            interval=5.0,
            step=step,
            marks=2,
            phase="backward",
            seconds=1.0,
            idle=idle,
            steps=9,
        )
        for rank, step, idle in ((0, 9, 0.1), (1, 7, 61.0), (2, 9, 0.1))
    ]
    rows = rank_rows(made)
    assert [row[0] for row in rows] == ["1", "0", "2"]
    assert rows[0][2:4] == ("7", "the backward pass of step 8")


def test_curves_are_drawn_within_their_space() -> None:
    x = np.arange(1000)
    for y in (np.sin(x / 50), np.full(1000, 3.0), np.where(x % 7 == 0, np.nan, x * 1e9), np.full(1000, np.nan)):
        for width, height in ((80, 20), (20, 4), (200, 60)):
            drawn = draw(x, y, width, height)
            assert len(drawn) == height
            assert {len(line) for line in drawn} == {width}
    falling = draw(x, -x.astype(float), 40, 10)
    blank = " "
    assert falling[0].strip(f" 0│┤-{blank}"), "it begins at the top"
    assert falling[0].rstrip(blank) != falling[0]
    assert falling[7][-1] != blank, "and ends at the bottom"
    assert draw(x[:1], np.array([2.0]), 40, 6)[0].strip()


def test_it_needs_runs_and_a_terminal(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no runs"):
        Watch(tmp_path)
    ended = cli("watch", tmp_path)
    assert ended.status == 1
    assert "distrain status prints the same numbers" in ended.err
