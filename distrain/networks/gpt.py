"""`gpt`: a decoder-only language model."""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import Tensor, nn

from distrain.config import UserError
from distrain.config.registry import models
from distrain.networks.annotations import Share, Size
from distrain.networks.attention import Block, Cache, check_heads, init_transformer, rotary


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

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits (batch, seq, vocabulary) for `tokens` (batch, seq) int64; logits at t see tokens up to t."""
        return self._logits(tokens, 0, None)

    def _logits(self, tokens: Tensor, start: int, caches: list[Cache] | None) -> Tensor:
        stop = start + tokens.shape[1]
        if stop > self.seq_len:
            raise UserError(
                f"gpt got {stop} tokens and model.seq_len is {self.seq_len}; shorten the samples or raise it"
            )
        x = self.tokens(tokens)
        places = torch.arange(start, stop, device=tokens.device)
        rotation = None
        if self.places is not None:
            x = x + self.places(places)
        else:
            rotation = rotary(places, self.head_width, x.dtype)
        x = self.dropout(x)
        for layer, block in enumerate(self.blocks):
            x = block(x, causal=True, rotation=rotation, cache=None if caches is None else caches[layer])
        return cast(Tensor, self.head(self.norm(x)))

    @torch.no_grad()
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
        reached `eos_id` is padded with it, and generation stops when all have. The context is the last seq_len tokens.
        """
        training = self.training
        self.eval()
        caches: list[Cache] | None = [{} for _ in self.blocks]
        done = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        try:
            for index in range(max_new_tokens):
                if tokens.shape[1] > self.seq_len:
                    # every position in the window changes, so the caches are invalid
                    logits = self._logits(tokens[:, -self.seq_len :], 0, None)[:, -1]
                elif index == 0:
                    logits = self._logits(tokens, 0, caches)[:, -1]
                else:
                    logits = self._logits(tokens[:, -1:], tokens.shape[1] - 1, caches)[:, -1]
                if temperature == 0:
                    new = logits.argmax(dim=-1)
                else:
                    shares = torch.softmax(logits.float() / temperature, dim=-1)
                    new = torch.multinomial(shares, 1, generator=generator).squeeze(1)
                if eos_id is not None:
                    new = new.masked_fill(done, eos_id)
                    done |= new == eos_id
                tokens = torch.cat([tokens, new[:, None]], dim=1)
                if eos_id is not None and done.all():
                    break
        finally:
            self.train(training)
        return tokens
