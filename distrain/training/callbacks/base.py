"""`Callback`: code of one's own that a run calls at its steps, evaluations and checkpoints. Imports no torch."""

from __future__ import annotations

import logging
import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from distrain.config import Duration, Horizon, Recipe
from distrain.run.media import KEY, Encoded, encode_image, encode_table, encode_text
from distrain.system.numbers import a_kind
from distrain.system.output import one_line

if TYPE_CHECKING:
    import torch
    from torch import nn

    from distrain.training.intervals import EvalHistory
    from distrain.training.loop_state import RunContext

logger = logging.getLogger(__name__)

RESERVED = ("event", "step", "split", "time", KEY, "corrupt_samples", "undecodable")
"""Keys of a row that a callback does not choose."""


@dataclass(frozen=True)
class StepMetrics:
    """The numbers of one optimizer step, the same on all ranks."""

    loss: float
    """Mean over all micro-batches and ranks; NaN or infinite only where `skipped`. Of several optimizers the sum over
    those that have acted in the step."""
    grad_norm: float | None
    """2-norm of the whole gradient before clipping; None where the recipe neither clips nor watches for anomalies, and
    where there are several optimizers."""
    lr: float | None
    """Learning rate of the step: that of a parameter whose `lr_scale` is 1; None where there are several optimizers."""
    samples: int
    """Samples consumed from the start of training to the end of this step."""
    epoch: float
    """The same in passes over the training split; 0 for a stream."""
    skipped: bool
    """Whether the step changed nothing, as `anomalies` has it skipped."""
    grad_scale: float | None = None
    """What the loss was multiplied by before the backward pass; None where it is not scaled, and where there are
    several optimizers."""
    means: Mapping[str, float] = field(default_factory=dict)
    """What the task reports besides: each of its losses by name, and what it logs; over all micro-batches and ranks.
    Of several optimizers, those that have acted in the step."""
    lrs: Mapping[str, float] = field(default_factory=dict)
    """The learning rate of each of several optimizers by its name."""
    grad_norms: Mapping[str, float] = field(default_factory=dict)
    """The norm of its gradient before clipping, of those that have acted and for which it is known."""
    grad_scales: Mapping[str, float] = field(default_factory=dict)
    """What its losses were multiplied by, of those that have acted, where losses are scaled."""


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
    """What one callback asked for on one rank."""

    stop: str | None = None
    """Save and leave the run; the same command resumes it."""
    finish: str | None = None
    """End training here: evaluate, export, finish."""
    values: tuple[Any, ...] = ()
    """Given to `gather`, in order."""


NOTHING = Requests()


@dataclass
class Plan:
    """What callbacks have planned for steps to come, alike on all ranks."""

    saves: set[int] = field(default_factory=set)
    """Steps after which the state is saved, whatever the recipe says."""
    stop: tuple[int, str] | None = None
    """After this step all ranks leave the run, and why."""


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
        context: RunContext,
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
        self.context = context
        """All parts of the run, for the built-in callbacks; what is in it may change with each version."""
        self._horizon = horizon
        self._row: dict[str, float] = {}
        self._media: list[Encoded] = []
        self.requests = NOTHING
        """What was asked for and is not yet known to the other ranks."""
        self.summary: dict[str, Any] = {}
        """What `summarize` was given."""

    @property
    def step(self) -> int:
        """Finished optimizer steps. On a GPU, one more than the step whose numbers on_step_end delivers."""
        return self.context.t.step

    @property
    def evaluations(self) -> EvalHistory:
        """Of this run so far: the metric that decides, the best and the last (step, value), and how long ago."""
        return self.context.state.evaluations

    def steps(self, duration: Duration | str) -> int:
        """Return a duration in optimizer steps, rounded up; raises ValueError or UserError where it has no meaning."""
        parsed = Duration.parse(duration)
        return self._horizon.steps(parsed, f"'{parsed}'")

    def log(self, values: Mapping[str, float]) -> None:
        """Add numbers to the row that this hook writes: to metrics.jsonl, wandb and TensorBoard.

        All ranks may call; rank 0 writes one row for each callback, hook and step. Raises ValueError or TypeError for a
        key that rows have already, and for a value that is not a number on the host (a tensor: call .item()).
        """
        for key, value in values.items():
            if not isinstance(key, str) or not key or key in RESERVED:
                raise ValueError(f"found the key {key!r}, expected text other than {', '.join(RESERVED)}")
            if isinstance(value, bool) or not isinstance(value, numbers.Real):
                raise TypeError(f"{key} is {a_kind(value)}, expected a number")
            self._row[key] = float(value) if not isinstance(value, int) else value

    def log_image(self, name: str, image: Any, caption: str = "") -> None:
        """Add a picture to the row that this hook writes: a file below RUN/media, and from there in every tracker.

        `image`: a tensor or array (height, width), (channels, height, width) or (height, width, channels) with 1, 3 or
        4 channels, or (n, channels, height, width), which becomes a grid; floats in [0, 1], integers in [0, 255] or
        booleans; or a picture of Pillow. All ranks may call; rank 0's is kept, and the host waits for its device then.
        Raises UserError for other shapes and values.
        """
        if self.rank == 0:
            self._media.append(encode_image(name, image, caption))

    def log_table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], caption: str = "") -> None:
        """Add a table in the same way; cells are text, numbers, booleans or None. Raises UserError for others."""
        if self.rank == 0:
            self._media.append(encode_table(name, columns, rows, caption))

    def log_text(self, name: str, text: str, caption: str = "") -> None:
        """Add a text in the same way."""
        if self.rank == 0:
            self._media.append(encode_text(name, text, caption))

    def write_row(self, event: str, step: int, **values: Any) -> None:
        """Write a row of metrics.jsonl with an event of its own, on rank 0; `values` are JSON values, NaN included.

        `distrain status` and reports read the built-in events. A row whose event and step are there already is not
        written again.
        """
        self.context.write_row({"event": event, "step": step, **values})

    def summarize(self, values: Mapping[str, Any]) -> None:
        """Add JSON values to the summary of a finished run, which FINISHED holds. Rank 0's are kept."""
        self.summary |= values

    def show(self, text: str) -> None:
        """Print a line on rank 0's terminal, above the progress, and into its log."""
        logger.info("%s", one_line(text))

    def request_stop(self, reason: str, *, finish: bool = False) -> None:
        """Have all ranks stop: at once from on_start and on_evaluate, otherwise at most three steps later.

        The state is saved, and the same command resumes the run. With `finish`, training ends there instead: the model
        is evaluated and exported, and the run is finished. One rank's request is enough.
        """
        if not isinstance(reason, str) or not reason:
            raise ValueError(f"found the reason {reason!r}, expected a few words")
        old = self.requests
        if finish:
            self.requests = replace(old, finish=old.finish or reason)
        else:
            self.requests = replace(old, stop=old.stop or reason)

    def gather(self, value: Any) -> None:
        """Have on_gather called on all ranks with the values of each, at most three steps later; `value` is pickled."""
        self.requests = replace(self.requests, values=(*self.requests.values, value))

    def stop_after(self, step: int, reason: str) -> None:
        """Have all ranks save and leave the run right after `step`. All ranks call alike, before that step."""
        self.context.callbacks.plan.stop = (step, reason)

    def save_after(self, step: int) -> None:
        """Have a checkpoint saved after `step`, besides those of the recipe. All ranks call alike, before that step."""
        self.context.callbacks.plan.saves.add(step)

    def take_requests(self) -> Requests:
        """For the loop: return what was asked for since the last call."""
        found, self.requests = self.requests, NOTHING
        return found

    def drop_values(self) -> None:
        """For the loop: forget what was given to `gather` since then."""
        if self.requests.values:
            self.requests = replace(self.requests, values=())

    def take_row(self) -> dict[str, float]:
        """For the loop: return what was logged since the last call."""
        found, self._row = self._row, {}
        return found

    def take_media(self) -> list[Encoded]:
        """For the loop: return the pictures, tables and texts that were logged since the last call."""
        found, self._media = self._media, []
        return found


class Callback:
    """Subclass it, and name the class in the recipe's `callbacks`. Define the methods that it needs.

    All ranks call every method but on_row at the same step, in the order of the recipe, with equal
    arguments but for the batches; each rank has an object of its own. An exception stops the run on all ranks, and
    names the callback.
    A method that is not defined costs a step nothing.

    `state_dict()` and `load_state_dict(state)`, where both are defined, keep numbers, text, None, and lists, tuples,
    sets and dicts of these in each checkpoint: rank 0's are kept, and all ranks get them back, before on_start of a
    resumed run, and when `anomalies` rolls a run back.
    """

    asks: ClassVar[bool] = True
    """Whether it may call request_stop or gather, or fail on one rank alone. Where no callback does, ranks need not
    agree before each evaluation and checkpoint."""

    def wrap_transform(self, transform: Any) -> Any:
        """Called while the run is built, before on_start; returns what transforms the samples of the training split.

        `transform(batch, epochs)` is a `distrain.data.Transform`; what is returned is pickled to loader processes.
        """
        return transform

    def on_start(self, run: CallbackRun) -> None:
        """Called once before the first step of an attempt: everything is built, and the checkpoint restored."""

    def on_step_start(self, step: int) -> None:
        """Called before the samples of a step are waited for."""

    def on_batches(self, step: int, micro_batches: Sequence[dict[str, Any]]) -> None:
        """Called with a step's micro-batches of this rank, as they came to the host, before the step is taken."""

    def on_step_taken(self, step: int) -> None:
        """Called right after a step was taken. On a GPU its kernels may still run: to read a tensor waits for them."""

    def wants_step_end(self, step: int) -> bool:
        """Whether on_step_end is to be called for a step; where no callback wants it, no metrics are put together."""
        return True

    def on_step_end(self, step: int, metrics: StepMetrics) -> None:
        """Called for each optimizer step in order, when its numbers have reached the host.

        On a GPU that is while the next step runs: nothing waits. Before an evaluation or a checkpoint of step s, it
        has been called for all steps up to s.
        """

    def on_row(self, row: Mapping[str, Any]) -> None:
        """Called on rank 0 alone with each row for metrics.jsonl. What it logs is in the row of its next hook."""

    def on_gather(self, values: Sequence[Sequence[Any]]) -> None:
        """Called with what the callback of each rank, in their order, has given to `run.gather`."""

    def on_evaluate(self, split: str, values: Mapping[str, Any]) -> None:
        """Called after an evaluation with the loss and metrics by name, before the checkpoint of that step."""

    def on_checkpoint(self, saved: SavedCheckpoint) -> None:
        """Called when a checkpoint is complete; with `checkpoint.async` some steps after its own.

        What changes in the callback's state here is in the next checkpoint.
        """

    def on_rollback(self, step: int) -> None:
        """Called when `anomalies` has rolled the run back to the checkpoint of `step`, which is restored."""

    def on_end(self, outcome: Outcome) -> None:
        """Called once at the end, before FINISHED or PREEMPTED is written.

        Where the run failed, other ranks may be gone: do nothing collective then. An error is then only logged.
        """

    def on_close(self, outcome: Outcome) -> None:
        """Called last of all, however the run ended, in reverse order: close files and processes.

        It is called also where on_start was not, and does nothing collective. An error is only logged.
        """


HOOKS = tuple(name for name in vars(Callback) if name.startswith("on_"))
