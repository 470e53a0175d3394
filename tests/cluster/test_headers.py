"""The lines of a batch script that SLURM reads itself: it takes every folder that a plan takes for what it is."""

from __future__ import annotations

from pathlib import Path

import pytest
from slurm_cluster import Cluster

from distrain.launchers.slurm.plan import make_plan
from distrain.launchers.slurm.rendering import BODY, render_sbatch

NAMES = [
    "plain",
    "a b",
    "a  b",
    " lead",
    "trail ",
    "a;b",
    "a&b",
    "a|b",
    "(x)",
    "[1-3]",
    "{a}",
    "*",
    "~",
    "!",
    "-x",
    "é ü",
]


@pytest.mark.fault(29)
def test_the_log_of_a_job_is_where_the_plan_says(cluster: Cluster, tmp_path: Path) -> None:
    jobs = {}
    for name in NAMES:
        folder = tmp_path / name
        (folder / "submit").mkdir(parents=True)
        plan = make_plan(
            name="x",
            folder=str(folder),
            runs=(str(folder),),
            nodes=1,
            processes_per_node=1,
            time="10",
            strategy="single",
            python="python3",
            node_script="/x/node.py",
        )
        script = folder / "submit" / "train.sbatch"
        script.write_text(render_sbatch(plan).partition(BODY)[0] + 'echo "ran $SLURM_JOB_ID, ${runs[0]}"\n')
        jobs[name] = cluster.sbatch(script)
    for name, job in jobs.items():
        cluster.wait_for_state(job, "COMPLETED")
        log = tmp_path / name / "submit" / f"slurm-{job}.log"
        assert log.read_text() == f"ran {job}, {tmp_path / name}\n"
