"""Runs whose state is spread over nodes, and which go on with fewer of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from slurm_cluster import Cluster
from submitted import Project, Run, Uninterrupted


@pytest.mark.fault(17)
# how each strategy resumes in another world is tested without a cluster; here it is that nodes are fewer
@pytest.mark.parametrize("strategy", ["zero3", pytest.param("fsdp2", marks=pytest.mark.more)])
def test_a_sharded_run_resumes_with_fewer_nodes(
    strategy: str,
    cluster: Cluster,
    project: Project,
    uninterrupted: Uninterrupted,
    tmp_path: Path,
    record_property: Callable[[str, Any], None],
) -> None:
    run = Run(tmp_path / "run")
    project.pace(0.3)
    job = project.submit("--run-dir", run.path, "--strategy", strategy, each=2)
    run.wait_for_step(2, timeout_s=120)
    assert json.loads((run.path / "effect.json").read_text())["processes"] == 4
    project.distrain("stop", run.path)
    cluster.wait_for_state(job, "COMPLETED", timeout_s=60)
    stopped = run.checkpoints()[-1]
    assert stopped == run.step() < 60
    project.pace(0)
    job = project.submit(run.path, nodes=1, each=2)
    done = cluster.wait_for_state(job, "COMPLETED", "FAILED")
    assert done["JobState"] == "COMPLETED", run.log()
    assert f"written by 4 x {strategy}; resumes with 2 x {strategy}" in run.log()
    assert [(row["step"], row["processes"]) for row in run.attempts()] == [(0, 4), (stopped, 2)]
    run.assert_rows_once()
    # other sums of the same numbers: the same up to rounding
    for mine, its in zip(run.numbers(), uninterrupted.run.numbers(), strict=True):
        assert mine[:2] == its[:2]
        assert mine[2] == pytest.approx(its[2], rel=2e-2, abs=2e-3)
    record_property("steps_lost", 0)
    cluster.wait_for_no_processes()
