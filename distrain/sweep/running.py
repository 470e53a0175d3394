"""Starting the runs of a sweep: each is a `distrain train` of its own, on its share of this machine."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

from distrain.config import UserError
from distrain.config.yaml import load_recipe
from distrain.launchers import (
    Options,
    StartEnvironment,
    Target,
    all_of,
    check_folder,
    gpu_count,
    launcher_environment,
    resolve,
)
from distrain.launchers.sweeps import STOP, SweepRun, best_of, expand, sweeping
from distrain.report.status import status_of
from distrain.run.folder import RunDir
from distrain.sweep.grid import Runs
from distrain.system import numbers
from distrain.system.environment import SWEPT_BY, own_start, say_ignored
from distrain.system.job_environment import job_environment
from distrain.system.logs import show_on_terminal

logger = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.1


@dataclass(frozen=True)
class SweepOptions:
    """How the runs of a sweep are started."""

    parallel: int = 1
    """How many run at a time."""
    launch: Options = field(default_factory=Options)
    """Of each run."""
    retry_failed: bool = False
    search: int | None = None
    """How many runs a search makes; None: every combination is a run."""
    prune: bool = True
    """Whether a search stops runs that are worse than the others."""
    quiet: bool = False
    """Whether only warnings and errors are shown, on standard error."""


def run_sweep(
    target: str, overrides: Sequence[str], arrays: Sequence[str], options: SweepOptions, sweep_dir: str | None = None
) -> tuple[Path, bool]:
    """Run the sweep of a recipe until each of its runs has ended; returns its folder, and whether all are complete.

    The same call resumes one that was stopped. Raises UserError with all that is wrong, before anything is written.
    """
    if not arrays:
        raise UserError("a sweep needs --array KEY=VALUE,VALUE, which says what differs between its runs")
    say_ignored(own_start(os.environ, options.launch.processes, "sweep"))
    shares = shares_of(
        options.parallel, options.launch.processes, visible_gpus(os.environ), len(os.sched_getaffinity(0)), os.environ
    )
    show_on_terminal(converses=not options.quiet)
    runs: Runs
    if options.search is not None:
        from distrain.sweep.search_runs import open_search

        folder, runs = open_search(target, overrides, arrays, options, shares[0], sweep_dir)
    else:
        folder, runs = _open_grid(target, overrides, arrays, options, shares[0], sweep_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with sweeping(folder):
        (folder / STOP).unlink(missing_ok=True)
        runs.record.write(folder)
        with Stopping(folder) as stopping:
            _Runner(target, runs, options, shares, stopping).run()
    statuses = [status_of(run.folder, []).state for run in runs.runs]
    complete = [
        state == "finished" or runs.pruned(run) is not None for run, state in zip(runs.runs, statuses, strict=True)
    ]
    return folder, len(complete) >= runs.count and all(complete)


def _open_grid(
    target: str,
    overrides: Sequence[str],
    arrays: Sequence[str],
    options: SweepOptions,
    share: Share,
    sweep_dir: str | None,
) -> tuple[Path, Runs]:
    sweep = expand(target, overrides, arrays, sweep_dir, "--sweep-dir")
    recipe = check_runs(target, sweep.runs, options.launch, share, changes_names=sweep.changes_names)
    best = best_of(recipe, sweep.runs[0].values)
    record = sweep.earlier() or sweep.record(best)
    record.best = best  # before any run has trained the recipe may have changed
    return sweep.folder, Runs(sweep.folder, record, sweep.runs, retry_failed=options.retry_failed)


# --------------------------------------------------------------------------------------------------------------------
# Before the first run


@dataclass(frozen=True)
class Share:
    """What one of the runs that run at a time has of this machine."""

    gpus: tuple[str, ...] = ()
    """As CUDA_VISIBLE_DEVICES has them; none on CPUs."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """The environment variables that say so."""


def visible_gpus(variables: Mapping[str, str]) -> list[str]:
    """Return the GPUs of this machine that its processes may use, as CUDA_VISIBLE_DEVICES has them."""
    if (visible := variables.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [part.strip() for part in visible.split(",") if part.strip() not in ("", "-1")]
    return [str(number) for number in range(gpu_count(variables))]


def shares_of(
    parallel: int, processes: int | None, gpus: Sequence[str], cpus: int, variables: Mapping[str, str]
) -> list[Share]:
    """Divide a machine between `parallel` runs of `processes` each. Pure.

    Each has its own GPUs; where there are fewer than runs, some share one. CPU threads are divided too, unless
    OMP_NUM_THREADS is set. Raises UserError where a run has more processes than GPUs.
    """
    each = len(gpus) // parallel
    if gpus and (processes or 1) > max(each, 1):
        raise UserError(
            f"--parallel {parallel} leaves each run {max(each, 1)} of the {len(gpus)} GPUs, and --processes "
            f"{processes} needs one for each process; take --parallel {max(1, len(gpus) // (processes or 1))}"
            + (f", or --processes {each}" if each else "")
        )
    shares = []
    for number in range(parallel):
        own = (
            tuple(gpus[number * each : (number + 1) * each])
            if each
            else tuple(gpus[number % len(gpus) :][:1])
            if gpus
            else ()
        )
        found = {"CUDA_VISIBLE_DEVICES": ",".join(own)} if gpus else {}
        if parallel > 1 and "OMP_NUM_THREADS" not in variables:
            found["OMP_NUM_THREADS"] = str(max(1, cpus // parallel // (processes or max(len(own), 1))))
        shares.append(Share(own, found))
    return shares


def check_runs(target: str, runs: Sequence[SweepRun], options: Options, share: Share, *, changes_names: bool) -> Any:
    """Raise UserError with all that is wrong with the runs; returns the recipe of the first."""
    count = options.processes or (1 if options.strategy == "single" else max(len(share.gpus), 1))
    environment: StartEnvironment = replace(launcher_environment(count), gpus=len(share.gpus))
    problems: list[UserError] = []
    recipe = None
    for number, run in enumerate(runs):
        try:
            named = Target(target, RunDir(run.folder), load_recipe(target, run.overrides), False)
            own = replace(options, processes=count)
            resolve(named, own, environment, check_names=number == 0 or changes_names, check_run=False)
            check_folder(RunDir(run.folder), named.recipe, update=False, option="--sweep-dir")
            recipe = recipe or named.recipe
        except UserError as error:
            values = ", ".join(f"{key}={value}" for key, value in run.values.items())
            problems.append(error if len(runs) == 1 else UserError(f"with {values}: {error}"))
    if problems:
        raise all_of(problems)
    assert recipe is not None
    return recipe.recipe


# --------------------------------------------------------------------------------------------------------------------
# The runs


@dataclass
class _Child:
    run: SweepRun
    process: subprocess.Popen[bytes]
    share: Share
    pruned: int | None = None
    """The step of the evaluation at which it was."""


class Stopping:
    """Notes signals and a file that ask the sweep to stop."""

    def __init__(self, folder: Path):
        self.path = folder / STOP
        self.signals: list[str] = []
        self._before: dict[int, Any] = {}

    @property
    def reason(self) -> str | None:
        """Why the sweep is to stop, or None."""
        return self.signals[0] if self.signals else f"the file {self.path.name}" if self.path.exists() else None

    @property
    def insists(self) -> bool:
        """Whether Ctrl-C was pressed again."""
        return len(self.signals) > 1 and self.signals[-1] == "SIGINT"

    def __enter__(self) -> Stopping:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, job_environment().notice):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signals.append(signal.Signals(number).name)


class _Runner:
    """Starts the runs as shares of the machine become free."""

    def __init__(self, target: str, runs: Runs, options: SweepOptions, shares: Sequence[Share], stopping: Stopping):
        self.target, self.runs, self.options, self.stopping = target, runs, options, stopping
        self.free = list(shares)
        self.children: list[_Child] = []
        self.logs = runs.folder / "logs"

    def run(self) -> None:
        """Return when every run has ended, or been stopped."""
        self._announce()
        asked = killed = False
        try:
            while True:
                reason = self.stopping.reason
                if reason is not None and not asked:
                    asked = True
                    logger.info(
                        f"{reason}: no further run is started, and those under way save and stop"
                        if self.children
                        else f"{reason}: no further run is started"
                    )
                    for child in self.children:
                        self._ask(child)
                if self.stopping.insists and not killed:
                    killed = True
                    logger.warning("SIGINT again: the runs are killed; they resume from their last checkpoints")
                    self._kill()
                while reason is None and self.free and (run := self.runs.next()) is not None:
                    self._start(run)
                if not self.children:
                    return
                for child in list(self.children):
                    self._look(child)
                if self.children:
                    time.sleep(_LOOK_EVERY_S)
        finally:
            self._kill()  # none is left, but after an error here

    def _announce(self) -> None:
        options, share = self.options, self.free[0]
        parts = [f"{self.runs.count} run{'s' * (self.runs.count != 1)} in {self.runs.folder}"]
        parts += [f"{options.parallel} at a time"] if options.parallel > 1 else []
        if share.gpus:
            shared = sum(each.gpus == share.gpus for each in self.free)
            parts.append(
                f"{shared} on each GPU" if shared > 1 else f"each on {len(share.gpus)} GPU{'s' * (len(share.gpus) > 1)}"
            )
        logger.info(", ".join(parts) + f"; what they print is in {self.logs.name}/")
        done = [run for run in self.runs.runs if not self.runs.is_left(run, retry_failed=True)]
        if done:
            logger.info(f"{len(done)} of them ended before, and are not run again")
        for run in [] if options.retry_failed else self.runs.runs:
            if (failed := RunDir(run.folder).failed) is not None and RunDir(run.folder).finished is None:
                said = next(iter(str(failed.get("message") or failed.get("error")).splitlines()), "")
                logger.warning(f"{run.folder.name} failed before, and is not run again without --retry-failed: {said}")

    def _start(self, run: SweepRun) -> None:
        share = self.free.pop(0)
        self.logs.mkdir(exist_ok=True)
        launch = self.options.launch
        given = {
            "--processes": launch.processes,
            "--strategy": launch.strategy,
            "--offload": launch.offload,
            "--replicate": launch.replicate,
        }
        chosen = [word for name, value in given.items() if value is not None for word in (name, str(value))]
        resumes = RunDir(run.folder).has_trained
        with (self.logs / f"{run.folder.name}.log").open("ab") as log:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-P", "-m", "distrain", "train", self.target, *run.overrides),
                    *("--run-dir", str(run.folder), *chosen),
                ],
                env={**os.environ, **share.variables, SWEPT_BY: str(os.getpid())},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the sweep, which passes it on
            )
        self.children.append(_Child(run, process, share))
        logger.info(f"{run.folder.name} {'resumes' if resumes else 'starts'}")

    def _look(self, child: _Child) -> None:
        ended = child.process.poll() is not None
        if child.pruned is None and (step := self.runs.watch(child.run)) is not None:
            child.pruned = step
            if not ended:
                self._ask(child)
        if ended:
            self.children.remove(child)
            self.free.append(child.share)
            self._report(child)

    def _ask(self, child: _Child) -> None:
        """Have a run save and stop."""
        with suppress(ProcessLookupError):
            child.process.send_signal(signal.SIGTERM)

    def _kill(self) -> None:
        for child in self.children:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(child.process.pid, signal.SIGKILL)
            child.process.wait()

    def _report(self, child: _Child) -> None:
        name = child.run.folder.name
        run = RunDir(child.run.folder)
        failed = False
        if child.pruned is not None:
            logger.info(f"{name} is pruned after step {child.pruned}: it is worse than the others were by then")
        elif (finished := run.finished) is not None:
            best = finished.get("best")
            score = f": {best['metric']} {numbers.number(best['value'])} at step {best['step']}" if best else ""
            logger.info(f"{name} finished{score}")
        elif (stopped := run.preempted) is not None and child.process.returncode == 0:
            logger.info(f"{name} has saved step {stopped.get('step')} and stopped; the same command resumes it")
        elif self.stopping.reason is not None:
            logger.info(f"{name} was stopped before it could save; the same command resumes it")
        else:
            failed = True
            logger.error(f"{name} failed: {self._why(child, run)}")
        self.runs.ended(child.run, failed=failed)

    def _why(self, child: _Child, run: RunDir) -> str:
        log = self.logs / f"{child.run.folder.name}.log"
        if (failed := run.failed) is not None:
            said = next(iter(str(failed.get("message") or failed.get("error")).splitlines()), "")
        else:
            lines = log.read_bytes()[-4096:].decode("utf-8", "replace").split("\n")
            code = child.process.returncode
            said = next((line for line in reversed(lines) if line.strip()), "") or f"it ended with status {code}"
        return f"{said}; all of it is in {log}"
