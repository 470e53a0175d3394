"""Sweeps: runs of one recipe that differ in some values, each in a folder of its own below that of the sweep."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import logging
import math
import os
import re
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distrain.config import Recipe, UserError
from distrain.config.yaml import load_recipe
from distrain.run.folder import RunDir
from distrain.run.json_files import write_atomically, write_json
from distrain.system.bounded_json import SUMMARY, read_json

logger = logging.getLogger(__name__)

FILE, LOCK = "sweep.json", ".sweep.lock"
STOP = "STOP"
"""A file in the sweep's folder by which a person asks it to stop."""
DRAWS = "draws"
"""The folder of what a search has drawn, a folder for each run in the order in which they were drawn."""
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
class Range:
    """The numbers that a search draws from."""

    low: float
    high: float
    whole: bool
    """Whether they are whole numbers."""
    log: bool
    """Whether their logarithms are spread evenly."""

    def text(self, value: float) -> str:
        """Return a number as a recipe has it, six digits of it, within the range."""
        if self.whole:
            return str(round(value))
        return repr(min(max(float(f"{value:.6g}"), self.low), self.high))


Axes = dict[str, list[str] | Range]
"""What a sweep varies: the values, or the range, of each dotted key."""


@dataclass(frozen=True)
class RankedBy:
    """By what the runs of a sweep are compared."""

    metric: str
    higher: bool
    """Whether higher is better."""


@dataclass(frozen=True)
class Sweep:
    """Runs that differ in some values."""

    name: str
    folder: Path
    runs: list[SweepRun]
    option: str = "--run-dir"
    """What names another folder on the command line."""

    @property
    def changes_names(self) -> bool:
        """Whether more than numbers differ, so that names have to be looked up for each run."""
        numbers = re.compile(r"[-+]?[\d._]+(e[-+]?\d+)?", re.IGNORECASE)
        return any(not numbers.fullmatch(value) for run in self.runs for value in run.values.values())

    def earlier(self) -> SweepRecord | None:
        """Return what the folder holds of this sweep, None before it was begun; raises UserError for another's."""
        if (earlier := read_record(self.folder)) is not None:
            if earlier.search is not None:
                raise UserError(f"{self.folder} is a search; choose another {self.option}, or continue with --search")
            found = [{"folder": run["folder"], "values": run["values"]} for run in earlier.runs]
            if found != (mine := [{"folder": run.folder.name, "values": run.values} for run in self.runs]):
                raise UserError(
                    f"{self.folder} is a sweep of {len(found)} runs over other values than these {len(mine)}; choose "
                    f"another {self.option}"
                )
        else:
            check_new(self.folder, self.option)
        return earlier

    def record(self, best: RankedBy | None) -> SweepRecord:
        """Return what the sweep's folder holds of it, before any run has begun."""
        runs = [{"folder": run.folder.name, "values": run.values} for run in self.runs]
        return SweepRecord(self.name, runs, best)


@dataclass
class SweepRecord:
    """What a sweep's folder holds: sweep.json."""

    name: str
    runs: list[dict[str, Any]]
    """Each with `folder`, `values`, of a search also its `number`, and of a pruned one `pruned`: the step of the
    evaluation that decided."""
    best: RankedBy | None = None
    """None in folders of earlier versions."""
    search: dict[str, Any] | None = None
    """What a search draws from: `space` by key, and `seed`; None where every combination is a run."""

    def write(self, folder: Path) -> None:
        """Replace what the sweep's folder holds, but for what was drawn: see `add_draw`."""
        runs = [run for run in self.runs if "number" not in run]
        record = {"name": self.name, "best": self.best and asdict(self.best), "search": self.search, "runs": runs}
        write_atomically(folder / FILE, json.dumps(record, indent=2) + "\n")


def best_of(recipe: Recipe, varied: Iterable[str]) -> RankedBy:
    """Return by what the runs of a recipe that differ in these keys are compared. Its names must be right.

    Warns where that is the loss, and is another one in each.
    """
    from distrain.metrics import decides_best  # imports torch

    best = RankedBy(*decides_best(recipe))
    if best.metric == "loss" and (keys := [key for key in varied if _CHANGES_LOSS.match(key)]):
        logger.warning(
            f"the runs are compared by their loss, which itself depends on {', '.join(keys)}: the lowest says nothing. "
            "Set eval.best to a metric that means the same in all of them"
        )
    return best


_CHANGES_LOSS = re.compile(r"(loss|task)(\.|$)|data\.(standardize_target|\w*tokenizer)$")
"""Keys on which it depends what the loss of an evaluation is, or over what it is a mean."""


def check_new(folder: Path, option: str) -> None:
    """Raise UserError where a folder that is no sweep holds what is none of a sweep's."""
    if folder.is_dir() and any(path.name not in ("submit", "logs", LOCK) for path in folder.iterdir()):
        raise UserError(f"{folder} holds files and is not a sweep; choose another {option}")


def expand(
    target: str, overrides: Sequence[str], arrays: Sequence[str], run_dir: str | None, option: str = "--run-dir"
) -> Sweep:
    """Return the runs of a recipe over all combinations of `arrays`, each `key=value,value`.

    `option` is how the command calls `run_dir`. Raises UserError for what is no list of values, and for more than
    MOST_RUNS runs.
    """
    axes = parse_axes(target, overrides, arrays)
    if ranges := [key for key, values in axes.items() if isinstance(values, Range)]:
        raise UserError(f"--array {', '.join(ranges)}: a range is what --search N draws from; name the values")
    lists = [values for values in axes.values() if not isinstance(values, Range)]
    combinations = list(itertools.islice(itertools.product(*lists), MOST_RUNS + 1))
    if len(combinations) > MOST_RUNS:
        raise UserError(f"--array makes more than {MOST_RUNS:,} runs; take fewer values")
    name = load_recipe(target, overrides).recipe.name
    folder = Path(run_dir or Path("runs") / name).absolute()
    runs = [
        run_of(folder, name, overrides, number, dict(zip(axes, values, strict=True)), len(combinations))
        for number, values in enumerate(combinations)
    ]
    return Sweep(name, folder, runs, option)


def run_of(
    folder: Path, name: str, overrides: Sequence[str], number: int, values: dict[str, str], count: int
) -> SweepRun:
    """Return run `number`, from 0, of `count` runs of a sweep."""
    numbered = f"{number:0{len(str(count - 1))}}"
    own = (f"{key}={value}" for key, value in values.items())
    return SweepRun(folder / f"{numbered}-{_slug(values)}", (*overrides, *own, f"name={name[:90]}-{numbered}"), values)


def parse_axes(target: str, overrides: Sequence[str], arrays: Sequence[str]) -> Axes:
    """Return what each of `arrays` varies; raises UserError for what is neither a list of values nor a range."""
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
    return dict(axes)


def space_of(arrays: Sequence[str]) -> dict[str, str]:
    """Return what a search's record holds of `arrays`: what each key is drawn from, as it was written."""
    return {text.partition("=")[0]: text.partition("=")[2] for text in arrays}


def axes_of(space: Mapping[str, str]) -> Axes:
    """Return what a search varies, from its record."""
    return dict(_axis(f"{key}={text}") for key, text in space.items())


_RANGE = re.compile(r"(?P<low>[-+\w.]*?[\w])\.\.(?P<high>[-+\w.]+?)(?P<log>:log)?")


def _axis(text: str) -> tuple[str, list[str] | Range]:
    key, equals, written = text.partition("=")
    if equals and key and (match := _RANGE.fullmatch(written.strip())):
        return key, _range(text, match)
    values = [value.strip() for value in _cut(written)]
    if not equals or not key or not all(values):
        raise UserError(f"--array {text!r}: expected key=value,value as in optim.lr=1e-3,3e-4")
    if doubled := {value for value in values if values.count(value) > 1}:
        raise UserError(f"--array {key}: {', '.join(sorted(doubled))} is there twice")
    return key, values


def _range(text: str, match: re.Match[str]) -> Range:
    try:
        low, high = float(match["low"]), float(match["high"])
    except ValueError:
        raise UserError(
            f"--array {text!r}: expected numbers, as in optim.lr=1e-5..1e-2:log or model.depth=2..8"
        ) from None
    whole = all(re.fullmatch(r"[-+]?\d+", match[side]) for side in ("low", "high"))
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UserError(f"--array {text!r}: expected a lower number before a higher one")
    if match["log"] and low <= 0:
        raise UserError(f"--array {text!r}: a logarithmic range begins above 0")
    return Range(low, high, whole, match["log"] is not None)


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


@contextmanager
def sweeping(folder: Path) -> Iterator[None]:
    """Have this process alone start the runs of a sweep. Raises UserError where another does."""
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"another `distrain sweep` starts the runs of {folder}; wait for it to end, or `distrain stop {folder}`"
            ) from None
        yield


def is_sweeping(folder: Path) -> bool:
    """Whether a process of this machine starts the runs of a sweep."""
    try:
        with (folder / LOCK).open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


# --------------------------------------------------------------------------------------------------------------------
# What a search has drawn


def add_draw(folder: Path, record: SweepRecord, run: SweepRun, number: int) -> bool:
    """Have the next run that a search draws be this one, unless another process has drawn it since `record` was read.

    Returns whether it is; if not, the values are to be drawn again, with those of the other among the known ones. Of
    processes on several machines that share the folder exactly one succeeds, without a lock, which not every file
    system has and which a process that dies may keep: the draw is complete beside its place, and a folder can be
    renamed only to where there is none. Raises OSError where the folder cannot be written.
    """
    place = folder / DRAWS / f"{len(record.runs):04}"
    fresh = place.with_name(f".{place.name}.{socket.gethostname()}.{os.getpid()}")
    drawn = {"number": number, "folder": run.folder.name, "values": run.values}
    shutil.rmtree(fresh, ignore_errors=True)  # of a process that was killed
    fresh.mkdir(parents=True)
    write_json(fresh / _DRAW, drawn)
    try:
        fresh.rename(place)
    except OSError as error:
        shutil.rmtree(fresh, ignore_errors=True)
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY) and not place.exists():
            raise
        try:
            # what a network file system calls a failure may have been done, and its answer lost
            return _read_draw(place) == drawn
        except FileNotFoundError:  # it shows what others have written only after a while
            return False
    return True


_DRAW = "draw.json"


def _read_draw(place: Path) -> dict[str, Any]:
    with _readable(place / _DRAW):
        found = read_json(place / _DRAW, SUMMARY)
        values = {str(key): str(value) for key, value in found["values"].items()}
        return {"number": int(found["number"]), "folder": str(found["folder"]), "values": values}


def _draws(folder: Path, first: int) -> Iterator[dict[str, Any]]:
    for position in itertools.count(first):
        try:
            yield _read_draw(folder / DRAWS / f"{position:04}")
        except (FileNotFoundError, NotADirectoryError):
            return


# --------------------------------------------------------------------------------------------------------------------
# What a sweep's folder holds


def read_sweep(folder: Path) -> list[dict[str, Any]] | None:
    """Return the runs of a sweep, each with `folder` and `values`; None where the folder is no sweep."""
    record = read_record(folder)
    return record.runs if record is not None else None


def read_record(folder: Path) -> SweepRecord | None:
    """Return what a sweep's folder holds; None where the folder is no sweep. Raises UserError."""
    with _readable(folder / FILE):
        try:
            found = read_json(folder / FILE, SUMMARY)
        except (FileNotFoundError, NotADirectoryError):
            return None
        runs: list[dict[str, Any]] = []
        for run in found["runs"]:
            runs.append({"folder": str(run["folder"]), "values": dict(run["values"])})
            if run.get("pruned") is not None:
                runs[-1]["pruned"] = int(run["pruned"])
        best, search = found.get("best"), found.get("search")
        record = SweepRecord(
            str(found.get("name", folder.name)),
            runs,
            RankedBy(str(best["metric"]), best["higher"] is True) if best is not None else None,
            {"space": dict(search["space"]), "seed": int(search["seed"])} if search is not None else None,
        )
    if record.search is not None:
        record.runs += _draws(folder, len(record.runs))
        for run in record.runs:
            if "pruned" not in run and (pruned := RunDir(folder / run["folder"]).pruned) is not None:
                run["pruned"] = pruned
    return record


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
