"""`gpt`: a decoder-only language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn

from distrain.config import UserError
from distrain.config.registry import models
from distrain.networks.annotations import Share, Size
from distrain.networks.attention import Block, Cache, causal_mask, check_heads, init_transformer, rotary
from distrain.networks.decoding import Decoder, Sampling, decode, padded_at_end


@models.register("gpt", tasks=("language_modeling",))
class GPT(nn.Module):
    """A decoder-only transformer that predicts the next token (GPT-2's architecture).

    `n_layer`, `n_head`, `d_model`: its size; `d_ff`: width within a block, by default 4 * d_model. `seq_len`: its
    context length. `positions`: "learned" or "rotary". `tied`: whether the output layer is the token embedding.
    `bias`: of linear layers and norms.
    """

    _no_split_modules = ["Block"]  # what FSDP shards as one unit, read by Accelerate
    output_head = "head"

    def __init__(
        self,
        vocab_size: int,
        seq_len: Size,
        n_layer: Size = 6,
        n_head: Size = 6,
        d_model: Size = 384,
        d_ff: Size | None = None,
        dropout: Share = 0.0,
        bias: bool = False,
        positions: Literal["learned", "rotary"] = "learned",
        tied: bool = True,
    ):
        super().__init__()
        check_heads(d_model, n_head)
        if positions == "rotary" and d_model // n_head % 2:
            raise UserError(
                f"model: rotary positions need heads of even width; d_model / n_head is {d_model // n_head}"
            )
        self.seq_len = seq_len
        self.head_width = d_model // n_head
        self.tokens = nn.Embedding(vocab_size, d_model)
        self.places = nn.Embedding(seq_len, d_model) if positions == "learned" else None
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(d_model, n_head, dropout, bias, d_ff=d_ff, cross=False) for _ in range(n_layer)
        )
        self.norm = nn.LayerNorm(d_model, bias=bias)
        self.head = nn.Linear(d_model, vocab_size, bias=False)
        if tied:
            self.head.weight = self.tokens.weight
        init_transformer(self, residual_layers=2 * n_layer)

    def forward(
        self, input_ids: Tensor, position_ids: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Return logits (batch, seq, vocabulary) for `input_ids` (batch, seq) int64; logits at t see tokens up to t.

        `position_ids` (batch, seq) int64: where they are 0 a document begins, and sees none before it. `attention_mask`
        (batch, seq): False or 0 for padding, which no token sees and no position counts.
        """
        seq = input_ids.shape[1]
        if seq > self.seq_len:
            raise UserError(
                f"gpt got {seq} tokens and model.seq_len is {self.seq_len}; shorten the samples or raise it"
            )
        mask = None
        if position_ids is not None or attention_mask is not None:
            mask = causal_mask(position_ids, attention_mask)
        if position_ids is not None:
            places = position_ids
        elif attention_mask is not None:
            places = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
        else:
            places = torch.arange(seq, device=input_ids.device)
        return cast(Tensor, self.head(self._hidden(input_ids, places, mask)))

    def _hidden(
        self, tokens: Tensor, places: Tensor, mask: Tensor | None = None, caches: Sequence[Cache] | None = None
    ) -> Tensor:
        """Return what the output layer reads, (batch, seq, d_model); `places`: (seq,), or (batch, seq) by row."""
        x = self.tokens(tokens)
        rotation = None
        if self.places is not None:
            x = x + self.places(places)
        else:
            rotation = rotary(places if places.dim() == 1 else places[:, None], self.head_width, x.dtype)
        x = self.dropout(x)
        for layer, block in enumerate(self.blocks):
            cache = None if caches is None else caches[layer]
            x = block(x, mask=mask, causal=mask is None, rotation=rotation, cache=cache)
        return cast(Tensor, self.norm(x))

    def open_decoder(self, room: int = 0) -> Decoder:
        """Return what continues rows of tokens with a cache; `room`: tokens of the longest row with its continuation.

        A row whose context is full continues from the last half of it, read again: positions count from there.
        """
        return _CachedDecoder(self, room)

    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        temperature: float = 0.0,
        eos_id: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return `tokens` (batch, seq) int64, seq at least 1, continued: (batch, seq + new tokens).

        Temperature 0 selects the likeliest token; otherwise tokens are drawn, with `generator` if given. A row that has
        reached `eos_id` is padded with it, and generation stops when all have. The last seq_len of `tokens` are read;
        see `open_decoder` for a context that becomes full.
        """
        new: list[list[int]] = [[] for _ in range(len(tokens) if max_new_tokens > 0 else 0)]

        def accept(row: int, token: int) -> bool:
            new[row].append(token)
            return token == eos_id or len(new[row]) == max_new_tokens

        def draws(step: int) -> Tensor:
            return torch.rand(len(tokens), generator=generator, device=generator.device if generator else "cpu")

        training = self.training
        self.eval()
        try:
            prompts = tokens[: len(new), -self.seq_len :].tolist()
            decode(self.open_decoder(tokens.shape[1] + max_new_tokens), prompts, accept, Sampling(temperature), draws)
        finally:
            self.train(training)
        longest = max(map(len, new), default=0)
        padded = [row + [eos_id or 0] * (longest - len(row)) for row in new] or [[]] * len(tokens)
        return torch.cat([tokens, torch.tensor(padded, dtype=torch.int64, device=tokens.device)], dim=1)


class _CachedDecoder(Decoder):
    """Rows of a GPT, each with its own length: the key at position p of a row is in column p of the caches."""

    def __init__(self, model: GPT, room: int):
        self._model, self._room = model, min(room, model.seq_len)
        self._device = model.head.weight.device
        self._contexts: list[list[int]] = []
        self._caches: list[Cache] = []

    def begin(self, rows: Sequence[Sequence[int]]) -> Tensor:
        self._contexts = [list(row) for row in rows]
        logits, self._caches = self._read(self._contexts)
        return logits

    def advance(self, tokens: Sequence[int]) -> Tensor:
        limit = self._model.seq_len
        full = [row for row, context in enumerate(self._contexts) if len(context) == limit]
        for row, (context, token) in enumerate(zip(self._contexts, tokens, strict=True)):
            context.append(token)
            if row in full:
                self._contexts[row] = context[-max(1, limit // 2) :]
                self.slid = True
        if len(full) == len(self._contexts):
            logits, self._caches = self._read(self._contexts)
            return logits
        logits = self._step(tokens, set(full))
        if full:
            rows = torch.tensor(full, device=self._device)
            again, caches = self._read([self._contexts[row] for row in full])
            logits[rows] = again
            for cache, new in zip(self._caches, caches, strict=True):
                cache.put(rows, new)
        return logits

    def keep(self, rows: Sequence[int]) -> None:
        self._contexts = [self._contexts[row] for row in rows]
        index = torch.tensor(rows, device=self._device)
        for cache in self._caches:
            cache.keep(index)

    def _read(self, contexts: Sequence[Sequence[int]]) -> tuple[Tensor, list[Cache]]:
        """Return the logits after each context, and caches of its tokens."""
        tokens, lengths = padded_at_end(contexts, 0, self._device)
        caches = [Cache(self._room) for _ in self._model.blocks]
        places = torch.arange(tokens.shape[1], device=self._device)
        # padding is behind all that a row reads, so no mask is needed
        hidden = self._model._hidden(tokens, places, caches=caches)
        last = hidden[torch.arange(len(tokens), device=self._device), lengths - 1]
        return self._model.head(last), caches

    def _step(self, tokens: Sequence[int], stale: set[int]) -> Tensor:
        """Return the logits after one more token of each row; those of `stale` rows mean nothing."""
        lengths = [1 if row in stale else len(context) for row, context in enumerate(self._contexts)]
        columns = max(lengths)
        ends = torch.tensor(lengths, device=self._device)
        mask = None
        if min(lengths) < columns:
            mask = (torch.arange(columns, device=self._device) < ends[:, None])[:, None, None]
        for cache in self._caches:
            cache.places, cache.columns = ends - 1, columns
        new = torch.tensor(tokens, device=self._device)[:, None]
        return cast(Tensor, self._model.head(self._model._hidden(new, ends[:, None] - 1, mask, self._caches))[:, 0])
