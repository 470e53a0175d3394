"""What each rank is doing: noted by the loop as it goes, and kept in the run folder for whoever looks after the run.

    enter_phase("forward")      the loop enters a phase: two attributes change, nothing waits and nothing is written
    progress()           a long operation makes progress: a chunk of a file was written
    stepped(step)        an optimizer step is done

A thread (`distrain.diagnose.hang_diagnosis`) writes what was noted into RUN/heartbeat/rank-R.json every few seconds.
Imports no torch.
"""

from __future__ import annotations

import faulthandler
import fcntl
import json
import mmap
import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from distrain.run.folder import RunDir
from distrain.system import bounded_json as bounded
from distrain.system.job_environment import JobEnvironment
from distrain.system.processes import namespace_of_processes, process_state

PHASES = {
    "setup": "the set-up",
    "data": "data loading",
    "sync": "the exchange between ranks of a step",
    "forward": "the forward pass",
    "backward": "the backward pass",
    "optimizer": "the optimizer",
    "save": "saving",
    "evaluate": "the evaluation",
    "finish": "the end of the run",
    "callbacks": "a callback",
    "ended": "nothing any more",
}
"""What a rank can be doing. A step is data, sync, forward, backward, optimizer."""

STEP_PHASES = ("data", "sync", "forward", "backward", "optimizer")

# --------------------------------------------------------------------------------------------------------------------
# Noted in this process


class Now:
    """What this process is doing. Written by the thread that trains, read by another: each write is one attribute."""

    __slots__ = (
        "before",
        "board",
        "first_step_s",
        "limit",
        "listener",
        "long_waits",
        "marks",
        "phase",
        "seconds",
        "since",
        "step",
        "steps",
        "straggler",
        "ticks",
        "watched",
    )

    def __init__(self) -> None:
        self.phase = "setup"
        self.since = perf_counter()
        """When the phase was entered, on the clock `time.perf_counter`."""
        self.step = 0
        """Finished optimizer steps."""
        self.marks = 0
        """Phases entered since that step was done; all ranks enter the same ones in the same order."""
        self.ticks = 0
        """Grows with every other sign of life."""
        self.steps = 0
        """Optimizer steps done by this process."""
        self.seconds = dict.fromkeys(PHASES, 0.0)
        """Spent in each phase since the first step was done."""
        self.before = dict.fromkeys(PHASES, 0.0)
        """Spent in each phase before."""
        self.first_step_s: float | None = None
        """Of the first step of this process, which may have compiled."""
        self.straggler: Straggler | None = None
        """A slow rank that was found and not yet reported."""
        self.limit: Callable[[], float | None] | None = None
        """Says after how many seconds without progress this process is ended, at what it is doing now; None: never."""
        self.long_waits: Counter[int] = Counter()
        """How many waits for data have come to their 1st, 2nd, 3rd … warning."""
        self.watched = False
        """Whether a watchdog ends it then; a wait for data ends by itself otherwise."""
        self.listener: Callable[[str], None] | None = None
        """Is called with each phase that is entered, by the thread that trains."""
        self.board = _open_board()
        """(step, marks, phase) once more, where other processes of this machine can read them: also when this one is
        stopped."""


_INDEX = {phase: index for index, phase in enumerate(PHASES)}
_board_file: int | None = None


def _open_board() -> memoryview:
    """Return three 64-bit numbers, in a file in memory where there are such."""
    global _board_file
    size = 24
    if not hasattr(os, "memfd_create"):
        return memoryview(bytearray(size)).cast("q")
    if _board_file is not None:
        os.close(_board_file)
    _board_file = os.memfd_create("heartbeat")
    os.truncate(_board_file, size)
    return memoryview(mmap.mmap(_board_file, size)).cast("q")


def board_file() -> int | None:
    """Return the descriptor of the file in memory with what this process is doing."""
    return _board_file


_now = Now()


def now() -> Now:
    """Return what this process is doing, as it is noted from now on."""
    return _now


def life(now: Now) -> tuple[int, int, int]:
    """Return what changes with every sign of life."""
    return now.step, now.marks, now.ticks


def begin() -> Now:
    """Forget what was noted before: this process sets up."""
    global _now
    _now = Now()
    return _now


def enter_phase(phase: str) -> None:
    """Note that a phase is entered, which also ends the one before; less than half a microsecond."""
    now, index, clock = _now, _INDEX[phase], perf_counter()
    now.seconds[now.phase] += clock - now.since
    now.phase = phase
    now.since = clock
    now.marks = marks = now.marks + 1
    board = now.board
    board[1] = marks
    board[2] = index
    if now.listener is not None:
        now.listener(phase)


def progress() -> None:
    """Note progress in what this process is doing. From any thread."""
    _now.ticks += 1


def starts_at(step: int) -> None:
    """Note the step from which this process trains on."""
    _now.step, _now.marks = step, 0
    _now.board[0], _now.board[1] = step, 0
    _now.ticks += 1


def stepped(step: int) -> None:
    """Note that this many optimizer steps are done."""
    now = _now
    now.step, now.marks = step, 0
    now.board[0], now.board[1] = step, 0
    now.ticks += 1
    now.steps += 1
    if now.steps == 1:  # it may have compiled: its times are not typical
        now.before, now.seconds = now.seconds, dict.fromkeys(PHASES, 0.0)
        now.first_step_s = sum(now.before[phase] for phase in STEP_PHASES)


def seconds_by_phase(now: Now) -> dict[str, float]:
    """Return what this process has spent in each phase, with the one that it is in."""
    phase, seconds = now.phase, {each: now.before[each] + now.seconds[each] for each in PHASES}
    seconds[phase] += max(0.0, perf_counter() - now.since)
    return seconds


# --------------------------------------------------------------------------------------------------------------------
# Loader processes

STACK_SIGNAL: int | None = signal.SIGRTMIN + 7 if hasattr(signal, "SIGRTMIN") else None
"""Has a process that trains or loads write the stacks of its threads, whatever it is doing."""

_loader_notes: int | None = None


def open_loader_notes() -> int | None:
    """Return the file in memory that loader processes write to, which are forked from this one later on.

    Each begins with a line `loader PID WORKER`, and writes its stack there when it gets STACK_SIGNAL.
    """
    global _loader_notes
    if _loader_notes is None and STACK_SIGNAL is not None and hasattr(os, "memfd_create"):
        _loader_notes = os.memfd_create("loader-stacks")
        fcntl.fcntl(_loader_notes, fcntl.F_SETFL, os.O_APPEND)
    return _loader_notes


def listen_in_loader(worker: int) -> None:
    """In a loader process: be ready to report its stack to the process that it loads for."""
    if _loader_notes is not None and STACK_SIGNAL is not None:
        os.write(_loader_notes, f"loader {os.getpid()} {worker}\n".encode())
        faulthandler.register(STACK_SIGNAL, file=_loader_notes, all_threads=True)


# --------------------------------------------------------------------------------------------------------------------
# Kept in the run folder


@dataclass(frozen=True)
class Heartbeat:
    """What a rank was doing when it last wrote."""

    rank: int
    host: str
    pid: int
    started: int
    """When the process started, in the kernel's ticks since the machine did (0: not known); with pid and host it means
    one process for ever."""
    job: str | None
    """The SLURM job, with the number of its restarts behind a dot."""
    attempt: str
    """The same for all ranks of an attempt, another for each attempt."""
    world_size: int
    sequence: int
    """Counts what this process has written."""
    time: float
    """Seconds since 1970, for people."""
    interval: float
    """Seconds until the next one is due."""
    step: int
    """Finished optimizer steps."""
    marks: int
    """Phases entered since then."""
    phase: str
    seconds: float
    """Since the phase was entered, or a part of it such as a batch of an evaluation."""
    idle: float
    """Seconds without any progress in which this process could have made some."""
    steps: int
    """Optimizer steps done by this process."""
    work: dict[str, float] = field(default_factory=dict)
    """Seconds of its own work by phase, since its first step: without its waits for other ranks."""
    limit: float | None = None
    """Seconds without progress after which it is taken to hang; None never."""
    stalled: dict[str, Any] | None = None
    """Where it hangs or waits, once `idle` is past the limit."""
    board: int | None = None
    """The descriptor of its file in memory with what it is doing at this moment."""
    phases: dict[str, float] = field(default_factory=dict)
    """Seconds of each phase since the process began to look after itself, with its waits."""
    first_step_s: float | None = None
    """Of its first step, which may have compiled."""
    energy_wh: float | None = None
    """Watt-hours that its GPU has taken since; None where that is not known."""
    namespace: str = ""
    """The one in which the process has its number (`namespace_of_processes`); empty: not known."""
    written: float = 0.0
    """When the file was written, by the clock of the file system. Of what was read."""

    @property
    def place(self) -> tuple[int, int]:
        """How far the rank has come; among ranks that wait for each other the least is the one to look at."""
        return self.step, self.marks

    def age_s(self, at: float | None = None) -> float:
        """Return the seconds between its writing and `at` (seconds since 1970, None: now)."""
        return max(0.0, (time.time() if at is None else at) - self.written)

    def is_of_the_past(self) -> bool:
        """Whether its process is known to have ended: only of one that would be seen here if it lived."""
        if not self.namespace or self.namespace != namespace_of_processes():
            return False
        return process_state(self.pid, self.started) in (None, "Z", "X")

    def where(self) -> str:
        """Return the phase in words, with the step that is being made."""
        of_step = f" of step {self.step + 1}" if self.phase in STEP_PHASES else f" after step {self.step}"
        return PHASES.get(self.phase, self.phase) + (of_step if self.step or self.phase != "setup" else "")


def at_this_moment(beat: Heartbeat) -> Heartbeat:
    """Return the heartbeat of a process of this machine with what it is doing now, or did last."""
    try:
        with open(f"/proc/{beat.pid}/fd/{beat.board}", "rb") as file:
            step, marks, phase = memoryview(file.read(24)).cast("q")
        return replace(beat, step=step, marks=marks, phase=list(PHASES)[phase])
    except (OSError, ValueError, TypeError, IndexError):  # it has ended, or belongs to somebody else
        return beat


_KNOWN = {each.name for each in fields(Heartbeat)}


def folder(run: RunDir) -> Path:
    """Return the folder of heartbeats, and of stacks where a run hung."""
    return run.heartbeat_path(0).parent


def write_heartbeat(run: RunDir, beat: Heartbeat) -> None:
    """Replace the rank's file; not synchronised to disk, as after a crash of the machine it means nothing."""
    path = run.heartbeat_path(beat.rank)
    temporary = path.with_name(f".{path.name}.{beat.pid}")
    content = asdict(beat)
    content.pop("written")
    temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_heartbeat(run: RunDir, rank: int) -> Heartbeat | None:
    """Return what a rank last wrote; None where there is nothing, or nothing that can be read."""
    try:
        with open(bounded.open_regular(run.heartbeat_path(rank)), "rb") as file:
            written = os.fstat(file.fileno()).st_mtime
            content = bounded.parse_json(bounded.read_open(file, bounded.RECORD))
        known = {key: value for key, value in content.items() if key in _KNOWN}
        return bounded.as_record(Heartbeat, known | {"written": written})
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def read_heartbeats(run: RunDir) -> list[Heartbeat]:
    """Return what every rank of the last attempt has written, by rank; ranks that have not begun are missing."""
    try:
        names = [path.name for path in folder(run).iterdir()]
    except OSError:
        return []
    ranks = sorted(
        int(middle) for name in names if (middle := name.removeprefix("rank-").removesuffix(".json")).isdecimal()
    )
    found = [beat for rank in ranks if (beat := read_heartbeat(run, rank)) is not None]
    if not found:
        return []
    newest = max(found, key=lambda beat: beat.written)
    return [beat for beat in found if beat.attempt == newest.attempt]


def this_attempt(job: JobEnvironment, variables: Mapping[str, str] = os.environ) -> str:
    """Return a name that all ranks of this attempt have in common, from their job and from what their launcher set."""
    names = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")
    return "/".join((job.attempt or "", *(variables.get(name, "") for name in names)))


# --------------------------------------------------------------------------------------------------------------------
# Ranks that are slow


@dataclass(frozen=True)
class Straggler:
    """A rank that the others wait for in every step."""

    rank: int
    host: str
    step: int
    phase: str
    """Where most of the difference is."""
    seconds: float
    """Of own work in a step."""
    others: float
    """The median of the other ranks."""

    @property
    def ratio(self) -> float:
        """How many times as long as the others it takes; at most 1000, as less than that share is not measured."""
        return self.seconds / max(self.others, self.seconds / 1000)

    def row(self) -> dict[str, Any]:
        """Return a row for metrics.jsonl."""
        return {
            "event": "straggler",
            "step": self.step,
            "rank": self.rank,
            "host": self.host,
            "phase": self.phase,
            "ratio": self.ratio,
            "seconds": self.seconds,
            "others": self.others,
        }

    def __str__(self) -> str:
        return (
            f"rank {self.rank} on {self.host} is slow: {1e3 * self.seconds:.3g} ms of own work in a step, where the "
            f"others need {1e3 * self.others:.3g} ms ({self.ratio:.1f}x), most of it in {PHASES[self.phase]}; "
            "every step waits for it"
        )


def take_straggler() -> Straggler | None:
    """Return a slow rank that was found since the last call; rank 0 finds them."""
    found, _now.straggler = _now.straggler, None
    return found


# --------------------------------------------------------------------------------------------------------------------
# For launchers

HANG = "Hang"
"""What FAILED.json has as `error` where a run hung."""


def hang_of(run: RunDir, before: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """Return the record of a hang that ended a run, unless it is the one from `before`."""
    found = run.failed
    return found if found is not None and found.get("error") == HANG and found != before else None


@contextmanager
def ending_hung(run: RunDir, *, patience_s: float = 5.0, started: bool = False) -> Iterator[None]:
    """While this block runs, kill the processes that this one has started once the run is recorded to hang.

    All that can do it end by themselves; one that is stopped or stuck in the kernel cannot, and on a machine of its own
    no other rank can end it. `started`: all processes below this one are the run's; otherwise those that are there when
    the block begins are not.
    """
    import psutil

    before, ended = run.failed, threading.Event()
    others = set() if started else set(psutil.Process().children(recursive=True))

    def watch() -> None:
        while not ended.wait(1.0):
            if hang_of(run, before) is None:
                continue
            if ended.wait(patience_s):
                return
            for child in set(psutil.Process().children(recursive=True)) - others:
                with suppress(psutil.Error):
                    child.kill()

    thread = threading.Thread(target=watch, name="end-hung", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()


def own_host() -> str:
    """Return this machine's name, as it stands in heartbeats."""
    return socket.gethostname()
