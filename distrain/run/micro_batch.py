"""What `batch.micro: auto` was found to be, remembered in the run folder. Imports no torch.

RUN/micro_batch.json holds one entry for each number of processes, strategy and recipe that was tried. A start under the
same goes by it, and computes to the same bits; another one is tried anew.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from distrain.config import BatchSection, Recipe
from distrain.run.folder import RunDir, write_atomically
from distrain.system import memory
from distrain.system.bounded_json import read_json

_DECIDES = {
    "task": None,
    "data": None,
    "model": None,
    "loss": None,
    "optim": None,
    "batch": None,
    "train": ("precision", "ema", "compile", "activation_checkpointing"),
}
"""The parts of a recipe that decide how much memory a step takes."""


@dataclass(frozen=True)
class CacheKey:
    """What a size of micro-batch was found for, and holds for."""

    processes: int
    """Over all machines."""
    strategy: str
    offload: str
    recipe: str
    """A digest of the parts that decide about memory."""
    replicate: int | str = 1
    """How many replicas share out the processes; auto: one for each machine."""

    @classmethod
    def of(cls, recipe: Recipe, processes: int, strategy: str, offload: str, replicate: int | str = 1) -> CacheKey:
        """Return it for a start of a recipe."""
        whole = recipe.model_dump(mode="json", by_alias=True)
        parts = {
            key: whole[key] if keys is None else {name: whole[key][name] for name in keys}
            for key, keys in _DECIDES.items()
        }
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
        return cls(processes, strategy, offload, digest, replicate)


@dataclass(frozen=True)
class CachedMicroBatch:
    """A size of micro-batch that was found by trying."""

    where: CacheKey
    micro_batch_size: int
    """The largest that fits."""
    hardware: str
    """What it was tried on."""
    limit: int
    """The memory that there was to fit into, in bytes, for each process."""
    peak: int
    """What each process took with this size, at most, in bytes."""
    tried: tuple[tuple[int, bool], ...]
    """Each size that was tried, and whether it fits, in order."""

    def section(self, batch: BatchSection) -> BatchSection:
        """Return the recipe's section with the size in place of auto."""
        return BatchSection(global_batch_size=batch.global_batch_size, micro_batch_size=self.micro_batch_size)

    def in_words(self) -> str:
        """Return why it is this size."""
        sizes = "1 size" if len(self.tried) == 1 else f"{len(self.tried)} sizes"
        which = "global / processes, which fits" if self._whole() else "the largest that fits"
        return f"{which}, by trying {sizes}: {memory.gib(self.peak)} of {memory.gib(self.limit)} for each process"

    def _whole(self) -> bool:
        return len(self.tried) == 1 and self.tried[0][1]


def remember(run: RunDir, autobatch: CachedMicroBatch) -> None:
    """Rank 0, or the launcher: keep what was found, in place of what was found for the same before."""
    kept = [other for other in _read(run) if other.where != autobatch.where]
    text = json.dumps([asdict(each) for each in (*kept, autobatch)], indent=2)
    write_atomically(run.micro_batch_path, text + "\n")


def cached_micro_batch(run: RunDir, where: CacheKey) -> CachedMicroBatch | None:
    """Return what was found for such a start, or None."""
    return next((each for each in _read(run) if each.where == where), None)


def hand_on(known: RunDir, run: RunDir) -> None:
    """Have a run go by what was found for others, so that they add up their numbers in one order."""
    for each in _read(known):
        if cached_micro_batch(run, each.where) is None:
            run.path.mkdir(parents=True, exist_ok=True)
            remember(run, each)


def _read(run: RunDir) -> list[CachedMicroBatch]:
    try:
        rows: list[dict[str, Any]] = read_json(run.micro_batch_path)
        return [
            CachedMicroBatch(
                **row | {"where": CacheKey(**row["where"]), "tried": tuple((s, f) for s, f in row["tried"])}
            )
            for row in rows
        ]
    except (OSError, ValueError, TypeError, KeyError):
        return []  # it can be found again
