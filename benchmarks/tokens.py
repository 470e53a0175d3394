"""How fast rows of tokens come from memory-mapped shards, against copying the same rows and nothing else.

    OMP_NUM_THREADS=1 python benchmarks/tokens.py

Prints one JSON line for each way, in millions of tokens a second on one core: `rows copied` is numpy copying each row
from the map (2 bytes a token), `one shard` and `many shards` are what training gets (inputs and targets, each int64, so
16 bytes a token). The median of several rounds; the file is in the page cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from distrain.datasets.text import TokenRows


def rate(fetch: Callable[[np.ndarray], object], batches: list[np.ndarray], seq_len: int, rounds: int = 7) -> float:
    """Return millions of tokens a second, the median over `rounds`."""
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        for ids in batches:
            fetch(ids)
        seconds.append(time.perf_counter() - start)
    return sum(map(len, batches)) * seq_len / statistics.median(seconds) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=200_000_000)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--shards", type=int, default=64)
    args = parser.parse_args()
    torch.set_num_threads(1)
    seq_len, count = args.seq_len, (args.tokens - 1) // args.seq_len
    generator = np.random.default_rng(0)
    batches = list(generator.integers(0, count, (500, args.batch)))

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokens.bin"
        generator.integers(0, 50_000, args.tokens, dtype=np.uint16).tofile(path)
        mapped = np.asarray(np.memmap(path, dtype=np.uint16, mode="r"))

        def rows_copied(ids: np.ndarray) -> np.ndarray:
            rows = np.empty((len(ids), seq_len), np.uint16)
            for at, begin in enumerate((ids * seq_len).tolist()):
                rows[at] = mapped[begin : begin + seq_len]
            return rows

        ways: dict[str, Callable[[np.ndarray], object]] = {
            "rows copied": rows_copied,
            "one shard": TokenRows([mapped], seq_len, [range(count)]).fetch,
            "many shards": TokenRows(np.array_split(mapped, args.shards), seq_len, [range(count)]).fetch,
        }
        for name, fetch in ways.items():
            fetch(batches[0])
            print(json.dumps({"way": name, "million_tokens_per_s": round(rate(fetch, batches, seq_len))}))


if __name__ == "__main__":
    main()
