"""The fused step of Adam and AdamW without what torch asks anew in each step.

torch's `step` looks for hooks, a profiler and a graph that is being captured, collects an optimizer's state tensor by
tensor and sorts all of it by device and dtype: in a small model's step this takes several times as long as the kernel.
Nothing of it changes from step to step, and what could is compared here by identity alone.
"""

from __future__ import annotations

from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import optimizer as of_torch

_GRADIENT = attrgetter("grad")
_STEP, _MEAN, _SQUARE, _LARGEST = map(itemgetter, ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"))
_TAKES_OVER = frozenset(("step", "grad_scale", "found_inf"))
"""Attributes by which others change how an optimizer steps."""


class FusedStep:
    """Steps an optimizer: by its kernel alone where nothing hinders that, otherwise as it steps itself. Same bits."""

    def __init__(self, optimizer: Any):
        self._optimizer = optimizer
        parameters = [each for group in optimizer.param_groups for each in group["params"]]
        self._able = (
            type(optimizer) in (torch.optim.Adam, torch.optim.AdamW)
            and all(map(_takes_kernel, optimizer.param_groups))
            and {type(each) for each in parameters} == {nn.Parameter}
            and len({(each.device, each.dtype) for each in parameters}) == 1
        )
        self._without_gradient = torch.no_grad()
        # a tensor is added to numbers on the host faster than a number is; on a GPU they are one kernel in any case
        on_host = self._able and parameters[0].device.type == "cpu"
        self._added: dict[str, Any] = {"other": torch.tensor(1.0), "alpha": 1.0} if on_host else {"scalar": 1}
        self._groups: list[_Group] = []
        """Empty until a step of torch's own has made the state."""
        self._states: list[Any] = []
        """What the optimizer keeps of each parameter, in its own order."""

    def __call__(self, *, whole: bool) -> None:
        """Let the optimizer step; `whole`: whether each of its parameters has a gradient, and none a sparse one."""
        optimizer = self._optimizer
        if not self._able or not whole or self._is_watched():
            optimizer.step()
        elif self._is_unchanged():
            with self._without_gradient:
                for group in self._groups:
                    group.step(self._added)
        else:
            optimizer.step()
            self._look()

    def _is_watched(self) -> bool:
        """Whether somebody takes part in the optimizer's step, or measures it."""
        optimizer = self._optimizer
        return bool(
            optimizer._optimizer_step_pre_hooks
            or optimizer._optimizer_step_post_hooks
            or of_torch._global_optimizer_pre_hooks
            or of_torch._global_optimizer_post_hooks
            or torch.autograd._profiler_enabled()
            or not _TAKES_OVER.isdisjoint(optimizer.__dict__)
        )

    def _is_unchanged(self) -> bool:
        """Whether the optimizer holds what it held when that was looked at."""
        groups, states = self._optimizer.param_groups, self._optimizer.state.values()
        return (
            len(groups) == len(self._groups)
            and all(map(_Group.is_of, self._groups, groups))
            and len(states) == len(self._states)
            and all(map(is_, states, self._states))
        )

    def _look(self) -> None:
        """Note what the kernel steps, now that each parameter has a state; or that it is not for this optimizer."""
        optimizer = self._optimizer
        self._groups = [_Group(group, optimizer.state) for group in optimizer.param_groups]
        self._states = [*optimizer.state.values()]
        self._able = all(group.fits() for group in self._groups)


def _takes_kernel(group: dict[str, Any]) -> bool:
    return bool(group["fused"]) and not group["capturable"]  # one that can be captured warns where it is not


class _Group:
    """A group of an optimizer, which holds its learning rate and the other numbers of a step."""

    def __init__(self, group: dict[str, Any], state: Any):
        self._group = group
        self._parameters: list[Tensor] = group["params"]
        self._count = len(self._parameters)
        self._states = [state.get(each, {}) for each in self._parameters]
        self._kernel = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_

    def is_of(self, group: dict[str, Any]) -> bool:
        return self._group is group and group["params"] is self._parameters and len(self._parameters) == self._count

    def fits(self) -> bool:
        """Whether torch has made a state for each parameter, and each gradient is as its parameter."""
        return _takes_kernel(self._group) and all(
            state
            and (gradient := each.grad) is not None
            and (gradient.dtype, gradient.layout) == (each.dtype, each.layout)
            for each, state in zip(self._parameters, self._states, strict=True)
        )

    def step(self, added: dict[str, Any]) -> None:
        group, parameters, states = self._group, self._parameters, self._states
        steps = list(map(_STEP, states))
        beta1, beta2 = group["betas"]
        torch._foreach_add_(steps, **added)
        self._kernel(
            parameters,
            list(map(_GRADIENT, parameters)),
            list(map(_MEAN, states)),
            list(map(_SQUARE, states)),
            list(map(_LARGEST, states)) if group["amsgrad"] else [],
            steps,
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=group["amsgrad"],
            maximize=group["maximize"],
        )
