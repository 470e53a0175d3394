"""A step by a strategy's primitives, as `train_step` puts them together."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from distrain.parallel import StepFlags


def backward_and_apply(engine: Any, loss_sum: Tensor, scale: Tensor, clip_norm: float | None = None) -> None:
    """Go backward from `scale * loss_sum` (both 0-d) and take the optimizer's step."""
    agree = engine.agree_async(loss_sum.detach(), StepFlags())
    engine.backward(loss_sum, scale, last=True)
    record, coefficient = agree(), None
    if clip_norm is not None:
        coefficient = (clip_norm / (engine.grad_norm(record, same_bits=False) + 1e-6)).clamp(max=1.0)
    engine.apply(coefficient)
