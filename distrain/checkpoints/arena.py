"""Memory on the host that saves copy into. Imports no torch."""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np

LARGE = 1 << 20
"""Bytes from which on a range is copied, or left where it is, by itself; smaller ones are put together."""


class Source(Protocol):
    """A range of a tensor's elements, wherever they are."""

    @property
    def nbytes(self) -> int: ...
    def in_place(self) -> memoryview | None:
        """Return the bytes where they are; None where they do not lie one after the other on the host."""
        ...

    def to_host(self) -> memoryview:
        """Return the bytes on the host: where they are, or a copy."""
        ...


class Bytes:
    """A range that is on the host."""

    __slots__ = ("data", "nbytes")

    def __init__(self, data: memoryview | np.ndarray):
        view = data if isinstance(data, memoryview) else data.data
        self.data = view.cast("B") if data.nbytes else memoryview(b"")
        self.nbytes = data.nbytes

    def in_place(self) -> memoryview:
        return self.data

    def to_host(self) -> memoryview:
        return self.data


class Arena:
    """Memory that every save of a rank copies its share of the state into.

    It is allocated once, and anew only for a save that needs more. What the one save copied is gone with the next.
    """

    def __init__(self) -> None:
        self._memory: np.ndarray | None = None
        self._maker: threading.Thread | None = None
        self._failure: Exception | None = None
        self.allocations = 0
        """How often memory was allocated."""

    @property
    def nbytes(self) -> int:
        """Bytes of the memory."""
        return 0 if self._memory is None else self._memory.nbytes

    def reserve(self, nbytes: int) -> None:
        """Have a thread allocate the memory for saves of so many bytes, so that the first one need not."""
        if nbytes > self.nbytes and self._maker is None:
            self._maker = threading.Thread(target=self._try_to_make, args=(nbytes,), name="checkpoint-memory")
            self._maker.start()

    def close(self) -> None:
        """Free the memory."""
        self._join()
        self._free()

    def hold(
        self, sources: Sequence[Source], stay: Sequence[bool], *, keep: bool = True
    ) -> tuple[list[memoryview], Callable[[], None]]:
        """Begin to copy; return the bytes of all `sources`, end to end, and a function that waits until they are there.

        Large ones are left where they are if they may `stay` and are on the host. Until the device has made what was
        begun here, it begins nothing else that could change a source, and the host does not wait for it. Without `keep`
        memory that has to be allocated is given back with the returned views.
        """
        places = [s.in_place() if may and s.nbytes >= LARGE else None for s, may in zip(sources, stay, strict=True)]
        needed = sum(source.nbytes for source, place in zip(sources, places, strict=True) if place is None)
        self._join()
        if needed > self.nbytes and keep:
            self._free()
            self.reserve(needed)
            self._join()
            if self._failure is not None:
                raise self._failure
        memory = self._memory if self._memory is not None and self.nbytes >= needed else pages(needed)
        views: list[memoryview] = []
        run: list[Source] = []
        reached = 0

        def copy() -> None:
            nonlocal reached
            if run:
                room = memory[reached : reached + sum(source.nbytes for source in run)]
                self._copy(run, room, kept=memory is self._memory)
                views.append(room.data)
                reached += room.nbytes
                run.clear()

        for source, place in zip(sources, places, strict=True):
            if place is None:
                run.append(source)
            else:
                copy()
                views.append(place)
        copy()
        return views, self._copied()

    # ----------------------------------------------------------------------------------------------------------------
    # For what is elsewhere than on the host

    def _copy(self, sources: Sequence[Source], room: np.ndarray, *, kept: bool) -> None:
        """Begin to copy the sources end to end into `room` (bytes,), uint8, a part of the `kept` memory or of other."""
        import numpy as np  # looking at a checkpoint needs no array

        start = 0
        for source in sources:
            np.copyto(room[start : start + source.nbytes], np.frombuffer(source.to_host(), np.uint8))
            start += source.nbytes

    def _copied(self) -> Callable[[], None]:
        """Return a function that waits for what was begun."""
        return _nothing

    def _make(self, nbytes: int) -> np.ndarray:
        """Return new memory (bytes,), uint8, aligned to pages; in a thread of its own."""
        self.allocations += 1
        return pages(nbytes)

    def _free(self) -> None:
        self._memory = None

    # ----------------------------------------------------------------------------------------------------------------

    def _join(self) -> None:
        if self._maker is not None:
            self._maker.join()
            self._maker = None

    def _try_to_make(self, nbytes: int) -> None:
        self._failure = None
        try:
            self._memory = self._make(nbytes)
        except Exception as error:  # the save that needs it tries again, and raises it
            self._failure = error


def pages(nbytes: int) -> np.ndarray:
    """Return memory (bytes,), uint8, that is there: each of its pages has been written."""
    import numpy as np  # looking at a checkpoint needs no array

    memory = mmap.mmap(-1, max(nbytes, mmap.PAGESIZE))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a hint, which a kernel without huge pages refuses
            memory.madvise(mmap.MADV_HUGEPAGE)
    room = np.frombuffer(memory, np.uint8)
    room[:: mmap.PAGESIZE] = 0  # without the GIL
    return room


def _nothing() -> None:
    """Wait for nothing: what was copied is there."""
