"""Random numbers computed from (seed, epoch, sample id), never from earlier draws."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

_GOLDEN, _ONE = np.uint64(0x9E3779B97F4A7C15), np.uint64(1)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_BY_30, _BY_27, _BY_31 = np.uint64(30), np.uint64(27), np.uint64(31)


def scramble(values: np.ndarray) -> np.ndarray:
    """Return a bijective mix of the uint64 `values`: the finaliser of SplitMix64.

    Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
    """
    mixed = values >> _BY_30
    mixed ^= values
    mixed *= _FIRST
    mixed ^= mixed >> _BY_27
    mixed *= _SECOND
    mixed ^= mixed >> _BY_31
    return mixed


def stream_of(seed: int, *parts: np.ndarray | int) -> np.ndarray:
    """Return uint64 numbers that depend on `seed` and on every part (integers or arrays of them, broadcast)."""
    state = np.array([seed & (2**64 - 1)], dtype=np.uint64)
    for part in parts:
        step = np.array(part, dtype=np.uint64, ndmin=1)  # scalars would warn about the intended overflow
        step += _ONE
        step *= _GOLDEN
        state = scramble(state + step)
    return state


def uniform(numbers: np.ndarray) -> np.ndarray:
    """Return uint64 `numbers` as float64 in [0, 1)."""
    return (numbers >> np.uint64(11)).astype(np.float64) * 2.0**-53


def below(numbers: np.ndarray, bound: np.ndarray | int) -> np.ndarray:
    """Return uint64 `numbers` as int64 in [0, bound), for bounds below 2**32."""
    return (((numbers >> np.uint64(32)) * np.asarray(bound).astype(np.uint64)) >> np.uint64(32)).astype(np.int64)


@contextmanager
def isolated_randomness() -> Iterator[None]:
    """Restore the global random states of Python, NumPy and PyTorch's CPU afterwards; other devices keep theirs."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def seed_globally(seed: int) -> None:
    """Seed the global generators of Python, NumPy and PyTorch's CPU; torch.manual_seed would reseed the GPUs too."""
    random.seed(seed)
    np.random.seed(seed & (2**32 - 1))
    torch.default_generator.manual_seed(seed & (2**63 - 1))
