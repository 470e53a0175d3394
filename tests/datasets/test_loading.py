"""Loader processes that cannot hand over a batch are an error that names the cause, at once."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import train_rank, write_recipe
from worlds import in_world

from distrain.config import UserError
from distrain.datasets.batches import Batches
from distrain.datasets.loading import load
from distrain.run.folder import RunDir


class Source:
    """Sixteen samples whose batches weigh `mib` MiB; `spoil` is called on each batch in the process that makes it."""

    def __init__(self, mib: float = 0.01, spoil: Any = None):
        self.numbers = int(mib * 2**20 / 4)
        self.spoil = spoil

    def __len__(self) -> int:
        return 16

    def fetch(self, ids: np.ndarray) -> dict[str, Any]:
        batch: dict[str, Any] = {
            "inputs": torch.zeros(self.numbers),
            "targets": torch.zeros(4),
            "ids": torch.from_numpy(ids),
        }
        if self.spoil is not None:
            self.spoil(batch)
        return batch


PLACES = [(np.zeros(4, np.int64), np.arange(start, start + 4)) for start in range(0, 16, 4)]


def loaded(source: Source, workers: int = 2) -> list[Any]:
    return list(load(Batches(source, None), PLACES, workers, pin_memory=False))


def no_files_left(batch: dict[str, Any]) -> None:
    used = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used, used))


def unpicklable(batch: dict[str, Any]) -> None:
    batch["inputs"] = {"tree": lambda: None}


def with_a_graph(batch: dict[str, Any]) -> None:
    batch["inputs"] = batch["inputs"].requires_grad_() * 2


def test_batches_arrive_as_they_are_made() -> None:
    ours, theirs = loaded(Source(), workers=0), loaded(Source(), workers=2)
    assert [batch["ids"].tolist() for batch in theirs] == [batch["ids"].tolist() for batch in ours]
    assert all(torch.equal(one["inputs"], other["inputs"]) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [(no_files_left, "ulimit -n"), (unpicklable, "must be tensors"), (with_a_graph, "must be tensors")],
)
@pytest.mark.fault(43)
def test_a_batch_that_cannot_be_sent_is_an_error(spoil: Any, words: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"loader process \d cannot hand over a batch") as found:
        loaded(Source(spoil=spoil))
    assert words in str(found.value)
    assert "Traceback" not in capfd.readouterr().err


def in_small_shared_memory(mib: float) -> str:
    """Load batches of `mib` where /dev/shm has 4 MiB; returns the error's words."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_namespace, private = 0x00020000, 1 << 18 | 1 << 14
    if (
        libc.unshare(new_namespace)
        or libc.mount(b"none", b"/", None, private, None)
        or libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, b"size=4m")
    ):
        return f"no mount: {os.strerror(ctypes.get_errno())}"
    try:
        return f"{len(loaded(Source(mib)))} batches"
    except UserError as error:
        return str(error)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a process a small /dev/shm")
@pytest.mark.parametrize("mib", [0.1, 1.5, 6])
@pytest.mark.fault(43)
def test_full_shared_memory_is_an_error_that_names_it(mib: float) -> None:
    (found,) = in_world(1, in_small_shared_memory, mib, launched=False)
    if found.startswith("no mount"):
        pytest.skip(f"a small /dev/shm cannot be mounted here: {found}")
    if mib == 0.1:
        assert found == "4 batches"
    elif mib == 6:
        assert "cannot hand over a batch of 6.0 MiB" in found
        assert "the shared memory /dev/shm has" in found
        assert "data.workers" in found
    else:  # as many as happen to be under way fit, or not
        assert found == "4 batches" or "/dev/shm" in found


class Stuck:
    """Points of which the tenth can never be read in a loader process."""

    classes = ("a", "b")

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if torch.utils.data.get_worker_info() is not None:
            Path(os.environ["STUCK"]).touch()
            threading.Event().wait()
        return torch.ones(3) * index, index % 2


def stop_while_stuck(recipe: str, run: str) -> Any:
    from distrain.training import intervals as pace

    pace.PATIENCE_S = 1.0
    os.environ["STUCK"] = str(Path(run).with_name("stuck"))

    def stop() -> None:
        while not Path(os.environ["STUCK"]).exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    return train_rank(recipe, [], run, None, False)


@pytest.mark.fault(43)
def test_a_stop_is_heeded_while_loader_processes_hang(tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path,
        """
name: stuck
task: classification
data: {name: "test_loading:Stuck", split: [0.75, 0.25], workers: 1}
model: {name: mlp, hidden: [2]}
batch: {global: 4}
train: {steps: 4}
eval: {every: null}
""",
    )
    (ended,) = in_world(1, stop_while_stuck, str(recipe), str(tmp_path / "run"), launched=False)
    assert ended.status == 1
    assert "SIGTERM asks the run to stop, and its loader processes have given no batch" in ended.err
    failed = RunDir(tmp_path / "run").failed
    assert failed is not None
    assert failed["restart"] is True
