"""Runs that are submitted and come to their end, or to none."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from slurm_cluster import Cluster, wait_until
from submitted import STEPS, Project, Run, Uninterrupted

from distrain.config.yaml import load_recipe
from distrain.launchers.sweeps import read_record


def test_a_run_on_two_nodes_ends_with_its_result(cluster: Cluster, uninterrupted: Uninterrupted) -> None:
    run, job = uninterrupted.run, cluster.job(uninterrupted.job)
    assert (job["JobState"], job["Restarts"], job["NumNodes"]) == ("COMPLETED", "0", "2")
    run.assert_rows_once()
    finished = json.loads((run.path / "FINISHED").read_text())
    assert finished["steps"] == STEPS
    assert (row := run.attempts()[0])["processes"] == 4
    assert row["job"] == uninterrupted.job
    hosts = {json.loads(path.read_text())["host"] for path in run.path.glob("heartbeat/rank-*.json")}
    assert hosts == {"n1", "n2"}
    cluster.wait_for_no_processes()


@pytest.mark.fault(30)
def test_no_secret_of_whoever_submits_reaches_a_job(cluster: Cluster, uninterrupted: Uninterrupted) -> None:
    values = [value.encode() for value in uninterrupted.canaries.values()]
    assert len(uninterrupted.environments) >= 6  # the batch script, srun, launchers and workers
    assert not [text for text in uninterrupted.environments if any(value in text for value in values)]
    files = [
        path
        for folder in (uninterrupted.run.path, uninterrupted.project.folder, cluster.folder)
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink()
    ]
    assert {"train.sbatch", "launch.json", "slurmctld.log"} <= {path.name for path in files}
    assert any(path.is_relative_to(cluster.folder / "state") for path in files)
    assert not [path for path in files if any(value in path.read_bytes() for value in values)]


def test_status_and_logs(cluster: Cluster, uninterrupted: Uninterrupted) -> None:
    project, run = uninterrupted.project, uninterrupted.run
    said = project.distrain("status", run.path)
    assert "finished" in said
    assert f"{STEPS}" in said
    assert "60 steps" in project.distrain("logs", run.path)


@pytest.mark.fault(25)
def test_two_jobs_on_the_same_nodes_and_a_taken_port(cluster: Cluster, project: Project, tmp_path: Path) -> None:
    """Both jobs have a process on each of two nodes, and the port that the second would take is another's already."""
    project.pace(0.3)
    sizes = ("--nodes", "2", "--processes-per-node", "1", "--time", "10")
    runs = [Run(tmp_path / "one"), Run(tmp_path / "two")]

    def submit(run: Run) -> str:
        return project.distrain("submit", project.recipe, *sizes, "--run-dir", run.path).split("job ")[1].split(":")[0]

    jobs = [submit(runs[0])]
    taken = 10000 + (int(jobs[0]) + 1) * 17 % 20000  # as slurm/train.sbatch has it
    listen = (
        f"import socket, time; s = socket.create_server(('', {taken})); print('listens', flush=True); time.sleep(600)"
    )
    listener = subprocess.Popen(cluster.node("n1").enter(sys.executable, "-c", listen), stdout=subprocess.PIPE)
    assert listener.stdout is not None
    assert listener.stdout.readline() == b"listens\n"
    jobs.append(submit(runs[1]))
    assert int(jobs[1]) == int(jobs[0]) + 1

    def ports() -> dict[str, str] | None:
        found = {}
        for process in cluster.processes():
            match = re.search(r"node\.py .*--port (\d+) .*/(one|two)$", process.command)
            if match and "srun" not in process.command:
                found[match[2]] = match[1]
        return found if len(found) == 2 else None

    found = wait_until(ports, "the launchers of both jobs", 60)
    assert found["two"] not in (str(taken), found["one"])
    assert {cluster.job(job)["NodeList"] for job in jobs} == {"n[1-2]"}
    for run in runs:
        run.wait_for_step(2)
    project.pace(0)
    for job in jobs:
        cluster.wait_for_state(job, "COMPLETED")
    assert runs[0].weights() == runs[1].weights()
    listener.kill()
    listener.wait()


@pytest.mark.fault(31)
def test_a_job_that_always_fails_is_not_queued_again_for_ever(
    cluster: Cluster, project: Project, tmp_path: Path
) -> None:
    """It fails of what might be the machine, at step 3: it is tried again as often as it may, and then no more."""
    broken = (project.folder / "paced.py").read_text() + (
        "\n\nclass Broken(Paced):\n"
        "    passes = 0\n\n"
        "    def forward(self, images):\n"
        "        self.passes += 1\n"
        "        if self.passes == 3:\n"
        "            raise OSError('the disk is on fire')\n"
        "        return super().forward(images)\n"
    )
    (project.folder / "paced.py").write_text(broken)
    run = Run(tmp_path / "run")
    job = project.submit(
        *("model.name=paced.py:Broken", "--run-dir", run.path),
        nodes=1,
        environment={"DISTRAIN_MAX_RESTARTS": "1"},
    )
    found = cluster.wait_for_state(job, "FAILED", timeout_s=120)
    assert int(found["Restarts"]) == 2, run.log()
    assert [row["step"] for row in run.attempts()] == [0, 0, 0]
    failed = json.loads((run.path / "FAILED.json").read_text())
    assert failed["restart"] is False
    assert "without progress" in failed["message"]
    assert "the disk is on fire" in run.log()
    cluster.wait_for_no_processes()


@pytest.mark.fault(4)
def test_a_job_that_is_cancelled_while_it_starts_is_not_queued_again(
    cluster: Cluster, project: Project, tmp_path: Path
) -> None:
    run = Run(tmp_path / "run")
    job = project.submit("--run-dir", run.path, nodes=1)
    wait_until(lambda: "attempt 1" in run.log(), "the batch script", 30)
    cluster.run("scancel", job)
    cluster.wait_for_nodes(30)
    found = cluster.job(job)
    assert (found["JobState"], found["Restarts"]) == ("CANCELLED", "0"), run.log()
    cluster.wait_for_no_processes()


def test_a_mistake_of_the_user_fails_at_once(cluster: Cluster, project: Project, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    job = project.submit("--run-dir", run.path, "--sbatch=--hold", nodes=1)
    # what was right when it was submitted is not when it is read
    (run.path / "submit" / "code" / "project" / "paced.py").write_text("import nothing_of_this_name\n")
    cluster.run("scontrol", "release", job)
    found = cluster.wait_for_state(job, "FAILED", "COMPLETED")
    assert (found["JobState"], found["Restarts"]) == ("FAILED", "0"), run.log()
    assert "nothing_of_this_name" in run.log()


@pytest.mark.more
def test_a_sweep_is_an_array_of_runs(cluster: Cluster, project: Project, tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    said = project.distrain(
        *("submit", project.recipe, "--array", "optim.lr=1e-3,3e-3", "--nodes", "1", "--time", "10"),
        *("--run-dir", folder, "train.steps=20"),
    )
    job = said.split("job ")[1].split(":")[0]
    for task in (0, 1):
        cluster.wait_for_state(f"{job}_{task}", "COMPLETED")
    runs = sorted(path.parent for path in folder.glob("*/FINISHED"))
    assert len(runs) == 2
    assert Run(runs[0]).weights() != Run(runs[1]).weights()
    status = project.distrain("status", folder)
    assert "1e-3" in status
    assert "3e-3" in status


def test_a_search_is_an_array_whose_tasks_draw_their_runs(cluster: Cluster, project: Project, tmp_path: Path) -> None:
    """Two at a time, of which one is queued again while it trains."""
    folder = tmp_path / "search"
    project.pace(0.3)
    said = project.distrain(
        *("submit", project.recipe, "train.steps=40", "--array", "optim.lr=1e-4..1e-1:log", "--search", "3"),
        *("--parallel", "2", "--nodes", "1", "--time", "10", "--run-dir", folder, "--sbatch=--exclusive"),
    )
    job = said.split("job ")[1].split(":")[0]

    def drawn() -> dict[int, str]:
        record = read_record(folder)
        return {} if record is None else {run["number"]: run["folder"] for run in record.runs}

    wait_until(lambda: set(drawn()) == {0, 1}, "two draws")
    before = drawn()
    first = Run(folder / before[0])
    first.wait_for_checkpoint(10)
    assert f"1 more of job {job}, whose values are drawn when they start" in project.distrain("status", folder)
    cluster.run("scontrol", "requeue", f"{job}_0")
    cluster.wait_for_restart(f"{job}_0")
    project.pace(0)
    for task in range(3):
        cluster.wait_for_state(f"{job}_{task}", "COMPLETED")
    assert set(drawn()) == {0, 1, 2}
    assert {number: drawn()[number] for number in (0, 1)} == before
    attempts = first.attempts()
    assert [row["restart"] for row in attempts] == [0, 1], first.log()
    assert attempts[1]["step"] >= 10
    found = json.loads(project.distrain("status", folder, "--json"))
    assert [(each["state"], each["job"]) for each in sorted(found, key=lambda each: each["run"])] == [
        ("finished", f"{job}_{task}") for task in range(3)
    ]
    for each in found:
        stored = load_recipe(Path(each["run"]) / "recipe.yaml").recipe
        assert stored.optim.lr == float(each["values"]["optim.lr"])
        assert stored.model.name == f"{folder}/submit/code/project/paced.py:Paced"
    assert len({each["values"]["optim.lr"] for each in found}) == 3
    best = max(found, key=lambda each: each["score"]["value"])
    assert found[0]["score"]["value"] == best["score"]["value"]
    line = project.distrain("status", folder).splitlines()[-1]
    assert line.startswith(f"best: optim.lr={found[0]['values']['optim.lr']}: accuracy")
