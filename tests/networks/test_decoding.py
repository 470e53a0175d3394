"""Rows that grow together: with a cache as without, in a batch as alone; and how the next token is chosen."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

from distrain.config import UserError
from distrain.datasets.randomness import stream_of, uniform
from distrain.networks.calling import forward
from distrain.networks.decoding import Decoder, PlainDecoder, PlainPairDecoder, Sampling, decode
from distrain.networks.gpt import GPT
from distrain.networks.seq2seq import seq2seq

CPU = torch.device("cpu")
ROWS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 5, 8, 9], [7], [9, 3, 2, 3]]
"""Prompts of different lengths."""


def models() -> dict[str, nn.Module]:
    """Return models that write with a cache, sharp enough that two tokens are rarely as likely as each other."""
    torch.manual_seed(0)
    kinds = {
        **{p: GPT(12, 16, n_layer=2, n_head=2, d_model=16, positions=p) for p in ("learned", "rotary")},  # type: ignore[arg-type]
        **{k: seq2seq(12, 12, 0, 1, 2, kind=k, d_model=16, n_layer=2) for k in ("transformer", "gru")},  # type: ignore[arg-type]
    }
    for kind, model in kinds.items():
        for parameter in model.parameters() if kind != "transformer" else ():
            parameter.data.mul_(3)  # from 0.02, with which one token is nearly as likely as another
        model.eval()
    return kinds


def plainly(model: nn.Module) -> Decoder:
    """Return what writes without a cache."""

    def logits(inputs: object) -> torch.Tensor:
        return forward(model, inputs).logits  # type: ignore[arg-type]

    return PlainDecoder(logits, 16, CPU) if isinstance(model, GPT) else PlainPairDecoder(logits, 0, 1, CPU)


def written(decoder: Decoder, rows: list[list[int]], lengths: list[int], sampling: Sampling, first: int = 0) -> list:
    """Return the tokens that continue each row, of which the first has the number `first`."""
    new: list[list[int]] = [[] for _ in rows]

    def accept(row: int, token: int) -> bool:
        new[row].append(token)
        return len(new[row]) == lengths[row]

    def draws(step: int) -> torch.Tensor:
        return torch.from_numpy(uniform(stream_of(5, np.arange(first, first + len(rows)), step)))

    decode(decoder, rows, accept, sampling, draws)
    return new


@pytest.mark.parametrize("kind", ["learned", "rotary", "transformer", "gru"])
@torch.no_grad()
def test_logits_with_a_cache_are_those_of_full_passes(kind: str) -> None:
    model = models()[kind]
    cached, plain = model.open_decoder(), plainly(model)
    torch.testing.assert_close(cached.begin(ROWS), plain.begin(ROWS), rtol=0, atol=1e-5)
    generator = torch.Generator().manual_seed(0)
    left = len(ROWS)
    for step in range(20):  # beyond the context of 16, in which the rows become full one by one
        tokens = torch.randint(3, 12, (left,), generator=generator).tolist()
        torch.testing.assert_close(cached.advance(tokens), plain.advance(tokens), rtol=0, atol=1e-5)
        if step == 12:
            left = 3
            cached.keep([0, 1, 3])
            plain.keep([0, 1, 3])
    assert cached.slid == plain.slid == isinstance(model, GPT)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7, top_p=0.9, top_k=8)], ids=["greedy", "drawn"])
@pytest.mark.parametrize("kind", ["learned", "rotary", "transformer", "gru"])
def test_a_row_is_continued_in_a_batch_as_alone(kind: str, sampling: Sampling) -> None:
    model, lengths = models()[kind], [20, 3, 12, 1]
    together = written(model.open_decoder(), ROWS, lengths, sampling)
    assert list(map(len, together)) == lengths
    alone = [
        written(model.open_decoder(), [row], [length], sampling, number)[0]
        for number, (row, length) in enumerate(zip(ROWS, lengths, strict=True))
    ]
    assert together == alone
    assert written(plainly(model), ROWS, lengths, sampling) == together
    assert len({tuple(row[:1]) for row in together}) > 1


def test_what_is_drawn_has_the_probabilities_of_the_logits() -> None:
    shares = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05])
    draws = torch.from_numpy(uniform(stream_of(0, np.arange(20_000))))
    logits = shares.log().expand(len(draws), -1)

    def counts(sampling: Sampling) -> list[float]:
        found = Counter(sampling.choose(logits, draws).tolist())
        return [found[token] / len(draws) for token in range(5)]

    def near(wanted: list[float]) -> object:
        return pytest.approx(wanted, abs=0.02)

    assert counts(Sampling(1.0)) == near(shares.tolist())
    assert counts(Sampling(1.0))[1] == 0
    assert counts(Sampling(1.0, top_k=2)) == near([0.5 / 0.8, 0, 0.3 / 0.8, 0, 0])
    assert counts(Sampling(1.0, top_p=0.75)) == near([0.5 / 0.8, 0, 0.3 / 0.8, 0, 0])
    assert counts(Sampling(1.0, top_p=0.85)) == near([0.5 / 0.95, 0, 0.3 / 0.95, 0.15 / 0.95, 0])
    assert counts(Sampling(1.0, top_p=1e-9)) == [1, 0, 0, 0, 0]
    squared = shares**2 / (shares**2).sum()
    assert counts(Sampling(0.5)) == near(squared.tolist())
    assert counts(Sampling()) == [1, 0, 0, 0, 0]
    # the ends of [0, 1) draw what can be drawn
    ends = Sampling(1.0).choose(logits[:2], torch.tensor([0.0, math.nextafter(1, 0)], dtype=torch.float64))
    assert ends.tolist() == [0, 4]


def test_logits_that_are_nan_are_an_error() -> None:
    model = models()["learned"]
    model.norm.weight.data[0] = math.nan
    with pytest.raises(UserError, match="the model gives NaN"):
        written(model.open_decoder(), ROWS, [1] * 4, Sampling())
