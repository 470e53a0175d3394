"""Strict, bounded reading of files that people and other programs can write.

A file that is too large is refused before it is read, so a corrupt one costs no memory.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from pathlib import Path
from typing import Any, TypeVar

_T = TypeVar("_T")

RECORD = 16 << 20
"""Largest size in bytes of a status file: launch.json, a heartbeat, an index."""
SUMMARY = 256 << 20
"""Largest size in bytes of FINISHED, which holds all metrics, and of files with a part for each tensor or class."""
ROW = 64 << 20
"""Largest size in bytes of a line of JSON."""
MOST_STEPS = 10**18
"""Steps are below this, so that names of checkpoints have at most 18 digits."""

_SUSPECT = re.compile(rb"[eE]\+?0*[1-9][0-9]{2}|[0-9]{19}")
"""Matches every number beyond a float or 64 bits (and some text)."""
_ALIKE = bytes.maketrans(b"123456789E", b"000000000e")


def open_regular(path: Path, flags: int = 0) -> int:
    """Open a regular file for reading; raises OSError, and ValueError for anything else."""
    # O_NONBLOCK: opening a pipe in a file's place must not wait for a writer
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | flags)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise ValueError("it is not a regular file")


def read_bounded(path: Path, most: int = RECORD) -> bytes:
    """Return the content of a regular file; raises OSError, and ValueError above `most` bytes."""
    with open(open_regular(path), "rb") as file:
        return read_open(file, most)


def read_open(file: Any, most: int) -> bytes:
    """Return the content of a binary file open at its start; raises ValueError above `most` bytes."""
    if (size := os.fstat(file.fileno()).st_size) > most:
        raise ValueError(f"it has {size:,} bytes, and at most {most:,} are expected")
    content: bytes = file.read(most + 1)  # it may have grown since
    if len(content) > most:
        raise ValueError(f"it has more than the {most:,} bytes that are expected at most")
    return content


def parse_json(raw: bytes) -> Any:
    """Return the value of JSON text; raises ValueError, also for duplicate keys, NaN, infinities such as 1e999, and
    integers beyond 64 bits."""
    decoder = _SUSPICIOUS if _is_suspect(raw) else _DECODER
    try:
        return decoder.decode(raw.decode())
    except (RecursionError, MemoryError) as error:
        raise ValueError(f"{type(error).__name__}: it is nested too deep, or holds too much") from error


def read_json(path: Path, most: int = RECORD) -> Any:
    """Return the value in a JSON file of at most `most` bytes; raises OSError and ValueError."""
    return parse_json(read_bounded(path, most))


def read_record(kind: type[_T], path: Path) -> _T:
    """Return the dataclass stored in a JSON file, with fields of its types; raises OSError and ValueError."""
    return as_record(kind, read_json(path))


def as_record(kind: type[_T], content: Any) -> _T:
    """Return the dataclass with the fields in `content`, of its types, integers not negative; raises ValueError."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    adapter = _ADAPTERS.get(kind)
    if adapter is None:
        kind.__pydantic_config__ = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)  # type: ignore[attr-defined]
        adapter = _ADAPTERS[kind] = TypeAdapter(kind)
    try:
        found: _T = adapter.validate_json(json.dumps(content))  # strict JSON differs from strict Python
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc'])) or 'it'}: {first['msg']}") from error
    for name, value in vars(found).items():
        if type(value) is int and not 0 <= value < 2**63:
            raise ValueError(f"{name} is {value}, which is no count")
    return found


_ADAPTERS: dict[type, Any] = {}


def _is_suspect(raw: bytes) -> bool:
    alike = raw.translate(_ALIKE)  # what the expression needs is seldom there, and found many times as fast
    return any(part in alike for part in (b"e000", b"e+000", b"0" * 19)) and _SUSPECT.search(raw) is not None


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a number in JSON")


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:40]} is not a finite number")
    return number


def _whole(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= (number := int(text)) < 2**64:
        raise ValueError(f"{text[:40]} is a whole number beyond 64 bits")
    return number


# made once: to make one takes as long as to read a row
_DECODER = json.JSONDecoder(object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
_SUSPICIOUS = json.JSONDecoder(
    object_pairs_hook=_no_duplicates, parse_constant=_no_constant, parse_float=_finite, parse_int=_whole
)
