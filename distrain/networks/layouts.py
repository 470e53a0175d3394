"""How images and the weights of convolutions lie in memory: with the channels last, as tensor cores take them."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from distrain.networks.calling import calling_convention
from distrain.system.output import error_line


def lay_channels_last(model: nn.Module) -> None:
    """Lay out the weights of 2-d convolutions with the channels last, in place."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)


def channels_last_problem(
    model: nn.Module,
    shape: tuple[int, ...],
    device: torch.device,
    context: AbstractContextManager[Any] | None = None,
) -> str | None:
    """Return why a model cannot train on images (channels, height, width) with the channels last; None where it can.

    A `view` of activations, where others write `flatten` or `reshape`, fails then. A copy of the model takes two images
    forward and backward on the device, in the `context` of a forward pass; the model itself does not change.
    """
    try:
        tried = copy.deepcopy(model).to(device).train()
        lay_channels_last(tried)
        for module in tried.modules():
            if isinstance(module, nn.SyncBatchNorm):
                module.eval()  # the other ranks may not be there
        dtype = next((parameter.dtype for parameter in tried.parameters()), torch.float32)
        images = torch.zeros((2, *shape), dtype=dtype, device=device).contiguous(memory_format=torch.channels_last)
        with torch.enable_grad():
            with context or nullcontext():
                logits = calling_convention(tried)(tried, images).logits
            logits.float().sum().backward()
    except Exception as error:  # whatever it is, the model trains as it would in another layout
        return error_line(error)
    return None
