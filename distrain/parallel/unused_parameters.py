"""Which parameters get a gradient and which are only cast, where possible without the memory that computing takes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from distrain.config import UserError
from distrain.networks.undisturbed import fake_tensors, undisturbed, use_stand_ins
from distrain.optim import sparse_layers
from distrain.parallel.parameter_writes import Slots, Written, restored

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode

    from distrain.parallel.comm import World
    from distrain.parallel.strategy import BuildSpec


def unused_parameters(
    model: nn.Module, loss_sum: Callable[[nn.Module], Tensor], device: torch.device, written: Written | None = None
) -> set[str] | None:
    """Return the names of the trained parameters to which no gradient flows from `loss_sum(model)` (0-d).

    Runs forward and backward under FakeTensorMode, so the parameters may be on the meta device, and restores what the
    passes leave in the modules. Returns None where the model cannot run so, as one that branches on values. `written`
    notes which parameters the forward pass writes into.
    """
    try:
        with without_values(model, device, written) as mode:
            with written.watching(model) if written is not None else nullcontext():
                value = loss_sum(model)
            with mode:
                value.backward()
            return {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    except Exception:  # whatever it is, it is raised again where the model really computes
        return None


def cast_parameters(
    model: nn.Module, loss_sum: Callable[[nn.Module], Tensor], device: torch.device, dtype: torch.dtype
) -> set[str] | None:
    """Return the names of the parameters of which `loss_sum(model)` (0-d) uses nothing but a cast to `dtype`.

    Cast before it is gathered, such a parameter has the same bits where it computes, and its gradient has them too. One
    that is trained must be cast once: the gradients of several casts are summed in the dtype of what is cast.
    Runs the forward pass as `unused_parameters` does, and returns None as it does.
    """
    uses = _Uses(dtype)
    try:
        with without_values(model, device, uses):
            uses.watched = {id(parameter) for parameter in model.parameters()}
            with uses:
                loss_sum(model)
            cast = {key for key, count in uses.casts.items() if key not in uses.other}
            once = {key for key in cast if uses.casts[key] == 1}
            return {name for name, p in model.named_parameters() if id(p) in (once if p.requires_grad else cast)}
    except Exception:  # as above
        return None


@contextmanager
def without_values(
    model: nn.Module, device: torch.device, inner_mode: TorchDispatchMode | None = None
) -> Iterator[FakeTensorMode]:
    """Give a model stand-ins for its parameters on `device`, with which its forward pass takes no memory.

    `inner_mode` sees what that dispatches.
    """
    mode = fake_tensors()
    inner = model.forward

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with mode, inner_mode or nullcontext():
            return inner(*args, **kwargs)

    with undisturbed(model):
        with mode:
            use_stand_ins(model, device)
        model.forward = forward
        yield mode


_REARRANGED = ("t", "transpose", "permute", "view", "_unsafe_view", "unsqueeze", "squeeze")
"""Operations of aten that return a view of all elements, each once: their gradients are no sums."""


class _Uses(TorchDispatchMode):
    """Counts how often each of the `watched` tensors, or a rearranged view of it, is cast, and which are used else."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.watched: set[int] = set()
        """The tensors, by `id`."""
        self.casts: dict[int, int] = {}
        self.other: set[int] = set()
        self._views: dict[int, tuple[int, Tensor]] = {}
        """Of views, whose they are; they are kept, so that none gets the `id` of another."""
        self._dtype = dtype
        self._inside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._inside:  # entered once more, above a mode that dispatches itself
            return func(*args, **kwargs)
        self._inside = True
        try:
            result = func(*args, **kwargs)
        finally:
            self._inside = False
        if func.namespace == "prim":  # what asks for a tensor's device
            return result
        name = func.overloadpacket.__name__
        for used in torch.utils._pytree.tree_leaves((args, kwargs)):
            whose = self._views[id(used)][0] if id(used) in self._views else id(used)
            if not isinstance(used, Tensor) or whose not in self.watched:
                continue
            if name == "_to_copy" and kwargs.get("dtype") == self._dtype:
                self.casts[whose] = self.casts.get(whose, 0) + 1
            elif func.namespace == "aten" and name in _REARRANGED and isinstance(result, Tensor):
                self._views[id(result)] = whose, result
            else:
                self.other.add(whose)
        return result


def reached_parameters(
    world: World, plan: BuildSpec, model: nn.Module, index: int = 0, optimizer: str = ""
) -> list[list[str]]:
    """Return for each rank the trained parameters to which one of its micro-batches gives a gradient, in that order.

    `optimizer`: the one of several whose losses these are.
    """

    def dry_run() -> list[str]:
        names = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
        reached: list[str] = []

        known = {id(layer.weight) for _, layer in sparse_layers(model)}

        def note(parameter: Tensor) -> None:
            reached.append(names[id(parameter)])
            assert parameter.grad is not None, "it was accumulated just now"
            if parameter.grad.layout is not torch.strided and id(parameter) not in known:
                raise sparse_gradient(names[id(parameter)], world.strategy)
            parameter.grad = None  # all of them together may be more than this strategy ever holds

        handles = [p.register_post_accumulate_grad_hook(note) for p in model.parameters() if p.requires_grad]
        try:
            slots = Slots(model)
            with restored(model, (*model.parameters(), *plan.beside())):
                plan.loss_of(optimizer)(model, index).backward()
            slots.check()
        finally:
            for handle in handles:
                handle.remove()
        return reached

    return world.gather(world.run_on_all(dry_run))


def no_gradient(names: Sequence[str], world: World) -> UserError:
    """Return the error of trained parameters to which no rank has given a gradient in a step."""
    others = f" and {len(names) - 1} others" if len(names) > 1 else ""
    return UserError(
        f"parameter {names[0]}{others} got no gradient in a step on any rank; {world.strategy} steps all that it "
        "trains together, and cannot pass over a part of it as an optimizer does in one process. Use ddp, have each "
        "step use it, even if its output is multiplied by zero, or freeze it (optim.freeze) if it is never used"
    )


def sparse_gradient(name: str, strategy: str) -> UserError:
    """Return the error of a gradient that is sparse where a strategy reduces dense ones."""
    return UserError(
        f"the gradient of parameter {name} is sparse, and {strategy} reduces dense gradients only; have the model "
        "compute it with sparse=False, or train in a single process, which takes sparse ones"
    )
