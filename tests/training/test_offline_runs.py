"""Files of wandb: cut to the rows that stay, and over the folders of all starts each row once."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from row_logs import RowLogs
from runs import TINY, write_recipe
from wandb_file import Offline, history, logged, pieces, record

from distrain.config import Recipe
from distrain.config.yaml import load_recipe
from distrain.run.folder import Launch, RunDir
from distrain.training.callbacks.offline_runs import cut


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Offline:
    package = Offline()
    monkeypatch.setitem(sys.modules, "wandb", package)  # type: ignore[arg-type]
    return package


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.create("name: x\n", Launch.describe(1, "single"))
    return run


# --------------------------------------------------------------------------------------------------------------------
# Cutting a file


SIZES = [
    pytest.param(lambda step: 20, id="many in a block"),
    pytest.param(lambda step: 32_000, id="across the border of blocks"),
    pytest.param(lambda step: 100_000 * (step % 2), id="over several blocks"),
    pytest.param(lambda step: 3_000 + step, id="of all lengths"),
]


@pytest.mark.parametrize("size", SIZES)
def test_a_file_is_cut_behind_a_row(tmp_path: Path, size: Callable[[int], int]) -> None:
    file = tmp_path / "run.wandb"
    steps = range(5, 45)
    other = b"\x82\x01\x02\x08\x01"  # a record of another kind
    whole = pieces([other, *(each for step in steps for each in (record(step, {"x": "x" * size(step)}), other))])
    for rows in (1000, 45, 44, 43, 30, 7, 6):
        file.write_bytes(whole)
        assert cut(file, rows) == min(rows, 45)
        assert [row["_step"] for row in history(file)] == list(range(5, min(rows, 45)))
    for rows in (5, 0):
        assert cut(file, rows) == 0, "no row of it stays"


@pytest.mark.parametrize("size", SIZES)
def test_what_a_kill_left_of_a_record_is_cut_off(tmp_path: Path, size: Callable[[int], int]) -> None:
    file = tmp_path / "run.wandb"
    whole = pieces(record(step, {"x": "x" * size(step)}) for step in range(12))
    draw = random.Random(0)
    for length in [7, 8, 13, 14, 15, len(whole) - 1, *(draw.randrange(7, len(whole)) for _ in range(30))]:
        file.write_bytes(whole[:length])
        held = cut(file, 1000)
        if held:
            assert [row["_step"] for row in history(file)] == list(range(held))
            assert cut(file, 1000) == held
    file.write_bytes(whole[:-9] + b"\0" * 40_000)  # blocks that were never written
    assert cut(file, 1000) == 11
    assert len(history(file)) == 11
    assert cut(tmp_path / "none.wandb", 5) == 0


# --------------------------------------------------------------------------------------------------------------------
# Starts


def recipes(folder: Path) -> dict[str, Recipe]:
    return {
        mode: load_recipe(write_recipe(folder, TINY.replace("log: {", f"log: {{wandb: {mode}, "))).recipe
        for mode in ("off", "offline")
    }


def same_rows(run: RunDir) -> None:
    rows, mirrored = list(run.rows()), logged(run.path)
    assert [row["_step"] for row in mirrored] == list(range(len(rows)))
    found = [(row["event"], row["step"], row[f"{row['event']}/drawn"]) for row in mirrored]
    assert found == [(row["event"], row["step"], row["drawn"]) for row in rows]


@pytest.mark.parametrize("seed", range(4))
def test_the_folders_of_all_starts_hold_every_row_once(
    run: RunDir, package: Offline, tmp_path: Path, seed: int
) -> None:
    draw, recipe = random.Random(seed), recipes(tmp_path)
    saved: list[tuple[int, dict[str, Any]]] = [(0, {})]
    for _ in range(20):
        del saved[max(1, len(saved) - draw.choice([0, 0, 0, 1, 2])) :]
        begun, kept = saved[-1]
        mode = "off" if draw.random() < 0.1 else "offline"
        logs = RowLogs(run, recipe[mode], begun, kept)
        late: list[tuple[int, str]] = [(begun, "checkpoint")] if begun else []
        if draw.random() < 0.2:
            late.append((begun, "update"))
        for step in range(begun + 1, begun + draw.randrange(2, 30)):
            own = [(step, "train"), *([(step, "eval")] if step % 3 == 0 else [])]
            # what is known of a save comes when it has ended
            rows = late + own if step == begun + 1 else own + late
            late = []
            if step % 5 == 0 and draw.random() < 0.1:  # the run went back to here
                rows += [(step + 1, "train"), (step + 2, "train")]
            for at, event in rows:
                logs.write({"event": event, "step": at, "drawn": draw.random()})
            if step % 5 == 0:
                saved.append((step, json.loads(json.dumps(logs.saved_at(step)))))
                late = [(step, "checkpoint")]
        if mode == "offline":
            assert [mirror.name for mirror in logs.trackers.mirrors] == ["wandb"]
            logs.trackers.mirrors[0].close()
            if draw.random() < 0.7:
                same_rows(run)
                package.runs[-1].kill(draw.choice([0, draw.random(), 0.99]))
        logs.trackers.mirrors.clear()
        logs.close()
    kept_by = saved[-1]
    RowLogs(run, recipe["offline"], kept_by[0], kept_by[1]).close()
    same_rows(run)


@pytest.mark.parametrize("lost", ["starts.json", "folder", "file", "id", "mark"])
def test_what_is_not_there_is_written_anew(run: RunDir, package: Offline, tmp_path: Path, lost: str) -> None:
    recipe, kept = recipes(tmp_path)["offline"], dict[str, Any]()
    for begun in (0, 10):
        logs = RowLogs(run, recipe, begun, kept)
        for step in range(begun + 1, begun + 11):
            logs.write({"event": "train", "step": step, "drawn": step})
        kept = logs.saved_at(begun + 10)
        logs.close()
    same_rows(run)
    if lost == "starts.json":
        (run.path / "wandb" / lost).write_text("[1, 2")
    elif lost == "id":
        (run.path / "wandb" / "run-id").write_text("another")
    elif lost == "mark":
        kept["mirrors"] = {}
    else:
        file = package.runs[-1].file
        file.unlink() if lost == "file" else file.parent.rename(tmp_path / "elsewhere")
    RowLogs(run, recipe, 20, kept).close()
    if lost == "id":
        (kept_folder,) = {file.parent for file in run.path.glob("wandb/wandb/*/run-another.wandb")}
        assert [row["_step"] for row in history(kept_folder / "run-another.wandb")] == list(range(20))
    else:
        same_rows(run)


def read_so_far() -> int:
    """Return the bytes that this process has read."""
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.fault(42)
def test_a_start_reads_and_writes_what_its_checkpoint_does_not_hold(
    run: RunDir, package: Offline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = TINY.replace("log: {", "log: {wandb: offline, tensorboard: true, ")
    recipe = load_recipe(write_recipe(tmp_path, text)).recipe
    kept = dict[str, Any]()
    wide = "x" * 400
    work: dict[int, tuple[int, int]] = {}
    begun = 0
    for steps in (200, 20_000, 20_100):
        before = read_so_far()
        logs = RowLogs(run, recipe, begun, kept)
        work[begun] = read_so_far() - before, len(package.runs[-1].rows)
        assert [mirror.name for mirror in logs.trackers.mirrors] == ["wandb", "tensorboard"]
        mirrors, logs.trackers.mirrors[1:] = logs.trackers.mirrors[1], []
        for step in range(begun + 1, steps + 1):
            logs.write({"event": "train", "step": step, "drawn": step, "text": wide})
        logs.trackers.mirrors.append(mirrors)
        kept = logs.saved_at(steps)
        logs.write({"event": "train", "step": steps + 1, "drawn": 0})
        logs.close()
        begun = steps
    assert run.metrics_path.stat().st_size > 8_000_000
    assert package.runs[1].file.stat().st_size > 1_000_000
    for begun in (200, 20_000):
        read, rows = work[begun]
        assert read < 600_000, "bytes, of files and of what is imported"
        assert rows == 0
    assert len(logged(run.path)) == 20_101
