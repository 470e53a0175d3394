"""A tiny language model in a folder, as save_pretrained writes one, and words to fine-tune it on.

It is trained on the spot, for some seconds, to count in English: a stand-in for a pretrained model.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

_WORDS = "zero one two three four five six seven eight nine"
_OTHERS = "nul een twee drie vier vijf zes zeven acht negen"
LENGTH = 128


def counting(words: str, bytes_: int) -> str:
    """Return a text of so many bytes that counts, again and again."""
    line = " ".join(words.split()) + ".\n"
    return (line * (bytes_ // len(line) + 1))[:bytes_]


def write(path: Path) -> None:
    """Write a folder with `base/`, a model that counts in English, and `train.txt` and `test.txt`, in Dutch."""
    path.mkdir()
    (path / "train.txt").write_text(counting(_OTHERS, 40_000))
    (path / "test.txt").write_text(counting(_OTHERS, 4_000))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=257, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=LENGTH, pad_token_id=None, bos_token_id=None,
                eos_token_id=256,
            )
        )  # fmt: skip
        tokens = torch.tensor([*counting(_WORDS, 4096).encode()])
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        for _ in range(60):
            starts = torch.randint(len(tokens) - 64, (8, 1))
            rows = tokens[starts + torch.arange(64)]
            model(rows, labels=rows).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.save_pretrained(path / "base")
