"""The state of training at one moment, as a checkpoint of it holds it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from distrain.checkpoint import Frozen, Piece, TensorSpec
from distrain.parallel.arena import TensorRange
from distrain.parallel.mesh import Mesh
from distrain.parallel.shards import LocalTensor


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds. Its tensors are those that train: they are of this moment until the next step."""

    held: dict[str, LocalTensor]
    """What this rank holds of every tensor, the same names in the same order on every rank."""
    specs: dict[str, TensorSpec]
    scalars: dict[str, Any]
    aliases: dict[str, str]
    frozen: Frozen | None = None
    """Of the model, what it refers to and does not hold."""


def pieces_of(held: Mapping[str, LocalTensor], mesh: Mesh) -> Iterator[Piece]:
    """Yield the flat ranges that a rank writes, which are those of no other rank.

    Of what several ranks hold, each writes an equal share, in bytes, of all that laid end to end: of what every
    rank holds as of the shards of which each replica has one.
    """
    cuts = _cuts(held, mesh)
    offsets = {True: 0, False: 0}
    for name, each in held.items():
        values, everywhere = each.values, each.replicated
        size, numel, offset = values.element_size(), values.numel(), offsets[everywhere]
        offsets[everywhere] = end = offset + numel * size
        first, last = cuts[everywhere]
        if first <= offset and end <= last:
            start, stop = 0, numel
        else:
            # both neighbours round a cut inside this tensor up to the same element
            start, stop = (min(max(-(-(cut - offset) // size), 0), numel) for cut in (first, last))
        if stop > start:
            yield Piece(name, each.start + start, TensorRange(values, start, stop))


def share_of(held: Mapping[str, LocalTensor], mesh: Mesh) -> int:
    """Return the bytes of the ranges that a rank writes, or a few more."""
    widest = max((each.values.element_size() for each in held.values()), default=0)
    return sum(last - first for first, last in _cuts(held, mesh).values()) + 2 * widest


def _cuts(held: Mapping[str, LocalTensor], mesh: Mesh) -> dict[bool, tuple[int, int]]:
    """Return where the share of this rank begins and ends, in bytes: of what every rank holds, and of the rest."""
    totals = {True: 0, False: 0}
    for each in held.values():
        totals[each.replicated] += each.nbytes
    parts = {True: (mesh.rank, mesh.world_size), False: (mesh.replica, mesh.replicas)}
    return {
        everywhere: (totals[everywhere] * part // of, totals[everywhere] * (part + 1) // of)
        for everywhere, (part, of) in parts.items()
    }
