"""The sections of a recipe about optimizers and schedules: what may be written in each, and what every key means."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, Discriminator, Field, Tag, model_serializer

from distrain.config.durations import Duration
from distrain.config.registry import schedules
from distrain.config.schedules import SCHEDULES_WITH
from distrain.config.sections import Component, Section
from distrain.config.values import (
    ByName,
    ComponentName,
    Count,
    NotNegative,
    Positive,
    Share,
    Text,
    TrainingInterval,
    not_time,
)


class GroupSection(Section):
    """Overrides for the parameters whose names match."""

    params: Text
    """A shell pattern over parameter names, such as 'encoder.*'."""
    lr_scale: NotNegative = 1.0
    """Factor of the learning rate."""
    weight_decay: NotNegative | None = None
    """The weight decay of these parameters; None keeps optim.weight_decay."""


class FreezeSection(Section):
    """Parameters that are not trained before a step."""

    params: Text
    """A shell pattern over parameter names, such as 'encoder.*'."""
    until: TrainingInterval
    """For how long they are not trained."""


AnyFreeze = Annotated[
    Annotated[Text, Tag("<pattern>")] | Annotated[FreezeSection, Tag("<until>")],
    Discriminator(lambda value: "<until>" if isinstance(value, dict | FreezeSection) else "<pattern>"),
]


class OptimSection(Component):
    """The optimizer. Further keys are arguments of its class (momentum, betas, eps, ...)."""

    name: ComponentName = "adamw"
    """Any optimizer of torch.optim, or a class of your own."""
    lr: Positive = 1e-3
    """Peak learning rate."""
    weight_decay: NotNegative = 0.0
    """Weight decay of all parameters but those of no_decay."""
    no_decay: list[Literal["norm", "bias", "embedding"]] = ["norm", "bias", "embedding"]
    """Kinds of parameters that are never decayed."""
    clip_norm: Positive | None = None
    """Largest norm of the whole gradient; None does not clip."""
    groups: list[GroupSection] = []
    """Overrides by parameter name; the first match applies."""
    freeze: list[AnyFreeze] = []
    """Shell patterns over parameter names that are not trained, or not before a step; the first match applies."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    """Factor of the learning rate from each block of the model to the one below it: 1 for what follows the last block,
    least for what comes before the first. None is the same rate everywhere."""

    @model_serializer(mode="wrap")
    def _shortest(self, handler: Callable[[Any], dict[str, Any]]) -> Any:
        # recipes stored without the key stay equal
        return {key: value for key, value in handler(self).items() if value is not None or key != "layer_decay"}


class OwnScheduleSection(Component):
    """A function, usually your own, that returns the share of the peak at a step. Further keys are its arguments."""

    name: ComponentName
    """`path/to/file.py:name`, `package.module:name`, or a name that an installed package offers."""
    warmup: Annotated[Duration, AfterValidator(not_time)] = Duration(0, "steps")
    """Linear rise from 0, by which the function's share is multiplied."""


class ScheduleSection(Section):
    """The learning rate as a function of the optimizer step, as a share of the peak."""

    name: Literal["constant", "linear", "cosine", "step", "one_cycle", "warmup_stable_decay"] = "constant"
    """The shape after warm-up."""
    warmup: Annotated[Duration, AfterValidator(not_time)] = Duration(0, "steps")
    """Linear rise from 0 to the peak."""
    final: Share = 0.0
    """Share of the peak at the end (linear, cosine, one_cycle, warmup_stable_decay)."""
    decay: TrainingInterval = Duration(10, "%")
    """Length of the last phase (warmup_stable_decay)."""
    every: TrainingInterval = Duration(30, "%")
    """How often the rate falls (step)."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Factor of each fall (step)."""

    @model_serializer(mode="wrap")
    def _without_unused(self, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        return {
            key: value for key, value in handler(self).items() if self.name in SCHEDULES_WITH.get(key, (self.name,))
        }


def _kind_of_schedule(value: Any) -> str:
    name = value.get("name") if isinstance(value, dict) else getattr(value, "name", None)
    if not isinstance(name, str) or name in get_args(ScheduleSection.model_fields["name"].annotation):
        return "<named>"
    is_own = ":" in name or name.endswith(".py") or schedules.built_in(name) or name in schedules.installed()
    return "<own>" if is_own else "<named>"


AnySchedule = Annotated[
    Annotated[ScheduleSection, Tag("<named>")] | Annotated[OwnScheduleSection, Tag("<own>")],
    Discriminator(_kind_of_schedule),
]


class PartSection(OptimSection):
    """One of several optimizers, which act one after the other in each step. Keys are those of `optim`, and these."""

    params: Annotated[Text | list[Text], Field(title="a shell pattern over parameter names, or a list of them")]
    """Shell patterns over the names of the parameters that it trains; each parameter has exactly one optimizer."""
    every: Count = 1
    """It acts at each so many-th step."""
    schedule: Annotated[AnySchedule, ByName()] | None = None
    """Its own schedule of the learning rate; None is that of the recipe."""

    @property
    def patterns(self) -> list[str]:
        """`params` as a list."""
        return [self.params] if isinstance(self.params, str) else self.params


def _kind_of_optim(value: Any) -> str:
    if not isinstance(value, dict):
        return "<one>"
    # the others of muon are named by `params` too
    parts = [each for key, each in value.items() if key != "others" and isinstance(each, dict | PartSection)]
    named = any(isinstance(each, PartSection) or "params" in each for each in parts)
    return "<several>" if named or (parts and len(parts) == len(value)) else "<one>"


PartName = Annotated[
    str,
    Field(pattern=r"^[A-Za-z_][A-Za-z0-9_-]{0,39}$", title="the name of an optimizer: letters, digits, '_' and '-'"),
]
AnyOptim = Annotated[
    Annotated[OptimSection, Tag("<one>")]
    | Annotated[
        dict[PartName, PartSection],
        Tag("<several>"),
        Field(title="a mapping of several optimizers by name, each with its params"),
    ],
    Discriminator(_kind_of_optim),
]
