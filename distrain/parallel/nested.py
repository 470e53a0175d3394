"""Values of any nesting as JSON beside named tensors, and back again exactly: what optimizers and modules keep."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from distrain.checkpoints.dtypes import BY_TORCH_NAME
from distrain.system.numbers import a_kind

_SEQUENCES: dict[type, str] = {list: "list", tuple: "tuple", torch.Size: "size", set: "set", frozenset: "frozenset"}
_MAPPINGS: dict[type, str] = {dict: "dict", OrderedDict: "ordered"}
_MAKES: dict[str, Callable[[list[Any]], Any]] = {
    **{name: kind for kind, name in _SEQUENCES.items()},
    **{name: kind for kind, name in _MAPPINGS.items()},
}


class Unstorable(Exception):
    """A value that a checkpoint cannot hold; the message says where it is and why."""


def stored_dtype(tensor: Tensor) -> str | None:
    """Return the stored name of a tensor's dtype; None where there is none."""
    return _stored_name(tensor.dtype)


@cache
def _stored_name(dtype: torch.dtype) -> str | None:
    return BY_TORCH_NAME.get(str(dtype).removeprefix("torch."))


def why_unstorable(tensor: Tensor) -> str | None:
    """Return why a checkpoint cannot hold this tensor exactly, in words that follow its name; None where it can."""
    if stored_dtype(tensor) is None:
        return f"is of dtype {str(tensor.dtype).removeprefix('torch.')}, which a checkpoint cannot hold"
    if tensor.layout is not torch.strided:
        return f"is {str(tensor.layout).removeprefix('torch.')}, and a checkpoint holds dense tensors"
    if is_traceable_wrapper_subclass(tensor) and not hasattr(tensor, "to_local"):
        return f"is {a_kind(tensor)}, a tensor made of others, and a checkpoint holds plain ones"
    return None


def is_plain(value: Any) -> bool:
    """Whether JSON keeps the value as it is."""
    if type(value) is int:
        return -(2**63) <= value < 2**64  # beyond, a manifest is refused
    return type(value) in (str, bool, type(None)) or (type(value) is float and math.isfinite(value))


def encode(value: Any, name: str, tensors: dict[str, Tensor], device: torch.device | None = None) -> dict[str, Any]:
    """Return the value as JSON; its tensors go into `tensors` by names that begin with `name`.

    `device`: where what is trained is, so that tensors which stay on the host beside it are known. Raises Unstorable
    where something in the value is neither a tensor, a number, text, None, nor a list, tuple, set or dict.
    """
    if isinstance(value, Tensor):
        if (why := why_unstorable(value)) is not None:
            raise Unstorable(f"{name} {why}")
        if value.requires_grad:
            raise Unstorable(f"{name} is a tensor that requires a gradient, which a checkpoint does not keep")
        key = name.replace("/", "|")  # a slash parts a tensor's names
        while key in tensors:
            key += "'"
        tensors[key] = value
        on_host = device is not None and value.device.type == "cpu" != device.type
        return {"host" if on_host else "tensor": key}
    if is_plain(value):
        return {"value": value}
    if type(value) is float:
        return {"float": repr(value)}
    if type(value) is int:
        return {"int": hex(value)}
    if type(value) is complex:
        return {"complex": [encode(part, name, tensors, device) for part in (value.real, value.imag)]}
    if type(value) is bytes:
        return {"bytes": value.hex()}
    if type(value) in _SEQUENCES:
        items = value
        if type(value) in (set, frozenset):
            try:
                items = sorted(value)  # in an order that is the same in every process
            except TypeError as error:
                raise Unstorable(f"{name} is {a_kind(value)} whose elements have no order") from error
        return {
            _SEQUENCES[type(value)]: [encode(item, f"{name}[{i}]", tensors, device) for i, item in enumerate(items)]
        }
    if type(value) in _MAPPINGS:
        items = []
        for key, item in value.items():
            if type(key) not in (str, int, bool, float, tuple, type(None)):
                raise Unstorable(f"{name} has the key {str(key)[:60]}, {a_kind(key)}")
            items.append([encode(key, name, tensors), encode(item, f"{name}[{key}]", tensors, device)])
        return {_MAPPINGS[type(value)]: items}
    raise Unstorable(f"{name} is {a_kind(value)}")


def decode(stored: dict[str, Any], tensor: Callable[[str, bool], Tensor]) -> Any:
    """Return the value again; `tensor` gives each tensor by its name in the JSON, and whether it was on the host."""
    ((kind, content),) = stored.items()
    if kind in ("tensor", "host"):
        return tensor(content, kind == "host")
    if kind == "value":
        return content
    if kind == "float":
        return float(content)
    if kind == "int":
        return int(content, 16)
    if kind == "complex":
        return complex(*(decode(part, tensor) for part in content))
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind in _MAPPINGS.values():
        return _MAKES[kind]([(decode(key, tensor), decode(item, tensor)) for key, item in content])
    return _MAKES[kind]([decode(item, tensor) for item in content])


def equal(one: Any, other: Any) -> bool:
    """Whether two values are the same to the bit, and of the same types."""
    a: dict[str, Tensor] = {}
    b: dict[str, Tensor] = {}
    try:
        if encode(one, "", a) != encode(other, "", b):
            return False
    except Unstorable:
        return one is other or (type(one) is type(other) and not isinstance(one, Tensor) and bool(one == other))
    return all(same_bits(a[key], b[key]) for key in a)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(*(bytes_of(tensor) for tensor in (one, other)))


def bytes_of(tensor: Tensor) -> Tensor:
    """Return a tensor's elements in row-major order as bytes on the host (uint8, 1-D); its own memory where it can."""
    flat = tensor.detach().resolve_conj().resolve_neg().reshape(-1).cpu().contiguous()
    return flat.view(torch.uint8)


def names_in(stored: Any) -> Iterator[str]:
    """Yield the names of the tensors in encoded values."""
    if isinstance(stored, dict):
        for kind, content in stored.items():
            if kind in ("tensor", "host") and isinstance(content, str):
                yield content
            elif kind != "value":
                yield from names_in(content)
    elif isinstance(stored, list):
        for each in stored:
            yield from names_in(each)
