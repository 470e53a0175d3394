"""Networks by name: the registry, and the networks written here.

    registry.py     `register`, and what is known about a registered network
    sequential.py   `sequential`: any layers of torch.nn, listed in the recipe
    basic.py        `mlp`, `cnn`, `rnn`
    attention.py    attention with its cache, positions, and the other parts that `gpt` and `seq2seq` share
    gpt.py          `gpt`: a decoder-only language model
    seq2seq.py      `seq2seq`: an encoder and a decoder
    huggingface.py  models of the transformers library
    blocks.py       a model's repeated blocks, and computing their activations again
    weights.py      weights to start from, out of a file
    deferred.py     a model without its weights, and its initial weights one at a time

To add one, write in any module of this folder a class or function decorated with `register`. Its parameters are the
keys that the recipe's `model` section may hold beside its own; one that is named like a fact of the data
(`num_outputs`, `input_shape`, `vocab_size`, ...: see `networks/facts.py`) takes that fact when the recipe does not
give it. Its first docstring line is what `distrain list models` prints.
"""

from __future__ import annotations

from distrain.networks import basic, gpt, seq2seq, sequential
from distrain.networks.registry import ModelEntry, find, model_names, register

__all__ = ["ModelEntry", "basic", "find", "gpt", "model_names", "register", "seq2seq", "sequential"]
