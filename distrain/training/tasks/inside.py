"""Runs a task's losses within the model's own forward pass: every strategy's hooks are then around all of it."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

_ACTION = "task_action"


class TaskModel:
    """A model as a task sees it: called as the module is, and with its attributes, within its forward pass."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any]):
        self._module, self._forward = module, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model's forward pass."""
        return self._forward(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def run_inside(model: nn.Module) -> None:
    """Have `model` run what `call_inside` is given within its forward pass; other calls are what they were.

    In place, before it is sharded, wrapped or compiled.
    """
    inner = model.forward

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        action = kwargs.pop(_ACTION, None)
        return inner(*args, **kwargs) if action is None else action(TaskModel(self, inner))

    model.forward = MethodType(forward, model)


def call_inside(model: nn.Module, action: Callable[[TaskModel], Any]) -> Any:
    """Call the model, wrapped or not, so that it runs `action`, and return what that returns."""
    return model(**{_ACTION: action})
