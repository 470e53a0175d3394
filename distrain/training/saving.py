"""The checkpoints of one attempt at a run: when they are due, what is in them, and going back to one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from distrain.checkpoint import CheckpointError, Manifest, Reader, Saved, Saver, find_newest
from distrain.config import UserError
from distrain.config.yaml import dump_recipe
from distrain.models import transformers_config
from distrain.run.heartbeat import mark
from distrain.training.callbacks.base import SavedCheckpoint
from distrain.training.evaluator import Evaluator
from distrain.training.intervals import Interval
from distrain.training.loop_state import LoopState


class Checkpoints:
    """Every method is called by all ranks at the same step."""

    def __init__(self, loop: LoopState, evaluator: Evaluator):
        """Try whether checkpoints can be written."""
        self._loop, self._evaluator, section, resumed = loop, evaluator, loop.recipe.checkpoint, loop.setup.resumed
        self.saver = Saver(
            loop.run.checkpoints,
            loop.world,
            keep=section.keep,
            keep_best=section.keep_best,
            asynchronous=section.asynchronous,
            fence=loop.fence,
        )
        self.saver.criterion = evaluator.criterion
        self.saver.scores |= evaluator.scores
        self.saver.rehearse()
        self._every = Interval(section.every, loop.setup.horizon, "checkpoint.every")
        self.step = loop.t.step if resumed is not None else -1
        """Of the newest; -1: there is none of this state."""
        self.asked = False
        """Whether the ranks have agreed that one is due by the time."""
        self._saved_at = time.monotonic()

    def start_clock(self) -> None:
        """Count the time until the next one from here."""
        self._saved_at = time.monotonic()

    def due(self) -> bool:
        """Whether the recipe wants the state saved after this step."""
        step, trace = self._loop.t.step, self._loop.setup.trace
        return self._every.due(step) or self.asked or (trace is not None and trace.save_at == step)

    def due_by_time(self) -> bool:
        """Whether one is due on rank 0's clock."""
        return self._loop.world.rank == 0 and self._every.elapsed(self._saved_at)

    def written(self) -> bool:
        """Whether this rank has written its part of the one under way."""
        return self.saver.in_flight is not None and self.saver.written

    def save(self) -> None:
        """Save the state of this step, once."""
        loop, t, strategy = self._loop, self._loop.t, self._loop.t.strategy
        if self.step == t.step:
            return
        mark("save")
        state = strategy.state
        self.finish()
        if not strategy.all_finite():
            raise UserError(
                f"after step {t.step} the model has weights that are not finite; they are not saved, and the run "
                "stops with its last checkpoint as it was. Lower optim.lr, or set optim.clip_norm"
            )
        strategy.broadcast_buffers()
        self.step, self._saved_at, self.asked = t.step, time.monotonic(), False
        specs, scalars = loop.world.run_on_all(
            lambda: (state.specs(), strategy.scalars() | loop.callbacks.state() | loop.ended_state())
        )
        with self._may_fail():
            self.saver.begin(
                t.step,
                specs,
                state.pieces(loop.world.mesh),
                scalars=scalars
                | loop.setup.anomalies.scalars()
                | {"data": loop.data.state, "transformers_config": transformers_config(strategy.model)}
                | {"inputs": loop.setup.inputs.fingerprint, "transformers_files": loop.setup.beside},
                aliases=state.aliases(),
                recipe=dump_recipe(loop.recipe),
                strategy=loop.world.strategy,
                evaluation=self._evaluator.of_this_step(),
                history=self._history() if loop.world.rank == 0 else None,
            )
        if not loop.recipe.checkpoint.asynchronous:
            self.finish()

    def save_again(self) -> None:
        """Save the state of this step though there is a checkpoint of it, which lacks the evaluation."""
        self.step = -1
        self.save()

    def _history(self) -> dict[str, Any]:
        """Rank 0: return what a checkpoint keeps for the start that resumes from it."""
        loop = self._loop
        return self._evaluator.state() | loop.corrupt.state() | loop.telemetry.settled(loop.t.step)

    def finish(self) -> None:
        """Wait for the one under way, if there is one, and publish it."""
        with self._may_fail():
            self.publish()

    @contextmanager
    def _may_fail(self) -> Iterator[None]:
        """Go on training without the checkpoint, where the recipe says so and a later one will be written."""
        loop = self._loop
        try:
            yield
        except CheckpointError as error:
            if loop.recipe.checkpoint.on_failure == "stop" or loop.at_end():
                raise
            self.step = -1
            loop.telemetry.write({"event": "checkpoint_failed", "step": loop.t.step, "time": time.time()})
            loop.say(f"warning: {error}; training goes on without it, as checkpoint.on_failure says")

    def publish(self) -> None:
        """Do the same as `finish`; a checkpoint that could not be written is an error in any case."""
        saved: Saved | None = self.saver.finish()
        if saved is None:
            return
        loop = self._loop
        self._note(saved.step, saved.nbytes, saved.seconds)
        loop.say(f"saved {saved.path.name} ({saved.nbytes / 2**20:.1f} MiB in {saved.seconds:.2f} s)")
        for warning in saved.warnings:
            loop.say(f"warning: {warning}")
        loop.callbacks.saved(SavedCheckpoint(saved.step, saved.path, saved.nbytes, saved.seconds))

    def note_published(self, manifest: Manifest) -> None:
        """Note a checkpoint that was published, and perhaps not yet noted when the attempt before was killed."""
        self._note(manifest.step, sum(file.size for file in manifest.files), None)

    def _note(self, step: int, nbytes: int, seconds: float | None) -> None:
        self._loop.telemetry.write(
            {"event": "checkpoint", "step": step, "bytes": nbytes, "seconds": seconds, "time": time.time()}
        )

    def restore(self, step: int) -> None:
        """Take up the model of a step that is saved, to be evaluated and exported."""
        t, world = self._loop.t, self._loop.world
        reader = world.run_on_all(lambda: Reader(self._loop.run.checkpoint(step)))
        t.strategy.restore(reader)
        reader.close()
        t.step = step

    def roll_back(self) -> tuple[str, Manifest]:
        """Take up the newest one again, as the next start would; return its name and manifest."""
        self.finish()
        mark("setup")
        loop, t = self._loop, self._loop.t
        newest, _ = loop.world.run_on_rank0(lambda: find_newest(loop.run.checkpoints))
        if newest is None:
            raise UserError(f"there is no whole checkpoint in {loop.run.checkpoints} to go back to")
        reader = loop.world.run_on_all(lambda: Reader(newest, verify=False))
        t.strategy.restore(reader)
        reader.close()
        self.step = t.step = reader.manifest.step
        self.asked = False
        return newest.name, reader.manifest
