"""Searches: sweeps whose values are drawn as results come. Which runs one has, and which of them are left."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distrain.config import Recipe, UserError
from distrain.config.yaml import load_recipe
from distrain.launchers.sweeps import (
    MOST_RUNS,
    Axes,
    Range,
    RankedBy,
    SweepRecord,
    SweepRun,
    check_new,
    parse_axes,
    read_record,
    run_of,
    space_of,
)
from distrain.run.folder import RunDir

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SearchAsked:
    """What a command asks to be searched."""

    name: str
    """Of the recipe."""
    folder: Path
    axes: Axes
    overrides: tuple[str, ...]
    """Those that all runs have."""
    search: dict[str, object]
    """What is drawn from, as the record has it."""
    count: int
    """How many runs there are to be."""
    option: str
    """What names another folder on the command line."""

    def corners(self) -> list[SweepRun]:
        """Return runs in which each value, and each end of a range, is there at least once: to be checked."""
        ends = {
            key: [axis.text(axis.low), axis.text(axis.high)] if isinstance(axis, Range) else axis
            for key, axis in self.axes.items()
        }
        first = {key: values[0] for key, values in ends.items()}
        found = [first, *({**first, key: value} for key, values in ends.items() for value in values[1:])]
        return [run_of(self.folder, self.name, self.overrides, 0, values, MOST_RUNS) for values in found]

    def record(self, best: RankedBy) -> SweepRecord:
        """Return the record of this search, begun before or new; raises UserError for another's.

        `best`: by what its runs are compared.
        """
        record = SweepRecord(self.name, [], best, dict(self.search))
        if (earlier := read_record(self.folder)) is None:
            check_new(self.folder, self.option)
            return record
        if earlier.search != record.search or earlier.best != best:
            same = earlier.search == record.search
            was, now = (earlier.best, best) if same else (earlier.search or "no search", record.search)
            raise UserError(
                f"{self.folder} is a sweep of other values ({was}) than {now}; choose another {self.option}"
            )
        return earlier

    def begun(self) -> dict[int, SweepRun]:
        """Return the runs that were drawn and made, by number, as the command would make them now."""
        record = read_record(self.folder)
        drawn = drawn_runs(self.folder, record, self.overrides) if record is not None else {}
        return {number: run for number, run in drawn.items() if RunDir(run.folder).exists}

    def left(self) -> list[int]:
        """Return the numbers of the runs that are not drawn yet, or have not come to their end."""
        record = read_record(self.folder)
        drawn = drawn_runs(self.folder, record) if record is not None else {}
        pruned = {each["folder"] for each in record.runs if "pruned" in each} if record is not None else set()

        def is_left(number: int) -> bool:
            if (run := drawn.get(number)) is None:
                return True
            folder = RunDir(run.folder)
            # one whose values the recipe refuses was never made: it would be refused again
            refused = folder.failed is not None and not folder.exists
            return folder.finished is None and run.folder.name not in pruned and not refused

        return [number for number in sorted({*range(self.count), *drawn}) if is_left(number)]


def ask_search(
    target: str, overrides: Sequence[str], arrays: Sequence[str], count: int, folder: str | None, option: str
) -> SearchAsked:
    """Return what a command asks to be searched; raises UserError for what cannot be. Writes nothing."""
    if count > MOST_RUNS:
        raise UserError(f"--search {count:,} is more than {MOST_RUNS:,} runs; take fewer")
    axes = parse_axes(target, overrides, arrays)
    base: Recipe = load_recipe(target, overrides).recipe
    for key, axis in axes.items():
        if isinstance(axis, Range) and axis.whole and _may_be_between(target, overrides, key, axis):
            logger.warning(
                f"--array {key}={axis.text(axis.low)}..{axis.text(axis.high)} draws whole numbers alone; write "
                f"{axis.low}..{axis.high} for those between as well"
            )
    place = Path(folder or Path("runs") / base.name).absolute()
    search = {"space": space_of(arrays), "seed": base.seed}
    return SearchAsked(base.name, place, axes, tuple(overrides), search, count, option)


def _may_be_between(target: str, overrides: Sequence[str], key: str, axis: Range) -> bool:
    """Whether the recipe's value of a key, of which whole numbers are drawn, need be none."""
    try:
        value: Any = load_recipe(target, [*overrides, f"{key}={axis.text(axis.low)}"]).recipe.model_dump()
    except UserError:  # whoever checks the runs raises it
        return False
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return isinstance(value, float)


def drawn_runs(folder: Path, record: SweepRecord, overrides: Sequence[str] = ()) -> dict[int, SweepRun]:
    """Return the runs of a search by their numbers, in the order in which they were drawn."""
    found = {}
    for position, each in enumerate(record.runs):
        number = each.get("number", position)
        found[number] = run_of(folder, record.name, overrides, number, each["values"], MOST_RUNS)
    return found
