"""What a layer of a model computes for its samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distrain.config import UserError, close_names
from distrain.networks.huggingface import is_transformers
from distrain.optim.losses.shapes import wide


class Embeddings:
    """Takes what a layer returns, or what the output layer reads, while the model is called."""

    def __init__(self, model: nn.Module, layer: str | None):
        """`layer`: its name, as in `model.named_modules()`; None: what the layer reads that makes the outputs."""
        self._model, self._layer = model, layer
        modules = dict(model.named_modules())
        if layer is not None and layer not in modules:
            has = f"it has {', '.join([name for name in modules if name][:20])}{', …' if len(modules) > 21 else ''}"
            raise UserError(f"--layer: the model has no layer {layer!r}{close_names(layer, modules, has)}")
        self._name = layer if layer is not None else _output_layer(model)
        self._module = modules[self._name]

    def of(self, call: Callable[[], Any], count: int) -> Tensor:
        """Return what the layer gives for the batch that `call` passes, of `count` samples: (count, ...) float.

        `call` returns the model's outputs.
        """
        taken: list[tuple[Any, Any]] = []
        hook = self._module.register_forward_hook(lambda _, inputs, output: taken.append((inputs, output)))
        try:
            outputs = call()
        finally:
            hook.remove()
        if len(taken) != 1:
            raise UserError(
                f"--layer {self._name}: the model calls it {len(taken)} times for a batch, and one output is expected; "
                "name another layer"
            )
        inputs, output = taken[0]
        if self._layer is None and not _same(output, outputs):
            raise UserError(
                f"which layer makes the model's outputs is not known ({self._name} does not); name the layer whose "
                "output you want with --layer"
            )
        found = _first(inputs if self._layer is None else output)
        if found is None or len(found) != count or not found.is_floating_point():
            shown = type(output).__name__ if found is None else f"{found.dtype} of shape {tuple(found.shape)}"
            raise UserError(
                f"--layer {self._name}: it gives {shown} for a batch of {count} samples; expected numbers for each"
            )
        return wide(found.detach())


def _output_layer(model: nn.Module) -> str:
    """Return the name of the layer that should make the outputs: what the model states, or its last linear one."""
    stated = getattr(type(model), "output_head", "")
    names = {id(module): name for name, module in model.named_modules()}
    if stated:
        return str(stated)
    if is_transformers(model) and (head := model.get_output_embeddings()) is not None:  # type: ignore[operator]
        return names[id(head)]
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise UserError("the model has no linear layer that makes its outputs; name a layer with --layer")
    return linear[-1]


def _same(output: Any, outputs: Any) -> bool:
    """Whether a layer has returned the model's outputs, or one of them."""
    found = _first(output)
    return found is not None and any(
        found.numel() == each.numel() and bool(torch.equal(found.flatten().float(), each.flatten().float()))
        for each in _tensors(outputs)
    )


def _first(value: Any) -> Tensor | None:
    """Return the first tensor of what a layer has returned."""
    return next(_tensors(value), None)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
        return
    for each in value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ():
        yield from _tensors(each)
