"""What it costs DDP's ranks to agree on a few numbers in each step, by three ways.

    python benchmarks/agreement.py [--turns 800] [--steps 4]

Two processes train a small model (64-64-64-10) over gloo. The numbers travel as the gradient of a parameter that is
never trained, within DDP's own reduction; in a reduction of their own that runs beside the backward pass; and in one
that follows it. The ways take turns of a few steps in the same processes, so that whatever else the machine does falls
on all of them; a ratio is within a turn. Decides how `distrain.parallel.ddp` sends a `StepRecord`.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor, nn
from torch.nn import functional

WAYS = ("with the gradients", "beside the backward pass", "after it")
NUMBERS = 6
WARM_UP = 20


class Model(nn.Module):
    """A small model, and beside it the parameter whose gradient brings the numbers, or None."""

    def __init__(self, *, carries: bool):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        self.numbers = nn.Parameter(torch.zeros(NUMBERS)) if carries else None

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class Way:
    """A model that trains, and one way to agree."""

    def __init__(self, name: str):
        torch.manual_seed(0)
        self.name = name
        model = Model(carries=name == WAYS[0])
        self.trained = list(model.model.parameters())
        self.ddp = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-3, fused=True)
        self.inputs, self.targets = torch.randn(16, 64), torch.randint(0, 10, (16,))

    def step(self) -> Tensor:
        """Take a step; returns the numbers' means over the ranks."""
        loss = functional.cross_entropy(self.ddp(self.inputs), self.targets)
        numbers = torch.zeros(NUMBERS, dtype=torch.float64)
        numbers[0] = loss.detach()
        if self.name == WAYS[0]:
            carrier: Any = self.ddp.module.numbers
            carried = torch.dot(carrier, numbers.float())
            torch.autograd.backward((loss, carried), (torch.ones_like(loss), torch.ones_like(carried)))
            means, carrier.grad = carrier.grad.clone(), None
        elif self.name == WAYS[1]:
            work = dist.all_reduce(numbers, async_op=True)
            loss.backward()
            work.wait()
            means = numbers / dist.get_world_size()
        else:
            loss.backward()
            dist.all_reduce(numbers)
            means = numbers / dist.get_world_size()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return means


def run(rank: int, port: int, turns: int, steps: int) -> None:
    """Be one of the two processes; rank 0 prints."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    ways = [Way(name) for name in WAYS]
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    for turn in range(turns + WARM_UP):
        for place in range(len(ways)):
            way = ways[(turn + place) % len(ways)]
            dist.barrier()
            began = time.perf_counter()
            for _ in range(steps):
                way.step()
            if turn >= WARM_UP:
                times[way.name].append((time.perf_counter() - began) / steps * 1e6)
    if rank == 0:
        for name in WAYS:
            ratios = [one / other for one, other in zip(times[name], times[WAYS[0]], strict=True)]
            low, middle, high = statistics.quantiles(ratios)
            print(
                f"{name:25} {statistics.median(times[name]):6.0f} µs (least {min(times[name]):.0f}), ratio to "
                f"{WAYS[0]} {middle:.2f} (quartiles {low:.2f} to {high:.2f})"
            )
    dist.destroy_process_group()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=800)
    parser.add_argument("--steps", type=int, default=4, help="steps in a turn")
    a = parser.parse_args()
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    multiprocessing.spawn(run, (port, a.turns, a.steps), nprocs=2)


if __name__ == "__main__":
    main()
