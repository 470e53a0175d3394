"""Trial runs of a proof: a baseline run of the recipe, or one that is interrupted and resumed, in one topology or in
several."""

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
from distrain.config.strategies import describe_strategy
from distrain.fingerprints import compare
from distrain.prove.processes import Process, StartProcess, kill_all, session_processes, start_distrain, wait
from distrain.prove.traces import AttemptTrace, read_trace
from distrain.run.folder import RunDir
from distrain.run.micro_batch import copy_cache

_HASH_SEED = "PYTHONHASHSEED"

_TIMEOUT_S = 600.0
"""Timeout for a run to exit after it was asked to stop or lost a rank."""


class CouldNotRun(UserError):
    """Training itself failed, so there is nothing to compare; the message quotes its output."""


@dataclass(frozen=True)
class Topology:
    """Number of processes and strategy of a run."""

    processes: int
    strategy: str | None = None
    """A value of `distrain train --strategy`; None leaves the choice to `distrain train`."""
    replicas: int = 1
    """Replicas of the shards of fsdp2."""

    def __str__(self) -> str:
        count = "1 process" if self.processes == 1 else f"{self.processes} processes"
        return count if self.strategy is None else f"{count}, {describe_strategy(self.strategy, self.replicas)}"

    @property
    def arguments(self) -> list[str]:
        """The options of `distrain train`."""
        strategy = ["--strategy", self.strategy] if self.strategy else []
        replicas = ["--replicate", str(self.replicas)] if self.replicas > 1 else []
        return ["--processes", str(self.processes), *strategy, *replicas]


@dataclass(frozen=True)
class Interruption:
    """How and when an attempt is interrupted."""

    how: str
    """kill: SIGKILL of every process; kill-rank: SIGKILL of one rank; stop: SIGTERM."""
    step: int
    """Interrupt after this many steps."""
    fraction: float
    """Delay after that step, as a share (0 to 1.5) of the median step time; with `saving`, of a step and a save."""
    saving: bool
    """Whether the interrupted step ends with a save."""
    rank: float = 0.0
    """Which rank to kill, as a share of the world size, from 0 to 1."""
    exact: bool = False
    """Whether to save the state of exactly this step first, so that the next attempt resumes there."""

    def __str__(self) -> str:
        what = {"kill": "SIGKILL", "kill-rank": "SIGKILL of one rank", "stop": "SIGTERM"}[self.how]
        if self.exact:
            return f"{what} after step {self.step}, which is saved"
        return f"{what} in step {self.step + 1}{' and its save' if self.saving else ''}"


@dataclass
class Attempt:
    """One attempt of a trial run: from a start or resume to an interruption or the end."""

    topology: Topology
    trace: AttemptTrace
    interruption: Interruption | None
    """What ended it; None for the attempt that reached the end."""
    hash_seed: str = ""
    """PYTHONHASHSEED of its processes."""

    @property
    def resumed_at(self) -> int:
        """The step it resumed from; 0 for a first attempt."""
        return self.trace.start_step


@dataclass
class TrialRun:
    """A run of the recipe, from its first step to its last, in one or more attempts."""

    name: str
    run_dir: Path
    attempts: list[Attempt] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def topology(self) -> Topology:
        """The topology of its first attempt."""
        return self.attempts[0].topology

    @property
    def interruptions(self) -> list[Interruption]:
        """The interruptions of its attempts, in order."""
        return [attempt.interruption for attempt in self.attempts if attempt.interruption is not None]

    @property
    def last_step(self) -> int:
        """The last step that was taken."""
        return max(attempt.trace.last_step for attempt in self.attempts)

    @property
    def ended_early(self) -> bool:
        """Whether the recipe's early stop ended it before the last step of the recipe."""
        return (
            RunDir(self.run_dir).finished is not None and self.last_step < self.attempts[0].trace.facts["total_steps"]
        )

    def attempt_of(self, step: int) -> int:
        """Return the index of the last attempt that took a step."""
        return max((n for n, attempt in enumerate(self.attempts) if attempt.resumed_at < step), default=0)

    @property
    def step_seconds(self) -> float:
        """Median seconds of a step."""
        times = [time for attempt in self.attempts for time in attempt.trace.step_seconds()]
        return statistics.median(times) if times else 0.0

    @property
    def save_seconds(self) -> float:
        """Median seconds of a save."""
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

    Each leaves at least two steps to resume for, since lost state shows in the first or the second. A single one, and
    with `saved_before` every one, comes when a checkpoint is on disk.
    """
    found = []
    for index in range(count):
        kinds = ["kill", "stop", "kill-rank"] if processes[index % len(processes)] > 1 else ["kill", "stop"]
        how = kinds[index % len(kinds)]
        # the next attempt resumes from a save at the end of the interrupted step; ranks that agree to stop do so with
        # the next step, on GPUs with the one after it
        span = max(1, last_step - (5 if how == "stop" else 3))
        # the save before the last one is on disk, as the last one has waited for that
        first = min(2 * save_every, span - 1) if count == 1 or saved_before else 0
        low, high = (first + share * (span - first) // count for share in (index, index + 1))
        steps = list(range(low, max(high, low + 1)))
        saving = [step for step in steps if (step + 1) % save_every == 0]
        # every second one falls on a save where its share of the steps has one
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
    """Move one of these to a step that the number of loader processes does not divide, and resume at that step.

    Where every resume falls on a multiple of `workers` micro-batches (a step makes `micro_batches` on each rank), each
    micro-batch is read by the loader process that reads it in the baseline run, and what depends on the process stays
    hidden. Moves the last interruption that is not SIGTERM.
    """
    found = list(interruptions)
    place = max((index for index, each in enumerate(found) if each.how != "stop"), default=None)
    if place is None:
        return found
    # leave two steps after the resume; a run that was asked to stop does so within two steps
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


class TrialRunner:
    """Starts trial runs with `distrain train`. As a context manager it leaves no process behind, however it ends."""

    def __init__(
        self,
        recipe: str,
        overrides: Sequence[str],
        folder: Path,
        *,
        last_step: int | None,
        seed: int = 0,
        start: StartProcess = start_distrain,
    ):
        self.recipe, self.overrides, self.folder = recipe, list(overrides), folder
        self.last_step, self.seed = last_step, seed
        self._start = start
        self._tag = f"distrain-prove-{secrets.token_hex(8)}"
        self._process: Process | None = None
        self._inputs: dict[str, Any] = {}
        """Fingerprint of data and code of the first trial run."""
        self._micro_batches = RunDir(folder / "known")
        """Micro-batch sizes found by earlier trial runs: another size would sum in another order."""

    def __enter__(self) -> TrialRunner:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._process is not None:
            kill_all(self._process, self._tag)

    def run(
        self, name: str, topologies: Sequence[Topology], interruptions: Sequence[Interruption] = (),
        *, step_seconds: float = 0.0, save_seconds: float = 0.0, last_step: int | None = None, hash_seed: str = "",
        stop_when: Callable[[TrialRun], bool] = lambda trial: False,
    ) -> TrialRun:  # fmt: skip
        """Run a trial: attempt i uses `topologies[i]` (cycling) and is ended by `interruptions[i]`.

        Stops after `last_step` where given, and makes no further attempt once `stop_when` returns True. Each attempt
        has another PYTHONHASHSEED, as processes have by default; `hash_seed` sets it.

        Raises CouldNotRun when training itself fails.
        """
        trial = TrialRun(name, self.folder / name.replace(" ", "-").replace(",", ""))
        began = time.monotonic()
        waiting = list(interruptions)
        for number in itertools.count():
            topology = topologies[number % len(topologies)]
            interruption = waiting.pop(0) if waiting else None
            trace_folder = self.folder / "traces" / trial.run_dir.name / str(number)
            trace_folder.mkdir(parents=True)
            output = trace_folder / "output.txt"
            # one that the user has set holds in every attempt
            seed = os.environ.get(_HASH_SEED) or hash_seed or self._hash_seed(name, number)
            end = self.last_step if last_step is None else last_step
            request = {
                "folder": str(trace_folder),
                "last_step": end,
                "pause_at": interruption.step if interruption is not None else None,
                "save_at": interruption.step if interruption is not None and interruption.exact else None,
            }
            process = self._launch(trial.run_dir, topology, request, output, seed)
            if interruption is not None:
                delay = interruption.fraction * (step_seconds + (save_seconds if interruption.saving else 0.0))
                interruption = interruption if self._interrupt(process, interruption, trace_folder, delay) else None
            code = wait(process, float("inf") if interruption is None else _TIMEOUT_S)
            kill_all(process, self._tag)
            self._process = None
            copy_cache(RunDir(trial.run_dir), self._micro_batches)
            if code is None:
                raise CouldNotRun(
                    f"{name}: {_TIMEOUT_S:.0f} s after {interruption} the run has not exited; its output:\n"
                    f"{_tail(output)}"
                )
            trace = read_trace(trace_folder)
            stopped = interruption is not None and interruption.how == "stop"
            if code != 0 and (interruption is None or stopped):
                raise CouldNotRun(f"{name}: training failed with exit status {code}; its output:\n{_tail(output)}")
            if trace is not None:
                _check_topology(name, topology, trace)
                trial.attempts.append(Attempt(topology, trace, interruption, seed))
                if stop_when(trial):
                    break
            if code == 0 and self._complete(trial.run_dir, end):
                break
            if interruption is None:
                raise CouldNotRun(f"{name}: the run stopped before its last step; its output:\n{_tail(output)}")
        trial.seconds = time.monotonic() - began
        self._check_inputs(trial)
        return trial

    def _check_inputs(self, trial: TrialRun) -> None:
        """Raise CouldNotRun where data or code changed since the first trial run: nothing is proved then."""
        found = RunDir(trial.run_dir).inputs() or {}
        self._inputs = self._inputs or found
        if changes := compare(self._inputs, found):
            raise CouldNotRun(
                f"{trial.name}: data or code changed while the recipe was proved, so nothing is proved:\n  "
                + "\n  ".join(changes.lines)
                + "\nProve it again, and change nothing meanwhile"
            )

    def without_determinism(self, topology: Topology) -> TrialRun:
        """Run without interruption and with `train.deterministic: false`, to time it."""
        self.overrides.append("train.deterministic=false")
        try:
            return self.run(f"without deterministic operations, {topology}", [topology])
        finally:
            self.overrides.pop()

    def _hash_seed(self, name: str, attempt: int) -> str:
        return str(random.Random(f"{self.seed} {name} {attempt}").randrange(1, 2**32))

    def _launch(
        self, run_dir: Path, topology: Topology, request: dict[str, Any], output: Path, hash_seed: str
    ) -> Process:
        copy_cache(self._micro_batches, RunDir(run_dir))
        environment = {
            **os.environ,
            "DISTRAIN_TRACE": json.dumps(request),
            "DISTRAIN_PROOF": self._tag,
            _HASH_SEED: hash_seed,
        }
        arguments = ["train", self.recipe, *self.overrides, "--run-dir", str(run_dir), *topology.arguments]
        self._process = self._start(arguments, environment, output)
        return self._process

    def _interrupt(self, process: Process, interruption: Interruption, trace_folder: Path, delay_s: float) -> bool:
        """Interrupt an attempt; returns False when the run ended first."""
        while not (trace_folder / "paused").exists():
            if process.poll() is not None:
                return False
            time.sleep(0.01)
        if not interruption.exact:
            (trace_folder / "go").touch()
            time.sleep(delay_s)
        if process.poll() is not None:
            return False
        with contextlib.suppress(ProcessLookupError):
            if interruption.how == "kill":
                for pid in session_processes(process.pid, self._tag):
                    os.kill(pid, signal.SIGKILL)
            elif interruption.how == "stop":
                os.kill(process.pid, signal.SIGTERM)
            else:
                # rank 0 has paused, and the others are there or about to be
                while (ranks := read_trace(trace_folder)) is None or len(ranks.starts) < ranks.facts["world_size"]:
                    if process.poll() is not None:
                        return False
                    time.sleep(0.01)
                os.kill(ranks.pids()[int(interruption.rank * len(ranks.starts))], signal.SIGKILL)
        (trace_folder / "sent").touch()
        return True

    def _complete(self, run_dir: Path, last_step: int | None) -> bool:
        run = RunDir(run_dir)
        if run.finished is not None:
            return True
        stopped = run.preempted
        return stopped is not None and last_step is not None and stopped.get("step", -1) >= last_step


def _check_topology(name: str, topology: Topology, trace: AttemptTrace) -> None:
    """Raise CouldNotRun unless a run used the requested topology."""
    processes, strategy = trace.facts["world_size"], trace.facts["strategy"]
    # the replicas of ddp are its processes
    replicas = trace.facts["replicas"] if strategy == "fsdp2" else 1
    found = Topology(processes, strategy, replicas)
    if (processes, replicas) != (topology.processes, topology.replicas) or (
        topology.strategy not in (None, "auto", strategy)
    ):
        raise CouldNotRun(f"{name}: expected the topology {topology}, found {found}")


def _tail(output: Path, lines: int = 40) -> str:
    text = output.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()
    return "\n".join(f"  {line}" for line in text[-lines:]) or "  nothing"
