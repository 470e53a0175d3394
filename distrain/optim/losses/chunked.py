"""Cross entropy of a linear layer's outputs, computed in chunks of rows.

The logits of a language model are its largest tensor: (tokens, vocabulary), several times over where a loss keeps them
for the backward pass, and in fp32. Here each chunk's logits give their part of the loss and of its gradients at once,
and go. What stays is as large as the layer and its inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

LARGEST_CHUNK = 2**27
"""Logits of one chunk at most: 256 MiB in bf16, and 512 MiB where they are in fp32 for a moment."""
SMALLEST_CHUNK = 2**22
"""Fewer logits than this (16 MiB in fp32) are not cut any further."""
_USUAL_CHUNKS = 4
"""More of them add up the gradient of the weight more often, and fewer hold more logits at once."""
_ALIGNED = 8
"""Rows of bf16 that tensor cores read at full speed begin at multiples of so many numbers."""


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    ignore_index: int,
    class_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    largest: int = LARGEST_CHUNK,
    smallest: int = SMALLEST_CHUNK,
) -> Tensor:
    """Return the sum of the cross entropy of `hidden @ weight.T + bias`: 0-d fp32, or fp64 for fp64 weights.

    The same as `functional.cross_entropy(..., reduction="sum")` on logits that are converted to fp32, gradients too.
    `hidden` (..., width), `weight` (classes, width), `bias` (classes,), `targets` (...) int64, `class_weights`
    (classes,). Products are in autocast's dtype where that is on, and sums over classes, rows and chunks in fp32. The
    gradients are computed with the loss, which is why there is no second derivative. A chunk has at most `largest`
    logits, and more than `smallest` are cut. Raises RuntimeError for a target that is no class.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    inputs = (hidden, weight, bias)
    wanted = [torch.is_grad_enabled() and each is not None and each.requires_grad for each in inputs]
    with torch.no_grad(), torch.autocast(device, enabled=False):
        loss_sum, gradients = _sum_and_gradients(
            hidden.detach().flatten(0, -2).to(dtype),
            weight.detach().to(dtype),
            None if bias is None else bias.detach().to(dtype),
            targets.flatten(),
            ignore_index=ignore_index,
            class_weights=class_weights,
            label_smoothing=label_smoothing,
            chunks=chunk_count(targets.numel(), weight.shape[0], largest, smallest),
            wanted=wanted,
        )
        if gradients[0] is not None:
            gradients[0] = gradients[0].view(hidden.shape).to(hidden.dtype)
    if not any(wanted):
        return loss_sum
    result: Tensor = _WithGradients.apply(loss_sum, *inputs, *gradients)
    return result


def chunk_count(rows: int, classes: int, largest: int = LARGEST_CHUNK, smallest: int = SMALLEST_CHUNK) -> int:
    """Return into how many chunks the logits of so many rows are cut.

    Compared and not divided: compiled for rows that vary, it is a bound on them and not their number.
    """
    chunks = 1
    while chunks < _USUAL_CHUNKS and rows * classes > chunks * smallest:
        chunks += 1
    while rows * classes > chunks * largest:
        chunks += 1
    return chunks


class _WithGradients(torch.autograd.Function):
    """A loss whose gradients are known: the backward pass multiplies them by its own."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *inputs_and_gradients: Tensor | None) -> Tensor:
        ctx.save_for_backward(*inputs_and_gradients[len(inputs_and_gradients) // 2 :])
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.saved_tensors
        # in the factor's precision: rounded to bf16, it would be off by the same share everywhere
        scaled = [None if each is None else (each.to(grad.dtype) * grad).to(each.dtype) for each in gradients]
        return (None, *scaled, *[None for _ in gradients])


def _sum_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    ignore_index: int,
    class_weights: Tensor | None,
    label_smoothing: float,
    chunks: int,
    wanted: list[bool],
) -> tuple[Tensor, list[Tensor | None]]:
    """Return the sum, and the gradients that are wanted of (hidden, weight, bias), in fp32 but for that of hidden."""
    classes, exact = weight.shape[0], torch.float64 if weight.dtype == torch.float64 else torch.float32
    padding = -classes % _ALIGNED if weight.dtype.itemsize == 2 else 0
    if padding:  # the copy in this dtype is made anyway
        weight = functional.pad(weight, (0, 0, 0, padding))
        bias = None if bias is None else functional.pad(bias, (0, padding))
    counted = targets != ignore_index
    safe = targets.where(counted, 0)
    share = label_smoothing / classes
    # of the target's logarithm, and of each class's
    own = counted.to(exact) * (1 - label_smoothing)
    even = counted.to(exact) * share
    by_class = None if class_weights is None else class_weights.to(exact)
    total = classes if by_class is None else by_class.sum()
    if by_class is not None:
        own = own * by_class[safe]

    loss = torch.zeros((), dtype=exact, device=hidden.device)
    of_hidden: list[Tensor] = []
    of_weight = of_bias = None
    rows, size = len(safe), (len(safe) + chunks - 1) // chunks
    for start in (at * size for at in range(chunks)):
        if start >= rows and start > 0:
            break
        h, t, o, e = (each[start : start + size] for each in (hidden, safe, own, even))
        logarithms = functional.log_softmax(functional.linear(h, weight, bias)[:, :classes], dim=-1, dtype=exact)
        at = t[:, None]
        # not a product where a row is not counted: its logits may be infinite
        loss = loss - (logarithms.gather(1, at)[:, 0] * o).where(o != 0, 0).sum()
        if label_smoothing:
            each = logarithms.sum(1) if by_class is None else logarithms @ by_class
            loss = loss - (each * e).where(e != 0, 0).sum()
        if not any(wanted):
            continue
        if torch.compiler.is_compiling():
            # one expression of each element, which becomes one kernel; a scatter would need the slope in memory first
            hit = torch.arange(classes, device=at.device) == at
            slope = logarithms.exp() * (o + e * total)[:, None] - torch.where(hit, o[:, None], 0)
        else:
            slope = logarithms.exp_().mul_((o + e * total)[:, None])
            slope.scatter_add_(1, at, -o[:, None])
        if label_smoothing:
            slope -= e[:, None] if by_class is None else e[:, None] * by_class
        if wanted[2]:
            of_bias = slope.sum(0) if of_bias is None else of_bias + slope.sum(0)
        slope = functional.pad(slope.to(weight.dtype), (0, padding)) if padding else slope.to(weight.dtype)
        if wanted[0]:
            of_hidden.append(slope @ weight)
        if wanted[1]:
            part = (slope.T @ h)[:classes]
            of_weight = part.to(exact) if of_weight is None else of_weight.add_(part)
    return loss, [torch.cat(of_hidden) if wanted[0] else None, of_weight, of_bias]
