"""One attempt at a run: everything that `train` does between its steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import MappingProxyType
from typing import Any

from torch import nn

from distrain.config import Recipe, UserError
from distrain.datasets.base import Batch
from distrain.diagnose.index_errors import told_plainly
from distrain.diagnose.memory_advice import explained
from distrain.optim import Loss, set_lr
from distrain.parallel import StepFlags, World
from distrain.run.folder import RunDir
from distrain.run.heartbeat import starts_at
from distrain.run.json_files import append_row
from distrain.run.lease import Lease
from distrain.training.callbacks.banner import introduction
from distrain.training.callbacks.base import Callback, CallbackRun, Requests
from distrain.training.callbacks.building import build_callbacks
from distrain.training.callbacks.dispatch import Callbacks
from distrain.training.callbacks.trackers import Telemetry
from distrain.training.callbacks.train_log import TrainLog
from distrain.training.context import PendingMetrics
from distrain.training.corrupt_samples import EVENT as UNDECODABLE
from distrain.training.corrupt_samples import CorruptSamples
from distrain.training.ending import finish, preempt
from distrain.training.evaluator import Evaluator
from distrain.training.intervals import StopRequest
from distrain.training.loop_state import LoopState
from distrain.training.saving import Checkpoints
from distrain.training.setup import set_up
from distrain.training.skipping import Anomaly


class Session(LoopState):
    """The state of the loop, with its evaluator and its checkpoints. All ranks call each method at the same step."""

    def __init__(
        self,
        run: RunDir,
        recipe: Recipe,
        world: World,
        stop: StopRequest | None = None,
        lease: Lease | None = None,
        callbacks: Sequence[Callback] = (),
    ):
        """Build everything up to the first step; what can fail fails here, on all ranks together.

        `stop` notes what this rank is asked for. Without a `lease` nobody else is expected to write into the run.
        `callbacks` are called after those of the recipe.
        """
        fence = lease.check if lease is not None else lambda: None
        started = time.monotonic()
        named = world.run_on_all(lambda: build_callbacks(recipe, callbacks))
        setup = set_up(run, recipe, world, fence)
        resumed = setup.resumed
        history = resumed.history if resumed is not None else None
        corrupt = CorruptSamples(run, world, recipe.data.skip_undecodable, setup.training.step, history)
        super().__init__(run, recipe, world, stop or StopRequest(), fence, setup, corrupt, started)
        self.anomalies, self.trace = setup.anomalies, setup.trace
        starts_at(self.t.step)
        self._record_effect()
        self._stepped = self._rolled_back = False
        self.evaluator = Evaluator(self)
        # a run can be stopped between the evaluation that ends it and the end itself
        self.ended_early = self.evaluator.exhausted()
        self.resume_end(bool(named))
        self.checkpoints = Checkpoints(self, self.evaluator)
        self.log = TrainLog(self)
        # last of what can fail: a display or tracker that was opened would be left open
        self.telemetry = world.run_on_all(
            lambda: Telemetry.open(
                run,
                recipe,
                rank=world.rank,
                total_steps=self.total_steps,
                start_step=self.t.step,
                config=recipe.model_dump(mode="json", by_alias=True),
                fence=fence,
                history=history,
            )
        )
        self.callbacks = Callbacks(named, world, self._callback_run, self.telemetry.write, self._act)
        self.log.restart()
        self.checkpoints.start_clock()

    def begin(self) -> None:
        """Say what is trained, give callbacks their state, and save what there must be to roll back to."""
        resumed = self.setup.resumed
        lines = self.callbacks.load(resumed.scalars) if resumed is not None else []
        for line in [*introduction(self.run, self.setup), *self.evaluator.notes, *lines]:
            self.say(line)
        if resumed is not None:
            self.checkpoints.note_published(resumed)
            self._note_update()
        self.callbacks.start()
        if resumed is None and self.anomalies.goes_back:
            self.checkpoints.save()

    @classmethod
    @contextmanager
    def open(
        cls,
        run: RunDir,
        recipe: Recipe,
        world: World,
        stop: StopRequest | None = None,
        lease: Lease | None = None,
        tell: Callable[[UserError], None] | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> Iterator[Session]:
        """Set up, and put the terminal, trackers and files in order at the end, however it comes.

        `tell` says what went wrong where nothing can be put in order, as this process has lost its device.
        """
        session: Session | None = None

        def parts() -> tuple[nn.Module | None, Loss | None]:
            return (None, None) if session is None else (session.t.strategy.model, session.t.loss)

        def last_word(error: UserError) -> None:
            if session is not None:
                with suppress(Exception):
                    session.telemetry.close()
            if tell is not None:
                tell(error)

        end = last_word if tell is not None else None
        with explained(recipe, world) as attempt:
            with told_plainly(parts, end):
                session = cls(run, recipe, world, stop, lease, callbacks)
            attempt.micro_batch_size = session.setup.feed.micro_batch_size
            try:
                # inside: what is put in order below needs a device that works
                with told_plainly(parts, end):
                    session.begin()
                    yield session
            except Exception as error:
                session.callbacks.fail(error, session.t.step)
                raise
            finally:
                session.checkpoints.saver.close()
                session.telemetry.close()

    def _note_update(self) -> None:
        """Record what this start changes."""
        row = self.setup.inputs.update
        if row is None:
            return
        self.telemetry.write(row)

        def note() -> None:
            self.fence()
            append_row(self.run.attempts_path, row)

        self.world.run_on_rank0(note)

    def _record_effect(self) -> None:
        model = self.setup.model
        effect = self.t.strategy.effect() | {
            "parameters": model.parameters,
            "trainable": model.trainable,
            "total_steps": self.total_steps,
        }
        self.world.run_on_rank0(lambda: self.run.record_effect(effect))

    # ----------------------------------------------------------------------------------------------------------------
    # The steps

    def loader(self) -> Iterator[list[Batch]]:
        """Yield the micro-batches of each step that is left, noting how long the loop waits for them."""
        while not self.ended_early:
            self._rolled_back = False
            batches = self.setup.feed.batches(start_step=self.t.step)
            if self.trace is not None:
                self.t.trace, batches = self.trace, self.trace.watch(batches, self)
            for micro_batches in self.log.waited.during(batches):
                self.corrupt.note(self.t.step + 1, micro_batches)
                yield micro_batches
                if self._rolled_back:
                    break
            else:
                return

    @property
    def reads_late(self) -> bool:
        """Whether the host would wait for the device if it read a step's numbers before the next step is under way."""
        return self.world.device.type != "cpu"

    def flags(self) -> StepFlags:
        """Return what this rank has to tell the others with this step; `settle` gets the mean over the ranks."""
        return StepFlags(
            stop=float(self.stop.reason is not None),
            save=float(self.checkpoints.due_by_time()),
            written=float(self.checkpoints.written()),
            corrupt=self.corrupt.count(self.t.step + 1),
            callbacks=self.callbacks.flag() if self.callbacks else 0.0,
        )

    def settle(self, numbers: PendingMetrics | None) -> bool:
        """Read a step's numbers, write its row if one is due, and act on what the ranks agreed.

        Returns False where the run was rolled back to a checkpoint: what was read of later steps is then of no use.
        """
        if numbers is None:
            return True
        if not self._stepped:  # now there are gradients and an optimizer's state to tell of
            self._stepped = True
            self.t.strategy.check_state()
            self._record_effect()
        step = numbers.step
        loss, norm, flags = numbers.read()
        if self.trace is not None:
            self.trace.settled(step, loss, norm)
        found = self.anomalies.settle(step, loss, norm, numbers.own)
        if found is not None:
            self._note_anomaly(found)
        elif self.log.due(step):
            self.log.write(step, loss, norm, numbers.grad_scale)
        if flags.corrupt > 0:
            self._note_corrupt(step)
        if flags.stop > 0:
            self.heed_stop()
        self.checkpoints.asked = flags.save > 0
        if flags.written > 1 - 0.5 / self.world.world_size:
            self.checkpoints.finish()
        if found is not None and found.action == "rollback" and not found.known:
            self.roll_back()
            return False
        if self.callbacks:
            self.callbacks.step_end(step, self.log.metrics(step, loss, norm, skipped=found is not None))
            if flags.callbacks > 0:
                self.callbacks.agree()
        return True

    def _note_anomaly(self, found: Anomaly) -> None:
        """Say what is done about a step that is an anomaly; where that is to stop, raise it."""
        if found.action == "stop":
            self.checkpoints.finish()  # of an earlier step, when all was well
            raise UserError(
                f"{found}; the run stops with its last checkpoint as it was. What to do: {self.anomalies.advice(found)}"
            )
        self.telemetry.write(found.row() | {"time": time.time()})
        self.say(f"step {found.step} is left out, as was decided before" if found.known else f"{found}; it is left out")

    def _note_corrupt(self, step: int) -> None:
        """Note samples of a step that do not decode."""
        found, warnings = self.corrupt.of_step(step)
        self.telemetry.write({"event": UNDECODABLE, "step": step, "samples": found, "time": time.time()})
        for warning in warnings:
            self.say(warning)

    def roll_back(self) -> None:
        """Take up the newest checkpoint again, as the next start would."""
        name, manifest = self.checkpoints.roll_back()
        self.anomalies.load(manifest.scalars)
        lines = self.callbacks.load(manifest.scalars)
        self.evaluator.back_to(manifest)
        self.log.restart()
        self._rolled_back = True
        for line in [f"goes back to {name}", *lines]:
            self.say(line)

    # ----------------------------------------------------------------------------------------------------------------
    # Between the steps

    def catch_up(self) -> None:
        """Evaluate the model that a run resumes from, where the recipe wanted that and a stop came first."""
        if self.checkpoints.step == self.t.step and (self.evaluator.due() or (self.at_end() and not self.ended_early)):
            self.evaluate()
            if self.evaluator.step == self.t.step and self.recipe.checkpoint.keep_best:
                # which checkpoints are kept goes by the scores in them
                set_lr(self.t.strategy.optimizer, self.recipe.optim.lr * self.t.schedule(self.t.step - 1))  # as it was
                self.checkpoints.save_again()

    def evaluate(self) -> None:
        """Evaluate the model, and end training early where the recipe or a callback has it so.

        A request to stop ends it without values; the start that resumes from here begins with it.
        """
        found = self.evaluator.evaluate()
        if found is None:
            return
        values, problem = found
        if problem is not None:
            self.checkpoints.save()  # it is no fault of the training
            self.checkpoints.finish()
            raise UserError(problem)
        self.evaluator.stop_early()
        assert self.evaluator.split is not None
        self.callbacks.evaluated(self.evaluator.split, MappingProxyType(values))
        self.log.restart()  # evaluation is not training time

    def end(self) -> dict[str, Any]:
        """Finish the run, or leave it where it is to be stopped; returns the summary."""
        return preempt(self, self.checkpoints) if self.stopping else finish(self, self.evaluator, self.checkpoints)

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
            step=lambda: self.t.step,
            show=self.say,
        )

    def heed_callbacks(self) -> None:
        """Do what callbacks ask for, or raise what failed in one, before an evaluation, a checkpoint or the end."""
        if self.callbacks and (self.evaluator.due() or self.checkpoints.due() or self.at_end()):
            self.callbacks.agree()

    def _act(self, asked: Requests) -> None:
        """Do what callbacks ask for, alike on all ranks."""
        if asked.finish is not None and not self.ended_early:
            self.ended_early = self.ended_by_callback = True
            self.say(f"training ends after step {self.t.step}: {asked.finish}")
        if asked.stop is not None and not self.stopping:
            self.stopping = asked.stop
