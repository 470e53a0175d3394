"""The endless order of samples, computed from (seed, epoch, position)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from distrain.config import UserError, mix
from distrain.datasets.batches import Place
from distrain.datasets.randomness import stream_of


@dataclass(frozen=True)
class SampleOrder:
    """The endless order of samples: position p is place p % length of epoch p // length.

    Each epoch is a permutation of its own, computed for any place without the places before it: a Feistel network
    keyed by (seed, epoch) over the smallest domain of h * 2**k numbers that holds the epoch, applied again to the few
    results outside the epoch (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). Nothing is stored, so
    position 10**15 costs as much as the first.
    """

    length: int
    """Samples in an epoch, up to 2**62."""
    seed: int
    """The recipe's seed."""
    shuffle: bool = True
    """False keeps the samples in their own order."""

    def __post_init__(self) -> None:
        if self.length < 1:
            raise UserError("the training split has no samples")

    def at(self, start: int, stop: int) -> Place:
        """Return (epochs, ids), int64, of the positions [start, stop), up to 2**62."""
        return self.at_positions(np.arange(start, stop, dtype=np.int64))

    def at_positions(self, positions: np.ndarray) -> Place:
        """Return (epochs, ids), int64, of `positions`, which are int64 of any shape and ascending."""
        if positions.size == 0:
            return positions.copy(), positions.copy()
        flat = positions.reshape(-1)
        epoch = int(flat[0]) // self.length
        row: np.ndarray | None = None
        if epoch == int(flat[-1]) // self.length:
            epochs, places, runs = np.full_like(flat, epoch), flat - epoch * self.length, np.array([epoch])
        else:
            epochs, places = np.divmod(flat, self.length)
            begins = np.concatenate([[True], epochs[1:] != epochs[:-1]])
            runs, row = epochs[begins], np.cumsum(begins) - 1
        if self.shuffle and self.length > 1:
            places = self._permuted(places.astype(np.uint64), runs, row).astype(np.int64)
        return epochs.reshape(positions.shape), places.reshape(positions.shape)

    def _permuted(self, values: np.ndarray, runs: np.ndarray, row: np.ndarray | None) -> np.ndarray:
        """Permute `values` (n,) uint64, each under the key of epoch runs[row[i]] (runs[0] where row is None)."""
        # small halves mix little in a round, and rounds are cheap in a short epoch
        bits = (self.length - 1).bit_length()
        rounds = max(6, 24 - bits)
        keys = stream_of(mix(self.seed, "order"), runs[:, None], np.arange(rounds))
        shift = bits // 2
        height = -(-self.length >> shift)
        values = _feistel(values, keys, row, shift, height)
        outside = np.flatnonzero(values >= self.length)
        while outside.size:
            values[outside] = _feistel(values[outside], keys, None if row is None else row[outside], shift, height)
            outside = outside[values[outside] >= self.length]
        return values


def _feistel(values: np.ndarray, keys: np.ndarray, row: np.ndarray | None, shift: int, height: int) -> np.ndarray:
    """Permute uint64 `values` in [0, height * 2**shift): a low part of `shift` bits, a high one below `height`."""
    multiplier, half = np.uint64(0xD6E8FEB86659FD93), np.uint64(32)
    high, low = values >> np.uint64(shift), values & np.uint64((1 << shift) - 1)
    size = np.uint64(height)
    for number in range(keys.shape[1]):
        key = keys[0, number] if row is None else keys[row, number]
        mixed = (high if number % 2 else low) ^ key
        mixed *= multiplier
        mixed ^= mixed >> half
        mixed *= multiplier
        if number % 2:
            if shift:
                mixed >>= np.uint64(64 - shift)
                low = low ^ mixed
            continue
        mixed >>= half
        mixed *= size
        mixed >>= half
        mixed += high
        # the sum is below 2 * size; below size, the difference wraps around to a larger number
        high = np.minimum(mixed, mixed - size)
    return (high << np.uint64(shift)) | low
