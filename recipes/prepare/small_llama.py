"""Conversations about numbers, as of number_chats.py, and a small Llama to start from.

The model stands for a published one, which nothing here downloads: a few steps on the words of the numbers.
"""

from __future__ import annotations

from pathlib import Path

import number_chats
import torch

STEPS = 20


def write(path: Path) -> None:
    """Write the folder, with the model and its tokenizer in `model/`."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    number_chats.write(path)
    (path / "tokenizer").rename(path / "model")
    tokenizer = AutoTokenizer.from_pretrained(path / "model", local_files_only=True)
    texts = [number_chats.english(number) for number in range(number_chats.LARGEST)]
    tokens = torch.tensor([token for text in texts for token in tokenizer.encode(f"{text}\n")])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        )
        model = LlamaForCausalLM(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(STEPS):
            starts = torch.randint(len(tokens) - 64, (16,))
            batch = torch.stack([tokens[start : start + 64] for start in starts.tolist()])
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.save_pretrained(path / "model")
