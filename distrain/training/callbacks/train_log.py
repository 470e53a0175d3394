"""The row of training numbers that a run writes every so many steps."""

from __future__ import annotations

import time
from typing import Any

from distrain.run.heartbeat import take_straggler
from distrain.training.callbacks.base import StepMetrics
from distrain.training.intervals import DataWaitTimer, Interval
from distrain.training.loop_state import LoopState


class TrainLog:
    """Rates are over the time since the last row; an evaluation does not count."""

    def __init__(self, loop: LoopState):
        self._loop = loop
        self._every = Interval(loop.recipe.log.every, loop.setup.horizon, "log.every")
        self._norm_is_known = loop.recipe.optim.clip_norm is not None or loop.setup.anomalies.watches
        self.waited = DataWaitTimer()
        self.restart()

    def restart(self) -> None:
        """Count from here."""
        self._logged_at, self._logged_step = time.monotonic(), self._loop.t.step

    def due(self, step: int) -> bool:
        """Whether a row is due for a step, on this rank's clock."""
        return self._every.due(step) or step == self._loop.total_steps or self._every.elapsed(self._logged_at)

    def metrics(self, step: int, loss: float, norm: float, *, skipped: bool = False) -> StepMetrics:
        """Return the numbers of a step."""
        loop, length = self._loop, self._loop.setup.horizon.samples_per_epoch
        samples = step * loop.recipe.batch.global_batch_size
        return StepMetrics(
            loss=loss,
            grad_norm=norm if self._norm_is_known else None,
            lr=loop.recipe.optim.lr * loop.t.schedule(step - 1),
            samples=samples,
            epoch=samples / length if length else 0.0,
            skipped=skipped,
        )

    def write(self, step: int, loss: float, norm: float, grad_scale: float | None) -> None:
        """Write the row of a step, and which rank is slow, if one is."""
        loop, clock, found = self._loop, time.monotonic(), self.metrics(step, loss, norm)
        seconds = clock - self._logged_at
        samples = (step - self._logged_step) * loop.recipe.batch.global_batch_size
        row: dict[str, Any] = {
            "step": step,
            "epoch": found.epoch,
            "samples": found.samples,
            "loss": loss,
            "lr": found.lr,
            "samples_per_s": samples / seconds if seconds else 0.0,
            "data_wait": min(self.waited.take() / seconds, 1.0) if seconds else 0.0,
            "time": time.time(),
        }
        if found.grad_norm is not None:
            row["grad_norm"] = norm
        if grad_scale is not None:
            row["loss_scale"] = grad_scale
        self._logged_at, self._logged_step = clock, step
        loop.telemetry.train(row)
        if (slow := take_straggler()) is not None:
            loop.telemetry.write(slow.row() | {"time": time.time()})
            loop.say(f"warning: {slow}")
