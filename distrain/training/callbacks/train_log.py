"""The row of training numbers that a run writes every so many steps."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from distrain.datasets.base import Batch
from distrain.run.heartbeat import take_straggler
from distrain.training.callbacks.base import Callback, CallbackRun, Outcome, StepMetrics
from distrain.training.efficiency import Efficiency
from distrain.training.intervals import Interval
from distrain.training.step_times import DeviceTimes, HostTimes, waited_s

logger = logging.getLogger(__name__)


class TrainLog(Callback):
    """Writes the `train` rows. Rates are over the time since the last row; an evaluation does not count."""

    asks = False

    def on_start(self, run: CallbackRun) -> None:
        """Count from here."""
        self._run, horizon = run, run.context.setup.horizon
        self._every = Interval(run.recipe.log.every, horizon, "log.every")
        self._times = DeviceTimes() if run.device.type == "cuda" else HostTimes()
        self._efficiency = Efficiency(run)
        self._restart()

    def _restart(self) -> None:
        self._logged_at, self._logged_step = time.monotonic(), self._run.step
        self._waited_s = waited_s()
        self._times.take()
        self._efficiency.restart()

    def on_batches(self, step: int, micro_batches: Sequence[Batch]) -> None:
        """Note how much there is to compute."""
        self._efficiency.count(micro_batches)

    def wants_step_end(self, step: int) -> bool:
        """Whether a row is due for a step, on this rank's clock."""
        return self._every.due(step) or step == self._run.total_steps or self._every.elapsed(self._logged_at)

    def on_step_end(self, step: int, metrics: StepMetrics) -> None:
        """Write the row of a step, and which rank is slow, if one is."""
        if metrics.skipped:
            return
        run, clock = self._run, time.monotonic()
        seconds, waited = clock - self._logged_at, waited_s()
        samples = (step - self._logged_step) * run.recipe.batch.global_batch_size
        row: dict[str, Any] = {
            "epoch": metrics.epoch,
            "samples": metrics.samples,
            "loss": metrics.loss,
            **({"lr": metrics.lr} if metrics.lr is not None else {}),
            **{f"lr/{name}": rate for name, rate in metrics.lrs.items()},
            "samples_per_s": samples / seconds if seconds else 0.0,
            "data_wait": min((waited - self._waited_s) / seconds, 1.0) if seconds else 0.0,
            "time": time.time(),
        }
        if metrics.grad_norm is not None:
            row["grad_norm"] = metrics.grad_norm
        row |= {f"grad_norm/{name}": norm for name, norm in metrics.grad_norms.items()}
        if metrics.grad_scale is not None:
            row["loss_scale"] = metrics.grad_scale
        row |= {f"loss_scale/{name}": scale for name, scale in metrics.grad_scales.items()}
        row |= metrics.means
        row |= self._efficiency.row(row["samples_per_s"], seconds)
        self._efficiency.restart()
        if steps := step - self._logged_step:
            row |= {"step_s": seconds / steps, **self._times.take()}
        self._logged_at, self._logged_step, self._waited_s = clock, step, waited
        run.write_row("train", step, **row)
        if (slow := take_straggler()) is not None:
            run.context.write_row(slow.row())
            logger.warning(f"{slow}")

    def on_evaluate(self, split: str, values: Mapping[str, Any]) -> None:
        """Count from here: an evaluation is not training time."""
        self._restart()

    def on_rollback(self, step: int) -> None:
        """Count from the step that training resumes from."""
        self._restart()

    def on_close(self, outcome: Outcome) -> None:
        """Measure no more."""
        if hasattr(self, "_times"):
            self._times.close()
