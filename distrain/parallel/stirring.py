"""Weights that begin as zeros, for a moment without them: such a layer hides what is before it from a trial."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from distrain.config import mix
from distrain.parallel.strategy import Strategy

_NEARLY_ZERO = 1e-3
"""LayerScale begins at 1e-4 to 1e-6 (Touvron et al. 2021)."""


@contextmanager
def stirred(strategy: Strategy) -> Iterator[None]:
    """Have trained weights that are zero, or nearly, be random; then themselves again. All ranks call."""
    kept = []
    for name, parameter in strategy.model.named_parameters():
        shard = strategy.shard(parameter)
        values = shard.values
        if shard.entry is None or not _is_nearly_zero(values):
            continue
        kept.append((values, values.clone()))
        # the same on ranks that hold the same
        _stir(values, name, shard.start)
    strategy.reshard()  # also where this rank has none: others may, and all must gather
    strategy.sync_compute_weights()
    try:
        yield
    finally:
        with torch.no_grad():
            for values, own in kept:
                values.copy_(own)
        strategy.reshard()
        strategy.sync_compute_weights()


def stir(model: nn.Module) -> None:
    """Have weights that are zero, or nearly, be random, and stay so."""
    for name, parameter in model.named_parameters():
        if _is_nearly_zero(parameter):
            _stir(parameter.data, name, 0)


def _is_nearly_zero(values: Tensor) -> bool:
    return values.numel() > 0 and bool(values.abs().max() <= _NEARLY_ZERO)


def _stir(values: Tensor, name: str, start: int) -> None:
    generator = torch.Generator().manual_seed(mix("stirred", name, start))
    with torch.no_grad():
        values.copy_(torch.randn(values.shape, generator=generator) / 10)
