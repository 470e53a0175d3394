"""What an asynchronous save has the loop wait for: a copy into memory that is there, and nothing else."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_state import DESCRIBED, SPECS, ThreadWorld, cut, make_state

from distrain.checkpoint import CheckpointError, LocalCommunicator, Piece, Reader, Saver, TensorSpec, list_checkpoints
from distrain.checkpoints.arena import LARGE, Arena, Bytes

PATIENCE_S = 60


class Scarce(Arena):
    """Memory of which there is none."""

    def _make(self, nbytes: int) -> np.ndarray:
        raise MemoryError(f"no {nbytes} bytes")


def test_memory_is_allocated_once_for_all_saves(tmp_path: Path) -> None:
    saver = Saver(tmp_path, LocalCommunicator())
    for step in range(1, 5):
        saver.begin(step, SPECS, cut(make_state(step), 1, seed=step)[0], **DESCRIBED)
    saver.finish()
    assert saver.arena.allocations <= 2  # pieces that are `copied` need none, and each cut has others
    saver.close()
    assert saver.arena.nbytes == 0


def test_memory_that_is_reserved_is_there_for_the_first_save(tmp_path: Path) -> None:
    saver = Saver(tmp_path, LocalCommunicator())
    saver.arena.reserve(sum(spec.nbytes for spec in SPECS.values()))
    pieces = [Piece(name, 0, raw) for name, raw in make_state(1).items()]
    saver.save(1, SPECS, pieces, **DESCRIBED)
    assert saver.arena.allocations == 1


def test_memory_that_cannot_be_had_is_an_error_of_the_save(tmp_path: Path) -> None:
    saver = Saver(tmp_path, LocalCommunicator(), arena=Scarce())
    saver.arena.reserve(1 << 20)
    pieces = [Piece(name, 0, raw) for name, raw in make_state(1).items()]
    with pytest.raises(CheckpointError, match=r"MemoryError: no [0-9]+ bytes"):
        saver.save(1, SPECS, pieces, **DESCRIBED)
    saver.save(2, SPECS, [Piece(name, 0, raw) for name, raw in make_state(2).items()], background=False, **DESCRIBED)
    assert [info.step for info in list_checkpoints(tmp_path)] == [2]


@pytest.mark.parametrize("stay", [False, True])
@pytest.mark.parametrize("sizes", [[3, LARGE, 5, 7, 2 * LARGE, 1], [LARGE], [1, 1, 1], []])
def test_views_are_the_sources_end_to_end(sizes: list[int], stay: bool) -> None:
    rng = np.random.default_rng(0)
    raws = [rng.integers(0, 256, size, dtype=np.uint8) for size in sizes]
    arena = Arena()
    views, wait = arena.hold([Bytes(raw) for raw in raws], [stay] * len(raws))
    wait()
    assert b"".join(views) == b"".join(raw.tobytes() for raw in raws)
    large = [raw for raw in raws if raw.nbytes >= LARGE]
    in_place = [raw for raw in large if any(np.shares_memory(raw, np.frombuffer(view, np.uint8)) for view in views)]
    assert len(in_place) == (len(large) if stay else 0)
    if not stay and sizes:
        assert len(views) == 1, "one block is written, whatever the number of tensors"


def test_a_save_at_the_end_keeps_no_memory_and_copies_nothing_large(tmp_path: Path) -> None:
    specs = {"model/w": TensorSpec((LARGE,), "F32", "parameter"), "model/b": TensorSpec((3,), "F32", "parameter")}
    pieces = [Piece(name, 0, np.zeros(spec.nbytes, np.uint8)) for name, spec in specs.items()]
    saver = Saver(tmp_path, LocalCommunicator())
    assert saver.begin(1, specs, pieces, background=False, **(DESCRIBED | {"aliases": {}})) is None
    assert saver.written
    assert saver.finish().step == 1  # type: ignore[union-attr]
    assert (saver.arena.allocations, saver.arena.nbytes) == (0, 0)


class Gate:
    """A fence that waits."""

    def __init__(self, error: Exception | None = None):
        self.open, self.error = threading.Event(), error

    def __call__(self) -> None:
        assert self.open.wait(PATIENCE_S)
        if self.error is not None:
            raise self.error


def begin_and_exchange(comm: Any, folder: Path, gate: Gate) -> tuple[Saver, list[bool]]:
    saver = Saver(folder, comm, fence=gate)
    saver.begin(7, SPECS, cut(make_state(7), comm.world_size)[comm.rank], **DESCRIBED)
    saver.exchange()  # waits for the writing, as a loop does not
    saver.exchange()  # once more does nothing
    return saver, [saver.written, saver.exchanged, saver.published, list_checkpoints(folder) == []]


@pytest.mark.parametrize("world_size", [1, 3])
def test_the_loop_goes_on_while_rank_0_publishes(tmp_path: Path, world_size: int) -> None:
    gate = Gate()

    def rank(comm: Any) -> Any:
        saver, seen = begin_and_exchange(comm, tmp_path, gate)
        comm.gather(None)
        gate.open.set()
        saved = saver.finish()
        return seen, saved.step, saver.in_flight

    found = ThreadWorld(world_size).run(rank)
    for number, each in enumerate(found):
        assert each == ([True, True, number > 0, True], 7, None), each
    with Reader(tmp_path / "step-00000007") as reader:
        assert reader.manifest.step == 7


@pytest.mark.parametrize("world_size", [1, 3])
def test_what_goes_wrong_while_rank_0_publishes_is_raised_by_all(tmp_path: Path, world_size: int) -> None:
    gate = Gate(OSError(5, "the disk is gone"))

    def rank(comm: Any) -> Any:
        saver, _ = begin_and_exchange(comm, tmp_path, gate)
        gate.open.set()
        saver.finish()

    found = ThreadWorld(world_size).run(rank)
    assert all(isinstance(error, CheckpointError) and "the disk is gone" in str(error) for error in found), found
    assert list(tmp_path.iterdir()) == []


def test_giving_up_while_rank_0_publishes_leaves_nothing_half(tmp_path: Path) -> None:
    gate = Gate()
    saver, _ = begin_and_exchange(LocalCommunicator(), tmp_path, gate)
    gate.open.set()
    saver.close()
    assert saver.finish() is None
    assert [entry.name for entry in tmp_path.iterdir()] in ([], ["step-00000007"])
