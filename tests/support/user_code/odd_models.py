"""Models of everything that a user's own may contain, named in the recipes of tests as `odd_models:NAME`.

All take points of 5 numbers, (batch, 5), and return logits of 3 classes, (batch, 3).
"""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 8


class Block(nn.Module):
    """A residual block."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Blocks(nn.Module):
    """Two blocks between an input and an output layer: what the others change."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(5, WIDTH)
        self.blocks = nn.ModuleList(self.block() for _ in range(2))
        self.head = nn.Linear(WIDTH, 3)

    def block(self) -> nn.Module:
        """Return a new block."""
        return Block()

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class TiedHead(Blocks):
    """The output layer's weight is the embedding's, as in GPT-2."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(3, WIDTH)
        self.head = nn.Linear(WIDTH, 3, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x) + self.embed(x[:, :3].argmax(1))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class TiedAcross(Blocks):
    """Both blocks share one weight and one 0-d scale."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.scale = nn.Parameter(torch.tensor(0.7))
        self.blocks[1].up.weight = self.blocks[0].up.weight
        self.blocks[1].scale = self.blocks[0].scale

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        for block in self.blocks:
            x = block(x) * block.scale
        return self.head(x)


class TiedOut(Blocks):
    """A block shares its weight with a layer outside of all blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.middle = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.middle.weight = self.blocks[1].up.weight

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.middle(self.into(x))[:, :3]


class FrozenBlock(Blocks):
    """The first block, and a bias elsewhere, are not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[0].requires_grad_(False)
        self.head.bias.requires_grad_(False)


class Idle(Blocks):
    """A layer outside and one in each block are never called."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Linear(4, 4)
        for block in self.blocks:
            block.idle = nn.Linear(3, 3)


class IdleBlock(Blocks):
    """A whole block is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks.append(self.block())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks[1](self.blocks[0](self.into(x))))


class Buffered(Blocks):
    """Buffers of all kinds, and a layer's that is there under two names; one of them changes in every forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.tensor([True, True, False]))
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))
        self.register_buffer("offset", torch.full((3,), 0.25), persistent=False)
        self.register_buffer("mean", torch.zeros(5))
        self.register_buffer("empty", torch.zeros(0, 3))
        self.blocks[0].register_buffer("scale", torch.full((WIDTH,), 0.5))
        self.blocks[1].register_buffer("scale", self.blocks[0].scale)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.passes += 1
            # replaced, not written into
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        logits = super().forward(x - self.mean)
        return logits * self.blocks[1].scale[:3] + self.offset * self.mask


class Normed(Blocks):
    """Batch norm, within the blocks and outside."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(5, WIDTH, bias=False)  # a bias would be normalised away, and its gradient noise
        self.norm = nn.BatchNorm1d(WIDTH)

    def block(self) -> nn.Module:
        block = Block()
        block.norm = nn.BatchNorm1d(WIDTH)
        return block

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.into(x))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Scalars(Blocks):
    """0-d parameters at the root and within the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(0.8))
        self.fixed = nn.Parameter(torch.tensor(1.5), requires_grad=False)

    def block(self) -> nn.Module:
        return Scaled()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.temperature * self.fixed


class Scaled(Block):
    """A block with a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * super().forward(x)


class Empty(Blocks):
    """Parameters without elements, at the root and within the blocks, used and unused."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(0))
        self.rowless = nn.Parameter(torch.zeros(0, 4))
        self.blocks[0].columnless = nn.Parameter(torch.zeros(WIDTH, 0))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.nothing.sum() + self.blocks[0].columnless.sum()


class Small(nn.Module):
    """Parameters with fewer rows, and fewer elements, than there are ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.row = nn.Parameter(torch.linspace(-1, 1, 15).reshape(1, 15))
        self.one = nn.Parameter(torch.ones(1))
        self.two = nn.Parameter(torch.tensor([[0.5], [2.0]]))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.row.view(5, 3) + self.one * x[:, :3]) * self.two[0] + self.two[1] * x[:, 2:]


class Strided(Blocks):
    """Parameters that are views, transposed, or channels-last."""

    def __init__(self) -> None:
        super().__init__()
        self.into.weight = nn.Parameter(torch.linspace(-1, 1, 5 * WIDTH).reshape(5, WIDTH).t())
        together = torch.linspace(-0.5, 0.5, 2 * WIDTH * 4).reshape(2, 4 * WIDTH)
        for block, view in zip(self.blocks, together, strict=True):
            block.up.bias = nn.Parameter(view[: 4 * WIDTH : 2])
        self.conv = nn.Conv2d(1, 2, 2).to(memory_format=torch.channels_last)
        self.conv.weight = nn.Parameter(torch.linspace(-1, 1, 24).reshape(2, 2, 2, 3).permute(0, 3, 1, 2)[:, :1])

    def forward(self, x: Tensor) -> Tensor:
        image = x[:, None, :4].reshape(-1, 1, 2, 2)
        return super().forward(x) + self.conv(image).flatten(1).sum(1, keepdim=True) * torch.arange(3.0)


class SameMemory(Blocks):
    """Two parameters are views of the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.head.weight = nn.Parameter(self.blocks[0].up.weight.data[:3])


class Single(nn.Module):
    """One single parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 15).reshape(3, 5))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Twice(Blocks):
    """One of the blocks, and the input layer's activation, are used twice."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        for block in (*self.blocks, self.blocks[0]):
            x = block(x)
        return self.head(x)


class Listed(nn.Module):
    """ParameterList, ParameterDict, and modules with odd names."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.full((5, 3), 0.1 * i)) for i in range(3)])
        self.named = nn.ParameterDict({"a bias": torch.zeros(3), "scale": torch.ones(3)})
        self.layers = nn.ModuleDict({"größe/1": nn.Linear(3, 4), "module": nn.Linear(4, 4), "_orig": nn.Linear(4, 3)})

    def forward(self, x: Tensor) -> Tensor:
        x = x @ sum(self.weights) * self.named["scale"] + self.named["a bias"]
        for layer in self.layers.values():
            x = torch.tanh(layer(x))
        return x


class Changing(Blocks):
    """The loss reaches other layers from the third forward pass on."""

    def __init__(self) -> None:
        super().__init__()
        self.late = nn.Linear(5, 3)
        self.passes_so_far = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.passes_so_far += 1
        out = super().forward(x)
        return out + self.late(x) if self.passes_so_far > 4 else out


class Leaving(Blocks):
    """A layer is used up to the sixth forward pass alone; passes of a rehearsal, which buffers forget, do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.late = nn.Linear(5, 3)
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.passes += self.training
        out = super().forward(x)
        return out + self.late(x) if self.passes <= 6 else out


class Routed(Blocks):
    """A layer is used by the micro-batches whose first sample is on one side."""

    def __init__(self) -> None:
        super().__init__()
        self.route = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        side = bool(x[0, 0] > 0)
        x = self.into(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x + self.route(x) if side else x)


class Headed(Blocks):
    """Two heads, one of which a micro-batch uses."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out if bool(x[0, 0] > 0) else self.other(self.into(x))


class Dropped(Blocks):
    """A block is left out by some micro-batches, as by layer drop."""

    def forward(self, x: Tensor) -> Tensor:
        side = bool(x[0, 0] > 0)
        x = self.blocks[0](self.into(x))
        return self.head(self.blocks[1](x) if side else x)


class Expert(Blocks):
    """One of two blocks is used by a micro-batch, the other one by others; from the fourth pass on alone."""

    def __init__(self, since: int = 4) -> None:
        super().__init__()
        self.passes, self.since = 0, since

    def forward(self, x: Tensor) -> Tensor:
        self.passes += self.training
        side = bool(x[0, 0] > 0) or self.passes < self.since
        return self.head(self.blocks[0 if side else 1](self.blocks[1](self.into(x))))


class Growing(Blocks):
    """All ranks leave a block out up to their sixth pass, those of a rehearsal not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.passes += self.training
        x = self.into(x)
        for block in self.blocks if self.passes > 6 else self.blocks[:1]:
            x = block(x)
        return self.head(x)


class Sparse(Blocks):
    """Embeddings with sparse gradients; `by_hand` is one that no layer tells of."""

    def __init__(self, by_hand: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(3, WIDTH, sparse=True)
        self.bag = nn.EmbeddingBag(3, WIDTH, sparse=True)
        self.table = nn.Parameter(torch.linspace(-1, 1, 3 * WIDTH).reshape(3, WIDTH))
        self.by_hand = by_hand

    def forward(self, x: Tensor) -> Tensor:
        tokens = x[:, :3].argmax(1)
        looked_up = F.embedding(tokens, self.table, sparse=self.by_hand)
        x = self.into(x) + self.embed(tokens) + self.bag(tokens[:, None]) + looked_up
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class NormedBy(Blocks):
    """A layer of torch's that normalises between input and blocks."""

    def __init__(self, norm: str, spatial: int = 0) -> None:
        super().__init__()
        self.norm = getattr(nn, norm)(*((2, WIDTH) if norm == "GroupNorm" else (WIDTH,)))
        self.spatial = spatial

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        x = self.norm(x.reshape(*x.shape, *[1] * self.spatial)).flatten(1)
        return self.head(x)


class Misshapen(Blocks):
    """Breaks with an error of torch's."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.into(x).reshape(2, -1, 1))


class Failing(Blocks):
    """Breaks on one rank alone: in the forward or the backward pass of a block, at a pass of training."""

    def __init__(self, where: str = "forward", at: int = 6, rank: int = 1) -> None:
        super().__init__()
        self.where, self.at, self.rank, self.passes = where, at, rank, 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        self.passes += self.training
        breaks = self.training and self.passes == self.at and int(os.environ.get("RANK", "0")) == self.rank
        x = self.blocks[0](x)
        if breaks:
            if self.where == "forward":
                raise ArithmeticError("the model broke")
            x.register_hook(_break)
        return self.head(self.blocks[1](x))


def _break(gradient: Tensor) -> None:
    raise ArithmeticError("the model broke")


class Wide(Blocks):
    """Its matrices are so large that ZeRO-3 does not keep them on every rank."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.head = nn.Linear(5, 400), nn.Linear(400, 3)

    def block(self) -> nn.Module:
        return Block(400)


class Mixed(Blocks):
    """Every way in which autocast meets a weight: cast once, cast twice, cast and read, not cast, through a view."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(3, WIDTH)
        self.attend = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.recur = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.slide = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.twice = nn.Linear(WIDTH, WIDTH)
        self.read = nn.Linear(WIDTH, WIDTH)
        self.turned = nn.Parameter(torch.linspace(-0.3, 0.3, WIDTH * WIDTH).reshape(WIDTH, WIDTH))
        self.sliced = nn.Parameter(torch.linspace(0.3, -0.3, 2 * WIDTH * WIDTH).reshape(2 * WIDTH, WIDTH))
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x.argsort(1)[:, :4] % 3) + self.into(x)[:, None]
        tokens = tokens + self.attend(tokens, tokens, tokens, need_weights=False)[0]
        tokens = tokens + self.recur(tokens)[0] + self.slide(tokens.transpose(1, 2)).transpose(1, 2)
        tokens = tokens + self.twice(torch.tanh(self.twice(tokens))) + self.read(tokens) * self.read.weight.norm()
        tokens = tokens @ self.turned.t() + tokens @ self.sliced[:WIDTH] + self.frozen(self.frozen(tokens))
        x = tokens.mean(1)
        for block in self.blocks:
            x = block(x)
        return self.head(x)
