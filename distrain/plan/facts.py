"""What a plan is made of: a model's parameters, and a pass over a micro-batch. Numbers alone, no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class ParameterFacts:
    """A parameter, whole."""

    name: str
    shape: tuple[int, ...]
    itemsize: int
    """Bytes of an element."""
    trained: bool = True
    unit: int = 0
    """What it is gathered with: 0 is what is in no block, the blocks have numbers from 1."""
    cast: bool = False
    """Whether the forward pass uses nothing but a cast of it to 16 bits."""
    rows: bool = True
    """Whether it can be cut into rows; a number alone cannot."""

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes."""
        return self.numel * self.itemsize


@dataclass(frozen=True)
class OptimizerFacts:
    """What an optimizer keeps for each trained element, and takes while it steps."""

    name: str
    bytes_per_element: float
    counters: int
    """Bytes of what it keeps for each parameter whatever its size."""
    extra: float
    """Memory of a step beside all that, as a multiple of what is stepped at a time."""
    together: bool
    """Whether all parameters are stepped at a time; otherwise one after the other."""
    measured: bool = True
    """Whether a step could be taken without values; otherwise it is assumed to keep two moments."""


@dataclass(frozen=True)
class ModelFacts:
    """A model with its optimizer, whole."""

    parameters: tuple[ParameterFacts, ...]
    buffer_bytes: int
    optimizer: OptimizerFacts
    logits_per_sample: int = 0
    """Of a language model whose loss is computed in chunks of them; 0 for others."""

    @property
    def nbytes(self) -> int:
        """Of all parameters."""
        return sum(each.nbytes for each in self.parameters)

    @property
    def trained(self) -> list[ParameterFacts]:
        """Those that are trained."""
        return [each for each in self.parameters if each.trained]

    @property
    def trained_bytes(self) -> int:
        """Bytes of what is trained, and of its gradients."""
        return sum(each.nbytes for each in self.trained)

    @property
    def trained_elements(self) -> int:
        """Elements that are trained."""
        return sum(each.numel for each in self.trained)


@dataclass(frozen=True)
class Trace:
    """A forward and a backward pass over a micro-batch, operation by operation."""

    samples: int
    batch_bytes: int
    """Of its inputs and targets on the device."""
    live: np.ndarray[Any, Any]
    """(operations,) bytes that are alive after each, beside parameters, their gradients and the batch."""
    casts: np.ndarray[Any, Any]
    """(operations,) of them, those of parameters cast to 16 bits."""
    flops: np.ndarray[Any, Any]
    """(operations,) floating-point operations of matrix products, convolutions and attention."""
    moved: np.ndarray[Any, Any]
    """(operations,) bytes read and written."""
    narrow: np.ndarray[Any, Any]
    """(operations,) bool: whether it computes with 16 bits."""
    convolution: np.ndarray[Any, Any]
    """(operations,) bool: whether it is a convolution."""
    kernel: np.ndarray[Any, Any]
    """(operations,) bool: whether it writes anything; a view does not."""
    backward_at: int
    """The first operation of the backward pass."""
    arrivals: Mapping[str, int]
    """After how many operations the gradient of each trained parameter is there, in that order."""
    spans: tuple[tuple[int, int], ...] = field(default=())
    """The first operation of each unit's forward pass, and the one after its last, by its number less one."""
