"""Converts floating-point elements between widths, BF16 included, which NumPy lacks."""

from __future__ import annotations

from typing import Any

import numpy as np

_NATIVE: dict[str, Any] = {"F64": np.float64, "F32": np.float32, "F16": np.float16}


def widen(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Return the elements whose bytes (uint8) are `raw` as float64 (F64) or float32 (the others), exactly."""
    if dtype == "BF16":  # the upper half of a float32
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    values = raw.view(_NATIVE[dtype])
    return values.astype(np.float32) if dtype == "F16" else values


def convert(raw: np.ndarray, source: str, target: str) -> tuple[np.ndarray, int]:
    """Return the elements of dtype `source` as bytes of dtype `target`, and how many finite ones became infinite.

    Rounds to nearest, ties to even, as PyTorch's `Tensor.to` does: F64 to 16 bits through F32.
    """
    wide = widen(raw, source)
    with np.errstate(over="ignore", invalid="ignore"):
        if target == "F64":
            return wide.astype(np.float64).view(np.uint8), 0
        single = wide.astype(np.float32, copy=False)
        rounded = _to_bf16(single) if target == "BF16" else single.astype(_NATIVE[target], copy=False)
        infinite = (rounded & 0x7FFF) == 0x7F80 if target == "BF16" else np.isinf(rounded)
        gained = np.count_nonzero(infinite) - (np.count_nonzero(np.isinf(wide)) if infinite.any() else 0)
    return rounded.view(np.uint8), int(gained)


def _to_bf16(single: np.ndarray) -> np.ndarray:
    """Return the bits (uint16) of float32 numbers rounded to BF16."""
    bits = single.view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    short = rounded.astype(np.uint16)
    nan = np.isnan(single)
    if nan.any():  # the sums may have carried one into an infinity
        short[nan] = 0x7FC0
    return short
