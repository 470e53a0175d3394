"""Reports of out-of-memory errors: which rank, doing what, how much memory there was, and what needs less."""

from __future__ import annotations

import errno
import socket
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from types import TracebackType

import torch

from distrain.config import Recipe, UserError
from distrain.datasets.batch_sizes import micro_batch_sizes
from distrain.parallel import World
from distrain.run import heartbeat
from distrain.system import memory
from distrain.system.memory import gib

_SIGNS = (
    "DefaultCPUAllocator",
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "std::bad_alloc",
    "Cannot allocate memory",
)
"""What torch, and the libraries below it, write in errors that have no class of their own."""


_LONGEST = 300
"""Characters of an error that are shown."""


class OutOfMemory(UserError):
    """A rank ran out of memory; another attempt under the same conditions would, too."""


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether an error, or one that it was raised from, says that this rank could get no more memory."""
    while error is not None and not getattr(error, "of_another_rank", False):
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            return True
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            return True
        if isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS):
            return True
        error = error.__cause__
    return False


@dataclass
class Attempt:
    """What is known of an attempt at a run when its memory runs out."""

    micro_batch_size: int | None = None
    """None until it is settled."""


@contextmanager
def explained(recipe: Recipe, world: World) -> Iterator[Attempt]:
    """Raise OutOfMemory in place of what torch, Python or the system raise where memory runs out on this rank."""
    attempt = Attempt()
    if recipe.batch.micro_batch_size != "auto":
        attempt.micro_batch_size = recipe.batch.micro_batch_size
    try:
        yield attempt
    except Exception as error:
        if isinstance(error, OutOfMemory) or not is_out_of_memory(error):
            raise
        where = phase(error.__traceback__)
        who = f"rank {world.rank} ({socket.gethostname()})" if world.world_size > 1 else socket.gethostname()
        text = f"out of memory on {who}, {where}: {_first_line(error)}\n{_figures(world)}"
        less = advice(recipe, world, attempt.micro_batch_size, where)
        raise OutOfMemory(text + "\nWhat takes less:\n  - " + "\n  - ".join(less)) from error


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    # what comes behind is about torch's own settings, or where in its sources it was
    text = next((line for line in lines if "allocat" in line or "memory" in line), lines[0] if lines else "")
    if len(text) > _LONGEST:  # whole sentences, of which CUDA's has five, the last about a setting
        text = text[: text.rfind(". ", 0, _LONGEST) + 1] or text[:_LONGEST]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


# --------------------------------------------------------------------------------------------------------------------
# When


_WORDS = {
    "setup": "setting up",
    "data": "reading data",
    "forward": "in the forward pass",
    "backward": "in the backward pass",
    "optimizer": "in the optimizer's step",
    "save": "saving",
    "evaluate": "in an evaluation",
    "finish": "at the end",
    "callbacks": "in a callback",
}
_SET_UP = {
    "distrain.data": "reading data",
    "distrain.datasets": "reading data",
    "distrain.training.tasks.inside": "in the forward pass",
    "distrain.networks.calling": "in the forward pass",
    "distrain.networks": "building the model",
    "distrain.checkpoints": "reading a checkpoint",
}
"""By the module that the set-up, which is one phase, has called first."""


def phase(where: TracebackType | None) -> str:
    """Return what was being done when an error came, from the heartbeat and, in the set-up, from its trace."""
    now = heartbeat.now().phase
    words = _WORDS.get(now, "in a step")
    if now != "setup":
        return words
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(where)]
    parts = (part for name in modules for room, part in _SET_UP.items() if f"{name}.".startswith(f"{room}."))
    return ", ".join([words, *islice(parts, 1)])


# --------------------------------------------------------------------------------------------------------------------
# How much


def _figures(world: World) -> str:
    if world.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(world.device)
        own = torch.cuda.memory_reserved(world.device)
        peak = torch.cuda.max_memory_allocated(world.device)
        others = max(total - free - own, 0)
        if not peak:  # its first tensor did not fit, or the driver's own part
            name = torch.cuda.get_device_name(world.device)
            taken = f"; {gib(total - free)} of it are taken by others and by the driver" if free < total else ""
            return f"This process had nothing on {name} yet, of whose {gib(total)} {gib(free)} are free{taken}."
        return (
            f"This process's peak was {gib(peak)} of the {gib(total)} of {torch.cuda.get_device_name(world.device)}; "
            f"{gib(others)} of it are taken by others and by the driver."
        )
    nearest = memory.limits()[:1]
    of = ""
    if nearest:
        limit = nearest[0]
        whose = "all processes there" if limit.shared else "this process"
        of = (
            f" {limit.what[0].upper()}{limit.what[1:]} is {gib(limit.nbytes)}, and {whose} had up to {gib(limit.peak)}."
        )
    return f"This process's peak was {gib(memory.peak_bytes())} of resident memory.{of}"


def advice(recipe: Recipe, world: World, micro_batch_size: int | None, where: str) -> list[str]:
    """Return what to change so that it takes less, the likeliest first."""
    state = [
        f"--strategy {name}, which spreads {what} over the processes"
        for name, what in (
            ("zero2", "gradients and optimizer state"),
            ("fsdp2", "weights, gradients and optimizer state"),
        )
        # spread over one process it is as much as before
        if world.world_size > 1
        and (world.strategy in ("single", "ddp") or (world.strategy in ("zero1", "zero2") and name == "fsdp2"))
    ]
    if world.world_size > 1:
        state.append("more processes, on more machines: what is sharded is then less on each")
    if world.device.type == "cuda" and world.asked.offload == "none":
        state.append(_offload(world.strategy))
    if "evaluation" in where or "at the end" in where:
        now = recipe.eval.batch or micro_batch_size
        size = f": {now // 2} (now {now})" if now and now > 1 else ""
        return [f"eval.batch{size}; the score stays the same", *state]
    lines = []
    if "reading data" in where:
        lines.append("data.workers: fewer of them, where there are any")
    if "saving" in where:
        lines.append("checkpoint.async: false, which needs no second copy of the state")
    passes = []
    if micro_batch_size is not None and (lower := _half(recipe, world, micro_batch_size)) is not None:
        times = recipe.batch.global_batch_size // (lower * world.world_size)
        passes.append(
            f"batch.micro: {lower} (now {micro_batch_size}); {times} of them are accumulated then, for the same step"
        )
    accumulates = micro_batch_size is not None and micro_batch_size * world.world_size < recipe.batch.global_batch_size
    sharded = world.strategy == "fsdp2" and world.world_size > 1
    if sharded and accumulates and not world.tuning["reduce_every_micro"]:
        passes.append("tune.reduce_every_micro: true, with which no process keeps a whole gradient")
    if not recipe.train.activation_checkpointing:
        passes.append("train.activation_checkpointing: true, for about a third more time")
    # what is there before any batch comes is state; the rest grows with the batch
    first_state = not any(word in where for word in ("forward", "backward", "data", "in a step"))
    return lines + (state + passes if first_state else passes + state)


def _offload(strategy: str) -> str:
    """Return what has a part of the state kept on the CPU; without sharding there is none."""
    if strategy == "fsdp2":
        return "--offload all, which keeps weights and the optimizer's state in the memory of the CPU"
    first = "" if strategy.startswith("zero") else "--strategy zero2 "
    return f"{first}--offload optimizer, which keeps the optimizer's state in the memory of the CPU"


def _half(recipe: Recipe, world: World, micro_batch_size: int) -> int | None:
    """Return the largest size of a micro-batch that is at most half of this one, and divides the batch."""
    sizes = micro_batch_sizes(recipe.batch.global_batch_size, world.world_size)
    return max((size for size in sizes if size <= micro_batch_size // 2), default=None)
