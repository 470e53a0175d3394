"""Reading what the ranks of an attempt noted (`distrain.training.callbacks.trace` writes it)."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

Values = dict[str, Any]


@dataclass
class Record:
    """One attempt: what each rank started from, and what it noted of each step."""

    starts: dict[int, Values] = field(default_factory=dict)
    """By rank."""
    steps: dict[int, dict[int, Values]] = field(default_factory=dict)
    """By step (the first is 1) and rank: all that was noted of it, which for the last one may be a part."""
    files: dict[str, tuple[str | None, bool]] = field(default_factory=dict)
    """What the user's code opened, on all ranks: how it was found when it was first read (None: never), and whether it
    was written to."""

    @property
    def start_step(self) -> int:
        """Steps that were done when it started."""
        return self.starts[0]["step"]

    @property
    def last_step(self) -> int:
        """The last step whose state was noted."""
        return max((step for step, ranks in self.steps.items() if "state" in ranks.get(0, {})), default=self.start_step)

    @property
    def facts(self) -> Values:
        """What rank 0 said of the run at its start."""
        return self.starts[0]

    def pids(self) -> list[int]:
        """The process of each rank, in order."""
        return [self.starts[rank]["pid"] for rank in sorted(self.starts)]

    def step_seconds(self) -> list[float]:
        """What each step took on rank 0, with all that came between it and the one before."""
        times = [ranks[0]["time"] for _, ranks in sorted(self.steps.items()) if "time" in ranks.get(0, {})]
        return [after - before for before, after in pairwise(times)]

    def drawn(self) -> list[str]:
        """The random generators that the model drew from in any step."""
        return sorted(
            {name for ranks in self.steps.values() for noted in ranks.values() for name in noted.get("drawn", ())}
        )

    def hidden_before(self, step: int, rank: int = 0, *, after: bool = False) -> dict[str, str]:
        """What objects held besides their state when `step` began, or when it was done (`after`), on one rank.

        With that, what there was in the loader processes that made the step's micro-batches, once they had.
        """
        held: dict[str, str] = {}
        loaders: dict[int, dict[str, str]] = {}
        begun = 0
        if rank in self.starts:
            held, begun = dict(self.starts[rank]["hidden"]), self.starts[rank]["step"]
        for each in range(begun, step + 1):
            noted = self.steps.get(each, {}).get(rank, {})
            for worker, changed in zip(noted.get("workers", ()), noted.get("loaders", ()), strict=False):
                if worker is not None:
                    _change(loaders.setdefault(worker, {}), changed)
            if each > begun and (each < step or after):
                _change(held, noted.get("hidden", {}))
            if each < step:
                _change(held, noted.get("hidden_between", {}))
        for worker in self.steps.get(step, {}).get(rank, {}).get("workers", ()):
            held |= {path: value for path, value in loaders.get(worker, {}).items() if worker is not None}
        return held

    def hidden_changes(self, step: int, rank: int = 0) -> dict[str, int]:
        """Return how often each of these things had changed when `step` began."""
        found: dict[str, int] = {}
        for earlier, ranks in self.steps.items():
            noted = ranks.get(rank, {}) if earlier < step else {}
            changed = [noted.get("hidden", {}), noted.get("hidden_between", {}), *noted.get("loaders", ())]
            for path in set().union(*changed):
                found[path] = found.get(path, 0) + 1
        return found

    @cached_property
    def gradient_norms(self) -> dict[str, float]:
        """The largest norm of each tensor's gradient, over all steps and ranks."""
        largest: dict[str, float] = {}
        for noted in (noted for ranks in self.steps.values() for noted in ranks.values()):
            for name, (_, norm) in noted.get("gradients", {}).items():
                largest[name] = max(largest.get(name, 0.0), norm)
        return largest


def _change(held: dict[str, str], changes: dict[str, tuple[str, str]]) -> None:
    held |= {path: now for path, (_, now) in changes.items()}


def read_record(folder: Path) -> Record | None:
    """Return what was noted in a trace's folder; None where rank 0 did not come to its first step."""
    record = Record()
    for file in sorted(folder.glob("rank-*.jsonl")):
        rank = int(file.stem.removeprefix("rank-"))
        for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
            if not line.endswith("\n"):  # cut short by a kill
                break
            noted = json.loads(line)
            at, step = noted.pop("at"), noted["step"]
            if at == "start":
                record.starts[rank] = noted
            else:
                record.steps.setdefault(step, {}).setdefault(rank, {}).update(noted)
    for file in sorted(folder.glob("files-*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                noted = json.loads(line)
                found, written = record.files.get(noted["path"], (None, False))
                record.files[noted["path"]] = (found or noted["found"], written or noted["writes"])
    return record if 0 in record.starts else None
