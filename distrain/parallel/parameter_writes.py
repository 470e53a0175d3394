"""What a model's own code makes of its parameters in a forward pass: writes into them, or puts others there.

Momentum encoders and weights that are normalised before their use do so. Where a rank computes with the parameters that
the optimizer steps, what is written stays. Where it computes with a copy of them, or with what was gathered of shards,
the next step overwrites it, so that has to be an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from distrain.config import UserError
from distrain.networks.undisturbed import Attributes
from distrain.parallel.comm import World
from distrain.parallel.contents import modules_with_extra_state
from distrain.parallel.model_tensors import buffer_slots, remember
from distrain.system.compiler import without_compiler

_ALIKE = 1e-4
"""How far ranks may be apart, relative to the largest value: GPUs of two kinds round differently."""


def looks_at(step: int) -> bool:
    """Whether values are compared in a step of an attempt, from 1: in 1, 2, 4, 8 and so on.

    An average that starts as what it averages changes in the second one, and code may begin to write in any. What only
    values tell, as what is written by `parameter.data`, is found by twice the steps that were before it.
    """
    return not step & (step - 1)


class Unwritten:
    """Parameters that no code has written into so far, of which no copies are kept: tells when one has.

    What a step costs here is one read of all of them on their device, and two calls in Python.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]):
        self.parameters = list(parameters)
        groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for each in self.parameters:
            if each.dtype.is_floating_point and each.dtype.itemsize > 1:
                groups.setdefault((each.dtype, each.device), []).append(each)
        self._groups = list(groups.values())

    def versions(self) -> list[int]:
        """Return how often torch has written into each: `parameter.data` is another tensor with a count of its own."""
        return list(map(attrgetter("_version"), self.parameters))

    @torch.no_grad()
    def sizes(self) -> list[Tensor]:
        """Return the norms (n,) of the floats among them by their dtype, on their device."""
        return [torch.stack(torch._foreach_norm(group)) for group in self._groups]

    def written(self, versions: Sequence[int]) -> list[nn.Parameter]:
        """Return those that torch has written into since `versions` was that."""
        now = self.versions()
        if now == versions:
            return []
        return [each for each, one, other in zip(self.parameters, versions, now, strict=True) if one != other]

    def resized(self, sizes: Sequence[Tensor]) -> list[Tensor]:
        """Return those whose norms are not what `sizes` has returned before; the host waits for the device."""
        return [
            each
            for group, before, now in zip(self._groups, sizes, self.sizes(), strict=True)
            for each, same in zip(group, before.isclose(now, rtol=0, atol=0, equal_nan=True).tolist(), strict=True)
            if not same
        ]


def replaced(names: Sequence[str]) -> UserError:
    """Return the error of parameters in whose place the model's code has put others."""
    return UserError(
        f"the model's code has put another Parameter in the place of {', '.join(names[:5])}, and the "
        "optimizer trains the one that the model was built with. Change a parameter in place, under torch.no_grad(): "
        "self.weight.copy_(...), self.weight.clamp_(...)"
    )


def added(names: Sequence[str]) -> UserError:
    """Return the error of parameters that the model's code has made in a forward pass."""
    return UserError(
        f"the model's code has made {', '.join(names[:5])} in a forward pass, and the optimizer trains, and a run that "
        "resumes builds, what is there before. Make layers in __init__, or take lazy ones, which have their sizes from "
        "the data (nn.LazyLinear)"
    )


def lost(names: Sequence[str], strategy: str) -> UserError:
    """Return the error of parameters into which the model's code writes where that is lost with the step."""
    others = f" and {len(names) - 1} others" if len(names) > 1 else ""
    return UserError(
        f"the model's code, or a callback, writes into parameter {names[0]}{others}, and under {strategy} it has a "
        "copy of what is trained and kept, so that this is lost with the step. Use ddp, or have the forward pass "
        "compute what it needs of the parameter (functional.normalize(self.weight)) and keep what the optimizer does "
        "not train, such as a moving average, in buffers (register_buffer)"
    )


def late(names: Sequence[str]) -> UserError:
    """Return the error of passes that are made for nothing, and have written into parameters of unknown values."""
    return UserError(
        f"the model's code has begun to write into {', '.join(names[:5])}, and has done so in passes of a step that is "
        "skipped, or that are made again, when nothing was kept of the values before. Resume from the newest "
        "checkpoint; or keep in buffers (register_buffer) what the optimizer does not train"
    )


def check_hooks(model: nn.Module, strategy: str, *, accumulating: bool = True) -> None:
    """Raise UserError for hooks on the gradients of parameters, where a strategy computes with others in their place.

    `accumulating`: whether those that are called with an accumulated gradient are lost as well.
    """
    names = [
        name
        for name, parameter in model.named_parameters()
        if parameter._backward_hooks or (accumulating and parameter._post_accumulate_grad_hooks)
    ]
    if names:
        others = f" and {len(names) - 1} others" if len(names) > 1 else ""
        raise UserError(
            f"parameter {names[0]}{others} has a hook on its gradient (register_hook), and {strategy} computes with "
            "tensors of its own in the place of the model's parameters, so that nothing would call it. Use ddp, or "
            "change the value in the forward pass, whose gradient follows (functional.linear(x, self.weight * mask)), "
            "or the gradients in a callback, before the optimizer steps (run.optimizer.register_step_pre_hook)"
        )


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape and dtype hold the same, NaN included."""
    if torch.equal(one, other):
        return True
    one, other = (each.contiguous().reshape(-1).view(torch.uint8) for each in (one, other))
    return torch.equal(one, other)


def holds(whole: Tensor, values: Tensor, start: int) -> bool:
    """Whether a tensor has the `values` in its flat range from `start` on, as far as its dtype can tell."""
    values = values.detach().reshape(-1)
    own = whole.detach().reshape(-1)[start : start + values.numel()]
    return same_bits(own, values.to(own))


class Slots:
    """Where the modules of a model hold their parameters, as it was built."""

    def __init__(self, model: nn.Module):
        self._model = model
        self._held = [
            (module, key, f"{prefix}.{key}" if prefix else key, parameter)
            for prefix, module in model.named_modules()
            for key, parameter in module._parameters.items()
            if parameter is not None
        ]
        self._places = {(id(module), key) for module, key, *_ in self._held}
        self._of_module: dict[int, list[tuple[str, str, nn.Parameter]]] = {}
        for module, key, name, parameter in self._held:
            self._of_module.setdefault(id(module), []).append((key, name, parameter))

    def of(self, module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters of a module alone, by their names in the model."""
        yield from ((name, own) for _, name, own in self._of_module.get(id(module), ()))

    def check(self, module: nn.Module | None = None) -> None:
        """Raise UserError where a module, or any of them, holds another parameter now, or a further one."""
        held = (
            [(each, key, name, own) for each, key, name, own in self._held]
            if module is None
            else [(module, key, name, own) for key, name, own in self._of_module.get(id(module), ())]
        )
        if names := [name for each, key, name, own in held if each._parameters.get(key) is not own]:
            raise replaced(names)
        modules = self._model.named_modules() if module is None else [(type(module).__name__, module)]
        if late := [
            f"{name}.{key}".removeprefix(".")
            for name, each in modules
            for key, parameter in each._parameters.items()
            if parameter is not None and (id(each), key) not in self._places
        ]:
            raise added(late)


def check_alike(world: World, parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Raise UserError for parameters that every rank holds whole and that differ between the ranks. All ranks call."""
    named = [(name, parameter.detach()) for name, parameter in parameters]
    if world.world_size == 1 or not named:
        return
    # one wait for the device, and not one for each parameter
    ranks = world.gather(torch.stack([_digest(parameter).to(world.device) for _, parameter in named]).tolist())
    differing = []
    for place, (name, parameter) in enumerate(named):
        if all(digests[place] == ranks[0][place] for digests in ranks):
            continue
        first = parameter.clone(memory_format=torch.contiguous_format)
        dist.broadcast(first if not first.is_complex() else torch.view_as_real(first), src=0)
        apart = (parameter - first).abs().max() > _ALIKE * first.abs().max()
        if world.sum(apart.double()).item():
            differing.append(name)
    if differing:
        raise UserError(
            f"{', '.join(differing[:5])} differ between the ranks: the model's code, or a "
            "callback, writes into these parameters what a rank makes of its own samples. Make them buffers "
            "(register_buffer), of which all ranks get rank 0's, or average what is written over the ranks "
            "(torch.distributed.all_reduce)"
        )


def _digest(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor's bits as whole numbers, () int64: the same for the same bits, on each device."""
    whole = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[whole.dtype.itemsize]
    return whole.contiguous().reshape(-1).view(kind).sum(dtype=torch.int64)


class Written(TorchDispatchMode):
    """Notes which parameters an operation writes into, or into a view of them."""

    def __init__(self) -> None:
        super().__init__()
        self.names: dict[str, None] = {}
        """Those that were, in the order of the operations."""
        self._watched: dict[int, str] = {}
        """Names by their memory."""

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Watch a model's parameters; those that have other memory in the end count as written into."""
        named = dict(model.named_parameters())
        self._watched = {_memory(parameter): name for name, parameter in named.items()}
        yield
        self.names |= {name: None for name, each in named.items() if self._watched.get(_memory(each)) != name}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._watched:
            self.names |= dict.fromkeys(self._watched[m] for m in _written_by(func, args, kwargs) if m in self._watched)
        return func(*args, **(kwargs or {}))


class restored(TorchDispatchMode):
    """Restores a model's buffers, attributes, extra state and `parameters` on leaving, and drops its gradients.

    A parameter is copied when it is first written into: copies of all would need as much memory once more.
    """

    def __init__(self, model: nn.Module, parameters: Iterable[nn.Parameter] = ()):
        super().__init__()
        self._model = model
        self._restore = remember(buffer_slots(model), modules_with_extra_state(model))
        self._attributes = Attributes(model)
        beside = [each for each in self._attributes.tensors if each.layout is torch.strided]
        self._held = [(each, each.detach()) for each in (*parameters, *beside)]
        self._of_memory: dict[int, list[Tensor]] = {}
        for _, values in self._held:
            self._of_memory.setdefault(_memory(values), []).append(values)
        self._before: list[tuple[Tensor, Tensor]] = []

    def __enter__(self) -> Self:
        with without_compiler():  # which torch marks what is called at an operation for, when that is called first
            super().__enter__()
            torch.empty(0)
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._of_memory:
            for memory in _written_by(func, args, kwargs):
                self._before += [(values, values.clone()) for values in self._of_memory.pop(memory, ())]
        return func(*args, **(kwargs or {}))

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._attributes.restore()
        self._restore()
        for values, before in self._before:
            values.copy_(before)
        for tensor, values in self._held:
            if _memory(tensor) != _memory(values):  # other memory was assigned
                tensor.data = values
        self._model.zero_grad(set_to_none=True)


def _written_by(func: Any, args: Any, kwargs: Any) -> Iterator[int]:
    """Yield the memory of each tensor that an operation writes into."""
    if not func._schema.is_mutable:
        return
    for at, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[at] if at < len(args) else (kwargs or {}).get(argument.name)
        for tensor in torch.utils._pytree.tree_leaves(value):
            if isinstance(tensor, Tensor):
                yield _memory(tensor)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
