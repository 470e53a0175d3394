"""Random numbers that depend on the sample: the same on any number of processes and at any micro-batch.

They are those of Philox4x32-10, a generator without a state (Salmon et al., "Parallel Random Numbers: As Easy as
1, 2, 3", 2011): what a sample gets is computed from (seed, step, number of the draw) as the key, and from the sample's
place in the global batch and the place in its row as the counter, all samples at once and without waiting for the
device.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distrain.config import UserError, mix
from distrain.system.compiler import compiler_imported

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def randn_like(tensor: Tensor) -> Tensor:
    """Return standard normal numbers in the shape of `tensor` (samples, ...): the same for a sample in any world.

    For `losses` of a task and for the forward pass of a model, in place of `torch.randn_like`. In a step, what a sample
    gets depends on the recipe's seed, the step, the sample's place in the global batch and how many draws came before,
    and not on the process, the micro-batch or a resume; in an evaluation on the seed and the sample's id. Along the
    second dimension, rows may be longer or shorter: what stands before is the same. Outside of a run it is
    `torch.randn_like`. Raises UserError for a tensor that has no row for each sample of the micro-batch.
    """
    bits = _bits(tensor, "randn_like")
    if bits is None:
        return torch.randn_like(tensor)
    dtype = _working(tensor)
    # Box and Muller: two independent normal numbers of two uniform ones
    radius = ((bits[..., 0::2].to(dtype) + 0.5) * 2.0**-32).log_().mul_(-2).clamp_(min=0).sqrt_()
    angle = bits[..., 1::2].to(dtype) * (2 * math.pi * 2.0**-32)
    return _shaped(torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1).flatten(-2), tensor)


def rand_like(tensor: Tensor) -> Tensor:
    """Return uniform numbers in [0, 1), in the shape of `tensor` (samples, ...); as `randn_like` draws them."""
    bits = _bits(tensor, "rand_like")
    return torch.rand_like(tensor) if bits is None else _shaped(_uniform(bits, _working(tensor)), tensor)


def randint_like(tensor: Tensor, low: int, high: int | None = None) -> Tensor:
    """Return int64 from [low, high), or [0, low), in the shape of `tensor` (samples, ...); as `randn_like` draws them.

    There may be up to 2**31 numbers; the probability of each differs from that of another by at most 2**-32. Raises
    UserError for an empty range.
    """
    low, high = (0, low) if high is None else (low, high)
    if not 0 < high - low <= 2**31:
        raise UserError(
            f"distrain.randint_like: from {low} to below {high} there are {high - low:,} numbers; 1 to 2**31"
        )
    bits = _bits(tensor, "randint_like")
    if bits is None:
        return torch.randint_like(tensor, low, high, dtype=torch.int64)
    return ((bits * (high - low)) >> 32).add_(low).flatten(1)[:, : _numbers(tensor)].reshape(tensor.shape)


def bernoulli(probability: Tensor) -> Tensor:
    """Return 1 with `probability` (samples, ...), otherwise 0, in its dtype; as `randn_like` draws them."""
    if not probability.is_floating_point():
        raise UserError(f"distrain.bernoulli was given {probability.dtype}; expected probabilities (samples, ...)")
    bits = _bits(probability, "bernoulli")
    if bits is None:
        return torch.bernoulli(probability)
    uniform = _uniform(bits, _working(probability)).flatten(1)[:, : _numbers(probability)]
    return (uniform.reshape(probability.shape) < probability).to(probability.dtype)


# --------------------------------------------------------------------------------------------------------------------
# For which samples


class Samples:
    """The samples of a forward pass: what they draw."""

    def __init__(self, count: int, first: int | Tensor, *key: int | str):
        """`first`: the place of the first of `count` samples in the global batch, or the ids (count,) of all."""
        self.count, self._first, self._key = count, first, key
        self._tickets: dict[int, int] = {}

    def draw(self) -> int:
        """Return the key of the next draw; of an earlier one again, where a forward pass is made again for gradients.

        That is known by PyTorch's generator, which is set back then (activation checkpointing).
        """
        ticket = int(torch.empty((), dtype=torch.int64, device="cpu").random_())
        return mix(*self._key, self._tickets.setdefault(ticket, len(self._tickets)))

    def places(self, device: torch.device) -> Tensor:
        """Return (count,) int64, from 0."""
        if isinstance(self._first, int):
            return torch.arange(self._first, self._first + self.count, device=device)
        return self._first.to(device, non_blocking=True).clamp(min=0)


_samples: Samples | None = None


def of_step(seed: int, step: int, first: int, count: int, turn: int = 0) -> None:
    """Have what follows draw for `count` samples of an optimizer's turn in a step, from place `first` on."""
    _begin(Samples(count, first, seed, "noise", step, turn))


def of_evaluation(seed: int, ids: Tensor) -> None:
    """Have what follows draw for the samples `ids` (batch,) of an evaluation or a prediction.

    `ids` are on the host. What draws from the generators of PyTorch, Python and NumPy has the same numbers whenever a
    batch of these samples is evaluated: they are not those that come after a step, or after what a resume has done.
    """
    seed_evaluation(seed, int(ids[0]))
    _begin(Samples(len(ids), ids, seed, "noise of an evaluation"))


def seed_evaluation(seed: int, first: int) -> None:
    """Seed what a forward pass of an evaluation draws, by the id of its first sample."""
    cuda = torch.cuda.is_initialized()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    seed_generators(mix(seed, "drawn in an evaluation", first, *_others), device)


_others: tuple[str, ...] = ()
"""Tells the numbers that are drawn from those of an evaluation."""


@contextmanager
def other_draws(name: str) -> Iterator[None]:
    """Have evaluations within draw other numbers than elsewhere: what differs with them is random."""
    global _others
    _others = (name,)
    try:
        yield
    finally:
        _others = ()


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed every generator that a model may draw from; `torch.manual_seed`, which visits all devices, costs more."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
    # layers that are dropped at random, in transformers and elsewhere, often draw from these
    random.seed(seed)
    np.random.seed(seed % 2**32)


@contextmanager
def evaluating(seed: int, ids: Tensor) -> Iterator[None]:
    """Have what is within draw for the samples `ids` (batch,)."""
    of_evaluation(seed, ids)
    try:
        yield
    finally:
        of_nothing()


def of_nothing() -> None:
    """Have what follows draw from PyTorch's own generators, as outside of a run."""
    global _samples
    _samples = None


def _begin(samples: Samples) -> None:
    global _samples, _bits
    _samples = samples
    if compiler_imported() and not hasattr(_bits, "_torchdynamo_orig_callable"):
        import torch._dynamo

        _bits = torch._dynamo.disable(_bits)  # keys change with each step, and would be part of a graph


# --------------------------------------------------------------------------------------------------------------------
# Numbers


def _bits(tensor: Tensor, name: str) -> Any:
    """Return (samples, blocks, 4) int64 of 32 random bits each, enough for a row of `tensor`; None outside of a run."""
    samples = _samples
    if samples is None:
        return None
    if tensor.dim() == 0 or len(tensor) != samples.count:
        raise UserError(
            f"distrain.{name} was given a tensor {tuple(tensor.shape)} for {samples.count} samples; expected one "
            "with a row for each sample of the micro-batch"
        )
    key = samples.draw()
    places = samples.places(tensor.device)[:, None]
    blocks = torch.arange(-(-_numbers(tensor) // 4), device=tensor.device)[None]
    counter = (blocks & _MASK, places & _MASK, (places >> 32) & _MASK, blocks >> 32)
    return torch.stack(torch.broadcast_tensors(*philox(counter, (key & _MASK, key >> 32))), dim=-1)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Return four int64 tensors of 32 random bits for four of 32 bits each, which can be broadcast together."""
    a, b, c, d = counter
    left, right = key
    for _ in range(_ROUNDS):
        one, other = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]  # they wrap around at 64 bits, which are all there
        a, b, c, d = (
            ((other >> 32) & _MASK) ^ b ^ left,
            other & _MASK,
            ((one >> 32) & _MASK) ^ d ^ right,
            one & _MASK,
        )
        left, right = (left + _WEYL[0]) & _MASK, (right + _WEYL[1]) & _MASK
    return a, b, c, d


def _numbers(tensor: Tensor) -> int:
    """Return how many numbers a row has."""
    return math.prod(tensor.shape[1:])


def _working(tensor: Tensor) -> torch.dtype:
    if not tensor.is_floating_point():
        raise UserError(f"distrain draws floats like a tensor of floats, and was given {tensor.dtype}")
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _uniform(bits: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == torch.float64:
        return bits.to(dtype) * 2.0**-32
    return (bits >> 8).to(dtype) * 2.0**-24  # all 32 bits would round up to 1


def _shaped(values: Tensor, like: Tensor) -> Tensor:
    """Return values (samples, blocks, 4) in the shape and dtype of a tensor."""
    return values.flatten(1)[:, : _numbers(like)].reshape(like.shape).to(like.dtype)
