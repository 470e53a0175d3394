"""What ranks do together, in worlds of real processes, and what is read of what they print."""

from __future__ import annotations

import os
import socket
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from stub_slurm import StubQueue
from worlds import free_port, in_world

from distrain.config import UserError
from distrain.doctor.findings import Finding, Level, Report, ok, warning
from distrain.doctor.nodes import job as job_module
from distrain.doctor.nodes.facts import environment_that_matters, mount_of
from distrain.doctor.nodes.job import Request, examine_nodes, judge
from distrain.doctor.nodes.lines import Teller, Told
from distrain.doctor.nodes.meeting import Place, connect
from distrain.doctor.nodes.rank import run_rank
from distrain.doctor.showing import of_nodes
from distrain.launchers.slurm.job_environment import allocated_nodes
from distrain.launchers.slurm.submitting import Wanted


def _rank(nodes: int, processes: int, port: int, folder: str, limit_s: float, ends: dict[int, str]) -> str:
    """Be a rank, each as one of its own node's; returns what it printed. `ends` says of some how they end instead."""
    rank = int(os.environ["RANK"])
    if ends.get(rank) == "never comes":
        return ""
    read, write = os.pipe()
    parts: list[bytes] = []

    def collect() -> None:
        while part := os.read(read, 1 << 16):
            parts.append(part)

    thread = threading.Thread(target=collect)
    thread.start()
    place = Place(rank, rank // processes, nodes, processes, "127.0.0.1", port, limit_s)
    run_rank(place, Path(folder) / (f"own-{rank}" if ends.get(rank) == "another folder" else "shared"),
             Teller(place.node, rank, write))  # fmt: skip
    os.close(write)
    thread.join()
    return b"".join(parts).decode()


def meet(tmp_path: Path, nodes: int, processes: int = 1, *, limit_s: float = 60.0, **ends: str) -> Told:
    """Return what ranks have told; `ends` as in `_rank`, with the rank behind an underscore."""
    (tmp_path / "shared").mkdir(exist_ok=True)
    told = Told()
    which = {int(key.removeprefix("rank_")): how for key, how in ends.items()}
    for text in in_world(nodes * processes, _rank, nodes, processes, free_port(), str(tmp_path), limit_s, which):
        told.read(text.splitlines())
    return told


def test_ranks_that_are_well_find_nothing(tmp_path: Path) -> None:
    told = meet(tmp_path, nodes=2, processes=2)
    assert told.by_rank("arrived") == {0: [0, 1, 2, 3]}
    assert {"failed", "absent", "late"} & {each["kind"] for each in told.messages} == set()
    assert sorted(told.by_rank("product")) == [0, 1, 2, 3]
    assert all(set(each["gloo"].values()) == {None} for each in told.by_rank("collectives").values())
    assert sorted(told.by_rank("folder")) == [0, 2], "one rank of each node"
    assert told.by_rank("folder")[0]["seen"].keys() == {"2"}
    made = [number for each in told.by_rank("folder").values() for number in each["made"]]
    assert sorted(made) == list(range(8))
    assert told.by_rank("folder")[2]["locked"] is False
    assert told.by_rank("pairs")[0]["2"]["bytes_per_s"] > 1e6
    assert abs(told.by_rank("clock")[2]["offset_s"]) < 0.5
    assert list((tmp_path / "shared").iterdir()) == []


def test_a_rank_that_never_comes_is_not_waited_for_and_another_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "own-1").mkdir()
    told = meet(tmp_path, nodes=3, limit_s=3.0, rank_1="another folder", rank_2="never comes")
    assert told.by_rank("arrived") == {0: [0, 1]}
    assert told.by_rank("folder")[0]["seen"] == {"1": None}
    assert told.by_rank("folder")[1]["seen"] == {"0": None}
    assert told.by_rank("product").keys() == {0, 1}


# --------------------------------------------------------------------------------------------------------------------
# Connections


def test_what_keeps_from_connecting_is_told() -> None:
    port = free_port()
    assert connect("127.0.0.1", port, time.monotonic() + 0.5)["problem"] == "refused"
    with socket.create_server(("127.0.0.1", port), backlog=8):
        assert connect("127.0.0.1", port, time.monotonic() + 10)["problem"] is None
        assert connect("127.0.0.1", port, time.monotonic() + 10, "127.0.0.1")["own"] == "127.0.0.1"
    # a server that takes nobody: what is sent to it is dropped, as by a firewall
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server, ExitStack() as held:
        for _ in range(4):
            each = held.enter_context(socket.socket())
            each.setblocking(False)
            each.connect_ex(server.getsockname())
        assert connect("127.0.0.1", server.getsockname()[1], time.monotonic() + 1)["problem"] == "no answer"


# --------------------------------------------------------------------------------------------------------------------
# What is printed, and read


def printed(node: int, *messages: tuple[str, Any], rank: int | None = None) -> list[str]:
    """Return the lines of messages."""
    read, write = os.pipe()
    teller = Teller(node, rank, write)
    for kind, value in messages:
        teller.tell(kind, value)
    os.close(write)
    with os.fdopen(read) as file:
        return file.read().splitlines()


def test_messages_are_read_whatever_is_printed_between() -> None:
    long = {"text": "é" * 3000}
    one, other = printed(0, ("facts", long)), printed(1, ("facts", {"a": 1}), rank=3)
    assert max(map(len, one)) < 1000
    mixed = [f"0: {line}" for line in one]
    mixed[3:3] = [f"1: {line}" for line in other] + ["1: something else", "srun: error: n2: Killed"]
    told = Told()
    told.read(mixed)
    assert told.by_node("facts") == {0: long, 1: {"a": 1}}
    assert told.by_rank("facts") == {3: {"a": 1}}
    assert list(told.words[1]) == ["something else"]
    assert list(told.words[None]) == ["srun: error: n2: Killed"]


FACTS = {
    "host": "n1", "versions": {}, "environment": {}, "interfaces": {}, "own": [], "resolves": {}, "cpus": 1, "gpus": 0,
    "gpu_models": [], "mount": "", "port": 1, "asked": {"cpus": 1, "gpus": 0, "processes": 1},
}  # fmt: skip


def job(*lines: str, done: bool = True, torch: str | None = None) -> list[Finding]:
    """Return what is found where n1 has begun, n2 has printed these lines, and nothing else has come."""
    told = Told()
    told.read(["distrain-doctor-nodes n1,n2 1 10.0.0.1"])
    messages = [("facts", FACTS), ("torch", {"problem": torch, "versions": {}}), *([("done", None)] if done else [])]
    told.read(f"0: {line}" for line in printed(0, *messages))
    told.read(f"1: {line}" for line in lines)
    return [each for each in judge(told, "/runs") if each.level is not Level.ok]


def test_nodes_that_do_not_begin_or_end_are_named_with_what_they_said() -> None:
    (missing,) = job("python: No module named distrain.doctor")
    assert (missing.host, missing.check) == ("n2", "nodes")
    assert missing.found == "did not begin: python: No module named distrain.doctor; there came n1"
    begun, _ = job(done=False)
    assert begun.host == "n1"
    assert begun.found == "began and did not end (after torch)"
    broken, _ = job(torch="ImportError: libcudart.so.12")
    assert broken.found == "cannot import torch: ImportError: libcudart.so.12"


def test_a_job_that_starts_nothing_is_told_with_its_error() -> None:
    told = Told()
    told.read(["error: 'module load cuda/99' failed on n1"])
    (found,) = judge(told, "/runs")
    assert "module load cuda/99" in found.found
    assert found.level is Level.error


def test_a_table_has_what_nodes_found_alike_once() -> None:
    def of(host: str, check: str, finding: Finding) -> Finding:
        return replace(finding, host=host, check=check)

    slow = warning("slow", "means", "do")
    report = of_nodes(Report((
        of("n1", "memory", ok("5 GiB")), of("n2", "memory", ok("6 GiB")), of("n3", "memory", ok("7 GiB")),
        of("n1", "files", ok("many")), of("n2", "files", slow), of("n3", "files", slow),
        of("n1", "GPUs", slow), of("n2", "GPUs", slow), of("n3", "GPUs", slow),
    ), 1.0))  # fmt: skip
    assert [(each.check, each.host, each.found) for each in report.findings] == [
        ("memory", "all 3 nodes", "5 GiB"), ("files", "n2, n3", "slow"), ("GPUs", "all 3 nodes", "slow"),
    ]  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# What is asked


def test_an_allocation_is_known_by_its_variables() -> None:
    assert allocated_nodes({"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "3"}) == 3
    assert allocated_nodes({"SLURM_JOB_ID": "7", "SLURM_NNODES": "2"}) == 2
    assert allocated_nodes({"SLURM_JOB_NUM_NODES": "3"}) is None


@pytest.mark.parametrize(
    ("variables", "error"),
    [
        ({}, "this allocation has 2"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "srun has started this 2 times; start it once"),
    ],
)
def test_what_an_allocation_cannot_give_is_refused(
    variables: dict[str, str], error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", **variables}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=error):
        examine_nodes(Request(Wanted(nodes=3), tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_job_that_ends_unseen_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = StubQueue(tmp_path / "slurm")
    monkeypatch.setenv("PATH", f"{queue.commands}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(job_module, "_LOG_S", 0.1)
    (tmp_path / "runs").mkdir()
    said: list[str] = []
    report = examine_nodes(Request(Wanted(nodes=2), tmp_path / "runs", say=said.append))
    assert said == ["job 100: 2 nodes, for 15 at most"]
    (found,) = report.findings
    assert found.found.startswith("no node has begun: job 100 has ended")
    assert report.exit_status == 1
    assert list((tmp_path / "runs").iterdir()) == []


def test_secrets_and_what_nodes_have_of_their_own_are_not_told() -> None:
    variables = {
        "NCCL_DEBUG": "INFO",
        "HF_TOKEN": "x",
        "CUDA_VISIBLE_DEVICES": "0",
        "HOME": "/root",
        "PYTHONPATH": "/a",
    }
    assert environment_that_matters(variables) == {"NCCL_DEBUG": "INFO", "PYTHONPATH": "/a"}
    assert mount_of(Path("/proc")).startswith("proc ")
