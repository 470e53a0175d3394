"""The cache of `batch.micro: auto` in the run folder. Imports no torch.

RUN/micro_batch.json holds one entry for each number of processes, strategy and recipe that was searched. An attempt
with the same key uses it, and computes the same bits; another key is searched anew.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from distrain.config import BatchSection, Recipe, TuneSection
from distrain.run.folder import RunDir
from distrain.run.json_files import write_json
from distrain.system import memory
from distrain.system.bounded_json import read_json

_MEMORY_SECTIONS = {
    "task": None,
    "data": None,
    "model": None,
    "loss": None,
    "optim": None,
    "batch": None,
    "train": ("precision", "ema", "compile", "activation_checkpointing"),
}
"""The sections and keys of a recipe that determine how much memory a step takes."""


@dataclass(frozen=True)
class CacheKey:
    """The processes, strategy and recipe for which a micro-batch size was found."""

    processes: int
    """Over all machines."""
    strategy: str
    offload: str
    recipe: str
    """A digest of the parts that determine the memory of a step."""
    replicate: int | str = 1
    """How many replicas share out the processes; auto: one for each machine."""

    @classmethod
    def of(cls, recipe: Recipe, processes: int, strategy: str, offload: str, replicate: int | str = 1) -> CacheKey:
        """Return the key of an attempt of a recipe."""
        sections = recipe.model_dump(mode="json", by_alias=True)
        parts = {
            key: sections[key] if keys is None else {name: sections[key][name] for name in keys}
            for key, keys in _MEMORY_SECTIONS.items()
        }
        # what was found under a key's earlier name stays found
        parts["data"]["skip_undecodable"] = parts["data"].pop("skip_corrupt")
        if recipe.tune != TuneSection():  # what was found before there was such a section stays found
            parts["tune"] = sections["tune"]
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
        return cls(processes, strategy, offload, digest, replicate)


@dataclass(frozen=True)
class CachedMicroBatch:
    """A micro-batch size that a search found."""

    key: CacheKey
    micro_batch_size: int
    """The largest that fits."""
    hardware: str
    """GPU models, or cpu."""
    limit: int
    """Memory limit of each process, in bytes."""
    peak: int
    """Peak memory of a process with this size, in bytes."""
    tried: tuple[tuple[int, bool], ...]
    """(size, whether it fits) of each try, in order."""

    def section(self, batch: BatchSection) -> BatchSection:
        """Return the recipe's section with the size in place of auto."""
        return BatchSection(global_batch_size=batch.global_batch_size, micro_batch_size=self.micro_batch_size)

    def describe(self) -> str:
        """Return how the size was found, for the banner."""
        sizes = "1 size" if len(self.tried) == 1 else f"{len(self.tried)} sizes"
        which = "global / processes, which fits" if self._first_try_fits() else "the largest that fits"
        return f"{which}, by trying {sizes}: {memory.gib(self.peak)} of {memory.gib(self.limit)} for each process"

    def _first_try_fits(self) -> bool:
        return len(self.tried) == 1 and self.tried[0][1]


def cache_micro_batch(run: RunDir, autobatch: CachedMicroBatch) -> None:
    """Write an entry to the cache, replacing one with the same key; rank 0 or the launcher calls."""
    kept = [other for other in _read(run) if other.key != autobatch.key]
    write_json(run.micro_batch_path, [asdict(each) for each in (*kept, autobatch)])


def cached_micro_batch(run: RunDir, key: CacheKey) -> CachedMicroBatch | None:
    """Return the cached entry of a key, or None."""
    return next((each for each in _read(run) if each.key == key), None)


def copy_cache(source: RunDir, run: RunDir) -> None:
    """Copy the entries that a run lacks from another run, so that both sum in the same order."""
    for each in _read(source):
        if cached_micro_batch(run, each.key) is None:
            run.path.mkdir(parents=True, exist_ok=True)
            cache_micro_batch(run, each)


def _read(run: RunDir) -> list[CachedMicroBatch]:
    try:
        rows: list[dict[str, Any]] = read_json(run.micro_batch_path)
        return [
            CachedMicroBatch(
                **{name: value for name, value in row.items() if name != "where"}
                # "where" in files of the first version
                | {
                    "key": CacheKey(**(row["key"] if "key" in row else row["where"])),
                    "tried": tuple((size, fits) for size, fits in row["tried"]),
                }
            )
            for row in rows
        ]
    except (OSError, ValueError, TypeError, KeyError):
        return []  # it can be found again
