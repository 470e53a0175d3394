"""What arguments of networks may be, and the tasks that networks are for."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from distrain.config import Task

Size = Annotated[int, Field(ge=1)]
"""A width, or a number of layers."""

Share = Annotated[float, Field(ge=0, lt=1)]
"""A share of what is dropped."""

PREDICTION: tuple[Task, ...] = ("classification", "binary", "multilabel", "regression")
"""The tasks that predict a vector for each sample."""
