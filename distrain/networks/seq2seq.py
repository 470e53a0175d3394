"""`seq2seq`: an encoder that reads the source and a decoder that writes the target."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from distrain.config import UserError
from distrain.config.registry import models
from distrain.networks.annotations import Share, Size
from distrain.networks.attention import Block, Cache, check_heads, sinusoids
from distrain.networks.basic import Recurrent, token_lengths
from distrain.networks.decoding import Decoder, padded_at_end


class EncoderDecoder(nn.Module, ABC):
    """The call and generation of both kinds. The logits are independent of padding."""

    def __init__(self, target_vocab_size: int, pad_id: int, bos_id: int, eos_id: int):
        super().__init__()
        self.target_vocab_size = target_vocab_size
        self.pad_id, self.bos_id, self.eos_id = pad_id, bos_id, eos_id

    @abstractmethod
    def encode(self, source: Tensor) -> dict[str, Any]:
        """Return the state for `decode` of `source` (batch, source seq) int64, padded at its end."""

    @abstractmethod
    def decode(self, target: Tensor, state: dict[str, Any]) -> Tensor:
        """Return logits (batch, target seq, vocabulary) for `target` (batch, target seq) int64.

        With `"step"` in the state, the target continues the earlier ones, and the state is updated in place.
        """

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Return logits (batch, target seq, vocabulary): at t, of the token after target[:, : t + 1].

        `source` (batch, source seq) and `target` (batch, target seq) are int64, padded at their ends; the target
        begins with `bos_id`.
        """
        return self.decode(target, self.encode(source))

    @torch.no_grad()
    def generate(self, source: Tensor, max_new_tokens: int) -> Tensor:
        """Return the likeliest next tokens for `source` (batch, source seq) int64: (batch, at most max_new_tokens).

        The result does not begin with `bos_id`. A row ends with `eos_id` and is padded with `pad_id`.
        """
        training = self.training
        self.eval()
        try:
            state = self.encode(source) | {"step": 0}
            new = torch.full((len(source), 1), self.bos_id, dtype=torch.int64, device=source.device)
            done = torch.zeros_like(new, dtype=torch.bool)
            tokens: list[Tensor] = []
            for _ in range(max_new_tokens):
                new = self.decode(new, state).argmax(dim=-1).masked_fill(done, self.pad_id)
                tokens.append(new)
                done = done | (new == self.eos_id)
                if done.all():
                    break
        finally:
            self.train(training)
        return torch.cat(tokens, dim=1) if tokens else source.new_zeros((len(source), 0))

    def open_decoder(self, room: int = 0) -> Decoder:
        """Return what writes the target of rows of source tokens, with a cache."""
        return _CachedDecoder(self)


class _CachedDecoder(Decoder):
    """Rows are sources; each begins its target with `bos_id`."""

    def __init__(self, model: EncoderDecoder):
        self._model = model
        self._device = next(model.parameters()).device
        self._state: dict[str, Any] = {}

    def begin(self, rows: Sequence[Sequence[int]]) -> Tensor:
        source, _ = padded_at_end(rows, self._model.pad_id, self._device)
        self._state = self._model.encode(source) | {"step": 0}
        return self.advance([self._model.bos_id] * len(rows))

    def advance(self, tokens: Sequence[int]) -> Tensor:
        new = torch.tensor(tokens, device=self._device)[:, None]
        return self._model.decode(new, self._state)[:, -1]

    def keep(self, rows: Sequence[int]) -> None:
        index = torch.tensor(rows, device=self._device)
        for key, value in self._state.items():
            if isinstance(value, Tensor):
                # layers come first in the state of a recurrent decoder
                self._state[key] = value.index_select(1 if key == "hidden" else 0, index).contiguous()
        for cache in (each for pair in self._state.get("caches", ()) for each in pair):
            cache.keep(index)


class RecurrentSeq2Seq(EncoderDecoder):
    """A bidirectional GRU encoder, and a GRU decoder with global attention (Luong et al. 2015, "general" score)."""

    def __init__(
        self,
        vocab_size: int,
        target_vocab_size: int,
        pad_id: int,
        bos_id: int,
        eos_id: int,
        *,
        d_model: int,
        n_layer: int,
        dropout: float,
        tied: bool,
    ):
        super().__init__(target_vocab_size, pad_id, bos_id, eos_id)
        self.source_tokens = nn.Embedding(vocab_size, d_model)
        self.target_tokens = nn.Embedding(target_vocab_size, d_model)
        self.encoder = Recurrent("gru", d_model, d_model, n_layer, dropout, bidirectional=True)
        self.bridge = nn.Linear(2 * d_model, n_layer * d_model)
        self.decoder = nn.GRU(d_model, d_model, n_layer, batch_first=True, dropout=dropout if n_layer > 1 else 0.0)
        self.memory = nn.Linear(2 * d_model, d_model)
        self.score = nn.Linear(d_model, d_model, bias=False)
        self.combine = nn.Linear(2 * d_model, d_model)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(d_model, target_vocab_size)
        for embedding in (self.source_tokens, self.target_tokens):
            nn.init.normal_(embedding.weight, std=1 / math.sqrt(d_model))
        if tied:
            self.head.weight = self.target_tokens.weight

    def encode(self, source: Tensor) -> dict[str, Any]:
        lengths = token_lengths(source, self.pad_id)
        assert lengths is not None
        outputs, ends = self.encoder(self.dropout(self.source_tokens(source)), lengths)
        hidden = torch.tanh(self.bridge(ends)).unflatten(1, (self.decoder.num_layers, -1))
        places = torch.arange(source.shape[1], device=source.device)
        return {
            "memory": self.memory(outputs),
            "padding": (places >= lengths[:, None])[:, None],
            "hidden": hidden.transpose(0, 1).contiguous(),
        }

    def decode(self, target: Tensor, state: dict[str, Any]) -> Tensor:
        outputs, hidden = self.decoder(self.dropout(self.target_tokens(target)), state["hidden"])
        if "step" in state:
            state["hidden"] = hidden
        scores = self.score(outputs) @ state["memory"].transpose(1, 2)
        shares = scores.masked_fill(state["padding"], -math.inf).softmax(dim=-1)
        read = torch.tanh(self.combine(torch.cat([shares @ state["memory"], outputs], dim=-1)))
        return cast(Tensor, self.head(self.dropout(read)))


class TransformerSeq2Seq(EncoderDecoder):
    """A pre-norm transformer encoder and decoder with sinusoidal positions (Vaswani et al. 2017)."""

    _no_split_modules = ["Block"]  # what FSDP shards as one unit, read by Accelerate

    def __init__(
        self,
        vocab_size: int,
        target_vocab_size: int,
        pad_id: int,
        bos_id: int,
        eos_id: int,
        *,
        d_model: int,
        n_layer: int,
        n_head: int,
        d_ff: int | None,
        dropout: float,
        tied: bool,
    ):
        super().__init__(target_vocab_size, pad_id, bos_id, eos_id)
        check_heads(d_model, n_head)
        if d_model % 2:
            raise UserError(f"model.d_model: {d_model} is odd, and sinusoidal positions need an even width")
        self.source_tokens = nn.Embedding(vocab_size, d_model)
        self.target_tokens = nn.Embedding(target_vocab_size, d_model)
        self.scale = math.sqrt(d_model)

        def blocks(cross: bool) -> nn.ModuleList:
            return nn.ModuleList(Block(d_model, n_head, dropout, True, d_ff=d_ff, cross=cross) for _ in range(n_layer))

        self.encoder, self.encoder_norm = blocks(cross=False), nn.LayerNorm(d_model)
        self.decoder, self.decoder_norm = blocks(cross=True), nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(d_model, target_vocab_size, bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        # scaled by the root of the width when read, so that tokens and positions weigh alike
        for embedding in (self.source_tokens, self.target_tokens):
            nn.init.normal_(embedding.weight, std=1 / self.scale)
        if tied:
            self.head.weight = self.target_tokens.weight

    def _embed(self, table: nn.Embedding, tokens: Tensor, start: int) -> Tensor:
        places = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        x = table(tokens) * self.scale
        return cast(Tensor, self.dropout(x + sinusoids(places, x.shape[-1], x.dtype).type_as(x)))

    def encode(self, source: Tensor) -> dict[str, Any]:
        lengths = token_lengths(source, self.pad_id)
        assert lengths is not None
        places = torch.arange(source.shape[1], device=source.device)
        mask = (places < lengths[:, None])[:, None, None]
        x = self._embed(self.source_tokens, source, 0)
        for block in self.encoder:
            x = block(x, mask=mask)
        return {"memory": self.encoder_norm(x), "mask": mask}

    def decode(self, target: Tensor, state: dict[str, Any]) -> Tensor:
        caches: list[Any] = [(None, None)] * len(self.decoder)
        start = 0
        if "step" in state:
            start = state["step"]
            state["step"] = start + target.shape[1]
            caches = state.setdefault("caches", [(Cache(), Cache()) for _ in self.decoder])
            for cache, _ in caches:
                cache.places = start
        x = self._embed(self.target_tokens, target, start)
        for block, (cache, memory_cache) in zip(self.decoder, caches, strict=True):
            x = block(
                x,
                causal=True,
                cache=cache,
                memory=state["memory"],
                memory_mask=state["mask"],
                memory_cache=memory_cache,
            )
        return cast(Tensor, self.head(self.decoder_norm(x)))


@models.register("seq2seq", tasks=("seq2seq",))
def seq2seq(
    vocab_size: int,
    target_vocab_size: int,
    pad_id: int,
    bos_id: int,
    eos_id: int,
    kind: Literal["transformer", "gru"] = "transformer",
    d_model: Size = 256,
    n_layer: Size = 3,
    n_head: Size | None = None,
    d_ff: Size | None = None,
    dropout: Share = 0.1,
    tied: bool = True,
) -> EncoderDecoder:
    """An encoder and a decoder: a transformer, or GRUs with attention.

    `kind`: "transformer" or "gru". `d_model`, `n_layer`: width and layers of the encoder and of the decoder. `n_head`
    (by default 8, or the largest smaller number that divides d_model) and `d_ff` (by default 4 * d_model) are the
    transformer's. `tied`: whether the output layer is the embedding of the target tokens.
    """
    sizes: dict[str, Any] = {"d_model": d_model, "n_layer": n_layer, "dropout": dropout, "tied": tied}
    if kind == "transformer":
        heads = n_head or next(count for count in range(8, 0, -1) if d_model % count == 0)
        return TransformerSeq2Seq(
            vocab_size, target_vocab_size, pad_id, bos_id, eos_id, n_head=heads, d_ff=d_ff, **sizes
        )
    given = [key for key, value in (("n_head", n_head), ("d_ff", d_ff)) if value is not None]
    if given:
        raise UserError(f"model.{given[0]}: kind gru has none; remove it, or use kind transformer")
    return RecurrentSeq2Seq(vocab_size, target_vocab_size, pad_id, bos_id, eos_id, **sizes)
