"""What of the environment is believed: variables of launchers that are gone, and tasks that are no world."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from logged import logged
from runs import TINY, Ended, captured, losses, train, write_recipe
from worlds import in_world

from distrain.config import UserError
from distrain.launchers import start_evaluation, work
from distrain.launchers.slurm.node import start_node
from distrain.parallel import comm as world
from distrain.system.environment import (
    LAUNCHED_BY,
    Environment,
    forget_launchers,
    has_launcher,
    join,
    own_start,
    rank_told,
    refuse_tasks,
    share_cores,
    under_torch_launcher,
    use_interfaces,
)

NOWHERE = {"MASTER_ADDR": "198.51.100.7", "MASTER_PORT": "29500"}
"""An address for documentation, where nobody answers."""

ONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
TWO = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}

# --------------------------------------------------------------------------------------------------------------------
# Variables of a launcher that is gone


OF_ONE: list[dict[str, str]] = [
    ONE | NOWHERE,
    NOWHERE,
    {"RANK": "0"},
    {"LOCAL_RANK": "-1"},
    {"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": "0", "ROLE_NAME": "default"},
    {"RANK": "", "WORLD_SIZE": ""},
    {"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_RDZV_ENDPOINT": "198.51.100.7:29400", "PET_RDZV_BACKEND": "c10d"},
    {"TORCHELASTIC_RUN_ID": "7", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"},
    {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "ACCELERATE_MIXED_PRECISION": "bf16"},
    {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
    {"ACCELERATE_TORCH_DEVICE": "cuda:3", "ACCELERATE_USE_CPU": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"},
]


@pytest.mark.fault(34)
@pytest.mark.parametrize("left", OF_ONE, ids=lambda left: next(iter(left)))
def test_what_a_launcher_left_is_ignored_with_a_word(left: dict[str, str]) -> None:
    for processes in (None, 1, 2):
        variables = {"PATH": "/bin", "OMP_NUM_THREADS": "1"} | left
        (note,) = own_start(variables, processes)
        assert variables == {"PATH": "/bin", "OMP_NUM_THREADS": "1"}
        assert all(name in note for name in left)
    variables = {"PATH": "/bin"} | left
    environment, notes = join(variables)
    assert (environment.rank, environment.world_size) == (0, 1)
    assert variables == {"PATH": "/bin"}
    assert len(notes) == (left != ONE | NOWHERE), "who sets all of it for one process has what was meant"


@pytest.mark.fault(34)
@pytest.mark.parametrize(
    "left", [TWO | NOWHERE, {"WORLD_SIZE": "8"}, {"RANK": "3", "WORLD_SIZE": "1"}, {"LOCAL_RANK": "1"}], ids=str
)
def test_variables_of_several_processes_are_refused_where_none_were_asked_for(left: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"one of several \((.|\n)*nothing was written(.|\n)*env -u (.|\n)*--processes"):
        own_start(dict(left), None)
    variables = dict(left)
    (note,) = own_start(variables, 2)
    assert variables == {}
    assert all(name in note for name in left)


@pytest.mark.parametrize(("given", "taken"), [("3", "3"), (" 4,2", "4"), ("many", None), ("", None), (None, None)])
def test_threads_are_one_number_for_several_processes(given: str | None, taken: str | None) -> None:
    variables = {} if given is None else {"OMP_NUM_THREADS": given}
    before = dict(variables)
    share_cores(1, variables)
    assert variables == before
    share_cores(2, variables)
    assert variables["OMP_NUM_THREADS"] == (taken or str(max(1, len(os.sched_getaffinity(0)) // 2)))


def test_numbers_that_do_not_fit_are_refused_by_who_would_join() -> None:
    for wrong in ({"RANK": "2"}, {"LOCAL_RANK": "2"}, {"LOCAL_WORLD_SIZE": "3"}, {"RANK": "-1"}):
        with pytest.raises(UserError, match="which no launcher sets together"):
            join(TWO | NOWHERE | wrong)
    with pytest.raises(UserError, match="but not MASTER_ADDR, where the processes meet"):
        join(TWO | {"MASTER_PORT": "1"})
    with pytest.raises(UserError, match="MASTER_PORT is 'tcp' in the environment"):
        join(TWO | NOWHERE | {"MASTER_PORT": "tcp"})


def test_a_world_made_by_hand_is_believed_and_the_rest_of_an_agent_is_not() -> None:
    variables = TWO | NOWHERE | {"TORCHELASTIC_USE_AGENT_STORE": "True", "ACCELERATE_USE_FSDP": "true"}
    environment, (note,) = join(variables)
    assert (environment.rank, environment.world_size, environment.launched) == (1, 2, True)
    assert variables == TWO | NOWHERE | {"ACCELERATE_USE_FSDP": "true"}
    assert "TORCHELASTIC_USE_AGENT_STORE" in note
    assert rank_told({"RANK": "x"}) == rank_told({}) == 0


def test_a_launcher_named_in_the_environment_is_believed_while_it_is_there() -> None:
    assert not has_launcher({"TORCHELASTIC_RUN_ID": "1", LAUNCHED_BY: "1234567"})
    launched = {"TORCHELASTIC_RUN_ID": "1", LAUNCHED_BY: str(os.getppid())}
    assert has_launcher(launched)
    assert under_torch_launcher(launched)
    variables = TWO | NOWHERE | launched | {"PET_NNODES": "1"}
    assert join(dict(variables))[1] == []


BELOW = """
import json
from distrain.system.environment import UserError, launcher_argv, own_start

several = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "198.51.100.7", "MASTER_PORT": "29500"}
one = {"RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "1", "ACCELERATE_USE_FSDP": "true"}
try:
    refused = own_start(several, 2)
except UserError as error:
    refused = str(error)
print(json.dumps([launcher_argv(), refused, own_start(one, None), one]))
"""
"""Printed by a process of a launcher: the launcher's command line, and what a command does that starts processes."""


@pytest.fixture
def below(tmp_path: Path) -> Callable[..., Any]:
    """Return what a process prints that `command` starts, with a shell between them."""
    (tmp_path / "below.py").write_text(BELOW)
    child = f"{sys.executable} {tmp_path}/below.py; : torchrun x"
    (tmp_path / "torchrun").write_text(f"import subprocess\nsubprocess.run(['bash', '-c', {child!r}])\n")
    (tmp_path / "tmux").symlink_to(shutil.which("bash") or "")

    def start(*command: str) -> Any:
        command = tuple(each.replace("CHILD", child) for each in command)
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return start


def test_a_launcher_above_is_known_by_its_command_line(below: Callable[..., Any], tmp_path: Path) -> None:
    command = [sys.executable, "-u", f"{tmp_path}/torchrun", "--nproc-per-node", "2", "launch/train.py"]
    argv, refused, notes, one = below(*command)
    assert argv == command
    assert "a launcher started this process as one of several" in refused
    assert "launch/train.py" in refused
    assert notes == []
    assert one == {"TORCHELASTIC_RUN_ID": "1", "ACCELERATE_USE_FSDP": "true"}


def test_a_multiplexer_that_once_ran_a_launcher_is_none(below: Callable[..., Any], tmp_path: Path) -> None:
    argv, refused, _, one = below(f"{tmp_path}/tmux", "-c", "CHILD", "torchrun")
    assert argv == []
    assert not any("one of several" in line for line in refused)
    assert one == {}


def test_interfaces_that_this_machine_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(1, "lo"), (2, "eth0")])
    right = {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "=eth0:1,ib0"}
    for value in ("eth", "^docker"):
        assert use_interfaces(dict(right) | {"NCCL_SOCKET_IFNAME": value}, alone=False) == []
    wrong = {"GLOO_SOCKET_IFNAME": "eth", "NCCL_SOCKET_IFNAME": "ib0"}
    with pytest.raises(UserError, match=r"GLOO_SOCKET_IFNAME=eth, NCCL_SOCKET_IFNAME=ib0, and .* it has lo, eth0"):
        use_interfaces(dict(wrong), alone=False)
    variables = dict(wrong)
    (note,) = own_start(variables, 2)
    assert variables == {}
    assert "ib0" in note


def test_what_a_launcher_below_would_take_is_taken_out() -> None:
    kept = {"PATH": "/bin", "NCCL_DEBUG": "WARN", "CUDA_VISIBLE_DEVICES": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "9"}
    there = TWO | NOWHERE | {"PET_MAX_RESTARTS": "3", "OMPI_COMM_WORLD_SIZE": "2", "PMIX_RANK": "1"}
    variables = kept | there | {"ACCELERATE_MIXED_PRECISION": "bf16"}
    (note,) = forget_launchers(variables)
    assert variables == kept
    assert "PET_MAX_RESTARTS" in note


# --------------------------------------------------------------------------------------------------------------------
# Tasks

TASKS = {
    "srun": {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"},
    "srun of which little is known": {"SLURM_PROCID": "1"},
    "mpirun": {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"},
    "mpiexec": {"PMI_SIZE": "3", "PMI_RANK": "0"},
    "jsrun": {"JSM_NAMESPACE_SIZE": "2", "JSM_NAMESPACE_RANK": "0"},
    "MVAPICH": {"MV2_COMM_WORLD_SIZE": "2", "MV2_COMM_WORLD_RANK": "0"},
    "Intel": {"MPI_LOCALNRANKS": "2", "MPI_LOCALRANKID": "0"},
    "PMIx": {"PMIX_RANK": "1"},
}


@pytest.mark.fault(35)
@pytest.mark.parametrize("task", TASKS)
def test_each_of_several_tasks_is_refused_with_what_started_them(task: str) -> None:
    variables = TASKS[task]
    for processes in (None, 1, 2):
        with pytest.raises(UserError) as caught:
            own_start(dict(variables), processes)
        for words in (*variables, "Nothing was written", "--processes", "distrain submit", "env -u "):
            assert words in str(caught.value)
    with pytest.raises(UserError, match="no world of several processes"):
        join(ONE | variables)
    # by hand, or by a launcher in each task
    assert join(TWO | NOWHERE | variables)[0].world_size == 2


def test_a_task_of_its_own_and_the_shell_of_a_job_are_fine() -> None:
    job = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_NPROCS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    refuse_tasks(job)
    refuse_tasks(job | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"})
    refuse_tasks({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0", "PMI_SIZE": "1", "PMIX_RANK": "0"})


# --------------------------------------------------------------------------------------------------------------------
# Runs


def with_variables(variables: dict[str, str], command: str, *arguments: Any) -> Ended:
    os.environ.update(variables)
    if command == "train":
        from runs import cli_rank

        return cli_rank(["train", *map(str, arguments)])
    if command == "work":
        return captured(lambda: work(str(arguments[0]), run_dir=str(arguments[1])))
    if command == "evaluate":
        return captured(lambda: start_evaluation(str(arguments[0]), "test", processes=1, as_json=True))
    return captured(lambda: start_node(str(arguments[0]), nodes=1, processes="1"))


def alone(variables: dict[str, str], command: str, *arguments: Any) -> Ended:
    return in_world(1, with_variables, variables, command, *arguments, launched=False, timeout_s=60)[0]


SHORT = TINY.replace("steps: 12", "steps: 4")
LEFT = (
    ONE | NOWHERE | {"TORCHELASTIC_USE_AGENT_STORE": "True", "ACCELERATE_USE_FSDP": "true", "GLOO_SOCKET_IFNAME": "ib9"}
)


@pytest.mark.fault(34)
def test_one_process_waits_for_nobody(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, SHORT)
    train(1, recipe, tmp_path / "wanted")
    for command, variables, strategy in (
        ("train", LEFT, ()),
        ("train", LEFT | {"PET_NNODES": "2"}, ("--strategy", "fsdp2")),
        ("work", ONE | NOWHERE, ()),
    ):
        run = tmp_path / f"{command}{len(strategy)}"
        options = ("--run-dir", run, *strategy) if command == "train" else (run,)
        ended = alone(variables, command, recipe, *options)
        assert ended.status == 0, ended.err
        assert losses(run) == pytest.approx(losses(tmp_path / "wanted"), rel=1e-9)
        assert ended.err.count("note: ignored") == (2 if command == "train" else 0)
    assert alone(LEFT, "evaluate", tmp_path / "wanted").status == 0
    (tmp_path / "wanted" / "FINISHED").unlink()
    assert alone(TWO | LEFT | {"SLURM_STEP_NUM_TASKS": "1"}, "node", tmp_path / "wanted").status == 0


@pytest.mark.fault(35)
def test_tasks_that_are_no_world_write_nothing(tmp_path: Path) -> None:
    recipe, run = write_recipe(tmp_path), tmp_path / "run"
    for number in ("0", "1"):
        task = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": number}
        for command, arguments in (("train", (recipe, "--run-dir", run)), ("work", (recipe, run))):
            ended = alone(task, command, *arguments)
            assert ended.status == 1
            assert ended.err.startswith("error: srun has started 2 tasks (SLURM_STEP_NUM_TASKS=2")
    assert alone(TWO, "work", recipe, run).err.startswith("error (rank 1): the environment says RANK=1"), (
        "rank 1 tells it too"
    )
    assert not run.exists()
    for command in (("evaluate", run), ("predict", run, "test", "-o", tmp_path / "a.csv"), ("prove", recipe)):
        ended = in_world(1, with_task, [str(word) for word in command], launched=False)[0]
        assert ended.status == 1
        assert "error: mpirun has started 2 tasks" in ended.err


def with_task(arguments: list[str]) -> Ended:
    from runs import cli_rank

    os.environ.update(TASKS["mpirun"])
    return cli_rank(arguments)


def test_who_waits_for_processes_that_no_launcher_started_reports_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "_WORD_AFTER_S", 0.0)
    for name, value in NOWHERE.items():
        monkeypatch.setenv(name, value)
    until = time.monotonic() + 30
    with logged() as lines, world._waiting(Environment(1, 1, 2, 2, launched=True), 600.0):
        while not lines and time.monotonic() < until:
            time.sleep(0.01)
    (said,) = lines
    assert "this process waits for the 1 others at 198.51.100.7:29500" in said
    with logged() as lines, world._waiting(Environment(0, 0, 1, 1, launched=True), 600.0):
        pass
    assert lines == []
