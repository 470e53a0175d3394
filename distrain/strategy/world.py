"""The processes of a run: who they are, and how they agree."""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor, nn

from distrain.config import UserError
from distrain.strategy.launched import Asked, Environment

_PATIENCE = timedelta(days=1)
"""How long ranks wait while rank 0 does something for all of them."""


class World:
    """The processes of this run: who they are, and how they agree. Every method is called by all ranks.

    Satisfies `distrain.checkpoint.Communicator`.
    """

    def __init__(self, accelerator: Accelerator, precision: str):
        self.accelerator = accelerator
        self.precision = precision
        """fp32, bf16 or fp64, with `auto` resolved."""
        self.rank = accelerator.process_index
        self.world_size = accelerator.num_processes
        self.device = accelerator.device
        self.strategy = "single" if self.world_size == 1 else "ddp"
        # NCCL moves only device memory, and its object collectives wait for the device: small talk goes over gloo
        needs_own = self.world_size > 1 and dist.get_backend() != "gloo"
        self._control: dist.ProcessGroup | None = dist.new_group(backend="gloo") if needs_own else None  # type: ignore[assignment]
        self._patient: dist.ProcessGroup | None = None
        if self.world_size > 1:
            self._patient = dist.new_group(backend="gloo", timeout=_PATIENCE)  # type: ignore[assignment]

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over all ranks of `values`, the same bits on every rank."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def later(self, values: Tensor) -> Callable[[], list[float]]:
        """Return a function that reads `values` (k,); called a step later, it does not wait for the device."""
        if values.device.type == "cpu":
            return values.tolist
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        done = torch.cuda.Event()
        done.record()

        def read() -> list[float]:
            done.synchronize()
            return host.tolist()

        return read

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's `value` (a small object), in the order of ranks, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._control)
        return values

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's `value` (a small object) on every rank."""
        return self._broadcast(value, self._control)

    def _broadcast(self, value: Any, group: dist.ProcessGroup | None) -> Any:
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=group)
        return values[0]

    def first(self, action: Callable[[], Any]) -> Any:
        """Rank 0 runs `action`; every rank returns its result, or raises what it raised.

        Ranks wait for it for up to a day: data may be prepared and large checkpoints verified here. A process that has
        ended ends their waiting at once.
        """
        outcome: tuple[Any, Exception | None] = (None, None)
        own: Exception | None = None
        if self.rank == 0:
            try:
                outcome = (action(), None)
            except Exception as error:
                outcome, own = (None, _picklable(error)), error
        result, failure = self._broadcast(outcome, self._patient)
        if failure is not None:
            raise own or _of_another_rank(failure)
        return result

    def together(self, action: Callable[[], Any]) -> Any:
        """Every rank runs `action` and returns its own result; if any rank fails, all raise the first failure.

        For work in which ranks can fail alone, so that none waits for another that has already given up. `action` must
        not speak to other ranks.
        """
        result, own = None, None
        try:
            result = action()
        except Exception as error:
            own = error
        for rank, failure in enumerate(self.gather(own and _picklable(own))):
            if failure is None:
                continue
            if rank == self.rank and own is not None:
                raise own
            if not isinstance(failure, UserError):
                failure = RuntimeError(f"rank {rank} failed: {type(failure).__name__}: {failure}")
            raise _of_another_rank(failure)
        return result

    def for_evaluation(self, model: nn.Module) -> nn.Module:
        """Return a model that only evaluates, in this world's arithmetic."""
        return self.accelerator.prepare_model(model, evaluation_mode=True)

    def close(self) -> None:
        """Leave the process group in order; ending a process without it can abort under gloo."""
        self.accelerator.free_memory()
        if dist.is_initialized():
            dist.destroy_process_group()


def _picklable(error: Exception) -> Exception:
    """Return `error`, or where it does not come out of pickling as it went in, a RuntimeError that says the same."""
    try:
        if type(pickle.loads(pickle.dumps(error))) is type(error):
            return error
    except Exception:  # whatever a class of the user's does there, what went wrong before matters more
        pass
    return RuntimeError(f"{type(error).__name__}: {error}")


def _of_another_rank(error: Exception) -> Exception:
    # read where failures are told: the rank that failed has the traceback, and is to be the one that tells
    error.of_another_rank = True  # type: ignore[attr-defined]
    return error


def open_world(precision: str, asked: Asked | None = None, *, timeout_s: float = 600.0) -> World:
    """Join the processes of this run. All ranks call; raises UserError when the world is not the launcher's.

    `precision` is the recipe's: auto, fp32, bf16 or fp64. `asked` is the strategy, None for single or ddp. `timeout_s`
    bounds every collective but those of `first`.
    """
    if asked is not None and asked.strategy not in ("single", "ddp"):
        raise UserError(f"the strategy {asked} is not built yet; take single or ddp")
    environment = Environment.read(os.environ)
    on_cpu = not torch.cuda.is_available()
    if precision == "auto":
        precision = "bf16" if not on_cpu and torch.cuda.is_bf16_supported() else "fp32"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*OMP_NUM_THREADS/MKL_NUM_THREADS unset.*")
        accelerator = Accelerator(
            # without it several CPU processes are each rank 0 of 1
            cpu=on_cpu,
            mixed_precision="bf16" if precision == "bf16" else "no",
            # accumulation has one owner: train_step
            gradient_accumulation_steps=1,
            step_scheduler_with_optimizer=False,
            kwargs_handlers=[
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
                InitProcessGroupKwargs(timeout=timedelta(seconds=timeout_s)),
            ],
        )
    world = World(accelerator, precision)
    if (world.rank, world.world_size) != (environment.rank, environment.world_size):
        raise UserError(
            f"the launcher made this process rank {environment.rank} of {environment.world_size}, but it came up as "
            f"rank {world.rank} of {world.world_size}; check that MASTER_ADDR and MASTER_PORT are the same everywhere"
        )
    return world
