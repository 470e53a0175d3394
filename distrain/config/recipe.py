"""`Recipe`: everything that a run is, in plain values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator
from pydantic_core import PydanticCustomError

from distrain.config.agreement import Known, disagreements
from distrain.config.optim_sections import (
    AnyOptim,
    AnySchedule,
    OptimSection,
    OwnScheduleSection,
    ScheduleSection,
)
from distrain.config.sections import (
    AnomaliesSection,
    BatchSection,
    CheckpointSection,
    ComponentField,
    DataSection,
    EvalSection,
    LogSection,
    ModelSection,
    Section,
    TrainSection,
    TuneSection,
    WatchdogSection,
)
from distrain.config.tasks import Form, form_of
from distrain.config.values import WHOLE, ByName


class Recipe(Section):
    """The definition of a run. Runs of equal recipes on equal worlds are equal."""

    name: Annotated[
        str,
        Field(
            pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$",
            title="at most 100 letters, digits, '.', '_' and '-', the first a letter or digit",
        ),
    ]
    """The run's name: letters, digits, '.', '_' and '-'; the run folder is runs/NAME."""
    task: ComponentField
    """What a batch means, which determines the default loss and metrics: a name, or your own `path/to/file.py:Name`."""
    data: Annotated[DataSection, ByName()]
    """The data set, its splits and how it is read."""
    model: Annotated[ModelSection, ByName()]
    """The model and its initial weights."""
    loss: ComponentField | None = None
    """Any loss of torch.nn by name (cross_entropy or CrossEntropyLoss), or your own; None is the task's usual one."""
    optim: Annotated[AnyOptim, ByName()] = OptimSection()
    """The optimizer, by default adamw; or several, each by a name of your own with the `params` that it trains."""
    schedule: Annotated[AnySchedule, ByName()] = ScheduleSection()
    """The learning rate schedule."""
    batch: BatchSection
    """Batch sizes."""
    train: TrainSection
    """Length and precision of training."""
    tune: TuneSection = TuneSection()
    """Optimisations of speed, each resolved for the device, the precision and the model."""
    eval: EvalSection = EvalSection()
    """When and how the model is evaluated."""
    checkpoint: CheckpointSection = CheckpointSection()
    """When checkpoints are saved and which are kept."""
    anomalies: AnomaliesSection = AnomaliesSection()
    """What to do about a step whose loss or gradient norm is NaN, infinite, or spikes."""
    watchdog: WatchdogSection = WatchdogSection()
    """Timeouts without progress after which a rank counts as hung."""
    log: LogSection = LogSection()
    """Trackers and how often metrics are logged."""
    callbacks: list[ComponentField] = []
    """Code of your own that is called at steps, evaluations and checkpoints: classes by `path/to/file.py:Name`."""
    seed: Annotated[int, Field(ge=0, lt=2**63), WHOLE] = 0
    """Determines initialisation, order of samples, augmentation and dropout."""

    @property
    def form(self) -> Form:
        """The form of a batch of the task. Imports a task of one's own."""
        return form_of(self.task.name)

    @property
    def optimizers(self) -> Mapping[str, OptimSection]:
        """The optimizers by name, in the order in which they act; a single one has an empty name."""
        return {"": self.optim} if isinstance(self.optim, OptimSection) else self.optim

    @property
    def schedules(self) -> Mapping[str, ScheduleSection | OwnScheduleSection]:
        """The schedule of each optimizer by its name: its own, or that of the recipe."""
        own = {name: getattr(section, "schedule", None) for name, section in self.optimizers.items()}
        return {name: schedule or self.schedule for name, schedule in own.items()}

    @model_serializer(mode="wrap")
    def _without_callbacks(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        if not self.callbacks:
            values.pop("callbacks", None)  # recipes stored without the key stay equal
        return values

    @model_validator(mode="after")
    def _agrees(self) -> Recipe:
        if problems := disagreements(Known({key: getattr(self, key) for key in type(self).model_fields})):
            text = "; ".join(f"{key}: {problem}" for key, problem in problems)
            raise PydanticCustomError("disagreement", "{text}", {"text": text})
        return self
