"""The recipe: everything that a run is, validated, in plain values. Imports no torch.

A recipe is one YAML file, which `distrain.config.yaml.load_recipe` reads; here is what may be written in it.

errors      `UserError`, `RecipeError`, `close_names`
durations   `Duration`: `200 steps`, `3 epochs`, `1e9 tokens`, `10%`, `20 min`; `Horizon` turns them into steps
user_files  `resolve_object`: what a recipe names as `path/to/file.py:name` or `package.module:name`
sections    each section of a recipe, with one sentence for each key
agreement   what sections must agree on
recipe      `Recipe`
seeds       `mix`: a seed from a seed and what it is for
"""

from __future__ import annotations

from distrain.config.durations import Duration, Horizon
from distrain.config.recipe import Recipe, Task
from distrain.config.sections import (
    AnomaliesSection,
    BatchSection,
    CheckpointSection,
    Component,
    DataSection,
    EarlyStopSection,
    EvalSection,
    FoldSplit,
    GroupSection,
    LogSection,
    ModelSection,
    OptimSection,
    OwnScheduleSection,
    ScheduleSection,
    Section,
    TrainSection,
    TransformsSection,
    WatchdogSection,
)
from distrain.config.seeds import mix
from distrain.config.user_files import is_object_spec, resolve_object
from distrain.system.errors import RecipeError, UserError, close_names

__all__ = [
    "AnomaliesSection",
    "BatchSection",
    "CheckpointSection",
    "Component",
    "DataSection",
    "Duration",
    "EarlyStopSection",
    "EvalSection",
    "FoldSplit",
    "GroupSection",
    "Horizon",
    "LogSection",
    "ModelSection",
    "OptimSection",
    "OwnScheduleSection",
    "Recipe",
    "RecipeError",
    "ScheduleSection",
    "Section",
    "Task",
    "TrainSection",
    "TransformsSection",
    "UserError",
    "WatchdogSection",
    "close_names",
    "is_object_spec",
    "mix",
    "resolve_object",
]
