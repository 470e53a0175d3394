"""What slurm/train.sbatch does: with SLURM's commands as stub_slurm.py has them. The real ones: tests/cluster."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from runs import last, losses, train, write_recipe
from stub_slurm import StubSlurm
from test_slurm import ROOT, plan

from distrain.checkpoint import difference
from distrain.launchers.slurm.rendering import render_sbatch
from distrain.run.folder import RunDir

BY_HAND = ROOT / "slurm" / "train.sbatch"
BEGINS = """for run; do :; done
cd "$run"
echo '{}' >> attempts.jsonl
"""
"""A launcher that takes the run; its last argument is the run's folder."""


@pytest.fixture
def slurm(tmp_path: Path) -> StubSlurm:
    return StubSlurm(tmp_path / "slurm")


def job(slurm: StubSlurm, launcher: str, **values: Any) -> Path:
    """Return the script of a job whose launchers are this piece of bash."""
    run = slurm.folder.parent / "run"
    run.mkdir(exist_ok=True)
    script, node = slurm.folder / "train.sbatch", slurm.folder / "node.sh"
    node.write_text(launcher)
    given = {"folder": str(run), "python": "/bin/bash", "node_script": str(node), "nodes": slurm.nodes}
    script.write_text(render_sbatch(plan(**given | values)))
    return script


ENDS = {
    "finished": ("touch FINISHED", 0, False, "finished: "),
    "preempted": ("touch PREEMPTED", 0, True, "the run has saved and stopped; queueing job 17 again"),
    "stopped": ("touch PREEMPTED STOP", 0, False, "stopped as "),
    "hopeless": ("""echo '{"restart": false}' > FAILED.json; exit 1""", 1, False, "another attempt would fail as well"),
    "mendable": ("""echo '{"restart": true}' > FAILED.json; exit 1""", 0, True, "what may not happen again"),
    "quoted": (
        r"""echo '{"message": "\"restart\": false", "restart": true}' > FAILED.json; exit 1""",
        0,
        True,
        "queueing",
    ),
    "killed": ("kill -9 $$", 0, True, "what may not happen again"),
    "a launcher's own opinion": ("touch FINISHED; exit 1", 0, False, "finished: "),
}


@pytest.mark.parametrize("end", ENDS)
def test_the_run_folder_reports_how_it_ended(slurm: StubSlurm, end: str) -> None:
    does, status, again, said = ENDS[end]
    ended, out = slurm.run(job(slurm, BEGINS + does))
    assert ended == status, out
    assert slurm.requeued() == (["17"] if again else [])
    assert said in out


def test_a_run_that_never_began_is_not_queued_again(slurm: StubSlurm) -> None:
    script = job(slurm, "echo 'error: no such model' >&2; exit 1")
    run = RunDir(slurm.folder.parent / "run")
    run.attempts_path.write_text("{}\n")
    run.mark_preempted(3, "of an earlier job")
    status, out = slurm.run(script)
    assert (status, slurm.requeued()) == (1, [])
    assert "no such model" in out
    assert "error: the run never began" in out


def test_a_job_that_was_cancelled_is_not_queued_again(slurm: StubSlurm) -> None:
    slurm.set_state("CANCELLED")
    status, out = slurm.run(job(slurm, BEGINS + "touch PREEMPTED"))
    assert (status, slurm.requeued()) == (1, [])
    assert "the job was cancelled and is not queued again" in out


def test_a_job_that_cannot_be_requeued_names_the_command_to_resume(slurm: StubSlurm) -> None:
    (slurm.folder / "no-requeue").touch()
    status, out = slurm.run(job(slurm, BEGINS + "touch PREEMPTED"))
    assert status == 1
    assert f"distrain submit {slurm.folder.parent}/run resumes the run" in out


def test_a_stop_that_came_while_the_job_was_queued_starts_nothing(slurm: StubSlurm) -> None:
    script = job(slurm, BEGINS)
    RunDir(slurm.folder.parent / "run").stop_path.touch()
    status, out = slurm.run(script, restarts=1)
    assert status == 0, out
    assert slurm.steps() == []


def test_a_task_of_an_array_has_its_own_run_and_number(slurm: StubSlurm) -> None:
    sweep = slurm.folder.parent / "run"
    for number in range(3):
        (sweep / str(number)).mkdir(parents=True)
    script = job(slurm, BEGINS + "touch PREEMPTED", runs=tuple(str(sweep / str(number)) for number in range(3)))
    status, out = slurm.run(script, task=2)
    assert status == 0, out
    assert slurm.requeued() == ["17_2"]
    assert [path.name for path in sweep.rglob("PREEMPTED")] == ["PREEMPTED"]
    assert (sweep / "2" / "PREEMPTED").exists()


SEARCHED = {
    "finished": ("mkdir -p run; echo $PWD/run", "touch FINISHED", 0, [], 2, "finished: "),
    "preempted": ("mkdir -p run; echo $PWD/run", "touch PREEMPTED", 0, ["17_2"], 2, "queueing job 17_2 again"),
    "pruned": ("mkdir -p run; echo $PWD/run", "touch PREEMPTED PRUNED", 0, [], 2, "pruned, as the other runs"),
    "pruned before": ("mkdir -p run; touch run/PRUNED; echo $PWD/run", "exit 1", 0, [], 1, "pruned, as the other runs"),
    "nothing left": ("echo none", "exit 1", 0, [], 1, "no values are left that were not tried"),
    "not drawn": ("echo 'error: no optuna' >&2; exit 1", "exit 1", 1, [], 1, "there is no run to train"),
    "stopped": ("exit 1", "exit 1", 0, [], 0, "STOP asks; the same distrain submit continues the search"),
}
"""What a task of a search draws and does; its status, what is queued again, how often srun starts something, a word."""


@pytest.mark.parametrize("case", SEARCHED)
def test_a_task_of_a_search_draws_its_run_first(slurm: StubSlurm, case: str) -> None:
    draws, does, status, again, steps, said = SEARCHED[case]
    drawing = f"""if [[ " $* " == *" --task 2 -- "* ]]; then cd "${{*: -1}}"; {draws}; exit; fi\n"""
    script = job(slurm, drawing + BEGINS + does, tasks=(2,))
    if case == "stopped":
        (slurm.folder.parent / "run" / "STOP").touch()
    ended, out = slurm.run(script, task=2)
    assert (ended, slurm.requeued(), len(slurm.steps())) == (status, again, steps), out
    assert said in out


# --------------------------------------------------------------------------------------------------------------------
# Notices of the end

DEAF = """
import os, signal, sys, time
from pathlib import Path

os.chdir(sys.argv[-1])
node = os.environ["SLURM_NODEID"]
with open("attempts.jsonl", "a") as file:
    file.write("{}" + chr(10))
time.sleep(SECONDS)
signal.signal(signal.SIGUSR1, lambda *_: Path("heard-" + node).touch())
Path("listens-" + node).touch()
until = time.monotonic() + 30
while time.monotonic() < until:
    if Path("heard-0").exists() and Path("heard-1").exists():
        Path("PREEMPTED").touch()
        sys.exit(0)
    time.sleep(0.05)
"""
"""Launchers that are asked to stop: first they do not listen, then each hears it."""


def wait_for(path: Path, timeout_s: float = 30) -> None:
    until = time.monotonic() + timeout_s
    while not path.exists():
        assert time.monotonic() < until, f"no {path}"
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_notice_reaches_every_node_and_the_job_is_queued_again(slurm: StubSlurm, number: signal.Signals) -> None:
    process = slurm.start(job(slurm, DEAF.replace("SECONDS", "0"), python=sys.executable))
    wait_for(slurm.folder.parent / "run" / "listens-0")
    wait_for(slurm.folder.parent / "run" / "listens-1")
    # SIGTERM ends srun and its tasks, and comes to the whole group
    os.killpg(process.pid, number) if number == signal.SIGTERM else os.kill(process.pid, number)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert out.count("asking the run to save and stop") == 1
    assert slurm.requeued() == ["17"]
    assert "the run has saved and stopped" in out


def test_a_notice_is_repeated_for_who_did_not_listen_yet(slurm: StubSlurm) -> None:
    process = slurm.start(job(slurm, DEAF.replace("SECONDS", "1.5"), python=sys.executable))
    wait_for(slurm.folder.parent / "run" / "attempts.jsonl")
    time.sleep(0.2)
    process.send_signal(signal.SIGUSR1)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert slurm.requeued() == ["17"]


def test_a_notice_before_the_start_queues_the_job_again(slurm: StubSlurm, tmp_path: Path) -> None:
    (tmp_path / "waits.sh").write_text(f"touch {tmp_path}/sourcing; sleep 1\n")
    process = slurm.start(job(slurm, BEGINS, sources=(str(tmp_path / "waits.sh"),)))
    wait_for(tmp_path / "sourcing")
    process.send_signal(signal.SIGUSR1)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert slurm.steps() == []
    assert slurm.requeued() == ["17"]


# --------------------------------------------------------------------------------------------------------------------
# Where launchers meet


def options(step: dict[str, Any]) -> dict[str, str]:
    """Return the options of launch/node.py in what srun was told."""
    command = step["command"]
    begin = next(place for place, part in enumerate(command) if part.endswith("node.sh")) + 1
    given = command[begin : command.index("--", begin)]
    return dict(zip(given[::2], given[1::2], strict=True))


def test_launchers_are_given_the_address_of_the_first_one(slurm: StubSlurm) -> None:
    slurm.set_dry()
    slurm.run(job(slurm, ""))
    (step,) = slurm.steps()
    told = options(step)
    assert (told["--nodes"], told["--processes"], told["--address"]) == ("2", "2", "127.0.0.1")
    assert 10_000 <= int(told["--port"]) < 30_000
    assert step["options"] == {
        "nodes": "2", "ntasks": "2", "ntasks-per-node": "1", "cpus-per-task": "2", "cpu-bind": "none", "mpi": "none",
        "export": "ALL", "kill-on-bad-exit": "1", "wait": "30",
    }  # fmt: skip
    slurm.nodes = 1
    slurm.run(job(slurm, ""))
    assert "--port" not in options(slurm.steps()[-1]), "one node needs no meeting place"


def listening(port: int) -> socket.socket:
    return socket.create_server(("127.0.0.1", port))


@pytest.mark.fault(25)
def test_another_port_is_taken_where_the_first_is_in_use(slurm: StubSlurm) -> None:
    slurm.set_dry()
    script = job(slurm, "")
    slurm.run(script)
    first = int(options(slurm.steps()[-1])["--port"])
    with listening(first):
        slurm.run(script)
    second = int(options(slurm.steps()[-1])["--port"])
    assert second != first
    slurm.run(script, job=18)
    slurm.run(script, restarts=1)
    others = [int(options(step)["--port"]) for step in slurm.steps()[-2:]]
    assert len({first, second, *others}) == 4, "another job, or another start, has another port"


@pytest.mark.fault(25)
def test_a_port_that_is_taken_after_the_look_is_given_up(slurm: StubSlurm) -> None:
    does = """
while (($#)); do if [[ $1 == --port ]]; then port=$2; fi; run=$1; shift; done
cd "$run"
[[ $SLURM_NODEID == 0 ]] || { sleep 0.3; exit 0; }
mkdir -p submit
echo "$port" >> ports
if (($(wc -l < ports) < 3)); then echo "$port" > submit/port-taken-17-0; exit 1; fi
echo {} >> attempts.jsonl
touch FINISHED
"""
    status, out = slurm.run(job(slurm, does))
    assert status == 0, out
    ports = (slurm.folder.parent / "run" / "ports").read_text().split()
    assert len(set(ports)) == 3
    assert not list((slurm.folder.parent / "run" / "submit").glob("port-taken*"))


# --------------------------------------------------------------------------------------------------------------------
# The environment of launchers


def test_modules_files_and_variables_are_there_before_the_start(slurm: StubSlurm, tmp_path: Path) -> None:
    slurm.set_dry()
    init = tmp_path / "modules" / "init"
    init.mkdir(parents=True)
    (init / "bash").write_text('module() { echo "module $*"; export LOADED="${LOADED:-}:$2"; [[ $2 != missing ]]; }\n')
    slurm.variables["MODULESHOME"] = str(tmp_path / "modules")
    (tmp_path / "own.sh").write_text('export FROM_FILE="$LOADED!"\n')
    given = {"A": 'it\'s "x" ; & | > <', "B": "  two  "}
    values = {"modules": ("gcc/13", "cuda/12"), "sources": (str(tmp_path / "own.sh"),), "variables": given}
    _, out = slurm.run(job(slurm, "", **values))
    environment: Any = slurm.steps()[0]["environment"]
    assert environment["FROM_FILE"] == ":gcc/13:cuda/12!", out
    assert {name: environment[name] for name in given} == given
    status, out = slurm.run(job(slurm, "", modules=("missing",)))
    assert status == 1
    assert "error: 'module load missing' failed on node0" in out
    status, out = slurm.run(job(slurm, "", sources=("/nowhere.sh",)))
    assert status == 1
    assert "error: /nowhere.sh, which is to be sourced, cannot be read on node0" in out
    assert len(slurm.steps()) == 1


def test_a_site_without_modules_is_reported(slurm: StubSlurm) -> None:
    status, out = slurm.run(job(slurm, "", modules=("cuda",)))
    assert status == 1
    assert "there is no command 'module' on node0 to load cuda with" in out


@pytest.mark.parametrize("kind", ["apptainer", "pyxis"])
def test_launchers_are_inside_the_container(slurm: StubSlurm, kind: str) -> None:
    slurm.set_dry()
    slurm.run(job(slurm, "", gpus_per_node=2, container={kind: "/images/x.sif", "mounts": ["/data"], "python": "py"}))
    (step,) = slurm.steps()
    run = slurm.folder.parent / "run"
    command: Any = step["command"]
    told: Any = step["options"]
    inside = command[command.index("bash", 1) + 1 :]
    if kind == "apptainer":
        assert inside[:6] == ["apptainer", "exec", "--nv", "--bind", f"/data,{run},{slurm.folder}", "/images/x.sif"]
        assert inside[6] == "py"
    else:
        assert told["container-image"] == "/images/x.sif"
        assert told["container-mounts"] == f"/data:/data,{run}:{run},{slurm.folder}:{slurm.folder}"
        assert inside[0] == "py"


# --------------------------------------------------------------------------------------------------------------------
# Training


def test_by_hand_it_reports_how_it_is_used(slurm: StubSlurm) -> None:
    status, out = slurm.run(BY_HAND)
    assert status == 1
    assert "sbatch slurm/train.sbatch RECIPE|RUN [KEY=VALUE ...]" in out


@pytest.mark.slow
def test_by_hand_a_mistake_is_reported_and_nothing_is_queued_again(slurm: StubSlurm, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    slurm.variables |= {"DISTRAIN_PYTHON": sys.executable, "DISTRAIN_NODE_SCRIPT": str(ROOT / "launch" / "node.py")}
    status, out = slurm.run(BY_HAND, str(recipe), "model.name=mpl")
    assert (status, slurm.requeued()) == (1, [])
    assert "did you mean 'mlp'" in out
    assert "there is no run to resume" in out
    assert not (slurm.folder / "runs").exists()


@pytest.mark.slow
@pytest.mark.fault(1)
def test_by_hand_a_run_on_two_nodes_resumes_after_a_notice_to_the_same_bits(slurm: StubSlurm, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    train(2, recipe, tmp_path / "straight", "train.steps=200", "checkpoint.every=50 steps", "eval.every=50 steps")
    slurm.variables |= {
        "DISTRAIN_PYTHON": sys.executable,
        "DISTRAIN_NODE_SCRIPT": str(ROOT / "launch" / "node.py"),
        "DISTRAIN_PROCESSES": "1",
    }
    arguments = [str(recipe), "train.steps=200", "checkpoint.every=50 steps", "eval.every=50 steps"]
    process = slurm.start(BY_HAND, *arguments)
    run = RunDir(slurm.folder / "runs" / "tiny")
    wait_for(run.metrics_path, 120)
    process.send_signal(signal.SIGUSR1)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    assert run.preempted is not None, out
    assert slurm.requeued() == ["17"]
    recipe.unlink()  # what is queued again goes on with the run
    status, out = slurm.run(BY_HAND, *arguments, restarts=1)
    assert status == 0, out
    assert run.finished is not None
    assert run.launch().processes == 2
    assert difference(last(run.path), last(tmp_path / "straight")).identical
    assert losses(run.path) == losses(tmp_path / "straight")
