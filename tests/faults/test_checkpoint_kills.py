"""A save that is killed at any moment leaves the old checkpoint or the new one, never a mixture."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distrain.checkpoint import LocalCommunicator, Piece, Reader, Saver, TensorSpec, find_newest, list_checkpoints

TRIALS = 10 * int(os.environ.get("DISTRAIN_KILLS", "10"))
SPECS = {f"model/{i}": TensorSpec((1 << 16,), "F32", "parameter") for i in range(8)}  # 2 MiB
DESCRIBED: dict[str, Any] = {"aliases": {}, "recipe": "", "strategy": "ddp"}


def pieces_of(step: int) -> list[Piece]:
    """Every byte of the state of a step says which step it is."""
    return [Piece(name, 0, np.full(spec.nbytes, step % 251, np.uint8)) for name, spec in SPECS.items()]


def save_for_ever(folder: Path, first: int, asynchronous: bool, ready: Any) -> None:
    saver = Saver(folder, LocalCommunicator(), keep=2, keep_best=0, asynchronous=asynchronous)
    for step in range(first, first + 10**6):
        saver.begin(step, SPECS, pieces_of(step), scalars={"step": step}, **DESCRIBED)
        if step == first:
            ready.set()


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.fault(11)
def test_kill_at_any_moment_leaves_old_or_new(tmp_path, record_property):
    record_property("trials", TRIALS)
    context = multiprocessing.get_context("fork")  # a fresh interpreter for each trial would take minutes
    rng = random.Random(0)
    folder, newest, states = tmp_path / "checkpoints", 0, Counter()
    for trial in range(TRIALS):
        ready = context.Event()
        child = context.Process(target=save_for_ever, args=(folder, newest + 1, bool(trial % 2), ready))
        child.start()
        assert ready.wait(30)
        time.sleep(rng.uniform(0, 0.03))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        path, skipped = find_newest(folder)
        assert skipped == [], "a published checkpoint does not verify"
        if path is not None:
            with Reader(path) as reader:
                step = reader.manifest.step
                assert reader.manifest.scalars == {"step": step}
                for name, spec in SPECS.items():
                    assert (reader.read(name, 0, spec.numel) == step % 251).all(), f"{name} of step {step}"
            assert path.name == f"step-{step:08d}"
            assert step >= newest, "a published checkpoint has gone"
            states["new" if step > newest else "old"] += 1
            newest = step
        hidden = [entry.name for entry in folder.iterdir() if entry.name.startswith(".")] if folder.exists() else []
        states["left something behind"] += bool(hidden)
        states["left trash behind"] += any(name.startswith(".trash") for name in hidden)
    # what the kills left behind hinders no one
    Saver(folder, LocalCommunicator(), keep=2, keep_best=0).save(
        newest + 1, SPECS, pieces_of(newest + 1), scalars={}, **DESCRIBED
    )
    assert [info.step for info in list_checkpoints(folder)] == [newest + 1, newest]
    assert sorted(os.listdir(folder)) == [f"step-{newest:08d}", f"step-{newest + 1:08d}"]
    print(f"{TRIALS} kills: {dict(states)}, {newest} checkpoints published")
    assert states["left something behind"] > TRIALS // 4, "the kills did not hit the saves"
