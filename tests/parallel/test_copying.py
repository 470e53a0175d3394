"""Batches are copied to a GPU on a stream of their own, counted on streams that only note what they are asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from distrain.parallel.copying import CopyStream


class Events:
    """Stands for `torch.cuda`: notes the calls in order, and says how far the device has come."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.finished = 0
        """How many batches the device is done with."""
        self.recorded = 0
        self.now = self.compute = Stream(self, "compute")

    def Stream(self, device: Any) -> Stream:
        return Stream(self, "copies")

    def Event(self) -> Event:
        return Event(self)

    def current_stream(self, device: Any) -> Stream:
        return self.now

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.now = self.now, stream
        yield
        self.now = before


class Stream:
    """A stream that runs nothing."""

    def __init__(self, cuda: Events, name: str):
        self.cuda, self.name = cuda, name

    def wait_stream(self, other: Stream) -> None:
        self.cuda.calls.append(f"{self.name} waits for {other.name}")

    def synchronize(self) -> None:
        raise AssertionError("the host may not wait")


class Event:
    """An event that the device reaches when the test says so."""

    def __init__(self, cuda: Events):
        self.cuda = cuda

    def record(self, stream: Stream) -> None:
        self.cuda.recorded += 1
        self.number = self.cuda.recorded
        self.cuda.calls.append(f"{stream.name} reaches the end of batch {self.number}")

    def query(self) -> bool:
        return self.number <= self.cuda.finished

    def synchronize(self) -> None:
        raise AssertionError("the host may not wait")


class Pinned:
    """A tensor whose copy notes where it was made, and who uses it."""

    def __init__(self, cuda: Events, name: str):
        self.cuda, self.name = cuda, name

    def to(self, device: Any, non_blocking: bool = False) -> Pinned:
        assert non_blocking
        self.cuda.calls.append(f"{self.cuda.now.name}: copy {self.name}")
        return self

    def record_stream(self, stream: Stream) -> None:
        self.cuda.calls.append(f"{stream.name} uses {self.name}")


def copied(copies: CopyStream, cuda: Events, *names: str) -> list[str]:
    """Copy a batch of such tensors; returns the calls."""
    cuda.calls.clear()
    with copies.batch() as copy:
        for name in names:
            copy(Pinned(cuda, name))  # type: ignore[arg-type]
    return list(cuda.calls)


def test_a_batch_is_copied_beside_the_kernels() -> None:
    cuda = Events()
    copies = CopyStream(torch.device("cuda"), cuda)
    there = ["copies: copy inputs", "copies: copy targets", "compute waits for copies"]
    there += ["compute uses inputs", "compute uses targets"]
    assert copied(copies, cuda, "inputs", "targets") == there
    assert copied(copies, cuda, "inputs", "targets") == ["compute reaches the end of batch 1", *there]


def test_a_host_that_is_far_ahead_takes_no_more_memory() -> None:
    cuda = Events()
    copies = CopyStream(torch.device("cuda"), cuda)
    beside = ["copies: copy x" in copied(copies, cuda, "x") for _ in range(8)]
    assert beside == [True, True, True, False, False, False, False, False]  # the device computes with the first
    assert cuda.recorded == 3, "what was copied in line has no end to wait for"
    cuda.finished = 2
    assert ["copies: copy x" in copied(copies, cuda, "x") for _ in range(4)] == [True, True, False, False]
    cuda.finished = 9
    assert "copies: copy x" in copied(copies, cuda, "x")


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    device = torch.device("cuda", 0)
    copies = CopyStream(device)
    host = [torch.randint(0, 255, (2**22,), dtype=torch.uint8).pin_memory() for _ in range(6)]
    weights = torch.randn(4096, 4096, device=device)
    sums: list[Tensor] = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        for each in host:
            for _ in range(20):
                weights @ weights  # the host is ahead
            with copies.batch() as copy:
                there = copy(each)
            sums.append(there.long().sum())
            del there
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [each.item() for each in sums] == [each.long().sum().item() for each in host]
