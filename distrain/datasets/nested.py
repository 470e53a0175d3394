"""Values of a batch: a tensor, or a dict, tuple or list of values, nested as a sample is.

A graph of PyTorch Geometric, or a batch of graphs, is a value too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

Kinds = type | tuple[type, ...]


def tensors_in(value: Any, kinds: Kinds = Tensor) -> Iterator[Any]:
    """Yield the tensors of a value, or what is of other `kinds`, in order."""
    if isinstance(value, kinds):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from tensors_in(each, kinds)
    elif isinstance(value, tuple | list):
        for each in value:
            yield from tensors_in(each, kinds)
    elif is_graph(value):
        yield from tensors_in(value.to_dict(), kinds)


def map_tensors(change: Callable[[Any], Any], value: Any, kinds: Kinds = Tensor) -> Any:
    """Return the value with each of its tensors, or what is of other `kinds`, changed; itself where it has none."""
    if isinstance(value, kinds):
        return change(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(change, each, kinds) for key, each in value.items()}
    if isinstance(value, tuple):
        changed = [map_tensors(change, each, kinds) for each in value]
        return type(value)(*changed) if hasattr(value, "_fields") else tuple(changed)
    if isinstance(value, list):
        return [map_tensors(change, each, kinds) for each in value]
    return copy(value).apply(change) if is_graph(value) else value


def rows_of(value: Any, keep: list[bool]) -> Any:
    """Return a value without the rows where `keep` is False, of each tensor and list with a row for each sample."""
    if isinstance(value, Tensor):
        has_rows = value.dim() > 0 and len(value) == len(keep)
        return value[[at for at, kept in enumerate(keep) if kept]] if has_rows else value
    if isinstance(value, Mapping):
        return {key: rows_of(each, keep) for key, each in value.items()}
    if is_graph(value) and getattr(value, "num_graphs", None) == len(keep):
        return graph_batch([value[at] for at, kept in enumerate(keep) if kept])
    if isinstance(value, list) and len(value) == len(keep):
        return [each for each, kept in zip(value, keep, strict=True) if kept]
    if isinstance(value, tuple | list):
        changed = [rows_of(each, keep) for each in value]
        return type(value)(*changed) if hasattr(value, "_fields") else type(value)(changed)
    return value


def padded(rows: Iterable[np.ndarray], fill: int) -> Tensor:
    """Return rows of numbers as (rows, longest) int64, filled at their ends."""
    tensors = [torch.from_numpy(row.astype(np.int64)) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=fill)


def is_graph(value: Any) -> bool:
    """Whether a value is a graph of PyTorch Geometric, or a batch of graphs."""
    return hasattr(value, "to_dict") and any(
        kind.__module__.startswith("torch_geometric.") for kind in type(value).mro()
    )


def graph_batch(graphs: Sequence[Any]) -> Any:
    """Return graphs of PyTorch Geometric, of any sizes, as one batch."""
    from torch_geometric.data import Batch

    return Batch.from_data_list(list(graphs))
