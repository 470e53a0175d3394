"""A checkpoint is verified together: each file is read by one rank, and every rank learns of every problem."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from checkpoint_state import make_state, save_world
from worlds import in_world

from distrain.checkpoint import CheckpointError
from distrain.parallel import open_world
from distrain.parallel.verifying import find_newest_verified, open_verified

RANKS = 5


def looked_at(folder: str) -> tuple[list[str], Any]:
    """Return the names of the ranks' files that this rank read, and what was found."""
    world = open_world("fp32")
    read: set[str] = set()
    preadv = os.preadv

    def counted(descriptor: int, *more: Any) -> int:
        read.add(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        return preadv(descriptor, *more)

    os.preadv = counted  # type: ignore[assignment]
    try:
        newest, skipped = find_newest_verified(world, Path(folder))
        try:
            open_verified(world, max(Path(folder).glob("step-*"))).close()
            refused = ""
        except CheckpointError as error:
            refused = str(error)
        return sorted(read), (newest and newest.name, [(path.name, why) for path, why in skipped], refused)
    finally:
        os.preadv = preadv
        world.close()


@pytest.mark.parametrize("world_size", [2, 3])
def test_each_file_is_hashed_by_one_rank_and_all_learn_what_is_wrong(tmp_path: Path, world_size: int) -> None:
    for step in (1, 2):
        save_world(tmp_path / "good", RANKS, step, make_state(step), seed=step)
    found = in_world(world_size, looked_at, str(tmp_path / "good"))
    names = [f"rank-{rank:05d}-of-{RANKS:05d}.safetensors" for rank in range(RANKS)]
    assert [read for read, _ in found] == [names[rank::world_size] for rank in range(world_size)]
    assert [outcome for _, outcome in found] == [("step-00000002", [], "")] * world_size

    shutil.copytree(tmp_path / "good", tmp_path / "bad")
    for rank in (1, 4):
        file = tmp_path / "bad" / "step-00000002" / names[rank]
        raw = bytearray(file.read_bytes())
        raw[-1] ^= 1
        file.write_bytes(raw)
    (tmp_path / "bad" / "step-00000002" / "stray").write_text("")
    outcomes = [outcome for _, outcome in in_world(world_size, looked_at, str(tmp_path / "bad"))]
    assert outcomes == outcomes[:1] * world_size
    newest, ((skipped, why),), refused = outcomes[0]
    assert (newest, skipped) == ("step-00000001", "step-00000002")
    for text in (why, refused):
        assert text.count("its hash does not match") == 2
        assert text.count("stray: it is not part of this checkpoint") == 1
        assert names[1] in text
        assert names[4] in text
