"""Parts of transformers: attention with a cache, blocks, positions."""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distrain.config import UserError


class Cache:
    """The keys and values that one attention has computed, each (batch, heads, columns, head width).

    A row's key at a position is in the column of that number, so rows of different lengths share a cache: `places` says
    where the next ones go, and who calls the attention masks the columns that a row has not reached.
    """

    def __init__(self, room: int = 0):
        """`room`: columns to make at once; it grows where they do not suffice."""
        self.room = room
        self.key: Tensor | None = None
        self.value: Tensor | None = None
        self.places: int | Tensor = 0
        """The first column of what comes next, or that of each row (batch,) int64 where each gets one."""
        self.columns = 0
        """How many are written in at least one row."""

    def extended(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write keys and values (batch, heads, seq, width) at `places`; returns all (batch, heads, columns, width)."""
        if isinstance(self.places, int):
            self.columns = self.places + key.shape[2]
        self.key, self.value = (self._written(kept, new) for kept, new in ((self.key, key), (self.value, value)))
        return self.key[:, :, : self.columns], self.value[:, :, : self.columns]

    def _written(self, kept: Tensor | None, new: Tensor) -> Tensor:
        if kept is None or kept.shape[2] < self.columns:
            room = max(self.room, self.columns, 0 if kept is None else 2 * kept.shape[2])
            # zeros: a column that is masked adds its value times 0, and what lies in unset memory may be NaN
            grown = new.new_zeros((*new.shape[:2], room, new.shape[3]))
            if kept is not None:
                grown[:, :, : kept.shape[2]] = kept
            kept = grown
        if isinstance(self.places, int):
            kept[:, :, self.places : self.columns] = new
        else:
            kept[torch.arange(len(new), device=new.device), :, self.places] = new[:, :, 0]
        return kept

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these (n,) int64."""
        self.key, self.value = (None if kept is None else kept[rows] for kept in (self.key, self.value))

    def put(self, rows: Tensor, other: Cache) -> None:
        """Replace rows (n,) int64 by those of another cache of the same attention."""
        for kept, new in ((self.key, other.key), (self.value, other.value)):
            assert kept is not None
            assert new is not None
            kept[rows, :, : other.columns] = new[:, :, : other.columns]


def check_heads(d_model: int, n_head: int) -> None:
    """Raise UserError for a width that is not a multiple of the heads."""
    if d_model % n_head:
        near = [heads for heads in range(1, d_model + 1) if d_model % heads == 0]
        best = sorted(near, key=lambda heads: abs(heads - n_head))[:2]
        raise UserError(
            f"model: d_model {d_model} is not a multiple of n_head {n_head}; "
            f"try n_head {' or '.join(map(str, sorted(best)))}, or d_model {math.ceil(d_model / n_head) * n_head}"
        )


def causal_mask(position_ids: Tensor | None, attention_mask: Tensor | None) -> Tensor:
    """Return (batch, 1, seq, seq) bool: each token may attend to itself and to those before it in its document.

    `position_ids` (batch, seq): a document begins wherever one is 0. `attention_mask` (batch, seq): nothing but
    itself attends to a token where it is False or 0. One of them may be None.
    """
    given = position_ids if attention_mask is None else attention_mask
    assert given is not None
    seq, device = given.shape[1], given.device
    itself = torch.eye(seq, dtype=torch.bool, device=device)
    mask = torch.ones(seq, seq, dtype=torch.bool, device=device).tril()[None]
    if position_ids is not None:
        document = (position_ids == 0).cumsum(1)
        mask = mask & (document[:, :, None] == document[:, None, :])
    if attention_mask is not None:
        mask = mask & attention_mask.bool()[:, None, :] | itself
    return mask[:, None]


class Attention(nn.Module):
    """Multi-head scaled dot-product attention (Vaswani et al. 2017) of x over itself or over a memory."""

    def __init__(self, d_model: int, n_head: int, dropout: float = 0.0, bias: bool = True):
        super().__init__()
        self.n_head = n_head
        self.query = nn.Linear(d_model, d_model, bias=bias)
        self.key_value = nn.Linear(d_model, 2 * d_model, bias=bias)
        self.out = nn.Linear(d_model, d_model, bias=bias)
        self.dropout = dropout

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        rotation: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Return (batch, seq, d_model) for `x` of the same shape.

        `memory` (batch, memory seq, d_model): attended instead of x. `mask`: bool, broadcast to (batch, heads, seq,
        attended), True where attention is allowed. `causal`: no position attends to a later one. `rotation`: from
        `rotary`, for the positions of x. `cache`: x's keys and values are written to it, and all in it are attended;
        those of a memory are computed once. With a filled cache and `causal`, x is one position.
        """
        query = self._heads(self.query(x))
        if rotation is not None:
            query = rotate(query, rotation)
        if memory is not None and cache is not None and cache.key is not None:
            assert cache.value is not None
            key, value = cache.key, cache.value
        else:
            key, value = map(self._heads, self.key_value(x if memory is None else memory).chunk(2, dim=-1))
            if rotation is not None:
                key = rotate(key, rotation)
            if cache is not None:
                key, value = cache.extended(key, value)
        assert not causal or query.shape[2] in (1, key.shape[2])
        output = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=bool(causal and query.shape[2] > 1),  # where a model is exported the length is a symbol
        )
        return cast(Tensor, self.out(output.transpose(1, 2).flatten(2)))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.n_head, -1)).transpose(1, 2)


class Block(nn.Module):
    """A pre-norm transformer block: self-attention, cross-attention to a memory if `cross`, a two-layer network."""

    def __init__(self, d_model: int, n_head: int, dropout: float, bias: bool, *, d_ff: int | None = None, cross: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(d_model, bias=bias)
        self.attention = Attention(d_model, n_head, dropout, bias)
        self.norm_cross = nn.LayerNorm(d_model, bias=bias) if cross else None
        self.cross = Attention(d_model, n_head, dropout, bias) if cross else None
        self.norm2 = nn.LayerNorm(d_model, bias=bias)
        self.up = nn.Linear(d_model, d_ff or 4 * d_model, bias=bias)
        self.down = nn.Linear(d_ff or 4 * d_model, d_model, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        rotation: Tensor | None = None,
        cache: Cache | None = None,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
        memory_cache: Cache | None = None,
    ) -> Tensor:
        """Return (batch, seq, d_model) for `x` of the same shape; the arguments are those of `Attention`."""
        attended = self.attention(self.norm1(x), mask=mask, causal=causal, rotation=rotation, cache=cache)
        x = x + self.dropout(attended)
        if self.cross is not None and self.norm_cross is not None:
            attended = self.cross(self.norm_cross(x), memory, mask=memory_mask, cache=memory_cache)
            x = x + self.dropout(attended)
        return x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))


def init_transformer(model: nn.Module, residual_layers: int) -> None:
    """Initialise as GPT-2 does (Radford et al. 2019): normal, of standard deviation 0.02; biases zero.

    The layers that write to the residual stream, of which there are `residual_layers` on one path, are divided by the
    root of that number, so that its variance does not grow with depth.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            writes = name.endswith((".out", ".down"))
            nn.init.normal_(module.weight, std=0.02 / math.sqrt(residual_layers) if writes else 0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)


def sinusoids(places: Tensor, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return (seq, width) float32, or float64 for such a `dtype`: the positions of Vaswani et al. 2017, section 3.5.

    `places`: (seq,).
    """
    angles = _angles(places, width, dtype)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


def rotary(places: Tensor, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return (2, *places, width / 2) float32, or float64 for such a `dtype`: cosines and sines for `places`.

    Those of RoFormer (Su et al. 2021). `places`: (seq,), or (batch, 1, seq) where each row has its own.
    """
    angles = _angles(places, width, dtype)
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Return `x` (batch, heads, seq, width), the two halves of its width rotated by `rotation`, in its own dtype."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = rotation
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).type_as(x)


def _angles(places: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    # computed on demand: as a buffer they would be cast to bf16 with the model, which merges positions
    exact = dtype if dtype == torch.float64 else torch.float32
    rates = 10000.0 ** (torch.arange(0, width, 2, device=places.device, dtype=exact) / -width)
    return places[..., None].to(exact) * rates
