"""Where the lines of `logging` go: rank 0's terminal, and a file for each rank. Imports nothing slow.

A module has `logger = logging.getLogger(__name__)` and logs what it has to say; who sees it is decided here alone.
`show_on_terminal` and `write_to_file` may be called again, and `reset` undoes both. Without them a line is treated as
any library's: Python shows warnings and errors on standard error, and nothing else.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from distrain.system.environment import is_quiet, rank_told
from distrain.system.output import LogFormatter, echo, echo_error, lines

if TYPE_CHECKING:
    from distrain.system.terminal import Console

EACH_RANK = {"terminal": "each rank"}
"""`extra` of a line that no other rank knows: it is shown whatever the rank, with its number."""
FILE_ALONE = {"terminal": "none"}
"""`extra` of a line that is not shown."""

_OWN = __name__.partition(".")[0]
_OTHERS = ("", "py.warnings", "torch", "accelerate", "transformers", "DeepSpeed")
"""Whose warnings go into the file: the root's, and of those libraries that may keep their records from it."""


class _Handler(logging.Handler):
    """Writes a line that comes several times in a row once, and then how often it came."""

    def __init__(self) -> None:
        super().__init__()
        self._last: tuple[int, str] | None = None
        self._repeats = 0

    def emit(self, record: logging.LogRecord) -> None:
        seen = record.__dict__.setdefault("seen_by", set())
        if id(self) in seen:  # it has come by its library's logger, and comes by the root
            return
        seen.add(id(self))
        try:
            text = record.getMessage()
            if record.exc_info:
                text += "\n" + LogFormatter().formatException(record.exc_info)
            if self._last == (record.levelno, text):
                self._repeats += 1
                return
            self.end_repeats()
            self._last = (record.levelno, text)
            self.write(record, text)
        except Exception:
            self.handleError(record)

    def end_repeats(self) -> None:
        """Write how often the last line came again."""
        if self._last is not None and self._repeats:
            level, text = self._last
            again = f"{text.partition(chr(10))[0]} ({self._repeats} more time{'s' * (self._repeats > 1)})"
            self._repeats = 0
            self.write(logging.LogRecord(_OWN, level, "", 0, again, None, None), again)

    def write(self, record: logging.LogRecord, text: str) -> None:
        """Write the message and traceback of a record."""
        raise NotImplementedError

    def close(self) -> None:
        self.end_repeats()
        super().close()


class _Terminal(_Handler):
    """What a person sees. Warnings and errors begin with that word; those of one rank name it."""

    def __init__(self) -> None:
        super().__init__()
        self.console: Console | None = None
        """Where a progress line is: what is printed goes above it."""
        self.converses = False
        """Whether a person follows what the command does, on standard output; otherwise that is for its result."""
        self._process = os.getpid()

    def filter(self, record: logging.LogRecord) -> bool:
        where = getattr(record, "terminal", "rank 0")
        shown = where == "each rank" or (where == "rank 0" and rank_told() == 0)
        return shown and record.levelno >= (logging.INFO if self.converses else logging.WARNING)

    def write(self, record: logging.LogRecord, text: str) -> None:
        each = getattr(record, "terminal", "") == "each rank"
        who = f" (rank {rank_told()})" if each and os.environ.get("WORLD_SIZE", "1") != "1" else ""
        if record.levelno >= logging.ERROR:
            echo_error(text, who)
            return
        shown = lines(f"warning{who}: {text}" if record.levelno >= logging.WARNING else text, "  ")
        if each or not self.converses:
            echo(shown, error=True)
        elif self.console is None or os.getpid() != self._process:  # a forked process must not wait for its lock
            echo(shown)
        else:
            for line in shown.split("\n"):
                self.console.say(line)
            self.console.file.flush()


class _File(_Handler):
    """The log of a rank: time, rank and level before each line, and the names of libraries before theirs."""

    def __init__(self, path: Path, rank: int):
        super().__init__()
        self.file = logging.FileHandler(path, encoding="utf-8")
        self.file.setFormatter(LogFormatter(rank))

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= (logging.INFO if _is_own(record) else logging.WARNING)

    def write(self, record: logging.LogRecord, text: str) -> None:
        named = text if _is_own(record) else f"{record.name}: {text}"
        self.file.emit(logging.makeLogRecord(record.__dict__ | {"msg": named, "args": None, "exc_info": None}))

    def close(self) -> None:
        super().close()
        self.file.close()


class _Libraries(logging.Handler):
    """Shows warnings of libraries as Python does where the root has no handler, which it has for the file."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.WARNING and not _is_own(record) and record.name != "py.warnings"

    def emit(self, record: logging.LogRecord) -> None:
        logger: logging.Logger | None = logging.getLogger(record.name)
        while logger is not None:
            if any(not isinstance(handler, _Handler | _Libraries | logging.NullHandler) for handler in logger.handlers):
                return
            logger = logger.parent if logger.propagate else None
        echo(lines(self.format(record), "  "), error=True)


def _is_own(record: logging.LogRecord) -> bool:
    return record.name.partition(".")[0] == _OWN


_terminal: _Terminal | None = None
_file: _File | None = None
_libraries = _Libraries()


def show_on_terminal(*, converses: bool = False, console: Console | None = None) -> None:
    """Show what this process logs, where it is rank 0 or the line is one of each rank.

    `converses`: lines that are no warnings are shown too, all on standard output, unless the command is to be quiet.
    `console`: has a progress line.
    """
    global _terminal
    if _terminal is None:
        _terminal = _Terminal()
        _begin(_terminal)
    _terminal.converses = (_terminal.converses or converses) and not is_quiet()
    _terminal.console = console or _terminal.console


def leave_console(console: Console) -> None:
    """Show no more above a progress line that ends."""
    if _terminal is not None and _terminal.console is console:
        _terminal.console = None


def write_to_file(path: Path, rank: int) -> None:
    """Append what this process logs to a rank's file, with the warnings of Python and of other libraries."""
    global _file
    if _file is not None:
        _remove(_file)
    _file = _File(path, rank)
    _begin(_file)
    for name in _OTHERS:
        logging.getLogger(name).addHandler(_file)
    root = logging.getLogger()
    if _libraries not in root.handlers:
        root.addHandler(_libraries)
    logging.captureWarnings(True)


def reset() -> None:
    """Undo all of it."""
    global _terminal, _file
    if _file is not None:
        logging.captureWarnings(False)
        _remove(_file)
    if _terminal is not None:
        _remove(_terminal)
    _terminal = _file = None
    logging.getLogger().removeHandler(_libraries)
    own = logging.getLogger(_OWN)
    own.propagate = True
    own.setLevel(logging.NOTSET)


def _begin(handler: logging.Handler) -> None:
    own = logging.getLogger(_OWN)
    own.addHandler(handler)
    own.setLevel(logging.INFO)
    own.propagate = False  # what others give the root shows nothing of ours a second time


def _remove(handler: logging.Handler) -> None:
    for name in (_OWN, *_OTHERS):
        logging.getLogger(name).removeHandler(handler)
    handler.close()
