"""Muon: matrices move by the orthogonalized momentum of their gradients, and all else by AdamW.

After Keller Jordan, https://kellerjordan.github.io/posts/muon/, with the scale of Moonlight, arXiv:2502.16982, where
`adjust_lr_fn` says so. torch.optim.Muon takes matrices alone, computes in bfloat16 on CPUs too, and has no way
to come by a matrix of which each rank holds a part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from distrain.config.registry import optimizers
from distrain.networks.memory import local

OTHERS = "others"
"""The key of an optimizer's group: whether its parameters are no matrices."""

_OTHERS: dict[str, Any] = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-10, "weight_decay": None}
"""AdamW's settings, those of the reference implementation. Without a weight decay of its own it has that of all."""


class Matrices(Protocol):
    """How a rank comes by whole matrices, of which it holds a part."""

    def transform(
        self, entries: Sequence[Tensor], parts: Sequence[Tensor], function: Callable[[Tensor], Tensor]
    ) -> None:
        """Replace this rank's parts of matrices by its parts of what `function` makes of each whole one.

        `entries` are the tensors that the optimizer was handed, each with its part, and hold the same matrices on all
        ranks. All ranks call.
        """
        ...


@optimizers.register("muon")
class Muon(Optimizer):
    """Momentum, orthogonalized by Newton-Schulz iterations, for matrices; AdamW for groups with `others`.

    `matrices` is set by a strategy that shards; without it each parameter of a group is a matrix as it is. One of more
    than two dimensions, as of a convolution, is a matrix of its first dimension by all others.
    """

    matrices: Matrices | None = None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: Literal["original", "match_rms_adamw"] = "original",
        ns_dtype: Literal["auto", "bf16", "fp32"] = "auto",
        others: Mapping[str, Any] | None = None,
    ):
        """`adjust_lr_fn`: "original" moves a matrix by `max(1, rows / columns) ** 0.5` times the learning rate.

        "match_rms_adamw": by `0.2 * max(rows, columns) ** 0.5` times, so that rates for AdamW fit. `ns_dtype`: what
        iterations compute in; auto: bf16 on GPUs, and elsewhere the dtype of the weights. `others` are `lr`, `betas`,
        `eps` and `weight_decay` of AdamW; its `lr` is by default 3e-4, or with "match_rms_adamw" that of matrices.
        Raises ValueError for values out of bounds.
        """
        settings = dict(others or {})
        names = {*_OTHERS, "params"}
        problems = [f"others.{key}: expected one of {', '.join(sorted(names))}" for key in settings.keys() - names]
        problems += [f"momentum is {momentum}; expected 0 or more, and less than 1"] if not 0 <= momentum < 1 else []
        problems += [f"ns_steps is {ns_steps}; expected 1 to 99"] if not 1 <= ns_steps < 100 else []
        problems += [f"eps is {eps}; expected more than 0"] if not eps > 0 else []
        problems += ["ns_coefficients: expected three numbers"] if len(ns_coefficients) != 3 else []
        for key, choices in (("adjust_lr_fn", ("original", "match_rms_adamw")), ("ns_dtype", tuple(_DTYPES))):
            if (value := locals()[key]) not in choices:
                problems.append(f"{key} is {value!r}; expected one of {', '.join(choices)}")
        own = _OTHERS | ({"lr": lr} if adjust_lr_fn == "match_rms_adamw" else {}) | settings
        numbers = [own["lr"], own["eps"], own["weight_decay"] or 0.0, *own["betas"]]
        if not (all(isinstance(each, int | float) and each >= 0 for each in numbers) and max(own["betas"]) < 1):
            problems.append("others: expected numbers of 0 or more, and betas that are less than 1")
        if problems:
            raise ValueError("; ".join(problems))
        given = list(params)
        if given and not isinstance(given[0], dict):
            matrices = [each for each in given if each.ndim >= 2]
            rest = [each for each in given if each.ndim < 2]
            given = [{"params": matrices}] * bool(matrices) + [{"params": rest, OTHERS: True}] * bool(rest)
        defaults = {
            "lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov,
            "ns_coefficients": tuple(ns_coefficients), "eps": eps, "ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn,
            "ns_dtype": ns_dtype, "betas": tuple(own["betas"]), "adamw_eps": own["eps"], OTHERS: False,
        }  # fmt: skip
        decays = [group.get("weight_decay") if isinstance(group, dict) else None for group in given]
        super().__init__(given, defaults)
        for group, decay in zip(self.param_groups, decays, strict=True):
            if group[OTHERS]:
                group["lr"] = own["lr"]
                group["lr_scale"] = group.get("lr_scale", 1.0) * own["lr"] / lr
                if own["weight_decay"] is not None and decay is None:  # a group's own holds
                    group["weight_decay"] = own["weight_decay"]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step; where matrices are spread over ranks, all of them call."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if trained := [parameter for parameter in group["params"] if parameter.grad is not None]:
                (self._step_others if group[OTHERS] else self._step_matrices)(group, trained)
        return loss

    def _kept(self, trained: Sequence[Tensor], key: str) -> list[Tensor]:
        """Return this rank's part of what is kept for each parameter, zeros at first."""
        for parameter in trained:
            state = self.state[parameter]
            if key not in state:
                state[key] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return [local(self.state[parameter][key]) for parameter in trained]

    def _step_matrices(self, group: dict[str, Any], trained: list[Any]) -> None:
        momentum, lr = group["momentum"], group["lr"]
        buffers = self._kept(trained, "momentum_buffer")
        weights, gradients = [local(each) for each in trained], [local(each.grad) for each in trained]
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        updates = list(torch._foreach_lerp(gradients, buffers, momentum)) if group["nesterov"] else buffers
        updates = [each.clone(memory_format=torch.contiguous_format) for each in updates]
        orthogonal = partial(
            orthogonalized,
            coefficients=group["ns_coefficients"],
            eps=group["eps"],
            steps=group["ns_steps"],
            dtype=_DTYPES[group["ns_dtype"]],
            matches_adamw=group["adjust_lr_fn"] == "match_rms_adamw",
        )
        if self.matrices is not None:
            self.matrices.transform(trained, updates, orthogonal)
        else:
            for update in updates:
                update.copy_(orthogonal(update))
        if group["weight_decay"]:
            torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
        torch._foreach_add_(weights, updates, alpha=-lr)

    def _step_others(self, group: dict[str, Any], trained: list[Any]) -> None:
        for parameter in trained:
            self.state[parameter].setdefault("step", torch.zeros(()))
        adamw(
            [local(each) for each in trained],
            [local(each.grad) for each in trained],
            self._kept(trained, "exp_avg"),
            self._kept(trained, "exp_avg_sq"),
            [],
            [self.state[each]["step"] for each in trained],
            has_complex=any(each.is_complex() for each in trained),
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["adamw_eps"],
            maximize=False,
        )


_DTYPES = {"auto": None, "bf16": torch.bfloat16, "fp32": torch.float32}


def orthogonalized(
    matrix: Tensor,
    *,
    coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
    eps: float = 1e-7,
    steps: int = 5,
    dtype: torch.dtype | None = None,
    matches_adamw: bool = False,
) -> Tensor:
    """Return about the nearest matrix with orthonormal rows or columns, scaled for its shape; of the matrix's dtype.

    Newton-Schulz iterations of the fifth order, whose coefficients bring singular values to about 0.7 to 1.2 in few
    steps and not to 1. They compute in `dtype`; None: bfloat16 on GPUs (float64 but for that), elsewhere the matrix's.
    """
    flat = matrix.reshape(len(matrix), -1)
    rows, columns = flat.shape
    if dtype is None:
        dtype = torch.bfloat16 if matrix.is_cuda and matrix.dtype != torch.float64 else matrix.dtype
    a, b, c = coefficients
    x = flat.to(dtype)
    if rows > columns:
        x = x.T
    x = x / (x.norm() + eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    if rows > columns:
        x = x.T
    scale = 0.2 * math.sqrt(max(rows, columns)) if matches_adamw else math.sqrt(max(1.0, rows / columns))
    return (x.to(matrix.dtype) * scale).reshape(matrix.shape)
