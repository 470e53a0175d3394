"""Runs that SLURM, or a person, stops: what goes on ends in the same bits, and what is ended leaves nothing."""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from slurm_cluster import Cluster
from submitted import STEPS, Project, Run
from wandb_file import logged


def _preempted(cluster: Cluster, project: Project, job: str) -> None:
    cluster.sbatch("--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1")


def _out_of_time(cluster: Cluster, project: Project, job: str) -> None:
    """The limit is in whole minutes and looked at every 30 s; the notice of 100 s makes the next look the last."""
    project.pace(1)
    so_far = re.match(r"(\d+):(\d+):(\d+)", cluster.job(job)["RunTime"])
    assert so_far is not None
    minutes = int(so_far[1]) * 60 + int(so_far[2]) + 1
    cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")


@pytest.mark.parametrize(
    "way",
    [
        pytest.param(_out_of_time, id="time-limit", marks=pytest.mark.fault(1)),
        pytest.param(_preempted, id="preempted", marks=pytest.mark.fault(2)),
    ],
)
def test_a_run_that_must_make_way_is_saved_queued_again_and_ends_in_the_same_bits(
    way: Callable[[Cluster, Project, str], None],
    cluster: Cluster,
    uninterrupted_in_two: Run,
    tmp_path: Path,
    record_property: Callable[[str, Any], None],
) -> None:
    project = Project(cluster, tmp_path / "project", wandb="offline" if way is _preempted else "off")
    run = Run(tmp_path / "run")
    project.pace(0.3)
    job = project.submit("--run-dir", run.path, "--notice", "100", time="10")
    run.wait_for_step(12)
    way(cluster, project, job)
    cluster.wait_for_restart(job)
    preempted = json.loads((run.path / "PREEMPTED").read_text())
    assert preempted["reason"] == "SIGUSR1"
    assert run.checkpoints()[-1] == preempted["step"] == run.step()
    assert not (run.path / "FINISHED").exists()
    project.pace(0)
    cluster.wait_for_state(job, "PENDING", "RUNNING")
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=10")
    done = cluster.wait_for_state(job, "COMPLETED", "FAILED", "TIMEOUT")
    assert (done["JobState"], done["Restarts"]) == ("COMPLETED", "1"), run.log()

    run.assert_same_as(uninterrupted_in_two)
    assert [row["step"] for row in run.attempts()] == [0, preempted["step"]]
    assert [row["restart"] for row in run.attempts()] == [0, 1]
    cluster.wait_for_no_processes()
    record_property("steps_lost", 0)
    if way is _preempted:
        mirrored = [
            row["step"] for row in logged(run.path) if row["event"] == "train"
        ]  # over the folders of both starts
        assert mirrored == list(range(1, STEPS + 1))


@pytest.mark.fault(4)
def test_stopped_by_a_person_and_cancelled_it_is_not_queued_again(
    cluster: Cluster, project: Project, tmp_path: Path
) -> None:
    run = Run(tmp_path / "run")
    project.pace(0.3)
    job = project.submit("--run-dir", run.path)
    run.wait_for_step(2)
    project.distrain("stop", run.path)
    done = cluster.wait_for_state(job, "COMPLETED", "FAILED", "PENDING", timeout_s=30)
    assert (done["JobState"], done["Restarts"]) == ("COMPLETED", "0"), run.log()
    stopped = run.checkpoints()[-1]
    assert stopped == run.step()
    cluster.wait_for_no_processes()

    job = project.submit(run.path)
    run.wait_for_step(stopped + 2)
    began = time.monotonic()
    project.distrain("cancel", run.path)
    cluster.wait_for_state(job, "CANCELLED", timeout_s=30)
    cluster.wait_for_no_processes(30)
    print(f"cancelled and gone after {time.monotonic() - began:.1f} s")
    cluster.wait_for_nodes(30)
    assert cluster.job(job)["Restarts"] == "0"
    assert cluster.run("squeue", "--noheader").stdout == ""
    assert "whole" in project.distrain("checkpoint", "verify", run.path)
