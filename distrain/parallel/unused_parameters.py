"""Which parameters have no gradient, found without the memory that computing would take."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def unused_parameters(
    model: nn.Module, loss_sum: Callable[[nn.Module], Tensor], device: torch.device
) -> set[str] | None:
    """Return the names of the trained parameters to which no gradient flows from `loss_sum(model)` (0-d).

    Runs forward and backward under FakeTensorMode, so the parameters may be on the meta device, and restores what the
    passes leave in the modules. Returns None where the model cannot run so, as one that branches on values.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # takes a while to import, and only ZeRO-3 needs it

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    kept = [(module, dict(vars(module)), dict(module._parameters), dict(module._buffers)) for module in model.modules()]
    values = [(buffer, buffer.clone()) for buffer in model.buffers()]
    inner = model.forward

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return inner(*args, **kwargs)

    try:
        with mode:
            stand_ins: dict[int, nn.Parameter] = {}
            for module in model.modules():
                for key, parameter in module._parameters.items():
                    if parameter is not None:
                        if id(parameter) not in stand_ins:
                            empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                            stand_ins[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                        module._parameters[key] = stand_ins[id(parameter)]
        model.forward = forward
        value = loss_sum(model)
        with mode:
            value.backward()
        return {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    except Exception:  # whatever it is, it is raised again where the model really computes
        return None
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
