"""Skipped steps: the loss or gradient norm is NaN, infinite, or spikes.

Every rank judges by the same numbers, so all of them act alike. What is decided about a step is in RUN/anomalies.jsonl,
on disk, before it takes effect, and every later attempt follows it: a run that is killed and resumed skips the steps
that it would have skipped otherwise, on any number of processes. With the window of losses in each checkpoint, the
run stays a function of its recipe and its step.

A row of anomalies.jsonl:

    step, action     and whether it is skip, rollback or stop
    optimizer        the one of several whose turn in the step it is; not there where there is only one
    what, value      the loss or the norm of the gradient, as it was found
    median           of the steps before, where the value is a spike; null where it is not finite
    loss, norm       of the step, over all ranks
    ranks            each rank's own loss, whose mean is the step's
    suspects         micro-batches whose own loss is not finite, or the one whose own loss is largest: rank,
                     micro_batch, loss, samples
    samples          the ids of all samples of the step, in the order of the data
    recipe           a digest of the recipe: under a changed one, later steps are judged anew
    processes, strategy, time
"""

from __future__ import annotations

import hashlib
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from distrain.config import Recipe, UserError
from distrain.config.yaml import dump_recipe
from distrain.parallel import World
from distrain.run.folder import RunDir
from distrain.run.json_files import append_row, rows_backwards
from distrain.system.errors import some

_SHOWN = 8  # samples in a message
_AT_LEAST = 1000  # rows that a start reads


class LocalStepResult(NamedTuple):
    """What this rank has computed in a step, to be looked at if the step turns out to be an anomaly."""

    losses: Sequence[Tensor]
    """For each micro-batch its part (0-d) of the rank's own loss; the mean of these over the ranks is the step's."""
    ids: Sequence[Tensor]
    """For each micro-batch the ids (batch,) of its samples."""


@dataclass(frozen=True)
class Anomaly:
    """A step that is skipped, rolled back, or stops the run, and why."""

    step: int
    action: str
    """stop, skip or rollback."""
    what: str
    """loss, or norm of the gradient."""
    value: float
    median: float | None
    """Of the steps before, where the value is a spike; None where it is NaN or infinite."""
    loss: float
    norm: float
    where: str = ""
    """Which rank and samples it comes from, as far as is known."""
    known: bool = False
    """Whether an earlier attempt, or an earlier pass, had decided to skip it."""
    optimizer: str = ""
    """The one of several whose turn in the step it is; the others act."""

    def __str__(self) -> str:
        spike = ""
        if self.median is not None:
            spike = f", {self.value / self.median:.3g} times its median of {self.median:.4g}"
        return f"the {self.what} of {self.turn} is {self.value:.6g}{spike}" + (f": {self.where}" * bool(self.where))

    @property
    def turn(self) -> str:
        """Which step it is, and of several optimizers which one's, in words."""
        return f"step {self.step}" + (f" of optimizer {self.optimizer}" if self.optimizer else "")

    def row(self) -> dict[str, Any]:
        """Return its row in metrics.jsonl."""
        return {
            "event": "anomaly",
            "step": self.step,
            **({"optimizer": self.optimizer} if self.optimizer else {}),
            "action": self.action,
            "what": self.what,
            "value": self.value,
            "median": self.median,
            "loss": self.loss,
            "norm": self.norm,
        }


class Anomalies:
    """Judges the steps of a run, by its recipe and by what is decided already. Every method is called by all ranks."""

    def __init__(
        self, run: RunDir, recipe: Recipe, world: World, fence: Callable[[], None] = lambda: None, step: int = 0
    ):
        """`fence` is called before anything is written, and raises when this process may write no more.

        `step`: the one that the run resumes from. What was decided long before it is not read.
        """
        self.section, self.world = recipe.anomalies, world
        self._path, self._fence = run.path / "anomalies.jsonl", fence
        self._recipe = hashlib.sha256(dump_recipe(recipe).encode()).hexdigest()[:16]
        window = self.section.window
        self._windows = {name: (deque[float](maxlen=window), deque[float](maxlen=window)) for name in recipe.optimizers}
        """Of each optimizer the losses and norms of the last steps that it took."""
        rows = world.run_on_rank0(lambda: [self._brief(row) for row in self._late(step - window) if self._mine(row)])
        known = [Anomaly(**row, known=True) for row in rows]
        self._skipped: dict[tuple[int, str], Anomaly] = {(each.step, each.optimizer): each for each in known}
        """By step and optimizer."""
        self._found: dict[tuple[int, str], Anomaly] = {}
        """Those of `may_step`, until the metrics of their steps are read."""
        # under a scaled loss the host waits in each step anyway, and an overflow cannot be told from an anomaly later
        skips = "skip" in (self.section.nonfinite, self.section.spike)
        self.watches = self.section.skips or self.section.spike is not None
        """Whether the recipe asks for more than to stop where a number that is read anyway is NaN or infinite."""
        self.judges_first = self.watches and (skips or world.mixed_precision.scaled)
        """Whether each step is judged before the optimizer takes it, for which the host waits for the device.

        Otherwise nothing waits: a step is judged when its metrics are read, later than it was taken.
        """

    def _late(self, step: int) -> list[dict[str, Any]]:
        """Return the last rows, in order: some, and all behind them that follow a row of `step` or later."""
        found: list[dict[str, Any]] = []
        for row in rows_backwards(self._path):
            if len(found) >= _AT_LEAST and row["step"] < step:
                break
            found.append(row)
        return found[::-1]

    def _mine(self, row: dict[str, Any]) -> bool:
        return row.get("recipe") == self._recipe and row["action"] in ("skip", "rollback")

    @staticmethod
    def _brief(row: dict[str, Any]) -> dict[str, Any]:
        numbers = {key: float(row[key]) for key in ("value", "loss", "norm")}  # NaN is text in JSON
        texts = {key: row[key] for key in ("step", "action", "what", "median")}
        return texts | numbers | {"optimizer": row.get("optimizer", "")}

    @property
    def rolls_back(self) -> bool:
        """Whether there must be a checkpoint to roll back to, from the first step on."""
        return "rollback" in (self.section.nonfinite, self.section.spike)

    # ----------------------------------------------------------------------------------------------------------------
    # The window, which a checkpoint holds

    def scalars(self) -> dict[str, Any]:
        """Return what a checkpoint holds of it."""
        windows = {name: [list(each) for each in pair] for name, pair in self._windows.items()}
        return {} if self.section.spike is None else {"anomalies": windows.get("", windows)}

    def load(self, scalars: dict[str, Any]) -> None:
        """Resume from what `scalars` returned; from an empty window where the recipe did not look for spikes."""
        self._found.clear()
        found = scalars.get("anomalies", [[], []])
        by_name = found if isinstance(found, dict) else {"": found}
        for stored in by_name.values():
            if not (isinstance(stored, list) and len(stored) == 2 and all(map(_finite_numbers, stored))):
                raise UserError(
                    f"the stored window of losses and norms is {str(stored)[:80]!r}; expected two lists of them"
                )
        for name, pair in self._windows.items():
            for window, numbers in zip(pair, by_name.get(name, ([], [])), strict=True):
                window.clear()
                window.extend(numbers)

    # ----------------------------------------------------------------------------------------------------------------
    # Judging

    def skipped(self, step: int, optimizer: str = "") -> Anomaly | None:
        """Return what was decided about an optimizer's step that is skipped; None for one that is to be made."""
        return self._skipped.get((step, optimizer))

    def may_step(self, step: int, loss: float, norm: float, local: LocalStepResult | None, optimizer: str = "") -> bool:
        """Return whether to take the step, or one optimizer's turn in it.

        Called on every rank with the same loss and norm of the gradient before the optimizer steps.
        """
        found = self._judged(step, loss, norm, local, optimizer)
        if found is not None:
            self._found[step, optimizer] = found
        return found is None

    def judge_read(
        self, step: int, loss: float, norm: float, local: LocalStepResult | None, optimizer: str = ""
    ) -> Anomaly | None:
        """Return what to do about a step whose metrics were read, or None. On disk when it returns."""
        if (found := self._found.pop((step, optimizer), None)) is not None:
            return found
        if (known := self._skipped.get((step, optimizer))) is not None:
            return known
        # judged already, or nothing that could be one
        if (self.judges_first or self.section.spike is None) and math.isfinite(loss) and math.isfinite(norm):
            return None
        return self._judged(step, loss, norm, local, optimizer)

    def _judged(
        self, step: int, loss: float, norm: float, local: LocalStepResult | None, optimizer: str
    ) -> Anomaly | None:
        found = self._judge(step, loss, norm, optimizer)
        if found is not None:
            return self._record(found, local)
        if self.section.spike is not None:
            for window, number in zip(self._windows[optimizer], (loss, norm), strict=True):
                window.append(number)
        return None

    def _judge(self, step: int, loss: float, norm: float, optimizer: str) -> Anomaly | None:
        section, (losses, norms) = self.section, self._windows[optimizer]
        numbers = (("loss", loss, losses), ("norm of the gradient", norm, norms))

        def anomaly(action: str, what: str, value: float, median: float | None) -> Anomaly:
            # stop where too many of the steps before it are skipped already
            stops = action != "stop" and self._recent(step, optimizer) >= section.max_skips
            action = "stop" if stops else action
            return Anomaly(step, action, what, value, median, loss, norm, optimizer=optimizer)

        for what, value, _ in numbers:
            if not math.isfinite(value):
                return anomaly(section.nonfinite, what, value, None)
        if section.spike is None or len(losses) < section.window:
            return None
        for what, value, window in numbers:
            # a loss may be below zero, where a multiple of the median means nothing
            if value > section.factor * (median := statistics.median(window)) > 0:
                return anomaly(section.spike, what, value, median)
        return None

    def _recent(self, step: int, optimizer: str) -> int:
        return sum(step - self.section.window < at < step and of == optimizer for at, of in self._skipped)

    def _record(self, found: Anomaly, local: LocalStepResult | None) -> Anomaly:
        """Write what is decided about a step to disk, with each rank's results; then all ranks follow it."""
        results: tuple[list[float], list[list[int]]] = ([], [])
        if local is not None:
            results = [float(loss) for loss in local.losses], [ids.tolist() for ids in local.ids]
        ranks: list[tuple[list[float], list[list[int]]]] = self.world.gather(results)
        suspects = _suspects(ranks)
        found = Anomaly(**{**vars(found), "where": _where(suspects)})
        row = found.row() | {
            "ranks": [math.fsum(losses) if all(map(math.isfinite, losses)) else sum(losses) for losses, _ in ranks],
            "suspects": suspects,
            # micro-batch by micro-batch, and in each rank by rank: as the data has them
            "samples": [
                each for parts in zip(*(ids for _, ids in ranks), strict=True) for ids in parts for each in ids
            ],
            "recipe": self._recipe,
            "processes": self.world.world_size,
            "strategy": self.world.strategy,
            "time": time.time(),
        }
        del row["event"]

        def write() -> None:
            self._fence()
            append_row(self._path, row)

        self.world.run_on_rank0(write)
        if found.action != "stop":
            self._skipped[found.step, found.optimizer] = Anomaly(**{**vars(found), "where": "", "known": True})
        return found

    def advice(self, found: Anomaly) -> str:
        """Return what the user can do about a step that stops the run."""
        if (recent := self._recent(found.step, found.optimizer)) >= self.section.max_skips and self.section.skips:
            return (
                f"it is not skipped, as {recent} of the {self.section.window} steps before it already are: "
                "anomalies.max_skips"
            )
        if found.median is not None:
            return "lower optim.lr, set optim.clip_norm, or look at these samples; anomalies.spike: skip skips it"
        return (
            "lower optim.lr, set optim.clip_norm, or look at the inputs, for divisions by zero in the model, and for a "
            "step whose targets are all ignored; anomalies.nonfinite: skip skips such a step"
        )


def _suspects(ranks: Sequence[tuple[list[float], list[list[int]]]]) -> list[dict[str, Any]]:
    """Return the micro-batches whose own loss is not finite; without such, the one whose own loss is largest."""
    parts: list[dict[str, Any]] = [
        {"rank": rank, "micro_batch": index, "loss": loss, "samples": samples}
        for rank, (losses, ids) in enumerate(ranks)
        for index, (loss, samples) in enumerate(zip(losses, ids, strict=True))
    ]
    bad = [part for part in parts if not math.isfinite(part["loss"])]
    return bad or sorted(parts, key=lambda part: -part["loss"])[:1]


def _where(suspects: Sequence[dict[str, Any]]) -> str:
    if not suspects:
        return ""
    if math.isfinite(suspects[0]["loss"]):
        largest = suspects[0]
        return f"every rank's own loss is finite, and rank {largest['rank']} has the largest, {_samples([largest])}"
    ranks = sorted({part["rank"] for part in suspects})
    which = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
    return f"not finite on {which}, {_samples(suspects)}"


def _samples(parts: Sequence[dict[str, Any]]) -> str:
    ids = [each for part in parts for each in part["samples"]]
    return f"in a micro-batch of the samples {some(ids, _SHOWN)}"


def _finite_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(each, int | float) and math.isfinite(each) for each in values)
