"""`Recipe`: everything that a run is, in plain values."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator
from pydantic_core import PydanticCustomError

from distrain.config.agreement import Known, disagreements
from distrain.config.sections import (
    WHOLE,
    AnomaliesSection,
    AnySchedule,
    BatchSection,
    ByName,
    CheckpointSection,
    ComponentField,
    DataSection,
    EvalSection,
    LogSection,
    ModelSection,
    OptimSection,
    ScheduleSection,
    Section,
    TrainSection,
    WatchdogSection,
)

Task = Literal["classification", "binary", "multilabel", "regression", "language_modeling", "seq2seq"]


class Recipe(Section):
    """What a run is. Two runs of equal recipes on equal worlds are equal."""

    name: Annotated[
        str,
        Field(
            pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$",
            title="at most 100 letters, digits, '.', '_' and '-', the first a letter or digit",
        ),
    ]
    """The run's name: letters, digits, '.', '_' and '-'; the run folder is runs/NAME."""
    task: Task
    """What is predicted, which decides the default loss and metrics and how a batch is read."""
    data: Annotated[DataSection, ByName()]
    """The data set, how it is split and how it is read."""
    model: Annotated[ModelSection, ByName()]
    """The model, and the weights that it starts from."""
    loss: ComponentField | None = None
    """Any loss of torch.nn by name (cross_entropy or CrossEntropyLoss), or your own; None takes the task's usual."""
    optim: Annotated[OptimSection, ByName()] = OptimSection()
    """The optimizer: adamw unless it says otherwise."""
    schedule: Annotated[AnySchedule, ByName()] = ScheduleSection()
    """How the learning rate changes."""
    batch: BatchSection
    """Batch sizes."""
    train: TrainSection
    """How long and in what arithmetic."""
    eval: EvalSection = EvalSection()
    """When and how the model is scored."""
    checkpoint: CheckpointSection = CheckpointSection()
    """When state is saved and what is kept."""
    anomalies: AnomaliesSection = AnomaliesSection()
    """What is done about a step whose loss or gradient is not finite, or far above what is usual."""
    watchdog: WatchdogSection = WatchdogSection()
    """How long nothing may come of a process before the run is ended, and what it hangs on is said."""
    log: LogSection = LogSection()
    """Where the numbers go."""
    callbacks: list[ComponentField] = []
    """Code of your own that is called at steps, evaluations and checkpoints: classes by `path/to/file.py:Name`."""
    seed: Annotated[int, Field(ge=0, lt=2**63), WHOLE] = 0
    """What initialisation, order, augmentation and dropout are computed from."""

    @model_serializer(mode="wrap")
    def _without_callbacks(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        if not self.callbacks:
            values.pop("callbacks", None)  # recipes that are stored without the key stay equal
        return values

    @model_validator(mode="after")
    def _agrees(self) -> Recipe:
        if problems := disagreements(Known({key: getattr(self, key) for key in type(self).model_fields})):
            text = "; ".join(f"{key}: {problem}" for key, problem in problems)
            raise PydanticCustomError("disagreement", "{text}", {"text": text})
        return self
