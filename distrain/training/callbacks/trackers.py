"""Where a run's numbers go: metrics.jsonl first, and from its rows the progress display, wandb and TensorBoard.

metrics.jsonl is the plain truth. The other two are mirrors of it: a resumed run fills in whatever they lack, so they
hold every row once however often the run was killed. A mirror that fails is given up with one warning; training goes
on.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.live import Live

from distrain.config import Component, Recipe, UserError
from distrain.config.arguments import argument_problems
from distrain.config.registry import trackers
from distrain.run.media import cut_media
from distrain.run.metrics_file import MetricsFile
from distrain.system.environment import is_quiet
from distrain.system.logs import leave_console, show_on_terminal
from distrain.system.numbers import counted, number
from distrain.system.output import error_line
from distrain.system.terminal import Console, ProgressLine, Table, notebook_line
from distrain.training.callbacks.base import Callback, CallbackRun, Outcome
from distrain.training.callbacks.tracker import Row, Tracker, TrackerStart

logger = logging.getLogger(__name__)


class Display:
    """What a person sees: a bar with the latest numbers on a terminal or in a notebook, otherwise lines."""

    def __init__(self, total_steps: int, start_step: int):
        self._total = total_steps
        self._first = start_step
        self._start = time.monotonic()
        self._last_line = float("-inf")
        self._numbers: list[str] = []
        self._seen = deque([(self._start, start_step)], maxlen=50)  # when a step was done, of the last rows
        self.console = Console()
        show_on_terminal(converses=True, console=self.console)  # above the line of progress
        self._live: Live | None = None
        self._line = ProgressLine(start_step, total_steps, self._parts)
        self._notebook = notebook_line()
        if self._notebook is None and self.console.is_terminal and not self.console.is_dumb_terminal:
            self._live = Live(self._line, console=self.console, refresh_per_second=10)
            self._live.start()

    def _parts(self) -> list[str]:
        """Return what the progress line shows, the most important first."""
        (first, begun), (last, done) = self._seen[0], self._seen[-1]
        left = "-:--"
        if done > begun:
            seconds = (last - first) / (done - begun) * (self._total - done) - (time.monotonic() - last)
            left = clock(max(seconds, 0.0))
        return [f"step {done:,}/{self._total:,}", f"{left} left", *self._numbers]

    def train(self, row: Row) -> None:
        """Show a row of training numbers."""
        now, last = time.monotonic(), row["step"] == self._total
        if self._live is None and self._notebook is None and not last and now - self._last_line < 1:
            return  # on a log file a line a second says enough
        loss, rate = f"loss {number(row['loss'])}", f"{row['samples_per_s']:,.0f} samples/s"
        # of several optimizers lr/NAME
        lr = "  ".join(f"{key} {row[key]:.3g}" for key in row if key.partition("/")[0] == "lr")
        waiting = f"waiting for data {row['data_wait']:.0%}"
        more = [f"{row['tokens_per_s']:,.0f} tokens/s"] if "tokens_per_s" in row else []
        more += [f"MFU {row['mfu']:.1%}"] if "mfu" in row else []
        if "reserved_memory_gib" in row:  # of a GPU: there it is what a run may lack
            more.append(f"{row['peak_memory_gib']:.1f} of {row['reserved_memory_gib']:.1f} GiB")
        if self._live is not None or self._notebook is not None:
            self._numbers = [loss, rate, *more, lr, waiting]
            if row["step"] < self._seen[-1][1]:
                self._seen.clear()  # the run has gone back
            self._seen.append((now, row["step"]))
            self._line.done = row["step"]
            if self._notebook is not None and (last or now - self._last_line >= 0.2):
                self._last_line = now
                self._notebook(self._line.text())
            return
        numbers = "  ".join([loss, lr, rate, *more, waiting])
        self._last_line, done = now, row["step"] - self._first
        left = (now - self._start) / done * (self._total - row["step"]) if done else 0.0
        self.console.say(f"step {row['step']}/{self._total}  epoch {row['epoch']:.2f}  {numbers}  ETA {duration(left)}")
        sys.stdout.flush()

    def close(self) -> None:
        """Leave the terminal in order."""
        leave_console(self.console)
        if self._notebook is not None:
            self._notebook(self._line.text())
        if self._live is not None:
            self._live.stop()
            self._live = None


def duration(seconds: float) -> str:
    """Return seconds as people write them: 42s, 3m10s, 2h05m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def clock(seconds: float) -> str:
    """Return seconds as a clock shows them: 0:42, 3:10, 2:05:00."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


def named_trackers(recipe: Recipe) -> dict[str, Component]:
    """Return what a recipe asks for besides metrics.jsonl, by the name that the run has for it.

    Raises UserError where two have the same.
    """
    usual = {"wandb": recipe.log.wandb != "off", "tensorboard": recipe.log.tensorboard}
    items = [Component(name=name) for name, wanted in usual.items() if wanted] + list(recipe.log.trackers)
    found: dict[str, Component] = {}
    for item in items:
        name = item.name.rpartition(":")[2]
        if name in found:
            raise UserError(f"log.trackers: {name!r} is there twice; remove one")
        found[name] = item
    return found


def check_trackers(recipe: Recipe) -> list[str]:
    """Return one line for each tracker that is none, and for each of its arguments that it does not take or lacks."""
    problems: list[str] = []
    try:
        named = named_trackers(recipe)
    except UserError as error:
        return [str(error)]
    for item in named.values():
        try:
            build = trackers.find(item.name).value
        except UserError as error:
            problems += str(error).splitlines()
            continue
        if not (inspect.isclass(build) and issubclass(build, Tracker)):
            problems.append(f"log.trackers: {item.name!r} is {build!r}; expected a subclass of {Tracker.__name__}")
            continue
        if build.package is not None and importlib.util.find_spec(build.package) is None:
            problems.append(
                f"log.trackers: {item.name!r} needs {build.package}, which is not installed: "
                f"pip install 'distrain[{build.package}]'"
            )
            continue
        given = list(inspect.signature(build).parameters)[:1]
        problems += argument_problems(build, item.args, "log.trackers", repr(item.name), given=given)
    return problems


def _made(item: Component, name: str, start: TrackerStart) -> Tracker:
    made: Tracker = trackers.find(item.name).value(start, **item.args)
    made.name = name
    return made


class MetricsLog(Callback):
    """Writes the rows of metrics.jsonl, on rank 0."""

    asks = False

    def __init__(self) -> None:
        self.rows: MetricsFile | None = None
        self.written: Mapping[str, Any] | None = None
        """The row that came last, where it was not there already."""
        self._history: Mapping[str, Any] = {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what is known of the rows that were there when the checkpoint was saved."""
        self._history = state

    def state_dict(self) -> dict[str, Any]:
        """Rank 0: return what a checkpoint keeps for the attempt that resumes from it."""
        assert self.rows is not None, "on_start opens it"
        return self.rows.settled(self._run.step)

    def on_start(self, run: CallbackRun) -> None:
        """Open the file, without rows of steps that are to be trained again."""
        self._run = run
        if run.rank != 0:
            return
        run.context.fence()
        cut_media(run.folder, run.step)
        finals = [step for step in self._history.get("finals", ()) if type(step) is int]
        self.rows = MetricsFile(
            run.context.run.metrics_path,
            resume_step=run.step,
            finals=finals,
            counted=self._history.get("rows"),
            fence=run.context.fence,
        )

    def on_row(self, row: Mapping[str, Any]) -> None:
        """Append it, unless its event and step are there."""
        assert self.rows is not None, "on_start opens it"
        self.written = row if self.rows.append(dict(row)) else None

    def on_close(self, outcome: Outcome) -> None:
        """Close the file."""
        if self.rows is not None:
            self.rows.close()


class Terminal(Callback):
    """Shows progress, with what is logged above it, and the summary of a finished run; on rank 0."""

    asks = False

    def __init__(self) -> None:
        self.display: Display | None = None

    def on_start(self, run: CallbackRun) -> None:
        """Begin the line of progress."""
        if run.rank == 0 and not is_quiet():
            self.display = Display(run.context.total_steps, run.step)

    def on_row(self, row: Mapping[str, Any]) -> None:
        """Show a row of training numbers."""
        if self.display is not None and row["event"] == "train":
            self.display.train(dict(row))

    def on_close(self, outcome: Outcome) -> None:
        """Show the summary of a finished run in place of the progress, and leave the terminal in order."""
        if self.display is None:
            return
        self.display.close()
        if outcome.summary is not None:
            show_summary(dict(outcome.summary), self.display.console)


class Trackers(Callback):
    """Mirrors metrics.jsonl in wandb, TensorBoard and those of `log.trackers`, on rank 0.

    Each gets the rows that MetricsLog, which comes before, has written. One that fails is given up with a warning.
    """

    asks = False

    def __init__(self, log: MetricsLog) -> None:
        self._log = log
        self.mirrors: list[Tracker] = []
        self._history: dict[str, Any] = {}
        self._count = 0

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up how far each had come when the checkpoint was saved."""
        self._history = dict(state)

    def state_dict(self) -> dict[str, Any]:
        """Rank 0: return how far each has come."""
        marks = {}
        for mirror in list(self.mirrors):
            try:
                marks[mirror.name] = mirror.mark()
            except Exception as error:
                self._give_up(mirror.name, error)
        return {"mirrors": marks}

    def on_start(self, run: CallbackRun) -> None:
        """Open those that the recipe asks for, and give them the rows that they lack."""
        self._run, rows = run, self._log.rows
        if rows is None:
            return
        context = run.context
        marks = self._history.get("mirrors") or {}
        config = run.recipe.model_dump(mode="json", by_alias=True)
        for name, item in named_trackers(run.recipe).items():
            try:
                start = TrackerStart(context.run, run.recipe, config, rows, run.step, marks.get(name))
                mirror = _made(item, name, start)
                missing = mirror.missing(rows, self._history)
                for index, row in enumerate(context.run.rows()) if missing is None else missing:
                    mirror.write(index, row)
            except Exception as error:
                self._give_up(name, error)
            else:
                self.mirrors.append(mirror)

    def _give_up(self, name: str, error: Exception) -> None:
        # whatever a tracker raises, the run matters more; it is logged once, and metrics.jsonl has every row
        self.mirrors = [each for each in self.mirrors if each.name != name]
        logger.warning(f"{name} failed and is off for the rest of this run: {error_line(error)}")

    def on_row(self, row: Mapping[str, Any]) -> None:
        """Give the row to each, where MetricsLog has written it."""
        rows = self._log.rows
        if rows is None or self._log.written is not row:
            return
        for mirror in list(self.mirrors):
            try:
                mirror.write(rows.count - 1, dict(row))  # counted once, and from then on as they are written
            except Exception as error:
                self._give_up(mirror.name, error)

    def on_end(self, outcome: Outcome) -> None:
        """Give each what it is to keep of a finished run."""
        if outcome.summary is None:
            return
        files = self._artifacts(outcome.summary)
        for mirror in list(self.mirrors):
            try:
                mirror.finish(files)
            except Exception as error:
                self._give_up(mirror.name, error)

    def _artifacts(self, summary: Mapping[str, Any]) -> dict[str, Path]:
        context, kept = self._run.context, self._run.recipe.log.artifacts
        files: dict[str, Path] = {}
        if kept != "none":
            files["model"] = Path(summary["model"])
        if kept == "checkpoints":
            files["final"] = context.run.checkpoint(context.state.saved_step)
            if best := summary.get("best"):
                files["best"] = context.run.checkpoint(best["step"])
        return {name: path for name, path in files.items() if path.exists()}

    def on_close(self, outcome: Outcome) -> None:
        """Flush and close each."""
        for mirror in list(self.mirrors):
            try:
                mirror.close()
            except Exception as error:
                self._give_up(mirror.name, error)


def show_summary(summary: dict[str, Any], console: Console) -> None:
    """Print how a finished run went."""
    processes = (
        "1 process" if summary["processes"] == 1 else f"{summary['processes']} processes ({summary['strategy']})"
    )
    title = f"{summary['name']}: {counted(summary['steps'], 'step')} in {duration(summary['seconds'])}, {processes}"
    table = Table(title=title, show_header=False)
    for name, value in summary["test"].items():
        if isinstance(value, int | float):
            table.add_row(f"test {name}", number(value))
    if best := summary["best"]:
        table.add_row(f"best {best['metric']}", f"{number(best['value'])} at step {best['step']:,}")
    table.add_row("samples/s", f"{summary['samples_per_s']:,.0f}")
    console.print(table)
    # outside the table, which would break a long path
    console.say(f"model ({summary['exported']}): {summary['model']}")
