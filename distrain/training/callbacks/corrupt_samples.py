"""Corrupt samples: those that do not decode are skipped, counted and noted, as many as the recipe tolerates."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from distrain.config import UserError
from distrain.datasets.base import Batch
from distrain.datasets.batches import too_many
from distrain.training.callbacks.base import Callback, CallbackRun

logger = logging.getLogger(__name__)

EVENT, _EARLIER = "corrupt_samples", "undecodable"
"""A row of metrics.jsonl for each step in which samples of the training split were replaced: samples {id: why}."""

_MOST_KEPT = 10_000


class CorruptSamples(Callback):
    """Writes down each corrupt sample and warns of it once; more than `data.skip_corrupt` of them stop the run."""

    def __init__(self) -> None:
        self.known: dict[str, dict[int, str]] = {}
        """{split: {id: why}} on all ranks."""
        self._loaded = False

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what a checkpoint keeps of it."""
        stored = state.get(EVENT, state.get(_EARLIER))
        if isinstance(stored, dict):
            self.known = {split: {int(each): why for each, why in found.items()} for split, found in stored.items()}
            self._loaded = True

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of it; nothing where that is too much for its manifest."""
        if sum(map(len, self.known.values())) > _MOST_KEPT:
            return {}
        return {EVENT: {split: {str(each): why for each, why in f.items()} for split, f in self.known.items()}}

    def on_start(self, run: CallbackRun) -> None:
        """Read what the rows of the run tell, where its checkpoint does not."""
        self._run, self._tolerated = run, run.recipe.data.skip_corrupt
        if not self._loaded:
            context = run.context
            rows: list[dict[str, Any]] = context.world.run_on_rank0(
                lambda: [row for row in context.run.rows() if row["step"] <= run.step]
            )
            for row in rows:
                row = {EVENT if key == _EARLIER else key: value for key, value in row.items()}
                if found := row.get("samples" if row["event"] in (EVENT, _EARLIER) else EVENT):
                    known = self.known.setdefault(row.get("split", "train"), {})
                    known |= {int(each): why for each, why in found.items()}
        self._summarize()

    def on_batches(self, step: int, micro_batches: Sequence[Batch]) -> None:
        """Have all ranks learn what this rank's batches of a step replace."""
        if found := {each: why for batch in micro_batches for each, why in batch.get(EVENT, {}).items()}:
            self._run.gather((step, found))

    def on_gather(self, values: Sequence[Sequence[tuple[int, dict[int, str]]]]) -> None:
        """Write the row of each step in which some rank has replaced samples."""
        by_step: dict[int, dict[int, str]] = {}
        for step, found in (each for rank in values for each in rank):
            by_step.setdefault(step, {}).update(found)
        for step, found in sorted(by_step.items()):
            found = dict(sorted(found.items()))
            self._run.write_row(EVENT, step, samples=found)
            self._note("train", found)

    def on_evaluate(self, split: str, values: Mapping[str, Any]) -> None:
        """Note those that the evaluation has skipped, which its row holds."""
        self._note(split, values.get(EVENT, {}))

    def _note(self, split: str, found: Mapping[int, str]) -> None:
        known = self.known.setdefault(split, {})
        new = {each: why for each, why in found.items() if each not in known}
        known |= new
        if len(known) > self._tolerated:
            raise UserError(too_many(known, self._tolerated))
        for why in new.values():
            logger.warning(f"skipped a corrupt sample of {split}: {why}")
        self._summarize()

    def _summarize(self) -> None:
        self._run.summarize({EVENT: {split: sorted(known) for split, known in self.known.items() if known}})
