"""Samples that do not decode: left out, counted and told of, as many of them as the recipe tolerates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distrain.config import UserError
from distrain.datasets.base import Batch
from distrain.datasets.batches import too_many
from distrain.parallel import World
from distrain.run.folder import RunDir

EVENT = "undecodable"
"""A row of metrics.jsonl for each step in which samples of the training split were replaced: samples {id: why}."""

_MOST_KEPT = 10_000


class CorruptSamples:
    """What all ranks know of such samples. Every method but `note` and `count` is called by all ranks."""

    def __init__(self, run: RunDir, world: World, tolerated: int, step: int, history: dict[str, Any] | None = None):
        """Go on from what the checkpoint of `step` keeps (`state`), or else from what the rows of the run tell."""
        self._world, self._tolerated = world, tolerated
        self._own: dict[int, dict[int, str]] = {}
        """What this rank met in each step whose numbers are not read yet."""
        self.known: dict[str, dict[int, str]] = {}
        """{split: {id: why}}"""
        stored = (history or {}).get("undecodable")
        if isinstance(stored, dict):
            self.known = {split: {int(each): why for each, why in found.items()} for split, found in stored.items()}
        elif tolerated:
            rows = world.run_on_rank0(lambda: [row for row in run.rows() if row["step"] <= step])
            for row in rows:
                if found := row.get("samples" if row["event"] == EVENT else EVENT):
                    known = self.known.setdefault(row.get("split", "train"), {})
                    known |= {int(each): why for each, why in found.items()}

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of it; nothing where that is too much for its manifest."""
        if sum(map(len, self.known.values())) > _MOST_KEPT:
            return {}
        return {"undecodable": {split: {str(each): why for each, why in f.items()} for split, f in self.known.items()}}

    def note(self, step: int, micro_batches: Sequence[Batch]) -> None:
        """Note what this rank's batches of a step replace."""
        if self._tolerated and (
            found := {each: why for batch in micro_batches for each, why in batch.get("undecodable", {}).items()}
        ):
            self._own[step] = found

    def count(self, step: int) -> float:
        """Return how many samples of a step this rank replaces."""
        return float(len(self._own.get(step, ())))

    def of_step(self, step: int) -> tuple[dict[int, str], list[str]]:
        """Return {id: why} of a step on all ranks, and what is to be said of those that are new."""
        mine = self._own.pop(step, {})
        found = dict(sorted(each for part in self._world.gather(mine) for each in part.items()))
        return found, self.of_split("train", found)

    def of_split(self, split: str, found: dict[int, str]) -> list[str]:
        """Return what is to be said of those that are new; raise UserError where they are too many."""
        known = self.known.setdefault(split, {})
        new = {each: why for each, why in found.items() if each not in known}
        known |= new
        if len(known) > self._tolerated:
            raise UserError(too_many(known, self._tolerated))
        return [f"warning: left out of {split}: {why}" for why in new.values()]
