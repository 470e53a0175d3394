"""Linear layers whose weight is kept in 4 or 8 bits, beside which adapters are trained (QLoRA; Dettmers et al. 2023).

bitsandbytes quantizes blocks of 64 numbers, to NF4 or to dynamic 8-bit numbers, and brings them back: what is computed
with are numbers of the activations' dtype, one layer at a time. The weight keeps its name, as bytes; beside it is
`weight_absmax`, the largest of each block. Both are frozen parameters, so that checkpoints hold, refer to and hash them
as any other.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from distrain.config import UserError

BLOCK = 64
"""Numbers that share a scale."""


def check_installed() -> None:
    """Raise UserError where bitsandbytes is missing; does not import it, which takes seconds."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "model.lora.bits: weights are quantized by bitsandbytes, which is not installed: pip install "
            "'distrain[qlora]'; or remove it"
        )


def _library() -> Any:
    check_installed()
    try:
        import bitsandbytes.functional as library
    except ImportError as error:
        raise UserError(
            f"model.lora.bits: bitsandbytes cannot be imported ({error}): pip install 'distrain[qlora]'"
        ) from error
    return library


class Quantized(nn.Module):
    """A linear layer whose `weight` is quantized, in front of the class that it had."""

    weight: nn.Parameter
    weight_absmax: nn.Parameter
    bias: nn.Parameter | None
    weight_code: Tensor
    """The numbers that the bytes stand for."""
    weight_bits: int
    weight_shape: torch.Size

    def quantize(self, bits: int) -> None:
        """Replace the weight by its bytes (uint8), and the largest number of each block (fp32)."""
        weight = self.weight.detach()
        self.weight_bits, self.weight_shape = bits, weight.shape
        if weight.is_meta:
            count = weight.numel()
            codes = weight.new_empty((-(-count // 2), 1) if bits == 4 else weight.shape, dtype=torch.uint8)
            scales = weight.new_empty(-(-count // BLOCK), dtype=torch.float32)
            numbers = weight.new_empty(2**bits, dtype=torch.float32)
        else:
            library = _library()
            if bits == 4:
                codes, state = library.quantize_4bit(weight.float(), blocksize=BLOCK, quant_type="nf4")
            else:
                codes, state = library.quantize_blockwise(weight.float(), blocksize=BLOCK)
            scales, numbers = state.absmax, state.code
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.weight_absmax = nn.Parameter(scales, requires_grad=False)
        self.register_buffer("weight_code", numbers.clone(), persistent=False)

    def whole_weight(self, dtype: torch.dtype) -> Tensor:
        """Return the weight (out, in) as numbers."""
        library, four = _library(), self.weight_bits == 4
        state = library.QuantState(
            self.weight_absmax.data,
            self.weight_shape,
            self.weight_code,
            BLOCK,
            "nf4" if four else None,
            torch.float32,
        )
        found: Tensor = (library.dequantize_4bit if four else library.dequantize_blockwise)(self.weight.data, state)
        return found.to(dtype)

    def restore(self, dtype: torch.dtype) -> None:
        """Make the weight one of numbers again, as they are after quantization."""
        self.weight = nn.Parameter(self.whole_weight(dtype), requires_grad=False)
        del self.weight_absmax, self.weight_code, self.weight_bits, self.weight_shape

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            raise UserError(
                f"model.lora.bits: the model casts what a layer reads to the dtype of its weight, {x.dtype}, and its "
                "weight is quantized; name other model.lora.targets, or remove bits"
            )
        found: Tensor = _Product.apply(x, self)
        return found if self.bias is None else found + self.bias.to(found.dtype)


class _Product(torch.autograd.Function):
    """x times the weight, which is brought back again in the backward pass instead of being kept for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Quantized) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        return functional.linear(x, layer.whole_weight(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None
        [gradient] = gradients
        return (gradient @ ctx.layer.whole_weight(gradient.dtype)).to(ctx.dtype), None
