"""Which runs a sweep has, and which of them are left: `Runs`, every combination of values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from distrain.launchers.sweeps import SweepRecord, SweepRun
from distrain.run.folder import RunDir


class Runs:
    """The runs of a sweep whose values are all known. A search draws them as it goes: `distrain.sweep.search_runs`."""

    def __init__(self, folder: Path, record: SweepRecord, runs: Sequence[SweepRun], *, retry_failed: bool):
        self.folder, self.record = folder, record
        self.runs = list(runs)
        """All that are known."""
        self.left = [run for run in runs if self.is_left(run, retry_failed=retry_failed)]
        """Those to be started, in this order."""

    @property
    def count(self) -> int:
        """How many runs there will be."""
        return len(self.runs)

    def is_left(self, run: SweepRun, *, retry_failed: bool) -> bool:
        """Whether a run is still to be started or resumed."""
        folder = RunDir(run.folder)
        if folder.finished is not None or self.pruned(run) is not None:
            return False
        return retry_failed or folder.failed is None

    def pruned(self, run: SweepRun) -> int | None:
        """Return the step of the evaluation at which a run was pruned."""
        for each in self.record.runs:
            if each["folder"] == run.folder.name:
                return each.get("pruned")
        return None

    def next(self) -> SweepRun | None:
        """Return the next run to start; None where there is none."""
        return self.left.pop(0) if self.left else None

    def watch(self, run: SweepRun) -> int | None:
        """Look at a run that is under way or has just ended: return the step at which it is pruned, or None."""
        return None

    def ended(self, run: SweepRun, *, failed: bool) -> None:
        """Take up that a run has ended, for now or for good."""
