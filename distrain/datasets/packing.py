"""Which conversations share a row of tokens. Imports no torch."""

from __future__ import annotations

import bisect

import numpy as np

from distrain.config import mix
from distrain.datasets.ragged import Ragged


def pack(lengths: np.ndarray, size: int, seed: int) -> Ragged:
    """Return the numbers of the documents in each pack, whose `lengths` (documents,) together are at most `size`.

    Best fit, the longest first: each goes where it leaves the least room. Documents of one length take turns by the
    seed. Depends on nothing else; each document is in one pack. Raises AssertionError for one longer than `size`.
    """
    assert not len(lengths) or lengths.max() <= size
    shuffled = np.random.Generator(np.random.PCG64(mix(seed, "pack"))).permutation(len(lengths))
    order = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
    packs: list[list[int]] = []
    rooms: list[int] = []  # the rooms that packs have left, sorted, each once
    having: dict[int, list[int]] = {}  # the packs with that room
    for document, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        at = bisect.bisect_left(rooms, length)
        if at == len(rooms):
            number, room = len(packs), size
            packs.append([])
        else:
            room = rooms[at]
            number = having[room].pop()
            if not having[room]:
                del having[room], rooms[at]
        packs[number].append(document)
        if (left := room - length) > 0:
            if left not in having:
                bisect.insort(rooms, left)
                having[left] = []
            having[left].append(number)
    counts = np.fromiter(map(len, packs), np.int64, len(packs))
    members = np.fromiter((document for each in packs for document in each), np.int64, len(lengths))
    return Ragged(members, np.cumsum(counts))
