"""Looks after a rank while it trains: writes its heartbeat, and names the rank on which a run hangs before aborting.

Each rank has a thread that writes what the rank is doing (`distrain.run.heartbeat`) and notices when it makes no
progress for longer than the recipe allows. It then writes the stacks of all threads into RUN/heartbeat, and into its
heartbeat where the rank is. When every rank is silent or has reported a stall, one of them, the first
that is alive, finds the cause in what the others have written, writes it to FAILED.json and reports it in one sentence,
and all ranks end. No collective has a part in this, nor has the clock of the wall. Imports no torch.

    diagnosis.py   which rank is the cause, from what all have written
    stragglers.py  ranks that are slow rather than dead
    gpus.py        what the driver of the GPUs has noted about them
"""

from __future__ import annotations

import faulthandler
import logging
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from distrain.config import WatchdogSection
from distrain.diagnose.hang_diagnosis import evidence
from distrain.diagnose.hang_diagnosis.diagnosis import RankReport, find_culprit, record
from distrain.diagnose.hang_diagnosis.gpus import gpu_faults
from distrain.diagnose.hang_diagnosis.stragglers import OWN_WORK, Stragglers
from distrain.run import heartbeat, stacks
from distrain.run.energy import EnergyMeter, meter_of_this_process
from distrain.run.folder import RunDir
from distrain.run.heartbeat import STEP_PHASES, Heartbeat, Now
from distrain.system.job_environment import job_environment
from distrain.system.logs import FILE_ALONE
from distrain.system.output import error_text
from distrain.system.processes import namespace_of_processes, process_started, process_state

__all__ = ["Limits", "Watchdog", "gpu_faults"]

logger = logging.LoggerAdapter(logging.getLogger(__name__), FILE_ALONE)  # a terminal can hold the thread that hangs

_INTERVAL_S = 5.0
_OF_A_RANK = re.compile(r"(?P<kind>stacks-|stuck-|collectives-)?rank-(?P<rank>[0-9]+)[.-]")
_DUMP_S = 1.5
"""How long the stack of a rank that does not answer is waited for."""
_LATE_S = 1.0
"""How much later than planned the thread that watches may come to look."""
_LOOK_S = 30.0
"""What a look may take: many loader processes are asked for their stacks, or a file system is slow."""
_STARTLED_S = 1.0
"""What a look may take longer than planned and still count: a process that was stopped or starved for longer was not
idle for that long."""


@dataclass(frozen=True)
class Limits:
    """Seconds without progress after which a rank is taken to hang; None: never."""

    setup: float | None
    step: float | None
    save: float | None
    evaluate: float | None

    @classmethod
    def of(cls, section: WatchdogSection) -> Limits:
        """Read them from the recipe."""
        names = ("setup", "step", "save", "evaluate")
        limits = {name: getattr(section, name) for name in names}
        return cls(**{name: each.seconds if each is not None else None for name, each in limits.items()})

    def at(self, now: Now) -> float | None:
        """Return the limit for what a process is doing."""
        if now.phase in STEP_PHASES:
            if now.steps:
                return self.step
            # the first step may compile
            return None if self.setup is None or self.step is None else max(self.setup, self.step)
        by_phase = {"setup": self.setup, "save": self.save, "finish": self.save, "evaluate": self.evaluate}
        by_phase["callbacks"] = self.step
        return by_phase.get(now.phase)

    @property
    def _least(self) -> float:
        return min(
            (each for each in (self.setup, self.step, self.save, self.evaluate) if each is not None), default=1e9
        )

    @property
    def interval_s(self) -> float:
        """How often a heartbeat is written, so that a rank without any is noticed in time."""
        return min(_INTERVAL_S, self._least / 4)

    @property
    def silence_s(self) -> float:
        """A rank from which nothing has come for so long does not answer.

        As long as the limits leave room for: a network file system may show another machine's files much later.
        """
        return max(3 * self.interval_s, min(90.0, self._least / 3), 1.0)


@dataclass
class _Seen:
    """What was seen of another rank."""

    beat: Heartbeat | None
    silent_s: float = 0.0
    """For how long nothing new has come from it."""


class Watchdog:
    """The thread that looks after this process."""

    def __init__(
        self,
        run: RunDir,
        limits: Limits,
        *,
        rank: int,
        world_size: int,
        may_write: Callable[[], bool] = lambda: True,
    ):
        """Start looking after the calling thread.

        `may_write` returns whether the run is still this attempt's, which alone may record how it ended.
        """
        self.run, self.limits, self.rank, self.world_size = run, limits, rank, world_size
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self._may_write = may_write
        self.interval_s = limits.interval_s
        self.poll_s = min(1.0, self.interval_s / 2)
        self.silence_s = limits.silence_s
        self.folder = heartbeat.folder(run)
        self.folder.mkdir(exist_ok=True)
        self.now = heartbeat.begin()
        self.now.limit, self.now.watched = lambda: self.limits.at(self.now), True
        self._main = threading.get_ident()
        self._main_task = threading.get_native_id()
        job = job_environment()
        self._attempt, self._job, self._host = heartbeat.this_attempt(job), job.attempt, heartbeat.own_host()
        self._started, self._namespace = process_started(), namespace_of_processes()
        self._begun = time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else None
        self._sequence = 0
        self._written_at = -float("inf")
        self._life, self._idle = heartbeat.life(self.now), 0.0
        self._stalled: dict[str, Any] | None = None
        self._seen: dict[int, _Seen] = {}
        self._decided_for = 0.0
        self._samples = {phase: [0, 0] for phase in OWN_WORK}
        self._stragglers, self._compared_at = Stragglers(), time.monotonic()
        self._complained = False
        self._meter: EnergyMeter | None = None
        self._tidy()
        # from the first moment on: a thread that never gets to run again cannot open it
        self._stuck = self._stuck_path(rank).open("w", encoding="utf-8")
        if heartbeat.STACK_SIGNAL is not None:
            faulthandler.register(heartbeat.STACK_SIGNAL, file=self._stuck, all_threads=True)
        heartbeat.open_loader_notes()
        self._ended = threading.Event()
        self._write()
        self._arm(self.limits.at(self.now))
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    @classmethod
    @contextmanager
    def over(cls, run: RunDir, section: WatchdogSection, **placed: Any) -> Iterator[Watchdog]:
        """Look after this process while the block runs; `placed` are the further arguments of `__init__`."""
        watchdog = cls(run, Limits.of(section), **placed)
        try:
            yield watchdog
        finally:
            watchdog.close()

    def close(self) -> None:
        """Stop, and leave word that this process has come to its end."""
        self._ended.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        if heartbeat.STACK_SIGNAL is not None:
            faulthandler.unregister(heartbeat.STACK_SIGNAL)
        self._stuck.close()
        self._stuck_path(self.rank).unlink(missing_ok=True)
        self.now.limit, self.now.watched = None, False
        heartbeat.enter_phase("ended")
        self._stalled = None
        self._write()

    # ----------------------------------------------------------------------------------------------------------------
    # The heartbeat

    def _stuck_path(self, rank: int) -> Any:
        return self.folder / f"stuck-rank-{rank}.txt"

    def _tidy(self) -> None:
        """Remove what earlier attempts left and this one does not replace."""
        with suppress(OSError):
            for path in list(self.folder.iterdir()):
                match = _OF_A_RANK.match(path.name)
                if match is None:
                    continue
                rank, told_of_a_stall = int(match["rank"]), bool(match["kind"])
                if (rank == self.rank and told_of_a_stall) or (self.rank == 0 and rank >= self.world_size):
                    path.unlink(missing_ok=True)

    def _beat(self) -> Heartbeat:
        now, clock = self.now, time.perf_counter()
        seconds = dict(now.seconds)
        work = {}
        for phase, (samples, waiting) in self._samples.items():
            work[phase] = seconds[phase] * (1 - waiting / samples if samples else 1.0)
        work["step"] = sum(seconds[phase] for phase in STEP_PHASES)
        return Heartbeat(
            rank=self.rank,
            host=self._host,
            pid=os.getpid(),
            started=self._started,
            job=self._job,
            attempt=self._attempt,
            world_size=self.world_size,
            sequence=self._sequence,
            time=time.time(),
            interval=self.interval_s,
            step=now.step,
            marks=now.marks,
            phase=now.phase,
            seconds=max(0.0, clock - now.since),
            idle=self._idle,
            steps=now.steps,
            work=work,
            limit=self.limits.at(now),
            stalled=self._stalled,
            board=heartbeat.board_file(),
            phases={phase: seconds for phase, seconds in heartbeat.seconds_by_phase(now).items() if seconds},
            first_step_s=now.first_step_s,
            energy_wh=self._energy(),
            namespace=self._namespace,
        )

    def _energy(self) -> float | None:
        """Return the watt-hours of this rank's GPU, from when it is first seen at work."""
        if self._meter is None:
            self._meter = meter_of_this_process(self.local_rank)
        return self._meter.read_wh() if self._meter is not None else None

    def _write(self) -> None:
        self._sequence += 1
        self._written_at = time.monotonic()
        try:
            heartbeat.write_heartbeat(self.run, self._beat())
        except OSError as error:  # training continues: whoever must write reports a full disk
            self._complain(f"the heartbeat of rank {self.rank} cannot be written: {error}")

    def _complain(self, text: str) -> None:
        if not self._complained:
            self._complained = True
            logger.warning(text)

    # ----------------------------------------------------------------------------------------------------------------
    # Looking

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._ended.wait(self.poll_s):
            clock = time.monotonic()
            passed, before = min(clock - before, self.poll_s + _STARTLED_S), clock
            try:
                self._look(passed)
            except Exception as error:  # of a thread that nobody waits for it would be lost
                logger.exception("watchdog of rank %d", self.rank)
                self._complain(f"the watchdog of rank {self.rank} failed: {error}")

    def _look(self, passed: float) -> None:
        """Look at what this process is doing; `passed` seconds of its time after the last look."""
        now, limit = self.now, self.limits.at(self.now)
        self._arm(limit, looking=True)
        self._sample()
        if (life := heartbeat.life(now)) != self._life:
            self._life, self._idle = life, 0.0
        else:
            self._idle += passed
        if limit is not None and self._idle > limit / 2 and stacks.is_debugged(self._main_stack()):
            self._idle = 0.0
        if limit is None or self._idle < limit:
            if self._stalled is not None:
                logger.warning("rank %d makes progress again, after none for longer than its limit", self.rank)
                self._stalled, self._written_at, self._decided_for = None, -float("inf"), 0.0
            self._seen_by_now(limit, passed)
        elif self._stalled is None:
            self._note_stall()
            self._write()
        else:
            self._see(passed)
            self._decide(passed)
        self._arm(limit)
        if time.monotonic() - self._written_at >= self.interval_s - self.poll_s / 2:
            self._write()
        if self.rank == 0 and self.world_size > 1 and self._stalled is None:
            self._compare()

    def _main_stack(self) -> stacks.Stack:
        import sys

        return stacks.stack_of(sys._current_frames().get(self._main))

    def _sample(self) -> None:
        """Count how often this rank waits for others in a phase that counts as its own work."""
        if self.now.steps and (counts := self._samples.get(self.now.phase)) is not None:
            counts[0] += 1
            counts[1] += stacks.waits(self._main_stack()) is True

    def _arm(self, limit: float | None, *, looking: bool = False) -> None:
        """Have the stack written without this thread, should it never get to run again: where C code holds the GIL.

        Nobody else ends a process that is alone on its machine, so that one ends itself. What is written so is read
        from stacks that nobody holds still: where Python runs meanwhile, the process can crash of it. So it must not
        come while this thread is merely late, is `looking`, or has written the stacks itself.
        """
        alone = self.local_world_size == 1
        if limit is None or (self._stalled is not None and not alone):
            faulthandler.cancel_dump_traceback_later()
            return
        wait = max(limit - self._idle, 0.0) + self.poll_s + (_LOOK_S if looking else _LATE_S)
        if self.world_size == 1:  # nor is there anybody to report it
            faulthandler.dump_traceback_later(wait, exit=True, file=2)
        elif alone:
            faulthandler.dump_traceback_later(wait + 10.0, exit=True, file=self._stuck)
        else:
            faulthandler.dump_traceback_later(wait, exit=False, file=self._stuck)

    def _seen_by_now(self, limit: float | None, passed: float) -> None:
        """Begin to look at other ranks early enough to know at the limit which of them are silent."""
        if limit is not None and self._idle >= limit - self.silence_s - 2 * self.poll_s and self._idle > 0:
            self._see(passed)
        else:
            self._seen.clear()

    def _see(self, passed: float) -> None:
        """Look at the ranks before this one, up to the first that is alive; at all of them where none is."""
        for rank in range(self.world_size):
            if rank == self.rank:
                continue
            beat = heartbeat.read_heartbeat(self.run, rank)
            if beat is not None and (beat.attempt != self._attempt or beat.world_size != self.world_size):
                beat = None
            seen = self._seen.get(rank)
            if seen is None or _sign(beat) != _sign(seen.beat):
                self._seen[rank] = seen = _Seen(beat)
            else:
                seen.silent_s += passed
            if rank < self.rank and not self._is_silent(seen):
                return

    def _is_silent(self, seen: _Seen) -> bool:
        return seen.silent_s >= self.silence_s or (seen.beat is not None and seen.beat.phase == "ended")

    def _compare(self) -> None:
        """Look now and then for a slow rank; the loop reports it."""
        if time.monotonic() - self._compared_at < max(3 * self.interval_s, 0.05 * self.world_size):
            return
        self._compared_at = time.monotonic()
        beats = [beat for beat in heartbeat.read_heartbeats(self.run) if beat.attempt == self._attempt]
        if len(beats) == self.world_size and (found := self._stragglers.look(beats)) is not None:
            self.now.straggler = found

    # ----------------------------------------------------------------------------------------------------------------
    # A stall

    def _note_stall(self) -> None:
        """Write the stacks of all threads, and keep where this rank is, with further evidence."""
        loaders = stacks.loader_stacks()
        with suppress(OSError):
            lines = [*stacks.format_stacks(stacks.stacks())]
            for name, stack in loaders:
                lines += [f"{name}, the innermost line first:", *(f"  {frame}" for frame in stack), ""]
            (self.folder / f"stacks-rank-{self.rank}.txt").write_text("\n".join(lines), encoding="utf-8")
        where = stacks.where_is(self._main, stacks.stacks(), loaders)
        faults = evidence.within(gpu_faults, 2.0, self._begun) if self.local_rank == 0 else None
        self._stalled = where.plain() | {
            "cpu": evidence.cpu_share(self._main_task),
            "collectives": evidence.collectives(self.folder / f"collectives-rank-{self.rank}"),
            "gpu_faults": faults or [],
        }

    def _decide(self, passed: float) -> None:
        """End this process if it is known what the run hangs on, and find that out if it is on this rank to do so."""
        failure = self.run.failed
        if failure is not None:
            self._end(failure)
        first = next((rank for rank, seen in sorted(self._seen.items()) if not self._is_silent(seen)), self.world_size)
        if first < self.rank or len(self._seen) < self.world_size - 1:
            return
        if any(not self._is_silent(seen) and seen.beat and not seen.beat.stalled for seen in self._seen.values()):
            return  # that one makes progress, or may take longer: what it does can be what this one waits for
        reports = [self._report(rank) for rank in range(self.world_size)]
        mute = [each.beat for each in reports if _may_still_speak(each)]
        if mute and self._decided_for < _DUMP_S:
            if not self._decided_for:
                self._ask_for_stacks(mute)
            self._decided_for += passed
            return
        faults = {w.host: w.evidence("gpu_faults") for w in reports if w.evidence("gpu_faults")}
        content = record(find_culprit(reports), reports, self.folder, faults)
        if not self._may_write():
            self._end({})
        with suppress(OSError):
            if self.run.mark_failed(content):
                logger.error("%s", content["message"])
                # not by way of sys.stderr, which the thread that hangs may hold
                os.write(2, f"{error_text(content['message'])}\n".encode())
        self._end(self.run.failed or content)

    def _ask_for_stacks(self, mute: Sequence[Heartbeat | None]) -> None:
        """Have processes of this machine that cannot run Python write their stacks."""
        for beat in mute:
            if beat is not None and beat.host == self._host and beat.started and heartbeat.STACK_SIGNAL is not None:
                with suppress(OSError):
                    os.kill(beat.pid, heartbeat.STACK_SIGNAL)

    def _report(self, rank: int) -> RankReport:
        if rank == self.rank:
            return RankReport(rank, self._beat())
        seen = self._seen[rank]
        if not self._is_silent(seen):
            return RankReport(rank, seen.beat)
        beat, state, line = seen.beat, None, None
        if beat is not None and beat.host == self._host and beat.started:
            state = process_state(beat.pid, beat.started) or ""
            beat = heartbeat.at_this_moment(beat) if state else beat
        with suppress(OSError):
            dumped = stacks.parse_dump(self._stuck_path(rank).read_text(encoding="utf-8", errors="replace"))
            line = stacks.line_to_see(evidence.main_of(dumped))
        return RankReport(rank, beat, seen.silent_s, state, line)

    def _end(self, failure: dict[str, Any]) -> None:
        """End this process, and those of this machine that cannot do so themselves."""
        for other in failure.get("silent", ()):
            here = other["host"] == self._host and other["started"] and other["rank"] != self.rank
            if here and process_state(other["pid"], other["started"]) is not None:
                with suppress(OSError):
                    os.kill(other["pid"], signal.SIGKILL)
        logger.error("rank %d aborts: no progress for %.0f s", self.rank, self._idle)
        for pid, _ in stacks.loaders():
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        if self.rank == 0:
            with suppress(OSError):
                if os.isatty(1):
                    os.write(1, b"\x1b[?25h")  # a progress bar hides the cursor
        os._exit(1)


def _may_still_speak(report: RankReport) -> bool:
    """Whether the stack of a silent rank may still be written: it runs, and its thread that watches does not."""
    return report.silent_s is not None and report.line is None and report.state not in ("", "T", "t", "Z", "X")


def _sign(beat: Heartbeat | None) -> tuple[int, int] | None:
    return None if beat is None else (beat.pid, beat.sequence)
