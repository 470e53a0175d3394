"""Memory through which loader processes hand over batches: used again, and never while a batch is in use."""

from __future__ import annotations

import gc
import os
from typing import Any

import numpy as np
import pytest
import torch

from distrain.datasets.batches import Batches
from distrain.datasets.loading import PREFETCH, load
from distrain.datasets.slots import Receiver, Sender

LARGE = 20_000


def batch_of(value: int, numbers: int = LARGE) -> dict[str, Any]:
    inputs = torch.full((numbers // 100, 100), float(value))
    images = torch.arange(120).view(2, 3, 4, 5).contiguous(memory_format=torch.channels_last) + value
    return {
        "inputs": {"one": inputs, "same": inputs, "half": inputs.bfloat16(), "images": images},
        "targets": (torch.full((40_000,), value % 2 == 0), inputs.t()),  # the last is not contiguous
        "ids": torch.arange(4) + value,
        "texts": ["a", "b"],
    }


def assert_is(batch: dict[str, Any], value: int, numbers: int = LARGE) -> None:
    wanted = batch_of(value, numbers)
    assert batch["inputs"]["one"] is batch["inputs"]["same"]
    for name, tensor in wanted["inputs"].items():
        assert torch.equal(batch["inputs"][name], tensor)
        assert batch["inputs"][name].dtype == tensor.dtype
        assert batch["inputs"][name].stride() == tensor.stride()
    assert all(torch.equal(one, other) for one, other in zip(batch["targets"], wanted["targets"], strict=True))
    assert torch.equal(batch["ids"], wanted["ids"])
    assert batch["texts"] == wanted["texts"]


@pytest.mark.parametrize("held", [0, 3, 40])
def test_batches_that_are_in_use_are_never_written_over(held: int) -> None:
    sender, receiver = Sender(), Receiver()
    slots, kept = set(), []
    for value in range(held + 20):
        sent = sender.send(batch_of(value))
        slots.add(sent.slot)
        batch = receiver.receive(sent)
        assert_is(batch, value)
        if len(kept) < held:
            kept.append(batch)
    for value, each in enumerate(kept):
        assert_is(each, value)
    # a batch is still referred to while the next one is made
    assert len(slots - {None}) == min(held + 2, 32)


def test_a_part_of_a_batch_keeps_its_memory() -> None:
    sender, receiver = Sender(), Receiver()
    sent = sender.send(batch_of(1))
    part = receiver.receive(sent)["inputs"]["one"][3:5].numpy()
    gc.collect()
    assert sender.send(batch_of(2)).slot != sent.slot
    assert (part == 1).all()
    part[:] = 3  # the one who receives a batch may change it
    del part
    assert sender.send(batch_of(2)).slot == sent.slot


def test_a_slot_grows_with_the_batches() -> None:
    sender, receiver = Sender(), Receiver()
    for value, numbers in enumerate((LARGE, LARGE + 100, LARGE + 200, 3 * LARGE, LARGE)):
        sent = sender.send(batch_of(value, numbers))
        assert sent.slot == 0
        assert (sent.memory is None) == (value in (2, 4))
        assert_is(receiver.receive(sent), value, numbers)


def made_in_room(sender: Sender, value: int, count: int = 30) -> dict[str, Any]:
    images = torch.from_numpy(sender.room((count, 40, 40, 3)).transpose(0, 3, 1, 2))
    return {"inputs": images.fill_(value), "targets": torch.arange(count) + value, "ids": torch.arange(count)}


def assert_was_made_in_room(batch: dict[str, Any], value: int, count: int = 30) -> None:
    assert batch["inputs"].shape == (count, 3, 40, 40)
    assert batch["inputs"].is_contiguous(memory_format=torch.channels_last)
    assert (batch["inputs"] == value).all()
    assert torch.equal(batch["targets"], torch.arange(count) + value)
    assert torch.equal(batch["ids"], torch.arange(count))


def test_a_batch_is_made_where_it_is_sent() -> None:
    sender, receiver = Sender(), Receiver()
    for value in range(5):
        batch = made_in_room(sender, value)
        sent = sender.send(batch)
        batch["inputs"].fill_(value + 1)  # nothing was copied, so the receiver finds this
        received = receiver.receive(sent)
        assert (received["inputs"] == value + 1).all()
        assert torch.equal(received["targets"], batch["targets"])


def test_memory_in_which_a_batch_was_made_is_used_again_once_nobody_refers_to_it() -> None:
    sender, receiver = Sender(), Receiver()
    used = set()
    for value in range(10):
        sent = sender.send(made_in_room(sender, value))
        used.add(sent.slot)
        assert_was_made_in_room(receiver.receive(sent), value)
    assert used == {0}
    kept = made_in_room(sender, 3)
    assert_was_made_in_room(receiver.receive(sender.send(kept)), 3)
    for value in range(10, 20):
        assert_was_made_in_room(receiver.receive(sender.send(made_in_room(sender, value))), value)
    assert_was_made_in_room(kept, 3)


def test_room_that_is_left_or_does_not_do_is_no_loss() -> None:
    sender, receiver = Sender(), Receiver()
    failed = made_in_room(sender, 1)  # a sample was corrupt, and the batch is made again
    assert_was_made_in_room(receiver.receive(sender.send(made_in_room(sender, 2))), 2)
    assert_was_made_in_room(failed, 1)
    one, other = made_in_room(sender, 3), made_in_room(sender, 4)  # two parts of a batch
    both = receiver.receive(sender.send([one, other]))
    assert_was_made_in_room(both[0], 3)
    assert_was_made_in_room(both[1], 4)
    made_in_room(sender, 5)
    assert_is(receiver.receive(sender.send(batch_of(6))), 6)  # which has no part in it
    large = made_in_room(sender, 7) | {"more": torch.arange(10**6)}  # for which the slot is too small
    found = receiver.receive(sender.send(large))
    assert_was_made_in_room(found, 7)
    assert torch.equal(found["more"], torch.arange(10**6))
    # while all slots are in use
    held = [receiver.receive(sender.send(made_in_room(sender, value))) for value in range(40)]
    for value, batch in enumerate(held):
        assert_was_made_in_room(batch, value)


def test_a_forked_process_frees_nothing() -> None:
    sender, receiver = Sender(), Receiver()
    sent = sender.send(batch_of(1))
    batch = receiver.receive(sent)
    if (child := os.fork()) == 0:
        del batch
        gc.collect()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert sender.send(batch_of(2)).slot != sent.slot
    assert_is(batch, 1)


class Large:
    """Samples of which a batch takes 160 kB."""

    def __len__(self) -> int:
        return 1000

    def fetch(self, ids: np.ndarray) -> dict[str, Any]:
        return {"inputs": torch.from_numpy(ids)[:, None].repeat(1, 5000), "ids": torch.from_numpy(ids)}


def files_of_shared_memory() -> set[str]:
    """Return the shared files of PyTorch that this process maps, by inode."""
    with open("/proc/self/maps") as maps:
        return {line.split()[4] for line in maps if "/dev/shm/torch_" in line}


def test_loader_processes_make_few_files_for_many_batches() -> None:
    workers, before = 2, files_of_shared_memory()
    places = [(np.zeros(4, np.int64), np.arange(start, start + 4)) for start in range(0, 240, 4)]
    seen: set[str] = set()
    for batch, (_, ids) in zip(load(Batches(Large(), None), places, workers, False), places, strict=True):
        assert torch.equal(batch["inputs"], torch.from_numpy(ids)[:, None].repeat(1, 5000))
        seen |= files_of_shared_memory() - before
    # of each process: those ahead, the one that is used, and the one before it
    assert 0 < len(seen) <= workers * (PREFETCH + 2)
    del batch
    gc.collect()
    assert files_of_shared_memory() <= before
