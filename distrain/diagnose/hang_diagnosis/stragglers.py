"""Ranks that are slow rather than dead: those that do their own work for longer than the others in every step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from distrain.run.heartbeat import Heartbeat, Straggler

OWN_WORK = ("data", "forward")
"""Phases in which a rank works for itself; in a backward pass it may wait for the others."""

_RATIO = 1.5
"""How many times as long as the others a slow rank takes,"""
_SHARE = 0.1
"""and how much of a step they then wait for it."""
_STEPS = 5
_AGAIN_S = 600.0


@dataclass(frozen=True)
class Pace:
    """How long a rank works for itself in a step, over some steps."""

    host: str
    step: int
    seconds: float
    """From one step to the next."""
    work: Mapping[str, float]
    """Of it its own work, by phase."""

    @property
    def own(self) -> float:
        return sum(self.work.values())


def pace(before: Heartbeat, after: Heartbeat) -> Pace | None:
    """Return a rank's pace between two of its heartbeats; None where they are too close, or not of one process."""
    steps = after.steps - before.steps
    if (after.pid, after.started, after.attempt) != (before.pid, before.started, before.attempt) or steps < _STEPS:
        return None
    # what was waited for within a phase is sampled, and taken off: more than the phase, where the machine is busy
    work = {phase: max(0.0, after.work.get(phase, 0.0) - before.work.get(phase, 0.0)) / steps for phase in OWN_WORK}
    # of the seconds of a rank's whole time, those of steps alone
    whole = (after.work.get("step", 0.0) - before.work.get("step", 0.0)) / steps
    return Pace(after.host, after.step, whole, work)


def slowest(paces: Mapping[int, Pace]) -> Straggler | None:
    """Return the rank that the others wait for, if one works for much longer than they do. Pure."""
    if len(paces) < 2:
        return None
    rank = max(paces, key=lambda rank: paces[rank].own)
    slow, others = paces[rank], [each for other, each in paces.items() if other != rank]
    usual = statistics.median(each.own for each in others)
    if slow.own < _RATIO * usual or slow.own - usual < _SHARE * slow.seconds:
        return None
    excess = {phase: slow.work[phase] - statistics.median(each.work[phase] for each in others) for phase in OWN_WORK}
    return Straggler(rank, slow.host, slow.step, max(excess, key=lambda phase: excess[phase]), slow.own, usual)


class Stragglers:
    """Compares the ranks' paces now and then; who is slowest twice in a row is named, and again every ten minutes."""

    def __init__(self) -> None:
        self._before: dict[int, Heartbeat] = {}
        self._suspect: tuple[int, str] | None = None
        self._named: dict[tuple[int, str], float] = {}

    def look(self, beats: Sequence[Heartbeat]) -> Straggler | None:
        """Return a rank to name, given all heartbeats; None while there is nothing new to report."""
        if not self._before or {beat.rank for beat in beats} != self._before.keys():
            self._before = {beat.rank: beat for beat in beats if beat.steps}
            return None
        paces = {beat.rank: each for beat in beats if (each := pace(self._before[beat.rank], beat)) is not None}
        if len(paces) < len(beats):
            return None
        self._before = {beat.rank: beat for beat in beats}
        found = slowest(paces)
        key = (found.rank, found.phase) if found is not None else None
        again, self._suspect = key is not None and key == self._suspect, key
        if found is None or key is None or not again:
            return None
        clock = time.monotonic()
        if clock - self._named.get(key, -_AGAIN_S) < _AGAIN_S:
            return None
        self._named[key] = clock
        return found
