"""A tiny causal language model in a folder, and recipes that train adapters beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

RECIPE = """
name: tuned
task: language_modeling
data: {name: text, path: TEXT, tokenizer: bytes, seq_len: 16, split: [0.8, 0.1, 0.1]}
model:
  name: "transformers:AutoModelForCausalLM"
  path: BASE
  lora: {r: 2, alpha: 4, targets: [q_proj, v_proj, down_proj]}
optim: {name: adamw, lr: 1.0e-2, weight_decay: 0.1, clip_norm: 1.0}
batch: {global: 12}
train: {steps: 4, precision: fp32}
eval: {every: 2 steps, metrics: []}
checkpoint: {every: 2 steps, keep: 100, async: false}
log: {every: 1 steps}
"""
WORDS = "the quick brown fox jumps over the lazy dog while five wizards box. "


def base_model(folder: Path, **changed: Any) -> Path:
    """Write the folder of a model as save_pretrained does, once; returns it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    path = folder / "base"
    if not path.exists():
        config: dict[str, Any] = {
            "vocab_size": 257, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "pad_token_id": None,
            "bos_token_id": None, "eos_token_id": None,
        }  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(5)
            LlamaForCausalLM(LlamaConfig(**(config | changed))).save_pretrained(path)
    return path


def lora_recipe(folder: Path, text: str = RECIPE) -> Path:
    """Write a recipe, its text and its model into a folder; returns the recipe's path."""
    words = folder / "words.txt"
    if not words.exists():
        words.write_text(WORDS * 60)
    base = base_model(folder) if "BASE" in text else ""
    path = folder / "recipe.yaml"
    path.write_text(text.replace("TEXT", str(words)).replace("BASE", str(base)))
    return path
