"""Evaluations during training and at its end, and which of them was best."""

from __future__ import annotations

import math
import time
from typing import Any

from distrain.checkpoint import Evaluation, Manifest
from distrain.metrics import build_metrics
from distrain.run.heartbeat import mark
from distrain.training.callbacks.trackers import duration
from distrain.training.evaluation import Interrupted, evaluate
from distrain.training.intervals import EvalHistory, Interval
from distrain.training.loop_state import LoopState
from distrain.training.ranking import criterion_for, data_since, evaluation_of, scored_split, take_up


class Evaluator:
    """Every method is called by all ranks at the same step."""

    def __init__(self, loop: LoopState):
        """Resume the ranking of the checkpoint, where it is one of the same numbers."""
        self._loop, recipe, setup, world = loop, loop.recipe, loop.setup, loop.world
        self.metrics = build_metrics(recipe, loop.data.meta)
        self.split = scored_split(loop.data)
        """The split that is evaluated during training."""
        self._early_stop = recipe.eval.early_stop
        self._data_since = data_since(setup.resumed, setup.inputs.fingerprint)
        self.criterion = world.run_on_all(lambda: criterion_for(recipe, self.metrics, loop.data, self._data_since))
        self.best: EvalHistory
        self.scores: dict[str, float | None]
        """Of checkpoints that are there."""
        self.best, self.scores, self.notes = self._take_up(setup.resumed)
        self._values: dict[str, Any] | None = None
        """Of the evaluation of this step."""
        self._warned: set[tuple[str, str]] = set()
        self._leave = world.store_flag()
        self._every = Interval(recipe.eval.every, setup.horizon, "eval.every")
        self.step = self.best.last[0] if self.best.last is not None else -1
        """Of the last evaluation."""

    def _take_up(self, resumed: Manifest | None) -> tuple[EvalHistory, dict[str, float | None], list[str]]:
        min_delta = self._early_stop.min_delta if self._early_stop is not None else 0.0
        found: tuple[EvalHistory, dict[str, float | None], list[str]] = self._loop.world.run_on_rank0(
            lambda: take_up(self._loop.run, self.criterion, min_delta, resumed)
        )
        return found

    def back_to(self, manifest: Manifest) -> None:
        """Resume the ranking of a checkpoint that the run was rolled back to."""
        self.best, _, _ = self._take_up(manifest)
        self._values, self.step = None, manifest.step

    def due(self) -> bool:
        """Whether the recipe wants an evaluation after this step."""
        step = self._loop.t.step
        return self.step != step and self._every.due(step) and self.split is not None

    def new_best(self) -> bool:
        """Whether this step was evaluated, is the best so far, and is kept for that."""
        kept = self._loop.recipe.checkpoint.keep_best > 0
        return kept and self.step == self._loop.t.step and self.best.improved()

    def exhausted(self) -> bool:
        """Whether early stopping has seen enough."""
        return self._early_stop is not None and self.best.exhausted(self._early_stop.patience)

    def of_this_step(self) -> Evaluation:
        """Return what a checkpoint keeps of this step's evaluation, if there was one."""
        values = self._values if self.step == self._loop.t.step else None
        return evaluation_of(self.criterion, self.metrics, values)

    def state(self) -> dict[str, Any]:
        """Rank 0: return what a checkpoint keeps for the start that resumes from it."""
        there = {name: score for name, score in self.scores.items() if (self._loop.run.checkpoints / name).is_dir()}
        return {"best": self.best.state(), "scores": there, "data_since": self._data_since}

    # ----------------------------------------------------------------------------------------------------------------

    def evaluate(self) -> tuple[dict[str, Any], str | None] | None:
        """Evaluate this step's model, once, and end training early where the recipe says so.

        Returns the values, and the error where they are to stop the run; None where there is nothing to do, or a
        request to stop came: the start that resumes then begins with the evaluation.
        """
        loop = self._loop
        if self.split is None or self.step == loop.t.step or (values := self.run(self.split)) is None:
            return None
        self.step, self._values = loop.t.step, values
        self.best.add(self.step, self.of_this_step().values.get(self.best.metric, math.nan))
        return values, self.problem(self.split, values)

    def stop_early(self) -> None:
        """End training where early stopping has seen enough."""
        if self._early_stop is not None and self.exhausted():
            self._loop.ended_early = True
            self._loop.say(
                f"stopping early: {self.best.metric} has not improved by more than {self._early_stop.min_delta:g} in "
                f"{self._early_stop.patience} evaluations"
            )

    def problem(self, split: str, values: dict[str, Any]) -> str | None:
        """Say which numbers of an evaluation are none; return the error where the recipe has such a one end the run."""
        loop, step = self._loop, self._loop.t.step
        for name, why in self.metrics.caveats.items():
            if (split, name) not in self._warned:
                self._warned.add((split, name))
                value = values.get(name)
                found = f" is {value:.4g}" if isinstance(value, float) else " is not a number throughout"
                decides = "; no model is the best by it" if name == self.best.metric else ""
                loop.say(
                    f"warning: {name} on split '{split}' after step {step}{found}, which says nothing: {why}{decides}"
                )
        if math.isfinite(values["loss"]):
            return None
        found = f"the loss on split '{split}' after step {step} is {values['loss']:.6g}: {values['nonfinite']}"
        if loop.recipe.anomalies.nonfinite != "stop":
            loop.say(f"warning: {found}; it counts as no improvement, and as no best")
            return None
        return (
            f"{found}. The run stops, and its state is saved. What to do: mend these samples or the model and start "
            "the run again, or set anomalies.nonfinite: skip (with --update), which goes on with a warning"
        )

    def run(self, split: str, event: str = "eval") -> dict[str, Any] | None:
        """Return the loss and metrics of a split, which are written and said; None where a request to stop came."""
        loop, recipe, strategy = self._loop, self._loop.recipe, self._loop.t.strategy
        began = time.monotonic()
        mark("evaluate")
        strategy.broadcast_buffers()
        with strategy.ema_weights():
            try:
                values = evaluate(
                    strategy.model,
                    loop.t.call,
                    loop.data.splits[split],
                    world=loop.world,
                    loss=loop.t.loss,
                    metrics=self.metrics,
                    batch_size=recipe.eval.batch or loop.setup.feed.micro_batch_size,
                    transform=loop.setup.feed.transforms["eval"],
                    workers=recipe.data.workers,
                    decode=loop.data.meta.decode,
                    split=split,
                    whole=strategy.whole,
                    stopping=self._asked_to_leave,
                    skip_undecodable=recipe.data.skip_undecodable,
                )
            except Interrupted:
                values = None
        if values is None:
            loop.stopping = ""
            loop.heed_stop()
            return None
        seconds = time.monotonic() - began
        for warning in loop.corrupt.of_split(split, values.get("undecodable", {})):
            loop.say(warning)
        row = {"event": event, "step": loop.t.step, "split": split, **values, "seconds": seconds, "time": time.time()}
        loop.telemetry.write(row)
        if event == "eval":  # the final one is in the summary
            loop.say(f"step {loop.t.step}  {split}: {in_words(values)}  ({duration(seconds)})")
        return values

    def _asked_to_leave(self) -> bool:
        if self._loop.stop.reason is not None:
            self._leave.state()
        return self._leave.stated()

    def chosen(self, saved_step: int) -> tuple[int, str]:
        """Return the step whose model is exported, and why: the best where the recipe names one, else the last."""
        loop, best = self._loop, self.best.value()
        if loop.recipe.eval.best is None or (best is None and not self.best.count):
            return saved_step, "last step"
        if best is None:
            return saved_step, f"last step; no evaluation has a {self.best.metric} that is a number and says something"
        if self.best.count > 1 and self.best.constant and not best[1] and self.best.criterion.higher:
            loop.say(
                f"warning: {self.best.metric} was 0 in each of {self.best.count} evaluations, so none is better than "
                "another; the earliest is taken for the best"
            )
        if loop.world.run_on_rank0(lambda: loop.run.checkpoint(best[0]).is_dir()):
            return best[0], f"best {self.best.metric}"
        why = "was not kept: checkpoint.keep_best" if not loop.recipe.checkpoint.keep_best else "is not there any more"
        return saved_step, f"last step; the best, step {best[0]}, {why}"


def in_words(values: dict[str, Any]) -> str:
    """Return an evaluation's single numbers on one line."""
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items() if isinstance(value, float))
