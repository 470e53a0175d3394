"""The banner: what a run shows of itself before its first step."""

from __future__ import annotations

import logging

from distrain.checkpoint import Manifest
from distrain.config import Recipe
from distrain.datasets.base import is_stream
from distrain.parallel import World
from distrain.run.folder import RunDir
from distrain.run.micro_batch import CachedMicroBatch
from distrain.system import memory
from distrain.system.numbers import counted
from distrain.training.callbacks.base import Callback, CallbackRun
from distrain.training.setup import TrainSetup

logger = logging.getLogger(__name__)


class Banner(Callback):
    """Shows the banner."""

    asks = False

    def on_start(self, run: CallbackRun) -> None:
        """Show it."""
        for line in banner(run.context.run, run.context.setup):
            logger.info(line)
        for warning in run.context.setup.warnings:
            logger.warning(warning)
        if run.step == 0 and run.recipe.eval.every is None:
            logger.info("eval.every is null: the model is evaluated only at the end")


def banner(run: RunDir, setup: TrainSetup) -> list[str]:
    """Return its lines: what is trained, on what, how a step is put together, and which checkpoint is resumed."""
    feed = setup.feed
    recipe, world = feed.recipe, feed.world
    splits = ", ".join(
        f"{name} {len(source):,}" if not is_stream(source) else f"{name} (stream)"
        for name, source in feed.data.splits.items()
    )
    per_step = f"{recipe.batch.global_batch_size} = {world.world_size} x {feed.micro_batch_size}"
    if feed.accumulation > 1:
        per_step += f" x {feed.accumulation} accumulated"
    if recipe.batch.micro_batch_size == "auto":
        per_step += f" (batch.micro auto: {_why(feed.autobatch, world)})"
    return [
        *(f"skipped checkpoint {path.name}: {reason}" for path, reason in setup.skipped),
        f"run {run.path}",
        f"  world    {world.world_size} x {world.device.type}, {_spread(world)}, {world.precision}",
        f"  data     {recipe.data.name}: {splits}",
        f"  model    {recipe.model.name}: {setup.model}",
        f"  batch    {per_step}; {counted(feed.total_steps, 'step')}",
        f"  tune     {world.tuning.describe(off=world.device.type != 'cpu')}",
        *_bits(recipe, world),
        *([resumption(setup.resumed, world)] if setup.resumed is not None else []),
        *(f"  {line}" for line in setup.inputs.lines),
    ]


def _spread(world: World) -> str:
    mesh = world.mesh
    return f"{world.strategy} ({mesh.replicas} replicas x {mesh.shards} shards)" if mesh.is_hybrid else world.strategy


def _bits(recipe: Recipe, world: World) -> list[str]:
    """Return the line about the same bits, where they do not go without saying: on CPUs they do."""
    if world.deterministic:
        why = ", as this is a proof" if recipe.train.deterministic == "auto" else ""
        return [f"  bits     the same in each start: deterministic operations alone (train.deterministic{why})"]
    if world.device.type == "cpu":
        return []
    return [
        "  bits     the last ones may differ from start to start on a GPU; train.deterministic: true makes them the "
        "same, for slower steps"
    ]


def _why(found: CachedMicroBatch | None, world: World) -> str:
    if found is not None:
        return found.describe()
    if world.device.type == "cpu" and not any(limit.set_by_someone for limit in memory.limits()):
        return "global / processes; nothing limits the memory here, so nothing was tried"
    return "global / processes; not tried, which `distrain train` does when it starts the processes itself"


def resumption(manifest: Manifest, world: World) -> str:
    """Return the line that names the checkpoint that a run resumes from, and what has changed since."""
    written_by, now_by = f"{manifest.world_size} x {manifest.strategy}", f"{world.world_size} x {world.strategy}"
    changed = f", written by {written_by}; resumes with {now_by}" if written_by != now_by else ""
    return f"  resumes  step-{manifest.step:08d}{changed}"
