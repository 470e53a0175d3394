"""distrain: distributed training of PyTorch models from one recipe.

    import distrain

    run = distrain.train(task="classification", model=Net, data=(images, labels), batch={"global": 64},
                         train={"epochs": 3}, run_dir="runs/first")
    run.metrics, run.best, run.model()
    distrain.load("runs/first").evaluate("test")

`help(distrain.train)` says what it takes; docs/python.md has examples.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distrain.api import Run, evaluate, load, predict, train
    from distrain.config import Duration, Recipe, UserError
    from distrain.training.callbacks.base import Callback
    from distrain.training.callbacks.tracker import Tracker
    from distrain.training.noise import bernoulli, rand_like, randint_like, randn_like
    from distrain.training.tasks import LossSum, Task, TaskContext, gather
    from distrain.training.tasks.built_in import (
        Binary,
        Classification,
        LanguageModeling,
        Multilabel,
        Regression,
        Segmentation,
        Seq2Seq,
        TokenClassification,
    )

__version__ = "0.1.0"
__all__ = [
    "Binary",
    "Callback",
    "Classification",
    "Duration",
    "LanguageModeling",
    "LossSum",
    "Multilabel",
    "Recipe",
    "Regression",
    "Run",
    "Segmentation",
    "Seq2Seq",
    "Task",
    "TaskContext",
    "TokenClassification",
    "Tracker",
    "UserError",
    "bernoulli",
    "evaluate",
    "gather",
    "load",
    "predict",
    "rand_like",
    "randint_like",
    "randn_like",
    "train",
]

_FOUND_IN = {
    "Binary": "distrain.training.tasks.built_in",
    "Callback": "distrain.training.callbacks.base",
    "Classification": "distrain.training.tasks.built_in",
    "Duration": "distrain.config",
    "LanguageModeling": "distrain.training.tasks.built_in",
    "LossSum": "distrain.training.tasks",
    "Multilabel": "distrain.training.tasks.built_in",
    "Recipe": "distrain.config",
    "Regression": "distrain.training.tasks.built_in",
    "Run": "distrain.api",
    "Segmentation": "distrain.training.tasks.built_in",
    "Seq2Seq": "distrain.training.tasks.built_in",
    "Task": "distrain.training.tasks",
    "TaskContext": "distrain.training.tasks",
    "TokenClassification": "distrain.training.tasks.built_in",
    "Tracker": "distrain.training.callbacks.tracker",
    "UserError": "distrain.config",
    "bernoulli": "distrain.training.noise",
    "evaluate": "distrain.api",
    "gather": "distrain.training.tasks",
    "load": "distrain.api",
    "predict": "distrain.api",
    "rand_like": "distrain.training.noise",
    "randint_like": "distrain.training.noise",
    "randn_like": "distrain.training.noise",
    "train": "distrain.api",
}


def __getattr__(name: str) -> Any:
    # when asked for: importing distrain costs nothing
    if name not in _FOUND_IN:
        raise AttributeError(f"module 'distrain' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_FOUND_IN[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
