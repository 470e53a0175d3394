"""Which parameters are matrices to an optimizer that treats those otherwise: the weights of hidden layers."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from distrain.networks.calling import unwrap_model
from distrain.optim.averages import canonical_name

_EMBEDS = re.compile(r"emb|(^|[._])pos(ition)?([._]|$)|(cls|mask|class)_?token", re.IGNORECASE)
"""Names of parameters that are looked up or added, and multiply nothing."""


def matrix_names(model: nn.Module, skipped: Iterable[str], *, with_head: bool = False) -> set[str]:
    """Return the canonical names of the matrices that a model multiplies by within: those of hidden layers.

    Parameters of two dimensions, and the weights of convolutions, whose first dimension is multiplied by the product of
    the others; but not those `skipped` (norms, biases, embeddings), nor any that is named like an embedding. The head
    is no hidden layer: the last module that has a matrix, where others have some too.
    """
    model = unwrap_model(model)
    first_name: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first_name.setdefault(id(parameter), canonical_name(name))
    owned: list[set[str]] = []
    for module in model.modules():
        convolves = isinstance(module, nn.modules.conv._ConvNd)
        names = set()
        for parameter in module.parameters(recurse=False):
            # what DeepSpeed has sharded is empty to look at
            dimensions = len(getattr(parameter, "ds_shape", parameter.shape))
            if dimensions == 2 or (convolves and dimensions > 2):
                names.add(first_name[id(parameter)])
        if names:
            owned.append(names)
    found = set().union(*owned) - set(skipped)
    found = {name for name in found if not _EMBEDS.search(name)}
    return found if with_head or len(owned) < 2 else found - owned[-1]
