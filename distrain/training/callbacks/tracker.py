"""`Tracker`: something that mirrors the rows of metrics.jsonl. Imports no torch."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from distrain.config import Recipe
from distrain.run.folder import RunDir
from distrain.run.media import Media, media_of
from distrain.run.metrics_file import MetricsFile
from distrain.system.output import one_line

logger = logging.getLogger(__name__)

Row = dict[str, Any]


@dataclass(frozen=True)
class TrackerStart:
    """What a tracker is made from, on rank 0."""

    run: RunDir
    """The run folder is `run.path`."""
    recipe: Recipe
    config: dict[str, Any]
    """The resolved recipe and what else describes this attempt, as JSON values."""
    rows: MetricsFile
    step: int
    """Finished optimizer steps that this attempt resumes from."""
    mark: Any
    """What `mark` returned when the checkpoint was saved that this attempt resumes from; None: nothing."""


class Tracker:
    """Something that holds the rows of metrics.jsonl in another form. Made, called and closed on rank 0 alone.

    One of your own is a subclass, which is made with a `TrackerStart` and the further keys of its item in
    `log.trackers`. It gets every row of metrics.jsonl from the first at each attempt, so that it writes what it keeps
    anew, unless it says with `missing` which rows it lacks. What it raises ends it with a warning, and not the run.
    """

    name: str
    """What the run calls it."""
    package: ClassVar[str | None] = None
    """Of a built-in one that is an extra of distrain by its own name: the module that it needs."""

    def missing(self, rows: MetricsFile, history: dict[str, Any]) -> Iterable[tuple[int, Row]] | None:
        """Return the rows that it lacks, with their indices; None: all of them."""
        return None

    def mark(self) -> Any:
        """Flush, and return what an attempt needs that resumes from here, as JSON values."""
        return None

    def write(self, index: int, row: Row) -> None:
        """Add the row that is line `index` (from 0) of metrics.jsonl."""
        raise NotImplementedError

    def finish(self, files: Mapping[str, Path]) -> None:
        """The run is complete; `files` are what `log.artifacts` has it keep, by name: files, and folders."""

    def close(self) -> None:
        """Flush and let go."""


def numbers_of(row: Row) -> dict[str, float]:
    """Return the row's numbers under the names that trackers show: `train/loss`, `test/accuracy`."""
    group = row.get("split", row["event"])
    flat: dict[str, float] = {}
    for name, value in row.items():
        key = one_line(name)
        if key in ("event", "step", "split") or isinstance(value, bool):
            continue
        if isinstance(value, int | float):
            flat[f"{group}/{key}"] = value
        elif isinstance(value, list) and all(isinstance(item, int | float) for item in value):
            flat |= {f"{group}/{key}/{index}": item for index, item in enumerate(value)}
    return flat


def media_in(run: RunDir, row: Row) -> Iterator[tuple[str, Media, Path]]:
    """Yield (name that trackers show, item, file) of the pictures, tables and texts of a row; warns of a lost file."""
    group = one_line(row.get("split", row["event"]))
    for item in media_of(row):
        path = run.path / item.file
        if path.is_file():
            yield f"{group}/{one_line(item.name)}", item, path
        else:
            logger.warning(f"{path} is lost, and {item.name!r} of step {row['step']} is not shown")


def artifact_name(run: RunDir, name: str) -> str:
    """Return the name of an artifact, by which services tell those of one run from those of others."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", f"{run.path.name}-{name}")
