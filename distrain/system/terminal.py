"""Rich's consoles and tables, in which text from outside is text: see `distrain.system.output`."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import IO, Any

from rich import console, table
from rich.progress_bar import ProgressBar
from rich.text import Text

from distrain.system.output import lines, one_line


class Console(console.Console):
    """A console that obeys nothing it is given to print: no markup, no emoji codes, no highlighting, no controls."""

    def __init__(self, *, file: IO[str] | None = None, width: int | None = None):
        file = file or sys.stdout
        # a notebook's kernel asks for colours by variables, and shows what Rich then writes to it
        terminal = bool(getattr(file, "isatty", lambda: False)())
        super().__init__(
            file=file, width=width, markup=False, emoji=False, highlight=False, force_terminal=terminal,
            force_jupyter=False,
        )  # fmt: skip

    def holds(self, shown: table.Table) -> bool:
        """Whether a table is no wider than the console, with each cell on one line."""
        return self.measure(shown, options=self.options.update(width=10_000)).maximum <= self.width

    def print(self, *objects: Any, **options: Any) -> None:
        for each in objects:
            if isinstance(each, Table) and each.headline:
                self.say(each.headline)
        super().print(*(Text(lines(each)) if isinstance(each, str) else each for each in objects), **options)

    def say(self, text: str) -> None:
        """Print one line; a terminal that is too narrow wraps it between words, below its text."""
        said = one_line(text)
        if self.is_terminal and len(said) > self.width:
            said = "\n".join(_wrapped(said, self.width))
        # a word that is longer than a line, mostly a path, is left to the terminal, which copies it in one piece
        super().print(Text(said), soft_wrap=True)


def _wrapped(text: str, width: int) -> list[str]:
    start = text[: len(text) - len(text.lstrip())]
    named, gap, _ = text.lstrip().partition("  ")
    deeper = len(start)
    if gap and start and len(named) < 12:  # `  name     what is said of it`
        deeper = len(text) - len(text[len(start) + len(named) :].lstrip())
    following = " " * (deeper if deeper > len(start) else len(start) + 2)
    return textwrap.wrap(
        text.lstrip(),
        width,
        initial_indent=start,
        subsequent_indent=following,
        break_long_words=False,
        break_on_hyphens=False,
        drop_whitespace=True,
    )


class Table(table.Table):
    """A table whose title, columns and cells are one line of text each."""

    def __init__(self, *, title: str | None = None, **options: Any):
        super().__init__(**options)
        self.headline = title
        """Printed above the table; as a title of Rich's it would be broken to the width of the columns."""

    def add_column(self, header: Any = "", *rest: Any, **options: Any) -> None:
        options.setdefault("overflow", "fold")  # what does not fit is wrapped, not cut off
        super().add_column(_text(header), *rest, **options)

    def add_row(self, *cells: Any, **options: Any) -> None:
        super().add_row(*map(_text, cells), **options)


class ProgressLine:
    """A progress line: what matters most comes first, and what does not fit is dropped.

    It is laid out for the width that the terminal has at each refresh.
    """

    _GAP, _LEAST, _MOST = 2, 8, 24
    """Columns between parts, and of the bar."""

    def __init__(self, done: int, total: int, parts: Callable[[], list[str]]):
        """`parts` returns what to tell beside the bar, the most important first; called at each refresh."""
        self.done, self.total = done, total
        self._parts = parts

    def text(self) -> str:
        """Return it as a line of text, for a notebook."""
        filled = round(self._MOST * self.done / max(self.total, 1))
        first, *others = self._parts()
        return (" " * self._GAP).join([first, "█" * filled + "░" * (self._MOST - filled), *others])

    def __rich_console__(self, of: console.Console, options: console.ConsoleOptions) -> Iterator[Any]:
        parts = self.fitting(self._parts(), options.max_width)
        line = table.Table.grid(padding=(0, self._GAP))
        room = options.max_width - sum(len(part) + self._GAP for part in parts)
        # colours of the terminal's own: what is left is fainter than what is done on light and on dark
        bar = ProgressBar(
            self.total, self.done, width=min(room, self._MOST),
            style="bright_black", complete_style="bold cyan", finished_style="green",
        ) if room >= self._LEAST else None  # fmt: skip
        cells: list[Any] = [Text(parts[0]), *([bar] if bar is not None else []), *map(Text, parts[1:])]
        for _ in cells:
            line.add_column(no_wrap=True, overflow="crop")
        line.add_row(*cells)
        yield line

    def fitting(self, parts: list[str], width: int) -> list[str]:
        """Return the first of `parts`, and of the others as many as fit beside it in order."""
        kept, used = parts[:1], len(parts[0])
        for part in parts[1:]:
            if used + self._GAP + len(part) > width:
                break
            kept.append(part)
            used += self._GAP + len(part)
        return kept


def notebook_line() -> Callable[[str], None] | None:
    """Return a function that shows a line in the notebook's cell, in place of the one before; None in no notebook."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if getattr(shell, "kernel", None) is None:
        return None
    from IPython.display import display

    handle = display({"text/plain": ""}, raw=True, display_id=True)
    return lambda text: handle.update({"text/plain": one_line(text)}, raw=True)


def _text(cell: Any) -> Any:
    return Text(one_line(cell)) if isinstance(cell, str) else cell
