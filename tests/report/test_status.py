"""How runs are doing, their logs, and how they are ended."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from checkpoint_state import DESCRIBED, SPECS, cut, make_state
from runs import TINY, cli, train, write_recipe
from stub_slurm import StubQueue
from typer.testing import CliRunner

from distrain.checkpoint import LocalCommunicator, Saver
from distrain.cli.main import app
from distrain.config import UserError
from distrain.config.yaml import load_recipe
from distrain.launchers.slurm.queue import Job
from distrain.launchers.slurm.tracking import note_job
from distrain.report.logs import follow, log_file
from distrain.report.status import (
    STATES,
    Status,
    cancel_jobs,
    status_of,
    status_rows,
    statuses,
    stop_run,
    table,
)
from distrain.run.folder import Launch, RunDir
from distrain.run.heartbeat import Heartbeat, write_heartbeat
from distrain.run.json_files import append_row
from distrain.system.processes import namespace_of_processes, process_started


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> StubQueue:
    """SLURM's queue, with the commands that ask it and cancel its jobs."""
    known = StubQueue(tmp_path / "slurm")
    monkeypatch.setenv("PATH", f"{known.commands}{os.pathsep}{os.environ['PATH']}")
    return known


def made(folder: Path, job: str | None = None) -> RunDir:
    """Make a run as `distrain submit` does, without training anything."""
    run = RunDir(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    recipe = write_recipe(folder.parent, TINY, "recipe.yml")
    run.create(recipe.read_text(), Launch.describe(2, "ddp"))
    assert load_recipe(run.recipe_path).recipe.name == "tiny"
    if job is not None:
        (folder / "submit").mkdir()
        note_job(folder, job)
    return run


def attempt(run: RunDir, seconds_ago: float = 0, **about: Any) -> None:
    append_row(run.attempts_path, {"time": time.time() - seconds_ago, "job": "7", "restart": 0, "step": 0, **about})


def beat(run: RunDir, rank: int = 0, **about: Any) -> None:
    given = {
        "rank": rank, "host": "node1", "pid": 1, "started": 1, "job": "7.0", "attempt": "a", "world_size": 2,
        "sequence": 1, "time": time.time(), "interval": 5.0, "step": 40, "marks": 1, "phase": "forward", "seconds": 0.1,
        "idle": 0.0, "steps": 40,
    }  # fmt: skip
    run.heartbeat_path(rank).parent.mkdir(exist_ok=True)
    write_heartbeat(run, Heartbeat(**given | about))


def trained(run: RunDir, steps: int = 40) -> None:
    """Write what a run of 100 steps of 12 samples has noted after some steps."""
    run.record_effect({"strategy": "ddp", "total_steps": 100})
    for step in range(10, steps + 1, 10):
        append_row(
            run.metrics_path, {"event": "train", "step": step, "loss": 2.0 - step / 100, "samples_per_s": 24.0, "lr": 1}
        )
        append_row(run.metrics_path, {"event": "eval", "step": step, "split": "test", "loss": 1.5, "accuracy": 0.5})
    (run.checkpoints / "step-00000099").mkdir()  # of no manifest, so no checkpoint
    Saver(run.checkpoints, LocalCommunicator()).save(30, SPECS, cut(make_state(0), 1)[0], **DESCRIBED)


def one(run: RunDir) -> Status:
    (found,) = statuses(run.path)
    return found


def test_a_finished_run_is_reported_as_finished(tmp_path: Path, jobs: StubQueue) -> None:
    train(1, write_recipe(tmp_path), tmp_path / "run")
    found = one(RunDir(tmp_path / "run"))
    assert (found.state, found.step, found.total_steps, found.starts) == ("finished", 12, 12, 1)
    assert (found.processes, found.strategy, found.checkpoint, found.job) == (1, "single", 12, None)
    assert found.score is not None
    assert found.score["metric"] == "loss"
    assert found.eta_s is None
    assert isinstance(found.loss, float)
    assert "finished: complete" in dict(status_rows(found))["state"]


def test_what_a_run_is_doing(tmp_path: Path, jobs: StubQueue) -> None:
    run = made(tmp_path / "run", "7")
    assert one(run).state == "new"
    jobs["7"] = Job("7", "PENDING", "Priority")
    assert (one(run).state, one(run).reason) == ("queued", "Priority")
    jobs["7"] = Job("7", "RUNNING", "node[1-2]", "0:30", "9:30")
    assert one(run).state == "starting"
    attempt(run)
    trained(run)
    beat(run, 0, step=44)
    beat(run, 1, step=43)
    found = one(run)
    assert (found.state, found.step, found.total_steps, found.checkpoint) == ("running", 44, 100, 30)
    assert found.eta_s == pytest.approx((100 - 44) * 12 / 24)
    assert (found.loss, found.score) == (1.6, {"metric": "loss", "value": 1.5, "step": 40})
    assert found.heartbeat_age_s is not None
    assert found.heartbeat_age_s < 5
    words = dict(status_rows(found))
    assert words["step"] == "44 of 100, saved 30"
    assert words["rate"] == "24 samples/s, 28s left"
    assert words["job"] == "7 RUNNING (node[1-2], 9:30 left)"
    beat(run, 1, stalled={"line": "x"}, step=43)
    assert (one(run).state, one(run).message) == ("hanging", "rank 1 on node1 in the forward pass of step 44")
    # requeued: waits for its pause, then begins again
    jobs["7"] = Job("7", "PENDING", "BeginTime")
    found = one(run)
    assert found.state == "queued"
    assert "after a pause" in (found.message or "")
    jobs["7"] = Job("7", "RUNNING", "node3", "0:02")
    run.attempts_path.write_text("")
    attempt(run, seconds_ago=60)
    assert one(run).state == "starting", "the last start was the one before"
    attempt(run)
    beat(run, 1)
    assert (one(run).state, one(run).starts) == ("running", 2)
    jobs["7"] = Job("7", "COMPLETING")
    assert one(run).state == "ending"


def test_the_step_of_a_run_that_rolled_back_is_the_one_that_it_is_at(tmp_path: Path, jobs: StubQueue) -> None:
    run = made(tmp_path / "runs" / "one")
    trained(run)
    append_row(run.metrics_path, {"event": "train", "step": 50, "loss": 1.0, "time": time.time() - 10})
    beat(run, step=48, time=time.time() - 20)
    assert one(run).step == 50
    beat(run, step=31)
    assert one(run).step == 31
    beat(run, step=0, steps=0, phase="setup")  # the attempt that resumes it has not restored its step
    assert one(run).step == 50


def test_a_run_whose_processes_have_ended_here_is_gone_at_once(tmp_path: Path, jobs: StubQueue) -> None:
    run = made(tmp_path / "run")
    attempt(run)
    with subprocess.Popen(["sleep", "600"]) as lives, subprocess.Popen(["sleep", "600"]) as other:
        ranks = {
            rank: {"pid": each.pid, "started": process_started(each.pid)} for rank, each in enumerate((lives, other))
        }
        for rank, about in ranks.items():
            beat(run, rank, **about, namespace=namespace_of_processes())
        assert one(run).state == "running"
        lives.kill()
        lives.wait()
        assert one(run).state == "running"  # the other waits for it, and whoever started them ends it
        other.kill()
        other.wait()
    assert one(run).state == "gone"
    beat(run, 1, **ranks[1], namespace="of another machine or container")
    assert one(run).state == "running"


def test_how_a_run_ended(tmp_path: Path, jobs: StubQueue) -> None:
    run = made(tmp_path / "run", "7")
    jobs["7"] = Job("7", "FAILED")
    found = one(run)
    assert (found.state, found.message) == (
        "failed", f"job 7 is FAILED and the run never began; see distrain logs {run.path}",
    )  # fmt: skip
    attempt(run)
    trained(run)
    jobs.clear()
    assert one(run).state == "gone"
    run.mark_preempted(40, "SIGUSR1")
    assert (one(run).state, one(run).message) == ("stopped", "by SIGUSR1 after step 40")
    run.clear_markers()
    run.mark_failed({"rank": 3, "message": "out of memory\nmore", "error": "OutOfMemoryError"})
    assert (one(run).state, one(run).message) == ("failed", "rank 3: out of memory")
    run.clear_markers()
    run.mark_failed({"rank": 0, "message": "step 9 was not saved:\n  - rank 0: disk full\n  - rank 1: disk full\nSee"})
    assert one(run).message == "rank 0: step 9 was not saved: rank 0: disk full; rank 1: disk full"
    beat(run)
    assert one(run).state == "running", "without SLURM too, by its heartbeats"
    beat(run, phase="ended")
    assert one(run).state == "failed"


def test_without_slurm_the_folder_shows_most_of_it(
    tmp_path: Path, jobs: StubQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made(tmp_path / "run", "7")
    trained(run)
    beat(run)

    jobs.refuse("squeue: error: cannot reach the controller\nmore\n")
    assert one(run).state == "running"
    assert dict(status_rows(one(run)))["queue"] == "not known: squeue refused: cannot reach the controller"
    monkeypatch.setenv("PATH", "")
    assert (one(run).state, one(run).queue) == ("running", None)


@pytest.fixture
def sweep(tmp_path: Path, jobs: StubQueue) -> Path:
    """A sweep of three runs: one finished, one that runs, one queued."""
    folder = tmp_path / "runs" / "sweep"
    rates = ["1e-3", "3e-4", "1e-4"]
    runs = [made(folder / f"{number}-lr={rate}") for number, rate in enumerate(rates)]
    (folder / "sweep.json").write_text(
        json.dumps(
            {
                "name": "sweep",
                "best": {"metric": "accuracy", "higher": True},
                "runs": [
                    {"folder": run.path.name, "values": {"optim.lr": rate}}
                    for run, rate in zip(runs, rates, strict=True)
                ],
            }
        )
    )
    (folder / "submit").mkdir()
    note_job(folder, "9")
    for run in runs[:2]:
        attempt(run)
        trained(run)
    runs[0].mark_finished({"steps": 100, "best": {"metric": "accuracy", "value": 0.75, "step": 90}})
    for job in (
        Job("9_0", "COMPLETED"),
        Job("9_1", "RUNNING", elapsed="0:30"),
        Job("9_2", "PENDING", "JobArrayTaskLimit"),
    ):
        jobs[job.id] = job
    return folder


def test_a_sweep_is_a_table_of_its_runs(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = statuses(sweep)
    assert [each.state for each in found] == ["finished", "running", "queued"]
    assert [each.job for each in found] == ["9_0", "9_1", "9_2"]
    assert [each.rank for each in found] == [1, 2, None]
    monkeypatch.setenv("COLUMNS", "40")  # not a terminal: nothing is cut off
    shown = CliRunner().invoke(app, ["status", str(sweep)]).output.splitlines()
    assert shown[0].split() == ["run", "optim.lr", "state", "step", "left", "loss", "eval", "accuracy", "starts", "job"]
    assert shown[1].split() == ["0-lr=1e-3", "1e-3", "finished", "100/100", "1.6", "0.75", "1", "9_0", "COMPLETED"]
    assert shown[2].split()[:5] == ["1-lr=3e-4", "3e-4", "running", "40/100", "30s"]
    above = json.loads(CliRunner().invoke(app, ["status", str(sweep.parent), "--json"]).output)
    assert [each["values"] for each in above] == [{"optim.lr": rate} for rate in ("1e-3", "3e-4", "1e-4")]
    assert statuses(sweep / "2-lr=1e-4")[0].job == "9_2"


@pytest.mark.parametrize(
    ("metrics", "heading", "cells"),
    [
        (["mae", None, "mae"], "eval mae", ["0.5", "", "0.5"]),
        (["mae", None, "accuracy"], "eval", ["mae 0.5", "", "accuracy 0.5"]),
        ([None], None, []),
    ],
    ids=["one metric", "several metrics", "none"],
)
def test_runs_of_other_metrics_each_show_their_own(
    metrics: list[str | None], heading: str | None, cells: list[str]
) -> None:
    runs = [Status("x", "finished", score=each and {"metric": each, "value": 0.5, "step": 1}) for each in metrics]
    columns = {str(column.header): [str(cell) for cell in column.cells] for column in table(runs, Path()).columns}
    assert columns.get(heading, []) == cells
    assert [name for name in columns if name.startswith("eval")] == ([heading] if heading else [])


def test_every_state_is_explained() -> None:
    assert all(STATES.values())
    assert Status("x", "queued").alive
    assert not Status("x", "stopped").alive


def test_a_folder_that_holds_no_runs_is_reported(tmp_path: Path) -> None:
    assert "holds no runs" in cli("status", tmp_path).out
    ended = cli("status", tmp_path / "none")
    assert ended.status == 1
    assert "there is no folder" in ended.err


# --------------------------------------------------------------------------------------------------------------------
# Logs


def test_logs_are_the_jobs_and_a_ranks_own(tmp_path: Path, jobs: StubQueue, sweep: Path) -> None:
    run = made(tmp_path / "run", "7")
    with pytest.raises(UserError, match="has printed nothing yet"):
        log_file(run.path)
    run.log_path(0).write_text("rank 0\n")
    assert log_file(run.path) == run.log_path(0)
    (run.path / "submit" / "slurm-7.log").write_text("job 7\n")
    assert log_file(run.path).read_text() == "job 7\n"
    assert log_file(run.path, 0).read_text() == "rank 0\n"
    with pytest.raises(UserError, match="no log of rank 3; there are ranks 0 to 0"):
        log_file(run.path, 3)
    (sweep / "submit" / "slurm-9_1.log").write_text("task 1\n")
    assert log_file(sweep / "1-lr=3e-4").read_text() == "task 1\n"
    with pytest.raises(UserError, match="is a sweep; name one of its runs"):
        log_file(sweep)
    assert cli("logs", run.path).out == "job 7\n"


@pytest.mark.parametrize("content", ["", "a\n", "a\nb\nc\n", "a\nb\nc", "\n\n\n", "x" * 70_000 + "\ny\n" * 50_000])
@pytest.mark.parametrize("lines", [0, 1, 2, 100])
def test_the_last_lines_are_those(tmp_path: Path, content: str, lines: int) -> None:
    file = tmp_path / "log"
    file.write_text(content)
    wanted = content.splitlines(keepends=True)
    assert "".join(follow(file, lines, None)) == "".join(wanted[-lines:] if lines else wanted)


def test_a_log_is_followed_until_the_run_has_ended(tmp_path: Path) -> None:
    file = tmp_path / "log"
    file.write_text("1\n2\n")
    ended = threading.Event()

    def write() -> None:
        time.sleep(0.3)
        with file.open("a") as out:
            out.write("3\n")
        ended.set()

    thread = threading.Thread(target=write)
    thread.start()
    assert "".join(follow(file, 1, ended.is_set)) == "2\n3\n"
    thread.join()


# --------------------------------------------------------------------------------------------------------------------
# Ending runs


def test_a_job_is_cancelled(tmp_path: Path, jobs: StubQueue, sweep: Path) -> None:
    run = made(tmp_path / "run")
    with pytest.raises(UserError, match="was not submitted by `distrain submit`"):
        cancel_jobs(run.path)
    (run.path / "submit").mkdir()
    note_job(run.path, "7")
    jobs["7"] = Job("7", "RUNNING")
    said = cancel_jobs(run.path)
    assert said[0] == "cancelled job 7, which was RUNNING; it is not queued again"
    assert jobs["7"].state == "CANCELLED"
    assert cancel_jobs(run.path) == [f"no job of {run.path} is queued or runs (7 CANCELLED)"]
    assert [line.split()[2].strip(",") for line in cancel_jobs(sweep)[:-1]] == ["9_1", "9_2"]
    assert jobs["9_0"].state == "COMPLETED"


def test_a_run_is_asked_to_stop(tmp_path: Path, jobs: StubQueue, sweep: Path) -> None:
    run = made(tmp_path / "run", "7")
    assert "does not run: new" in stop_run(run.path)[0]
    assert not run.stop_path.exists()
    jobs["7"] = Job("7", "PENDING", "Priority")
    assert "job 7 is cancelled" in stop_run(run.path)[0]
    assert jobs["7"].state == "CANCELLED"
    assert not run.stop_path.exists(), "there is nothing to save"
    jobs["7"] = Job("7", "RUNNING")
    assert "all ranks agree, save and end" in stop_run(run.path)[0]
    assert run.stop_path.exists()
    said = stop_run(sweep)
    assert len(said) == 3
    assert [RunDir(sweep / name).stop_path.exists() for name in ("0-lr=1e-3", "1-lr=3e-4", "2-lr=1e-4")] == [
        False, True, False,
    ]  # fmt: skip
    with pytest.raises(UserError, match="is neither a run nor a sweep"):
        stop_run(tmp_path)


def test_a_local_run_is_stopped_too(tmp_path: Path, jobs: StubQueue) -> None:
    run = made(tmp_path / "run")
    attempt(run)
    beat(run)
    assert f"`distrain train {run.path}` resumes it" in stop_run(run.path)[0]
    assert run.stop_path.exists()
    assert status_of(run.path, []).state == "running"
