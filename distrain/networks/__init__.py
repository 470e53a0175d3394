"""Networks by name.

    builders.py     the builder of a recipe's model and its arguments
    annotations.py  types of the networks' arguments
    sequential.py   `sequential`: any layers of torch.nn, listed in the recipe
    basic.py        `mlp`, `cnn`, `rnn`
    attention.py    attention with its cache, positions, and other parts shared by `gpt` and `seq2seq`
    decoding.py     text token by token: choosing a token, and rows that grow together
    gpt.py          `gpt`: a decoder-only language model
    seq2seq.py      `seq2seq`: an encoder and a decoder
    timm_models.py  models of the timm library
    huggingface.py  models of the transformers library
    blocks.py       a model's repeated blocks, and activation checkpointing
    weights.py      initial weights from a file
    meta_device.py  building a model without its weights, and comparing it with an ordinary build

To add one, write in any module of this folder a class or function decorated with `models.register(NAME, tasks=...)`
from `distrain.config.registry`. Its parameters are keys of the recipe's `model` section; one named like a fact of the
data (`num_outputs`, `input_shape`, `vocab_size`, ...: see `networks/facts.py`) defaults to that fact. `distrain list
models` prints the first line of its docstring.
"""
