"""Ranges of tensors, and how a save copies them into memory on the host."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from distrain.checkpoints.arena import LARGE, Arena, Source
from distrain.parallel.nested import bytes_of

logger = logging.getLogger(__name__)

_STAGED = 64 << 20
"""Bytes of small tensors that are put together on the device before they are copied."""

_JOINED = {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8}
"""Dtypes in which small tensors are put together; those of others as bytes."""


class TensorRange:
    """Elements [start, stop) of a flattened tensor, on any device."""

    __slots__ = ("nbytes", "start", "stop", "values")

    def __init__(self, values: Tensor, start: int, stop: int):
        self.values, self.start, self.stop = values, start, stop
        self.nbytes = (stop - start) * values.element_size()

    def flat(self) -> Tensor:
        """Return the elements (1-D), contiguous: a view where they are so."""
        values = self.values
        if values.is_conj() or values.is_neg():
            values = values.resolve_conj().resolve_neg()
        flat = values.reshape(-1)
        return flat if self.stop - self.start == flat.numel() else flat[self.start : self.stop]

    def in_place(self) -> memoryview | None:
        values = self.values
        if values.device.type != "cpu" or not values.is_contiguous() or values.is_conj() or values.is_neg():
            return None
        return self.to_host()

    def to_host(self) -> memoryview:
        found: memoryview = bytes_of(self.flat()).numpy().data
        return found


class TensorArena(Arena):
    """Memory for the state of a rank whose tensors are on `device`: pinned on a GPU, where copies run by themselves."""

    def __init__(self, device: torch.device):
        super().__init__()
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self.device = device
        self.pinned = False
        """Whether the device copies into the memory by itself."""

    @torch.no_grad()
    def _copy(self, sources: Sequence[Source], room: np.ndarray, *, kept: bool) -> None:
        memory, start = torch.from_numpy(room), 0
        for (small, _, dtype), group in groupby(sources, _kind):
            run = list(group)
            for part in _parts(run) if small else ([each] for each in run):
                nbytes = sum(source.nbytes for source in part)
                if dtype is None:
                    super()._copy(part, room[start : start + nbytes], kept=kept)
                else:
                    flats = [source.flat() for source in part]  # type: ignore[attr-defined]
                    _copy_flat(flats, memory[start : start + nbytes], non_blocking=kept and self.pinned)
                start += nbytes

    def _copied(self) -> Callable[[], None]:
        if not self.pinned:
            return super()._copied()
        event = torch.cuda.Event(blocking=True)
        event.record(torch.cuda.current_stream(self.device))
        wait: Callable[[], None] = event.synchronize
        return wait

    def _make(self, nbytes: int) -> np.ndarray:
        memory = super()._make(nbytes)
        if self.device.type == "cuda":
            self.pinned = self._pin(memory)
        return memory

    def _pin(self, memory: np.ndarray) -> bool:
        """Have the driver keep these pages where they are, so that the device copies into them by itself."""
        torch.cuda.set_device(self.device)  # of this thread, which also keeps an error of the driver to itself
        error = torch.cuda.cudart().cudaHostRegister(memory.ctypes.data, memory.nbytes, _PORTABLE)
        if int(error) != 0:
            logger.warning(
                f"{memory.nbytes / 2**30:.1f} GiB of host memory for checkpoints could not be pinned (CUDA error "
                f"{int(error)}), so the training loop waits for each copy; look at ulimit -l and at free memory"
            )
        return int(error) == 0

    def _free(self) -> None:
        if self.pinned and self._memory is not None:
            torch.cuda.cudart().cudaHostUnregister(self._memory.ctypes.data)
            self.pinned = False
        super()._free()


def _copy_flat(flats: list[Tensor], target: Tensor, *, non_blocking: bool) -> None:
    """Copy tensors (1-D, of one dtype, on one device) end to end into `target` (uint8)."""
    if len(flats) > 1 and flats[0].dtype not in _JOINED:
        flats = [flat.view(torch.uint8) for flat in flats]
    target = target.view(flats[0].dtype)
    if len(flats) > 1 and flats[0].device.type == "cpu":
        torch.cat(flats, out=target)
        return
    # in the order of the device's work: what the next step changes is copied before, and no host waits
    target.copy_(flats[0] if len(flats) == 1 else torch.cat(flats), non_blocking=non_blocking)


_PORTABLE = 1
"""cudaHostRegisterPortable: pinned for every device of the process."""


def _kind(source: Source) -> tuple[bool, torch.device | None, torch.dtype | None]:
    """Return what sources have in common that are copied at once."""
    if not isinstance(source, TensorRange):
        return False, None, None
    return source.nbytes < LARGE, source.values.device, source.values.dtype


def _parts(run: Sequence[Source]) -> list[list[Source]]:
    """Cut a run of small sources, so that each part needs little memory beside the copy."""
    parts: list[list[Source]] = [[]]
    nbytes = 0
    for source in run:
        if nbytes + source.nbytes > _STAGED:
            parts.append([])
            nbytes = 0
        parts[-1].append(source)
        nbytes += source.nbytes
    return parts
