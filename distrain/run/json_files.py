"""JSON on disk: files that are replaced atomically, and files of one row a line, read from either end."""

from __future__ import annotations

import json
import math
import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from distrain.system import bounded_json as bounded
from distrain.system.errors import UserError
from distrain.system.output import in_utf8


def fsync(path: Path) -> None:
    """Wait until a file, or what a folder lists, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Write `text` to `path` so that a crash leaves the old content or the new, never a part of it."""
    # a folder may be shared by machines whose processes have the same numbers
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, value: Any, *, indent: int | None = 2) -> None:
    """Write a value as JSON, atomically."""
    write_atomically(path, json.dumps(json_safe(value), indent=indent) + "\n")


def json_safe(value: Any) -> Any:
    """Return `value` with what JSON cannot hold as text that every reader takes: NaN, infinities, half characters."""
    if isinstance(value, dict):
        return {in_utf8(key) if isinstance(key, str) else key: json_safe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return in_utf8(value) if isinstance(value, str) else value


# --------------------------------------------------------------------------------------------------------------------
# Rows


def row_line(row: dict[str, Any]) -> bytes:
    """Return a row as a line of JSON, of what `json_safe` makes of it."""
    with suppress(ValueError):  # of NaN and infinities
        line = json.dumps(row, allow_nan=False)
        if "\\ud" not in line:  # of half a character, or of one that takes two
            return line.encode() + b"\n"
    return json.dumps(json_safe(row)).encode() + b"\n"


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file of JSON lines, none where there is no file; a last line without its end is skipped."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        number = 0
        while (line := file.readline(bounded.ROW + 1)).endswith(b"\n"):
            number += 1
            yield parse_row(line, f"{path}:{number}")
        if len(line) > bounded.ROW:
            raise UserError(f"{path}:{number + 1} has more than {bounded.ROW:,} bytes; take that line out of the file")


def parse_row(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = bounded.parse_json(line)
        if not isinstance(row, dict):
            raise ValueError("it is not an object")
    except ValueError as error:
        raise UserError(f"{where} is not JSON: {error}; take that line out of the file") from error
    return row


def metrics_row(row: dict[str, Any], path: Path) -> dict[str, Any]:
    step = row.get("step")
    if not isinstance(row.get("event"), str) or type(step) is not int or not 0 <= step < bounded.MOST_STEPS:
        raise UserError(
            f"{path}: a row says event {str(row.get('event'))[:40]!r} and step {str(step)[:40]}; expected a word and a "
            "number of steps; take that line out of the file"
        )
    return row


BLOCK = 1 << 16


def lines_backwards(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, line) of the lines of a file, the last one first; a last line without its end is skipped.

    Reads no more than is consumed.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        position, carry = file.seek(0, os.SEEK_END), b""
        while position:
            step = min(position, max(BLOCK, len(carry)))
            position -= step
            data = os.pread(file.fileno(), step, position) + carry
            *parts, torn = data.split(b"\n")
            if not parts:
                carry = data
            else:
                end = position + len(data) - len(torn)
                while len(parts) > 1:
                    line = parts.pop() + b"\n"
                    end -= len(line)
                    yield end, line
                carry = parts[0] + b"\n"
            if len(carry) > bounded.ROW:
                raise UserError(f"{path} has a line of more than {bounded.ROW:,} bytes; take it out of the file")
        if carry.endswith(b"\n"):
            yield 0, carry


def rows_backwards(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file of JSON lines, the last one first, reading no more than is consumed."""
    for offset, line in lines_backwards(path):
        yield parse_row(line, f"{path} at byte {offset}")


def end_of_rows(path: Path) -> int:
    """Return the bytes of a file up to the end of its last whole line."""
    offset, line = next(lines_backwards(path), (0, b""))
    return offset + len(line)


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Add a row to a file of JSON lines, on disk when this returns; what a crash left of a last line is cut off."""
    with path.open("ab") as file:
        file.truncate(end_of_rows(path))
        file.write(row_line(row))
        file.flush()
        os.fsync(file.fileno())
