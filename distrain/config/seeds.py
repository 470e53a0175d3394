"""Seeds derived from seeds."""

from __future__ import annotations

import hashlib
import operator


def mix(*parts: int | str) -> int:
    """Return a 63-bit seed that depends on every part and on their order, the same on every machine."""
    # Doubled separators keep ("a", "b") apart from one text that contains the separator.
    texts = [
        "str:" + part.replace("\x1f", "\x1f\x1f") if isinstance(part, str) else f"int:{operator.index(part)}"
        for part in parts
    ]
    return int.from_bytes(hashlib.blake2b("\x1f".join(texts).encode(), digest_size=8).digest(), "little") >> 1
