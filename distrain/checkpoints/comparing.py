"""How two checkpoints differ, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from distrain.checkpoints.dtypes import FLOATS, ITEM_SIZES, bits_dtype
from distrain.checkpoints.floats import widen
from distrain.checkpoints.format import Manifest, explain_difference
from distrain.checkpoints.reading import Reader

_CHUNK = 1 << 20  # elements compared at a time


@dataclass(frozen=True)
class TensorDifference:
    """How the elements of a tensor differ."""

    name: str
    differing: int
    """Elements whose bits differ."""
    numel: int
    max_abs: float | None
    """Largest |a - b|, NaN if one of the two is NaN; None if the elements are not floating-point."""
    max_rel: float | None
    """Largest |a - b| / max(|a|, |b|)."""

    def __str__(self) -> str:
        size = "" if self.max_abs is None else f", by at most {self.max_abs:.3g} ({self.max_rel:.3g} of its size)"
        return f"{self.name}: {self.differing} of {self.numel} elements differ{size}"


@dataclass(frozen=True)
class Difference:
    """How two checkpoints differ."""

    listing: tuple[str, ...]
    """How names, shapes, dtypes, aliases, the step and the scalars differ."""
    tensors: tuple[TensorDifference, ...]
    """Tensors of the same name, shape and dtype whose elements differ."""
    notes: tuple[str, ...]
    """Differences outside the training state: strategy, world size, recipe, data and code, score."""

    @property
    def identical(self) -> bool:
        """Whether both hold the same training state, bit for bit."""
        return not self.listing and not self.tensors

    def lines(self) -> list[str]:
        """Return lines for the user."""
        verdict = ["the state of training is identical, bit for bit"] if self.identical else []
        return [*verdict, *self.listing, *map(str, self.tensors), *(f"note: {note}" for note in self.notes)]


def difference(first: Path | str, second: Path | str, verify: bool = True) -> Difference:
    """Compare two checkpoints tensor by tensor, in bounded memory; raises CheckpointError if one does not verify."""
    with Reader(first, verify) as a, Reader(second, verify) as b:
        one, other = a.manifest, b.manifest
        stored_once = {*_referred(a, b), *_referred(b, a)}
        listing = explain_difference(
            replace(one, tensors={name: each for name, each in one.tensors.items() if name not in stored_once}),
            {name: spec for name, spec in other.specs.items() if name not in stored_once},
            "the first",
            "the second",
        )
        listing += _frozen_differences(a, b)
        listing += _field_differences(one, other, "step", "aliases")
        others = dict.fromkeys(("inputs", "meta", "data_facts", "model_call"))
        listing += _json_differences("scalars", *({**each.scalars, **others} for each in (one, other)))
        shared = [name for name, tensor in one.tensors.items() if other.specs.get(name) == tensor.spec]
        found = [_compare(name, one, a, b) for name in shared]
    notes = _field_differences(one, other, "strategy", "world_size", "score")
    notes += ["inputs: the two differ"] if one.scalars.get("inputs") != other.scalars.get("inputs") else []
    notes += ["recipe: the two differ"] if one.recipe != other.recipe else []
    return Difference(tuple(listing), tuple(item for item in found if item), tuple(notes))


def _referred(a: Reader, b: Reader) -> set[str]:
    """Return the tensors that `a` stores and `b` refers to; of averages those of such parameters."""
    frozen = b.manifest.frozen.tensors if b.manifest.frozen is not None else {}
    names = {*frozen, *(name.replace("model/", "ema/", 1) for name in frozen)}
    return names & (a.manifest.tensors.keys() - b.manifest.tensors.keys())


def _frozen_differences(a: Reader, b: Reader) -> list[str]:
    """Return how the frozen parameters differ of which at least one of the two holds the hash alone."""
    hashes: list[dict[str, str]] = []
    for reader, other in ((a, b), (b, a)):
        frozen = reader.manifest.frozen.tensors if reader.manifest.frozen is not None else {}
        found = {name: each.xxh3_128 for name, each in frozen.items()}
        hashes.append(found | {name: _hash(reader, name) for name in _referred(reader, other)})
    one, two = hashes
    for mine, theirs in ((one, two), (two, one)):  # an average of what does not change is that itself
        for name in [name for name in mine if name.startswith("ema/")]:
            theirs[name] = theirs[name.replace("ema/", "model/", 1)]
    return [
        f"{name}: frozen, and its hashes differ" if name in one and name in two else f"{name}: frozen in one of them"
        for name in sorted(one.keys() | two.keys())
        if one.get(name) != two.get(name)
    ]


def _hash(reader: Reader, name: str) -> str:
    digest, numel = xxhash.xxh3_128(), reader.spec(name).numel
    for start in range(0, numel, _CHUNK):
        digest.update(reader.read(name, start, min(_CHUNK, numel - start)).data)
    return digest.hexdigest()


def chunks(a: Reader, b: Reader, name: str) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield (first element, bytes in the one, bytes in the other) of a tensor of the same size, in chunks."""
    numel = a.spec(name).numel
    for start in range(0, numel, _CHUNK):
        count = min(_CHUNK, numel - start)
        yield start, a.read(name, start, count), b.read(name, start, count)


def elements(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Return bytes of a tensor as its elements: numbers if NumPy can represent them, else bits."""
    if dtype in FLOATS:
        return widen(raw, dtype)
    return raw.view(np.complex128) if ITEM_SIZES[dtype] == 16 else raw.view(bits_dtype(dtype))


def _field_differences(one: Manifest, other: Manifest, *names: str) -> list[str]:
    return [line for name in names for line in _json_differences(name, getattr(one, name), getattr(other, name))]


def _json_differences(where: str, one: Any, other: Any) -> list[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        return [
            line
            for key in sorted(one.keys() | other.keys())
            for line in _json_differences(f"{where}.{key}", one.get(key, "nothing"), other.get(key, "nothing"))
        ]
    return [] if one == other else [f"{where}: {_short(one)} in the first, {_short(other)} in the second"]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _compare(name: str, manifest: Manifest, a: Reader, b: Reader) -> TensorDifference | None:
    spec = manifest.tensors[name].spec
    differing, max_abs, max_rel = 0, 0.0, 0.0
    for _, one, other in chunks(a, b, name):
        same = one.view(bits_dtype(spec.dtype)) == other.view(bits_dtype(spec.dtype))
        unequal = np.flatnonzero(~same.reshape(len(one) // ITEM_SIZES[spec.dtype], -1).all(1))
        if not unequal.size:
            continue
        differing += unequal.size
        if spec.dtype in FLOATS:
            x, y = (widen(raw, spec.dtype)[unequal].astype(np.float64) for raw in (one, other))
            with np.errstate(invalid="ignore", divide="ignore"):
                gap, size = np.abs(x - y), np.maximum(np.abs(x), np.abs(y))
                share = np.divide(gap, size, out=np.zeros_like(gap), where=size != 0)
            max_abs = float(np.maximum(max_abs, gap.max()))  # numpy's maximum lets a NaN through
            max_rel = float(np.maximum(max_rel, share.max()))
    if not differing:
        return None
    floating = spec.dtype in FLOATS
    return TensorDifference(name, differing, spec.numel, max_abs if floating else None, max_rel if floating else None)
