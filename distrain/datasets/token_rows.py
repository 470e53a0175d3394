"""Rows of tokens of one length, copied from memory-mapped shards, whole batches at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from distrain.datasets.base import Batch

_NOWHERE = -(2**62)
"""Makes any place an index out of range."""


class TokenRows:
    """Rows of `seq_len` tokens and the next one, of the concatenation of `shards`, each (tokens,).

    NumPy copies the rows of a batch in one call, whichever shards they are in: they are items of one array that covers
    the memory from the first shard to the last, an item beginning at each byte. The few rows that continue in the next
    shard are joined one by one.
    """

    bytes_per_token: float | None = None
    """Bytes of text for each token, where the split has a text of its own."""

    def __init__(self, shards: Sequence[np.ndarray], seq_len: int, spans: Sequence[range]):
        """`spans`: the row numbers of this split, in order."""
        self._shards, self._seq_len, self._spans = shards, seq_len, spans
        self._dtype = shards[0].dtype
        self._ends = np.cumsum([len(shard) for shard in shards])
        """In tokens, of the concatenation."""
        lengths = np.array([len(span) for span in spans], dtype=np.int64)
        self._span_ends = np.cumsum(lengths)
        self._shifts = np.array([span.start for span in spans], dtype=np.int64) - (self._span_ends - lengths)
        """An id of each span plus this is its row number."""
        self._row_bytes = seq_len * self._dtype.itemsize
        self._firsts, self._offsets, self._memory = self._places()

    def __reduce__(self) -> Any:
        return TokenRows, (self._shards, self._seq_len, self._spans)  # the memory between the shards is not ours

    def __len__(self) -> int:
        return int(self._span_ends[-1])

    def fetch(self, ids: np.ndarray) -> Batch:
        places = ids * self._row_bytes
        if self._offsets is not None:
            places += self._offsets[self._firsts.searchsorted(ids, "right")]
        try:
            rows = self._memory[places]
        except IndexError:
            rows = self._joined(ids, places)
        # one conversion of both: what begins with the first token of each row, and with the second
        shape, size = (2, len(ids), self._seq_len), self._dtype.itemsize
        both = np.ndarray(shape, self._dtype, rows, 0, (size, self._row_bytes + size, size))
        tokens = both.astype(np.int64, order="C")
        return {
            "inputs": torch.from_numpy(tokens[0]),
            "targets": torch.from_numpy(tokens[1]),
            "ids": torch.from_numpy(ids),
        }

    def _places(self) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
        """Return `firsts`, `offsets` and the memory: id i begins at its byte i * row_bytes + offsets[k] where k firsts
        are at most i, or out of it if the row continues in the next shard; without offsets at byte i * row_bytes.
        """
        addresses = np.array([shard.__array_interface__["data"][0] for shard in self._shards], dtype=np.int64)
        sizes = np.array([shard.nbytes for shard in self._shards], dtype=np.int64)
        begins = self._ends - sizes // self._dtype.itemsize
        # rows first..past-1 are in a shard whole, and row past continues in the next one
        first = -(-begins // self._seq_len)
        past = np.maximum((self._ends - 1) // self._seq_len, first)
        rows = np.stack([first, past], axis=1).reshape(-1)
        one = len(self._shards) == len(self._spans) == 1
        lowest = int(addresses.min()) + (self._spans[0].start * self._row_bytes if one else 0)
        memory = _memory(self._shards, lowest, int((addresses + sizes).max()), self._row_bytes + self._dtype.itemsize)
        if one and len(memory):
            return rows, None, memory
        firsts, offsets = [], [np.array([_NOWHERE])]
        inside = addresses - lowest - begins * self._dtype.itemsize if len(memory) else np.full(len(first), _NOWHERE)
        for span, shift in zip(self._spans, self._shifts.tolist(), strict=True):
            firsts.append(rows.clip(span.start, span.stop) - shift)
            whole = inside + shift * self._row_bytes
            offsets.append(np.stack([whole, np.full_like(whole, _NOWHERE)], axis=1).reshape(-1))
        return np.concatenate(firsts), np.concatenate(offsets), memory

    def _joined(self, ids: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Return the rows (batch, seq_len + 1) of a batch of which some continue in the next shard."""
        tokens = np.empty((len(ids), self._seq_len + 1), self._dtype)
        whole = places >= 0
        tokens[whole] = self._memory[places[whole]].view(self._dtype).reshape(-1, self._seq_len + 1)
        for row in (~whole).nonzero()[0].tolist():
            number = int(ids[row] + self._shifts[self._span_ends.searchsorted(ids[row], "right")])
            tokens[row] = self._across(number * self._seq_len)
        return tokens

    def _across(self, begin: int) -> np.ndarray:
        """Return the row that begins with token `begin` of the concatenation."""
        home = int(self._ends.searchsorted(begin, "right"))
        parts = [self._shards[home][begin - int(self._ends[home]) :][: self._seq_len + 1]]
        while missing := self._seq_len + 1 - sum(map(len, parts)):
            home += 1
            parts.append(self._shards[home][:missing])
        return np.concatenate(parts)


class _Addressed:
    """What NumPy asks for an array over memory; keeps alive what owns it."""

    def __init__(self, owners: Sequence[np.ndarray], interface: dict[str, Any]):
        self.owners = owners
        self.__array_interface__ = interface


def _memory(owners: Sequence[np.ndarray], begin: int, end: int, size: int) -> np.ndarray:
    """Return the memory from the address `begin` to `end` as items of `size` bytes, read-only, one at each byte.

    Between the arrays that own parts of it there may be nothing, so only items inside of one may be read. Empty if
    NumPy does not number so many bytes.
    """
    count = max(0, end - begin - size + 1)
    if count * size >= 2**63:
        count = 0
    interface = {"version": 3, "typestr": f"|V{size}", "shape": (count,), "strides": (1,), "data": (begin, True)}
    return np.asarray(_Addressed(owners, interface))
