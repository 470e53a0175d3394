"""Embeddings with sparse gradients: where they can stay so, and where dense ones take their place."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from torch import nn

from distrain.config import OptimSection
from distrain.config.strategies import STRATEGIES
from distrain.optim.optimizers import build_optimizer

logger = logging.getLogger(__name__)


def sparse_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the embeddings of a model whose gradients are sparse, by name."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
            yield name, module


def settle_sparse(model: nn.Module, section: OptimSection, strategy: str, *, norms: bool, scaled: bool) -> None:
    """Have embeddings give dense gradients where sparse ones cannot be taken; why is logged.

    `norms`: whether the norm of the gradient is wanted; `scaled`: whether the loss is scaled. A dense gradient has the
    same values, and takes the memory of the whole embedding.
    """
    layers = list(sparse_layers(model))
    if not layers:
        return
    if STRATEGIES[strategy].shards:
        why = f"{strategy} reduces dense gradients only; single and ddp take sparse ones"
    elif norms:
        why = "clipping and watching for anomalies need the norm of a dense gradient"
    elif scaled:
        why = "the scaled loss of fp16 needs dense gradients"
    elif not _takes_sparse(section):
        why = f"{section.name} takes no sparse gradients; sgd and adagrad without weight decay do"
    else:
        return
    for _, layer in layers:
        layer.sparse = False  # type: ignore[assignment]
    others = f" and {len(layers) - 1} others" if len(layers) > 1 else ""
    logger.info(f"model: {layers[0][0] or 'the embedding'}{others} with sparse=True gives dense gradients: {why}")


def _takes_sparse(section: OptimSection) -> bool:
    """Return whether the recipe's optimizer makes a step with a sparse gradient, found by trying."""
    embedding = nn.Embedding(3, 2, sparse=True)
    decays = [section.weight_decay, *(group.weight_decay or 0.0 for group in section.groups)]
    decay = 0.0 if "embedding" in section.no_decay else max(decays)
    alone = section.model_copy(update={"groups": [], "freeze": [], "weight_decay": decay, "no_decay": []})
    optimizer = build_optimizer(embedding, alone)
    embedding(torch.tensor([1])).sum().backward()
    try:
        optimizer.step()
        optimizer.step()
    except (RuntimeError, NotImplementedError, ValueError, AssertionError):
        return False
    return True
