"""Checks that all ranks gather the parts of a sharded model in one order, before one waits for ever.

Where ranks gather different parts, the transport waits for ever or aborts; where the parts are of one size, each
silently computes with the weights of another.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from distrain.config import UserError
from distrain.parallel.comm import World

_PATIENCE_S = 10.0
"""How long a rank that leaves the known order waits for the others to leave it in the same way. They are not far away:
each part that is gathered synchronises the ranks."""
_LOOK_EVERY_S = 0.02
_END = "the end of the pass"
_NUMBERS = itertools.count()
"""All ranks check the same models, one after the other: none may read the keys of an earlier one."""


class GatherOrder:
    """The order in which the ranks reach the parts of a model in a forward pass, and the backward pass that follows.

    In the first pass the ranks exchange the name of each part before they gather it. From then on each compares alone
    what it reaches, which costs a comparison of strings for each part; only where that differs do they exchange again.
    """

    def __init__(self, world: World, model: nn.Module):
        self._world, self._model = world, model
        self._orders: dict[tuple[bool, bool], list[str]] = {}
        """By whether the model trains and there is a backward pass."""
        self._kind = (False, False)
        self._known: list[str] | None = None
        """What the ranks reach in this pass; None where they find out in it."""
        self._reached: list[str] = []
        """What they have reached, where they find out."""
        self._unsent: list[str] = []
        self._at = 0
        self._pass = 0
        self._number = next(_NUMBERS)
        self._posted: str | None = None
        """This rank's key in the store, from when the order last changed."""
        self._open = False
        self._paused = world.world_size == 1
        model.register_forward_pre_hook(self._begin, prepend=True)
        model.register_forward_hook(self._end_forward)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Check nothing, so that ranks may make other passes: all weights are there."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def reach(self, part: str, *, waits: bool = True) -> None:
        """Note that this rank reaches a part; `waits`: whether it then waits for the others.

        Raises UserError where another rank reaches another part.
        """
        if not self._open:
            return
        at, self._at = self._at, self._at + 1
        if self._known is None:
            self._unsent.append(part)
            if waits:
                self._exchange()
        elif at >= len(self._known) or self._known[at] != part:
            self._agree_on_another_order(at, part)

    def end(self) -> None:
        """End the pass, after its backward pass where there is one. Raises as `reach` does."""
        if not self._open:
            return
        self._open = False
        if self._known is None:
            self._unsent.append(_END)
            self._exchange()
        elif self._at < len(self._known):
            self._agree_on_another_order(self._at, _END)
        else:
            return
        self._orders[self._kind] = self._reached[:-1]

    def _begin(self, *_: Any) -> None:
        if self._paused or torch.compiler.is_compiling():
            return
        self._kind = (self._model.training, torch.is_grad_enabled())
        self._known = self._orders.get(self._kind)
        self._reached, self._unsent, self._at, self._open = [], [], 0, True
        self._pass += 1

    def _end_forward(self, *_: Any) -> None:
        if not self._open:
            return
        if not torch.is_grad_enabled():
            self.end()
        elif self._known is None:
            self._exchange()

    def _exchange(self) -> None:
        """Exchange with the other ranks what each has reached since the last exchange."""
        ranks = self._world.gather(self._unsent)
        self._reached += self._unsent
        self._unsent = []
        if all(parts == ranks[0] for parts in ranks):
            return
        length = min(map(len, ranks))
        at = next((at for at in range(length) if len({parts[at] for parts in ranks}) > 1), length)
        raise self._error([parts[at] if at < len(parts) else _END for parts in ranks])

    def _agree_on_another_order(self, at: int, part: str) -> None:
        """Continue in another order than the known one if the other ranks do the same."""
        world, known = self._world, self._known
        assert known is not None
        store = dist.distributed_c10d._get_default_store()
        key = f"distrain/gather-order/{self._number}/{self._pass}/{at}"
        store.set(f"{key}/{world.rank}", part)
        others = [rank for rank in range(world.world_size) if rank != world.rank]
        expected = known[at] if at < len(known) else _END
        parts = {world.rank: part}
        until = time.monotonic() + _PATIENCE_S
        while others:
            others = [rank for rank in others if not store.check([f"{key}/{rank}"])]
            if others and time.monotonic() > until:
                break
            time.sleep(_LOOK_EVERY_S if others else 0)
        for rank in range(world.world_size):
            parts[rank] = expected if rank in others else store.get(f"{key}/{rank}").decode()
        if any(other != part for other in parts.values()):
            raise self._error([parts[rank] for rank in range(world.world_size)])
        self._reached, self._unsent, self._known = [*known[:at], part], [], None
        if self._posted is not None:  # all have read it, as all are here
            store.delete_key(self._posted)
        self._posted = f"{key}/{world.rank}"

    def _error(self, parts: list[str]) -> UserError:
        own = parts[self._world.rank]
        rank = next(rank for rank, part in enumerate(parts) if part != own)
        # what one of them has skipped is what the other reaches first
        where = {part: place for place, part in enumerate(self._orders.get(self._kind, []))}
        first = min(own, parts[rank], key=lambda part: where.get(part, -1) if part != _END else math.inf)
        named = dict(self._model.named_modules())
        name = first.rpartition(" ")[2]
        module = named.get(name)
        inner = next((key for key, _ in module.named_parameters()), "") if module is not None else ""
        subject = f"parameter {'.'.join(filter(None, (name, inner)))}" if inner else f"module {name}"
        return UserError(
            f"{subject} is not used by all ranks in the same place: rank {self._world.rank} reaches {own} where rank "
            f"{rank} reaches {parts[rank]}. {self._world.strategy} has each rank send its part of the weights when "
            "they are used, so all must use them in one order, whatever their samples are. Use ddp or zero2, which "
            "have all weights on each process, or have each micro-batch use every part, even if multiplied by zero"
        )
