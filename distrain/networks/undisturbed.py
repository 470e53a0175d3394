"""Passes of a model that leave nothing behind in it, and need no memory."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Restore on leaving what the modules hold: attributes, parameters, and buffers with their values."""
    kept = [(module, dict(vars(module)), dict(module._parameters), dict(module._buffers)) for module in model.modules()]
    values = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for module, attributes, parameters, buffers in kept:
            vars(module).clear()
            vars(module).update(attributes)
            module._parameters.clear()
            module._parameters.update(parameters)
            module._buffers.clear()
            module._buffers.update(buffers)
        with torch.no_grad():
            # what is computed from buffers alone, such as a count of batches, is computed for real
            for buffer, before in values:
                buffer.copy_(before)


def fake_tensors() -> FakeTensorMode:
    """Return a mode in which tensors have no values; whoever tries something in it tells what fails, and not torch."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # takes a while to import, and few runs need it

    logging.getLogger(FakeTensorMode.__module__).setLevel(logging.CRITICAL)
    return FakeTensorMode(allow_non_fake_inputs=True)


def use_stand_ins(model: nn.Module, device: torch.device) -> None:
    """Replace each parameter by an empty one on `device`; under FakeTensorMode these have shapes alone.

    Whatever device the parameters are on, buffers may be on another.
    """
    stand_ins: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in stand_ins:
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                    stand_ins[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                module._parameters[key] = stand_ins[id(parameter)]
