"""The checkpoints of one attempt at a run: when they are due, what is in them, and restoring one."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distrain.checkpoint import CheckpointError, Manifest, Reader, Saved, Saver, find_newest
from distrain.config import UserError
from distrain.config.yaml import dump_recipe
from distrain.models import transformers_config
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

    def written(self) -> bool:
        """Whether this rank has written its part of the one under way."""
        return self.saver.in_flight is not None and self.saver.written

    def save(self) -> None:
        """Save the state of this step, once."""
        context, t, strategy = self._context, self._context.t, self._context.t.strategy
        if context.state.saved_step == t.step:
            return
        enter_phase("save")
        state = strategy.state
        self.finish()
        if not strategy.all_finite():
            raise UserError(
                f"after step {t.step} the model has weights that are not finite; they are not saved, and the run "
                "stops with its last checkpoint as it was. Lower optim.lr, or set optim.clip_norm"
            )
        strategy.broadcast_buffers()
        context.state.saved_step, context.state.save_requested = t.step, False
        self._saved_at = time.monotonic()
        specs, scalars = context.world.run_on_all(
            lambda: (state.specs(), strategy.scalars() | context.callbacks.state())
        )
        with self._may_fail():
            self.saver.begin(
                t.step,
                specs,
                state.pieces(context.world.mesh),
                scalars=scalars
                | context.setup.anomalies.scalars()
                | {"data": context.data.state, "transformers_config": transformers_config(strategy.model)}
                | {"inputs": context.setup.inputs.fingerprint, "transformers_files": context.setup.beside},
                aliases=state.aliases(),
                recipe=dump_recipe(context.recipe),
                strategy=context.world.strategy,
                evaluation=context.evaluator.of_this_step(),
                history=self._history() if context.world.rank == 0 else None,
            )
        if not context.recipe.checkpoint.asynchronous:
            self.finish()

    def save_again(self) -> None:
        """Save the state of this step though there is a checkpoint of it, which lacks the evaluation."""
        self._context.state.saved_step = -1
        self.save()

    def _history(self) -> dict[str, Any]:
        """Rank 0: return what a checkpoint keeps for the attempt that resumes from it."""
        return self._context.evaluator.history() | self._context.callbacks.history()

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
        newest, _ = self._context.world.run_on_rank0(lambda: find_newest(folder))
        if newest is None:
            raise UserError(f"found no complete checkpoint in {folder}, expected one to roll back to")
        return self._restore(newest, verify=False)

    def _restore(self, path: Path, *, verify: bool) -> Manifest:
        t = self._context.t
        reader = self._context.world.run_on_all(lambda: Reader(path, verify=verify))
        t.strategy.restore(reader)
        reader.close()
        t.step = reader.manifest.step
        return reader.manifest
