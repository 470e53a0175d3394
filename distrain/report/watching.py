"""`distrain watch`: runs on a terminal as they go, read from their folders alone, drawn by textual."""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.widgets import DataTable, Footer, Static

from distrain.config.strategies import describe_strategy
from distrain.report.history import History, downsampled
from distrain.report.logs import follow, log_file
from distrain.report.status import STATES, Status, statuses
from distrain.report.text_curves import draw
from distrain.run.folder import RunDir
from distrain.run.heartbeat import Heartbeat, at_this_moment, read_heartbeats
from distrain.system.errors import UserError
from distrain.system.numbers import number
from distrain.system.output import one_line
from distrain.training.callbacks.trackers import clock, duration

_REFRESH_S, _ASK_S = 1.0, 5.0
"""Seconds between looks at a run's files, and between questions to the queue."""
_LOG_LINES = 200


@dataclass
class Seen:
    """What is known of the run that is shown."""

    history: History
    beats: list[Heartbeat] = field(default_factory=list)
    log: list[str] = field(default_factory=list)

    def look(self) -> None:
        """Read what is new in its folder."""
        self.history.refresh()
        self.beats = [at_this_moment(beat) for beat in read_heartbeats(self.history.run)]
        try:
            last = deque(follow(log_file(self.history.run.path), _LOG_LINES, None), maxlen=64)
            self.log = [short_line(line) for line in "".join(last).splitlines()[-_LOG_LINES:]]
        except (UserError, OSError) as error:
            self.log = [str(error)]


def curve_names(history: History) -> list[str]:
    """Return the curves that can be shown, those that matter most first."""
    first = ["train/loss"]
    splits = [name for name in history.names if not name.startswith(("train/", "final/"))]
    rest = [name for name in history.names if name.startswith("train/") and name not in first]
    return [*(name for name in first if name in history.names), *splits, *rest]


def headline(status: Status, width: int) -> str:
    """Return the state of a run and how far it is, on one line."""
    parts = [status.state]
    if status.total_steps:
        share = min(status.step / status.total_steps, 1.0)
        bar = max(min(width - 60, 30), 8)
        filled = round(share * bar)
        parts += [f"step {status.step:,}/{status.total_steps:,}", "█" * filled + "░" * (bar - filled), f"{share:.0%}"]
    else:
        parts.append(f"step {status.step:,}")
    if status.eta_s is not None:
        parts.append(f"{clock(status.eta_s)} left")
    if status.starts > 1:
        parts.append(f"{status.starts} starts")
    return "  ".join(parts)


def numbers(status: Status, history: History, width: int) -> str:
    """Return the latest numbers of a run that fit one line, the most important first."""

    def last(name: str) -> float | None:
        values = history.series(f"train/{name}").values
        return float(values[-1]) if len(values) else None

    shown = []
    for name, words in (
        ("loss", "loss {:.4g}"),
        ("samples_per_s", "{:,.0f} samples/s"),
        ("tokens_per_s", "{:,.0f} tokens/s"),
        ("mfu", "MFU {:.1%}"),
        ("data_wait", "waiting for data {:.0%}"),
        ("processes", ""),
        ("peak_memory_gib", "peak {:.2f} GiB"),
        ("reserved_memory_gib", "reserved {:.2f} GiB"),
    ):
        if name == "processes" and status.processes:
            strategy = describe_strategy(status.strategy or "?", status.replicate)
            shown.append("1 process" if status.processes == 1 else f"{status.processes} x {strategy}")
        elif words and (value := last(name)) is not None:
            shown.append(words.format(value))
    while len(shown) > 1 and len("  ".join(shown)) > width:
        shown.pop()
    return "  ".join(shown) or STATES[status.state]


_PREFIX = re.compile(r"\d{4}-\d\d-\d\d (\d\d:\d\d:\d\d),\d{3} rank \d+ (?:INFO )?")


def short_line(line: str) -> str:
    """Return a line of a rank's log without what each begins with; the time and a warning's level stay."""
    return _PREFIX.sub(r"\1  ", line, count=1) if _PREFIX.match(line) else line


def rank_rows(beats: list[Heartbeat]) -> list[tuple[str, ...]]:
    """Return a row for each rank, the furthest behind first: rank, host, step, phase, idle time, age of heartbeat."""
    return [
        (
            str(beat.rank),
            one_line(beat.host),
            f"{beat.step:,}",
            beat.where() if beat.stalled is None else f"hangs in {beat.where()}",
            duration(beat.idle),
            f"{duration(beat.age_s())} ago",
        )
        for beat in sorted(beats, key=lambda beat: (beat.stalled is None, beat.place, beat.rank))
    ]


class Watch(App[None]):
    """A terminal dashboard of one run, or of those in a folder with the chosen one below their list."""

    TITLE = "distrain watch"
    ENABLE_COMMAND_PALETTE = False
    CSS = """
    #runs { height: auto; max-height: 40%; }
    #head { text-style: bold; }
    #head, #numbers, #message, #title { height: 1; }
    #message { color: $error; }
    #title { color: $text-muted; }
    Static { text-wrap: nowrap; text-overflow: ellipsis; }
    #curve { height: 1fr; min-height: 5; }
    #ranks { height: auto; max-height: 25%; }
    #log { height: 25%; min-height: 3; border-top: solid $surface-lighten-2; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "quit", "quit"),
        Binding("n,right", "curve(1)", "next curve"),
        Binding("p,left", "curve(-1)", "previous"),
        Binding("j", "run(1)", "next run"),
        Binding("k", "run(-1)", "previous run"),
        Binding("l", "light", "light/dark"),
    ]

    def __init__(self, folder: Path):
        """`folder`: a run, a sweep, or a folder that holds them. Raises UserError where it holds none."""
        super().__init__()
        self._folder = folder
        self._found = statuses(folder)
        if not self._found:
            raise UserError(f"{folder} holds no runs; name the folder of a run, or one that holds runs")
        self._several = not RunDir(folder).exists
        self._chosen = next((each.run for each in self._found if each.alive), self._found[0].run)
        self._seen: Seen | None = None
        self._curve = 0
        self._asked = time.monotonic()

    def compose(self) -> ComposeResult:
        """Lay it out."""
        with Vertical():
            if self._several:
                yield DataTable(id="runs", cursor_type="row", show_cursor=True)
            yield Static(id="head")
            yield Static(id="numbers")
            yield Static(id="message")
            yield Static(id="title")
            yield Static(id="curve")
            yield DataTable(id="ranks", cursor_type="none", show_cursor=False)
            yield Static(id="log")
        yield Footer()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Whether a key does something: one run has no next one."""
        return self._several if action == "run" else True

    def on_mount(self) -> None:
        """Begin to look."""
        self.query_one("#ranks", DataTable).add_columns("rank", "host", "step", "does", "idle", "alive")
        if self._several:
            table = self.query_one("#runs", DataTable)
            table.add_columns("run", "state", "step", "left", "loss", "score")
        self.run_worker(self._look, thread=True, exclusive=True, exit_on_error=True)
        self.set_interval(_REFRESH_S, self._begin_to_look)

    def _begin_to_look(self) -> None:
        if not any(worker.is_running for worker in self.workers):  # of a slow file system there is one look at a time
            self.run_worker(self._look, thread=True, exit_on_error=True)

    def _look(self) -> None:
        if time.monotonic() - self._asked > _ASK_S:
            self._found = statuses(self._folder) or self._found
            self._asked = time.monotonic()
        chosen = self._chosen
        seen = self._seen
        if seen is None or str(seen.history.run.path) != str(Path(chosen).absolute()):
            seen = Seen(History(chosen))
        seen.look()
        self._seen = seen
        self.call_from_thread(self._show)

    # ----------------------------------------------------------------------------------------------------------------

    def _show(self) -> None:
        seen = self._seen
        status = next((each for each in self._found if each.run == self._chosen), self._found[0])
        if self._several:
            self._show_runs()
        if seen is None:
            return
        width = self.size.width
        self._say("head", f"{Path(status.run).name}  {headline(status, width)}")
        self._say("numbers", numbers(status, seen.history, width))
        self._say("message", status.message or "")
        self.query_one("#message").display = bool(status.message)
        self._show_curve(seen.history)
        table = self.query_one("#ranks", DataTable)
        table.display = bool(seen.beats) and status.alive
        _fill(table, rank_rows(seen.beats) if status.alive else [])
        log = self.query_one("#log", Static)
        self._say("log", *seen.log[-max(log.size.height, 1) :])

    def _show_runs(self) -> None:
        rows = [
            (
                Path(each.run).name if self._folder in Path(each.run).parents else each.run,
                each.state,
                f"{each.step:,}" + (f"/{each.total_steps:,}" if each.total_steps else ""),
                duration(each.eta_s) if each.eta_s is not None else "",
                number(each.loss) if isinstance(each.loss, int | float) else str(each.loss or ""),
                f"{each.score['metric']} {number(each.score['value'])}"
                if each.score and isinstance(each.score["value"], int | float)
                else "",
            )
            for each in self._found
        ]
        table = self.query_one("#runs", DataTable)
        _fill(table, rows)
        table.move_cursor(row=next(i for i, each in enumerate(self._found) if each.run == self._chosen))

    def _show_curve(self, history: History) -> None:
        names = curve_names(history)
        place = self.query_one("#curve", Static)
        if not names:
            self._say("title", "no numbers yet")
            self._say("curve")
            return
        name = names[self._curve % len(names)]
        steps, values, _ = history.series(name)
        width, height = max(place.size.width, 20), max(place.size.height, 4)
        x, y = downsampled(steps, values, max(8, width * 2))
        last = f"{values[-1]:.4g}" if len(values) else ""
        self._say("title", f"{name} {last} by step   curve {self._curve % len(names) + 1} of {len(names)}")
        self._say("curve", *draw(x, y, width, height))

    def _say(self, where: str, *lines: str) -> None:
        """Show lines as plain text: names, messages and logs of runs are obeyed by nothing."""
        self.query_one(f"#{where}", Static).update(Text("\n".join(map(one_line, lines))))

    # ----------------------------------------------------------------------------------------------------------------

    def action_curve(self, by: int) -> None:
        """Show another curve."""
        self._curve += by
        self._show()

    def action_light(self) -> None:
        """Show light colours in place of dark ones, or the other way."""
        self.theme = "textual-light" if self.current_theme.dark else "textual-dark"

    def action_run(self, by: int) -> None:
        """Show another run."""
        places = [each.run for each in self._found]
        self._choose(places[(places.index(self._chosen) + by) % len(places)])

    def on_data_table_row_selected(self, event: Any) -> None:
        """Show the run that was chosen in the list."""
        if event.data_table.id == "runs":
            self._choose(self._found[event.cursor_row].run)

    def _choose(self, run: str) -> None:
        self._chosen, self._curve = run, 0
        self._begin_to_look()

    def on_resize(self) -> None:
        """Draw for the new size."""
        if self._seen is not None:
            self.call_after_refresh(self._show)


def _fill(table: DataTable[Any], rows: Sequence[tuple[str, ...]]) -> None:
    cells = [tuple(Text(one_line(cell)) for cell in row) for row in rows]
    if table.row_count != len(cells):
        table.clear()
        for row in cells:
            table.add_row(*row)
        return
    columns = list(table.columns)
    for key, row in zip(list(table.rows), cells, strict=True):
        for column, cell in zip(columns, row, strict=True):
            if table.get_cell(key, column) != cell:
                table.update_cell(key, column, cell, update_width=True)
