"""Text on its way out: to a terminal, a log, a status, a CSV file. Imports nothing of distrain, and nothing slow.

Names of classes, files and metrics, errors of the user's code and what other machines say are data: they may hold what
a terminal obeys (escape sequences), what reads backwards or not at all (bidirectional and zero-width controls), what
begins a line of its own, half a character (a path that is not UTF-8), and what a spreadsheet computes. All of it is
shown as Python writes it, `\\x1b`, and nothing is dropped. Nothing is printed, logged or written as CSV but through
here and `distrain.system.terminal`; a test holds it.
"""

from __future__ import annotations

import logging
import re
import sys
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

_OBEYED = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode's categories of control and format characters, surrogates, and ends of lines and paragraphs."""
_COMPUTED = ("=", "+", "-", "@", "＝", "＋", "－", "＠")  # spreadsheets take the wide ones as well
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", re.ASCII)


class _Escapes(dict[int, str]):
    """What a character is shown as, by its number; found out when it is first met."""

    def __missing__(self, code: int) -> str:
        shown = chr(code)
        if 0xDC80 <= code <= 0xDCFF:
            shown = f"\\x{code - 0xDC00:02x}"  # a byte of a path that is not UTF-8, as Python hands it on
        elif unicodedata.category(shown) in _OBEYED:
            shown = ascii(shown)[1:-1]
        self[code] = shown
        return shown


_ONE_LINE, _LINES = _Escapes(), _Escapes({ord("\n"): "\n", ord("\t"): "\t"})


def one_line(text: object) -> str:
    r"""Return `text` with all that is no plain text escaped, line ends and tabs too: 'a\x1b[2J', 'caf\xe9'."""
    said = str(text)
    return said if said.isascii() and said.isprintable() else said.translate(_ONE_LINE)


def lines(text: object, indent: str = "") -> str:
    """Return `text` with its lines kept and everything else escaped; each after the first begins with `indent`."""
    said = str(text)
    if not (said.isascii() and said.isprintable()):
        said = said.translate(_LINES)
    return re.sub(rf"\n(?!{indent}|\n|$)", f"\n{indent}", said) if indent else said


def in_utf8(text: str) -> str:
    """Return `text` with what UTF-8 cannot hold escaped: bytes of a path that is not UTF-8, halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return "".join(letter if letter.isprintable() or letter in "\n\t" else one_line(letter) for letter in text)
    return text


def error_line(error: BaseException) -> str:
    """Return an error of somebody else's code on one line: its type and what it says."""
    return one_line(f"{type(error).__name__}: {error}")


# --------------------------------------------------------------------------------------------------------------------
# The terminal


def prepare_streams() -> None:
    """Let standard output and error take any text, whatever their encoding: what it lacks is written as an escape."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def echo(text: object = "", *, error: bool = False, end: str = "\n") -> None:
    """Print lines of ours; what others have put into them is plain text."""
    print(lines(text), end=end, file=sys.stderr if error else sys.stdout, flush=True)


def echo_error(text: object, who: str = "") -> None:
    """Print an error: every line after the first is indented, so that none of it passes for something that we say."""
    print(error_text(text, who), file=sys.stderr, flush=True)


def echo_loading(*, on_terminal: bool) -> None:
    """Print that PyTorch is being loaded, before imports that take seconds: for people, so on standard error.

    On a terminal it is printed at once; in a log, where nobody waits, behind what can be wrong with the recipe alone.
    """
    if sys.stderr.isatty() == on_terminal:
        echo("loading PyTorch", error=True)


def error_text(text: object, who: str = "") -> str:
    """Return what `echo_error` prints; `who` stands before the colon, as in `error (rank 1): …`."""
    said = str(text).rstrip("\n")
    return f"error{who}:{'' if said.startswith(chr(10)) else ' '}{lines(said, '  ')}"


class LogFormatter(logging.Formatter):
    """A record as `TIME rank N LEVEL text`; further lines are indented, so that none of them passes for a record."""

    def __init__(self, rank: int = 0) -> None:
        super().__init__(f"%(asctime)s rank {rank} %(levelname)s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        return lines(super().format(record).rstrip("\n"), "    ")


# --------------------------------------------------------------------------------------------------------------------
# Tables for spreadsheets


def csv_cell(text: str) -> str:
    r"""Return text as a cell that shows it: a spreadsheet would compute '=1+1', so that becomes "'=1+1".

    Numbers stay ('-1.5'), and control characters are escaped ('a\nb').
    """
    cell = one_line(text)
    return f"'{cell}" if cell.startswith(_COMPUTED) and not _NUMBER.fullmatch(cell) else cell


def write_csv(table: pd.DataFrame, path: Path, *, append: bool = False) -> None:
    """Write a table as CSV, in UTF-8; each cell and each column name that is text is a `csv_cell`.

    `append`: its rows follow those of a table with the same columns.
    """

    def cell(value: Any) -> Any:
        return csv_cell(value) if isinstance(value, str) else value

    safe = table.rename(columns=cell)
    for place, kind in enumerate(safe.dtypes):
        if getattr(kind, "kind", "O") not in "biufcmM":  # no numbers, truth values or times
            safe.isetitem(place, safe.iloc[:, place].map(cell))
    safe.to_csv(path, index=False, encoding="utf-8", mode="a" if append else "w", header=not append)
