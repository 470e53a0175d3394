"""Converts floating-point elements between widths, and looks for those that are not finite: also of dtypes that NumPy
lacks.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from distrain.checkpoints.dtypes import DTYPES

_NATIVE: dict[str, Any] = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "C64": np.complex64}
_AT_ONCE = 4 << 20
"""Bytes that are looked at without the GIL: few enough to stay in a cache."""


def all_finite(raw: np.ndarray, dtype: str) -> bool:
    """Whether every element is, whose bytes (uint8) are `raw`; those of integers and booleans always are."""
    dtype = DTYPES[dtype].pair or dtype
    return all(_finite(raw[start : start + _AT_ONCE], dtype) for start in range(0, raw.nbytes, _AT_ONCE))


def _finite(raw: np.ndarray, dtype: str) -> bool:
    match dtype:
        case "F64" | "F32" | "F16" | "C64":
            return bool(np.isfinite(raw.view(_NATIVE[dtype])).all())
        case "BF16":
            return bool(((raw.view(np.uint16) & 0x7FFF) < 0x7F80).all())
        case "F8_E5M2":
            return bool(((raw & 0x7F) < 0x7C).all())
        case "F8_E4M3":  # it has no infinity, and one NaN of each sign
            return bool(((raw & 0x7F) < 0x7F).all())
        case "F8_E4M3FNUZ" | "F8_E5M2FNUZ":  # one NaN, in place of a negative zero
            return bool((raw != 0x80).all())
        case "F8_E8M0":
            return bool((raw != 0xFF).all())
    return True


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
