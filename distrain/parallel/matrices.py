"""Whole matrices for an optimizer, where each rank holds a flat part of each: one rank has each for a moment."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distrain.optim import parts_of
from distrain.optim.muon import Muon
from distrain.parallel.shards import Shard

CHUNK = 1 << 26
"""Elements of all ranks that travel at once: 256 MB of fp32, divided by the number of ranks, on each."""


@dataclass(frozen=True)
class _Chunk:
    """Matrices that travel at once."""

    names: list[str]
    """By their owners."""
    mine: list[str]
    """Those that this rank has whole."""
    sent: list[int]
    """Elements to each rank."""
    received: list[int]
    """Elements from each rank."""


class ShardedMatrices:
    """Matrices in flat parts, of which each rank has its own. Each matrix has an owner, which gathers it.

    Owners are chosen so that each has about as much to compute. What travels is as much as a rank holds, to the owners
    and back.
    """

    def __init__(self, shards: Mapping[str, Shard], device: torch.device, group: Any = None):
        """`shards`: this rank's part of each trained parameter, by its name; `group`: the ranks that share them out.

        All ranks of the group call.
        """
        self._shards, self._device, self._group = dict(shards), device, group
        self._rank, self._size = dist.get_rank(group), dist.get_world_size(group)
        self._names: dict[int, list[str]] = {}
        for name, shard in shards.items():
            if shard.entry is not None:
                self._names.setdefault(id(shard.entry), []).append(name)
        self._ranges: list[Any] = [None] * self._size
        own = {name: (shard.start, shard.values.numel()) for name, shard in shards.items()}
        dist.all_gather_object(self._ranges, own, group=group)
        self._planned: dict[tuple[int, ...], list[_Chunk]] = {}

    def transform(
        self, entries: Sequence[Tensor], parts: Sequence[Tensor], function: Callable[[Tensor], Tensor]
    ) -> None:
        """Replace this rank's parts of matrices by its parts of what `function` makes of each whole one.

        `entries` are tensors that the optimizer was handed, each with its part. All ranks of the group call.
        """
        key = tuple(id(entry) for entry in entries)
        if key not in self._planned:
            self._planned[key] = list(self._plan([name for each in key for name in self._names[each]]))
        flat = {id(entry): part.view(-1) for entry, part in zip(entries, parts, strict=True)}
        for chunk in self._planned[key]:
            self._transform(chunk, flat, function)

    def _plan(self, names: Sequence[str]) -> Iterator[_Chunk]:
        size = {name: math.prod(self._shards[name].shape) for name in names}
        chunk: list[str] = []
        for name in names:
            if chunk and sum(size[each] for each in chunk) + size[name] > CHUNK:
                yield self._of(chunk)
                chunk = []
            chunk.append(name)
        if chunk:
            yield self._of(chunk)

    def _of(self, names: Sequence[str]) -> _Chunk:
        cost = {}
        for name in names:
            rows, *others = self._shards[name].shape
            cost[name] = rows * math.prod(others) * min(rows, math.prod(others))
        owner: dict[str, int] = {}
        load = [0] * self._size
        for name in sorted(names, key=lambda each: -cost[each]):  # stable: alike on all ranks
            owner[name] = load.index(min(load))
            load[owner[name]] += cost[name]
        ordered = sorted(names, key=lambda name: owner[name])
        mine = [name for name in ordered if owner[name] == self._rank]
        own = self._ranges[self._rank]
        sent = [sum(own[name][1] for name in ordered if owner[name] == rank) for rank in range(self._size)]
        received = [sum(ranges[name][1] for name in mine) for ranges in self._ranges]
        return _Chunk(ordered, mine, sent, received)

    def _transform(self, chunk: _Chunk, flat: Mapping[int, Tensor], function: Callable[[Tensor], Tensor]) -> None:
        parts = []
        for name in chunk.names:
            shard = self._shards[name]
            parts.append(flat[id(shard.entry)][shard.offset : shard.offset + shard.values.numel()])
        outgoing = torch.cat(parts).to(self._device)
        incoming = outgoing.new_empty(sum(chunk.received))
        dist.all_to_all_single(incoming, outgoing, chunk.received, chunk.sent, group=self._group)
        whole = {name: incoming.new_empty(math.prod(self._shards[name].shape)) for name in chunk.mine}
        pieces = [
            whole[name][start : start + numel]
            for ranges in self._ranges
            for name in chunk.mine
            for start, numel in (ranges[name],)
        ]
        for piece, values in zip(pieces, incoming.split([piece.numel() for piece in pieces]), strict=True):
            piece.copy_(values)
        for name in chunk.mine:
            whole[name].copy_(function(whole[name].view(self._shards[name].shape)).reshape(-1))
        if pieces:
            torch.cat(pieces, out=incoming)
        dist.all_to_all_single(outgoing, incoming, chunk.sent, chunk.received, group=self._group)
        for part, values in zip(parts, outgoing.split([part.numel() for part in parts]), strict=True):
            part.copy_(values)


def give_matrices(optimizer: Any, shards: Mapping[str, Shard], device: torch.device, group: Any = None) -> None:
    """Have an optimizer that takes whole matrices find them, where each rank holds a part. All ranks call."""
    for part in parts_of(optimizer).values():
        if isinstance(part, Muon):
            part.matrices = ShardedMatrices(shards, device, group)
