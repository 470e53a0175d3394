"""`distrain train`: `start` resolves and launches a machine's processes, `work` is what each of them runs."""

from __future__ import annotations

import functools
import logging
import os
import signal
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from distrain.checkpoint import newest_step
from distrain.config import UserError
from distrain.launchers.local import LocalLauncher, autobatch, end_with_launcher
from distrain.launchers.preflight import gpu_count, join_launcher, launcher_environment, worker_environment
from distrain.launchers.reporting import leave_to_rank_0, report, reported
from distrain.launchers.request import Options, RunRequest, check_same_recipe, open_run, read_target, resolve
from distrain.run.folder import RunDir, describe_effect
from distrain.run.lease import Holder, Lease, check_free, take
from distrain.run.micro_batch import CachedMicroBatch, cache_micro_batch
from distrain.system.environment import own_start, rank_told, say_ignored
from distrain.system.job_environment import job_environment
from distrain.system.logs import EACH_RANK, show_on_terminal, write_to_file
from distrain.system.output import echo_loading

if TYPE_CHECKING:
    from distrain.training.callbacks.base import Callback

logger = logging.getLogger(__name__)


def start(
    target: str,
    overrides: Sequence[str] = (),
    *,
    run_dir: str | None = None,
    processes: int | None = None,
    update: bool = False,
    strategy: str = "auto",
    offload: str | None = None,
    replicate: str | None = None,
) -> int:
    """Train a recipe or resume a run on this machine; returns the exit status. What `distrain train` does.

    Raises UserError with all that is wrong, before anything is written.
    """
    show_on_terminal(converses=True)
    say_ignored(own_start(os.environ, processes))
    found = read_target(target, overrides, run_dir, update=update)
    if not found.problems:
        echo_loading(target, on_terminal=False)
    count = processes or (1 if strategy == "single" else max(gpu_count(), 1))
    options = Options(strategy, offload, count, replicate)
    if count > 1:
        return LocalLauncher().submit(resolve(found, options, launcher_environment(count))).status
    begin_worker()
    return train_here(resolve(found, options, worker_environment()))


def begin_worker() -> None:
    """Do what comes first in a process that trains."""
    show_on_terminal(converses=True)
    end_with_launcher()
    # noted from here on, and read by the loop when it runs: a scheduler's notice may come during the imports
    signal.pthread_sigmask(signal.SIG_BLOCK, [job_environment().notice])
    if "DISTRAIN_TRACE" in os.environ:
        from distrain.training.callbacks.outside_files import note_files

        note_files()  # before anything of the user's is imported


def work(
    target: str,
    overrides: Sequence[str] = (),
    *,
    run_dir: str | None = None,
    processes: int | None = None,
    update: bool = False,
    strategy: str = "auto",
    offload: str | None = None,
    replicate: str | None = None,
    request: str | None = None,
    callbacks: Sequence[Callback] = (),
) -> int:
    """Train in this process, one of those that a launcher started; returns the exit status. All ranks call.

    `request` names what distrain's launcher has resolved and written into the run folder `target`: it is read, and
    only that the world is the one asked for is seen. Otherwise somebody has started launch/train.py by hand, and each
    process resolves the same request. Nothing is written before that. `callbacks` are called after those of the recipe.
    """
    begin_worker()
    rank = rank_told()
    try:
        if request is not None:
            found = requested(RunDir(target), request)
        else:
            asked = read_target(target, overrides, run_dir, update=update)
            found = resolve(asked, Options(strategy, offload, processes, replicate), worker_environment())
    except UserError as error:
        if rank == 0 or getattr(error, "of_each_process", False):
            logger.error("%s", error, extra=EACH_RANK if rank else None)
        else:
            leave_to_rank_0(rank, error)
        return 1
    return train_here(found, callbacks)


def requested(run: RunDir, name: str) -> RunRequest:
    """Return the request that a run's launch.json holds, in the world that it is for.

    Raises UserError for another request than the one of that `name`, and for another world.
    """
    found = RunRequest.of_run(run)
    if found is None or found.id != name:
        raise UserError(
            f"{run.launch_path} does not hold the request {name} that this process was started for: another start of "
            f"the run has written its own. Wait for that one to end, then start again: distrain train {run.path}"
        )
    join_launcher(found.processes)
    return found


def train_here(request: RunRequest, callbacks: Sequence[Callback] = ()) -> int:
    """Train what was requested in this process, one of its world; returns the exit status. All ranks call.

    `callbacks` are called after those of the recipe.
    """
    run, rank = request.run, rank_told()
    given, update = request.given, request.update
    recipe = request.recipe.recipe
    asked = request.spec
    status = 0

    def train_in_world() -> None:
        nonlocal status
        from distrain.diagnose.hang_diagnosis import Watchdog
        from distrain.loop import train
        from distrain.parallel import open_world

        found: CachedMicroBatch | None = None
        if "RANK" not in os.environ and (update or not run.finished):
            # before this process has anything of a GPU; of several, the launcher does it
            if run.exists:
                check_free(run, Holder.of_this_process())
            found = autobatch(run, recipe, asked, 1, 1)
        world = open_world(
            recipe.train.precision,
            asked,
            timeout_s=recipe.watchdog.collectives_s,
            deterministic=recipe.train.deterministic,
        )

        lease: Lease | None = None

        def begin() -> dict[str, Any] | Lease:
            if run.finished and given is not None and not update:
                check_same_recipe(run, given)
            if not update and (done := run.finished):
                return done
            holder = Holder.of_this_process()
            if run.exists:
                check_free(run, holder)  # before its recipe may be replaced
            if run.exists and not update and holder.job is None:  # who starts the run again may have changed their mind
                run.update_path.unlink(missing_ok=True)
            open_run(run, given, request.launch(), update=update)
            if found is not None:
                cache_micro_batch(run, found)
            step = newest_step(run.checkpoints) or 0
            taken = take(run, holder, step=step, processes=world.world_size, strategy=asked.strategy)
            run.clear_markers(requeued=holder.restart > 0)
            return taken

        try:
            begun = world.run_on_rank0(begin)
            if not isinstance(begun, Lease):
                if world.rank == 0:
                    from distrain.system.terminal import Console
                    from distrain.training.callbacks.trackers import show_summary

                    console = Console()
                    show_summary(begun, console)
                    if effect := run.effect():
                        console.say(f"took effect: {describe_effect(effect)}")
                    console.say(
                        f"{run.path} is finished; choose another --run-dir to train anew, or --update to continue"
                    )
                return
            # each in the folder that it sees
            lease = mine = begun if world.rank == 0 else Lease(run, begun.holder)
            world.run_on_all(lambda: mine.check_seen(world.rank))
            write_to_file(run.log_path(world.rank), world.rank)
            for note in request.notes if world.rank == 0 else ():
                logger.info("%s", note)
            # inside: the rank that fails must say so before leaving makes the others fail as well
            placed = {"rank": world.rank, "world_size": world.world_size, "may_write": lease.mine}
            with Watchdog.over(run, recipe.watchdog, **placed):
                lost = functools.partial(report, run, rank, lease=lease)
                status = reported(run, rank, lambda: train(run, world, lease, lost, callbacks), lease)
        finally:
            if lease is not None and world.rank == 0:
                lease.release(clean=status == 0)
            world.close()

    return reported(None, rank, train_in_world) or status
