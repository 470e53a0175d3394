"""What a user sees when memory runs out on a rank: which one, doing what, how much there was, and what takes less."""

from __future__ import annotations

import json
import resource
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs import train_rank, write_recipe
from worlds import in_world

from distrain.config.yaml import load_recipe
from distrain.diagnose import memory_advice as out_of_memory
from distrain.diagnose.memory_advice import advice, is_out_of_memory
from distrain.launchers import unsaid_failures
from distrain.parallel.tuning import Tuning
from distrain.run import heartbeat
from distrain.run.folder import RunDir
from distrain.system import memory

RECIPE = """
name: hungry
task: classification
data: {name: "hungry_parts:Heavy"}
model: {name: "hungry_parts:Hungry", mib: 0, rank: 1}
optim: {name: sgd, lr: 0.01}
batch: {global: 24}
train: {steps: 6, precision: fp32}
eval: {every: 3 steps}
checkpoint: {every: 2 steps, async: false}
log: {every: 1 steps}
"""
ROOM = 3 * memory.GIB
"""What a rank may add to the address space that it has when it begins."""


def in_little_room(recipe: str, overrides: list[str], run_dir: str) -> Any:
    """Train in this rank with a limit on its address space."""
    (now,) = [int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmSize" in line]
    resource.setrlimit(resource.RLIMIT_AS, (now * 1024 + ROOM, resource.RLIM_INFINITY))
    return train_rank(recipe, overrides, run_dir, None, False)


def told(folder: Path, *overrides: str, world_size: int = 2) -> tuple[str, dict[str, Any]]:
    """Train until it fails; returns what all ranks wrote to standard error, and FAILED.json."""
    recipe = write_recipe(folder, RECIPE)
    ended = in_world(world_size, in_little_room, str(recipe), list(overrides), str(folder / "run"))
    assert {rank.status for rank in ended} == {1}, "\n".join(rank.out + rank.err for rank in ended)
    failed = RunDir(folder / "run").failed
    assert failed is not None
    return "".join(rank.err for rank in ended), failed


@pytest.mark.fault(20)
@pytest.mark.parametrize(
    ("overrides", "where"),
    [
        (["model.mib=1024"], "in the forward pass"),
        (["model.mib=1024", "model.when=evaluation", "eval.batch=12"], "in an evaluation"),
        (["model.mib=8192", "model.when=building"], "setting up"),
        (["data.mib=8192", "data.samples=48"], "reading data"),
    ],
    ids=["forward", "evaluation", "building", "data"],
)
def test_a_rank_without_memory_is_named(tmp_path: Path, overrides: list[str], where: str) -> None:
    err, failed = told(tmp_path, *overrides)
    message = failed["message"]
    assert f"out of memory on rank {failed['rank']} ({socket.gethostname()})" in message
    assert where in message.splitlines()[0], message
    if "data" not in where:
        assert failed["rank"] == 1
    assert "peak was" in message
    assert "The limit of a process's address space (ulimit -v) is" in message
    assert "What takes less:" in message
    # another start would find the same
    assert failed["restart"] is False
    assert failed["traceback"] is None
    assert err.count("What takes less:") == 1, err


@pytest.mark.parametrize(
    ("now", "module", "words"),
    [
        ("setup", "distrain.datasets.tables", "setting up, reading data"),
        ("setup", "distrain.data", "setting up, reading data"),
        ("setup", "distrain.database", "setting up"),
        ("setup", "distrain.networks.meta_device", "setting up, building the model"),
        ("setup", "distrain.checkpoints.reading", "setting up, reading a checkpoint"),
        ("data", "distrain.networks.meta_device", "reading data"),
        ("evaluate", "distrain.datasets.tables", "in an evaluation"),
        ("sync", "distrain.loop", "in a step"),
        ("save", "distrain.checkpoints.writing", "saving"),
    ],
)
def test_what_a_rank_was_doing_is_what_its_heartbeat_says(now: str, module: str, words: str) -> None:
    heartbeat.begin()
    heartbeat.enter_phase(now)
    with pytest.raises(MemoryError) as raised:
        exec("raise MemoryError", {"__name__": module})
    assert out_of_memory.phase(raised.tb) == words
    heartbeat.begin()


@pytest.mark.fault(20)
def test_what_to_lower_is_reported_with_numbers(tmp_path: Path) -> None:
    _, failed = told(tmp_path, "model.mib=1024", "batch.micro=12")
    assert "batch.micro: 6 (now 12); 2 of them are accumulated then, for the same step" in failed["message"]
    assert "train.activation_checkpointing: true" in failed["message"]
    assert (
        "--strategy fsdp2, which spreads weights, gradients and optimizer state over the processes" in failed["message"]
    )


@pytest.mark.fault(20)
def test_an_evaluation_that_runs_out_of_memory_is_distinguished_from_training(tmp_path: Path) -> None:
    _, failed = told(tmp_path, "model.mib=1024", "model.when=evaluation", "model.rank=0", "eval.batch=8", world_size=1)
    assert "eval.batch: 4 (now 8); the score stays the same" in failed["message"]
    assert "batch.micro" not in failed["message"]


def world_of(world_size: int, strategy: str, device: str = "cuda") -> Any:
    asked = SimpleNamespace(offload="none")
    return SimpleNamespace(
        world_size=world_size, strategy=strategy, device=torch.device(device), asked=asked, tuning=Tuning()
    )


@pytest.mark.parametrize(
    ("strategy", "micro", "advised"), [("fsdp2", 6, True), ("fsdp2", 12, False), ("zero3", 6, False)]
)
def test_whole_gradients_need_not_be_kept(tmp_path: Path, strategy: str, micro: int, advised: bool) -> None:
    recipe = load_recipe(write_recipe(tmp_path), ["batch.global=24"]).recipe
    less = "\n".join(advice(recipe, world_of(2, strategy), micro, "in the backward pass"))
    assert ("tune.reduce_every_micro: true, with which no process keeps a whole gradient" in less) == advised


@pytest.mark.parametrize("strategy", ["single", "ddp", "zero1", "zero2", "zero3", "fsdp2"])
def test_one_process_is_not_advised_to_shard_its_state(tmp_path: Path, strategy: str) -> None:
    recipe = load_recipe(write_recipe(tmp_path)).recipe
    alone = "\n".join(advice(recipe, world_of(1, strategy), 12, "in the forward pass"))
    assert "processes" not in alone
    assert "batch.micro: 6 (now 12)" in alone
    offload = "--offload all" if strategy == "fsdp2" else "--offload optimizer"
    assert ("--strategy zero2 " if strategy in ("single", "ddp") else "") + offload in alone
    several = "\n".join(advice(recipe, world_of(2, "ddp"), 12, "in the forward pass"))
    assert "--strategy fsdp2, which spreads" in several
    assert "more processes" in several


def test_no_peak_is_reported_where_nothing_was_ever_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    gib = 2**30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * gib, 8 * gib))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    for peak in (0, gib):
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device, peak=peak: peak)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device, peak=peak: peak)
        said = out_of_memory._figures(world_of(1, "single"))
        if peak:
            assert said.startswith(
                "This process's peak was 1.00 GiB of the 8.00 GiB of A GPU; 4.00 GiB of it are taken"
            )
        else:
            assert said.startswith(
                "This process had nothing on A GPU yet, of whose 8.00 GiB 3.00 GiB are free; 5.00 GiB"
            )


def test_what_cuda_says_is_shown_in_whole_sentences() -> None:
    figures = [
        "CUDA out of memory. Tried to allocate 1024.00 MiB. GPU 0 has a total capacity of 79.11 GiB of which "
        "517.20 MiB is free.",
        "Including non-PyTorch memory, this process has 78.60 GiB memory in use.",
        "Of the allocated memory 77.50 GiB is allocated by PyTorch, and 1.98 MiB is reserved by PyTorch but "
        "unallocated.",
        "If reserved but unallocated memory is large try setting PYTORCH_ALLOC_CONF=expandable_segments:True to avoid "
        "fragmentation. See documentation for Memory Management",
    ]
    said = out_of_memory._first_line(torch.OutOfMemoryError(" ".join(figures)))
    assert said == f"OutOfMemoryError: {' '.join(figures[:-1])}"[: len(said)]
    assert said.endswith(".")
    assert "79.11 GiB of which 517.20 MiB is free." in said
    assert out_of_memory._first_line(MemoryError("allocates " * 40)).endswith(("allocates", "allocates "))


def test_what_is_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.ones(2**60)
    assert is_out_of_memory(caught.value), caught.value
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(OSError(12, "Cannot allocate memory"))
    wrapped = ValueError("sample 3 cannot be read")
    wrapped.__cause__ = MemoryError()
    assert is_out_of_memory(wrapped)
    assert not is_out_of_memory(OSError(28, "No space left on device"))
    assert not is_out_of_memory(RuntimeError("shapes cannot be multiplied"))
    told_here = RuntimeError("rank 1 failed: MemoryError")
    told_here.of_another_rank = True  # type: ignore[attr-defined]
    assert not is_out_of_memory(told_here)


def test_a_rank_that_the_kernel_killed_for_memory_is_named() -> None:
    (line,) = unsaid_failures({0: -15, 1: -9}, 1)
    assert line.startswith("rank 1 was ended by SIGKILL: the memory ran out")
    (line,) = unsaid_failures({0: -15, 1: -9}, 0)
    assert "the memory ran out" not in line


def limited(folder: str) -> dict[str, Any]:
    """Return what is known of the limits of this process, once it has set one."""
    resource.setrlimit(resource.RLIMIT_AS, (64 * memory.GIB, resource.RLIM_INFINITY))
    found = {limit.what: limit for limit in memory.limits()}
    return {what: (limit.nbytes, limit.used, limit.peak, limit.set_by_someone) for what, limit in found.items()}


def test_the_limits_of_a_process_are_read(tmp_path: Path) -> None:
    (found,) = in_world(1, limited, str(tmp_path))
    nbytes, used, peak, set_by_someone = found["the limit of a process's address space (ulimit -v)"]
    assert nbytes == 64 * memory.GIB
    assert 2**20 < used <= peak < nbytes
    assert set_by_someone
    total, used, _, set_by_someone = found["this machine's memory"]
    assert 0 < used < total
    assert not set_by_someone
    assert memory.peak_bytes() > 2**20
    kills = memory.oom_kills()
    assert kills is None or kills >= 0
    assert json.dumps(memory.gib(5 * 2**29)) == '"2.50 GiB"'


def test_the_peak_of_a_process_is_not_that_of_the_program_before_it() -> None:
    after = "import sys; from distrain.system.memory import peak_bytes; "
    after += "print(peak_bytes()); large = b'x' * int(sys.argv[1]); print(peak_bytes())"
    before = (
        f"import os, sys; large = b'x' * (300 << 20); os.execv(sys.executable, ['python', '-c', {after!r}, 'SIZE'])"
    )
    for size in (100 << 20, 400 << 20):  # less than before, and more
        command = [sys.executable, "-c", before.replace("SIZE", str(size))]
        first, then = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
        assert first < 100 << 20
        assert size < then < size + (100 << 20)
