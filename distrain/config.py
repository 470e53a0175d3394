"""The recipe: everything that a run is, validated, in plain values. Imports no torch.

A recipe is one YAML file. `load_recipe` reads it strictly, applies command-line overrides, and returns a frozen
`Recipe` or raises one `RecipeError` that lists every problem at once. Durations (`200 steps`, `3 epochs`, `1e9 tokens`,
`10%`, `20 min`) stay durations here; `Horizon` turns them into optimizer steps once the size of the data is known.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

# --------------------------------------------------------------------------------------------------------------------
# Errors that teach


class UserError(ValueError):
    """Something the user can mend. The message says what was found, what was expected and what to do."""


class RecipeError(UserError):
    """A recipe that cannot be run; `problems` holds one line for each thing that is wrong with it."""

    def __init__(self, source: str, problems: list[str]):
        self.source = source
        self.problems = problems
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{source}: {count}\n" + "\n".join(f"  - {problem}" for problem in problems))


def close_names(name: str, choices: Iterable[str]) -> str:
    """Return "; did you mean 'a' or 'b'?" for the choices nearest to `name`, or an empty string."""
    by_lower = {choice.lower(): choice for choice in choices}
    found = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(repr(by_lower[match]) for match in found)}?" if found else ""


# --------------------------------------------------------------------------------------------------------------------
# Durations

_DURATION = re.compile(r"^\s*([0-9.eE+_-]+)\s*(%|[A-Za-z]+)\s*$")
_UNITS = {
    "step": "steps",
    "steps": "steps",
    "epoch": "epochs",
    "epochs": "epochs",
    "sample": "samples",
    "samples": "samples",
    "token": "tokens",
    "tokens": "tokens",
    "%": "%",
    "s": "seconds",
    "sec": "seconds",
    "second": "seconds",
    "seconds": "seconds",
    "min": "minutes",
    "minute": "minutes",
    "minutes": "minutes",
    "h": "hours",
    "hour": "hours",
    "hours": "hours",
}
_SECONDS = {"seconds": 1.0, "minutes": 60.0, "hours": 3600.0}


@dataclass(frozen=True)
class Duration:
    """A length of training with its unit, as written: `200 steps`, `3 epochs`, `1e9 tokens`, `10%`, `20 min`."""

    amount: float
    unit: str
    """One of steps, epochs, samples, tokens, %, seconds, minutes, hours."""

    @classmethod
    def parse(cls, text: Any) -> Duration:
        """Read a duration from text; raises ValueError saying which forms are known."""
        if isinstance(text, Duration):
            return text
        match = _DURATION.match(text) if isinstance(text, str) else None
        unit = _UNITS.get(match[2].lower()) if match else None
        try:
            amount = float(match[1]) if match else math.nan
        except ValueError:
            amount = math.nan
        if unit is None or not math.isfinite(amount):
            hint = close_names(match[2], _UNITS) if match else ""
            raise ValueError(
                f"{text!r} is not a duration{hint or ''}: write a number and a unit, as in "
                "'200 steps', '3 epochs', '1e6 samples', '1e9 tokens', '10%', '20 min'"
            )
        if amount < 0:
            raise ValueError(f"{text!r} is negative; a duration is zero or more")
        return cls(amount, unit)

    @property
    def seconds(self) -> float | None:
        """The length in seconds, or None when the unit counts training rather than time."""
        return self.amount * _SECONDS[self.unit] if self.unit in _SECONDS else None

    def __str__(self) -> str:
        number = f"{self.amount:g}" if self.amount != int(self.amount) else f"{int(self.amount)}"
        return f"{number}%" if self.unit == "%" else f"{number} {self.unit}"


@dataclass(frozen=True)
class Horizon:
    """The sizes that turn durations into optimizer steps."""

    global_batch_size: int
    """Samples that one optimizer step consumes over all processes."""
    samples_per_epoch: int | None
    """Samples in the training split; None for a stream of unknown length."""
    tokens_per_sample: int | None
    """Tokens in a sample of fixed length; None where samples differ in length or have no tokens."""
    total_steps: int | None = None
    """Optimizer steps of the whole run; None while that itself is being computed."""

    def steps(self, duration: Duration, what: str) -> int:
        """Return `duration` in optimizer steps, at least 1 unless it is zero; `what` names the key in errors."""
        if duration.amount == 0:
            return 0
        return max(1, math.ceil(self._steps(duration, what) - 1e-9))

    def _steps(self, duration: Duration, what: str) -> float:
        if duration.unit == "steps":
            return duration.amount
        if duration.unit == "samples":
            return duration.amount / self.global_batch_size
        if duration.unit == "epochs":
            if self.samples_per_epoch is None:
                raise UserError(f"{what}: '{duration}' of a stream whose length is not known; write it in steps or samples")
            return duration.amount * self.samples_per_epoch / self.global_batch_size
        if duration.unit == "tokens":
            if self.tokens_per_sample is None:
                raise UserError(f"{what}: '{duration}' needs samples of a fixed number of tokens; write it in steps or epochs")
            return duration.amount / (self.global_batch_size * self.tokens_per_sample)
        if duration.unit == "%":
            if self.total_steps is None:
                raise UserError(f"{what}: '{duration}' has no meaning here; write it in steps, epochs or tokens")
            return duration.amount / 100 * self.total_steps
        raise UserError(f"{what}: '{duration}' is a time; only checkpoint.every and log.every can be one")


# --------------------------------------------------------------------------------------------------------------------
# The sections of a recipe


def _duration(value: Any) -> Any:
    return value if value is None else Duration.parse(value)


def _component(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class Section(BaseModel):
    """A mapping of the recipe whose keys are all known."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, arbitrary_types_allowed=True, allow_inf_nan=False, populate_by_name=True
    )


class Component(Section):
    """Something built by name: a bare name, or a mapping of `name` and the arguments that it takes."""

    model_config = ConfigDict(extra="allow")
    name: Annotated[str, Field(min_length=1)]
    """A name from `distrain list`, `package.module:name`, or `path/to/file.py:name`."""

    @property
    def args(self) -> dict[str, Any]:
        """The arguments besides the keys that the section itself defines."""
        return dict(self.model_extra or {})


DurationField = Annotated[Any, BeforeValidator(_duration)]
ComponentField = Annotated[Component, BeforeValidator(_component)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class FoldSplit(Section):
    """Fold `fold` of `of` is held out for testing, the rest is for training (cross-validation)."""

    fold: Annotated[int, Field(ge=1)]
    """Which fold is held out, from 1."""
    of: Annotated[int, Field(ge=2)]
    """How many folds the data is cut into."""


class TransformsSection(Section):
    """What is done to the inputs, each item a transform by its torchvision v2 name with its arguments."""

    train: list[ComponentField] = []
    """For the training split; random ones depend on (seed, epoch, sample id) alone."""
    eval: list[ComponentField] = []
    """For evaluation and prediction."""


class DataSection(Component):
    """The data set, how it is split and how it is read. Further keys are arguments of the data set."""

    path: str | None = None
    """A file or folder, relative to the recipe's folder."""
    split: list[Positive] | FoldSplit | dict[Literal["train", "valid", "test"], str] | None = None
    """Fractions for [train, test] or [train, valid, test]; {fold, of}; or the folder or file of each split. None: as the data set comes."""
    stratify: bool = False
    """Keep the share of each class the same in every split of fractions or folds."""
    transforms: TransformsSection = TransformsSection()
    """What is done to the inputs."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Loader processes for each training process; 0 loads in the training process itself."""
    prepare: str | None = None
    """`path/to/file.py:name` of a function that is called once, by rank 0, with `path` when nothing is there yet."""


class ModelSection(Component):
    """The model. Further keys are arguments of its class or function."""

    weights: str | None = None
    """A local .safetensors or .pt state dict to start from, relative to the recipe's folder."""
    weights_strict: bool = True
    """Whether `weights` must hold exactly the model's tensors; otherwise what matches is loaded and the rest is named."""


class GroupSection(Section):
    """Overrides for the parameters whose names match."""

    params: Annotated[str, Field(min_length=1)]
    """A shell pattern over parameter names, such as 'encoder.*'."""
    lr_scale: Annotated[float, Field(ge=0)] = 1.0
    """What the learning rate is multiplied by."""
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """The weight decay of these parameters; None keeps optim.weight_decay."""


class OptimSection(Component):
    """The optimizer. Further keys are arguments of its class (momentum, betas, eps, ...)."""

    name: Annotated[str, Field(min_length=1)] = "adamw"
    """Any optimizer of torch.optim, or a class of your own."""
    lr: Positive = 1e-3
    """Peak learning rate."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay, off for what no_decay lists."""
    no_decay: list[Literal["norm", "bias", "embedding"]] = ["norm", "bias", "embedding"]
    """Kinds of parameters that are never decayed."""
    clip_norm: Positive | None = None
    """Largest norm of the whole gradient; None does not clip."""
    groups: list[GroupSection] = []
    """Overrides by parameter name; the first that matches holds."""
    freeze: list[Annotated[str, Field(min_length=1)]] = []
    """Shell patterns over parameter names that are not trained."""


class ScheduleSection(Section):
    """The learning rate as a function of the optimizer step, as a share of the peak."""

    name: Literal["constant", "linear", "cosine", "step", "one_cycle", "warmup_stable_decay"] = "constant"
    """The shape after warm-up."""
    warmup: DurationField = Duration(0, "steps")
    """Linear rise from 0 to the peak."""
    final: Fraction = 0.0
    """What is left of the peak at the end (linear, cosine, one_cycle, warmup_stable_decay)."""
    decay: DurationField = Duration(10, "%")
    """Length of the last phase (warmup_stable_decay)."""
    every: DurationField = Duration(30, "%")
    """How often the rate falls (step)."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    """What it is multiplied by each time (step)."""


class BatchSection(Section):
    """Batch sizes in samples. Accumulation follows: global / (micro * processes)."""

    global_batch_size: Count = Field(alias="global")
    """Samples in one optimizer step, over all processes and accumulated micro-batches."""
    micro_batch_size: Count | Literal["auto"] = Field("auto", alias="micro")
    """Samples in one forward pass of one process; auto takes global / processes."""


class TrainSection(Section):
    """How long and in what arithmetic. Exactly one of epochs, steps and tokens."""

    epochs: Positive | None = None
    """Passes over the training split."""
    steps: Count | None = None
    """Optimizer steps."""
    tokens: Positive | None = None
    """Tokens, for samples of a fixed length."""
    precision: Literal["auto", "fp32", "bf16", "fp64"] = "auto"
    """Arithmetic of the forward pass: auto is bf16 on GPUs that have it and fp32 elsewhere; weights stay fp32 (fp64 for fp64)."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of an exponential moving average of the weights; evaluation and export then use the average."""
    compile: bool = False
    """Whether the model is compiled with torch.compile."""

    @model_validator(mode="after")
    def _one_length(self) -> TrainSection:
        given = [key for key in ("epochs", "steps", "tokens") if getattr(self, key) is not None]
        if len(given) != 1:
            found = "none was given" if not given else f"found {' and '.join(given)}"
            raise ValueError(f"exactly one of epochs, steps and tokens says how long to train; {found}")
        return self

    @property
    def length(self) -> Duration:
        """The length of training as a duration."""
        for unit in ("epochs", "steps", "tokens"):
            if (amount := getattr(self, unit)) is not None:
                return Duration(float(amount), unit)
        raise AssertionError("validated above")


class EarlyStopSection(Section):
    """Ends training when eval.best has not improved."""

    patience: Count
    """Evaluations without improvement before the run stops."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """The least change that counts as an improvement."""


class EvalSection(Section):
    """When and how the model is scored: on the split `valid` where there is one, otherwise on `test`."""

    every: DurationField = Duration(1, "epochs")
    """How often; None scores only at the end."""
    metrics: list[ComponentField] | None = None
    """Metrics by name beside the loss; None takes the usual ones of the task."""
    best: str | None = None
    """The metric that decides which checkpoint is best, such as accuracy or -loss; None takes the loss."""
    batch: Count | None = None
    """Samples in one forward pass of one process; None takes the micro batch size."""
    early_stop: EarlyStopSection | None = None
    """When to stop early; None trains to the end."""


class CheckpointSection(Section):
    """When state is saved and what is kept."""

    every: DurationField = Duration(10, "%")
    """How often, in training or in time; None saves only at the end."""
    keep: Count = 3
    """How many of the newest are kept."""
    keep_best: Annotated[int, Field(ge=0)] = 1
    """How many of the best by eval.best are kept besides."""
    asynchronous: bool = Field(True, alias="async")
    """Whether files are written while training goes on."""


class LogSection(Section):
    """Where the numbers go besides metrics.jsonl."""

    every: DurationField = Duration(10, "steps")
    """How often a row of training numbers is written."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Weights & Biases: not at all, to local files, or to the service."""
    project: str = "distrain"
    """The Weights & Biases project."""
    tensorboard: bool = False
    """Whether TensorBoard event files are written."""


Task = Literal["classification", "binary", "multilabel", "regression", "language_modeling", "seq2seq"]


class Recipe(Section):
    """What a run is. Two runs of equal recipes on equal worlds are equal."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
    """The run's name: letters, digits, '.', '_' and '-'; the run folder is runs/NAME."""
    task: Task
    """What is predicted, which decides the default loss and metrics and how a batch is read."""
    data: Annotated[DataSection, BeforeValidator(_component)]
    model: Annotated[ModelSection, BeforeValidator(_component)]
    loss: ComponentField | None = None
    """Any loss of torch.nn by name (cross_entropy or CrossEntropyLoss), or your own; None takes the task's usual one."""
    optim: Annotated[OptimSection, BeforeValidator(_component)] = OptimSection()
    schedule: Annotated[ScheduleSection, BeforeValidator(_component)] = ScheduleSection()
    batch: BatchSection
    train: TrainSection
    eval: EvalSection = EvalSection()
    checkpoint: CheckpointSection = CheckpointSection()
    log: LogSection = LogSection()
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """What initialisation, order, augmentation and dropout are computed from."""


# --------------------------------------------------------------------------------------------------------------------
# Randomness


def mix(*parts: int | str) -> int:
    """Return a 63-bit seed that depends on every part and on their order, the same on every machine."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
