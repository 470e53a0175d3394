"""The checkpoints of one attempt at a run: when they are due, what is in them, and restoring one."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distrain.checkpoint import CheckpointError, Manifest, Reader, Saved, Saver
from distrain.config import UserError
from distrain.config.yaml import dump_recipe
from distrain.datasets.stored_meta import meta_to_json
from distrain.models import library_call, transformers_config
from distrain.parallel.arena import TensorArena
from distrain.parallel.snapshot import pieces_of
from distrain.parallel.verifying import find_newest_verified, open_verified
from distrain.run.heartbeat import enter_phase
from distrain.training.callbacks.base import SavedCheckpoint
from distrain.training.intervals import Interval
from distrain.training.loop_state import RunContext

logger = logging.getLogger(__name__)


class Checkpoints:
    """Every method is called by all ranks at the same step."""

    def __init__(self, context: RunContext):
        """Try whether checkpoints can be written."""
        self._context, section, evaluator = context, context.recipe.checkpoint, context.evaluator
        self.saver = Saver(
            context.run.checkpoints,
            context.world,
            keep=section.keep,
            keep_best=section.keep_best,
            asynchronous=section.asynchronous,
            fence=context.fence,
            arena=TensorArena(context.world.device),
        )
        self.saver.criterion = evaluator.criterion
        self.saver.scores |= context.state.scores
        self.saver.dry_run()
        self._every = Interval(section.every, context.setup.horizon, "checkpoint.every")
        self._saved_at = time.monotonic()

    def start_clock(self) -> None:
        """Count the time until the next one from here."""
        self._saved_at = time.monotonic()

    def due(self) -> bool:
        """Whether the recipe or a callback wants the state saved after this step, or ranks have agreed on it."""
        context = self._context
        step = context.t.step
        return self._every.due(step) or context.state.save_requested or step in context.callbacks.plan.saves

    def due_by_time(self) -> bool:
        """Whether one is due on rank 0's clock."""
        return self._context.world.rank == 0 and self._every.elapsed(self._saved_at)

    def reserve(self) -> None:
        """Allocate the memory that asynchronous saves copy into, beside the next steps; all state is there by now."""
        context = self._context
        section, evaluator = context.recipe.checkpoint, context.recipe.eval
        if section.asynchronous and (section.every is not None or (evaluator.every is not None and section.keep_best)):
            self.saver.arena.reserve(context.t.state.share(context.world.mesh))

    def written(self) -> bool:
        """Whether this rank has written its part of the one under way, and waits for the others."""
        return self.saver.in_flight is not None and self.saver.written and not self.saver.exchanged

    def published(self) -> bool:
        """Whether every rank has written its part of the one under way, and rank 0 has published it."""
        return self.saver.in_flight is not None and self.saver.published

    def save(self) -> None:
        """Save the state of this step, once."""
        context, t, strategy = self._context, self._context.t, self._context.t.strategy
        if context.state.saved_step == t.step:
            return
        enter_phase("save")
        self.finish()
        strategy.broadcast_buffers()
        strategy.check_extra_state()
        context.state.saved_step, context.state.save_requested = t.step, False
        self._saved_at = time.monotonic()
        background = context.recipe.checkpoint.asynchronous and not context.at_end()
        found, more = context.world.run_on_all(lambda: (strategy.snapshot(), context.callbacks.state()))
        with self._may_fail():
            self.saver.begin(
                t.step,
                found.specs,
                pieces_of(found.held, context.world.mesh),
                scalars=found.scalars
                | more
                | context.setup.anomalies.scalars()
                | t.objective.scalars()
                | {"data": context.data.state, "transformers_config": transformers_config(strategy.model)}
                | {"inputs": context.setup.inputs.fingerprint, "transformers_files": context.setup.beside}
                | self._what_builds(),
                aliases=found.aliases,
                frozen=found.frozen,
                finite={name for name, spec in found.specs.items() if spec.role == "parameter"},
                recipe=dump_recipe(context.recipe),
                strategy=context.world.strategy,
                evaluation=context.evaluator.of_this_step(),
                history=self._history() if context.world.rank == 0 else None,
                background=background,  # at the end no step would run beside it, and it needs no memory for a copy
            )
        if not background:
            self.finish()

    def _what_builds(self) -> dict[str, Any]:
        """Return the facts of the data that the model is built from; `meta`, where every export builds it."""
        context = self._context
        facts = meta_to_json(context.data.meta)
        call = _as_json(library_call(context.recipe, context.data.meta))
        if context.recipe.model.lora is None and context.t.strategy.state.frozen is None:
            return {"data_facts": facts, **call}
        return {"meta": facts, **call}

    def save_again(self) -> None:
        """Save the state of this step though there is a checkpoint of it, which lacks the evaluation."""
        self._context.state.saved_step = -1
        self.save()

    def _history(self) -> dict[str, Any]:
        """Rank 0: return what a checkpoint keeps for the attempt that resumes from it."""
        return self._context.evaluator.history() | self._context.callbacks.history()

    def exchange(self) -> None:
        """Have rank 0 publish the one under way, once every rank has written its part."""
        with self._may_fail():
            self.saver.exchange()

    def finish(self) -> None:
        """Wait for the one under way, if there is one, and publish it."""
        with self._may_fail():
            self.publish()

    @contextmanager
    def _may_fail(self) -> Iterator[None]:
        """Continue training without the checkpoint, where the recipe says so and a later one will be written."""
        context = self._context
        try:
            yield
        except CheckpointError as error:
            if context.recipe.checkpoint.on_failure == "stop" or context.at_end():
                raise
            context.state.saved_step = -1
            context.write_row({"event": "checkpoint_failed", "step": context.t.step})
            logger.warning(f"{error}; training continues without it, as checkpoint.on_failure says")

    def publish(self) -> None:
        """Do the same as `finish`; a checkpoint that could not be written is an error in any case."""
        saved: Saved | None = self.saver.finish()
        if saved is None:
            return
        context = self._context
        self._note(saved.step, saved.nbytes, saved.seconds)
        logger.info(f"saved {saved.path.name} ({saved.nbytes / 2**20:.1f} MiB in {saved.seconds:.2f} s)")
        for warning in saved.warnings:
            logger.warning(warning)
        context.callbacks.saved(SavedCheckpoint(saved.step, saved.path, saved.nbytes, saved.seconds))

    def note_published(self, manifest: Manifest) -> None:
        """Note a checkpoint that was published, and perhaps not yet noted when the attempt before was killed."""
        self._note(manifest.step, sum(file.size for file in manifest.files), None)

    def _note(self, step: int, nbytes: int, seconds: float | None) -> None:
        self._context.write_row({"event": "checkpoint", "step": step, "bytes": nbytes, "seconds": seconds})

    def restore(self, step: int) -> None:
        """Restore the model of a step that is saved, to be evaluated and exported."""
        self._restore(self._context.run.checkpoint(step), verify=True)

    def restore_newest(self) -> Manifest:
        """Restore the newest one, as the next attempt would; returns its manifest."""
        self.finish()
        enter_phase("setup")
        folder = self._context.run.checkpoints
        newest, _ = find_newest_verified(self._context.world, folder)
        if newest is None:
            raise UserError(f"found no complete checkpoint in {folder}, expected one to roll back to")
        return self._restore(newest, verify=False)

    def _restore(self, path: Path, *, verify: bool) -> Manifest:
        t = self._context.t
        world = self._context.world
        reader = open_verified(world, path) if verify else world.run_on_all(lambda: Reader(path, verify=False))
        t.strategy.restore(reader)
        t.objective.load(reader.manifest.scalars)
        reader.close()
        t.step = reader.manifest.step
        return reader.manifest


def _as_json(call: dict[str, Any] | None) -> dict[str, Any]:
    """Return how the model is built, by its key of a manifest; nothing where JSON cannot hold it."""
    try:
        return {} if call is None else {"model_call": json.loads(json.dumps(call, allow_nan=False))}
    except (TypeError, ValueError):
        return {}
