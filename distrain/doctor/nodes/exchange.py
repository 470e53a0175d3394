"""What ranks measure with each other: clocks, products of matrices, collectives, the network between each two nodes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from distrain.doctor.nodes.meeting import Meeting

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_QUESTIONS = 12
"""How often each rank asks for the time: the quickest answer is the most exact one."""
_PRODUCTS_S = 0.3
"""How long matrices are multiplied."""
_REPEATS = 12
_ROUNDS = 8
"""In how many rounds pairs are measured at most: in each, every node has another partner."""
_LARGEST = 32 << 20
"""Bytes of the largest message between two nodes."""
_TAKES_S = 0.004
"""A message is made larger until it takes so long, which is too short to be disturbed each time."""


def clock_offset(team: Meeting) -> dict[str, float]:
    """Return how far this rank's clock is before that of the team's first rank, by its answers through the store.

    `offset_s` is exact to half of `round_trip_s`.
    """
    first = team.members[0]
    store, waits = team.store, timedelta(seconds=team.step_s)
    best = {"offset_s": 0.0, "round_trip_s": 0.0}
    team.share("clock begins")
    for rank in team.members[1:]:
        for number in range(_QUESTIONS):
            key = f"{team.name}/clock/{rank}/{number}"
            if team.rank == first:
                store.wait([key], waits)
                store.set(f"{key}/answer", repr(time.time()))
            elif team.rank == rank:
                asked_at, began = time.time(), time.perf_counter()
                store.set(key, "")
                store.wait([f"{key}/answer"], waits)
                took = time.perf_counter() - began
                if number == 0 or took < best["round_trip_s"]:
                    answer = float(store.get(f"{key}/answer"))
                    best = {"offset_s": asked_at + took / 2 - answer, "round_trip_s": took}
    team.share("clock ends")
    return best


def multiply(device: torch.device, for_s: float = _PRODUCTS_S) -> dict[str, Any]:
    """Return the seconds of a product of two matrices, and in how many of its rows it is wrong.

    `seconds` are those of the quickest tenth, which other processes have not disturbed; `share` is the part of the time
    in which this thread had a CPU. The matrices hold small whole numbers, whose products are exact in every precision
    that is used.
    """
    import torch

    size = 4096 if device.type == "cuda" else 320
    index = torch.arange(size)
    left = (index[:, None] * 3 + index[None, :]) % 5 - 2
    right = (index[:, None] + index[None, :] * 2) % 7 - 3
    expected = left @ right.sum(1)  # of each row the sum, in whole numbers
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
    a, b = left.to(device, torch.float32), right.to(device, torch.float32)

    def once() -> Tensor:
        product = a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return product

    for _ in range(3):
        product = once()
    times: list[float] = []
    start, computed = time.perf_counter(), time.thread_time()
    while time.perf_counter() < start + for_s or len(times) < 10:
        began = time.perf_counter()
        product = once()
        times.append(time.perf_counter() - began)
    share = (time.thread_time() - computed) / (time.perf_counter() - start)
    wrong = int((product.double().sum(1).cpu().round().long() != expected).sum())
    return {
        "seconds": sorted(times)[len(times) // 10], "share": min(share, 1.0), "wrong_rows": wrong, "rows": size,
        "device": device.type,
    }  # fmt: skip


def check_collectives(index: int, world_size: int, device: torch.device, group: Any = None) -> dict[str, str | None]:
    """Return what is wrong with the result of each collective on this rank, None: nothing; all ranks call.

    Of known whole numbers, so that there is one right result. What the backend does not have is passed over.
    """
    import torch
    import torch.distributed as dist

    count = 1 << 14
    numbers = torch.arange(count, dtype=torch.int64)

    def of(rank: int) -> Tensor:
        return numbers * (rank + 1) + rank

    total = numbers * (world_size * (world_size + 1) // 2) + world_size * (world_size - 1) // 2

    def all_reduce() -> tuple[Tensor, Tensor]:
        values = of(index).to(device)
        dist.all_reduce(values, group=group)
        return values, total

    def all_gather() -> tuple[Tensor, Tensor]:
        parts = [torch.empty(count, dtype=torch.int64, device=device) for _ in range(world_size)]
        dist.all_gather(parts, of(index).to(device), group=group)
        return torch.cat(parts), torch.cat([of(rank) for rank in range(world_size)])

    def broadcast() -> tuple[Tensor, Tensor]:
        source = world_size - 1
        values = of(source).to(device) if index == source else torch.zeros(count, dtype=torch.int64, device=device)
        dist.broadcast(values, source, group=group)
        return values, of(source)

    def reduce_scatter() -> tuple[Tensor, Tensor]:
        values = torch.empty(count, dtype=torch.int64, device=device)
        dist.reduce_scatter_tensor(values, of(index).repeat(world_size).to(device), group=group)
        return values, total

    found: dict[str, str | None] = {}
    collectives: list[tuple[str, Callable[[], tuple[Tensor, Tensor]]]] = [
        ("all-reduce", all_reduce),
        ("all-gather", all_gather),
        ("broadcast", broadcast),
        ("reduce-scatter", reduce_scatter),
    ]
    for name, collective in collectives:
        try:
            values, expected = collective()
        except (RuntimeError, NotImplementedError, ValueError) as error:
            text = str(error)
            if name == "reduce-scatter" and ("support" in text.lower() or "implemented" in text.lower()):
                continue
            found[name] = text.splitlines()[0][:300] if text else type(error).__name__
            break  # others would wait for a rank that is not there
        wrong = int((values.cpu() != expected).sum())
        found[name] = f"{wrong:,} of {len(expected):,} numbers are wrong" if wrong else None
    return found


def rounds(count: int) -> list[list[int | None]]:
    """Return for each round the partner of each of `count` nodes, None: none in this round. Pure.

    Over all rounds each meets each other once; of many rounds some are dropped, evenly.
    """
    even = count + count % 2
    circle, found = list(range(even)), []
    for _ in range(even - 1):
        partners: list[int | None] = [None] * count
        for one, other in zip(circle[: even // 2], reversed(circle[even // 2 :]), strict=True):
            if one < count and other < count:
                partners[one], partners[other] = other, one
        found.append(partners)
        circle = [circle[0], circle[-1], *circle[1:-1]]
    if len(found) > _ROUNDS:
        found = [found[number * len(found) // _ROUNDS] for number in range(_ROUNDS)]
    return found


def measure_pairs(
    team: Meeting, indices: Mapping[int, int], device: torch.device, group: Any, step: str
) -> dict[int, dict[str, float]]:
    """Return the bytes per second and the latency between this rank and others of the team; one of each node calls.

    `indices` are the ranks of the team in the process group. Pairs are measured at the same time, each rank being in
    one of them; the first rank of a pair has its numbers.
    """
    found: dict[int, dict[str, float]] = {}
    for number, partners in enumerate(rounds(len(team.members))):
        team.share(f"{step} {number}")
        partner = partners[team.index]
        if partner is not None:
            other = team.members[partner]
            measured = _measure(indices[other], device, group, asks=team.index < partner)
            if measured is not None:
                found[other] = measured
    return found


def _measure(other: int, device: torch.device, group: Any, *, asks: bool) -> dict[str, float] | None:
    """Return what a pair measures: `asks` sends, and the other sends back as much, and knows nothing of the time."""
    import torch
    import torch.distributed as dist

    def swap(values: Tensor) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        if asks:
            dist.send(values, other, group=group)
            dist.recv(values, other, group=group)
        else:
            dist.recv(values, other, group=group)
            dist.send(values, other, group=group)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    header = torch.zeros(1, dtype=torch.int64, device=device)
    one = torch.zeros(1, device=device)
    latency = min(swap(one) for _ in range(8)) / 2

    if not asks:
        while True:
            dist.recv(header, other, group=group)
            if not header.item():
                return None
            swap(torch.zeros(int(header.item()) // 4, device=device))
    size, best, left = 1 << 16, 0.0, _REPEATS
    while size:
        header.fill_(size)
        dist.send(header, other, group=group)
        took = swap(torch.zeros(size // 4, device=device))
        best = max(best, 2 * size / took)
        if took < _TAKES_S and size < _LARGEST:
            size, best = size * 4, 0.0  # what is small may fit into a buffer on the way
        elif left > 1 and took < 1.0:
            left -= 1
        else:
            size = 0
    dist.send(torch.zeros_like(header), other, group=group)
    return {"bytes_per_s": best, "latency_s": latency}
