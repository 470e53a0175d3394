"""Run folders as runs leave them, without any training: for what reads them."""

from __future__ import annotations

import json
import math
import random
import time
from pathlib import Path
from typing import Any

from distrain.run.folder import Launch, RunDir
from distrain.run.heartbeat import Heartbeat, write_heartbeat
from distrain.run.json_files import append_row

RECIPE = """name: {name}
task: classification
data: {{name: digits, split: [0.7, 0.15, 0.15]}}
model: {{name: mlp, hidden: [{hidden}]}}
optim: {{name: adamw, lr: {lr}}}
batch: {{global: 256}}
train: {{epochs: null, steps: {steps}}}
eval: {{every: 10%, metrics: [accuracy], best: accuracy}}
seed: {seed}
"""

_ROW = (
    '{"event": "train", "step": %d, "epoch": %.4f, "samples": %d, "loss": %.16g, "lr": %.8g, "samples_per_s": %.16g, '
    '"data_wait": %.16g, "step_s": %.16g, "data_s": %.16g, "forward_backward_s": %.16g, "optimizer_s": %.16g, '
    '"agreement_s": %.16g, "peak_memory_gib": 11.25, "time": %.6f, "grad_norm": %.16g}\n'
)


class MadeRun:
    """A run of `steps` steps, of which rows are written as `train` is called."""

    def __init__(
        self,
        folder: Path,
        *,
        steps: int = 1000,
        seed: int = 0,
        lr: float = 1e-3,
        hidden: int = 16,
        ranks: int = 2,
        name: str | None = None,
    ):
        """Make the folder."""
        self.run, self.steps, self.ranks, self.step = RunDir(folder), steps, ranks, 0
        self.random = random.Random(seed)
        self.began = time.time() - steps * 0.05
        recipe = RECIPE.format(name=name or "made", lr=lr, hidden=hidden, steps=steps, seed=seed)
        self.run.create(
            recipe, Launch(ranks, "ddp", ["distrain", "train", "recipe.yaml"], {"distrain": "1"}, None, "a")
        )
        self.run.record_effect({"strategy": "ddp", "total_steps": steps, "precision": "bf16"})
        self.best: dict[str, Any] | None = None
        self._rate = lr

    def attempt(self, step: int = 0) -> None:
        """Note a start."""
        append_row(
            self.run.attempts_path,
            {"time": self.began + step * 0.05, "step": step, "processes": self.ranks, "strategy": "ddp",
             "host": "node1", "job": None, "restart": 0},
        )  # fmt: skip

    def rows(self, count: int) -> str:
        """Return the rows of further steps."""
        draw = self.random.random
        found = []
        for step in range(self.step + 1, min(self.steps, self.step + count) + 1):
            self.step = step
            part = self.step / self.steps
            loss = 0.2 + 2.3 * math.exp(-6 * part) + 0.15 * (draw() - 0.5) * (1 - 0.7 * part) + 30 * self._rate * part
            step_s = 0.04 + 0.02 * draw()
            found.append(
                _ROW
                % (
                    self.step, self.step / 100, 256 * self.step, loss, self._rate * (1 - part), 256 / step_s,
                    0.001 * draw(), step_s, 0.002 * draw(), 0.7 * step_s, 0.1 * step_s, 0.001 * draw(),
                    self.began + 0.05 * self.step, 0.5 + draw() * (1 - part),
                )
            )  # fmt: skip
            if self.step % max(1, self.steps // 20) == 0:
                accuracy = 0.98 - 0.8 * math.exp(-5 * part) - 20 * self._rate * part
                if self.best is None or accuracy > self.best["value"]:
                    self.best = {"metric": "accuracy", "step": self.step, "value": accuracy}
                about = {"time": self.began + 0.05 * self.step, "step": self.step}
                found.append(
                    json.dumps(
                        {"event": "eval", "split": "valid", "loss": loss * 1.1, "accuracy": accuracy, "samples": 270}
                        | about
                    )
                    + "\n"
                )
                found.append(json.dumps({"event": "checkpoint", "bytes": 4096, "seconds": 0.1, **about}) + "\n")
        return "".join(found)

    def train(self, count: int | None = None) -> None:
        """Write the rows of further steps, all without `count`."""
        with self.run.metrics_path.open("a") as file:
            left = self.steps if count is None else count
            while left > 0 and self.step < self.steps:
                file.write(self.rows(min(left, 10_000)))
                left -= 10_000

    def beat(self, phase: str = "forward", **about: Any) -> None:
        """Write what each rank does, which makes the run one that runs."""
        for rank in range(self.ranks):
            work = {"data": 0.01, "forward": 0.02 + 0.001 * ((rank * 7) % 11), "optimizer": 0.004}
            given: dict[str, Any] = {
                "rank": rank, "host": f"node{1 + rank // 8}", "pid": 1000 + rank, "started": 1, "job": None,
                "attempt": "a", "world_size": self.ranks, "sequence": 1, "time": time.time(), "interval": 600.0,
                "step": self.step, "marks": 1, "phase": phase, "seconds": 0.1, "idle": 0.0, "steps": max(2, self.step),
                "work": {key: value * max(1, self.step - 1) for key, value in work.items()},
            }  # fmt: skip
            self.run.heartbeat_path(rank).parent.mkdir(exist_ok=True)
            write_heartbeat(self.run, Heartbeat(**given | about))

    def log(self, text: str, rank: int = 0) -> None:
        """Add to the log of a rank."""
        with self.run.log_path(rank).open("a") as file:
            file.write(text)

    def finish(self) -> None:
        """End the run."""
        self.beat("ended")
        self.run.mark_finished(
            {"finished": True, "steps": self.step, "best": self.best, "test": {"loss": 0.3, "accuracy": 0.91},
             "precision": "bf16", "seconds": self.step * 0.05}
        )  # fmt: skip
