"""Every place where code may keep state, each changed by the function of its name."""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import nn

COUNTS = [0]
CYCLE = itertools.cycle("abc")
NUMBERS = itertools.count()
SEEN: set[str] = set()
LONG = list(range(1000))
RECENT: deque[int] = deque([0], maxlen=3)
MATRIX = np.zeros(1 << 19)
KEPT: dict[Any, int] = {}


class Slotted:
    """Has no __dict__."""

    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


SLOTTED = Slotted()


def steps() -> Iterator[int]:
    count = 0
    while True:
        count += 1
        yield count


STEPS = steps()


def ramp(counts: list[int] = [0], *, scale: dict[str, int] = {"now": 0}) -> int:  # noqa: B006
    counts[0] += 1
    scale["now"] += 2
    return counts[0]


def attributed() -> None:
    attributed.calls = getattr(attributed, "calls", 0) + 1  # type: ignore[attr-defined]


def _enclosing() -> Any:
    calls = [0]

    def enclosed() -> None:
        calls[0] += 1

    return enclosed


enclosed = _enclosing()


@functools.wraps(ramp)
def wrapped() -> int:
    return ramp()


@functools.cache
def cached(number: int) -> int:
    return number


class Model(nn.Module):
    """Keeps state in its class and in a method."""

    history: tuple[Any, ...] = ()

    def smooth(self, past: list[int] = []) -> None:  # noqa: B006
        past.append(1)

    @staticmethod
    def fixed(past: list[int] = []) -> None:  # noqa: B006
        past.append(1)

    @property
    def state(self) -> tuple[Any, ...]:
        return self.history
