"""The table of stored dtypes: their names and sizes. Imports no torch.

Code that uses torch looks dtypes up by torch's names, so that importing this does not fail with a torch that lacks one.
"""

from __future__ import annotations

from typing import NamedTuple


class Dtype(NamedTuple):
    """An element's dtype."""

    nbytes: int
    """Of one element."""
    torch: str
    """Torch's name."""
    storage: str | None = None
    """The class of storage that `torch.save` names; None: untyped bytes, whose tensors have their own dtypes."""
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
"""By the names of safetensors, or by similar names if it has none."""

ITEM_SIZES = {name: dtype.nbytes for name, dtype in DTYPES.items()}
"""Bytes of one element."""

FLOATS = ("F64", "F32", "F16", "BF16")
"""The dtypes that can be converted to each other."""

BY_TORCH_NAME = {dtype.torch: name for name, dtype in DTYPES.items()}
"""{torch's name: safetensors' name}."""


def in_safetensors(dtype: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """Return a tensor's dtype and shape in a safetensors file, which stores some complex numbers as pairs."""
    pair = DTYPES[dtype].pair
    return (dtype, shape) if pair is None else (pair, (*shape, 2))


def bits_dtype(dtype: str) -> str:
    """Return the unsigned NumPy dtype of an element's bits, or of each half of a 16-byte element."""
    return f"u{min(ITEM_SIZES[dtype], 8)}"
