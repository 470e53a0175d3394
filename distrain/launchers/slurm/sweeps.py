"""Sweeps: one run for each combination of values, in folders of one job array."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distrain.config import UserError
from distrain.config.yaml import load_recipe
from distrain.run.json_files import write_atomically
from distrain.system.bounded_json import SUMMARY, read_json

FILE = "sweep.json"
MOST_RUNS = 1_000


@dataclass(frozen=True)
class SweepRun:
    """One combination."""

    folder: Path
    overrides: tuple[str, ...]
    """All overrides of the run."""
    values: dict[str, str]
    """What is its own, as it was written: value by dotted key."""


@dataclass(frozen=True)
class Sweep:
    """Runs that differ in some values."""

    name: str
    folder: Path
    runs: list[SweepRun]

    @property
    def changes_names(self) -> bool:
        """Whether more than numbers differ, so that names have to be looked up for each run."""
        numbers = re.compile(r"[-+]?[\d._]+(e[-+]?\d+)?", re.IGNORECASE)
        return any(not numbers.fullmatch(value) for run in self.runs for value in run.values.values())

    def check_folder(self) -> None:
        """Raise UserError unless the folder is new, empty, or that of this sweep."""
        if (earlier := read_sweep(self.folder)) is not None:
            if earlier != (mine := [{"folder": run.folder.name, "values": run.values} for run in self.runs]):
                raise UserError(
                    f"{self.folder} is a sweep of {len(earlier)} runs over other values than these {len(mine)}; choose "
                    "another --run-dir"
                )
        elif self.folder.is_dir() and any(path.name != "submit" for path in self.folder.iterdir()):
            raise UserError(f"{self.folder} holds files and is not a sweep; choose another --run-dir")

    def write(self) -> None:
        """Note in the sweep's folder what each run is."""
        record = {
            "name": self.name,
            "runs": [{"folder": run.folder.name, "values": run.values} for run in self.runs],
        }
        write_atomically(self.folder / FILE, json.dumps(record, indent=2) + "\n")


def expand(target: str, overrides: Sequence[str], arrays: Sequence[str], run_dir: str | None) -> Sweep:
    """Return the runs of a recipe over all combinations of `arrays`, each `key=value,value`.

    Raises UserError for what is no list of values, and for more than MOST_RUNS runs.
    """
    if Path(target).is_dir():
        raise UserError(f"{target} is a folder, and --array makes new runs; name a recipe")
    axes = [_axis(text) for text in arrays]
    keys = [key for key, _ in axes]
    if doubled := {key for key in keys if keys.count(key) > 1}:
        raise UserError(f"--array is given twice for {', '.join(sorted(doubled))}; write all values in one")
    if fixed := {text.partition("=")[0] for text in overrides} & set(keys):
        raise UserError(f"{', '.join(sorted(fixed))} has one value on the command line and others in --array")
    if "name" in keys:
        raise UserError("--array name=… : each run of a sweep is named after the recipe's name and its number")
    combinations = list(itertools.islice(itertools.product(*(values for _, values in axes)), MOST_RUNS + 1))
    if len(combinations) > MOST_RUNS:
        raise UserError(f"--array makes more than {MOST_RUNS:,} runs; take fewer values")
    name = load_recipe(target, overrides).recipe.name
    folder = Path(run_dir or Path("runs") / name).absolute()
    runs = []
    width = len(str(len(combinations) - 1))
    for number, values in enumerate(combinations):
        own = dict(zip(keys, values, strict=True))
        numbered = f"{number:0{width}}"
        runs.append(
            SweepRun(
                folder / f"{numbered}-{_slug(own)}",
                (*overrides, *(f"{key}={value}" for key, value in own.items()), f"name={name[:90]}-{numbered}"),
                own,
            )
        )
    return Sweep(name, folder, runs)


def _axis(text: str) -> tuple[str, list[str]]:
    key, equals, written = text.partition("=")
    values = [value.strip() for value in _cut(written)]
    if not equals or not key or not all(values):
        raise UserError(f"--array {text!r}: expected key=value,value as in optim.lr=1e-3,3e-4")
    if doubled := {value for value in values if values.count(value) > 1}:
        raise UserError(f"--array {key}: {', '.join(sorted(doubled))} is there twice")
    return key, values


def _cut(text: str) -> Iterator[str]:
    """Yield the parts between commas, but for those within brackets and quotes."""
    depth, quote, start = 0, "", 0
    for place, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in "[{":
            depth += 1
        elif letter in "]}":
            depth -= 1
        elif letter == "," and depth == 0:
            yield text[start:place]
            start = place + 1
    yield text[start:]


def _slug(values: dict[str, str]) -> str:
    parts = [f"{key.rpartition('.')[2]}={value}" for key, value in values.items()]
    return re.sub(r"[^A-Za-z0-9.=+-]+", "_", ",".join(parts))[:80].strip("_.")


def read_sweep(folder: Path) -> list[dict[str, Any]] | None:
    """Return the runs of a sweep, each with `folder` and `values`; None where the folder is no sweep."""
    try:
        found = read_json(folder / FILE, SUMMARY)
        return [{"folder": str(run["folder"]), "values": dict(run["values"])} for run in found["runs"]]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / FILE} cannot be read: {error}") from error
