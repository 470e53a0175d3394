"""The end of an attempt at a run: it is left to be resumed, or its model is exported and evaluated."""

from __future__ import annotations

import logging
import time
from itertools import islice
from types import MappingProxyType
from typing import Any

import numpy as np

from distrain.config import UserError
from distrain.run.folder import RunDir
from distrain.run.heartbeat import enter_phase
from distrain.run.json_files import rows_backwards
from distrain.training.callbacks.base import Outcome
from distrain.training.loop_state import RunContext
from distrain.training.restored import export_checkpoint

logger = logging.getLogger(__name__)

_RATED = 1_000
"""Rows that the rate in the summary is of."""


def preempt(context: RunContext) -> dict[str, Any]:
    """Leave the run so that the same command resumes it; returns the summary of the attempt. All ranks call."""
    context.checkpoints.publish()
    step, reason = context.state.saved_step, context.stopping
    context.callbacks.end(Outcome("stopped", step, reason=reason))

    def mark_preempted() -> None:
        context.fence()
        context.run.mark_preempted(step, reason)

    context.world.run_on_rank0(mark_preempted)
    logger.info(f"stopped by {reason} after step {step}, which is saved; the same command resumes it")
    return {"finished": False, "step": step, "reason": reason}


def finish(context: RunContext) -> dict[str, Any]:
    """Export the model, evaluate what was exported on the test split, and write the summary. All ranks call."""
    evaluator, checkpoints = context.evaluator, context.checkpoints
    checkpoints.publish()
    best = context.state.evaluations.value()
    last, values = context.state.saved_step, {}
    chosen, why = evaluator.chosen(last)
    if "test" in context.data.splits:
        if chosen != context.t.step:
            checkpoints.restore(chosen)
        found = evaluator.run("test", event="final")
        if found is None:
            return preempt(context)
        values = found
        context.callbacks.evaluated("test", MappingProxyType(values))
        if (problem := evaluator.problem("test", values)) is not None:
            raise UserError(problem)
    world, run, recipe = context.world, context.run, context.recipe
    summary = {
        "finished": True,
        "name": recipe.name,
        "steps": context.total_steps if not context.state.ended_early else last,
        "exported_step": chosen,
        "exported": why,
        "model": str(run.export_path),
        "checkpoint": str(run.checkpoint(chosen)),
        "test": values,
        "best": {"metric": evaluator.criterion.metric, "step": best[0], "value": best[1]} if best else None,
        "processes": world.world_size,
        "corrupt_samples": {},
        "strategy": world.strategy,
        "precision": world.precision,
        "seconds": time.monotonic() - context.started,
        "samples_per_s": _rate(run) if world.rank == 0 else 0.0,
        **context.callbacks.summary(),
    }

    def write() -> tuple[str, ...]:
        context.fence()
        run.export_path.parent.mkdir(exist_ok=True)
        averaged = recipe.train.ema is not None
        return export_checkpoint(run.checkpoint(chosen), run.export_path, ema=averaged, overwrite=True).notes

    def mark_finished() -> None:
        context.fence()
        run.mark_finished(summary)

    enter_phase("finish")
    for note in world.run_on_rank0(write):
        logger.info(f"export: {note}")
    context.callbacks.end(Outcome("finished", summary["steps"], summary=MappingProxyType(summary)))
    world.run_on_rank0(mark_finished)
    return summary


def _rate(run: RunDir) -> float:
    """Return the median of the last rows' rates."""
    last = islice(rows_backwards(run.metrics_path), _RATED)
    rates = [row["samples_per_s"] for row in last if row.get("event") == "train"]
    return float(np.median(rates)) if rates else 0.0
