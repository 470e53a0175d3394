"""Evaluations during training and at its end, and which of them was best."""

from __future__ import annotations

import logging
import math
import time
from types import MappingProxyType
from typing import Any

from distrain.checkpoint import Evaluation, Manifest
from distrain.config import UserError
from distrain.datasets.base import AnySource
from distrain.datasets.evaluation import EvalLoader, build_eval_loader
from distrain.metrics import build_metrics
from distrain.parallel import task_unchanged
from distrain.run.heartbeat import enter_phase
from distrain.run.media import KEY, write_media
from distrain.system.numbers import number
from distrain.training.callbacks.trackers import duration
from distrain.training.evaluation import Interrupted, evaluate, pass_options
from distrain.training.intervals import Interval
from distrain.training.loop_state import LoopState, RunContext
from distrain.training.ranking import criterion_for, data_since, evaluation_of, resume_ranking, scored_split
from distrain.training.samples import SampleView

logger = logging.getLogger(__name__)


class Evaluator:
    """Every method is called by all ranks at the same step."""

    def __init__(self, context: RunContext):
        self._context, recipe, setup, world = context, context.recipe, context.setup, context.world
        self.metrics = build_metrics(recipe, context.data.meta)
        self.split = scored_split(context.data)
        """The split that is evaluated during training."""
        self._data_since = data_since(setup.resumed, setup.inputs.fingerprint)
        self.criterion = world.run_on_all(lambda: criterion_for(recipe, self.metrics, context.data, self._data_since))
        self._warned: set[tuple[str, str]] = set()
        self._leave = world.store_flag()
        self._tried = False
        """Whether a batch was tried by `warn_of_company`."""
        self._loader: EvalLoader | None = None
        """Of the split that is evaluated during training; its processes stay from one evaluation to the next."""
        self._every = Interval(recipe.eval.every, setup.horizon, "eval.every")
        self._samples = world.run_on_all(self._sample_view) if recipe.eval.samples else None

    def _sample_view(self) -> SampleView:
        context, t = self._context, self._context.t
        transform = context.setup.feed.transforms["eval"]
        return SampleView(context.recipe, t.strategy, t.objective, context.data.meta, transform)

    def state_at(self, manifest: Manifest | None) -> LoopState:
        """Return what a checkpoint, or None, says of the loop's state."""
        context, early_stop = self._context, self._context.recipe.eval.early_stop
        min_delta = early_stop.min_delta if early_stop is not None else 0.0
        evaluations, scores = context.world.run_on_rank0(
            lambda: resume_ranking(context.run, self.criterion, min_delta, manifest)
        )
        last = evaluations.last[0] if evaluations.last is not None else -1
        saved = manifest.step if manifest is not None else -1
        return LoopState(evaluations, scores, evaluated_step=last, saved_step=saved)

    def due(self) -> bool:
        """Whether the recipe wants an evaluation after this step."""
        context = self._context
        step = context.t.step
        return self._every.due(step) and context.state.evaluated_step != step and self.split is not None

    def found_best(self) -> bool:
        """Whether this step was evaluated, is the best so far, and is kept for that."""
        context, state = self._context, self._context.state
        if state.evaluated_step != context.t.step:
            return False
        return context.recipe.checkpoint.keep_best > 0 and state.evaluations.improved()

    def of_this_step(self) -> Evaluation:
        """Return what a checkpoint keeps of this step's evaluation, if there was one."""
        state = self._context.state
        values = state.evaluation if state.evaluated_step == self._context.t.step else None
        return evaluation_of(self.criterion, self.metrics, values)

    def history(self) -> dict[str, Any]:
        """Rank 0: return what a checkpoint keeps for the attempt that resumes from it."""
        state, folder = self._context.state, self._context.run.checkpoints
        there = {name: score for name, score in state.scores.items() if (folder / name).is_dir()}
        return {"best": state.evaluations.state(), "scores": there, "data_since": self._data_since}

    # ----------------------------------------------------------------------------------------------------------------

    def evaluate(self) -> None:
        """Evaluate this step's model, once, and give the values to callbacks, which may end training.

        A request to stop ends it without values; the attempt that resumes from here begins with it.
        """
        context, state = self._context, self._context.state
        step = context.t.step
        if self.split is None or state.evaluated_step == step or (values := self.run(self.split)) is None:
            return
        objective, name = context.t.objective, self.criterion.metric
        if self.criterion.higher and name in objective.names and objective.weights.get(name, 1.0) > 0:
            context.checkpoints.save()  # the names are known since the first batch only; --update corrects the recipe
            context.checkpoints.finish()
            raise UserError(f"eval.best: {name!r} is a loss of the task, of which lower is better; write '-{name}'")
        state.evaluated_step, state.evaluation = step, values
        state.evaluations.add(step, self.of_this_step().values.get(state.evaluations.metric, math.nan))
        if (problem := self.problem(self.split, values)) is not None:
            context.checkpoints.save()  # it is no fault of the training
            context.checkpoints.finish()
            raise UserError(problem)
        context.callbacks.evaluated(self.split, MappingProxyType(values))

    def problem(self, split: str, values: dict[str, Any]) -> str | None:
        """Warn of undefined values; return the error where the loss is not finite and that is to end the run."""
        context, step = self._context, self._context.t.step
        for name, why in self.metrics.caveats.items():
            if (split, name) not in self._warned:
                self._warned.add((split, name))
                value = values.get(name)
                found = f" is {value:.4g}" if isinstance(value, float) else " is not a number throughout"
                decides = "; no model is the best by it" if name == self.criterion.metric else ""
                logger.warning(
                    f"{name} on split '{split}' after step {step}{found}, which says nothing: {why}{decides}"
                )
        if math.isfinite(values["loss"]):
            return None
        found = f"the loss on split '{split}' after step {step} is {values['loss']:.6g}: {values['nonfinite']}"
        if context.recipe.anomalies.nonfinite != "stop":
            logger.warning(f"{found}; it counts as no improvement, and as no best")
            return None
        return (
            f"{found}. The run stops, and its state is saved. What to do: mend these samples or the model and start "
            "the run again, or set anomalies.nonfinite: skip (with --update), which continues with a warning"
        )

    def run(self, split: str, event: str = "eval") -> dict[str, Any] | None:
        """Return the loss and metrics of a split, which are written and shown; None where a request to stop came."""
        context, strategy = self._context, self._context.t.strategy
        source = context.data.splits[split]
        began = time.monotonic()
        enter_phase("evaluate")
        strategy.broadcast_buffers()
        context.t.objective.at_step(context.t.step)
        with strategy.ema_weights(), task_unchanged(strategy.model):
            try:
                values = evaluate(
                    strategy.model,
                    context.t.objective,
                    source,
                    world=context.world,
                    metrics=self.metrics,
                    **self._reading(split),
                    meta=context.data.meta,
                    unsharded=strategy.unsharded,
                    stopping=self._asked_to_leave,
                    load_batches=self._load,
                    try_company=not self._tried,
                )
            except Interrupted:
                values = None
            self._tried = True
            shown = [] if values is None or self._samples is None else self._samples.take(source, split)
        if values is None:
            context.stop_as_requested()
            return None
        seconds = time.monotonic() - began
        row = {"event": event, "step": context.t.step, "split": split, **values, "seconds": seconds}
        if self._samples is not None and context.world.rank == 0:
            place = split if event == "eval" else f"{event}-{split}"
            row[KEY] = write_media(context.run.path, context.t.step, place, shown, context.fence)
        context.write_row(row)
        if event == "eval":  # the final one is in the summary
            logger.info(f"step {context.t.step}  {split}: {format_values(values)}  ({duration(seconds)})")
        return values

    def start_loading(self) -> None:
        """Start the loader processes that stay from one evaluation to the next, if there will be several.

        They are forked beside those of the training data: before the first step, as they keep what memory they share
        with this process as it is then, and what this process changes later it has to copy.
        """
        if self.split is not None and self._context.recipe.eval.every is not None:
            options = pass_options(self._context.world, **self._reading(self.split))
            self._load(self._context.data.splits[self.split], **options).start()

    def close(self) -> None:
        """End the loader processes."""
        if self._loader is not None:
            self._loader.close()

    def _reading(self, split: str) -> dict[str, Any]:
        """Return how a split is read."""
        recipe, feed = self._context.recipe, self._context.setup.feed
        return {
            "batch_size": recipe.eval.batch or self._context.setup.eval_batch_size,
            "transform": feed.transforms["eval"],
            "workers": recipe.data.workers,
            "split": split,
            "skip_corrupt": recipe.data.skip_corrupt,
        }

    def _load(self, source: AnySource, *, split: str, **options: Any) -> EvalLoader:
        if split != self.split:
            return build_eval_loader(source, split=split, **options)
        if self._loader is None:
            self._loader = build_eval_loader(source, split=split, **options, keep=True)
        return self._loader

    def _asked_to_leave(self) -> bool:
        if self._context.stop.reason is not None:
            self._leave.set()
        return self._leave.is_set()

    def chosen(self, saved_step: int) -> tuple[int, str]:
        """Return the step whose model is exported, and why: the best where the recipe names one, else the last."""
        context, evaluations = self._context, self._context.state.evaluations
        best = evaluations.value()
        if context.recipe.eval.best is None or (best is None and not evaluations.count):
            return saved_step, "last step"
        if best is None:
            return (
                saved_step,
                f"last step; no evaluation has a finite loss and {evaluations.metric} that say something",
            )
        if evaluations.count > 1 and evaluations.constant and not best[1] and evaluations.criterion.higher:
            logger.warning(
                f"{evaluations.metric} was 0 in each of {evaluations.count} evaluations, so none is better "
                "than another; the earliest is taken for the best"
            )
        if context.world.run_on_rank0(lambda: context.run.checkpoint(best[0]).is_dir()):
            return best[0], f"best {evaluations.metric}"
        why = (
            "was not kept: checkpoint.keep_best" if not context.recipe.checkpoint.keep_best else "is not there any more"
        )
        return saved_step, f"last step; the best, step {best[0]}, {why}"


def format_values(values: dict[str, Any]) -> str:
    """Return an evaluation's single numbers on one line."""
    return "  ".join(f"{name} {number(value)}" for name, value in values.items() if isinstance(value, float))
