"""Parameters of tests: of a product, a set that covers it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest


def covering(first: Sequence[Any], second: Sequence[Any]) -> list[Any]:
    """Return every pair, for `parametrize`, those marked `more` that others stand for.

    The k-th pair that is left takes the k-th of each in turn, so every one of both is in a pair, and none more often
    than the longer of them asks for.
    """
    taken = {(k % len(first), k % len(second)) for k in range(max(len(first), len(second)))}
    return [
        pytest.param(one, other, marks=[] if (i, j) in taken else [pytest.mark.more])
        for i, one in enumerate(first)
        for j, other in enumerate(second)
    ]
