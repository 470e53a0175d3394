"""Memory through which loader processes hand over batches, used again once nobody refers to a batch any more.

New shared memory for every batch would be cleared, mapped and unmapped in two processes, which takes longer than a copy
into memory that is there. A loader process copies the tensors of a batch into a slot, or makes them there. The process
that receives it gets tensors over that slot, and marks it as free when the last of them is gone.
"""

from __future__ import annotations

import contextlib
import io
import math
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
_BESIDE = 2**16
"""Bytes that a slot has for further tensors of a batch that is made in it, such as targets; otherwise it is copied."""
_SPARE_FILES = 8
"""Descriptors that sending a batch may need besides those of its tensors, such as for the receiver's request."""
_GROWTH = 1.25
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
        self._unsent: set[int] = set()
        """The slots that the receiver does not know yet."""
        self._rooms: dict[int, weakref.ref[np.ndarray]] = {}
        """The memory of slots in which batches were made, alive while this process refers to it."""
        self._room: int | None = None
        """The slot that the next batch is made in."""

    def room(self, shape: tuple[int, ...]) -> np.ndarray:
        """Return memory for bytes of the next batch: of a slot, from which it need not be copied, if one is free.

        The process that receives the batch may change what is in it: nothing here may refer to it after `send`.
        """
        size = math.prod(shape)
        number = self._free(_ALIGNED + size + _BESIDE)
        if number is None:
            return np.empty(shape, np.uint8)
        slot = np.frombuffer(self._slots[number].numpy().data, np.uint8)
        self._room, self._rooms[number] = number, weakref.ref(slot)
        return slot[_ALIGNED : _ALIGNED + size].reshape(shape)

    def send(self, batch: Any) -> Sent:
        """Return a batch as it is sent. Raises what PyTorch raises for one that cannot be."""
        found = {id(each): each for each in tensors_in(batch)}
        tensors = {key: each for key, each in found.items() if _fits(each)}
        number, there = self._made_in_room(tensors)
        end = max((begin + tensors[key].nbytes for key, begin in there.items()), default=0)
        places: dict[int, Place] = {}
        for key, tensor in tensors.items():
            if (begin := there.get(key)) is None:
                begin = max(1, -(-end // _ALIGNED)) * _ALIGNED
                end = begin + tensor.nbytes
            places[key] = begin, tensor.dtype, tuple(tensor.shape), tensor.stride()
        if tensors and (number is None or end > len(self._slots[number])):
            number, there = self._free(end), {}
        if number is None or number in self._unsent or len(tensors) < len(found):
            _check_descriptors()
        if number is None:
            return Sent(bytes(ForkingPickler.dumps(batch)), os.getpid())
        slot = self._slots[number]
        for key, tensor in tensors.items():
            if key not in there:
                _tensor(slot, places[key]).copy_(tensor)
        memory = bytes(ForkingPickler.dumps(slot)) if number in self._unsent else None
        self._unsent.discard(number)
        buffer = io.BytesIO()
        _Pickler(buffer, places).dump(batch)
        slot[0] = 1
        return Sent(buffer.getvalue(), os.getpid(), number, memory)

    def _made_in_room(self, tensors: dict[int, torch.Tensor]) -> tuple[int | None, dict[int, int]]:
        """Return the slot that some of a batch's tensors were made in, and where these begin; None if none was."""
        number, self._room = self._room, None
        if number is None:
            return None, {}
        begins = {key: tensor.data_ptr() - self._slots[number].data_ptr() for key, tensor in tensors.items()}
        there = {key: begin for key, begin in begins.items() if 0 < begin < len(self._slots[number])}
        return (number, there) if there else (None, {})

    def _free(self, size: int) -> int | None:
        """Return the number of a free slot of `size` bytes, maybe a new one; None if there is none."""
        free = [number for number, slot in enumerate(self._slots) if not slot[0] and not self._is_made_in(number)]
        for number in free:
            if len(self._slots[number]) >= size:
                return number
        if not free and len(self._slots) == _MOST_SLOTS:
            return None
        try:
            memory = torch.UntypedStorage._new_shared(int(size * _GROWTH) if free else size)
        except RuntimeError:
            return None  # there may be enough for the batch alone; otherwise PyTorch describes what is missing
        slot = torch.empty(0, dtype=torch.uint8).set_(memory)
        if free:
            self._slots[free[0]] = slot
        else:
            self._slots.append(slot)
        number = free[0] if free else len(self._slots) - 1
        self._unsent.add(number)
        return number

    def _is_made_in(self, number: int) -> bool:
        return number in self._rooms and self._rooms[number]() is not None


_sender: Sender | None = None
"""Of a loader process."""


def start_sending() -> None:
    """Begin with what a loader process sends."""
    global _sender
    _sender = Sender()


def send(batch: Any) -> Sent:
    """Return a batch as this loader process sends it. Raises what PyTorch raises for one that cannot be."""
    assert _sender is not None
    return _sender.send(batch)


def room(shape: tuple[int, ...]) -> np.ndarray:
    """Return memory (uint8) for a part of the next batch, as `Sender.room` does in a loader process."""
    return np.empty(shape, np.uint8) if _sender is None else _sender.room(shape)


def _check_descriptors() -> None:
    """Raise OSError if this process has hardly any file descriptors left."""
    with contextlib.ExitStack() as stack:
        for _ in range(_SPARE_FILES):
            stack.callback(os.close, os.dup(0))


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
    part = memory[begin : begin + dtype.itemsize * math.prod(shape)]
    found = part if isinstance(part, torch.Tensor) else torch.from_numpy(part)
    return found.view(dtype).as_strided(shape, stride)


def _release(slot: np.ndarray, process: int) -> None:
    if os.getpid() == process:  # a forked process drops copies
        slot[0] = 0
