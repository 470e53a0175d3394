"""Who shards the state, who replicates it, and which part of the data each rank reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from distrain.config import UserError
from distrain.config.strategies import STRATEGIES
from distrain.parallel.strategy_spec import StrategySpec


@dataclass(frozen=True)
class Mesh:
    """The ranks in rows: those of a row share out one replica of the state, and each row has a whole one.

    Rows are consecutive ranks, as launchers number those of a machine. A strategy that keeps everything on each rank
    has rows of one rank, one that shares everything out has a single row.
    """

    rank: int
    world_size: int
    replicas: int
    """How many rows there are."""

    @classmethod
    def of(cls, asked: StrategySpec, rank: int, nodes: Sequence[tuple[int, int]]) -> Mesh:
        """Return the mesh of a strategy; `nodes` says of every rank the first one of its machine, and how many it has.

        Raises UserError, the same on all ranks, where the ranks cannot be put into rows as they were asked for.
        """
        world_size = len(nodes)
        if not STRATEGIES[asked.strategy].shards:
            return cls(rank, world_size, world_size)
        if asked.replicate != "auto":
            return cls(rank, world_size, asked.replicas(world_size))
        first, size = nodes[0]
        uneven = [(start, count) for start, count in nodes if count != size or (start - first) % size]
        if uneven:
            start, count = uneven[0]
            raise UserError(
                "--replicate auto has one replica for each machine, which takes the same number of processes on each, "
                f"numbered one after the other; found {size} from rank {first}, and {count} from rank {start}. Start "
                "as many on each, or say --replicate N"
            )
        return cls(rank, world_size, asked.replicas(world_size, world_size // size))

    @property
    def shards(self) -> int:
        """How many ranks share out a replica."""
        return self.world_size // self.replicas

    @property
    def replica(self) -> int:
        """Which replica this rank has a part of; the ranks with the same part of others have the same numbers."""
        return self.rank // self.shards

    @cached_property
    def data_rank(self) -> int:
        """Which part of a batch this rank reads, of `data_size`: every rank reads its own."""
        return self.rank

    @cached_property
    def data_size(self) -> int:
        """Into how many parts a batch is cut."""
        return self.world_size

    @cached_property
    def is_hybrid(self) -> bool:
        """Whether state is both shared out and replicated."""
        return 1 < self.replicas < self.world_size

    def device_mesh(self, device_type: str, timeout: timedelta) -> DeviceMesh:
        """Return the mesh that torch shards over: (shards,), or where it is hybrid (replicas, shards). All ranks call.

        `timeout` bounds the collectives of its groups.
        """
        if not self.is_hybrid:
            return init_device_mesh(device_type, (self.world_size,))
        rows = [list(range(start, start + self.shards)) for start in range(0, self.world_size, self.shards)]
        columns = [list(column) for column in zip(*rows, strict=True)]
        # by hand: those that init_device_mesh makes have the time limit of the backend, whatever a run's is
        groups: list[Any] = [dist.new_subgroups_by_enumeration(ranks, timeout=timeout)[0] for ranks in (columns, rows)]
        return DeviceMesh.from_group(groups, device_type, rows, mesh_dim_names=("replicate", "shard"))
