"""Verifies a checkpoint together: each rank reads and hashes its share of the files, and all learn of every problem.

One rank that hashed all of them would keep a thousand others waiting, and each rank that hashed all of them would read
a checkpoint of a thousand ranks a thousand times.
"""

from __future__ import annotations

from pathlib import Path

from distrain.checkpoint import Reader, list_checkpoints, verify
from distrain.checkpoints.reading import not_verified
from distrain.parallel.comm import World


def problems_of(world: World, path: Path) -> list[str]:
    """Return what is wrong with a checkpoint, none if it is as it was written. All ranks call."""
    own: list[str]
    try:
        own = verify(path, share=(world.rank, world.world_size))
    except Exception as error:  # the others wait for what this rank has found
        own = [f"rank {world.rank} could not verify it: {type(error).__name__}: {error}"]
    found = world.gather(own, patient=True)
    return list(dict.fromkeys(problem for problems in found for problem in problems))


def find_newest_verified(world: World, folder: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """Return the newest checkpoint in a folder that verifies, and the newer ones that do not, each with the reason.

    All ranks call. Raises CheckpointError.
    """
    skipped: list[tuple[Path, str]] = []
    for info in world.run_on_rank0(lambda: list_checkpoints(folder)):
        if not (problems := problems_of(world, info.path)):
            return info.path, skipped
        skipped.append((info.path, "; ".join(problems)))
    return None, skipped


def open_verified(world: World, path: Path) -> Reader:
    """Verify a checkpoint and open it. All ranks call; all raise the same CheckpointError."""
    if problems := problems_of(world, path):
        raise not_verified(path, problems)
    reader: Reader = world.run_on_all(lambda: Reader(path, verify=False))
    return reader
