"""Numbers and kinds of values as people read them."""

from __future__ import annotations

import math
from typing import Any


def counted(count: int, noun: str) -> str:
    """Return a count with its noun, in the plural but of one."""
    return f"{count:,} {noun}" + ("s" if count != 1 else "")


def article(noun: str) -> str:
    """Return a noun with "a" or "an" before it."""
    return f"{'an' if noun[:1].lower() in 'aeio' else 'a'} {noun}"


def a_kind(value: object) -> str:
    """Return what kind a value is, as "an int" or "a Dataset"; of None its name."""
    return "None" if value is None else article(type(value).__name__)


def number(value: Any) -> str:
    """Return a number with four significant digits, as people read it; anything else as text."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–" if value is None else str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value) or value == 0:
        return str(value) if not math.isfinite(value) else "0"
    return f"{value:,.0f}" if 1e3 <= abs(value) < 1e9 else f"{value:.4g}"
