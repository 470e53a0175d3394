"""`text_classifier` and `token_classifier`: small transformers that read a text as a whole, or token by token."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from distrain.config import UserError
from distrain.config.registry import models
from distrain.networks.annotations import PREDICTION, Share, Size
from distrain.networks.attention import Block, check_heads, init_transformer, rotary
from distrain.networks.basic import token_lengths


@models.register("text_classifier", tasks=PREDICTION)
class TextClassifier(nn.Module):
    """A transformer over tokens, each of which sees all others; the mean of its outputs goes to the head.

    `n_layer`, `n_head`, `d_model`: its size; `d_ff`: width within a block, by default 4 * d_model. Tokens equal to
    `pad_id` at the end of a text are not read. Positions are rotary, so texts may be of any length.
    """

    _no_split_modules = ["Block"]  # what FSDP shards as one unit, read by Accelerate

    def __init__(
        self,
        num_outputs: int,
        vocab_size: int,
        pad_id: int | None = None,
        n_layer: Size = 2,
        n_head: Size = 4,
        d_model: Size = 128,
        d_ff: Size | None = None,
        dropout: Share = 0.1,
        bias: bool = True,
    ):
        super().__init__()
        check_heads(d_model, n_head)
        if d_model // n_head % 2:
            raise UserError(
                f"model: rotary positions need heads of even width; d_model / n_head is {d_model // n_head}"
            )
        self.pad_id = pad_id
        self.head_width = d_model // n_head
        self.tokens = nn.Embedding(vocab_size, d_model)
        self.parts = nn.Embedding(2, d_model)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(d_model, n_head, dropout, bias, d_ff=d_ff, cross=False) for _ in range(n_layer)
        )
        self.norm = nn.LayerNorm(d_model, bias=bias)
        self.head = nn.Linear(d_model, num_outputs)
        init_transformer(self, residual_layers=2 * n_layer)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """Return (batch, outputs) for `input_ids` (batch, seq) int64; `token_type_ids`: 1 for the second of a pair."""
        x, there = self.read(input_ids, token_type_ids)
        weights = there.to(x.dtype)[..., None]
        return cast(Tensor, self.head((x * weights).sum(1) / weights.sum(1)))

    def read(self, input_ids: Tensor, token_type_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return what is read of each token (batch, seq, d_model), and which are no padding (batch, seq) bool."""
        x = self.tokens(input_ids) + self.parts(
            torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        )
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        lengths = token_lengths(input_ids, self.pad_id)
        there = places < lengths[:, None] if lengths is not None else torch.ones_like(input_ids, dtype=torch.bool)
        rotation = rotary(places, self.head_width, x.dtype)
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, mask=there[:, None, None], rotation=rotation)
        return self.norm(x), there


@models.register("token_classifier", tasks=("token_classification",))
class TokenClassifier(TextClassifier):
    """A transformer over tokens, each of which sees all others; the output at each token goes to the head.

    Its arguments are those of `text_classifier`.
    """

    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """Return (batch, seq, outputs) for `input_ids` (batch, seq) int64."""
        return cast(Tensor, self.head(self.read(input_ids, token_type_ids)[0]))
