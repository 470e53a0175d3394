"""One attempt at a run: everything that `train` does between its steps."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from torch import nn

from distrain.checkpoint import Manifest
from distrain.config import Recipe, UserError
from distrain.datasets.base import Batch
from distrain.diagnose.index_errors import explaining_errors
from distrain.diagnose.memory_advice import explained
from distrain.optim import Loss, parts_of, thaws
from distrain.parallel import StepFlags, World
from distrain.run.folder import RunDir
from distrain.run.heartbeat import enter_phase, starts_at
from distrain.run.json_files import append_row
from distrain.run.lease import Lease
from distrain.training.callbacks.base import Callback, CallbackRun, Outcome, Requests, StepMetrics
from distrain.training.callbacks.building import build_callbacks
from distrain.training.callbacks.built_in import built_in_callbacks
from distrain.training.callbacks.dispatch import Callbacks
from distrain.training.compiling import warn_of_failures
from distrain.training.context import PendingMetrics, Turn
from distrain.training.ending import finish, preempt
from distrain.training.evaluator import Evaluator
from distrain.training.intervals import StopRequest
from distrain.training.loop_state import LoopState, RunContext
from distrain.training.outputs import warn_of_classes
from distrain.training.saving import Checkpoints
from distrain.training.setup import set_up
from distrain.training.skipping import Anomaly
from distrain.training.unsaved import UnsavedState

logger = logging.getLogger(__name__)


class Session(RunContext):
    """The parts of an attempt, and what they do from step to step. All ranks call each method at the same step."""

    def __init__(
        self,
        run: RunDir,
        recipe: Recipe,
        world: World,
        stop: StopRequest | None = None,
        lease: Lease | None = None,
        callbacks: Sequence[Callback] = (),
        built_in: Sequence[Callback] | None = None,
    ):
        """Build everything up to the first step; what can fail fails here, on all ranks together. See `open`."""
        started = time.monotonic()
        fence = lease.check if lease is not None else lambda: None
        mine = built_in_callbacks(recipe) if built_in is None else built_in
        called = Callbacks(mine, world.run_on_all(lambda: build_callbacks(recipe, callbacks)), recipe, world)
        setup = set_up(run, recipe, world, fence, called.wrap_transform)
        super().__init__(run, recipe, world, stop or StopRequest(), fence, setup, called, started)
        self.outcome: Outcome | None = None
        self._state_checked = False
        self._unsaved = UnsavedState(self.t, called.without_state)
        self._new_state = {step for turn in self.t.turns for step in self._begins(turn)}
        """Steps, from 1, in which an optimizer may begin to keep something of some parameters."""
        starts_at(self.t.step)
        self._record_effect()
        self.evaluator = Evaluator(self)
        self.state = self._state_at(setup.resumed)
        self.checkpoints = Checkpoints(self)
        called.attach(self._callback_run, self._act_on)
        called.load_history((setup.resumed.history if setup.resumed is not None else None) or {})
        self.checkpoints.start_clock()

    @classmethod
    @contextmanager
    def open(
        cls,
        run: RunDir,
        recipe: Recipe,
        world: World,
        stop: StopRequest | None = None,
        lease: Lease | None = None,
        lost: Callable[[UserError], None] | None = None,
        callbacks: Sequence[Callback] = (),
        built_in: Sequence[Callback] | None = None,
    ) -> Iterator[Session]:
        """Set up, and put the terminal, trackers and files in order at the end, however it comes.

        `stop` notes what this rank is asked for. Without a `lease` nobody else is expected to write into the run.
        `lost` reports what went wrong where nothing can be put in order, as this process has lost its device.
        `callbacks` are called after those of the recipe; `built_in` replaces those of `built_in_callbacks`.
        """
        session: Session | None = None

        def parts() -> tuple[nn.Module | None, Loss | None]:
            return (None, None) if session is None else (session.t.strategy.model, session.t.objective.loss)

        def last_word(error: UserError) -> None:
            if session is not None:
                with suppress(Exception):
                    session.callbacks.close(Outcome("failed", session.t.step, reason=str(error)))
            if lost is not None:
                lost(error)

        end = last_word if lost is not None else None
        with explained(recipe, world) as attempt:
            with explaining_errors(parts, end), _taking_recipe(run, world):
                session = cls(run, recipe, world, stop, lease, callbacks, built_in)
            attempt.micro_batch_size = session.setup.feed.micro_batch_size
            try:
                # inside: what is put in order below needs a device that works
                with explaining_errors(parts, end):
                    session._begin()
                    yield session
            except Exception as error:
                session.outcome = session.callbacks.fail(error, session.t.step)
                raise
            finally:
                session.evaluator.close()
                session.checkpoints.saver.close()
                session.callbacks.close(session.outcome or Outcome("stopped", session.t.step))

    def _begins(self, turn: Turn) -> list[int]:
        """Return the first step, from 1, in which an optimizer acts, and those after which it trains more."""
        frozen = thaws(parts_of(self.t.strategy.optimizer)[turn.name].param_groups)
        return [math.ceil((step + 1) / turn.every) * turn.every for step in (0, *frozen)]

    def _begin(self) -> None:
        """Start callbacks, and save what there must be to roll back to or to end with."""
        resumed = self.setup.resumed
        self.callbacks.start_built_in()
        if resumed is not None:
            self.checkpoints.note_published(resumed)
            self._record_update()
        self.callbacks.start()
        if self.setup.anomalies.rolls_back or self.at_end():
            self.checkpoints.save()

    def _record_update(self) -> None:
        """Record what this attempt changes."""
        row = self.setup.inputs.update
        if row is None:
            return
        self.write_row(row)

        def note() -> None:
            self.fence()
            append_row(self.run.attempts_path, row)

        self.world.run_on_rank0(note)

    def _record_effect(self) -> None:
        """Record what the strategy has made of the model; and again when there is an optimizer's state to measure."""
        model = self.setup.model
        effect = self.t.strategy.effect() | {
            "parameters": model.parameters,
            "trainable": model.trainable,
            "total_steps": self.total_steps,
            "compile": self.t.compiled.record(),
        }
        self.world.run_on_rank0(lambda: self.run.record_effect(effect))

    # ----------------------------------------------------------------------------------------------------------------
    # The steps

    def batches(self) -> Iterator[list[Batch]]:
        """Yield the micro-batches of each step that is left; after a rollback, of those from its checkpoint on."""
        if not self.at_end():
            self.evaluator.start_loading()
        while not self.at_end():
            state, steps = self.state, self.setup.feed.batches(start_step=self.t.step)
            while self.state is state and not self.at_end():
                step = self.t.step + 1
                self.callbacks.step_start(step)
                enter_phase("data")
                if (micro_batches := next(steps, None)) is None:
                    return
                self.callbacks.batches(step, micro_batches)
                yield micro_batches

    def flags(self) -> StepFlags:
        """Return what this rank has for the others with this step; `deliver_metrics` gets the mean over the ranks."""
        checkpoints = self.checkpoints
        under_way = checkpoints.saver.in_flight is not None  # in most steps none is
        return StepFlags(
            stop=float(self.stop.reason is not None),
            save=float(checkpoints.due_by_time()),
            written=float(under_way and checkpoints.written()),
            published=float(under_way and checkpoints.published()),
            callbacks=self.callbacks.flag(),
        )

    def deliver_metrics(self, taken: PendingMetrics) -> None:
        """Call callbacks of the step just taken, and deliver the metrics of the one before it.

        Its own metrics are delivered at once where the host need not wait for them, or an evaluation, a checkpoint or
        the end follows; otherwise when the next step is under way, so that nothing waits for the device.
        """
        self.callbacks.step_taken(taken.step)
        before, self.state.pending = self.state.pending, taken
        if before is not None:
            self._deliver(before)
        if self.world.device.type == "cpu" or self._something_follows():
            latest, self.state.pending = self.state.pending, None
            if latest is not None:  # not after a rollback
                self._deliver(latest)
        if self.callbacks.asks and self._something_follows():
            self.callbacks.agree()

    def _something_follows(self) -> bool:
        return self.evaluator.due() or self.checkpoints.due() or self.at_end()

    def _deliver(self, taken: PendingMetrics) -> None:
        """Read a step's metrics, give them to callbacks, and act on what the ranks agreed."""
        if not self._state_checked:  # now there are gradients and an optimizer's state
            self._state_checked = True
            self.t.strategy.check_state()
            warn_of_failures(self.t.compiled)
            warn_of_classes(getattr(self.t.objective.loss, "classes", None), self.setup.feed.data.meta)
            self._record_effect()
            self.checkpoints.reserve()
        elif taken.step in self._new_state:  # and now that of what was frozen, or of what had not acted
            self.t.strategy.check_state()
            self._record_effect()
        read: list[tuple[PendingMetrics, float, float]] = []
        """The turns that were not skipped, with loss and norm."""
        rolls_back = False
        for turn in taken.turns:
            loss, norm, flags = turn.read()
            found = self.setup.anomalies.judge_read(taken.step, loss, norm, turn.local, turn.name)
            if found is None:
                read.append((turn, loss, norm))
                continue
            self._report(found)
            if rolls_back := found.action == "rollback" and not found.known:
                flags = taken.read()[2]
                break  # what the others made of it is made again
        if not rolls_back:
            self.callbacks.step_end(taken.step, lambda: self._metrics(taken, read))
        if taken.step >= self._unsaved.looks_at:
            self._unsaved.look(taken.step)
        if flags.stop > 0:
            self.stop_as_requested()
        self.state.save_requested = flags.save > 0
        every_rank = 1 - 0.5 / self.world.world_size
        if flags.published > every_rank:
            self.checkpoints.finish()
        elif flags.written > every_rank:
            self.checkpoints.exchange()
        if rolls_back:
            self.state = self.roll_back()
        elif flags.callbacks > 0:
            self.callbacks.agree()

    def _metrics(self, taken: PendingMetrics, read: list[tuple[PendingMetrics, float, float]]) -> StepMetrics:
        """Return the numbers of a step; `read`: of the turns that were not skipped, with loss and norm."""
        recipe, length, step = self.recipe, self.setup.horizon.samples_per_epoch, taken.step
        samples = step * recipe.batch.global_batch_size
        means: dict[str, float] = {}
        norms: dict[str, float] = {}
        for turn, _, norm in read:
            means |= turn.means() if turn.means is not None else {}
            if turn.turn.section.clip_norm is not None or self.setup.anomalies.watches:
                norms[turn.name] = norm
        rates = {turn.name: turn.lr(step - 1) for turn in self.t.turns}
        scales = {turn.name: turn.grad_scale for turn in taken.turns if turn.grad_scale is not None}
        return StepMetrics(
            loss=sum(loss for _, loss, _ in read) if read else taken.read()[0],
            grad_norm=norms.pop("", None),
            lr=rates.pop("", None),
            samples=samples,
            epoch=samples / length if length else 0.0,
            skipped=not read,
            grad_scale=scales.pop("", None),
            means=means,
            lrs=rates,
            grad_norms=norms,
            grad_scales=scales,
        )

    def _report(self, found: Anomaly) -> None:
        """Show and write what is done about a step that is an anomaly; where that is to stop, raise it."""
        if found.action == "stop":
            self.checkpoints.finish()  # of an earlier step, when all was well
            raise UserError(
                f"{found}; the run stops with its last checkpoint as it was. What to do: "
                f"{self.setup.anomalies.advice(found)}"
            )
        self.write_row(found.row())
        logger.info(
            f"{found.turn} is skipped, as was decided before" if found.known else f"{found}; the step is skipped"
        )

    # ----------------------------------------------------------------------------------------------------------------
    # Resuming and rolling back

    def _state_at(self, manifest: Manifest | None) -> LoopState:
        """Return the loop's state at a checkpoint, or before the first step; callbacks take up their own."""
        state = self.evaluator.state_at(manifest)
        if manifest is not None:
            self.callbacks.load(manifest.scalars)
        return replace(state, ended_early=self.callbacks.ended)

    def roll_back(self) -> LoopState:
        """Restore the newest checkpoint, as the next attempt would; returns the loop's state there."""
        manifest = self.checkpoints.restore_newest()
        self.setup.anomalies.load(manifest.scalars)
        logger.info(f"rolled back to step-{manifest.step:08d}")
        state = self._state_at(manifest)
        self.callbacks.rolled_back(manifest.step)
        # what was asked for stays asked for
        return replace(state, stop_reason=self.state.stop_reason, ended_early=self.state.ended_early)

    def evaluate_if_missed(self) -> None:
        """Evaluate the model that a run resumes from, where the recipe wanted that and a stop came first."""
        step, state = self.t.step, self.state
        if state.saved_step == step and (self.evaluator.due() or (self.at_end() and not state.ended_early)):
            self.t.set_lr(step - 1)  # as it was when the step was taken: a callback may change its scale now
            self.evaluator.evaluate()
            if state.evaluated_step == step and self.recipe.checkpoint.keep_best:
                self.checkpoints.save_again()  # which checkpoints are kept goes by the values in them

    def end(self) -> dict[str, Any]:
        """Finish the run, or leave it where it is to be stopped; returns the summary."""
        summary = preempt(self) if self.stopping else finish(self)
        if summary["finished"]:
            self.outcome = Outcome("finished", summary["steps"], summary=summary)
        return summary

    # ----------------------------------------------------------------------------------------------------------------
    # Callbacks

    def _callback_run(self) -> CallbackRun:
        strategy, resumed = self.t.strategy, self.setup.resumed
        return CallbackRun(
            recipe=self.recipe,
            rank=self.world.rank,
            world_size=self.world.world_size,
            strategy=self.world.strategy,
            folder=self.run.path,
            device=self.world.device,
            model=strategy.model,
            optimizer=strategy.optimizer,
            horizon=self.setup.horizon,
            resumed_step=resumed.step if resumed is not None else None,
            context=self,
        )

    def _act_on(self, asked: Requests) -> None:
        """Do what callbacks ask for, alike on all ranks."""
        if asked.finish is not None and not self.state.ended_early:
            self.state.ended_early = True
            logger.info(f"training ends after step {self.t.step}: {asked.finish}")
        if asked.stop is not None and not self.stopping:
            self.state.stop_reason = asked.stop


@contextmanager
def _taking_recipe(run: RunDir, world: World) -> Iterator[None]:
    """Where a block refuses the recipe of an update, put the one before back."""
    try:
        yield
    except UserError as error:
        if world.rank == 0 and not getattr(error, "restart", False):
            run.put_back_recipe()
        raise
    if world.rank == 0:
        run.take_recipe()
