"""Nodes that die, or only seem to: a run goes on elsewhere, to the same bits, and never with two writers."""

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from slurm_cluster import Cluster, Process, wait_until
from submitted import Project, Run

from distrain.system.processes import process_stat

ONE_EACH = ("--nodes", "2", "--processes-per-node", "1", "--time", "10", "--sbatch=--exclusive")


def submit(project: Project, run: Run, *overrides: str) -> str:
    """Submit the recipe to two nodes, with one process on each; returns the job's number."""
    said = project.distrain("submit", project.recipe, *overrides, *ONE_EACH, "--run-dir", run.path)
    return said.split("job ")[1].split(":")[0]


def workers(cluster: Cluster, run: Run, *nodes: str) -> list[Process]:
    """Return the processes that train, on these nodes: those that the launcher of a node has forked from itself."""
    pattern = re.compile(rf"\S*python\S* \S*node\.py .*{re.escape(str(run.path))}$")
    found = {process.pid: process for process in cluster.processes() if pattern.match(process.command)}
    parents = {pid: stat.parent for pid in found if (stat := process_stat(pid)) is not None}
    return [found[pid] for pid, parent in parents.items() if parent in found and found[pid].node in nodes]


def _kill_stepd(cluster: Cluster, job: str, node: str) -> None:
    found = [process for process in cluster.processes() if re.match(rf"slurmstepd: \[{job}\.0\]", process.command)]
    next(process for process in found if process.node == node).kill()


def _stepd_killed(cluster: Cluster, run: Run, job: str) -> None:
    """What holds the step on the first node is killed; its processes are then nobody's, and rank 0 cannot print."""
    _kill_stepd(cluster, job, "n1")


def _cut_off(cluster: Cluster, run: Run, job: str) -> None:
    cluster.node("n2").cut_off()


def _switched_off(cluster: Cluster, run: Run, job: str) -> None:
    cluster.node("n2").switch_off()


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(_stepd_killed, id="slurmstepd-killed", marks=pytest.mark.fault(8)),
        pytest.param(_cut_off, id="cut-off", marks=pytest.mark.fault(9)),
        pytest.param(_switched_off, id="switched-off", marks=[pytest.mark.fault(8), pytest.mark.more]),
    ],
)
def test_a_run_resumes_without_a_dead_node(
    fault: Callable[[Cluster, Run, str], None],
    cluster: Cluster,
    project: Project,
    uninterrupted_in_two: Run,
    tmp_path: Path,
    record_property: Callable[[str, Any], None],
) -> None:
    run = Run(tmp_path / "run")
    project.pace(0.3)
    job = submit(project, run, "watchdog.step=2 s")
    run.wait_for_checkpoint(10, timeout_s=120)
    fault(cluster, run, job)
    reached = run.step()
    cluster.wait_for_restart(job)
    project.pace(0)
    done = cluster.wait_for_state(job, "COMPLETED", "FAILED")
    assert (done["JobState"], done["Restarts"]) == ("COMPLETED", "1"), run.log()
    if fault is not _stepd_killed:
        assert "n2" not in [node.name for node in cluster.nodes_of(job)]
    if fault is _cut_off:  # before SLURM gives the node up
        assert "all ranks (n1, n2) wait for each other" in run.log()
        assert "look at the network between them" in run.log()
    run.assert_same_as(uninterrupted_in_two)
    starts = [row["step"] for row in run.attempts()]
    assert starts[0] == 0
    assert starts[1] >= 10
    record_property("steps_lost", max(0, reached - starts[1]))


@pytest.mark.fault(8)
def test_a_start_that_slurm_has_given_up_publishes_nothing_while_the_next_one_trains(
    cluster: Cluster,
    project: Project,
    uninterrupted_in_two: Run,
    tmp_path: Path,
    record_property: Callable[[str, Any], None],
) -> None:
    """Both nodes lose their daemons and are given up, while all processes of the job live on them and train.

    When the next start is on its way, the old rank 0 is stopped in whatever it does, and goes on when the new one has
    passed it.
    """
    run = Run(tmp_path / "run")
    project.pace(0.5)
    job = submit(project, run)
    run.wait_for_step(3, timeout_s=120)
    assert [node.name for node in cluster.nodes_of(job)] == ["n1", "n2"]
    for name in ("n1", "n2"):
        cluster.node(name).kill_slurmd()
    at = run.step()
    cluster.wait_for_restart(job)
    cluster.wait_for_state(job, "RUNNING", timeout_s=60)
    assert [node.name for node in cluster.nodes_of(job)] == ["n3", "n4"]
    old = workers(cluster, run, "n1", "n2")
    assert len(old) == 2, "both processes of the old start live"
    assert run.step() > at, "and have trained on"
    (rank_0,) = (process for process in old if process.node == "n1")
    os.kill(rank_0.pid, signal.SIGSTOP)
    stopped_at = run.step()

    wait_until(lambda: len(run.attempts()) == 2, "the next start", 60)
    run.wait_for_step(stopped_at + 3)
    assert len(workers(cluster, run, "n1", "n2")) == 2
    assert len(workers(cluster, run, "n3", "n4")) == 2
    os.kill(rank_0.pid, signal.SIGCONT)
    lease = (run.path / "lease.json").read_text()
    wait_until(lambda: not workers(cluster, run, "n1", "n2"), "the end of the old start", 60)
    assert (run.path / "lease.json").read_text() == lease
    assert not (run.path / "FAILED.json").exists()
    assert len(workers(cluster, run, "n3", "n4")) == 2, "the next start is not disturbed"
    project.pace(0)
    done = cluster.wait_for_state(job, "COMPLETED", "FAILED")
    assert (done["JobState"], done["Restarts"]) == ("COMPLETED", "1"), run.log()
    assert "was replaced by" in (run.path / "log-rank-0.txt").read_text()
    run.assert_same_as(uninterrupted_in_two)
    assert json.loads((run.path / "FINISHED").read_text())["steps"] == run.step()
    record_property("steps_lost", max(0, stopped_at - run.attempts()[1]["step"]))


@pytest.mark.fault(8)
def test_a_run_that_ends_after_a_slurmstepd_has_died_ends_its_job(
    cluster: Cluster, project: Project, uninterrupted_in_two: Run, tmp_path: Path
) -> None:
    """The launcher on the second node goes on, and nobody tells srun that it has ended."""
    run = Run(tmp_path / "run")
    project.pace(0.3)
    job = submit(project, run)
    run.wait_for_step(2, timeout_s=120)
    _kill_stepd(cluster, job, "n2")
    project.pace(0)
    done = cluster.wait_for_state(job, "COMPLETED", "FAILED", "PENDING", timeout_s=90)
    assert (done["JobState"], done["Restarts"]) == ("COMPLETED", "0"), run.log()
    run.assert_same_as(uninterrupted_in_two)
    cluster.wait_for_no_processes()
