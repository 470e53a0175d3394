"""Small networks for vectors, tables, signals, images, volumes and sequences: `mlp`, `cnn`, `rnn`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from distrain.config import UserError
from distrain.config.registry import models
from distrain.networks.annotations import PREDICTION, Share, Size
from distrain.networks.sequential import layer_class


def activation_layer(name: str) -> nn.Module:
    """Return the activation that torch.nn calls `name`."""
    return layer_class(name, "model.activation")()


@models.register("mlp", tasks=PREDICTION)
class Mlp(nn.Module):
    """Fully connected layers over the flattened input, or over a table's numbers and categories.

    `hidden`: width of each hidden layer. `activation`: a layer of torch.nn. `dropout`: after each activation. `norm`:
    before each activation, none, "batch" or "layer". `embedding`: width of each category's embedding; by default
    min(50, (cardinality + 1) // 2).
    """

    def __init__(
        self,
        num_outputs: int,
        in_features: int,
        hidden: Sequence[Size] = (128, 128),
        activation: str = "ReLU",
        dropout: Share = 0.0,
        norm: Literal["batch", "layer"] | None = None,
        cardinalities: Sequence[int] | None = None,
        embedding: Size | None = None,
    ):
        """`in_features`: numbers in a sample. `cardinalities`: different values of each categorical column."""
        super().__init__()
        cardinalities = tuple(cardinalities or ())
        widths = [embedding or min(50, (count + 1) // 2) for count in cardinalities]
        self.embeddings = nn.ModuleList(nn.Embedding(*sizes) for sizes in zip(cardinalities, widths, strict=True))
        width = in_features + sum(widths)
        layers: list[nn.Module] = []
        for size in hidden:
            layers.append(nn.Linear(width, size))
            if norm is not None:
                layers.append(nn.BatchNorm1d(size) if norm == "batch" else nn.LayerNorm(size))
            layers.append(activation_layer(activation))
            if dropout:
                layers.append(nn.Dropout(dropout))
            width = size
        self.layers = nn.Sequential(*layers, nn.Linear(width, num_outputs))

    def forward(self, numeric: Tensor | None = None, categorical: Tensor | None = None) -> Tensor:
        """Return (batch, outputs) for `numeric` (batch, ...) float and `categorical` (batch, columns) int64."""
        parts = [] if numeric is None else [numeric.flatten(1)]
        if categorical is not None:
            columns = zip(self.embeddings, categorical.unbind(1), strict=True)
            parts += [embedding(column) for embedding, column in columns]
        return cast(Tensor, self.layers(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)))


@models.register("cnn", tasks=PREDICTION)
class Cnn(nn.Module):
    """Convolutions over signals (channels, length), images (channels, height, width) or volumes.

    Each of `channels` is one block: convolution, norm, activation, and pooling by two while every side is at least 2.
    The mean over the remaining sides goes to the last linear layer. `kernel`: odd side of the convolutions.
    `pooling`: "max", "avg" or none. `norm`: "batch", "group" (independent of the batch) or none. `activation`: a layer
    of torch.nn. `dropout`: before the last layer.
    """

    def __init__(
        self,
        num_outputs: int,
        input_shape: Sequence[int],
        channels: Annotated[Sequence[Size], Field(min_length=1)] = (32, 64, 128),
        kernel: Size = 3,
        pooling: Literal["max", "avg"] | None = "max",
        norm: Literal["batch", "group"] | None = "batch",
        activation: str = "ReLU",
        dropout: Share = 0.0,
    ):
        super().__init__()
        dims = len(input_shape) - 1
        if dims not in (1, 2, 3):
            raise UserError(
                f"model: cnn takes samples of (channels, length), (channels, height, width) or (channels, depth, "
                f"height, width), and the data have {tuple(input_shape)}; model mlp takes any shape"
            )
        if kernel < 1 or kernel % 2 == 0:
            raise UserError(f"model.kernel: {kernel} is not an odd number; take {max(1, kernel - 1)} or {kernel + 1}")

        def by_dims(name: str) -> type[nn.Module]:
            return cast(type[nn.Module], getattr(nn, f"{name}{dims}d"))

        width, sides = input_shape[0], list(input_shape[1:])
        blocks: list[nn.Module] = []
        for size in channels:
            layers: list[nn.Module] = [by_dims("Conv")(width, size, kernel, padding=kernel // 2, bias=norm is None)]
            if norm is not None:
                layers.append(by_dims("BatchNorm")(size) if norm == "batch" else nn.GroupNorm(math.gcd(8, size), size))
            layers.append(activation_layer(activation))
            if pooling is not None and min(sides) >= 2:
                layers.append(by_dims("MaxPool" if pooling == "max" else "AvgPool")(2))
                sides = [side // 2 for side in sides]
            blocks.append(nn.Sequential(*layers))
            width = size
        self.blocks = nn.Sequential(*blocks)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return (batch, outputs) for `x` (batch, channels, *sides)."""
        return cast(Tensor, self.head(self.dropout(self.blocks(x).flatten(2).mean(dim=2))))


class Recurrent(nn.Module):
    """Recurrent layers in one or both directions, independent of padding, which is at the end.

    The backward direction reads each sequence reversed within its own length: equal to packed sequences, without
    copying the lengths to the host in every step.
    """

    def __init__(self, kind: str, width: int, hidden: int, layers: int, dropout: float, bidirectional: bool):
        super().__init__()
        kinds = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}
        widths = [width] + [hidden * (2 if bidirectional else 1)] * (layers - 1)
        self.forwards = nn.ModuleList(kinds[kind](size, hidden, batch_first=True) for size in widths)
        self.backwards = nn.ModuleList(kinds[kind](size, hidden, batch_first=True) for size in widths if bidirectional)
        self.dropout = nn.Dropout(dropout)
        self.width = hidden * (2 if bidirectional else 1)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the outputs (batch, seq, width) and the last output of each direction (batch, width).

        `x`: (batch, seq, features). `lengths`: (batch,) int64, at least 1; None: all are of full length.
        """
        batch, seq, _ = x.shape
        if lengths is None:
            lengths = torch.full((batch,), seq, device=x.device)
        place = torch.arange(seq, device=x.device).expand(batch, seq)
        reverse = torch.where(place < lengths[:, None], lengths[:, None] - 1 - place, place)
        rows = torch.arange(batch, device=x.device)
        for index, onward in enumerate(self.forwards):
            if index:
                x = self.dropout(x)
            there = onward(x)[0]
            ends = there[rows, lengths - 1]
            if self.backwards:
                back = self.backwards[index](x[rows[:, None], reverse])[0]
                ends = torch.cat([ends, back[rows, lengths - 1]], dim=1)
                there = torch.cat([there, back[rows[:, None], reverse]], dim=2)
            x = there
        return x, ends


@models.register("rnn", tasks=PREDICTION)
class Rnn(nn.Module):
    """A recurrent network over sequences of tokens or vectors; its last outputs go to the head.

    `kind`: rnn, lstm or gru. `hidden`: width of each direction. `layers`: how many. `embedding`: width of the token
    embeddings. `dropout`: between layers and before the last one. Tokens equal to `pad_id` at the end of a sequence
    are not read. Samples are tokens (seq,), numbers (seq,) or vectors (seq, features).
    """

    def __init__(
        self,
        num_outputs: int,
        input_shape: Sequence[int] | None = None,
        vocab_size: int | None = None,
        pad_id: int | None = None,
        kind: Literal["rnn", "lstm", "gru"] = "lstm",
        hidden: Size = 128,
        layers: Size = 1,
        bidirectional: bool = False,
        embedding: Size = 128,
        dropout: Share = 0.0,
    ):
        super().__init__()
        if vocab_size is None and (input_shape is None or len(input_shape) not in (1, 2)):
            found = "have no fixed shape" if input_shape is None else f"have the shape {tuple(input_shape)}"
            raise UserError(
                f"model: rnn takes tokens, or samples of (seq,) or (seq, features), and the samples {found}"
            )
        self.pad_id = pad_id if vocab_size is not None else None
        self.embedding = nn.Embedding(vocab_size, embedding) if vocab_size is not None else None
        features = 1 if input_shape is None or len(input_shape) == 1 else input_shape[1]
        width = embedding if self.embedding is not None else features
        self.recurrent = Recurrent(kind, width, hidden, layers, dropout, bidirectional)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(self.recurrent.width, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return (batch, outputs) for tokens (batch, seq) int64, or floats (batch, seq) or (batch, seq, features)."""
        lengths = token_lengths(x, self.pad_id)
        if self.embedding is not None:
            x = self.embedding(x)
        elif x.dim() == 2:
            x = x.unsqueeze(2)
        return cast(Tensor, self.head(self.dropout(self.recurrent(x, lengths)[1])))


def token_lengths(tokens: Tensor, pad_id: int | None) -> Tensor | None:
    """Return (batch,) int64, the number of tokens before the padding at the end, at least 1; None: there is none.

    Only tokens after the last one that is not `pad_id` are padding: the same id within a sequence is read.
    """
    if pad_id is None:
        return None
    place = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
    return ((tokens != pad_id) * place).amax(dim=1).clamp(min=1)
