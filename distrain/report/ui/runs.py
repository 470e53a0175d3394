"""The runs of a folder, as a browser sees them: by names that are no paths, and no file outside the folder."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from distrain.config.yaml import load_recipe
from distrain.launchers.launcher import Job
from distrain.report.status import Status, as_json, status_of, statuses
from distrain.run.folder import RunDir
from distrain.system.errors import UserError
from distrain.system.output import one_line

OUTSIDE = "outside"
"""The state of a run whose folder, or a file of it, is a link that leads out of the folder that is shown."""

READ = (
    "recipe.yaml", "launch.json", "effect.json", "metrics.jsonl", "attempts.jsonl", "inputs.json", "FINISHED",
    "PREEMPTED", "FAILED.json", "STOP", "sweep.json", "heartbeat", "checkpoints", "submit", "export",
    "micro_batch.json",
)  # fmt: skip
"""What of a run's folder is read, besides logs."""

_SEEN = ("metrics.jsonl", "attempts.jsonl", "launch.json", "recipe.yaml", "FINISHED", "PREEMPTED", "FAILED.json",
         "effect.json", "heartbeat", "checkpoints", "export", "submit")  # fmt: skip
"""What changes with the status of a run that is not alive."""


class NoSuchRun(UserError):
    """There is no run of this name, or it may not be read."""


class Runs:
    """The runs, and how they are doing. For several threads."""

    def __init__(self, folder: Path):
        """`folder`: of a run, of a sweep, or one that holds them."""
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder}; name a run, or go to the folder that has runs/ in it")
        self.folder = folder.absolute()
        self.root = Path(os.path.realpath(folder))
        self.problem: str | None = None
        """Why the runs could not be listed the last time, or SLURM's queue not be asked."""
        self.version = 0
        """Grows with each change of what `since` returns."""
        self._shown: dict[str, tuple[int, dict[str, Any]]] = {}
        self._places: dict[str, Path] = {}
        self._cached: dict[Path, tuple[Any, Status]] = {}
        self._about: dict[Path, tuple[Any, dict[str, Any]]] = {}
        self._lock = threading.Lock()
        self._look_lock = threading.Lock()

    # ----------------------------------------------------------------------------------------------------------------
    # What may be read

    def inside(self, path: Path) -> Path:
        """Return a path with its links followed; raises NoSuchRun where that leads out of the folder."""
        real = Path(os.path.realpath(path))
        if real != self.root and self.root not in real.parents:
            raise NoSuchRun(f"{path} leads out of {self.folder}, and nothing outside it is shown")
        return real

    def _check(self, run: Path) -> None:
        self.inside(run)
        self.inside(run.parent / "sweep.json")
        for name in ("", "heartbeat", "checkpoints", "submit"):
            with suppress(OSError), os.scandir(run / name) as entries:
                for entry in entries:
                    if name or entry.name in READ:
                        if entry.is_symlink():
                            self.inside(Path(entry.path))
                        if not (entry.is_file() or entry.is_dir()):
                            raise NoSuchRun(f"{entry.path} is neither a file nor a folder, and is not read")

    def path(self, name: str) -> Path:
        """Return the folder of a run by the name that the page has for it; checked anew each time."""
        place = self._places.get(name)
        if place is None:
            raise NoSuchRun(f"there is no run {one_line(name)[:40]}")
        self._check(place)
        return place

    # ----------------------------------------------------------------------------------------------------------------
    # How they are doing

    def _status(
        self, run: Path, jobs: list[Job], values: dict[str, str] | None = None, problem: str | None = None
    ) -> Status:
        """As `status_of`, which is asked again for a run that is alive or has changed."""
        try:
            self._check(run)
        except NoSuchRun as error:
            return Status(run=str(run), state=OUTSIDE, message=str(error))
        seen = (repr(jobs), problem, *(_stamp(run / name) for name in _SEEN))
        cached = self._cached.get(run)
        if cached is not None and cached[0] == seen and not cached[1].alive:
            return replace(cached[1], values=values or {})
        try:
            found = status_of(run, jobs, values, problem)
        except (UserError, OSError, ValueError) as error:
            found = Status(run=str(run), state="unreadable", message=str(error), values=values or {})
        self._cached[run] = (seen, found)
        return found

    def look(self) -> float:
        """Find out how the runs are doing now; returns after how many seconds to look again."""
        began = time.monotonic()
        with self._look_lock:
            problem, found = None, []
            try:
                found = statuses(self.folder, self._status)
            except (UserError, OSError) as error:
                problem = str(error)
            places: dict[str, Path] = {}
            shown: dict[str, dict[str, Any]] = {}
            for status in found:
                name = self._name(Path(status.run))
                places[name] = Path(status.run)
                shown[name] = self._summary(name, status)
                problem = problem or status.queue
            self._cached = {run: value for run, value in self._cached.items() if run in places.values()}
            self._about = {run: value for run, value in self._about.items() if run in places.values()}
            with self._lock:
                before = self._shown
                changed = {name for name, each in shown.items() if before.get(name, (0, None))[1] != each}
                if changed or before.keys() - shown.keys() or problem != self.problem:
                    self.version += 1
                self._shown = {
                    name: (self.version, each) if name in changed else before[name] for name, each in shown.items()
                }
                self._places, self.problem = places, problem
        busy = any(status.job for status in found)  # SLURM is not to be asked all the time
        return max(15.0 if busy else 2.0, 5 * (time.monotonic() - began))

    def since(self, version: int) -> dict[str, Any]:
        """Return what has changed since a version: summaries of runs, the names of all, and the version now."""
        with self._lock:
            return {
                "version": self.version,
                "runs": [each for changed, each in self._shown.values() if changed > version],
                "names": [*self._shown],
                "problem": self.problem,
                "folder": one_line(self.folder),
            }

    def grown(self, sizes: dict[str, tuple[int, int]]) -> list[str]:
        """Return the names of runs that have written since `sizes` was filled, which is brought up to date."""
        with self._lock:
            places = dict(self._places)
        found = []
        for name, run in places.items():
            now = (_stamp(run / "metrics.jsonl")[0], _stamp(run / "heartbeat")[1])
            if sizes.setdefault(name, now) != now:
                sizes[name] = now
                found.append(name)
        return found

    def _name(self, run: Path) -> str:
        relative = os.path.relpath(run, self.folder)
        return hashlib.blake2b(os.fsencode(relative), digest_size=6).hexdigest()

    def _summary(self, name: str, status: Status) -> dict[str, Any]:
        run = Path(status.run)
        relative = os.path.relpath(run, self.folder)
        about = self._about_of(run) if status.state != OUTSIDE else {}
        content = as_json(status)
        for key in ("heartbeat_age_s", "run", "summary"):  # the first changes all the time, the last may be long
            content.pop(key, None)
        return {
            **content,
            "id": name,
            "name": one_line(run.name if relative == "." else relative),
            "alive": status.alive,
            **about,
        }

    def _about_of(self, run: Path) -> dict[str, Any]:
        """Return what the recipe says of a run in a word each, and when it was begun."""
        seen = (_stamp(run / "recipe.yaml"), _stamp(run / "attempts.jsonl"))
        cached = self._about.get(run)
        if cached is None or cached[0] != seen:
            about: dict[str, Any] = {}
            with suppress(UserError, OSError, ValueError):
                recipe = load_recipe(run / "recipe.yaml").recipe
                about |= {"recipe": recipe.name, "task": _word(recipe.task), "data": _word(recipe.data),
                          "model": _word(recipe.model)}  # fmt: skip
            with suppress(UserError, OSError, ValueError, TypeError):
                about["started"] = next(
                    (float(each["time"]) for each in RunDir(run).attempts() if "time" in each), None
                )
            cached = self._about[run] = (seen, about)
        written = _stamp(run / "metrics.jsonl")[1]
        return {**cached[1], "written": written / 1e9 if written else None}


def _word(section: Any) -> str:
    return str(getattr(section, "name", section) or "")


def _stamp(path: Path) -> tuple[int, int]:
    """Return a file's size and when it was written, zeros where there is none."""
    try:
        there = os.stat(path)
    except OSError:
        return (0, 0)
    return there.st_size, there.st_mtime_ns


class Watch:
    """A thread that looks at the runs while somebody does, and wakes whoever waits for what has changed."""

    def __init__(self, runs: Runs, *, every_s: float = 1.0):
        self.runs = runs
        self._every_s = every_s
        self._changed = threading.Condition()
        self._viewers = 0
        self._tick = 0
        self._grown: dict[str, int] = {}
        self._ended = False
        self._wanted = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch-runs", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        sizes: dict[str, tuple[int, int]] = {}
        due = 0.0
        while not self._ended:
            if self._viewers == 0:
                self._wanted.wait()
                self._wanted.clear()
                continue
            version = self.runs.version
            if time.monotonic() >= due:
                due = time.monotonic() + self.runs.look()
            grown = self.runs.grown(sizes)
            if grown or self.runs.version != version:
                with self._changed:
                    self._tick += 1
                    self._grown |= dict.fromkeys(grown, self._tick)
                    self._changed.notify_all()
            time.sleep(self._every_s)

    def changes(self, ended: Callable[[], bool]) -> Iterator[dict[str, Any] | None]:
        """Yield what has changed, from everything at first; None where nothing has for 15 s. Until `ended`."""
        with self._changed:
            self._viewers += 1
            tick = self._tick
        self._wanted.set()
        version = 0
        try:
            if not self.runs.version:
                self.runs.look()
            while not ended() and not self._ended:
                found = self.runs.since(version)
                with self._changed:
                    grown = [name for name, at in self._grown.items() if at > tick]
                    tick = self._tick
                if found["version"] != version or grown:
                    version = found["version"]
                    yield {**found, "grown": grown}
                with self._changed:
                    quiet = self._tick == tick and not self._changed.wait(15)
                if quiet:
                    yield None
        finally:
            with self._changed:
                self._viewers -= 1

    def close(self) -> None:
        """End the thread, and whoever waits."""
        self._ended = True
        self._wanted.set()
        with self._changed:
            self._changed.notify_all()
