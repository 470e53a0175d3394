"""What is said of a batch that does not come: who owes it, where that process is, and what can be done.

A loader that is slow is as good as one that is fast, so nothing here ends it early. A wait is looked at about every
second, by the thread that waits where loader processes make the batch, and by another where it is made in this process.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess

import numpy as np

from distrain.config import UserError
from distrain.datasets.batches import Place
from distrain.run import heartbeat, stacks
from distrain.system.output import echo, echo_error, lines
from distrain.system.processes import process_state

log = logging.getLogger("distrain")
log.addHandler(logging.NullHandler())  # what a run has no log for is said on the terminal alone

SAY_AFTER_S = 10.0
"""How long a batch is waited for before that is said; said again after three times as long, and so on."""
LOOK_EVERY_S = 1.0
_GROWS = 3
_LINES, _SAMPLES = 4, 8
"""Lines of a stack and samples of a batch in a message."""
_STARTLED_S = 1.0
"""How much later than planned a look may come and still count as a wait in full."""
_LEAVE_S = 10.0
"""How long a process may take to leave what it is in by itself."""

while_waiting: list[Callable[[float], None]] = []
"""Called about every second of a wait for loader processes, with its seconds; what one raises ends the wait."""

_reached: Counter[int] = Counter()
"""How many waits of this process have lasted for so many messages."""


class Wait:
    """The waits of one pass over data, one batch after another."""

    def __init__(self, workers: int, what: str = "the next batch"):
        """`workers` processes make the batches, in turn; this one where that is 0. `what` is waited for, in words."""
        self.processes: Sequence[BaseProcess] = ()
        """The loader processes, once they have started."""
        self.over: str | None = None
        """Why waiting was given up."""
        self._workers, self._what = workers, what
        self.thread = threading.get_ident()
        """The thread that waits."""
        self._batch: int | None = None
        """The number of the one that is waited for."""
        self._said = 0
        self._waited_s = self._looked_at = 0.0
        self._life = heartbeat.life(heartbeat.now())
        self._taken = 0
        self._places: deque[Place] = deque()

    def noting(self, places: Iterable[Place]) -> Iterator[Place]:
        """Yield the same, and keep those of which the batch has not come."""
        for place in places:
            self._places.append(place)
            yield place

    @contextmanager
    def for_batch(self) -> Iterator[None]:
        """Wait for the next batch in this block."""
        self._said, self._waited_s, self._looked_at = 0, 0.0, time.monotonic()
        self._batch = self._taken + 1
        try:
            yield
        finally:
            self._batch = None
        self._taken += 1
        if self._places:
            self._places.popleft()

    def look(self) -> None:
        """Say what is due of the wait. Raises UserError where nothing may be waited for so long."""
        batch, now, clock = self._batch, heartbeat.now(), time.monotonic()
        if batch is None:
            return
        # time in which this process was stopped itself is no wait
        self._waited_s += min(clock - self._looked_at, LOOK_EVERY_S + _STARTLED_S)
        self._looked_at = clock
        if not self._workers and (life := heartbeat.life(now)) != self._life:
            self._life, self._waited_s = life, 0.0
        if self._workers:
            for each in while_waiting:
                each(self._waited_s)
        limit = now.limit() if now.limit is not None and not now.watched else None
        if limit is not None and self._waited_s >= limit and not self._is_debugged():
            raise UserError(
                f"{self._report()}\nnothing is waited for any longer than that: the section watchdog of the recipe "
                f"allows {_in_words(limit)}\n{self._cure()}"
            )
        if self._waited_s < SAY_AFTER_S * _GROWS**self._said:
            return
        self._said += 1
        _reached[self._said] += 1
        # of a loader that is always slow the 1st, 2nd, 4th, 8th, … such wait is said
        if _reached[self._said].bit_count() > 1:
            return
        try:
            parts = [self._report(), self._cure() if self._said == 1 else "", _end()]
        except OSError as error:  # what is said must not end what it is about
            parts = [f"{_in_words(self._waited_s)} without a batch; what is waited for cannot be found out: {error}"]
        if self._batch == batch:
            text = "\n".join(filter(None, parts))
            log.warning("%s", text)
            echo(f"warning{_who()}: {lines(text, '  ')}", error=True)

    def _is_debugged(self) -> bool:
        return not self._workers and stacks.is_debugged(self._stack())

    def _stack(self) -> stacks.Stack:
        return stacks.stack_of(sys._current_frames().get(self.thread))

    def _report(self) -> str:
        """Return who owes the batch, for how long, and what that process does."""
        waited = _in_words(self._waited_s)
        what = f"the batch of the samples {_in_short(self._places[0][1])}" if self._places else self._what
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

    def _cure(self) -> str:
        if not self._workers:
            return ""
        return (
            "it may be slow, and then goes on. If it hangs, data.workers=0 shows what it does in the training process. "
            "A fork copies locks as they are, and connections and open files along with their place: a loader process "
            "waits for ever for a lock that was taken. Make them in __getitem__, where they are used first"
        )


def _end() -> str:
    now = heartbeat.now()
    if now.limit is None:
        return "nothing ends this wait but a person"
    if (limit := now.limit()) is None:
        return "nothing ends this wait but a person: the section watchdog of the recipe has no limit for it"
    return f"it ends after {_in_words(limit)} of this, by the section watchdog of the recipe"


def _who() -> str:
    return "" if os.environ.get("WORLD_SIZE", "1") == "1" else f" (rank {os.environ.get('RANK')})"


def _doing(pid: int | None) -> str:
    """Return what a loader process does, from the kernel and its stack."""
    if pid is None:
        return "it has not come to its first sample"
    state = process_state(pid, 0)
    process = f"process {pid} "
    if state in ("T", "t"):
        return f"{process}is stopped, by {'a debugger' if state == 't' else f'SIGSTOP: kill -CONT {pid} lets it go on'}"
    stack = stacks.loader_stack(pid) or []
    if state == "D":
        why = "waits in the kernel (state D), as for a disk or for a network mount that is gone"
    elif stack and stacks.is_idle_loader(stack):
        return f"{process}has made it, and cannot hand it over: another process may hold the queue"
    else:
        why = {"R": "computes", "S": "sleeps or waits"}.get(state or "", "is there")
    return f"{process}{why}{f', at{_shown(stack)}' if stack else ''}"


def _shown(stack: stacks.Stack) -> str:
    """Return the innermost lines of a stack, each on a line."""
    found = stacks.without_machinery(stack) or stack[:1]
    shown = [f"{frame}{f': {source}' if (source := frame.source()) else ''}" for frame in found[:_LINES]]
    return "".join(f"\n    {each}" for each in shown)


def _in_short(ids: np.ndarray) -> str:
    wanted = list(dict.fromkeys(np.where(ids < 0, -1 - ids, ids).tolist()))
    return ", ".join(map(str, wanted[:_SAMPLES])) + (
        f" and {more} more" if (more := len(wanted) - _SAMPLES) > 0 else ""
    )


def _in_words(seconds: float) -> str:
    return f"{seconds / 60:.3g} minutes" if seconds >= 120 else f"{seconds:.3g} s"


# --------------------------------------------------------------------------------------------------------------------
# Where this process makes the batches


@contextmanager
def looked_at(wait: Wait) -> Iterator[None]:
    """While this block runs, have another thread look at the waits of this one, and end one that lasts too long."""
    left = threading.Event()
    threading.Thread(target=_look, args=(wait, left), name="waiting", daemon=True).start()
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
    """Have what this block waits for looked at in the same way: it reads `what`, in this process."""
    wait = Wait(0, what)
    with looked_at(wait), wait.for_batch():
        yield


def _look(wait: Wait, left: threading.Event) -> None:
    while not left.wait(min(LOOK_EVERY_S, SAY_AFTER_S / 4)):
        try:
            wait.look()
        except UserError as error:
            _leave(wait, left, str(error))


def _leave(wait: Wait, left: threading.Event, why: str) -> None:
    """End what the main thread is in, as Ctrl-C does; where it cannot be left so, end this process."""
    wait.over = why
    main = threading.main_thread().ident
    if main == wait.thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.pthread_kill(main, signal.SIGINT)
        if left.wait(_LEAVE_S):
            return
    log.error("%s", why)
    echo_error(why, _who())
    os._exit(1)
