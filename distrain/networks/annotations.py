"""Types of the networks' arguments, and the tasks of networks."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from distrain.config import Form

Size = Annotated[int, Field(ge=1)]
"""A width, or a number of layers."""

Share = Annotated[float, Field(ge=0, lt=1)]
"""A dropout rate."""

PREDICTION: tuple[Form, ...] = ("classification", "binary", "multilabel", "regression")
"""The tasks that predict a vector for each sample."""
