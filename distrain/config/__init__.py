"""The recipe: the validated definition of a run. Imports no torch.

`distrain.config.yaml.load_recipe` reads a recipe from its YAML file.

recipe      `Recipe`
sections    the sections of a recipe, with one sentence for each key; optim_sections: optimizers and schedules
values      kinds of values in them, each with its check
agreement   checks across sections
durations   `Duration`: `200 steps`, `3 epochs`, `1e9 tokens`, `10%`, `20 min`; `Horizon` converts them to steps
registry    everything that a recipe names: models, data sets, losses, …
listing     these names and a line about each, from the sources
arguments   checks of a recipe's arguments against signatures
user_files  `resolve_object`: imports `path/to/file.py:name` or `package.module:name`
tasks       tasks, and the form of a batch of each
schedules   the learning rate by step
strategies  the strategies and their abilities
seeds       `mix`: a seed from a seed and its purpose
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distrain.config.durations import Duration, Horizon
    from distrain.config.optim_sections import (
        FreezeSection,
        GroupSection,
        OptimSection,
        OwnScheduleSection,
        PartSection,
        ScheduleSection,
    )
    from distrain.config.recipe import Recipe
    from distrain.config.sections import (
        AnomaliesSection,
        BatchSection,
        CheckpointSection,
        CompileSection,
        Component,
        DataSection,
        EarlyStopSection,
        EvalSection,
        FoldSplit,
        LogSection,
        LoraSection,
        MixSection,
        ModelSection,
        ProfileSection,
        Section,
        TrainSection,
        TransformsSection,
        TuneSection,
        WatchdogSection,
    )
    from distrain.config.seeds import mix
    from distrain.config.tasks import Form
    from distrain.config.user_files import is_object_spec, resolve_object
    from distrain.system.errors import RecipeError, UserError, close_names

__all__ = [
    "AnomaliesSection",
    "BatchSection",
    "CheckpointSection",
    "CompileSection",
    "Component",
    "DataSection",
    "Duration",
    "EarlyStopSection",
    "EvalSection",
    "FoldSplit",
    "Form",
    "FreezeSection",
    "GroupSection",
    "Horizon",
    "LogSection",
    "LoraSection",
    "MixSection",
    "ModelSection",
    "OptimSection",
    "OwnScheduleSection",
    "PartSection",
    "ProfileSection",
    "Recipe",
    "RecipeError",
    "ScheduleSection",
    "Section",
    "TrainSection",
    "TransformsSection",
    "TuneSection",
    "UserError",
    "WatchdogSection",
    "close_names",
    "is_object_spec",
    "mix",
    "resolve_object",
]

_FOUND_IN = {
    "Duration": "distrain.config.durations",
    "Horizon": "distrain.config.durations",
    "Recipe": "distrain.config.recipe",
    "Form": "distrain.config.tasks",
    "RecipeError": "distrain.system.errors",
    "UserError": "distrain.system.errors",
    "close_names": "distrain.system.errors",
    "is_object_spec": "distrain.config.user_files",
    "resolve_object": "distrain.config.user_files",
    "mix": "distrain.config.seeds",
    "FreezeSection": "distrain.config.optim_sections",
    "GroupSection": "distrain.config.optim_sections",
    "OptimSection": "distrain.config.optim_sections",
    "OwnScheduleSection": "distrain.config.optim_sections",
    "PartSection": "distrain.config.optim_sections",
    "ScheduleSection": "distrain.config.optim_sections",
}
"""Names that are not in `sections`."""


def __getattr__(name: str) -> Any:
    # when asked for: a command that reads no recipe needs neither pydantic nor the registries
    if name not in __all__:
        raise AttributeError(f"module 'distrain.config' has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(_FOUND_IN.get(name, "distrain.config.sections")), name)
    return found
