"""What each process of a run does: it reads or resolves the request, joins its world, takes the run and trains."""

from __future__ import annotations

import faulthandler
import functools
import logging
import os
import signal
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from distrain.checkpoint import newest_step
from distrain.config import UserError
from distrain.config.registry import reports
from distrain.launchers.preflight import join_launcher, worker_environment
from distrain.launchers.reporting import leave_to_rank_0, report, reported
from distrain.launchers.request import Options, RunRequest, check_same_recipe, prepare, read_target, resolve
from distrain.run.folder import RunDir, describe_effect
from distrain.run.lease import Holder, Lease, take_lease
from distrain.system.environment import is_quiet, rank_told, under_torch_launcher
from distrain.system.importing import importing
from distrain.system.job_environment import job_environment
from distrain.system.logs import EACH_RANK, show_on_terminal, write_to_file
from distrain.system.output import error_line
from distrain.system.processes import end_with_parent

if TYPE_CHECKING:
    from distrain.training.callbacks.base import Callback

logger = logging.getLogger(__name__)


def begin_worker() -> None:
    """Do what comes first in a process that trains."""
    show_on_terminal(converses=True)
    end_with_launcher()
    # blocked until the loop reads it: a scheduler's notice may come during the imports
    signal.pthread_sigmask(signal.SIG_BLOCK, [job_environment().notice])
    if "DISTRAIN_TRACE" in os.environ:
        from distrain.training.callbacks.outside_files import note_files

        note_files()  # before anything of the user's is imported


def end_with_launcher() -> None:
    """Have this process killed when its launcher is: orphaned it would continue beside those of the next attempt."""
    # torch's launchers, also inside `accelerate launch`, start each worker in a session of its own and set this
    if under_torch_launcher():
        end_with_parent(signal.SIGKILL)


def work(
    target: str,
    overrides: Sequence[str] = (),
    *,
    run_dir: str | None = None,
    update: bool = False,
    request: str | None = None,
    callbacks: Sequence[Callback] = (),
    **options: Any,
) -> int:
    """Train in this process, one of those that a launcher started; returns the exit status. All ranks call.

    `request` names the request that distrain's launcher wrote into the run folder `target`: this process reads it, and
    checks that the world is the requested one. Without it somebody started launch/train.py by hand, and each process
    resolves the same request from `options`, which are those of `Options`. Nothing is written before that. `callbacks`
    are called after those of the recipe.
    """
    begin_worker()
    rank = rank_told()
    try:
        if request is not None:
            found = requested(RunDir(target), request)
        else:
            named = read_target(target, overrides, run_dir, update=update)
            with importing():
                found = resolve(named, Options(**options), worker_environment())
    except UserError as error:
        if rank == 0 or getattr(error, "of_each_process", False):
            logger.error("%s", error, extra=EACH_RANK if rank else None)
        else:
            leave_to_rank_0(rank, error)
        return 1
    return train_here(found, callbacks, opened=request is not None)


def requested(run: RunDir, name: str) -> RunRequest:
    """Return the request in a run's launch.json; raises UserError for another `name`, and for another world."""
    found = RunRequest.of_run(run)
    if found is None or found.id != name:
        raise UserError(
            f"{run.launch_path} does not hold the request {name} that this process was started for: another attempt "
            f"has replaced it. Wait for that one to end, then resume: distrain train {run.path}"
        )
    join_launcher(found.processes)
    return found


def train_here(
    request: RunRequest,
    callbacks: Sequence[Callback] = (),
    *,
    opened: bool = False,
    failures: list[BaseException] | None = None,
) -> int:
    """Train what was requested in this process, one of its world; returns the exit status. All ranks call.

    `opened`: whether the launcher has prepared the run. `callbacks` are called after those of the recipe. A list of
    `failures` gets the exception that ended it, which the terminal then does not show.
    """
    run, rank, recipe = request.run, rank_told(), request.recipe.recipe
    alone = request.processes == 1
    status, trained = 0, False
    if not faulthandler.is_enabled():
        faulthandler.enable(2)  # where the Python code was when a library of C code ends this process

    def train_in_world() -> None:
        nonlocal status, trained
        with importing():
            from distrain.diagnose.hang_diagnosis import Watchdog
            from distrain.loop import train
            from distrain.parallel import open_world

        if alone and not request.is_finished:
            prepare(request, opened=opened)
        world = open_world(
            recipe.train.precision,
            request.spec,
            timeout_s=recipe.watchdog.collectives_s,
            deterministic=recipe.train.deterministic,
        )
        lease: Lease | None = None

        def begin() -> Lease | None:
            if request.is_finished:
                if request.given is not None:
                    check_same_recipe(run, request.given)
                return None
            if not (alone or opened):
                prepare(request, search=False)
            holder, step = Holder.of_this_process(), newest_step(run.checkpoints) or 0
            taken = take_lease(run, holder, step=step, processes=world.world_size, strategy=request.strategy)
            run.clear_markers(requeued=holder.restart > 0)
            return taken

        try:
            begun = world.run_on_rank0(begin)
            if begun is None:
                if world.rank == 0:
                    show_finished(run)
                return
            # each in the folder that it sees
            lease = mine = begun if world.rank == 0 else Lease(run, begun.holder)
            world.run_on_all(lambda: mine.check_seen(world.rank))
            write_to_file(run.log_path(world.rank), world.rank)
            for note in request.notes if world.rank == 0 else ():
                logger.info("%s", note)
            # inside: the rank that fails must report it before its exit makes the others fail as well
            placed = {"rank": world.rank, "world_size": world.world_size, "may_write": lease.mine}
            with Watchdog.over(run, recipe.watchdog, **placed):
                lost = functools.partial(report, run, rank, lease=lease)
                status = reported(run, rank, lambda: train(run, world, lease, lost, callbacks), lease, failures)
                trained = status == 0
        finally:
            if lease is not None and world.rank == 0:
                lease.release(clean=status == 0)
            world.close()

    status = reported(None, rank, train_in_world, failures=failures) or status
    # the other processes have what they need; only this one still reads the run
    if trained and rank == 0 and recipe.log.report and ends_here(run):
        write_report(run)
    return status


def ends_here(run: RunDir) -> bool:
    """Whether a run that has ended well is not started again but by a person."""
    if run.finished is not None:
        return True
    # a scheduler resumes what it has stopped, and leaves what a person asked to stop
    return run.preempted is not None and (job_environment().job is None or run.stop_path.exists())


def write_report(run: RunDir) -> None:
    """Write the report that `log.report` asks for. Without it the run is as complete, so what fails is a warning."""
    try:
        path = reports.find("html").value(run.path)
    except (Exception, KeyboardInterrupt) as error:
        logger.warning(
            f"log.report: the report could not be written: {error_line(error)}. The run is complete without it; "
            f"`distrain report {run.path}` writes it"
        )
    else:
        logger.info(f"wrote {path}")


_SHOWN = ("strategy", "engine", "processes", "device", "precision", "offload", "optimizer", "accumulation", "versions")
"""What is printed of what took effect."""


def show_finished(run: RunDir) -> int:
    """Print the summary of a finished run, and what took effect in it; returns the exit status."""
    if is_quiet():
        return 0
    from distrain.system.terminal import Console
    from distrain.training.callbacks.trackers import show_summary

    console = Console()
    show_summary(run.summary() or {}, console)
    if effect := run.effect():
        shown = {key: effect[key] for key in _SHOWN if key in effect}
        console.say(f"took effect: {describe_effect(shown)}; effect.json has all of it")
    console.say(f"{run.path} is finished; choose another --run-dir to train anew, or --update to continue")
    return 0
