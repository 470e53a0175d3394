"""Every dtype that is stored: what it is called, and how many bytes an element has. Imports no torch.

The one table of the project. The side of torch looks a dtype up by the name that torch gives it, so a dtype that an
installed torch does not have yet, or that a newer one brings, is a name that is not found and not an error on import.
"""

from __future__ import annotations

from typing import NamedTuple


class Dtype(NamedTuple):
    """An element's dtype."""

    nbytes: int
    """Of one element."""
    torch: str
    """What torch calls it."""
    storage: str | None = None
    """The class of storage that `torch.save` names; None: untyped bytes, whose tensors say the dtype themselves."""
    pair: str | None = None
    """For complex numbers that safetensors has no name for: the dtype of a real and an imaginary part side by side."""


DTYPES = {
    "BOOL": Dtype(1, "bool", "Bool"),
    "U8": Dtype(1, "uint8", "Byte"),
    "I8": Dtype(1, "int8", "Char"),
    "F8_E4M3": Dtype(1, "float8_e4m3fn"),
    "F8_E5M2": Dtype(1, "float8_e5m2"),
    "F8_E4M3FNUZ": Dtype(1, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": Dtype(1, "float8_e5m2fnuz"),
    "F8_E8M0": Dtype(1, "float8_e8m0fnu"),
    "I16": Dtype(2, "int16", "Short"),
    "U16": Dtype(2, "uint16"),
    "F16": Dtype(2, "float16", "Half"),
    "BF16": Dtype(2, "bfloat16", "BFloat16"),
    "I32": Dtype(4, "int32", "Int"),
    "U32": Dtype(4, "uint32"),
    "F32": Dtype(4, "float32", "Float"),
    "C32": Dtype(4, "complex32", pair="F16"),
    "BC32": Dtype(4, "bcomplex32", pair="BF16"),
    "I64": Dtype(8, "int64", "Long"),
    "U64": Dtype(8, "uint64"),
    "F64": Dtype(8, "float64", "Double"),
    "C64": Dtype(8, "complex64", "ComplexFloat"),
    "C128": Dtype(16, "complex128", "ComplexDouble", pair="F64"),
}
"""By the names of safetensors, and by such names where it has none."""

ITEM_SIZES = {name: dtype.nbytes for name, dtype in DTYPES.items()}
"""Bytes of one element."""

BY_TORCH_NAME = {dtype.torch: name for name, dtype in DTYPES.items()}
"""The dtype that torch calls so."""


def in_safetensors(dtype: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """Return how a safetensors file names a tensor: complex numbers that it has no name for are pairs of real ones."""
    pair = DTYPES[dtype].pair
    return (dtype, shape) if pair is None else (pair, (*shape, 2))


def bits_dtype(dtype: str) -> str:
    """Return the NumPy dtype of whole numbers in which each element, or each half of a wide one, is its bits."""
    return f"u{min(ITEM_SIZES[dtype], 8)}"
