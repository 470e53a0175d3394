"""A profile of a few steps: a trace that Perfetto and chrome://tracing open, and a table of the dearest operations."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from typing import Any

from distrain.config import ProfileSection, UserError
from distrain.system.numbers import counted
from distrain.training.callbacks.base import Callback, CallbackRun, Outcome

logger = logging.getLogger(__name__)

FOLDER = "profile"
OPERATIONS = 10
"""Rows of the table."""

NAME = 90
"""Characters of a name that are shown: those of kernels have no end."""


class Profiler(Callback):
    """Watches the steps that `train.profile` names, on rank 0 or on all ranks."""

    asks = False

    def __init__(self, section: ProfileSection):
        self._section = section
        self._first, self._last = section.at, section.at + section.steps - 1
        self._watching: Any = None

    def on_start(self, run: CallbackRun) -> None:
        """Raise UserError where the run has no such step."""
        self._run = run
        if run.total_steps is not None and self._first > run.total_steps:
            raise UserError(
                f"train.profile.at is {self._first:,}, and the run has {counted(run.total_steps, 'step')}; "
                "expected one of them"
            )

    def on_step_start(self, step: int) -> None:
        """Begin before the batches of the first step are waited for."""
        mine = self._section.ranks == "all" or self._run.rank == 0
        if step != self._first or not mine or self._watching is not None:
            return
        on_gpu = self._run.device.type == "cuda"
        if not on_gpu:  # its library prints an error where it finds no GPU; it reads this when it is first used
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        from torch.profiler import ProfilerActivity, profile

        self._watching = profile(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])],
            record_shapes=True,
            profile_memory=True,
        )
        self._watching.start()

    def on_step_taken(self, step: int) -> None:
        """Mark the step, and write what was seen after the last."""
        if self._watching is None:
            return
        if step >= self._last:
            self._write(step)
        else:
            self._watching.step()

    def on_close(self, outcome: Outcome) -> None:
        """Write what was seen, where the run ends before the last step."""
        if self._watching is not None:
            self._write(outcome.step)

    def _write(self, step: int) -> None:
        watching, self._watching = self._watching, None
        watching.stop()
        folder = self._run.folder / FOLDER
        folder.mkdir(exist_ok=True)
        trace = folder / f"rank-{self._run.rank}.json.gz"
        watching.export_chrome_trace(str(trace))
        table = dearest(watching.key_averages(), on_gpu=self._run.device.type == "cuda", steps=step + 1 - self._first)
        (folder / f"rank-{self._run.rank}.txt").write_text(table + "\n")
        if self._run.rank == 0:
            where = f"{FOLDER}/{trace.name} in the run folder"
            logger.info(f"profiled steps {self._first} to {step}; {where} is for ui.perfetto.dev\n{table}")


def dearest(operations: Iterable[Any], *, on_gpu: bool, steps: int) -> str:
    """Return a table of the operations that take the most time themselves, a step: of the device's where it is a GPU.

    `operations` are `key_averages` of torch.profiler.
    """
    by_time = {each: each.self_device_time_total if on_gpu else each.self_cpu_time_total for each in operations}
    total = sum(by_time.values()) or 1
    lines = [f"{'ms a step':>10} {'share':>6} {'calls':>7}  operation"]
    for each, us in sorted(by_time.items(), key=lambda item: -item[1])[:OPERATIONS]:
        calls = each.count / steps
        lines.append(f"{us / 1e3 / steps:10.3f} {us / total:6.1%} {calls:7,.0f}  {each.key[:NAME]}")
    return "\n".join(lines)
