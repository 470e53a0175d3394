"""Checks that all ranks gather the parts of a sharded model in one order, before one waits for ever.

Where ranks gather different parts, the transport waits for ever or aborts; where the parts are of one size, each
silently computes with the weights of another.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
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
_FIRST_LOOK_S, _LOOK_EVERY_S = 0.001, 0.05
_MOST_ORDERS = 8
"""How many are remembered of each kind of pass."""
_END = "the end of the pass"
_NUMBERS = itertools.count()
"""All ranks check the same models, one after the other: none may read the keys of an earlier one."""


class GatherOrder:
    """The order in which the ranks reach the parts of a model in a forward pass, and the backward pass that follows.

    Where they do not know it yet, they exchange the name of each part before they gather it. From then on each compares
    alone what it reaches, which costs a comparison of strings for each part; only where that differs do they agree on
    another order, be it a known one.

    A step may hold several passes: those of one optimizer after the other, and those that a task makes before it goes
    back. `acting` returns which optimizer it is; each pass of its micro-batch has orders of its own.
    """

    def __init__(self, world: World, model: nn.Module, acting: Callable[[], object] = lambda: None):
        self._world, self._model, self._acting = world, model, acting
        self._orders: dict[tuple[object, ...], list[list[str]]] = {}
        """Those that are known of each kind of pass, the newest first."""
        self._kind: tuple[object, ...] = ()
        """Whether the model trains and there are gradients, which optimizer acts, and which of its passes it is."""
        self._earlier = 0
        """How many passes with gradients the model has made in training since the last backward pass."""
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
        self.goes_back = True
        """Whether a backward pass may follow the model's newest forward pass."""
        self._paused = world.world_size == 1
        model.register_forward_pre_hook(self._begin, prepend=True)
        model.register_forward_hook(self._end_forward)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Check nothing, so that ranks may make other passes: all weights are there."""
        before, self._paused, self._open = self._paused, True, False
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
        """End the pass after its backward pass. Raises as `reach` does."""
        self._close()
        self._earlier = 0

    def _close(self) -> None:
        if not self._open:
            return
        self._open = False
        if self._known is None:
            self._unsent.append(_END)
            self._exchange()
        elif self._at < len(self._known):
            self._agree_on_another_order(self._at, _END)
        orders = self._orders.setdefault(self._kind, [])
        if self._known is None:
            orders.insert(0, self._reached[:-1])
            del orders[_MOST_ORDERS:]
        elif self._known is not orders[0]:
            orders.insert(0, orders.pop(orders.index(self._known)))

    def _begin(self, *_: Any) -> None:
        if torch.compiler.is_compiling():
            return
        self.goes_back = torch.is_grad_enabled()
        if self._paused:
            return
        training = self._model.training
        if self._open:
            if training and not self.goes_back:
                return  # a part of the pass that is under way, whose backward pass is still to come
            self._close()
        self._kind = (training, self.goes_back, self._acting(), self._earlier)
        self._earlier += training and self.goes_back
        self._known = next(iter(self._orders.get(self._kind, [])), None)
        self._reached, self._unsent, self._at, self._open = [], [], 0, True
        self._pass += 1

    def _end_forward(self, *_: Any) -> None:
        if not self._open:
            return
        if not self._kind[1]:
            self._close()
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
        keys = [f"{key}/{rank}" for rank in range(world.world_size)]
        store.set(keys[world.rank], part)
        until, look_s = time.monotonic() + _PATIENCE_S, _FIRST_LOOK_S
        while not store.check(keys) and time.monotonic() < until:
            time.sleep(look_s)
            look_s = min(2 * look_s, _LOOK_EVERY_S)
        expected = known[at] if at < len(known) else _END
        parts = [store.get(each).decode() if store.check([each]) else expected for each in keys]
        if any(other != part for other in parts):
            raise self._error(parts)
        begun = [*known[:at], part]
        orders = self._orders[self._kind]
        self._known = next((order for order in orders if [*order, _END][: at + 1] == begun), None)
        self._reached, self._unsent = begun, []
        if self._posted is not None:  # all have read it, as all are here
            store.delete_key(self._posted)
        self._posted = keys[world.rank]

    def _error(self, parts: list[str]) -> UserError:
        own = parts[self._world.rank]
        rank = next(rank for rank, part in enumerate(parts) if part != own)
        # what one of them has skipped is what the other reaches first
        where = {part: place for place, part in enumerate(next(iter(self._orders.get(self._kind, [])), []))}
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
