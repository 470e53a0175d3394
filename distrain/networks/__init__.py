"""Networks by name.

    builders.py     who builds a recipe's model, and which arguments that takes
    annotations.py  what arguments of networks may be
    sequential.py   `sequential`: any layers of torch.nn, listed in the recipe
    basic.py        `mlp`, `cnn`, `rnn`
    attention.py    attention with its cache, positions, and the other parts that `gpt` and `seq2seq` share
    gpt.py          `gpt`: a decoder-only language model
    seq2seq.py      `seq2seq`: an encoder and a decoder
    huggingface.py  models of the transformers library
    blocks.py       a model's repeated blocks, and computing their activations again
    weights.py      weights to start from, out of a file
    deferred.py     a model without its weights, and its initial weights one at a time

To add one, write in any module of this folder a class or function decorated with `models.register(NAME, tasks=...)`,
`models` being that of `distrain.config.registry`. Its parameters are the keys that the recipe's `model` section may
hold beside its own; one that is named like a fact of the data (`num_outputs`, `input_shape`, `vocab_size`, ...: see
`networks/facts.py`) takes that fact when the recipe does not give it. Its first docstring line is what
`distrain list models` prints.
"""
