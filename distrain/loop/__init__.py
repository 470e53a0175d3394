"""The story of a run: `train` on one page, `train_step` as the whole mathematics, `evaluate` over every sample once.

The state of training is `(step, parameters, optimizer state)`. Which samples a step consumes, its learning rate and its
random numbers are computed from the recipe and the step, so a resumed run goes on as if it had never stopped.

    step.py           `train_step`
    evaluation.py     `evaluate`
    setup.py          what is there before the first step
    session.py        what `train` does between its steps: reports, scoring, saving, the end
    pace.py           when things are due, requests to stop, the best so far
    anomalies.py      steps that are left out, because their loss or gradient is no number or far too large
    indices.py        what is said of an index out of range, and of operations without a deterministic form
    out_of_memory.py  what to lower where the memory did not suffice
    checks.py         what a recipe must be before anything is built from it
    updates.py        what changed since the checkpoint: data, code, recipe
    introducing.py    what a run says of itself before its first step
    trace.py          what each step did, for a proof; hidden.py: state that no checkpoint holds; outside.py: files
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from distrain.config import UserError
from distrain.lease import Lease
from distrain.loop.checks import check_recipe
from distrain.loop.evaluation import evaluate
from distrain.loop.pace import Best, Every, StopRequest
from distrain.loop.session import Session
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


def train(
    run: RunDir,
    world: World,
    lease: Lease | None = None,
    tell: Callable[[UserError], None] | None = None,
) -> dict[str, Any]:
    """Train the run's recipe from its newest checkpoint to its end; returns the summary. All ranks call.

    Raises UserError for what the user can mend, before the first step wherever that is possible. A run that is asked to
    stop saves its state, is marked PREEMPTED, and goes on from there when it is started again. Nothing is published
    once another start has the `lease`. `tell` says what went wrong where this process has lost its GPU,
    and ends.
    """
    recipe = load_recipe(run.recipe_path).recipe
    watched = run.stop_path if world.rank == 0 else None
    with StopRequest(watched) as stop, Session.open(run, recipe, world, stop, lease, tell) as s:
        if s.t.step == 0 and recipe.eval.every is None:
            s.say("eval.every is null: the model is scored only at the end")
        s.catch_up()
        late = None
        for micro_batches in s.loader():
            latest = train_step(s.t, micro_batches, s.flags)
            # a step's numbers are read when the next one is under way, so that nothing waits for the device
            late = latest if s.settle(late) else None
            if s.eval_due() or s.save_due() or s.at_end() or not s.reads_late:
                s.settle(late)
                late = None
            # a request to stop comes first: who stops a run may not wait for a score
            if not s.stopping and (s.eval_due() or s.at_end()):
                s.evaluate()
            if s.save_due() or s.at_end() or s.new_best():
                s.save()
            if s.at_end():
                break
        return s.finish() if not s.stopping else s.preempt()
