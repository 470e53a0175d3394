"""Embeddings with sparse gradients: where they may stay sparse, and where they are made dense."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from distrain.config import OptimSection
from distrain.config.strategies import STRATEGIES
from distrain.optim.optimizers import build_optimizer
from distrain.optim.sharding import ATTEMPT_ERRORS, without_names

logger = logging.getLogger(__name__)


def sparse_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the embeddings of a model whose gradients are sparse, by name."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
            yield name, module


def make_dense(model: nn.Module, sections: Iterable[OptimSection], strategy: str, *, norms: bool, scaled: bool) -> None:
    """Have embeddings give dense gradients if sparse ones cannot be used, and log why.

    `norms`: whether the norm of the gradient is needed; `scaled`: whether the loss is scaled. A dense gradient has the
    same values, and takes the memory of the whole embedding.
    """
    layers = list(sparse_layers(model))
    if not layers:
        return
    if STRATEGIES[strategy].shards:
        why = f"{strategy} reduces dense gradients only; single and ddp take sparse ones"
    elif norms:
        why = "clipping and the detection of anomalies need the norm of a dense gradient"
    elif scaled:
        why = "the scaled loss of fp16 needs dense gradients"
    elif refusing := next((each.name for each in sections if not _takes_sparse(each)), None):
        why = f"{refusing} takes no sparse gradients; sgd and adagrad without weight decay do"
    else:
        return
    for _, layer in layers:
        layer.sparse = False  # type: ignore[assignment]
    others = f" and {len(layers) - 1} others" if len(layers) > 1 else ""
    logger.info(f"model: {layers[0][0] or 'the embedding'}{others} with sparse=True gives dense gradients: {why}")


def _takes_sparse(section: OptimSection) -> bool:
    """Return whether the recipe's optimizer takes a step with a sparse gradient, found by trying."""
    embedding = nn.Embedding(3, 2, sparse=True)
    alone = without_names(section)
    if "embedding" in section.no_decay:
        alone = alone.model_copy(update={"weight_decay": 0.0})
    optimizer = build_optimizer(embedding, alone)
    embedding(torch.tensor([1])).sum().backward()
    try:
        optimizer.step()
        optimizer.step()
    except ATTEMPT_ERRORS:
        return False
    return True
