"""Tokens a second of `gpt` with its cache and without, in turns: python benchmarks/generation.py

A prompt of 16 tokens is continued to a context of 256, by 1 row and by 8; the ratio within each round is what counts,
of which the median is printed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from distrain.networks.decoding import Decoder, PlainDecoder, Sampling, decode
from distrain.networks.gpt import GPT

SEQ_LEN, PROMPT, ROUNDS = 256, 16, 3


def tokens_per_s(open_decoder: Callable[[], Decoder], rows: int) -> float:
    """Return how many tokens a second are written, until the context is full."""
    prompts = torch.randint(1000, (rows, PROMPT), generator=torch.Generator().manual_seed(0)).tolist()
    written = [0] * rows

    def accept(row: int, token: int) -> bool:
        written[row] += 1
        return written[row] == SEQ_LEN - PROMPT

    began = time.perf_counter()
    decode(open_decoder(), prompts, accept, Sampling(), lambda step: torch.zeros(rows))
    return sum(written) / (time.perf_counter() - began)


def main() -> None:
    """Print a line for each number of rows."""
    torch.manual_seed(0)
    model = GPT(1000, SEQ_LEN, n_layer=4, n_head=4, d_model=128).eval()
    for rows in (1, 8):
        cached, plain = [], []
        for _ in range(ROUNDS):
            cached.append(tokens_per_s(lambda: model.open_decoder(SEQ_LEN), rows))
            plain.append(tokens_per_s(lambda: PlainDecoder(model, SEQ_LEN, torch.device("cpu")), rows))
        ratio = statistics.median(a / b for a, b in zip(cached, plain, strict=True))
        print(
            f"{rows} rows: {statistics.median(cached):,.0f} tokens/s with a cache, "
            f"{statistics.median(plain):,.0f} without: {ratio:.1f} times as many"
        )


if __name__ == "__main__":
    main()
