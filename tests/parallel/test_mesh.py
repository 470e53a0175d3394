"""Who shards, who replicates, and who reads which data."""

from __future__ import annotations

import re

import pytest
from worlds import in_world

from distrain.config import UserError
from distrain.parallel import STRATEGIES, Mesh, StrategySpec

HYBRID = StrategySpec("fsdp2", replicate=2)
EACH_MACHINE = StrategySpec("fsdp2", replicate="auto")


def nodes(*sizes: int) -> list[tuple[int, int]]:
    """Return of each rank the first rank of its machine, and how many that has."""
    return [(sum(sizes[:index]), size) for index, size in enumerate(sizes) for _ in range(size)]


def meshes(asked: StrategySpec, *sizes: int) -> list[Mesh]:
    found = nodes(*sizes)
    return [Mesh.of(asked, rank, found) for rank in range(len(found))]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_strategy_replicates_on_each_rank_or_shards_over_all(strategy: str) -> None:
    found = meshes(StrategySpec(strategy), 2, 2)
    replicates = strategy in ("single", "ddp")
    assert [(mesh.replicas, mesh.shards) for mesh in found] == [(4, 1) if replicates else (1, 4)] * 4
    assert [mesh.replica for mesh in found] == ([0, 1, 2, 3] if replicates else [0] * 4)
    assert not any(mesh.is_hybrid for mesh in found)


@pytest.mark.parametrize(
    ("asked", "sizes", "replicas"),
    [
        (HYBRID, (4,), [0, 0, 1, 1]),
        (StrategySpec("fsdp2", replicate=3), (6,), [0, 0, 1, 1, 2, 2]),
        (HYBRID, (6,), [0, 0, 0, 1, 1, 1]),
        (EACH_MACHINE, (2, 2), [0, 0, 1, 1]),
        (EACH_MACHINE, (2, 2, 2), [0, 0, 1, 1, 2, 2]),
        (EACH_MACHINE, (4,), [0, 0, 0, 0]),
        (EACH_MACHINE, (1,), [0]),
    ],
)
def test_a_replica_is_shared_out_by_neighbours(
    asked: StrategySpec, sizes: tuple[int, ...], replicas: list[int]
) -> None:
    found = meshes(asked, *sizes)
    assert [mesh.replica for mesh in found] == replicas
    assert {mesh.replicas for mesh in found} == {max(replicas) + 1}
    assert {mesh.is_hybrid for mesh in found} == {max(replicas) > 0}


@pytest.mark.parametrize("asked", [StrategySpec("ddp"), StrategySpec("zero2"), StrategySpec("fsdp2"), HYBRID])
def test_every_rank_reads_its_own_data(asked: StrategySpec) -> None:
    assert [(mesh.data_rank, mesh.data_size) for mesh in meshes(asked, 4)] == [(rank, 4) for rank in range(4)]


@pytest.mark.parametrize(
    ("asked", "sizes", "said"),
    [
        (HYBRID, (3,), "--replicate 2 asks for 2 replicas, found 3 processes, expected a multiple of 2; nothing was"),
        (HYBRID, (1,), "--replicate 2 asks for 2 replicas, found 1 process, expected a multiple of 2; nothing was"),
        (HYBRID, (2,), "so that each has a whole one and nothing is sharded, which is --strategy ddp; nothing was"),
        (StrategySpec("fsdp2", replicate=4), (6,), "Say --replicate 1, 2 or 3"),
        (EACH_MACHINE, (1, 1), "--replicate auto, of 2 machines, asks for 2 replicas, found 2 processes"),
        (
            EACH_MACHINE,
            (2, 1, 1),
            "found 2 from rank 0, and 1 from rank 2. Start as many on each, or say --replicate N",
        ),
        (EACH_MACHINE, (1, 2, 1), "found 1 from rank 0, and 2 from rank 1"),
    ],
)
def test_ranks_that_cannot_be_put_into_such_groups_are_refused(
    asked: StrategySpec, sizes: tuple[int, ...], said: str
) -> None:
    for rank in range(sum(sizes)):
        with pytest.raises(UserError, match=re.escape(said)):
            Mesh.of(asked, rank, nodes(*sizes))


def groups_of(asked: StrategySpec) -> tuple[tuple[int, ...], list[int], list[int], float]:
    """Return the shape of the device mesh, this rank's groups, and how long these wait."""
    import torch.distributed as dist

    from distrain.parallel import open_world

    world = open_world("fp32", asked, timeout_s=77)
    try:
        mesh = world.mesh.device_mesh(world.device.type, world.timeout)
        across, within = (mesh.get_group(name) for name in ("replicate", "shard"))
        waits = {group._get_backend(world.device).options._timeout.total_seconds() for group in (across, within)}
        assert len(waits) == 1
        return mesh.shape, dist.get_process_group_ranks(across), dist.get_process_group_ranks(within), waits.pop()
    finally:
        world.close()


def test_the_groups_are_rows_and_columns_and_wait_as_long_as_the_run_says() -> None:
    assert in_world(4, groups_of, HYBRID) == [
        ((2, 2), [0, 2], [0, 1], 77),
        ((2, 2), [1, 3], [0, 1], 77),
        ((2, 2), [0, 2], [2, 3], 77),
        ((2, 2), [1, 3], [2, 3], 77),
    ]
