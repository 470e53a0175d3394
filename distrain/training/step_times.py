"""Where the time of a step goes: on a CPU by the host's clock, on a GPU by events on its stream."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

from distrain.run import heartbeat

PARTS = {
    "data_s": ("data",),
    "forward_backward_s": ("forward", "backward"),
    "optimizer_s": ("optimizer",),
    "agreement_s": ("sync",),
    "saving_s": ("save",),
}
"""Columns of a row by the phases of the loop that they hold. What is in none of them is callbacks and evaluations."""


def waited_s() -> float:
    """Return the seconds that this process has waited for batches of training."""
    now = heartbeat.now()
    return now.before["data"] + now.seconds["data"]


class HostTimes:
    """What the host notes of each phase anyway, without the first step, which may compile. All there is on a CPU."""

    def __init__(self) -> None:
        self.take()

    def take(self) -> dict[str, float]:
        """Return the seconds of a step by the names of PARTS, over the steps since the last call; {}: there were none.

        An evaluation in between counts for nothing.
        """
        now = heartbeat.now()
        before, self._before = getattr(self, "_before", None), (max(now.steps, 1), dict(now.seconds))
        (steps, seconds) = self._before
        if before is None or steps == before[0]:
            return {}
        earlier = before[1] if before[0] > 1 else dict.fromkeys(seconds, 0.0)
        return {
            name: sum(seconds[each] - earlier[each] for each in phases) / (steps - before[0])
            for name, phases in PARTS.items()
        }

    def close(self) -> None:
        """Nothing is held."""


class DeviceTimes:
    """One step between two rows, by events that the device's stream passes between its phases; the host never waits.

    Saving is taken from the host's clock: what it costs the loop is the host's time.
    """

    def __init__(self, event: Callable[[], Any] | None = None) -> None:
        """`event` makes a timing event, by default one of CUDA."""
        self._event = event or (lambda: torch.cuda.Event(enable_timing=True))
        self._host = HostTimes()
        self._passed: list[tuple[str, Any]] = []  # nothing is sampled before the first row: a first step may compile

    def _note(self, phase: str) -> None:
        """Note a phase that the loop enters, from the beginning of one step to that of the next."""
        if not self._passed and phase != "data":
            return
        event = self._event()
        event.record()
        if self._passed and phase == "data":
            heartbeat.now().listener = None
        self._passed.append((phase, event))

    def take(self) -> dict[str, float]:
        """Return the seconds of the step that was sampled since the last call; {} where the device is not done yet."""
        now, host, passed = heartbeat.now(), self._host.take(), self._passed
        if now.listener is not None or (passed and not passed[-1][1].query()):
            return {}
        now.listener, self._passed = self._note, []
        phases: dict[str, float] = {}
        for (phase, began), (_, ended) in pairwise(passed):
            phases[phase] = phases.get(phase, 0.0) + began.elapsed_time(ended) / 1e3
        if not phases:
            return {}
        found = {name: sum(phases.get(each, 0.0) for each in of) for name, of in PARTS.items()}
        return found | {name: host[name] for name in ("saving_s",) if name in host}

    def close(self) -> None:
        """Listen no longer."""
        heartbeat.now().listener = None
