"""The cluster that the other tests run on is a real one, and leaves nothing behind."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import needs_cluster
from runs import TINY, losses, write_recipe
from slurm_cluster import Cluster, wait_until

import distrain

ROOT = Path(distrain.__file__).parent.parent


def test_nodes_are_separate_machines(cluster: Cluster) -> None:
    script = "hostname; hostname -I; echo $$; ls /dev/shm | wc -l; touch /dev/shm/mine"
    lines = cluster.run("srun", "--nodes=4", "--label", "sh", "-c", script).stdout.splitlines()
    said = [[line.split(": ", 1)[1].strip() for line in lines if line.startswith(f"{task}:")] for task in range(4)]
    assert [node[:2] for node in sorted(said)] == [[f"n{i}", f"10.77.0.{i}"] for i in range(1, 5)]
    assert [node[3] for node in said] == ["0"] * 4
    # their names do not resolve, as on some clusters
    done = cluster.run("srun", "--nodes=1", "getent", "hosts", "n1", "n2", check=False)
    assert done.returncode != 0
    assert done.stdout == ""


def test_a_node_that_is_cut_off_or_switched_off_is_noticed_and_comes_back(cluster: Cluster) -> None:
    def state(name: str) -> str:
        return cluster.run("sinfo", "--noheader", "--nodes", name, "--partition=low", "--format=%T").stdout.strip()

    cluster.node("n3").cut_off()
    cluster.node("n4").switch_off()
    wait_until(lambda: state("n3").startswith("down") and state("n4").startswith("down"), "n3 and n4 down", 40)
    cluster.reset()
    assert state("n3") == state("n4") == "idle"
    assert len(cluster.run("srun", "--nodes=4", "hostname").stdout.split()) == 4


@pytest.mark.fault(35)
def test_tasks_of_srun_are_refused_and_a_task_of_its_own_trains(cluster: Cluster, tmp_path: Path) -> None:
    recipe, run = write_recipe(tmp_path, TINY.replace("steps: 12", "steps: 4")), tmp_path / "run"
    train = (sys.executable, "-m", "distrain", "train", recipe, "--run-dir", run)
    done = cluster.run("srun", "--nodes=2", "--ntasks=2", "--kill-on-bad-exit=0", *train, cwd=ROOT, check=False)
    assert done.returncode != 0
    assert done.stderr.count("error: srun has started 2 tasks (SLURM_STEP_NUM_TASKS=2, SLURM_PROCID=") == 2, done.stderr
    assert not run.exists()
    # a job of two tasks, whose script is none of them
    script = f"cd {ROOT} && " + shlex.join([str(word) for word in train])
    job = cluster.sbatch("--ntasks=2", f"--output={tmp_path}/log", "--wrap", script)
    cluster.wait_for_state(job, "COMPLETED")
    assert len(losses(run)) == 4


_HOLD = """
import sys, time
from pathlib import Path
from slurm_cluster import Cluster
cluster = Cluster(Path(sys.argv[1]))
cluster.start()
cluster.sbatch("--nodes=4", "--output=/dev/null", "--wrap", "srun sh -c 'setsid sleep 1234 & sleep 1234'")
print(cluster.login.init, *(node.init for node in cluster.nodes), flush=True)
time.sleep(600)
"""


def test_nothing_is_left_where_the_process_that_started_it_is_killed(tmp_path: Path) -> None:
    needs_cluster()
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(tmp_path / "cluster")], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert holder.stdout is not None
    inits = holder.stdout.readline().split()
    spaces = {os.readlink(f"/proc/{init}/ns/pid") for init in inits}

    def left() -> list[str]:
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and os.readlink(entry / "ns" / "pid") in spaces:
                    found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:
                continue
        return found

    wait_until(lambda: sum("sleep 1234" in command for command in left()) >= 8, "the job on all nodes", 30)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    wait_until(lambda: not left(), "the end of all its processes", 10)


def test_a_machine_that_cannot_run_it_reports_why(monkeypatch: pytest.MonkeyPatch) -> None:
    import slurm_cluster

    monkeypatch.setattr(slurm_cluster.os, "geteuid", lambda: 1000)
    assert slurm_cluster.why_not() == "only root can make namespaces of processes, networks and mounts"
    monkeypatch.undo()
    monkeypatch.setattr(slurm_cluster, "NEEDED", ("slurmctld-of-nobody",))
    assert "not installed: slurmctld-of-nobody; `sh scripts/install-slurm.sh`" in (slurm_cluster.why_not() or "")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="CI must run"):
        needs_cluster()
    monkeypatch.setenv("CI", "")
    with pytest.raises(pytest.skip.Exception, match="not installed"):
        needs_cluster()
