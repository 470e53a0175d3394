"""The registry of networks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, TypeVar, get_args

from pydantic import Field
from torch import nn

from distrain.config import Task

BuilderT = TypeVar("BuilderT", bound=Callable[..., nn.Module])

Size = Annotated[int, Field(ge=1)]
"""A width, or a number of layers."""

Share = Annotated[float, Field(ge=0, lt=1)]
"""A share of what is dropped."""

PREDICTION: tuple[Task, ...] = ("classification", "binary", "multilabel", "regression")
"""The tasks that predict a vector for each sample."""


@dataclass(frozen=True)
class ModelEntry:
    """A registered network."""

    name: str
    build: Callable[..., nn.Module]
    """Its class, or a function that returns it."""
    tasks: tuple[Task, ...]
    """The tasks that it can be used for."""

    @property
    def summary(self) -> str:
        """The first line of its docstring."""
        return (inspect.getdoc(self.build) or "").partition("\n")[0]


_ENTRIES: dict[str, ModelEntry] = {}


def register(name: str, *, tasks: Sequence[Task] = get_args(Task)) -> Callable[[BuilderT], BuilderT]:
    """Make a class or function that builds an nn.Module known as `model.name: NAME`, for these tasks."""

    def add(build: BuilderT) -> BuilderT:
        assert name not in _ENTRIES, f"two models are registered as {name!r}"
        _ENTRIES[name] = ModelEntry(name, build, tuple(tasks))
        return build

    return add


def find(name: str) -> ModelEntry | None:
    """Return the registered network of that name, or None."""
    return _ENTRIES.get(name)


def model_names() -> list[str]:
    """Return the names of the registered networks, sorted."""
    return sorted(_ENTRIES)
