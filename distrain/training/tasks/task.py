"""`Task`: what a batch means, in code of one's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from distrain.config import Form, Recipe, UserError
from distrain.datasets.base import Batch, DataMeta
from distrain.models import build_model
from distrain.networks.calling import Convention, ModelOutput
from distrain.run.media import Encoded, encode_image, encode_table, encode_text


@dataclass(frozen=True, slots=True)
class LossSum:
    """A loss, or any mean, as its parts. Sums and counts are added up over batches and ranks, and divided once."""

    sum: Tensor | float
    """0-d: over what is counted in this batch."""
    count: Tensor | float | None = None
    """How much that is; None: the samples of the batch. For a loss it is what `Task.count` says of the batch."""


@dataclass(frozen=True)
class TaskContext:
    """What a task may build on, once in each process, before the first batch."""

    recipe: Recipe
    meta: DataMeta
    """Facts about the data."""
    device: torch.device
    initial_model: Callable[[], nn.Module]
    """Builds the recipe's model once more: whole, with its initial weights, frozen, for evaluation, on the device."""

    @classmethod
    def of(cls, recipe: Recipe, meta: DataMeta, device: torch.device, kept: Path | None) -> TaskContext:
        """Return it for a run; `kept` is what the run has kept of a transformers model's folder."""

        def initial_model() -> nn.Module:
            return build_model(recipe, meta, kept=kept).to(device).requires_grad_(False).eval()

        return cls(recipe, meta, device, initial_model)


class Task:
    """What a batch means. Inherit from it, and name the class in the recipe: `task: my.py:MyTask`.

    `losses` alone has to be there. A batch is {"inputs": …, "targets": …, "ids": (batch,) int64}, on the device, with
    inputs and targets nested as in a sample. The arguments of the class are further keys of the recipe's `task`.

        class Autoencoder(distrain.Task):
            def losses(self, model, batch):
                x = batch["inputs"]
                return {"reconstruction": distrain.LossSum((model(x) - x).square().mean(1).sum())}

    The loss that is trained and reported is the sum of all, each divided by its count over all micro-batches and ranks.
    """

    form: ClassVar[Form] = "custom"
    """What targets are, for data sets, models and metrics that the recipe names: a built-in task's name."""
    metrics: ClassVar[Sequence[str] | None] = ()
    """The metrics of an evaluation where the recipe has no eval.metrics; they compare `predictions` with targets.
    None: those of the form."""
    weights: Mapping[str, float] = {}
    """What each loss is multiplied by in their sum; 1 for those that are not there. Each is reported without it."""
    couples_samples: ClassVar[bool] = False
    """Whether a loss is no sum over samples, but takes those of a batch together: `losses` then gathers what it takes
    together (`distrain.gather`), and returns the losses of the whole global batch; see docs/tasks.md."""
    optimizers: ClassVar[Sequence[str]] = ()
    """The names of the optimizers that train by losses of their own, as in a GAN; the recipe's `optim` has these names.
    `losses` is then called for each in turn, with its name as `optimizer`; see docs/tasks.md."""
    evaluation_group: int | None = None
    """Of a task that couples samples: how many an evaluation takes together, in the order of their ids; a number above
    that of the split takes all. None: batch.global."""

    collate: ClassVar[Callable[..., Batch] | None] = None
    """A method `collate(self, samples)` makes a batch {"inputs": …, "targets": …} of samples as your data set gives
    them; without one, tensors, dicts and tuples are stacked, and sequences padded. It runs in loader processes."""

    def losses(self, model: Any, batch: Batch) -> Mapping[str, LossSum | Tensor]:
        """Return the losses of a batch by name: each a `LossSum`, or a tensor (batch,), or the mean over its samples.

        `model` is called as the recipe's model is, and has its attributes (`model.encoder(x)`). This runs within the
        model's forward pass, as often on each rank, under the recipe's precision. Names are the same in each batch.
        Of a task with `optimizers` it is called as losses(model, batch, optimizer), and returns what trains that one.
        """
        raise NotImplementedError(f"{type(self).__name__} has no method losses(model, batch)")

    def count(self, batch: Batch) -> Mapping[str, Tensor | float]:
        """Return how many each loss is over, by name, from the batch on the host; by default the samples.

        Known before the forward pass, as all gradients are divided by the counts of all ranks.
        """
        return {}

    def predictions(self, model: Any, batch: Batch) -> Any:
        """Return what metrics compare with the targets, and what `distrain predict` writes: by default the outputs.

        A tensor (batch, ...), or dicts, tuples and lists of them; metrics of the recipe compare a tensor.
        """
        return self.outputs(model, batch).logits

    def measure(self, predictions: Any, batch: Batch) -> Mapping[str, LossSum]:
        """Return further means of an evaluation by name; `predictions` are those of the batch."""
        return {}

    def show(self, model: Any, batch: Batch) -> None:
        """Log pictures, tables or texts of a few samples, with `log_image`, `log_table` and `log_text`.

        Called after each evaluation where the recipe has `eval.samples`, on all ranks with the same samples.
        """

    def prepare(self, context: TaskContext) -> None:
        """Build what the task needs besides the model, such as a frozen teacher, which no checkpoint holds.

        What else changes while it trains is kept where the class has both `state_dict(self)` and
        `load_state_dict(self, state)`: tensors, numbers, text, and lists and dicts of these, the same on all ranks.
        """

    def step_taken(self, model: nn.Module) -> None:
        """Change what changes once in a step, such as a queue: called on all ranks after each step, without gradients.

        Not after a step that is skipped, and once where `losses` is called for each micro-batch.
        """

    def log(self, name: str, value: Tensor | float, count: Tensor | float | None = None) -> None:
        """Report a mean beside the losses: `value` is a sum over `count` of this batch (None: the samples).

        Call it in `losses`. Raises UserError for a name that is taken.
        """
        if name in self.logged:
            raise UserError(f"{type(self).__name__} logs {name!r} twice for one batch")
        self.logged[name] = LossSum(value, count)

    def log_image(self, name: str, image: Any, caption: str = "") -> None:
        """In `show`: log a picture; see `CallbackRun.log_image` for shapes and values. Rank 0's is kept."""
        if (shown := self._shown("log_image")) is not None:
            shown.append(encode_image(name, image, caption))

    def log_table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], caption: str = "") -> None:
        """In `show`: log a table of text, numbers, booleans and None."""
        if (shown := self._shown("log_table")) is not None:
            shown.append(encode_table(name, columns, rows, caption))

    def log_text(self, name: str, text: str, caption: str = "") -> None:
        """In `show`: log a text."""
        if (shown := self._shown("log_text")) is not None:
            shown.append(encode_text(name, text, caption))

    # ----------------------------------------------------------------------------------------------------------------

    def _shown(self, method: str) -> list[Encoded] | None:
        if not self.showing:
            raise UserError(
                f"{type(self).__name__} calls {method} where nothing is kept; call it in show(model, batch), which "
                "eval.samples has called after each evaluation"
            )
        return self.shown

    def __new__(cls, *args: Any, **kwargs: Any) -> Task:
        """Have what is here, whether or not one's own __init__ calls this class's."""
        task = super().__new__(cls)
        task.logged = {}
        task.convention = None
        task.showing, task.shown = False, None
        return task

    @property
    def step(self) -> int:
        """How many optimizer steps were taken before this one; in an evaluation, how many the model has had.

        Raises UserError in `collate`.
        """
        if self._step is None:
            raise UserError(
                f"{type(self).__name__}.collate reads self.step, which is known where losses are computed, and not "
                "where batches are made, in loader processes ahead of training; do what depends on it in losses"
            )
        return self._step

    @step.setter
    def step(self, step: int) -> None:
        self._step = step

    _step: int | None = 0
    """None where batches are made."""
    logged: dict[str, LossSum]
    convention: Convention | None
    showing: bool
    """Whether `show` is being called."""
    shown: list[Encoded] | None
    """What it has logged; None where this rank keeps nothing."""

    def outputs(self, model: Any, batch: Batch) -> ModelOutput:
        """Call the model with the inputs of a batch, as built-in tasks do: mappings by name, tuples one by one."""
        assert self.convention is not None, "the objective has set it"
        return self.convention(model, batch["inputs"])
