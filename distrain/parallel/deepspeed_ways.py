"""What DeepSpeed does otherwise here: functions of its own, and of torch, replaced while it is set up or computes;
and the sizes of its buffers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import nn
from torch.nn import functional


@contextmanager
def without_broadcast() -> Iterator[None]:
    """Have DeepSpeed broadcast no weights: all ranks have the same ones already.

    It sends them as bytes, as which neither 0-d parameters nor those that are not contiguous can be looked at.
    """
    own = deepspeed.DeepSpeedEngine._broadcast_model
    deepspeed.DeepSpeedEngine._broadcast_model = lambda engine: None
    try:
        yield
    finally:
        deepspeed.DeepSpeedEngine._broadcast_model = own


@contextmanager
def with_own_adagrad(stage: int) -> Iterator[None]:
    """Have DeepSpeed step with the Adagrad that it is given.

    It has a state from the start, so DeepSpeed makes another one for its flat pieces: of torch's class, with one group,
    and without what was set for the groups. The state is all that is needed of it.
    """
    kind: Any = DeepSpeedZeroOptimizer if stage < 3 else DeepSpeedZeroOptimizer_Stage3
    own = kind.initialize_optimizer_states

    def initialize(zero: Any) -> None:
        given = zero.optimizer
        own(zero)
        if zero.optimizer is not given and isinstance(given, torch.optim.Adagrad):
            given.state.clear()
            given.state.update(zero.optimizer.state)
            zero.optimizer = given

    kind.initialize_optimizer_states = initialize
    try:
        yield
    finally:
        kind.initialize_optimizer_states = own


@contextmanager
def thrifty_linear() -> Iterator[None]:
    """Have linear layers keep a parameter for the backward pass, and not a view of what was gathered of it.

    torch's own keeps such a view, and with it the whole model from the forward pass to the backward pass. DeepSpeed's
    takes the parameter as it is by then, gathered anew. Also in the backward pass: blocks that are computed again there
    must keep the same tensors.
    """
    kept = functional.linear
    functional.linear = zero3_linear_wrap
    try:
        yield
    finally:
        functional.linear = kept


def buffer_sizes(stage: int, model: nn.Module) -> dict[str, int]:
    """Return how much DeepSpeed sends or holds at once, in elements: a sixteenth of the model, at most 200 MB of fp32.

    Its own sizes are for large models: buffers of 2 GB on each rank, and in stage 3 no weight of a model of less than a
    billion would be freed between the forward and the backward pass.
    """
    total = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())
    bucket = min(max(total // 16, 2**18), 50_000_000) // 1024 * 1024
    sizes = {"reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    if stage == 3:
        sizes |= {
            "stage3_prefetch_bucket_size": bucket,
            "stage3_max_reuse_distance": bucket,
            "stage3_max_live_parameters": 4 * bucket,
        }
    return sizes
