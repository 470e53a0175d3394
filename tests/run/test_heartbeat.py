"""What a rank notes while it trains, what is kept of it, and what others read of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from beats import beat, run_in
from runs import TINY, write_recipe
from worlds import running_world

from distrain.config import WatchdogSection
from distrain.diagnose.hang_diagnosis import Watchdog
from distrain.run import heartbeat
from distrain.run.folder import RunDir
from distrain.run.heartbeat import (
    at_this_moment,
    ending_hung,
    enter_phase,
    hang_of,
    progress,
    read_heartbeat,
    read_heartbeats,
    starts_at,
    stepped,
    this_attempt,
    write_heartbeat,
)
from distrain.system.job_environment import JobEnvironment
from distrain.system.processes import process_started, process_state


def test_entering_a_phase_reads_the_clock_and_does_nothing_else() -> None:
    heartbeat.begin()
    called: list[str] = []

    def note(frame: Any, event: str, function: Any) -> None:
        if event in ("call", "c_call"):
            called.append(frame.f_code.co_name if event == "call" else function.__name__)

    sys.setprofile(note)
    enter_phase("forward")
    sys.setprofile(None)
    assert called == ["enter_phase", "perf_counter", "setprofile"]


def test_what_is_noted() -> None:
    now = heartbeat.begin()
    assert (now.phase, now.step, now.marks, now.steps) == ("setup", 0, 0, 0)
    starts_at(40)
    assert (now.step, now.steps) == (40, 0), "a resumed run"
    for phase in ("data", "sync", "forward", "backward", "optimizer"):
        enter_phase(phase)
    assert (now.phase, now.marks) == ("optimizer", 5)
    ticks = now.ticks
    progress()
    assert now.ticks == ticks + 1
    enter_phase("data")
    time.sleep(0.02)
    stepped(41)
    assert (now.step, now.marks, now.steps) == (41, 0, 1)
    assert set(now.seconds.values()) == {0.0}, "the first step may have compiled"
    enter_phase("forward")
    time.sleep(0.02)
    enter_phase("backward")
    assert 0.02 <= now.seconds["forward"] < 0.5
    assert list(now.board) == [41, 2, list(heartbeat.PHASES).index("backward")]
    with pytest.raises(KeyError):
        enter_phase("lunch")
    assert (now.phase, now.marks) == ("backward", 2)
    enter_phase("optimizer")


def test_heartbeats_are_read_as_they_were_written(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    assert read_heartbeats(run) == []
    for rank in (10, 2, 0):
        write_heartbeat(run, beat(rank))
    found = read_heartbeats(run)
    assert [each.rank for each in found] == [0, 2, 10]
    assert replace(found[0], written=0.0) == beat(0)
    assert 0 <= found[0].age_s() < 60
    assert found[0].age_s(found[0].written + 90) == pytest.approx(90)
    assert found[0].age_s(found[0].written - 90) == 0, "another machine's clock is behind"
    assert not list(heartbeat.folder(run).glob(".*")), "what is written is renamed"


def test_heartbeats_of_an_earlier_attempt_are_ignored(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    for rank in range(4):
        write_heartbeat(run, beat(rank))
        os.utime(run.heartbeat_path(rank), (1e9, 1e9))
    write_heartbeat(run, beat(0, attempt="b", world_size=1))
    assert [(each.rank, each.attempt) for each in read_heartbeats(run)] == [(0, "b")]


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"rank": 0}', "null"])
def test_what_is_no_heartbeat_is_none(tmp_path: Path, content: str) -> None:
    run = run_in(tmp_path)
    run.heartbeat_path(0).write_text(content)
    assert read_heartbeat(run, 0) is None
    assert read_heartbeats(run) == []
    assert read_heartbeat(run, 1) is None
    assert read_heartbeats(RunDir(tmp_path / "none")) == []


def test_unknown_keys_of_a_later_version_are_ignored(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    write_heartbeat(run, beat(0))
    text = run.heartbeat_path(0).read_text()
    run.heartbeat_path(0).write_text(text.replace('"rank"', '"colour": "green", "rank"'))
    found = read_heartbeat(run, 0)
    assert found is not None
    assert found.step == 7


def test_where_a_rank_is() -> None:
    assert beat().where() == "the forward pass of step 8"
    assert beat(phase="evaluate").where() == "the evaluation after step 7"
    assert beat(phase="setup", step=0).where() == "the set-up"
    assert beat(phase="setup", step=7).where() == "the set-up after step 7"


def test_all_ranks_of_a_start_name_it_alike_and_no_other_start_does() -> None:
    none, job = JobEnvironment(), JobEnvironment(job="17")
    variables = {"MASTER_ADDR": "n1", "MASTER_PORT": "29500", "RANK": "3"}
    assert this_attempt(none, variables) == this_attempt(none, variables | {"RANK": "0"})
    assert this_attempt(none, variables) != this_attempt(job, variables)
    assert this_attempt(job, variables) != this_attempt(replace(job, restart=1), variables)
    assert this_attempt(none, variables) != this_attempt(none, variables | {"MASTER_PORT": "29501"})


def test_processes_are_known_by_their_start() -> None:
    started = process_started()
    assert started > 0
    assert process_state(os.getpid(), started) == "R"
    assert process_state(os.getpid(), started + 1) is None, "another process that had this number"
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        os.kill(child.pid, signal.SIGSTOP)
        until = time.monotonic() + 10
        while process_state(child.pid, process_started(child.pid)) != "T" and time.monotonic() < until:
            time.sleep(0.01)
        assert process_state(child.pid, process_started(child.pid)) == "T"
    finally:
        child.kill()
        child.wait()
    assert process_state(child.pid, 0) is None
    assert process_started(child.pid) == 0


def note_and_stop(folder: str) -> None:
    with Watchdog.over(RunDir(folder), WatchdogSection(), rank=0, world_size=1):
        starts_at(5)
        enter_phase("data")
        enter_phase("forward")
        os.kill(os.getpid(), signal.SIGSTOP)


def test_what_a_stopped_process_did_last_is_read_by_others(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    with running_world(1, note_and_stop, str(run.path)) as world:
        until = time.monotonic() + 30
        pid = world.processes[0].pid
        while process_state(pid, 0) != "T" and time.monotonic() < until:
            time.sleep(0.01)
        written = read_heartbeat(run, 0)
        assert written is not None
        assert written.phase == "setup", "it has not been due since"
        found = at_this_moment(written)
        assert (found.phase, found.step, found.marks) == ("forward", 5, 2)
        world.kill()
        world.wait()
    assert at_this_moment(written) == written


# --------------------------------------------------------------------------------------------------------------------
# For launchers


def test_a_launcher_kills_what_hangs_and_nothing_else(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    write_recipe(run.path, TINY)
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    other = subprocess.Popen(command)
    with ending_hung(run, patience_s=0.5):
        stopped = subprocess.Popen(command)
        os.kill(stopped.pid, signal.SIGSTOP)
        time.sleep(1.5)
        assert stopped.poll() is None, "no run hangs"
        run.mark_failed({"error": "Hang", "message": "rank 1 hangs"})
        assert stopped.wait(10) == -signal.SIGKILL
    assert other.poll() is None, "it was there before"
    other.kill()
    other.wait()


def test_a_hang_of_an_earlier_start_ends_nothing(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    run.mark_failed({"error": "Hang", "message": "rank 1 hangs", "time": 1.0})
    assert hang_of(run) is not None
    assert hang_of(run, run.failed) is None
    with ending_hung(run, patience_s=0.1):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(2)"])
        assert child.wait(10) == 0
    run.clear_markers()
    assert hang_of(run) is None
    run.mark_failed({"error": "ValueError", "message": "other"})
    assert hang_of(run) is None
