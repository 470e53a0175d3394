"""Copies of batches to a GPU beside the kernels that are under way."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

SMALLEST = 2**20
"""Bytes from which a stream of its own pays: less is copied in the time that a stream takes to wait for another."""
_AHEAD = 3
"""Batches on the device that kernels still compute with. The host may be far ahead, as in an evaluation: what it copies
then goes in line with the kernels, where memory is used again as they finish, and not all of a split at once."""


class CopyStream:
    """A CUDA stream that copies from pinned memory while another one computes. The host waits for neither.

    The host is a step ahead of the device, so a batch is copied while the device computes with the one before.
    """

    def __init__(self, device: torch.device, cuda: Any = torch.cuda):
        """`cuda` is `torch.cuda`, or what stands for it in a test."""
        self._device, self._cuda = device, cuda
        self._stream = cuda.Stream(device)
        self._in_use: deque[Any] = deque()
        """For each batch that was copied here, what happens when the kernels are done with it."""
        self._last = False
        """Whether the batch before was copied here."""

    @staticmethod
    def takes(batch: Sequence[Tensor]) -> bool:
        """Whether a batch of such tensors is worth it, and can be copied while the host continues."""
        return sum(each.nbytes for each in batch) >= SMALLEST and all(each.is_pinned() for each in batch)

    @contextmanager
    def batch(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """Copy a batch in this block, with the function that it gives; then kernels may be given its tensors.

        All kernels that compute with the batch before must have been given to the device already.
        """
        compute = self._cuda.current_stream(self._device)
        if self._last:
            done = self._cuda.Event()
            done.record(compute)
            self._in_use.append(done)
        while self._in_use and self._in_use[0].query():
            self._in_use.popleft()
        self._last = len(self._in_use) < _AHEAD
        if not self._last:
            yield self._copy
            return
        copies: list[Tensor] = []

        def copy(values: Tensor) -> Tensor:
            copies.append(self._copy(values))
            return copies[-1]

        with self._cuda.stream(self._stream):
            yield copy
        compute.wait_stream(self._stream)
        for each in copies:
            # its memory is of this stream, which may use it again only when the kernels are done with it
            each.record_stream(compute)

    def _copy(self, values: Tensor) -> Tensor:
        return values.to(self._device, non_blocking=True)
