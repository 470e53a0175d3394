"""Memory through which loader processes hand over batches, used again once nobody refers to a batch any more.

New shared memory for every batch would be cleared, mapped and unmapped in two processes, which takes longer than a copy
into memory that is there. A loader process copies the tensors of a batch into a slot. The process that receives
it gets tensors over that slot, and marks it as free when the last of them is gone.
"""

from __future__ import annotations

import io
import os
import pickle
import weakref
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import torch

from distrain.datasets.nested import tensors_in

_MOST_SLOTS = 32
"""Of a loader process; while all are in use, PyTorch sends further batches."""
_ALIGNED = 64
"""Tensors begin at multiples of so many bytes. The first byte of a slot is 1 while it is in use."""
_ROOM = 1.25
"""Size in batches of a slot for batches that grow."""


@dataclass(frozen=True)
class Sent:
    """A batch on its way."""

    pickled: bytes
    """With the places of tensors in the slot, and in shared memory of their own what has no place."""
    process: int
    slot: int | None = None
    memory: bytes | None = None
    """Pickled, of a slot that is new."""


Place = tuple[int, torch.dtype, tuple[int, ...], tuple[int, ...]]
"""(begin, dtype, shape, stride) of a tensor in a slot; the begin in bytes."""

# --------------------------------------------------------------------------------------------------------------------
# In a loader process


class Sender:
    """The slots of this process."""

    def __init__(self) -> None:
        self._slots: list[torch.Tensor] = []
        """Bytes."""

    def send(self, batch: Any) -> Sent:
        """Return a batch as it is sent. Raises what PyTorch raises for one that cannot be."""
        places: dict[int, Place] = {}
        end = _ALIGNED
        tensors = {id(each): each for each in tensors_in(batch) if _fits(each)}
        for key, tensor in tensors.items():
            places[key] = end, tensor.dtype, tuple(tensor.shape), tensor.stride()
            end += -(-tensor.nbytes // _ALIGNED) * _ALIGNED
        number, is_new = self._free(end) if tensors else (None, False)
        if number is None:
            return Sent(bytes(ForkingPickler.dumps(batch)), os.getpid())
        slot = self._slots[number]
        memory = bytes(ForkingPickler.dumps(slot)) if is_new else None
        for key, tensor in tensors.items():
            _tensor(slot, places[key]).copy_(tensor)
        buffer = io.BytesIO()
        _Pickler(buffer, places).dump(batch)
        slot[0] = 1
        return Sent(buffer.getvalue(), os.getpid(), number, memory)

    def _free(self, size: int) -> tuple[int | None, bool]:
        """Return the number of a free slot of `size` bytes, and whether it is new; None if there is none."""
        free = [number for number, slot in enumerate(self._slots) if not slot[0]]
        for number in free:
            if len(self._slots[number]) >= size:
                return number, False
        if not free and len(self._slots) == _MOST_SLOTS:
            return None, False
        try:
            memory = torch.UntypedStorage._new_shared(int(size * _ROOM) if free else size)
        except RuntimeError:
            return None, False  # there may be enough for the batch alone; otherwise PyTorch describes what is missing
        slot = torch.empty(0, dtype=torch.uint8).set_(memory)
        if free:
            self._slots[free[0]] = slot
            return free[0], True
        self._slots.append(slot)
        return len(self._slots) - 1, True


def _fits(tensor: torch.Tensor) -> bool:
    """Whether a tensor is sent in a slot; PyTorch sends all others."""
    return (
        type(tensor) is torch.Tensor
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and not tensor.requires_grad
        and (tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last))
        and tensor.nbytes > 0
    )


class _Pickler(ForkingPickler):
    """Writes the places of tensors instead of these."""

    def __init__(self, file: Any, places: dict[int, Place]):
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._places = places

    def persistent_id(self, thing: Any) -> Place | None:
        return self._places.get(id(thing))


# --------------------------------------------------------------------------------------------------------------------
# In the process that receives


class Receiver:
    """The slots of the loader processes of this process."""

    def __init__(self) -> None:
        self._slots: dict[tuple[int, int], np.ndarray] = {}
        """By process and number, bytes."""

    def receive(self, sent: Sent) -> Any:
        """Return a batch. Raises what PyTorch raises for one that cannot be received."""
        if sent.slot is None:
            return ForkingPickler.loads(sent.pickled)
        key = sent.process, sent.slot
        if sent.memory is not None:
            self._slots[key] = ForkingPickler.loads(sent.memory).numpy()
        slot = self._slots[key]
        # an array of its own for each batch: it lives as long as a tensor over a part of it
        used = np.frombuffer(slot.data, np.uint8)
        weakref.finalize(used, _release, slot, os.getpid()).atexit = False
        return _Unpickler(io.BytesIO(sent.pickled), used).load()

    def forget(self, process: int) -> None:
        """Forget the slots of a loader process that ends; batches that are in use stay."""
        for key in [each for each in self._slots if each[0] == process]:
            del self._slots[key]


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, used: np.ndarray):
        super().__init__(file)
        self._used = used
        self._tensors: dict[Place, torch.Tensor] = {}

    def persistent_load(self, place: Place) -> torch.Tensor:
        if place not in self._tensors:
            self._tensors[place] = _tensor(self._used, place)
        return self._tensors[place]


def _tensor(memory: torch.Tensor | np.ndarray, place: Place) -> torch.Tensor:
    """Return the tensor at a place, over that memory."""
    begin, dtype, shape, stride = place
    part = memory[begin : begin + dtype.itemsize * int(np.prod(shape, dtype=np.int64))]
    found = part if isinstance(part, torch.Tensor) else torch.from_numpy(part)
    return found.view(dtype).as_strided(shape, stride)


def _release(slot: np.ndarray, process: int) -> None:
    if os.getpid() == process:  # a forked process drops copies
        slot[0] = 0
