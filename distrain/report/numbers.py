"""Numbers as people read them."""

from __future__ import annotations

import math
from typing import Any


def number(value: Any) -> str:
    """Return a number with four significant digits, as people read it; anything else as text."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–" if value is None else str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value) or value == 0:
        return str(value) if not math.isfinite(value) else "0"
    return f"{value:,.0f}" if abs(value) >= 1e3 and abs(value) < 1e15 else f"{value:.4g}"
