"""A few samples of a data set, to recognise it if its files are unknown."""

from __future__ import annotations

import itertools
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import xxhash

from distrain.config import UserError

if TYPE_CHECKING:
    from distrain.datasets.base import Data, Source, StreamSource

_ENOUGH_S = 0.5
"""No further samples are read after this time."""

_OF_STREAM = 3
"""Samples of a stream that are read: those that it begins with."""

_MAX_NUMBERS = 1 << 20

_begun: WeakKeyDictionary[StreamSource, tuple[list[dict[str, Any]], bool]] = WeakKeyDictionary()
"""What streams of this process begin with: to fill a buffer, in which one is shuffled, takes long."""


def items_of(data: Data, changing: set[str] | None = None) -> dict[str, dict[str, Any]]:
    """Return {split: {sample id: fingerprint}} for the first and the last sample of each split, and two between.

    Of a stream, for those that it begins with, unless it begins with others each time that it is read. Samples are
    those of the first epoch. Skips samples that cannot be read, which training reports, and samples that differ each
    time they are read: the names of their splits are added to `changing`.
    """
    from distrain.datasets.base import is_stream

    found: dict[str, dict[str, Any]] = {}
    began = time.monotonic()
    for split, source in data.splits.items():
        if is_stream(source):
            with suppress(UserError):
                begins, stays = beginning(source)
                found[split] = {str(number): item for number, item in enumerate(begins)} if stays else {}
            continue
        last = len(source) - 1
        rows = found.setdefault(split, {})
        for number in dict.fromkeys([0, last, last // 3, last * 2 // 3]):
            if time.monotonic() - began > _ENOUGH_S:
                break
            if (item := _item(source, number)) is None:
                continue
            if item == _item(source, number):
                rows[str(number)] = item
            elif changing is not None:
                changing.add(split)
    return found


def beginning(source: StreamSource) -> tuple[list[dict[str, Any]], bool]:
    """Return the fingerprints of the samples that a stream begins with, and whether it does so each time."""
    if source not in _begun:
        first, again = _first_items(source), _first_items(source)
        _begun[source] = first, same_item(first, again)
    return _begun[source]


def _first_items(source: StreamSource) -> list[dict[str, Any]]:
    if hasattr(source, "set_epoch"):
        source.set_epoch(0)
    return [_fingerprint(source.collate([sample])) for sample in itertools.islice(source, _OF_STREAM)]


def _item(source: Source, number: int) -> dict[str, Any] | None:
    try:
        return _fingerprint(source.fetch(np.array([number], np.int64)))
    except UserError:
        return None


def _fingerprint(batch: dict[str, Any]) -> dict[str, Any]:
    return {key: _value(value) for key, value in batch.items() if key != "ids"}


def _value(value: Any) -> Any:
    """Return the fingerprint of a value: numbers as [shape, hash], and floats as [shape, size, projection].

    The last bits of a floating-point number may differ between machines; a projection onto fixed directions shows only
    larger changes.
    """
    if isinstance(value, dict):
        return {str(key): _value(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_value(each) for each in value]
    if not hasattr(value, "numpy"):
        # the repr of other objects may contain their address
        shown = repr(value) if isinstance(value, str | bytes | int | float | None) else type(value).__name__
        return xxhash.xxh3_128_hexdigest(shown.encode(errors="surrogatepass"))
    array = (value.float() if str(value.dtype) == "torch.bfloat16" else value).detach().cpu().numpy()
    shape = list(array.shape)
    parts = np.stack([array.real, array.imag]) if array.dtype.kind == "c" else array
    flat = parts.astype(np.float64).reshape(-1)
    if array.dtype.kind not in "fc" or not (np.abs(flat) < 1e100).all():
        return [shape, xxhash.xxh3_128_hexdigest(array.tobytes())]
    flat = flat[:: -(-flat.size // _MAX_NUMBERS) or 1]
    direction = np.cos(np.arange(flat.size) * 0.7390851332151607)
    return [shape, float(np.linalg.norm(flat)), float(flat @ direction)]


def same_item(one: Any, other: Any) -> bool:
    """Whether two fingerprints of samples are of the same sample."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same_item(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        if len(one) == len(other) == 3 and isinstance(one[1], float) and isinstance(other[1], float):
            near = 1e-6 * max(abs(one[1]), abs(other[1]))
            return one[0] == other[0] and all(abs(a - b) <= near for a, b in zip(one[1:], other[1:], strict=True))
        return len(one) == len(other) and all(map(same_item, one, other))
    return bool(one == other)
