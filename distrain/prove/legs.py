"""Legs of a proof: a run of the recipe, straight or interrupted and resumed, in one placement or in several."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import secrets
import signal
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from distrain.config import UserError
from distrain.fingerprints import compare
from distrain.prove.processes import Process, Start, kill_all, members, start_distrain, wait
from distrain.prove.traces import Record, read_record
from distrain.run.folder import RunDir, strategy_in_words
from distrain.run.micro_batch import hand_on

_HASH_SEED = "PYTHONHASHSEED"

_PATIENCE_S = 600.0
"""How long a run that was asked to stop, or that lost a rank, may take to end."""


class CouldNotRun(UserError):
    """Training itself failed, so there is nothing to compare; the message holds what it said."""


@dataclass(frozen=True)
class Placement:
    """Where a run takes place."""

    processes: int
    strategy: str | None = None
    """As `distrain train --strategy` takes it; None leaves it to `distrain train`."""
    replicas: int = 1
    """Of what fsdp2 shards."""

    def __str__(self) -> str:
        count = "1 process" if self.processes == 1 else f"{self.processes} processes"
        return count if self.strategy is None else f"{count}, {strategy_in_words(self.strategy, self.replicas)}"

    @property
    def arguments(self) -> list[str]:
        """The options of `distrain train`."""
        strategy = ["--strategy", self.strategy] if self.strategy else []
        replicas = ["--replicate", str(self.replicas)] if self.replicas > 1 else []
        return ["--processes", str(self.processes), *strategy, *replicas]


@dataclass(frozen=True)
class Interruption:
    """How an attempt is brought to its end before its time."""

    how: str
    """kill: SIGKILL of every process; kill-rank: SIGKILL of one rank; stop: SIGTERM."""
    step: int
    """It comes when this many steps are done."""
    fraction: float
    """So much of a step's usual time later, from 0 to 1.5; in `saving`, of a step and a save."""
    saving: bool
    """Whether the step under way ends with a save."""
    rank: float = 0.0
    """Which rank, as a share of their number."""
    exact: bool = False
    """Whether the state of just this step is saved first, so that the next start resumes there."""

    def __str__(self) -> str:
        what = {"kill": "SIGKILL", "kill-rank": "SIGKILL of one rank", "stop": "SIGTERM"}[self.how]
        if self.exact:
            return f"{what} after step {self.step}, which is saved"
        return f"{what} in step {self.step + 1}{' and its save' if self.saving else ''}"


@dataclass
class Attempt:
    """One start of a leg's run."""

    placement: Placement
    record: Record
    interruption: Interruption | None
    """What ended it; None for one that went on to the end."""
    hash_seed: str = ""
    """By which Python hashed texts in it (PYTHONHASHSEED)."""

    @property
    def resumed_at(self) -> int:
        """The step that it started at."""
        return self.record.start_step


@dataclass
class Leg:
    """A run from its first step to its last."""

    name: str
    run_dir: Path
    attempts: list[Attempt] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def placement(self) -> Placement:
        """Where it started."""
        return self.attempts[0].placement

    @property
    def interruptions(self) -> list[Interruption]:
        """What ended its attempts."""
        return [attempt.interruption for attempt in self.attempts if attempt.interruption is not None]

    @property
    def last_step(self) -> int:
        """The last step that was taken."""
        return max(attempt.record.last_step for attempt in self.attempts)

    @property
    def ended_early(self) -> bool:
        """Whether the recipe's early stop ended it before the last step of the recipe."""
        return (
            RunDir(self.run_dir).finished is not None and self.last_step < self.attempts[0].record.facts["total_steps"]
        )

    def attempt_of(self, step: int) -> int:
        """Return the number of the last attempt that took a step."""
        return max((n for n, attempt in enumerate(self.attempts) if attempt.resumed_at < step), default=0)

    @property
    def step_seconds(self) -> float:
        """What a step usually takes."""
        times = [time for attempt in self.attempts for time in attempt.record.step_seconds()]
        return statistics.median(times) if times else 0.0

    @property
    def save_seconds(self) -> float:
        """What a save usually takes."""
        rows = [row for row in RunDir(self.run_dir).rows() if row["event"] == "checkpoint"]
        return statistics.median([row["seconds"] or 0.0 for row in rows]) if rows else 0.0


def draw_interruptions(
    count: int,
    *,
    last_step: int,
    save_every: int,
    processes: Sequence[int],
    draw: random.Random,
    saved_before: bool = False,
) -> list[Interruption]:
    """Return `count` interruptions, spread over the steps, of every kind in turn, at random moments.

    Each leaves at least two steps to go on with, as what was lost shows in the first or in the second. The only one,
    and with `saved_before` every one, comes when a checkpoint is on disk.
    """
    found = []
    for index in range(count):
        kinds = ["kill", "stop", "kill-rank"] if processes[index % len(processes)] > 1 else ["kill", "stop"]
        how = kinds[index % len(kinds)]
        # a save at the end of the step under way is gone on from; ranks that agree to stop do so with the next step, on
        # GPUs with the one after it
        span = max(1, last_step - (5 if how == "stop" else 3))
        # the save before the last one is on disk, as the last one has waited for that
        first = min(2 * save_every, span - 1) if count == 1 or saved_before else 0
        low, high = (first + share * (span - first) // count for share in (index, index + 1))
        steps = list(range(low, max(high, low + 1)))
        saving = [step for step in steps if (step + 1) % save_every == 0]
        # every other one comes with a save where one falls into its share of the steps
        if index % 2 == 0 and saving:
            steps = saving
        step = draw.choice(steps)
        found.append(
            Interruption(
                how=how,
                step=step,
                fraction=draw.uniform(0, 1.5),
                saving=(step + 1) % save_every == 0,
                rank=draw.random(),
            )
        )
    return found


def resume_between(
    interruptions: Sequence[Interruption],
    *,
    last_step: int,
    save_every: int,
    workers: int,
    micro_batches: int,
    draw: random.Random,
) -> list[Interruption]:
    """Let one of these be at a step that no number of loader processes divides, and be resumed at that step.

    Where every resume falls on a multiple of `workers` micro-batches (a step makes `micro_batches` on each rank), each
    micro-batch is read by the process that reads it in a straight run, whatever depends on its number. It is the last
    one that is not a request to stop.
    """
    found = list(interruptions)
    place = max((index for index, each in enumerate(found) if each.how != "stop"), default=None)
    if place is None:
        return found
    # two steps are left to go on with; one that was asked to stop does so within two steps
    latest = last_step - 2
    high = max(1, min(latest, found[place + 1].step if place + 1 < len(found) else latest))
    low = found[place - 1].step + 3 if place else min(2 * save_every, high - 1)
    steps = list(range(max(1, low), high + 1)) or list(range(1, latest + 1))

    def divisors(step: int) -> tuple[bool, int]:
        numbers = range(2, max(9, workers + 1))
        done = step * micro_batches
        return workers > 1 and done % workers == 0, sum(step % count == 0 for count in numbers)

    fewest = min(map(divisors, steps))
    step = draw.choice([each for each in steps if divisors(each) == fewest])
    found[place] = replace(found[place], step=step, fraction=0.0, saving=False, exact=True)
    return found


class Runner:
    """Runs legs with `distrain train`. As a context, it leaves no process behind, however it ends."""

    def __init__(
        self,
        recipe: str,
        overrides: Sequence[str],
        folder: Path,
        *,
        last_step: int | None,
        seed: int = 0,
        start: Start = start_distrain,
    ):
        self.recipe, self.overrides, self.folder = recipe, list(overrides), folder
        self.last_step, self.seed = last_step, seed
        self._start = start
        self._mark = f"distrain-prove-{secrets.token_hex(8)}"
        self._process: Process | None = None
        self._inputs: dict[str, Any] = {}
        """What the first leg depended on."""
        self._known = RunDir(folder / "known")
        """Sizes of micro-batches that a leg has found: another size would be another order of the same sums."""

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._process is not None:
            kill_all(self._process, self._mark)

    def run(
        self, name: str, placements: Sequence[Placement], interruptions: Sequence[Interruption] = (),
        *, step_seconds: float = 0.0, save_seconds: float = 0.0, last_step: int | None = None, hash_seed: str = "",
        enough: Callable[[Leg], bool] = lambda leg: False,
    ) -> Leg:  # fmt: skip
        """Run one leg: attempt i takes place in `placements[i]` (cycling) and is ended by `interruptions[i]`.

        It ends after `last_step`, where that is said. Python hashes texts in each attempt by another seed, as it does
        in processes that nobody gives one; `hash_seed` says which. No further attempt is made where `enough` says so.

        Raises CouldNotRun when training fails by itself.
        """
        leg = Leg(name, self.folder / name.replace(" ", "-").replace(",", ""))
        began = time.monotonic()
        waiting = list(interruptions)
        for number in itertools.count():
            placement = placements[number % len(placements)]
            interruption = waiting.pop(0) if waiting else None
            trace = self.folder / "traces" / leg.run_dir.name / str(number)
            trace.mkdir(parents=True)
            output = trace / "output.txt"
            # one that the user has set holds in every start of the run
            seed = os.environ.get(_HASH_SEED) or hash_seed or self._hash_seed(name, number)
            end = self.last_step if last_step is None else last_step
            asked = {
                "folder": str(trace),
                "last_step": end,
                "pause_at": interruption.step if interruption is not None else None,
                "save_at": interruption.step if interruption is not None and interruption.exact else None,
            }
            process = self._begin(leg.run_dir, placement, asked, output, seed)
            if interruption is not None:
                delay = interruption.fraction * (step_seconds + (save_seconds if interruption.saving else 0.0))
                interruption = interruption if self._interrupt(process, interruption, trace, delay) else None
            code = wait(process, float("inf") if interruption is None else _PATIENCE_S)
            kill_all(process, self._mark)
            self._process = None
            hand_on(RunDir(leg.run_dir), self._known)
            if code is None:
                raise CouldNotRun(
                    f"{name}: {_PATIENCE_S:.0f} s after {interruption} the run has not ended; it said\n{_tail(output)}"
                )
            record = read_record(trace)
            stopped = interruption is not None and interruption.how == "stop"
            if code != 0 and (interruption is None or stopped):
                raise CouldNotRun(f"{name}: training failed with exit status {code}; it said\n{_tail(output)}")
            if record is not None:
                _check_placement(name, placement, record)
                leg.attempts.append(Attempt(placement, record, interruption, seed))
                if enough(leg):
                    break
            if code == 0 and self._complete(leg.run_dir, end):
                break
            if interruption is None:
                raise CouldNotRun(f"{name}: the run stopped before its end; it said\n{_tail(output)}")
        leg.seconds = time.monotonic() - began
        self._check_inputs(leg)
        return leg

    def _check_inputs(self, leg: Leg) -> None:
        """Raise CouldNotRun where data or code changed since the first leg: a difference would then say nothing."""
        found = RunDir(leg.run_dir).inputs() or {}
        self._inputs = self._inputs or found
        if changes := compare(self._inputs, found):
            raise CouldNotRun(
                f"{leg.name}: data or code changed while the recipe was proved, so nothing is proved:\n  "
                + "\n  ".join(changes.lines)
                + "\nProve it again, and change nothing meanwhile"
            )

    def without_determinism(self, placement: Placement) -> Leg:
        """Run straight with `train.deterministic: false`, for its time alone."""
        self.overrides.append("train.deterministic=false")
        try:
            return self.run(f"without deterministic operations, {placement}", [placement])
        finally:
            self.overrides.pop()

    def _hash_seed(self, name: str, attempt: int) -> str:
        return str(random.Random(f"{self.seed} {name} {attempt}").randrange(1, 2**32))

    def _begin(
        self, run_dir: Path, placement: Placement, asked: dict[str, Any], output: Path, hash_seed: str
    ) -> Process:
        hand_on(self._known, RunDir(run_dir))
        environment = {
            **os.environ,
            "DISTRAIN_TRACE": json.dumps(asked),
            "DISTRAIN_PROOF": self._mark,
            _HASH_SEED: hash_seed,
        }
        arguments = ["train", self.recipe, *self.overrides, "--run-dir", str(run_dir), *placement.arguments]
        self._process = self._start(arguments, environment, output)
        return self._process

    def _interrupt(self, process: Process, interruption: Interruption, trace: Path, delay_s: float) -> bool:
        """Bring about an interruption; returns False when the run came to its end before."""
        while not (trace / "paused").exists():
            if process.poll() is not None:
                return False
            time.sleep(0.002)
        if not interruption.exact:
            (trace / "go").touch()
            time.sleep(delay_s)
        if process.poll() is not None:
            return False
        with contextlib.suppress(ProcessLookupError):
            if interruption.how == "kill":
                for pid in members(process.pid, self._mark):
                    os.kill(pid, signal.SIGKILL)
            elif interruption.how == "stop":
                os.kill(process.pid, signal.SIGTERM)
            else:
                # rank 0 has paused, and the others are there or about to be
                while (ranks := read_record(trace)) is None or len(ranks.starts) < ranks.facts["world_size"]:
                    if process.poll() is not None:
                        return False
                    time.sleep(0.002)
                os.kill(ranks.pids()[int(interruption.rank * len(ranks.starts))], signal.SIGKILL)
        (trace / "sent").touch()
        return True

    def _complete(self, run_dir: Path, last_step: int | None) -> bool:
        run = RunDir(run_dir)
        if run.finished is not None:
            return True
        stopped = run.preempted
        return stopped is not None and last_step is not None and stopped.get("step", -1) >= last_step


def _check_placement(name: str, placement: Placement, record: Record) -> None:
    """Raise CouldNotRun unless a run took place where it was to."""
    processes, strategy = record.facts["world_size"], record.facts["strategy"]
    # those of ddp are its processes
    replicas = record.facts["replicas"] if strategy == "fsdp2" else 1
    ran = Placement(processes, strategy, replicas)
    if (processes, replicas) != (placement.processes, placement.replicas) or (
        placement.strategy not in (None, "auto", strategy)
    ):
        raise CouldNotRun(f"{name}: asked for {placement}, and it ran in {ran}")


def _tail(output: Path, lines: int = 40) -> str:
    text = output.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()
    return "\n".join(f"  {line}" for line in text[-lines:]) or "  nothing"
