"""Who may write into a run."""

from __future__ import annotations

import json
import pickle
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from distrain.config import UserError
from distrain.run import lease
from distrain.run.folder import RunDir
from distrain.run.json_files import read_rows
from distrain.run.lease import Holder, Lease, Replaced, check_free, take_lease
from distrain.run.metrics_file import MetricsFile
from distrain.system.job_environment import JobEnvironment


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path)


def start(job: str | None = None, restart: int = 0, host: str | None = None) -> Holder:
    holder = Holder.of_this_process(JobEnvironment(job=job, restart=restart))
    return replace(holder, host=host or socket.gethostname())


def taken(run: RunDir, holder: Holder, step: int = 0, restarts: int | None = None) -> Lease:
    return take_lease(run, holder, step=step, processes=2, strategy="ddp", restarts=restarts)


def test_a_start_is_noted(run: RunDir) -> None:
    first = taken(run, start("7"))
    first.check()
    first.release(clean=True)
    assert not (run.path / "lease.json").exists()
    taken(run, start(), step=12).release(clean=True)
    noted = [row for row in read_rows(run.attempts_path) if "event" not in row]
    assert [(row["job"], row["restart"], row["step"], row["processes"], row["strategy"]) for row in noted] == [
        ("7", 0, 0, 2, "ddp"),
        (None, 0, 12, 2, "ddp"),
    ]
    assert len({row["token"] for row in noted}) == 2


@pytest.mark.fault(8)
def test_a_requeued_job_takes_the_run_from_the_start_before_it(run: RunDir) -> None:
    old, new = start("7", 0, host="node1"), start("7", 1, host="node2")
    before = taken(run, old)
    rows = MetricsFile(run.metrics_path, fence=before.check)
    assert rows.append({"event": "train", "step": 1})
    after = taken(run, new)
    after.check()
    for publish in (before.check, lambda: rows.append({"event": "train", "step": 2})):
        with pytest.raises(
            Replaced, match=r"was replaced by process \d+ on node2 of job 7; it ends and writes nothing"
        ):
            publish()
    assert [row["step"] for row in run.rows()] == [1]
    before.release(clean=True)
    after.check()
    after.release(clean=True)
    with pytest.raises(Replaced, match="by one that has ended"):
        before.check()


@pytest.mark.parametrize("other", [("7", 1), ("7", 2), ("8", 0), (None, 0)])
@pytest.mark.fault(32)
def test_others_are_shown_who_holds_the_lease(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, other: tuple[str, int]
) -> None:
    held = taken(run, start("7", 2, host="node1"))
    beating = threading.Event()

    def beat() -> None:
        run.heartbeat_path(0).parent.mkdir()
        while not beating.wait(0.05):
            run.heartbeat_path(0).write_text("")

    thread = threading.Thread(target=beat)
    thread.start()
    time.sleep(0.1)
    try:
        with pytest.raises(UserError, match=r"is in use by process \d+ on node1 of job 7; wait for that run to end"):
            check_free(run, start(*other))
    finally:
        beating.set()
        thread.join()
    held.check()
    # a start whose heart has stopped is watched, and then taken for dead
    monkeypatch.setattr(lease, "_WATCH_S", 0.2)
    taken(run, start(*other)).check()


def test_a_lease_that_nobody_can_read_is_nobodys(run: RunDir) -> None:
    held = taken(run, start())
    (run.path / "lease.json").write_text("{")
    with pytest.raises(Replaced):
        held.check()


def test_the_lock_stays_with_rank_0(run: RunDir) -> None:
    held = taken(run, start())
    other: Lease = pickle.loads(pickle.dumps(held))
    other.check()
    assert other.holder == held.holder
    other.release(clean=False)
    held.check()


@pytest.mark.fault(31)
def test_a_job_that_comes_no_further_is_given_up(run: RunDir) -> None:
    for restart in range(4):
        taken(run, start("7", restart), step=8, restarts=3).release(clean=False)
    with pytest.raises(UserError, match="was started 4 times from step 8 by job 7 without progress"):
        taken(run, start("7", 4), step=8, restarts=3)
    # what a person starts, and what came further, is another matter
    taken(run, start("7", 5), step=9, restarts=3).release(clean=False)
    taken(run, start("8", 0), step=8, restarts=0).release(clean=False)
    taken(run, start(), step=8, restarts=0).release(clean=False)


def test_the_number_of_starts_can_be_set(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTRAIN_MAX_RESTARTS", "1")
    for restart in range(2):
        taken(run, start("7", restart)).release(clean=False)
    with pytest.raises(UserError, match="2 times"):
        taken(run, start("7", 2))
    monkeypatch.setenv("DISTRAIN_MAX_RESTARTS", "many")
    with pytest.raises(UserError, match="DISTRAIN_MAX_RESTARTS is 'many', expected a whole number"):
        taken(run, start("7", 3))


def test_what_a_crash_left_of_a_row_is_cut_off(run: RunDir) -> None:
    run.attempts_path.write_text('{"job": "7", "step": 0}\n{"job"')
    taken(run, start("8")).release(clean=True)
    assert [json.loads(line)["job"] for line in run.attempts_path.read_text().splitlines()] == ["7", "8"]
