"""What a run says of itself before its first step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distrain import memory
from distrain.checkpoint import Manifest
from distrain.config import Recipe
from distrain.datasets import is_stream
from distrain.probed import Probed, Where, remembered
from distrain.rundir import RunDir
from distrain.strategy import World

if TYPE_CHECKING:
    from distrain.loop.session import Session


def probed_batch(run: RunDir, recipe: Recipe, world: World) -> Probed | None:
    """Return what `batch.micro: auto` was found to be for such a start, or None. All ranks call; all get the same."""
    if recipe.batch.micro_batch_size != "auto":
        return None
    where = Where.of(recipe, world.world_size, world.strategy, world.asked.offload)
    found: Probed | None = world.first(lambda: remembered(run, where))
    return found if found is not None and (found.hardware == "cpu") == (world.device.type == "cpu") else None


def introduction(session: Session) -> list[str]:
    """Return the lines that say what is trained, on what, and how a step is put together."""
    recipe, world = session.recipe, session.world
    splits = ", ".join(
        f"{name} {len(source):,}" if not is_stream(source) else f"{name} (stream)"
        for name, source in session.data.splits.items()
    )
    per_step = f"{recipe.batch.global_batch_size} = {world.world_size} x {session.micro_batch_size}"
    if session.accumulation > 1:
        per_step += f" x {session.accumulation} accumulated"
    if recipe.batch.micro_batch_size == "auto":
        per_step += f" (batch.micro auto: {_why(session.probed, world)})"
    return [
        f"run {session.run.path}",
        f"  world    {world.world_size} x {world.device.type}, {world.strategy}, {world.precision}",
        f"  data     {recipe.data.name}: {splits}",
        f"  model    {recipe.model.name}: {session.described}",
        f"  batch    {per_step}; {session.total_steps:,} steps",
    ]


def _why(probed: Probed | None, world: World) -> str:
    if probed is not None:
        return probed.in_words()
    if world.device.type == "cpu" and not any(limit.set_by_someone for limit in memory.limits()):
        return "global / processes; nothing limits the memory here, so nothing was tried"
    return "global / processes; not tried, which `distrain train` does when it starts the processes itself"


def resumption(manifest: Manifest, world: World) -> str:
    """Return the line that says which checkpoint a run goes on from, and what has changed since."""
    written_by, now_by = f"{manifest.world_size} x {manifest.strategy}", f"{world.world_size} x {world.strategy}"
    changed = f", written by {written_by}; goes on with {now_by}" if written_by != now_by else ""
    return f"  resumes  step-{manifest.step:08d}{changed}"
