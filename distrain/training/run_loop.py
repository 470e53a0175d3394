"""One attempt at a run: everything that `train` does between its steps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from torch import nn

from distrain.checkpoint import CheckpointError, Manifest, Reader, Saved, Saver, find_newest
from distrain.checkpoints.export import export
from distrain.config import Recipe, UserError
from distrain.config.yaml import dump_recipe
from distrain.datasets.base import Batch, Data
from distrain.diagnose.index_errors import told_plainly
from distrain.diagnose.memory_advice import explained
from distrain.metrics import build_metrics
from distrain.models import transformers_config
from distrain.optim import Loss, set_lr
from distrain.parallel import StepFlags, World
from distrain.run.folder import RunDir, append_row, now, rows_backwards
from distrain.run.heartbeat import mark, starts_at, take_straggler
from distrain.run.lease import Lease
from distrain.training.callbacks.banner import introduction
from distrain.training.callbacks.base import Callback, CallbackRun, Outcome, Requests, SavedCheckpoint, StepMetrics
from distrain.training.callbacks.building import build_callbacks
from distrain.training.callbacks.dispatch import Callbacks
from distrain.training.callbacks.trackers import Telemetry, duration
from distrain.training.context import PendingMetrics
from distrain.training.corrupt_samples import EVENT as UNDECODABLE
from distrain.training.corrupt_samples import CorruptSamples
from distrain.training.evaluation import Interrupted, evaluate
from distrain.training.intervals import DataWaitTimer, EvalHistory, Interval, StopRequest
from distrain.training.ranking import criterion_for, data_since, evaluation_of, scored_split, take_up
from distrain.training.setup import set_up
from distrain.training.skipping import Anomaly

_ELSEWHERE = "a request on another rank"
_RATED = 10_000
"""Rows that the rate in the summary is of."""


class Session:
    """One attempt at a run: what `train` reads like a list. Every method is called by all ranks at the same step."""

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
        self.run, self.recipe, self.world, self.stop = run, recipe, world, stop or StopRequest()
        self._fence = lease.check if lease is not None else lambda: None
        self.started = time.monotonic()
        named = world.run_on_all(lambda: build_callbacks(recipe, callbacks))
        self.setup = setup = set_up(run, recipe, world, self._fence)
        self.t, self.anomalies, self.trace = setup.training, setup.anomalies, setup.trace
        self.data: Data = setup.feed.data
        self.total_steps = setup.feed.total_steps
        history = setup.resumed.history if setup.resumed is not None else None
        self.undecodable = CorruptSamples(run, world, recipe.data.skip_undecodable, self.t.step, history)
        starts_at(self.t.step)
        self._record_effect()
        self._stepped = False
        self.metrics = build_metrics(recipe, self.data.meta)
        early_stop = recipe.eval.early_stop
        self._data_since = data_since(setup.resumed, setup.inputs.fingerprint)
        criterion = world.run_on_all(lambda: criterion_for(recipe, self.metrics, self.data, self._data_since))
        min_delta = early_stop.min_delta if early_stop is not None else 0.0
        self._ranking = (run, criterion, min_delta)
        self.best: EvalHistory
        self.best, self._scores, ranking = world.run_on_rank0(lambda: take_up(*self._ranking, setup.resumed))
        self._values: dict[str, Any] | None = None
        """Of the evaluation of this step."""
        self._warned: set[tuple[str, str]] = set()
        self.stopping = ""
        self._leave = world.store_flag()
        # a run can be stopped between the evaluation that ends it and the end itself
        self.ended_early = self._exhausted()
        self._named_callbacks = recipe.model_dump(mode="json").get("callbacks", [])
        self._ended_by_callback = False
        if named and setup.resumed is not None and setup.resumed.scalars.get("ended") == self._named_callbacks:
            self.ended_early = self._ended_by_callback = True
        self.saver = Saver(
            run.checkpoints,
            world,
            keep=recipe.checkpoint.keep,
            keep_best=recipe.checkpoint.keep_best,
            asynchronous=recipe.checkpoint.asynchronous,
            fence=self._fence,
        )
        self.saver.criterion = criterion
        self.saver.scores |= self._scores
        self.saver.rehearse()
        self._log_every = Interval(recipe.log.every, setup.horizon, "log.every")
        self._eval_every = Interval(recipe.eval.every, setup.horizon, "eval.every")
        self._save_every = Interval(recipe.checkpoint.every, setup.horizon, "checkpoint.every")
        self._saved_step = self.t.step if setup.resumed is not None else -1
        self._scored_step = self.best.last[0] if self.best.last is not None else -1
        self._logged_step = self.t.step
        self._time_to_save = False
        self._waited = DataWaitTimer()
        # last of what can fail: a display or tracker that was opened would be left open
        self.telemetry = world.run_on_all(
            lambda: Telemetry.open(
                run,
                recipe,
                rank=world.rank,
                total_steps=self.total_steps,
                start_step=self.t.step,
                config=recipe.model_dump(mode="json", by_alias=True),
                fence=self._fence,
                history=history,
            )
        )
        self._saved_at = self._logged_at = time.monotonic()
        self.callbacks = Callbacks(named, world, self._callback_run, self.telemetry.write, self._act)
        lines = self.callbacks.load(setup.resumed.scalars) if setup.resumed is not None else []
        for line in [*introduction(run, setup), *ranking, *lines]:
            self.say(line)
        if setup.resumed is not None:
            self._note_published(setup.resumed)
            self._note_update()
        self.callbacks.start()
        if setup.resumed is None and self.anomalies.goes_back:
            self.save()

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
                    yield session
            except Exception as error:
                session.callbacks.fail(error, session.t.step)
                raise
            finally:
                session.saver.close()
                session.telemetry.close()

    def _note_published(self, manifest: Manifest) -> None:
        """Note a checkpoint that was published, and perhaps not yet noted when the attempt before was killed."""
        size = sum(file.size for file in manifest.files)
        self.telemetry.write(
            {"event": "checkpoint", "step": manifest.step, "bytes": size, "seconds": None, "time": now()}
        )

    def _note_update(self) -> None:
        """Record what this start changes."""
        row = self.setup.inputs.update
        if row is None:
            return
        self.telemetry.write(row)

        def note() -> None:
            self._fence()
            append_row(self.run.attempts_path, row)

        self.world.run_on_rank0(note)

    # ----------------------------------------------------------------------------------------------------------------
    # What is due

    def loader(self) -> Iterator[list[Batch]]:
        """Yield the micro-batches of each step that is left, noting how long the loop waits for them."""
        while not self.ended_early:
            self._went_back = False
            batches = self.setup.feed.batches(start_step=self.t.step)
            if self.trace is not None:
                self.t.trace, batches = self.trace, self.trace.watch(batches, self)
            for micro_batches in self._waited.during(batches):
                self.undecodable.note(self.t.step + 1, micro_batches)
                yield micro_batches
                if self._went_back:
                    break
            else:
                return

    def catch_up(self) -> None:
        """Score the model that a run goes on from, where the recipe wanted that and a stop came first."""
        if self._saved_step == self.t.step and (self.eval_due() or (self.at_end() and not self.ended_early)):
            self.evaluate()
            if self._scored_step == self.t.step and self.recipe.checkpoint.keep_best:
                self._saved_step = -1  # which checkpoints are kept goes by the scores in them
                set_lr(self.t.strategy.optimizer, self.recipe.optim.lr * self.t.schedule(self.t.step - 1))  # as it was
                self.save()

    def at_end(self) -> bool:
        """Whether no step follows this one."""
        return self.t.step >= self.total_steps or bool(self.stopping) or self.ended_early

    def eval_due(self) -> bool:
        """Whether the recipe wants the model scored after this step."""
        return self._scored_step != self.t.step and self._eval_every.due(self.t.step) and self.split is not None

    def save_due(self) -> bool:
        """Whether the recipe wants the state saved after this step."""
        asked = self.trace is not None and self.trace.save_at == self.t.step
        return self._save_every.due(self.t.step) or self._time_to_save or asked

    def new_best(self) -> bool:
        """Whether the model was scored after this step and is the best so far."""
        return self.recipe.checkpoint.keep_best > 0 and self._scored_step == self.t.step and self.best.improved()

    @property
    def reads_late(self) -> bool:
        """Whether the host would wait for the device if it read a step's numbers before the next step is under way."""
        return self.world.device.type != "cpu"

    @property
    def split(self) -> str | None:
        """The split that is scored during training."""
        return scored_split(self.data)

    # ----------------------------------------------------------------------------------------------------------------
    # A step's report

    def flags(self) -> StepFlags:
        """Return what this rank has to tell the others with this step; `settle` gets the mean over the ranks."""
        written = self.saver.in_flight is not None and self.saver.written
        time_to_save = self.world.rank == 0 and self._save_every.elapsed(self._saved_at)
        return StepFlags(
            stop=float(self.stop.reason is not None),
            save=float(time_to_save),
            written=float(written),
            corrupt=self.undecodable.count(self.t.step + 1),
            callbacks=self.callbacks.flag() if self.callbacks else 0.0,
        )

    def settle(self, numbers: PendingMetrics | None) -> bool:
        """Read a step's numbers, write its row if one is due, and act on what the ranks agreed.

        Returns False where the run went back to a checkpoint: what was read of later steps is then of no use.
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
            self._tell(found)
        elif self._log_every.due(step) or step == self.total_steps or self._log_every.elapsed(self._logged_at):
            self._log(step, loss, norm, numbers.grad_scale)
        if flags.corrupt > 0:
            self._leave_out(step)
        if flags.stop > 0 and not self.stopping:
            self.stopping = self.stop.reason or _ELSEWHERE
        self._time_to_save = flags.save > 0
        if flags.written > 1 - 0.5 / self.world.world_size:
            self._finish_save()
        if found is not None and found.action == "rollback" and not found.known:
            self._go_back()
            return False
        if self.callbacks:
            self.callbacks.step_end(step, self._step_metrics(step, loss, norm, skipped=found is not None))
            if flags.callbacks > 0:
                self.callbacks.agree()
        return True

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

    def _step_metrics(self, step: int, loss: float, norm: float, *, skipped: bool) -> StepMetrics:
        return StepMetrics(
            loss=loss,
            grad_norm=norm if self._norm_is_known else None,
            lr=self.recipe.optim.lr * self.t.schedule(step - 1),
            samples=step * self.recipe.batch.global_batch_size,
            epoch=self._epoch(step),
            skipped=skipped,
        )

    @property
    def _norm_is_known(self) -> bool:
        return self.recipe.optim.clip_norm is not None or self.anomalies.watches

    def heed_callbacks(self) -> None:
        """Do what callbacks ask for, or raise what failed in one, before an evaluation, a checkpoint or the end."""
        if self.callbacks and (self.eval_due() or self.save_due() or self.at_end()):
            self.callbacks.agree()

    def _act(self, asked: Requests) -> None:
        """Do what callbacks ask for, alike on all ranks."""
        if asked.finish is not None and not self.ended_early:
            self.ended_early = self._ended_by_callback = True
            self.say(f"training ends after step {self.t.step}: {asked.finish}")
        if asked.stop is not None and not self.stopping:
            self.stopping = asked.stop

    def _tell(self, found: Anomaly) -> None:
        """Say what is done about a step that is an anomaly; where that is to stop, raise it."""
        if found.action == "stop":
            self._finish_save()  # of an earlier step, when all was well
            raise UserError(
                f"{found}; the run stops with its last checkpoint as it was. What to do: {self.anomalies.advice(found)}"
            )
        self.telemetry.write(found.row() | {"time": now()})
        self.say(f"step {found.step} is left out, as was decided before" if found.known else f"{found}; it is left out")

    def _leave_out(self, step: int) -> None:
        """Note samples of a step that do not decode."""
        found, warnings = self.undecodable.of_step(step)
        self.telemetry.write({"event": UNDECODABLE, "step": step, "samples": found, "time": now()})
        for warning in warnings:
            self.say(warning)

    def _go_back(self) -> None:
        """Take up the newest checkpoint again, as the next start would."""
        self._finish_save()
        mark("setup")
        checkpoint, _ = self.world.run_on_rank0(lambda: find_newest(self.run.checkpoints))
        if checkpoint is None:
            raise UserError(f"there is no whole checkpoint in {self.run.checkpoints} to go back to")
        reader = self.world.run_on_all(lambda: Reader(checkpoint, verify=False))
        self.t.strategy.restore(reader)
        self.anomalies.load(reader.manifest.scalars)
        lines = self.callbacks.load(reader.manifest.scalars)
        reader.close()
        step = self.t.step = reader.manifest.step
        self.best, _, _ = self.world.run_on_rank0(lambda: take_up(*self._ranking, reader.manifest))
        self._values = None
        self._saved_step = self._scored_step = self._logged_step = step
        self._logged_at, self._went_back, self._time_to_save = time.monotonic(), True, False
        for line in [f"goes back to {checkpoint.name}", *lines]:
            self.say(line)

    def _record_effect(self) -> None:
        model = self.setup.model
        effect = self.t.strategy.effect() | {
            "parameters": model.parameters,
            "trainable": model.trainable,
            "total_steps": self.total_steps,
        }
        self.world.run_on_rank0(lambda: self.run.record_effect(effect))

    def _log(self, step: int, loss: float, norm: float, grad_scale: float | None) -> None:
        clock = time.monotonic()
        seconds = clock - self._logged_at
        samples = (step - self._logged_step) * self.recipe.batch.global_batch_size
        row = {
            "step": step,
            "epoch": self._epoch(step),
            "samples": step * self.recipe.batch.global_batch_size,
            "loss": loss,
            "lr": self.recipe.optim.lr * self.t.schedule(step - 1),
            "samples_per_s": samples / seconds if seconds else 0.0,
            "data_wait": min(self._waited.take() / seconds, 1.0) if seconds else 0.0,
            "time": now(),
        }
        if self._norm_is_known:
            row["grad_norm"] = norm
        if grad_scale is not None:
            row["loss_scale"] = grad_scale
        self._logged_at, self._logged_step = clock, step
        self.telemetry.train(row)
        if (slow := take_straggler()) is not None:
            self.telemetry.write(slow.row() | {"time": now()})
            self.say(f"warning: {slow}")

    def _epoch(self, step: int) -> float:
        length = self.setup.horizon.samples_per_epoch
        return step * self.recipe.batch.global_batch_size / length if length else 0.0

    # ----------------------------------------------------------------------------------------------------------------
    # Scoring and saving

    def evaluate(self) -> None:
        """Score the model on the split for that, and stop early where the recipe says so.

        A request to stop ends it without a score; the start that goes on from here begins with it.
        """
        if self.split is None or self._scored_step == self.t.step:
            return
        if (values := self._score(self.split)) is None:
            return
        self._scored_step, self._values = self.t.step, values
        evaluation = evaluation_of(self.best.criterion, self.metrics, values)
        self.best.add(self.t.step, evaluation.values.get(self.best.metric, math.nan))
        if (problem := self._not_finite(self.split, values)) is not None:
            self.save()  # it is no fault of the training
            self._finish_save()
            raise UserError(problem)
        stop = self.recipe.eval.early_stop
        if stop is not None and self._exhausted():
            self.ended_early = True
            self.say(
                f"stopping early: {self.best.metric} has not improved by more than {stop.min_delta:g} in "
                f"{stop.patience} evaluations"
            )
        self.callbacks.evaluated(self.split, MappingProxyType(values))
        # evaluation is not training time
        self._logged_at, self._logged_step = time.monotonic(), self.t.step

    def _exhausted(self) -> bool:
        stop = self.recipe.eval.early_stop
        return stop is not None and self.best.exhausted(stop.patience)

    def _not_finite(self, split: str, values: dict[str, Any]) -> str | None:
        """Say which numbers of an evaluation are none; return the error where the recipe has such a one end the run."""
        step = self.t.step
        for name, why in self.metrics.caveats.items():
            if (split, name) not in self._warned:
                self._warned.add((split, name))
                value = values.get(name)
                found = f" is {value:.4g}" if isinstance(value, float) else " is not a number throughout"
                decides = "; no model is the best by it" if name == self.best.metric else ""
                self.say(
                    f"warning: {name} on split '{split}' after step {step}{found}, which says nothing: {why}{decides}"
                )
        if math.isfinite(values["loss"]):
            return None
        found = f"the loss on split '{split}' after step {step} is {values['loss']:.6g}: {values['nonfinite']}"
        if self.recipe.anomalies.nonfinite != "stop":
            self.say(f"warning: {found}; it counts as no improvement, and as no best")
            return None
        return (
            f"{found}. The run stops, and its state is saved. What to do: mend these samples or the model and start "
            "the run again, or set anomalies.nonfinite: skip (with --update), which goes on with a warning"
        )

    def _score(self, split: str, event: str = "eval") -> dict[str, Any] | None:
        began = time.monotonic()
        strategy = self.t.strategy
        mark("evaluate")
        strategy.broadcast_buffers()
        with strategy.ema_weights():
            try:
                values = evaluate(
                    strategy.model,
                    self.t.call,
                    self.data.splits[split],
                    world=self.world,
                    loss=self.t.loss,
                    metrics=self.metrics,
                    batch_size=self.recipe.eval.batch or self.setup.feed.micro_batch_size,
                    transform=self.setup.feed.transforms["eval"],
                    workers=self.recipe.data.workers,
                    decode=self.data.meta.decode,
                    split=split,
                    whole=strategy.whole,
                    stopping=self._asked_to_leave,
                    skip_undecodable=self.recipe.data.skip_undecodable,
                )
            except Interrupted:
                values = None
        if values is None:
            self.stopping = self.stop.reason or _ELSEWHERE
            return None
        seconds = time.monotonic() - began
        for warning in self.undecodable.of_split(split, values.get("undecodable", {})):
            self.say(warning)
        self.telemetry.write(
            {"event": event, "step": self.t.step, "split": split, **values, "seconds": seconds, "time": now()}
        )
        if event == "eval":  # the final one is in the summary
            self.say(f"step {self.t.step}  {split}: {in_words(values)}  ({duration(seconds)})")
        return values

    def _asked_to_leave(self) -> bool:
        if self.stop.reason is not None:
            self._leave.state()
        return self._leave.stated()

    def save(self) -> None:
        """Save the state of this step, once."""
        if self._saved_step == self.t.step:
            return
        values = self._values if self._scored_step == self.t.step else None
        mark("save")
        strategy, state = self.t.strategy, self.t.strategy.state
        self._finish_save()
        if not strategy.all_finite():
            raise UserError(
                f"after step {self.t.step} the model has weights that are not finite; they are not saved, and the run "
                "stops with its last checkpoint as it was. Lower optim.lr, or set optim.clip_norm"
            )
        strategy.broadcast_buffers()
        self._saved_step, self._saved_at, self._time_to_save = self.t.step, time.monotonic(), False
        ended = {"ended": self._named_callbacks} if self._ended_by_callback else {}
        specs, scalars = self.world.run_on_all(
            lambda: (state.specs(), strategy.scalars() | self.callbacks.state() | ended)
        )
        with self._may_fail():
            self.saver.begin(
                self.t.step,
                specs,
                state.pieces(self.world.mesh),
                scalars=scalars
                | self.anomalies.scalars()
                | {"data": self.data.state, "transformers_config": transformers_config(strategy.model)}
                | {"inputs": self.setup.inputs.fingerprint, "transformers_files": self.setup.beside},
                aliases=state.aliases(),
                recipe=dump_recipe(self.recipe),
                strategy=self.world.strategy,
                evaluation=evaluation_of(self.best.criterion, self.metrics, values),
                history=self._history() if self.world.rank == 0 else None,
            )
        if not self.recipe.checkpoint.asynchronous:
            self._finish_save()

    def publish(self) -> None:
        """Wait for the save that is under way, if there is one."""
        self._finish_save()

    def _history(self) -> dict[str, Any]:
        """Rank 0: return what a checkpoint keeps for the start that goes on from it."""
        there = {name: score for name, score in self._scores.items() if (self.run.checkpoints / name).is_dir()}
        found = {"best": self.best.state(), "scores": there, "data_since": self._data_since}
        return found | self.undecodable.state() | self.telemetry.settled(self.t.step)

    def _finish_save(self) -> None:
        with self._may_fail():
            self._published(self.saver.finish())

    @contextmanager
    def _may_fail(self) -> Iterator[None]:
        """Go on training without the checkpoint, where the recipe says so and a later one will be written."""
        try:
            yield
        except CheckpointError as error:
            if self.recipe.checkpoint.on_failure == "stop" or self.at_end():
                raise
            self._saved_step = -1
            self.telemetry.write({"event": "checkpoint_failed", "step": self.t.step, "time": now()})
            self.say(f"warning: {error}; training goes on without it, as checkpoint.on_failure says")

    def _published(self, saved: Saved | None) -> None:
        if saved is None:
            return
        self.telemetry.write(
            {"event": "checkpoint", "step": saved.step, "bytes": saved.nbytes, "seconds": saved.seconds, "time": now()}
        )
        self.say(f"saved {saved.path.name} ({saved.nbytes / 2**20:.1f} MiB in {saved.seconds:.2f} s)")
        for warning in saved.warnings:
            self.say(f"warning: {warning}")
        self.callbacks.saved(SavedCheckpoint(saved.step, saved.path, saved.nbytes, saved.seconds))

    # ----------------------------------------------------------------------------------------------------------------
    # The end

    def preempt(self) -> dict[str, Any]:
        """Leave the run so that the same command goes on from here."""
        self._published(self.saver.finish())
        self.callbacks.end(Outcome("stopped", self._saved_step, reason=self.stopping))

        def mark() -> None:
            self._fence()
            self.run.mark_preempted(self._saved_step, self.stopping)

        self.world.run_on_rank0(mark)
        self.say(
            f"stopped by {self.stopping} after step {self._saved_step}, which is saved; the same command goes on from "
            "there"
        )
        return {"finished": False, "step": self._saved_step, "reason": self.stopping}

    def finish(self) -> dict[str, Any]:
        """Export the model, score what was exported on the test split, and write the summary."""
        self._published(self.saver.finish())
        best = self.best.value()
        chosen, why = self._chosen(best)
        values: dict[str, Any] = {}
        if "test" in self.data.splits:
            if chosen != self.t.step:
                reader = self.world.run_on_all(lambda: Reader(self._checkpoint(chosen)))
                self.t.strategy.restore(reader)
                reader.close()
                self.t.step = chosen
            scored = self._score("test", event="final")
            if scored is None:
                return self.preempt()
            values = scored
            self.callbacks.evaluated("test", MappingProxyType(values))
            if (problem := self._not_finite("test", values)) is not None:
                raise UserError(problem)
        summary = {
            "finished": True,
            "name": self.recipe.name,
            "steps": self.total_steps if not self.ended_early else self._saved_step,
            "exported_step": chosen,
            "exported": why,
            "model": str(self.run.export_path),
            "checkpoint": str(self._checkpoint(chosen)),
            "test": values,
            "best": {"metric": self.best.metric, "step": best[0], "value": best[1]} if best else None,
            "processes": self.world.world_size,
            "undecodable": {split: sorted(known) for split, known in self.undecodable.known.items() if known},
            "strategy": self.world.strategy,
            "precision": self.world.precision,
            "seconds": time.monotonic() - self.started,
            "samples_per_s": self._rate(),
        }

        def write() -> tuple[str, ...]:
            self._fence()
            self.run.export_path.parent.mkdir(exist_ok=True)
            exported = export(
                self._checkpoint(chosen), self.run.export_path, ema=self.recipe.train.ema is not None, overwrite=True
            )
            return exported.notes

        def mark_finished() -> None:
            self._fence()
            self.run.mark_finished(summary)

        mark("finish")
        for note in self.world.run_on_rank0(write):
            self.say(f"export: {note}")
        self.callbacks.end(Outcome("finished", summary["steps"], summary=MappingProxyType(summary)))
        self.world.run_on_rank0(mark_finished)
        self.telemetry.summarize(summary)
        return summary

    def _rate(self) -> float:
        """Return the median of the last rows' rates, on rank 0."""
        if self.world.rank != 0:
            return 0.0
        last = islice(rows_backwards(self.run.metrics_path), _RATED)
        rates = [row["samples_per_s"] for row in last if row.get("event") == "train"]
        return float(np.median(rates)) if rates else 0.0

    def _chosen(self, best: tuple[int, float] | None) -> tuple[int, str]:
        """Return the step whose model is exported, and why: the best where the recipe names one, else the last."""
        if self.recipe.eval.best is None or (best is None and not self.best.count):
            return self._saved_step, "last step"
        if best is None:
            return (
                self._saved_step,
                f"last step; no evaluation has a {self.best.metric} that is a number and says something",
            )
        if self.best.count > 1 and self.best.constant and not best[1] and self.best.criterion.higher:
            self.say(
                f"warning: {self.best.metric} was 0 in each of {self.best.count} evaluations, so none is better than "
                "another; the earliest is taken for the best"
            )
        if self.world.run_on_rank0(lambda: self._checkpoint(best[0]).is_dir()):
            return best[0], f"best {self.best.metric}"
        why = "was not kept: checkpoint.keep_best" if not self.recipe.checkpoint.keep_best else "is not there any more"
        return self._saved_step, f"last step; the best, step {best[0]}, {why}"

    def _checkpoint(self, step: int) -> Path:
        return self.run.checkpoints / f"step-{step:08d}"

    def say(self, text: str) -> None:
        """Tell the person in front of the terminal, once."""
        self.telemetry.say(text)


def in_words(values: dict[str, Any]) -> str:
    """Return an evaluation's single numbers on one line."""
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items() if isinstance(value, float))
