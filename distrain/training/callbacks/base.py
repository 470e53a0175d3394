"""`Callback`: code of one's own that a run calls at its steps, evaluations and checkpoints. Imports no torch."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from distrain.config import Duration, Horizon, Recipe

if TYPE_CHECKING:
    import torch
    from torch import nn

RESERVED = ("event", "step", "split", "time", "undecodable")
"""Keys of a row that a callback does not choose."""


@dataclass(frozen=True)
class StepMetrics:
    """The numbers of one optimizer step, the same on all ranks."""

    loss: float
    """Mean over all micro-batches and ranks; NaN or infinite only where `skipped`."""
    grad_norm: float | None
    """2-norm of the whole gradient before clipping; None where the recipe neither clips nor watches for anomalies."""
    lr: float
    """Learning rate of the step: that of a parameter whose `lr_scale` is 1."""
    samples: int
    """Samples consumed from the start of training to the end of this step."""
    epoch: float
    """The same in passes over the training split; 0 for a stream."""
    skipped: bool
    """Whether the step changed nothing, as `anomalies` has it skipped."""


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint that is complete on disk."""

    step: int
    path: Path
    nbytes: int
    seconds: float
    """From the copy of the state to the end of its writing."""


@dataclass(frozen=True)
class Outcome:
    """How this attempt at the run ended."""

    kind: Literal["finished", "stopped", "failed"]
    """`stopped`: by a request, with its state saved, so that the same command resumes the run."""
    step: int
    """Finished optimizer steps."""
    reason: str | None = None
    """Why it stopped or failed."""
    summary: Mapping[str, Any] | None = None
    """Of a finished run: what FINISHED will hold."""


@dataclass(frozen=True)
class Requests:
    """What the callbacks of one rank asked for."""

    stop: str | None = None
    """Save and leave the run; the same command resumes it."""
    finish: str | None = None
    """End training here: evaluate, export, finish."""


class CallbackRun:
    """The run as a callback sees it, and what the callback may do there. Read-only; valid from on_start to on_end."""

    def __init__(
        self,
        *,
        recipe: Recipe,
        rank: int,
        world_size: int,
        strategy: str,
        folder: Path,
        device: torch.device,
        model: nn.Module,
        optimizer: Any,
        horizon: Horizon,
        resumed_step: int | None,
        step: Callable[[], int],
        show: Callable[[str], None],
    ):
        self.recipe = recipe
        """The resolved recipe."""
        self.rank = rank
        """Of this process, from 0."""
        self.world_size = world_size
        self.strategy = strategy
        """single, ddp, zero1, zero2, zero3 or fsdp2."""
        self.folder = folder
        """The run folder. Rank 0 writes."""
        self.device = device
        self.model = model
        """Parameters by the names that checkpoints have. Under fsdp2 and zero3 each rank holds shards of them."""
        self.optimizer = optimizer
        """The torch optimizer. Under ZeRO its parameters are flat pieces."""
        self.total_steps = horizon.total_steps
        """Optimizer steps of the whole run."""
        self.resumed_step = resumed_step
        """The step of the checkpoint that this attempt resumed from; None for a new run."""
        self._horizon, self._step, self._show = horizon, step, show
        self._row: dict[str, float] = {}
        self.requests = Requests()
        """What was asked for and not yet told to the other ranks."""

    @property
    def step(self) -> int:
        """Finished optimizer steps. On a GPU, one more than the step whose numbers on_step_end delivers."""
        return self._step()

    def steps(self, duration: Duration | str) -> int:
        """Return a duration in optimizer steps, rounded up; raises ValueError or UserError where it has no meaning."""
        parsed = Duration.parse(duration)
        return self._horizon.steps(parsed, f"'{parsed}'")

    def log(self, values: Mapping[str, float]) -> None:
        """Add numbers to the row that this hook writes: to metrics.jsonl, wandb and TensorBoard.

        All ranks may call; rank 0 writes one row for each callback, hook and step. Raises ValueError or TypeError for a
        key that rows have already, and for a value that is no number of the host (a tensor: call .item()).
        """
        for key, value in values.items():
            if not isinstance(key, str) or not key or key in RESERVED:
                raise ValueError(f"found the key {key!r}, expected text other than {', '.join(RESERVED)}")
            if isinstance(value, bool) or not isinstance(value, numbers.Real):
                raise TypeError(f"{key} is a {type(value).__name__}, expected a number")
            self._row[key] = float(value) if not isinstance(value, int) else value

    def show(self, text: str) -> None:
        """Print a line on rank 0's terminal, above the progress, and into its log."""
        self._show(text)

    def request_stop(self, reason: str, *, finish: bool = False) -> None:
        """Have all ranks stop: after this step from on_evaluate, otherwise at most three steps later.

        The state is saved, and the same command resumes the run. With `finish`, training ends there instead: the model
        is evaluated and exported, and the run is finished. One rank's request is enough.
        """
        if not isinstance(reason, str) or not reason:
            raise ValueError(f"found the reason {reason!r}, expected a few words")
        old = self.requests
        self.requests = Requests(old.stop, old.finish or reason) if finish else Requests(old.stop or reason, old.finish)

    def take_requests(self) -> Requests:
        """For the loop: return what was asked for since the last call."""
        found, self.requests = self.requests, Requests()
        return found

    def take_row(self) -> dict[str, float]:
        """For the loop: return what was logged since the last call."""
        found, self._row = self._row, {}
        return found


class Callback:
    """Subclass it, and name the class in the recipe's `callbacks`. Every method may be left out.

    All ranks call every method at the same step, in the order of the recipe, with equal arguments; each rank has an
    object of its own. An exception stops the run on all ranks, and names the callback.

    `state_dict()` and `load_state_dict(state)`, where both are defined, keep JSON values in each checkpoint: rank 0's
    are kept, and all ranks get them back, before on_start of a resumed run, and when `anomalies` rolls a run back.
    """

    def on_start(self, run: CallbackRun) -> None:
        """Called once before the first step of an attempt: everything is built, and the checkpoint restored."""

    def on_step_end(self, step: int, metrics: StepMetrics) -> None:
        """Called for each optimizer step in order, when its numbers have reached the host.

        On a GPU that is while the next step runs: nothing waits. Before an evaluation or a checkpoint of step s, it
        has been called for all steps up to s.
        """

    def on_evaluate(self, split: str, values: Mapping[str, Any]) -> None:
        """Called after an evaluation with the loss and metrics by name, before the checkpoint of that step."""

    def on_checkpoint(self, saved: SavedCheckpoint) -> None:
        """Called when a checkpoint is complete; with `checkpoint.async` some steps after its own.

        What changes in the callback's state here is in the next checkpoint.
        """

    def on_end(self, outcome: Outcome) -> None:
        """Called once at the end, before FINISHED or PREEMPTED is written.

        Where the run failed, other ranks may be gone: do nothing collective then. An error is then only logged.
        """


HOOKS = ("on_start", "on_step_end", "on_evaluate", "on_checkpoint", "on_end")
