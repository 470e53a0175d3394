"""The repeated blocks of a model, the units of sharding and of activation checkpointing."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distrain.config import UserError, close_names

logger = logging.getLogger(__name__)

_CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
_WORTH = 0.1
"""The least share of all parameters that makes a further class one of a model's blocks."""


# --------------------------------------------------------------------------------------------------------------------
# Finding blocks


def block_classes(model: nn.Module, name: str | None = None) -> list[type[nn.Module]]:
    """Return the classes of a model's repeated blocks, those with the most parameters first; empty if it has none.

    With a `name`, the classes of that name. Otherwise those that the model, or a part of it, lists in
    `_no_split_modules`, as models of transformers do. Otherwise classes with two or more instances in a ModuleList,
    Sequential or ModuleDict: the one with the most parameters, then others that add a tenth of the model. Single layers
    of torch.nn are no blocks. Raises UserError for a name that is not in the model.
    """
    by_class: dict[type[nn.Module], list[nn.Module]] = {}
    for module in model.modules():
        by_class.setdefault(type(module), []).append(module)
    if name is not None:
        if found := [kind for kind in by_class if kind.__name__ == name]:
            return found
        names = sorted({kind.__name__ for kind, instances in by_class.items() if not _is_layer(instances[0])})
        hint = close_names(name, names) or f"; it has {', '.join(names)}"
        raise UserError(f"train.activation_checkpointing: the model has no class {name!r}{hint}")

    repeated = {
        id(child) for module in model.modules() if isinstance(module, _CONTAINERS) for child in module.children()
    }
    listed = {each for module in model.modules() for each in getattr(module, "_no_split_modules", None) or ()}
    own = [kind for kind in by_class if kind.__name__ in listed]
    # some list the embedding too, which is not repeated
    in_containers = [kind for kind in own if any(id(each) in repeated for each in by_class[kind])]
    if own:
        return sorted(in_containers or own, key=lambda kind: -len(_parameters(by_class[kind])))

    sizes = {id(parameter): parameter.numel() for parameter in model.parameters()}
    candidates = {
        kind: (_parameters(inside), len(inside))
        for kind, instances in by_class.items()
        if kind not in _CONTAINERS and not _is_layer(instances[0])
        for inside in [[each for each in instances if id(each) in repeated]]
        if len(inside) >= 2
    }
    blocks: list[type[nn.Module]] = []
    left, enough = set(sizes), max(_WORTH * sum(sizes.values()), 1)
    while candidates:
        # of two that hold the same, the smaller ones
        weights = {
            kind: (sum(sizes[each] for each in held & left), count) for kind, (held, count) in candidates.items()
        }
        best = max(candidates, key=lambda kind: weights[kind])
        if weights[best][0] < enough:
            break
        blocks.append(best)
        left -= candidates.pop(best)[0]
    return blocks


def blocks_of(model: nn.Module, classes: list[type[nn.Module]]) -> dict[str, nn.Module]:
    """Return the instances of these classes by name, in the model's order; none that lies within another."""
    found: dict[str, nn.Module] = {}
    kinds = tuple(classes)
    for name, module in model.named_modules():
        if isinstance(module, kinds) and not any(name.startswith(f"{outer}.") or not outer for outer in found):
            found[name] = module
    return found


def _is_layer(module: nn.Module) -> bool:
    """Whether a module is a single layer of torch, which keeps only its inputs anyway."""
    return type(module).__module__.startswith("torch.nn.") and next(module.children(), None) is None


def _parameters(modules: list[nn.Module]) -> set[int]:
    return {id(parameter) for module in modules for parameter in module.parameters()}


# --------------------------------------------------------------------------------------------------------------------
# Activation checkpointing


def checkpoint_activations(model: nn.Module, setting: bool | str) -> None:
    """Make each block keep only its inputs and recompute its activations in the backward pass.

    `setting` is the recipe's `train.activation_checkpointing`: False does nothing, True selects the model's blocks, a
    name the instances of that class. Losses, gradients and buffers are the same to the bit, as random states and
    buffers are restored for the recomputation. Names do not change. Call it before the model is sharded, wrapped or
    compiled. Raises UserError for an unknown class, and for a model without repeated blocks.
    """
    if setting is False:
        return
    classes = block_classes(model, setting if isinstance(setting, str) else None)
    if not classes:
        names = sorted({type(each).__name__ for each in model.modules() if not _is_layer(each)})
        raise UserError(
            f"train.activation_checkpointing: {type(model).__name__} has no repeated blocks; name the class whose "
            f"activations to recompute (it has {', '.join(names)}), or set it to false"
        )
    blocks = blocks_of(model, classes)
    for block in blocks.values():
        # in the instance's dictionary: a wrapper would change the names of parameters; hooks of sharding run around
        # `forward`, outside the recomputed part
        block.forward = partial(_recomputed, block, block.__dict__.get("forward"), _Buffers())
    shown = " and ".join(kind.__name__ for kind in classes)
    logger.info(f"activations of {len(blocks)} x {shown} are recomputed in the backward pass")


def _recomputed(
    block: nn.Module, own: Callable[..., Any] | None, buffers: _Buffers, /, *args: Any, **kwargs: Any
) -> Any:
    """Call a block's `forward`; keep only its inputs if a backward pass will follow."""

    def forward(*args: Any) -> Any:
        return own(*args, **kwargs) if own is not None else type(block).forward(block, *args, **kwargs)

    if not torch.is_grad_enabled():
        return forward(*args)
    if torch.compiler.is_compiling():
        return checkpoint(forward, *args, use_reentrant=False)  # traced: there is nothing to restore
    contexts = partial(_contexts, block, buffers)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=True, context_fn=contexts)


def _contexts(block: nn.Module, buffers: _Buffers) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Return the contexts of the first computation and of the recomputation."""
    before = buffers.before(block)
    # `checkpoint` restores torch's own generators
    python, numpy = random.getstate(), np.random.get_state()

    @contextmanager
    def recomputing() -> Iterator[None]:
        current_python, current_numpy = random.getstate(), np.random.get_state()
        random.setstate(python)
        np.random.set_state(numpy)
        current = {key: holder[name] for key, (holder, name, _) in before.items()}
        for holder, name, value in before.values():
            holder[name] = value
        try:
            yield
        finally:
            for key, (holder, name, _) in before.items():
                holder[name] = current[key]
            random.setstate(current_python)
            np.random.set_state(current_numpy)

    return buffers.watched(block, before), recomputing()


_Held = dict[str, tuple[dict[str, Tensor | None], str, Tensor]]
"""By a buffer's name: its dictionary, its key there, and a copy of its value."""

_SMALL = 2**16
"""Most elements of a buffer that is copied in each pass, whether it changes or not."""


class _Buffers:
    """The buffers that a block's forward pass may change, such as the statistics of a batch norm.

    The recomputation gets copies of their first values, so that they are not updated twice. Any may begin to change in
    a later pass, and a batch norm changes its own without incrementing their version: so small ones are copied in each
    pass, and large ones, such as masks, in the first and from then on where they have changed.
    """

    def __init__(self) -> None:
        self._moving: set[str] | None = None
        """The names of large ones that have changed; None before the first pass."""

    def before(self, block: nn.Module) -> _Held:
        """Return copies of those that may change."""
        return {
            key: (holder, name, value.clone())
            for key, holder, name, value in _buffers(block)
            if self._moving is None or value.numel() <= _SMALL or key in self._moving
        }

    @contextmanager
    def watched(self, block: nn.Module, before: _Held) -> Iterator[None]:
        """Find the large ones that this pass changes; those that were not copied are added to `before`."""
        large = {key: (value, value._version) for key, _, _, value in _buffers(block) if value.numel() > _SMALL}
        yield
        self._moving = set() if self._moving is None else self._moving
        for key, holder, name, value in _buffers(block):
            if key not in large or (value is large[key][0] and value._version == large[key][1]):
                continue
            self._moving.add(key)
            # its first value is gone where it was written into: what counts is that this is not done twice
            old = large[key][0]
            before.setdefault(key, (holder, name, value.clone() if value is old else old))


def _buffers(block: nn.Module) -> Iterator[tuple[str, dict[str, Tensor | None], str, Tensor]]:
    for prefix, module in block.named_modules():
        for name, value in module._buffers.items():
            if value is not None:
                yield f"{prefix}.{name}", module._buffers, name, value
