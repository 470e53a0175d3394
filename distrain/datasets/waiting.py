"""Reports about a batch that does not come: which process owes it, where that is, and what to do.

A slow loader is valid, so only the watchdog's limit ends a wait. A wait is checked about every second: by the waiting
thread if loader processes make the batch, by another thread if this process does.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess

import numpy as np

from distrain.config import UserError
from distrain.datasets.batches import Place
from distrain.run import heartbeat, stacks
from distrain.system.errors import some
from distrain.system.logs import EACH_RANK
from distrain.system.processes import process_state

logger = logging.getLogger(__name__)

WARN_AFTER_S = 10.0
"""Wait for a batch before the first warning; the next follows after three times as long, and so on."""
CHECK_EVERY_S = 1.0
_GROWS = 3
_LINES, _SAMPLES = 4, 8
"""Lines of a stack and samples of a batch in a message."""
_STARTLED_S = 1.0
"""Delay of a check that still counts as waiting."""
_LEAVE_S = 10.0
"""Time for the main thread to leave its read by itself."""

while_waiting: list[Callable[[float], None]] = []
"""Called about every second of a wait for loader processes with its seconds; an exception ends the wait."""


class Wait:
    """The waits of one pass over data, one batch after another: `with wait:` for each."""

    def __init__(self, workers: int, what: str = "the next batch"):
        """`workers` processes make the batches, in turn, or this one if that is 0. `what`: the awaited item."""
        self.processes: Sequence[BaseProcess] = ()
        """The loader processes, once started."""
        self.over: str | None = None
        """Reason for ending the wait."""
        self._workers, self._what = workers, what
        self.thread = threading.get_ident()
        """The thread that waits."""
        self._batch: int | None = None
        """The number of the awaited one."""
        self._warnings = 0
        self._waited_s = self._checked_at = 0.0
        self._life = heartbeat.life(heartbeat.now())
        self._taken = 0
        self._places: deque[Place] = deque()

    def noting(self, places: Iterable[Place]) -> Iterator[Place]:
        """Yield the same places, and keep those whose batch has not come."""
        for place in places:
            self._places.append(place)
            yield place

    def __enter__(self) -> Wait:
        """Wait for the next batch in this block."""
        self._warnings, self._waited_s, self._checked_at = 0, 0.0, time.monotonic()
        self._batch = self._taken + 1
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._batch = None
        if error is not None:
            return
        self._taken += 1
        if self._places:
            self._places.popleft()

    def check(self) -> None:
        """Warn about the wait if due. Raises UserError once it exceeds the watchdog's limit."""
        batch, now, clock = self._batch, heartbeat.now(), time.monotonic()
        if batch is None:
            return
        # time in which this process was stopped itself does not count
        self._waited_s += min(clock - self._checked_at, CHECK_EVERY_S + _STARTLED_S)
        self._checked_at = clock
        if not self._workers and (life := heartbeat.life(now)) != self._life:
            self._life, self._waited_s = life, 0.0
        if self._workers:
            for each in while_waiting:
                each(self._waited_s)
        limit = now.limit() if now.limit is not None and not now.watched else None
        if limit is not None and self._waited_s >= limit and not self._is_debugged():
            raise UserError(
                f"{self._report()}\nthe wait ends here: the recipe's watchdog section allows {_duration(limit)}\n"
                f"{self._advice()}"
            )
        if self._waited_s < WARN_AFTER_S * _GROWS**self._warnings:
            return
        self._warnings += 1
        now.long_waits[self._warnings] += 1
        # a loader that is always slow is reported at the 1st, 2nd, 4th, 8th, … such wait
        if now.long_waits[self._warnings].bit_count() > 1:
            return
        try:
            parts = [self._report(), self._advice() if self._warnings == 1 else "", _end()]
        except OSError as error:  # a failed report must not end the run
            parts = [f"{_duration(self._waited_s)} without a batch; the cause cannot be read: {error}"]
        if self._batch == batch:
            text = "\n".join(filter(None, parts))
            logger.warning("%s", text, extra=EACH_RANK)

    def _is_debugged(self) -> bool:
        return not self._workers and stacks.is_debugged(self._stack())

    def _stack(self) -> stacks.Stack:
        return stacks.stack_of(sys._current_frames().get(self.thread))

    def _report(self) -> str:
        """Return which process owes the batch, for how long, and what it does."""
        waited = _duration(self._waited_s)
        ids = self._places[0][1] if self._places else np.zeros(0, np.int64)
        what = f"the batch of the samples {_shortened(ids)}" if len(ids) else self._what
        if not self._workers:
            return f"this process has been reading {what} for {waited}, at{_shown(self._stack())}"
        worker = self._taken % self._workers
        mine = {each.pid for each in self.processes}
        pids = {number: pid for pid, number in stacks.loaders() if pid in mine}
        others = [(number, pid) for number, pid in sorted(pids.items()) if number != worker]
        stopped = [(number, pid) for number, pid in others if process_state(pid, 0) in ("T", "t")]
        return "\n".join(
            [
                f"{waited} without a batch; loader process {worker} of {self._workers} owes {what}: "
                + _doing(pids.get(worker)),
                *(f"loader process {number} too: {_doing(pid)}" for number, pid in stopped),
            ]
        )

    def _advice(self) -> str:
        if not self._workers:
            return ""
        return (
            "if it is slow, training continues. If it hangs, data.workers=0 shows it in the training process. A fork "
            "copies locks, connections and open files in their current state: a loader process waits forever for a "
            "lock that was held. Open them in __getitem__, at first use"
        )


def _end() -> str:
    now = heartbeat.now()
    if now.limit is None:
        return "this wait has no limit"
    if (limit := now.limit()) is None:
        return "this wait has no limit in the recipe's watchdog section"
    return f"the recipe's watchdog section ends it after {_duration(limit)}"


def _doing(pid: int | None) -> str:
    """Return what a loader process does, from the kernel and its stack."""
    if pid is None:
        return "it has not reached its first sample"
    state = process_state(pid, 0)
    process = f"process {pid} "
    if state in ("T", "t"):
        return f"{process}is stopped, by {'a debugger' if state == 't' else f'SIGSTOP: kill -CONT {pid} continues it'}"
    stack = stacks.loader_stack(pid) or []
    if state == "D":
        why = "waits in the kernel (state D), as for a disk or a lost network mount"
    elif stack and stacks.is_idle_loader(stack):
        return f"{process}has made it but cannot hand it over: another process may hold the queue"
    else:
        why = {"R": "computes", "S": "sleeps or waits"}.get(state or "", "is there")
    return f"{process}{why}{f', at{_shown(stack)}' if stack else ''}"


def _shown(stack: stacks.Stack) -> str:
    """Return the innermost frames of a stack, one a line."""
    found = stacks.without_machinery(stack) or stack[:1]
    shown = [f"{frame}{f': {source}' if (source := frame.source()) else ''}" for frame in found[:_LINES]]
    return "".join(f"\n    {each}" for each in shown)


def _shortened(ids: np.ndarray) -> str:
    return some(dict.fromkeys(np.where(ids < 0, -1 - ids, ids).tolist()), _SAMPLES)


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.3g} minutes" if seconds >= 120 else f"{seconds:.3g} s"


# --------------------------------------------------------------------------------------------------------------------
# Batches made by this process


@contextmanager
def watched(wait: Wait) -> Iterator[None]:
    """While this block runs, another thread checks the waits of this one, and ends one that exceeds the limit."""
    left = threading.Event()
    threading.Thread(target=_check_until, args=(wait, left), name="waiting", daemon=True).start()
    try:
        yield
    except KeyboardInterrupt:
        if wait.over is not None:
            raise UserError(wait.over) from None
        raise
    finally:
        left.set()


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Watch this block, which reads `what` in this process, as one wait."""
    wait = Wait(0, what)
    with watched(wait), wait:
        yield


def _check_until(wait: Wait, left: threading.Event) -> None:
    while not left.wait(min(CHECK_EVERY_S, WARN_AFTER_S / 4)):
        try:
            wait.check()
        except UserError as error:
            _leave(wait, left, str(error))


def _leave(wait: Wait, left: threading.Event, why: str) -> None:
    """Interrupt the main thread as Ctrl-C does; if that does not end its read, end this process."""
    wait.over = why
    main = threading.main_thread().ident
    if main == wait.thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.pthread_kill(main, signal.SIGINT)
        if left.wait(_LEAVE_S):
            return
    logger.error("%s", why, extra=EACH_RANK)
    os._exit(1)
