"""`distrain train`: `start` launches a machine's processes, `work` is what each of them runs."""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from distrain.autobatch.search import settled
from distrain.checkpoint import newest_step
from distrain.config import Recipe, UserError
from distrain.config.yaml import LoadedRecipe, load_recipe
from distrain.launchers.local import (
    TYPED,
    LaunchPlan,
    check_gpus,
    configuration_file,
    end_with_launcher,
    gpu_count,
    launch,
    shared_file,
)
from distrain.launchers.preflight import asked_for, check_one_owner, join_launcher
from distrain.launchers.reporting import leave_to_rank_0, log, log_to, reported, tell
from distrain.launchers.request import check_same_recipe, find_run, open_run
from distrain.run.folder import Launch, RunDir, effect_in_words
from distrain.run.lease import Holder, Lease, check_free, take
from distrain.run.micro_batch import Probed, remember
from distrain.system.environment import own_start, rank_told, say_ignored
from distrain.system.job_environment import job_environment
from distrain.system.output import echo, echo_error, echo_loading, one_line

if TYPE_CHECKING:
    from distrain.parallel import StrategySpec


def start(
    target: str,
    overrides: Sequence[str] = (),
    *,
    run_dir: str | None = None,
    processes: int | None = None,
    update: bool = False,
    strategy: str = "auto",
    offload: str | None = None,
) -> int:
    """Train a recipe or go on with a run on this machine; returns the exit status. What `distrain train` does."""
    say_ignored(own_start(os.environ, processes))
    run, loaded = find_run(target, overrides, run_dir)
    echo_loading(target, on_terminal=False)
    count = processes or (1 if strategy == "single" else max(gpu_count(), 1))
    if count == 1:
        return work(target, overrides, run_dir=run_dir, processes=1, update=update, strategy=strategy, offload=offload)
    check_gpus(count, gpu_count())  # before it is tried what fits on them
    from distrain.parallel import check_precision, read_configuration
    from distrain.training.checks import check_recipe

    configuration = read_configuration([], os.environ)
    asked = asked_for(run, count, strategy, offload, configuration)
    stored = loaded or load_recipe(run.recipe_path)
    check_one_owner(configuration, stored.recipe, count, stored.origins)
    check_precision(stored.recipe.train.precision, asked.strategy)

    if loaded is not None:
        check_recipe(loaded.recipe, target)
    if run.exists and not run.finished:
        holder = Holder.of_this_process()
        check_free(run, holder)  # before its recipe may be replaced
        # a failure of this start must not be taken for an earlier preemption
        run.clear_markers(requeued=holder.restart > 0)
    # the recipe is read once: workers go by the run folder
    open_run(run, loaded, Launch.describe(count, asked.strategy, asked.offload), update=update)
    if (update or not run.finished) and (found := probed(run, stored.recipe, asked, count, count)) is not None:
        remember(run, found)
    arguments = [str(run.path), "--strategy", asked.strategy, "--offload", asked.offload]
    arguments += ["--update"] if update else []
    os.environ[TYPED] = json.dumps(sys.argv)
    script, config = shared_file("launch", "train.py"), configuration_file(asked.strategy)
    status = launch(LaunchPlan(script, tuple(arguments), count, config, asked.offload), run)
    # a launcher that was signalled calls that a failure, and the run folder knows better
    return 0 if run.preempted is not None else status


def work(
    target: str,
    overrides: Sequence[str] = (),
    *,
    run_dir: str | None = None,
    processes: int | None = None,
    update: bool = False,
    strategy: str = "auto",
    offload: str | None = None,
) -> int:
    """Train in this process, one of those that a launcher started; returns the exit status. All ranks call.

    Nothing is written before the world and the strategy have been found to be those that were asked for: by
    `processes`, `strategy` and `offload`, by the run's launch.json, or by the launcher's command line and files.
    """
    end_with_launcher()
    # noted from here on, and read by the loop when it runs: a scheduler's notice may come during the imports
    signal.pthread_sigmask(signal.SIG_BLOCK, [job_environment().notice])
    rank = rank_told()
    if "DISTRAIN_TRACE" in os.environ:
        from distrain.training.callbacks.outside_files import note_files

        note_files()  # before anything of the user's is imported

    def prepare() -> tuple[RunDir, LoadedRecipe | None, StrategySpec, list[str]]:
        from distrain.parallel import unused

        run, loaded = find_run(target, overrides, run_dir)
        world_size, configuration = join_launcher(processes or (run.launch().processes if loaded is None else None))
        asked = asked_for(run, world_size, strategy, offload, configuration, resumes=loaded is None)
        from distrain.training.checks import check_recipe

        stored = loaded or load_recipe(run.recipe_path)
        check_recipe(stored.recipe, target)
        check_one_owner(configuration, stored.recipe, world_size, stored.origins)
        notes = [f"{place} has no part in this run" for place in unused(configuration)]
        if strategy == "ddp" and asked.strategy == "single":
            notes.append("--strategy ddp in one process is single")
        return run, loaded, asked, notes

    try:
        run, loaded, asked, notes = prepare()
    except UserError as error:
        if rank == 0 or getattr(error, "of_each_process", False):
            echo_error(error)
        else:
            leave_to_rank_0(rank, error)
        return 1

    status = 0

    def train_here() -> None:
        nonlocal status
        from distrain.diagnose.hang_diagnosis import Watchdog
        from distrain.loop import train
        from distrain.parallel import open_world

        recipe = loaded.recipe if loaded is not None else load_recipe(run.recipe_path).recipe
        found: Probed | None = None
        if "RANK" not in os.environ and (update or not run.finished):
            # before this process has anything of a GPU; of several, the launcher does it
            if run.exists:
                check_free(run, Holder.of_this_process())
            found = probed(run, recipe, asked, 1, 1)
        world = open_world(
            recipe.train.precision,
            asked,
            timeout_s=recipe.watchdog.collectives_s,
            deterministic=recipe.train.deterministic,
        )

        lease: Lease | None = None

        def begin() -> dict[str, Any] | Lease:
            if run.finished and loaded is not None and not update:
                check_same_recipe(run, loaded)
            if not update and (done := run.finished):
                return done
            holder = Holder.of_this_process()
            if run.exists:
                check_free(run, holder)  # before its recipe may be replaced
            typed = json.loads(os.environ.get(TYPED, "null"))
            this_start = Launch.describe(world.world_size, asked.strategy, asked.offload, argv=typed)
            if run.exists and not update and holder.job is None:  # who starts the run again may have changed their mind
                run.update_path.unlink(missing_ok=True)
            open_run(run, loaded, this_start, update=update)
            if found is not None:
                remember(run, found)
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
                        console.say(f"took effect: {effect_in_words(effect)}")
                    console.say(f"{run.path} is finished; choose another --run-dir to train anew, or --update to go on")
                return
            # each in the folder that it sees
            lease = mine = begun if world.rank == 0 else Lease(run, begun.holder)
            world.run_on_all(lambda: mine.check_seen(world.rank))
            log_to(run, world.rank)
            for note in notes if world.rank == 0 else []:
                echo(one_line(note))
                log.info(one_line(note))
            # inside: the rank that fails must say so before leaving makes the others fail as well
            placed = {"rank": world.rank, "world_size": world.world_size, "may_write": lease.mine}
            with Watchdog.over(run, recipe.watchdog, **placed):
                lost = functools.partial(tell, run, rank, lease=lease)
                status = reported(run, rank, lambda: train(run, world, lease, lost), lease)
        finally:
            if lease is not None and world.rank == 0:
                lease.release(clean=status == 0)
            world.close()

    return reported(None, rank, train_here) or status


def probed(run: RunDir, recipe: Recipe, asked: StrategySpec, processes: int, here: int) -> Probed | None:
    """Return what `batch.micro: auto` is newly found to be for a start that is about to be made; see `probing`."""
    return settled(
        run, recipe, asked, processes=processes, here=here, gpus=gpu_count(), say=lambda text: echo(one_line(text))
    )
