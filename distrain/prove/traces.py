"""Reading the traces of the ranks of an attempt (`distrain.training.callbacks.trace` writes them)."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

Values = dict[str, Any]


@dataclass
class Rollback:
    """One rank's return to a checkpoint."""

    start: Values
    """The state that it started from again, at the checkpoint's step."""
    undone: dict[int, Values]
    """By step, later than that: what it had recorded of those that are made again."""


@dataclass
class AttemptTrace:
    """The trace of one attempt: the state each rank started from, and what it recorded at each step."""

    starts: dict[int, Values] = field(default_factory=dict)
    """By rank."""
    steps: dict[int, dict[int, Values]] = field(default_factory=dict)
    """By step (the first is 1) and rank: what was recorded; the last step may be incomplete."""
    rollbacks: dict[int, list[Rollback]] = field(default_factory=dict)
    """By rank, in the order in which they came."""
    files: dict[str, tuple[str | None, bool]] = field(default_factory=dict)
    """Files that the user's code opened, on all ranks, by path: (how the file was when first read, None if never;
    whether it was written)."""

    @property
    def start_step(self) -> int:
        """Steps done before the attempt."""
        return self.starts[0]["step"]

    @property
    def last_step(self) -> int:
        """The last step whose state was recorded."""
        return max((step for step, ranks in self.steps.items() if "state" in ranks.get(0, {})), default=self.start_step)

    @property
    def facts(self) -> Values:
        """What rank 0 recorded of the run at the start: world size, strategy, precision, total steps, …"""
        return self.starts[0]

    def begun(self) -> list[dict[int, Values]]:
        """Return by rank what the attempt started from, and then after each rollback, which all ranks make together."""
        most = max(map(len, self.rollbacks.values()), default=0)
        again = ({rank: r[n].start for rank, r in self.rollbacks.items() if n < len(r)} for n in range(most))
        return [self.starts, *again]

    def recorded(self) -> list[int]:
        """Return all steps of which something was recorded, in order, also those that were undone."""
        undone = (step for found in self.rollbacks.values() for each in found for step in each.undone)
        return sorted({*self.steps, *undone})

    def records(self, step: int, rank: int) -> list[Values]:
        """Return what a rank recorded of a step: of its last pass, and of those that were undone."""
        undone = [each.undone.get(step) for each in self.rollbacks.get(rank, ())]
        return [each for each in (self.steps.get(step, {}).get(rank), *undone) if each is not None]

    def pids(self) -> list[int]:
        """The process id of each rank, in order."""
        return [self.starts[rank]["pid"] for rank in sorted(self.starts)]

    def step_seconds(self) -> list[float]:
        """Seconds of each step on rank 0, including what came between it and the step before."""
        times = [ranks[0]["time"] for _, ranks in sorted(self.steps.items()) if "time" in ranks.get(0, {})]
        return [after - before for before, after in pairwise(times)]

    def drawn(self) -> list[str]:
        """The global random generators that the model drew from in any step."""
        return sorted(
            {name for ranks in self.steps.values() for entry in ranks.values() for name in entry.get("drawn", ())}
        )

    def hidden_before(self, step: int, rank: int = 0, *, after: bool = False) -> dict[str, str]:
        """State that no checkpoint holds, on one rank, when `step` began, or when it was done (`after`).

        Includes that of the loader processes that made the step's micro-batches, as it was afterwards.
        """
        held: dict[str, str] = {}
        loaders: dict[int, dict[str, str]] = {}
        first_step = 0
        if rank in self.starts:
            # what no checkpoint holds stays as it was at a rollback
            begun = [self.starts[rank], *(each.start for each in self.rollbacks.get(rank, ()))]
            last = next((each for each in reversed(begun) if each["step"] < step), begun[0])
            held, first_step = dict(last["hidden"]), last["step"]
        for each in range(first_step, step + 1):
            entry = self.steps.get(each, {}).get(rank, {})
            for worker, changed in zip(entry.get("workers", ()), entry.get("loaders", ()), strict=False):
                if worker is not None:
                    _change(loaders.setdefault(worker, {}), changed)
            if each > first_step and (each < step or after):
                _change(held, entry.get("hidden", {}))
            if each < step:
                _change(held, entry.get("hidden_between", {}))
        for worker in self.steps.get(step, {}).get(rank, {}).get("workers", ()):
            held |= {path: value for path, value in loaders.get(worker, {}).items() if worker is not None}
        return held

    def hidden_changes(self, step: int, rank: int = 0) -> dict[str, int]:
        """Return how often each piece of hidden state had changed before `step`."""
        found: dict[str, int] = {}
        for earlier, ranks in self.steps.items():
            entry = ranks.get(rank, {}) if earlier < step else {}
            changed = [entry.get("hidden", {}), entry.get("hidden_between", {}), *entry.get("loaders", ())]
            for path in set().union(*changed):
                found[path] = found.get(path, 0) + 1
        return found

    @cached_property
    def gradient_norms(self) -> dict[str, float]:
        """The largest norm of each tensor's gradient, over all steps and ranks."""
        largest: dict[str, float] = {}
        for entry in (entry for ranks in self.steps.values() for entry in ranks.values()):
            for name, (_, norm) in entry.get("gradients", {}).items():
                largest[name] = max(largest.get(name, 0.0), norm)
        return largest


def _change(held: dict[str, str], changes: dict[str, tuple[str, str]]) -> None:
    held |= {path: now for path, (_, now) in changes.items()}


def read_trace(folder: Path) -> AttemptTrace | None:
    """Return the trace in a folder; None where rank 0 did not reach its first step."""
    trace = AttemptTrace()
    for file in sorted(folder.glob("rank-*.jsonl")):
        rank = int(file.stem.removeprefix("rank-"))
        for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
            if not line.endswith("\n"):  # cut short by a kill
                break
            entry = json.loads(line)
            at, step = entry.pop("at"), entry["step"]
            if at == "start" and rank in trace.starts:
                undone = {done: ranks.pop(rank) for done, ranks in trace.steps.items() if done > step and rank in ranks}
                trace.rollbacks.setdefault(rank, []).append(Rollback(entry, undone))
            elif at == "start":
                trace.starts[rank] = entry
            else:
                trace.steps.setdefault(step, {}).setdefault(rank, {}).update(entry)
    for file in sorted(folder.glob("files-*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                entry = json.loads(line)
                found, written = trace.files.get(entry["path"], (None, False))
                trace.files[entry["path"]] = (found or entry["found"], written or entry["writes"])
    return trace if 0 in trace.starts else None
