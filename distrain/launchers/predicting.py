"""`PredictionRequest`: what `distrain predict` asks of several processes, and what each of them does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from distrain.launchers.evaluating import ModelRequest, resolve_evaluation
from distrain.launchers.preflight import StartEnvironment, join_launcher
from distrain.launchers.reporting import reported
from distrain.launchers.worker import end_with_launcher
from distrain.system.environment import rank_told
from distrain.system.numbers import counted
from distrain.system.output import echo


@dataclass(frozen=True)
class PredictionRequest(ModelRequest):
    """One prediction, resolved: which checkpoint, of what, in how many processes."""

    checkpoint: str
    """The checkpoint's folder, absolute."""
    inputs: str | None
    out: str
    processes: int
    output: str | None = None
    layer: str | None = None
    data: Sequence[str] = ()
    changed_data: bool = False
    initial_weights: str | None = None
    """Where the weights are now that the checkpoint refers to."""

    script: ClassVar[str] = "predict.py"


def resolve_prediction(target: str, environment: StartEnvironment, **options: Any) -> PredictionRequest:
    """Return the request that a command makes; raises UserError with all that is wrong with it. Writes nothing."""
    found = resolve_evaluation(target, "", options["processes"], environment)
    return PredictionRequest(found.checkpoint, **options)


def work_prediction(request: str) -> int:
    """Predict in this process, one of those that a launcher started; returns the exit status. All ranks call."""
    end_with_launcher()

    def predict() -> None:
        asked = PredictionRequest(**json.loads(request))
        join_launcher(asked.processes)
        print_prediction(asked)

    return reported(None, rank_told(), predict)


def print_prediction(request: PredictionRequest) -> None:
    """Predict in this process, one of its world; rank 0 prints what was skipped and written. All ranks call."""
    from distrain.inference import predict_file

    written = predict_file(
        request.checkpoint,
        request.inputs,
        request.out,
        output=request.output,  # type: ignore[arg-type] # one of the names that the command takes
        layer=request.layer,
        data=request.data,
        changed_data=request.changed_data,
        initial_weights=request.initial_weights,
    )
    if rank_told() != 0:
        return
    for why in written.skipped:
        echo(f"skipped: {why}", error=True)
    echo(f"wrote {counted(written.samples, 'prediction')} to {request.out}")
