"""The story of a run: `train` on one page, `train_step` as the whole mathematics, `evaluate` over every sample once.

The state of training is `(step, parameters, optimizer state)`. Which samples a step consumes, its learning rate and its
random numbers are computed from the recipe and the step, so a resumed run goes on as if it had never stopped.

    step.py        `train_step`
    evaluation.py  `evaluate`
    session.py     what `train` does between its steps: set-up, reports, scoring, saving, the end
    pace.py        when things are due, requests to stop, the best so far
"""

from __future__ import annotations

from typing import Any

from distrain.loop.evaluation import evaluate
from distrain.loop.pace import Best, Every, StopRequest
from distrain.loop.session import Session, check_recipe
from distrain.loop.step import StepNumbers, Training, to_device, train_step
from distrain.recipe_file import load_recipe
from distrain.rundir import RunDir
from distrain.strategy import World

__all__ = [
    "Best",
    "Every",
    "Session",
    "StepNumbers",
    "StopRequest",
    "Training",
    "check_recipe",
    "evaluate",
    "to_device",
    "train",
    "train_step",
]


def train(run: RunDir, world: World) -> dict[str, Any]:
    """Train the run's recipe from its newest checkpoint to its end; returns the summary. All ranks call.

    Raises UserError for what the user can mend, before the first step wherever that is possible. A run that is asked to
    stop saves its state, is marked PREEMPTED, and goes on from there when it is started again.
    """
    recipe = load_recipe(run.recipe_path).recipe
    with StopRequest() as stop, Session.open(run, recipe, world) as s:
        if s.t.step == 0 and recipe.eval.every is None:
            s.say("eval.every is null: the model is scored only at the end")
        late = None
        for micro_batches in s.loader():
            latest = train_step(s.t, micro_batches, s.flags(stop))
            # a step's numbers are read when the next one is under way, so that nothing waits for the device
            s.settle(late, stop)
            late = latest
            if s.eval_due() or s.save_due() or s.at_end():
                s.settle(late, stop)
                late = None
            if s.eval_due() or (s.at_end() and not s.stopping):
                s.evaluate()
            if s.save_due() or s.at_end() or s.new_best():
                s.save()
            if s.at_end():
                break
        return s.finish() if not s.stopping else s.preempt()
