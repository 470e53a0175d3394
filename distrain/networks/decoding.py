"""Text from a model, token by token: how a token is chosen, and what a model offers so that rows can grow together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distrain.config import UserError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from a model's logits."""

    temperature: float = 0.0
    """Logits are divided by it; 0 takes the likeliest token."""
    top_p: float = 1.0
    """Only the likeliest tokens that together have this probability are drawn (Holtzman et al. 2020)."""
    top_k: int | None = None
    """Only so many of the likeliest tokens are drawn; None: all."""

    def choose(self, logits: Tensor, draws: Tensor) -> Tensor:
        """Return the next tokens (batch,) int64 for `logits` (batch, vocabulary).

        `draws` (batch,), in [0, 1): the token at that place of its row's cumulative distribution, in the order of the
        vocabulary, is taken. So a row's token depends on its own logits and number alone.
        """
        if self.temperature == 0:
            chosen = logits.argmax(dim=-1)
        else:
            logits = logits.double() / self.temperature
            if self.top_k is not None and self.top_k < logits.shape[-1]:
                least = logits.topk(self.top_k, dim=-1).values[:, -1:]
                logits = logits.masked_fill(logits < least, float("-inf"))
            shares = logits.softmax(dim=-1)
            if self.top_p < 1:
                ordered = shares.sort(dim=-1, descending=True).values
                before = ordered.cumsum(dim=-1) - ordered
                least = ordered.masked_fill(before >= self.top_p, 2.0).amin(dim=-1, keepdim=True)
                shares = shares.masked_fill(shares < least, 0.0)
            sums = shares.cumsum(dim=-1)
            places = draws.to(sums)[:, None] * sums[:, -1:]
            chosen = torch.searchsorted(sums, places, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
        return chosen.masked_fill(logits.isnan().any(dim=-1), -1)


class Decoder(ABC):
    """Rows of tokens that grow by one token a step, and what a model says comes next in each.

    A row's logits depend on its own tokens: not on the other rows, but for the rounding of their common arithmetic.
    """

    slid = False
    """Whether a row's context was full, and its beginning is no longer seen."""

    @abstractmethod
    def begin(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Read the rows, each of at least one token; returns the logits after each, (batch, vocabulary)."""

    @abstractmethod
    def advance(self, tokens: Sequence[int]) -> Tensor:
        """Append a token to each row; returns the logits after it, (batch, vocabulary)."""

    @abstractmethod
    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these."""


@torch.no_grad()
def decode(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    accept: Callable[[int, int], bool],
    sampling: Sampling,
    draws: Callable[[int], Tensor],
) -> None:
    """Continue each prompt until `accept(row, token)` says that it is done; a row that is done costs nothing more.

    `draws(step)`: a number in [0, 1) for each prompt (prompts,). Raises UserError where a model gives NaN.
    """
    rows = list(range(len(prompts)))
    logits = decoder.begin(prompts) if rows else torch.empty(0)
    step = 0
    while rows:
        tokens = checked(sampling.choose(logits, draws(step)[rows]))
        going = [at for at, row in enumerate(rows) if not accept(row, tokens[at])]
        if not going:
            return
        if len(going) < len(rows):
            decoder.keep(going)
            rows = [rows[at] for at in going]
        logits = decoder.advance([tokens[at] for at in going])
        step += 1


def checked(tokens: Tensor) -> list[int]:
    """Return what `Sampling.choose` has chosen, on the host; raises UserError for logits that are NaN."""
    chosen: list[int] = tokens.tolist()
    if -1 in chosen:
        raise UserError("the model gives NaN in place of the next token's logits; its weights or its precision are bad")
    return chosen


class PlainDecoder(Decoder):
    """A language model that keeps nothing: every token reads the whole text again, which is slow for long ones."""

    def __init__(self, forward: Callable[[Tensor], Tensor], seq_len: int, device: torch.device):
        """`forward`: logits (batch, seq, vocabulary) for tokens (batch, seq). `seq_len`: as many as it can read."""
        self._forward, self._seq_len, self._device = forward, seq_len, device
        self._contexts: list[list[int]] = []

    def begin(self, rows: Sequence[Sequence[int]]) -> Tensor:
        self._contexts = [list(row) for row in rows]
        return self._logits()

    def advance(self, tokens: Sequence[int]) -> Tensor:
        for row, token in enumerate(tokens):
            context = [*self._contexts[row], token]
            if len(context) > self._seq_len:
                context = context[-max(1, self._seq_len // 2) :]
                self.slid = True
            self._contexts[row] = context
        return self._logits()

    def keep(self, rows: Sequence[int]) -> None:
        self._contexts = [self._contexts[row] for row in rows]

    def _logits(self) -> Tensor:
        tokens, lengths = padded_at_end(self._contexts, 0, self._device)
        return self._forward(tokens)[torch.arange(len(tokens), device=self._device), lengths - 1]


class PlainPairDecoder(Decoder):
    """A model of pairs that keeps nothing: rows are sources, and every token reads source and target again."""

    def __init__(
        self, forward: Callable[[Mapping[str, Tensor]], Tensor], pad_id: int, bos_id: int, device: torch.device
    ):
        """`forward`: logits (batch, target seq, vocabulary) for {"source": …, "target": …}, each (batch, seq)."""
        self._forward, self._pad_id, self._bos_id, self._device = forward, pad_id, bos_id, device
        self._pair: dict[str, Any] = {}

    def begin(self, rows: Sequence[Sequence[int]]) -> Tensor:
        source, _ = padded_at_end(rows, self._pad_id, self._device)
        self._pair = {"source": source, "target": source.new_full((len(rows), 1), self._bos_id)}
        return self._forward(self._pair)[:, -1]

    def advance(self, tokens: Sequence[int]) -> Tensor:
        new = torch.tensor(tokens, device=self._device)[:, None]
        self._pair["target"] = torch.cat([self._pair["target"], new], dim=1)
        return self._forward(self._pair)[:, -1]

    def keep(self, rows: Sequence[int]) -> None:
        index = torch.tensor(rows, device=self._device)
        self._pair = {key: each[index] for key, each in self._pair.items()}


def padded_at_end(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return rows as (batch, longest) int64 and their lengths (batch,) int64."""
    tensors = [torch.tensor(row, dtype=torch.int64) for row in rows]
    tokens = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=pad_id)
    return tokens.to(device), torch.tensor([len(row) for row in rows], device=device)
