"""The end of an attempt at a run: it is left to be resumed, or its model is exported and evaluated."""

from __future__ import annotations

import time
from itertools import islice
from types import MappingProxyType
from typing import Any

import numpy as np

from distrain.checkpoints.export import export
from distrain.config import UserError
from distrain.run.folder import RunDir
from distrain.run.heartbeat import mark
from distrain.run.json_files import rows_backwards
from distrain.training.callbacks.base import Outcome
from distrain.training.evaluator import Evaluator
from distrain.training.loop_state import LoopState
from distrain.training.saving import Checkpoints

_RATED = 10_000
"""Rows that the rate in the summary is of."""


def preempt(loop: LoopState, checkpoints: Checkpoints) -> dict[str, Any]:
    """Leave the run so that the same command resumes it; returns the summary of the attempt. All ranks call."""
    checkpoints.publish()
    step, reason = checkpoints.step, loop.stopping
    loop.callbacks.end(Outcome("stopped", step, reason=reason))

    def mark_preempted() -> None:
        loop.fence()
        loop.run.mark_preempted(step, reason)

    loop.world.run_on_rank0(mark_preempted)
    loop.say(f"stopped by {reason} after step {step}, which is saved; the same command goes on from there")
    return {"finished": False, "step": step, "reason": reason}


def finish(loop: LoopState, evaluator: Evaluator, checkpoints: Checkpoints) -> dict[str, Any]:
    """Export the model, evaluate what was exported on the test split, and write the summary. All ranks call."""
    checkpoints.publish()
    best = evaluator.best.value()
    chosen, why = evaluator.chosen(checkpoints.step)
    last, values = checkpoints.step, {}
    if "test" in loop.data.splits:
        if chosen != loop.t.step:
            checkpoints.restore(chosen)
        found = evaluator.run("test", event="final")
        if found is None:
            return preempt(loop, checkpoints)
        values = found
        loop.callbacks.evaluated("test", MappingProxyType(values))
        if (problem := evaluator.problem("test", values)) is not None:
            raise UserError(problem)
    world, run, recipe = loop.world, loop.run, loop.recipe
    summary = {
        "finished": True,
        "name": recipe.name,
        "steps": loop.total_steps if not loop.ended_early else last,
        "exported_step": chosen,
        "exported": why,
        "model": str(run.export_path),
        "checkpoint": str(run.checkpoint(chosen)),
        "test": values,
        "best": {"metric": evaluator.best.metric, "step": best[0], "value": best[1]} if best else None,
        "processes": world.world_size,
        "undecodable": {split: sorted(known) for split, known in loop.corrupt.known.items() if known},
        "strategy": world.strategy,
        "precision": world.precision,
        "seconds": time.monotonic() - loop.started,
        "samples_per_s": _rate(run) if world.rank == 0 else 0.0,
    }

    def write() -> tuple[str, ...]:
        loop.fence()
        run.export_path.parent.mkdir(exist_ok=True)
        return export(run.checkpoint(chosen), run.export_path, ema=recipe.train.ema is not None, overwrite=True).notes

    def mark_finished() -> None:
        loop.fence()
        run.mark_finished(summary)

    mark("finish")
    for note in world.run_on_rank0(write):
        loop.say(f"export: {note}")
    loop.callbacks.end(Outcome("finished", summary["steps"], summary=MappingProxyType(summary)))
    world.run_on_rank0(mark_finished)
    loop.telemetry.summarize(summary)
    return summary


def _rate(run: RunDir) -> float:
    """Return the median of the last rows' rates."""
    last = islice(rows_backwards(run.metrics_path), _RATED)
    rates = [row["samples_per_s"] for row in last if row.get("event") == "train"]
    return float(np.median(rates)) if rates else 0.0
