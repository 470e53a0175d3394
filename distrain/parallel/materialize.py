"""Models that are sharded from the start: built once in each node, and sent from there into the ranks' shards.

The first process of a node builds the model as a single process does, so that its initial weights are the same bits; it
is the only one that holds all of them. The others build it on the meta device.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from distrain.config import UserError
from distrain.networks.meta_device import build_on_meta, outline, take_values
from distrain.parallel.comm import World
from distrain.parallel.shards import Shard
from distrain.run.heartbeat import progress
from distrain.system.memory import give_back

logger = logging.getLogger(__name__)


def build_in_shards(world: World, build: Callable[[], nn.Module]) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return the model that `build` returns, with its parameters on the meta device, and their values. All ranks call.

    The values are those of an ordinary build, by name; only the first process of each node has them, for `fill_shards`.
    Buffers and all else are real on every rank, and equal. Where a constructor cannot run on the meta device, or would
    leave something else behind, the other processes of a node build it as well, one after the other, and drop the
    values; a line with the reason is logged. Raises what `build` raises.
    """
    source = world.sources[world.rank]
    failure: str | None = None

    def attempt() -> nn.Module | None:
        nonlocal failure
        if world.rank == source:
            return build()
        try:
            return build_on_meta(build)
        except Exception as error:  # one of the constructor itself comes again when it is built
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            failure = kind + str(error).strip().partition("\n")[0]
            return None

    model: nn.Module | None = world.run_on_all(attempt)
    if world.world_size > 1:
        found = outline(model) if model is not None else {}
        digest = hashlib.sha256("\n".join(f"{path} {value}" for path, value in found.items()).encode()).digest()
        digests = world.gather(digest)
        if failure is None and digest != digests[source]:
            failure = "differs"
        failures = world.gather(failure)
        if any(failures):
            expected = world.broadcast(found)
            if model is not None and failure is not None:
                path = next((path for path in (*expected, *found) if found.get(path) != expected.get(path)), "model")
                failure, model = f"{path} would be another than on the CPU", None
            model = _build_in_turn(world, build, model, world.gather(failure))
    assert model is not None
    return model, world.run_on_all(lambda: take_values(model) if world.rank == source else {})


def _build_in_turn(
    world: World, build: Callable[[], nn.Module], model: nn.Module | None, failures: list[str | None]
) -> nn.Module | None:
    """Have the ranks that have a failure build on the CPU, one of each node at a time."""
    if world.rank == 0:
        reason = next(failure for failure in failures if failure is not None)
        logger.info(
            f"model: each process builds it on the CPU, one of each node after the other, because it cannot be built "
            f"on the meta device: {reason}"
        )
    turns = [rank - source if failures[rank] else 0 for rank, source in enumerate(world.sources)]

    def take_turn(turn: int) -> nn.Module | None:
        if turns[world.rank] != turn:
            return None
        built = build()
        give_back(sum(value.nbytes for value in take_values(built).values()))
        return built

    for turn in range(1, max(turns) + 1):
        built: nn.Module | None = world.run_on_all(partial(take_turn, turn))
        model = model if built is None else built
    return model


@torch.no_grad()
def fill_shards(world: World, values: dict[str, Tensor], shards: Mapping[str, Shard]) -> None:
    """Fill the ranks' shards, in the model's order, from the values that the first process of each node has.

    All ranks call, with shards of the same parameters. A value is freed when it was sent, so memory does not grow
    on the sources; no other process holds more than its own shards.
    """
    source = world.sources[world.rank]
    ranges: list[list[tuple[int, int]]] = world.gather([(s.start, s.values.numel()) for s in shards.values()])
    receivers = [rank for rank, of in enumerate(world.sources) if of == source and rank != world.rank]
    for place, (name, shard) in enumerate(shards.items()):
        start, count = ranges[world.rank][place]
        if world.rank == source:
            # out of the mapping, so that nothing holds the value while the next one is sent
            flat = values.pop(name).resolve_conj().resolve_neg().reshape(-1)
            for rank in receivers:
                begin, length = ranges[rank][place]
                if length:
                    world.send(_bytes(flat[begin : begin + length]), rank)
            shard.values.copy_(flat[start : start + count].view(shard.values.shape))
            freed = flat.nbytes
            del flat
            give_back(freed)
        elif count:
            received = torch.empty(count, dtype=shard.values.dtype)
            world.receive(_bytes(received), source)
            shard.values.copy_(received.view(shard.values.shape))
        progress()


def _bytes(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8)
