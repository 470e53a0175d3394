"""The run folder: rows that are whole and once, markers, and what is refused."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import pytest

from distrain.config import UserError
from distrain.run.folder import Launch, RunDir, describe_effect
from distrain.run.json_files import append_row, rows_backwards, write_atomically
from distrain.run.metrics_file import MetricsFile
from distrain.system import bounded_json as bounded


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.create("name: x\n", Launch.describe(2, "ddp"))
    return run


# --------------------------------------------------------------------------------------------------------------------
# Rows


@pytest.mark.parametrize("torn", ['{"event": "train", "st', '{"event": "train", "step": 3}', "\0\0\0", "{", " "])
def test_a_torn_last_line_is_ignored_and_then_replaced(run: RunDir, torn: str) -> None:
    whole = '{"event": "train", "step": 1}\n{"event": "train", "step": 2}\n'
    run.metrics_path.write_text(whole + torn)
    assert [row["step"] for row in run.rows()] == [1, 2]
    file = MetricsFile(run.metrics_path)
    assert file.count == 2
    assert file.append({"event": "train", "step": 3})
    file.close()
    assert run.metrics_path.read_text() == whole + '{"event": "train", "step": 3}\n'
    assert [row["step"] for row in run.rows()] == [1, 2, 3]


def test_a_row_is_written_once(run: RunDir) -> None:
    for _ in range(3):
        file = MetricsFile(run.metrics_path)
        file.append({"event": "train", "step": 1, "loss": 0.5})
        file.append({"event": "eval", "step": 1, "loss": 0.6})
        assert not file.append({"event": "train", "step": 1, "loss": 0.7})
        assert file.count == 2
        file.close()
    assert [(row["event"], row["loss"]) for row in run.rows()] == [("train", 0.5), ("eval", 0.6)]


def test_rows_of_steps_that_are_trained_again_are_taken_out(run: RunDir) -> None:
    file = MetricsFile(run.metrics_path)
    for step in (1, 2, 3):
        file.append({"event": "train", "step": step, "loss": 0.5})
    file.close()
    file = MetricsFile(run.metrics_path, resume_step=2)
    assert file.count == 2
    assert file.append({"event": "train", "step": 3, "loss": 0.7})
    file.close()
    assert [(row["step"], row["loss"]) for row in run.rows()] == [(1, 0.5), (2, 0.5), (3, 0.7)]


def written(run: RunDir, steps: int) -> None:
    row = json.dumps({"event": "train", "loss": 0.5, "samples_per_s": 1234.5, "lr": 0.001, "step": 0})
    run.metrics_path.write_text(
        "".join(row.replace('"step": 0', f'"step": {step}') + "\n" for step in range(1, steps + 1))
    )


@pytest.mark.parametrize("last", [10_000, 10_003])
@pytest.mark.fault(42)
def test_a_resume_reads_the_end_alone(run: RunDir, monkeypatch: pytest.MonkeyPatch, last: int) -> None:
    written(run, 10_003)
    parsed = 0
    parse = json.JSONDecoder.decode

    def counted(*args: Any, **named: Any) -> Any:
        nonlocal parsed
        parsed += 1
        return parse(*args, **named)

    monkeypatch.setattr(json.JSONDecoder, "decode", counted)
    file = MetricsFile(run.metrics_path, resume_step=last)
    assert 0 < parsed < 1000, "rows of steps long before are not looked at"
    assert file.count == last
    assert not file.append({"event": "train", "step": last})
    assert not file.append({"event": "train", "step": 17})
    assert file.append({"event": "train", "step": last + 1})
    assert len(file._seen) < 10
    file.close()
    parsed = 0
    assert next(rows_backwards(run.metrics_path))["step"] == last + 1
    append_row(run.metrics_path, {"event": "train", "step": last + 2})
    assert 0 < parsed <= 2
    monkeypatch.undo()
    assert [row["step"] for row in run.rows()] == list(range(1, last + 3))


def test_rows_are_counted_on_from_a_save(run: RunDir) -> None:
    file = MetricsFile(run.metrics_path)
    for step in range(1, 9):
        file.append({"event": "train", "step": step})
    kept = file.settled(8)["rows"]
    assert kept == {"count": 8, "bytes": run.metrics_path.stat().st_size}
    assert "rows" not in file.settled(5), "of a run that has gone back, rows are taken out before that place"
    for event, step in (("train", 9), ("checkpoint", 8), ("train", 10)):
        file.append({"event": event, "step": step})
    file.close()
    file = MetricsFile(run.metrics_path, resume_step=8, counted=kept)
    assert (file.kept, file.count) == (8, 9)
    assert [(row["event"], row["step"]) for row in file.last(2)] == [("train", 8), ("checkpoint", 8)]
    assert [len(list(file.last(number))) for number in (-1, 0, 9, 99)] == [0, 0, 9, 9]
    file.close()
    for wrong in (None, {}, {"count": 8, "bytes": 10**9}, {"count": 8, "bytes": kept["bytes"] - 1}, {"count": -1}):
        file = MetricsFile(run.metrics_path, resume_step=8, counted=wrong)
        assert (file.kept, file.count) == (0, 9)
        file.close()


@pytest.mark.parametrize("last", [5, 500, 9_990])
def test_rows_that_come_late_stay_and_later_ones_go(run: RunDir, last: int) -> None:
    written(run, 10_000)
    lines = run.metrics_path.read_text().splitlines(keepends=True)
    late = json.dumps({"event": "checkpoint", "step": last}) + "\n"
    final = json.dumps({"event": "final", "step": 3}) + "\n"
    lines[last + 2 : last + 2] = [late, final]  # a save that was finished two steps later
    run.metrics_path.write_text("".join(lines) + '{"torn')
    file = MetricsFile(run.metrics_path, resume_step=last)
    for event, step in (("checkpoint", last), ("final", 3), ("train", last)):
        assert not file.append({"event": event, "step": step})
    file.close()
    found = [(row["event"], row["step"]) for row in run.rows()]
    assert found == [("train", step) for step in range(1, last + 1)] + [("checkpoint", last), ("final", 3)]
    assert [path.name for path in run.path.glob(".metrics*")] == []


@pytest.mark.parametrize("moment", ["before", "between", "torn"])
def test_a_crash_while_rows_are_taken_out_loses_none(run: RunDir, moment: str) -> None:
    written(run, 9)
    late = json.dumps({"event": "checkpoint", "step": 7}) + "\n"
    with run.metrics_path.open("a") as stream:
        stream.write(late)
    whole = run.metrics_path.read_bytes()
    first = whole.index(b'"step": 8')
    first = whole.rindex(b"\n", 0, first) + 1
    (run.path / ".metrics.jsonl.tail.new").write_bytes(b"7")  # never put in its place
    if moment != "before":
        (run.path / ".metrics.jsonl.tail").write_bytes(b"%d\n" % first + late.encode())
        run.metrics_path.write_bytes(whole[:first] + (late.encode()[:9] if moment == "torn" else b""))
    MetricsFile(run.metrics_path, resume_step=7).close()
    assert [(row["event"], row["step"]) for row in run.rows()] == [("train", step) for step in range(1, 8)] + [
        ("checkpoint", 7)
    ]


def test_lines_longer_than_a_block_are_read_backwards(run: RunDir) -> None:
    sizes = [1, 70_000, 3, 200_000, 65_536, 2]
    run.metrics_path.write_text("".join(json.dumps({"n": n, "x": "é" * n}) + "\n" for n in sizes) + "torn")
    assert [row["n"] for row in rows_backwards(run.metrics_path)] == sizes[::-1]
    assert list(rows_backwards(run.path / "none")) == []


def test_a_row_that_no_reader_would_take_is_not_written(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded, "ROW", 1000)
    file = MetricsFile(run.metrics_path)
    with pytest.raises(UserError, match=r"out of eval\.metrics"):
        file.append({"event": "eval", "step": 1, "confusion_matrix": [[0] * 1000]})
    file.close()
    assert list(run.rows()) == []


def test_what_json_cannot_hold_is_text(run: RunDir) -> None:
    file = MetricsFile(run.metrics_path)
    file.append({"event": "eval", "step": 1, "loss": math.nan, "f1": [1.0, math.inf], "more": {"x": -math.inf}})
    file.append({"event": "eval", "step": 2, "name": "a\udcff \N{GRINNING FACE}"})
    file.close()

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is not JSON")

    row, named = (json.loads(line, parse_constant=refuse) for line in run.metrics_path.read_text().splitlines())
    assert named["name"] == "a\\xff \N{GRINNING FACE}"
    assert row == {"event": "eval", "step": 1, "loss": "nan", "f1": [1.0, "inf"], "more": {"x": "-inf"}}
    assert math.isnan(float(row["loss"]))


def test_a_row_is_on_its_way_to_disk_at_once(run: RunDir) -> None:
    file = MetricsFile(run.metrics_path)
    file.append({"event": "train", "step": 1})
    assert len(list(run.rows())) == 1, "without closing: a killed process closes nothing"
    file.close()


def test_a_broken_line_in_the_middle_is_named(run: RunDir) -> None:
    run.metrics_path.write_text('{"event": "train", "step": 1}\nnonsense\n{"event": "train", "step": 2}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl:2 is not JSON"):
        list(run.rows())


def test_a_run_without_rows_has_none(run: RunDir) -> None:
    assert list(run.rows()) == []


# --------------------------------------------------------------------------------------------------------------------
# Markers


def test_markers_say_how_a_run_ended(run: RunDir) -> None:
    assert run.finished is None
    assert run.failed is None
    run.mark_finished({"loss": math.nan, "steps": 3})
    assert run.finished == {"loss": "nan", "steps": 3}
    run.mark_preempted(7, "SIGTERM")
    assert json.loads((run.path / "PREEMPTED").read_text()) == {"step": 7, "reason": "SIGTERM"}
    assert run.mark_failed({"error": "first"})
    run.clear_markers()
    assert run.finished is None
    assert run.failed is None
    assert not (run.path / "PREEMPTED").exists()
    run.clear_markers()


def test_the_first_failure_is_kept(run: RunDir) -> None:
    assert run.mark_failed({"rank": 3, "error": "the cause"})
    assert not run.mark_failed({"rank": 0, "error": "what followed from it"})
    assert run.failed == {"rank": 3, "error": "the cause"}


def test_an_unreadable_marker_still_marks(run: RunDir) -> None:
    (run.path / "FAILED.json").write_text('{"err')
    assert run.failed is not None
    assert "cannot be read" in run.failed["error"]


@pytest.mark.parametrize("text", ["", '{"steps": 1e999}', "[1]"])
def test_a_summary_that_cannot_be_read_is_an_error(run: RunDir, text: str) -> None:
    assert run.summary() is None
    (run.path / "FINISHED").write_text(text)
    assert run.finished is not None
    with pytest.raises(UserError, match=r"FINISHED in \S+ cannot be read: .*; delete it and start the run again"):
        run.summary()
    run.mark_finished({"steps": 3})
    assert run.summary() == {"steps": 3}


def test_the_paths_of_a_summary_are_those_of_where_the_run_is_now(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    run.mark_finished({"model": str(run.export_path), "checkpoint": str(run.checkpoint(3))})
    moved = RunDir(run.path.rename(tmp_path / "moved"))
    assert moved.summary() == {"model": str(moved.export_path), "checkpoint": str(moved.checkpoint(3))}


# --------------------------------------------------------------------------------------------------------------------
# Folders


def test_nothing_is_made_before_create(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "a" / "b")
    assert not run.exists
    assert run.finished is None
    assert list(tmp_path.iterdir()) == []
    run.create("name: x\n", Launch.describe(1, "single"))
    assert run.exists
    assert run.checkpoints.is_dir()
    assert not [path for path in run.path.iterdir() if path.name.startswith(".")]


def test_a_launch_is_read_back(run: RunDir) -> None:
    launch = run.launch()
    assert (launch.processes, launch.strategy) == (2, "ddp")
    assert launch.versions["torch"]
    assert launch.host


@pytest.mark.parametrize("text", ["{", "[]", '{"processes": 2}', '{"surprise": 1}'])
def test_a_launch_that_cannot_be_read_is_refused(run: RunDir, text: str) -> None:
    run.launch_path.write_text(text)
    with pytest.raises(UserError, match=r"launch.json cannot be read.*delete it"):
        run.launch()


def test_a_folder_without_a_launch_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run folder"):
        RunDir(tmp_path).launch()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, why in (("file/run", "Not a directory"), ("file", "it is a file"), ("/proc/run", "")):
        with pytest.raises(UserError, match=rf"cannot write the run folder .*: {why}.*--run-dir"):
            RunDir(tmp_path / path).create("name: x\n", Launch.describe(1, "single"))


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "new\ud800")
    assert path.read_text() == "old"
    write_atomically(path, "new")
    assert path.read_text() == "new"


def test_what_an_interrupted_creation_leaves_is_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = Launch(1, "single", [], {}, None, "here")
    replace = Path.replace
    for calls in range(3):
        run = RunDir(tmp_path / str(calls))
        left = [calls]

        def interrupted(self: Path, target: Path, left: list[int] = left) -> Path:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            return replace(self, target)

        with monkeypatch.context() as patched, contextlib.suppress(KeyboardInterrupt):
            patched.setattr(Path, "replace", interrupted)
            run.create("name: x\n", launch)
        assert run.exists or not run.holds_other_files()
        run.create("name: x\n", launch)
        assert run.launch() == launch
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    assert RunDir(tmp_path / "other").holds_other_files()


# --------------------------------------------------------------------------------------------------------------------
# What took effect


def test_what_took_effect_is_kept_of_the_last_start(run: RunDir) -> None:
    assert run.effect() is None
    run.record_effect({"engine": "DistributedDataParallel", "world": 2})
    effect = {
        "engine": "DeepSpeedEngine",
        "strategy": "zero2",
        "world": 2,
        "sharded": True,
        "parameter_bytes": {"full": 9216, "ranks": [4096, 5120]},
        "offload": "none",
        "versions": {"torch": "2.11", "deepspeed": "0.19"},
    }
    run.record_effect(effect)
    assert RunDir(run.path).effect() == effect
    assert describe_effect(effect) == (
        "engine DeepSpeedEngine, strategy zero2, world 2, sharded yes, "
        "parameter bytes full 9,216 ranks 4,096 to 5,120, offload none, versions torch 2.11 deepspeed 0.19"
    )
    assert "state bytes 7," in describe_effect({"state_bytes": [7, 7], "sharded": False})
    (run.path / "effect.json").write_text("{")
    with pytest.raises(UserError, match=r"effect\.json in .* cannot be read.*delete it"):
        run.effect()


def test_a_launch_record_of_an_earlier_version_had_no_offload(run: RunDir) -> None:
    run.write_launch(Launch.describe(2, "zero3", "all"))
    assert run.launch().offload == "all"
    record = json.loads(run.launch_path.read_text())
    del record["offload"]
    run.launch_path.write_text(json.dumps(record))
    assert run.launch().offload == "none"
