"""The global batch: how it is divided among processes and micro-batches."""

from __future__ import annotations

import math

from distrain.config import BatchSection, UserError


def batch_shape(section: BatchSection, world_size: int) -> tuple[int, int]:
    """Return (micro batch size, accumulation): samples in a forward pass of one process, and passes in a step.

    Raises UserError where micro * processes * accumulation cannot be the global batch size.
    """
    total = section.global_batch_size
    if section.micro_batch_size != "auto":
        return section.micro_batch_size, accumulation_steps(total, section.micro_batch_size, world_size)
    if total % world_size:
        raise UserError(
            f"batch.global {total} is not a multiple of the {world_size} processes; {_nearest(total, world_size)}"
        )
    return total // world_size, 1


def accumulation_steps(global_batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Return how many micro-batches of each process make an optimizer step; UserError where that is not whole."""
    unit = micro_batch_size * world_size
    if global_batch_size % unit:
        raise UserError(
            f"batch.global {global_batch_size} is not a multiple of micro {micro_batch_size} × world {world_size} = "
            f"{unit}; {_nearest(global_batch_size, unit)}"
        )
    return global_batch_size // unit


def micro_batch_sizes(global_batch_size: int, world_size: int) -> list[int]:
    """Return every size of a micro-batch with which whole accumulation steps make the global batch, ascending."""
    share, rest = divmod(global_batch_size, world_size)
    if rest:
        return []
    small = [size for size in range(1, math.isqrt(share) + 1) if share % size == 0]
    return sorted({*small, *(share // size for size in small)})


def _nearest(total: int, unit: int) -> str:
    lower, upper = total // unit * unit, (total // unit + 1) * unit
    return f"try {lower} or {upper}" if lower else f"try {upper}"
