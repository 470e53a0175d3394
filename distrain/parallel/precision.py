"""What a recipe's `train.precision` means, the same under every strategy.

Weights, the optimizer's state and the reductions of gradients are fp32 (fp64 for fp64). What differs is the forward
pass, and the backward pass that follows from it:

    name   forward under             products of fp32 tensors   loss is scaled
    fp32   nothing                   fp32                       no
    tf32   nothing                   TF32 on tensor cores       no
    bf16   autocast to bfloat16      by `tune.tf32`             no
    fp16   autocast to float16       by `tune.tf32`             yes, `LossScale`
    fp8    autocast to bfloat16,     by `tune.tf32`             no
           linear layers in float8
    fp64   nothing, weights fp64     fp32                       no

torch itself starts with matrix products in fp32 and with cuDNN's convolutions and recurrent layers in TF32, so its
"fp32" keeps ten bits of the mantissa in a convolution. Here fp32 is fp32 throughout, and tf32 is asked for by name.
What stays fp32 beside a narrower forward pass (bf16 has seven bits) is in TF32 on GPUs that have it: `tune.tf32`.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from distrain.config import UserError

logger = logging.getLogger(__name__)

# --------------------------------------------------------------------------------------------------------------------
# Mixed precision


@dataclass(frozen=True)
class MixedPrecision:
    """The precision of a run, with `auto` resolved."""

    name: str
    """fp32, tf32, bf16, fp16, fp8 or fp64."""
    autocast: torch.dtype | None
    """What the forward pass is cast to where that is sound; None casts nothing."""
    weights: torch.dtype
    """The dtype of weights, of the optimizer's state and of the reductions of gradients."""
    scaled: bool
    """Whether the loss is scaled before the backward pass, with a `LossScale`."""
    note: str = ""
    """What the user should know about it on this machine, in a sentence; may be empty."""
    tf32: bool = False
    """Whether products of fp32 tensors are computed in TF32."""

    def context(self, device_type: str, *, cache: bool = True) -> AbstractContextManager[Any]:
        """Return what one forward pass runs under.

        `cache`: whether a weight's cast is kept until the pass ends, for weights that are used several times. A sharded
        strategy passes False: what is kept of each weight would add up to half of the whole model.
        """
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(device_type, dtype=self.autocast, cache_enabled=cache)

    def fit(self, model: nn.Module, device: torch.device) -> None:
        """Make a model on its device ready for this precision, in place; how much of it fp8 takes is logged.

        Before the optimizer is built and before the model is sharded. The names and the values of parameters stay.
        Raises UserError for fp8 where the model has no layer that could be computed so.
        """
        if self.name == "fp8":
            logger.info(_with_float8_layers(model))
        elif self.name == "fp16" and device.type == "cpu":
            for module in model.modules():
                if isinstance(module, nn.LSTM):
                    module.register_forward_pre_hook(_with_fp16_inputs)

    def check_kept(self) -> None:
        """Raise UserError where something has changed torch's switches for products of fp32 tensors since `resolve`."""
        expected = "tf32" if self.tf32 else "ieee"
        if changed := {where: value for where, value in float32_products().items() if value != expected}:
            found = ", ".join(f"{where} {value}" for where, value in changed.items())
            raise UserError(
                f"train.precision is {self.name}, which computes products of fp32 tensors as {expected}, and something "
                f"has set torch to: {found}. Take torch.set_float32_matmul_precision and torch.backends.*.allow_tf32 "
                "out of your own code, and write train.precision: tf32 if that is what you want"
            )

    def with_tf32(self, on: bool) -> MixedPrecision:
        """Return this precision with products of fp32 tensors in TF32 or not, and set torch's switches for it."""
        _set_float32_products(tf32=on)
        return replace(self, tf32=on)


_FP32 = MixedPrecision("fp32", None, torch.float32, scaled=False)


def resolve(precision: str, device: torch.device) -> MixedPrecision:
    """Return what a recipe's `train.precision` means on `device`, and set torch's switches for it.

    The switches are those for products of fp32 tensors: they hold for this process, so call it once, first. Raises
    UserError where the device, or what is installed, cannot do what is asked.
    """
    resolved = _resolved(precision, device)
    return resolved.with_tf32(resolved.name == "tf32")


def _resolved(precision: str, device: torch.device) -> MixedPrecision:
    on_gpu = device.type == "cuda"
    if precision == "auto":
        if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False):
            return MixedPrecision("bf16", torch.bfloat16, torch.float32, scaled=False, note="auto: this GPU has bf16")
        return MixedPrecision(
            "fp32", None, torch.float32, scaled=False, note=f"auto: {_named(device)} has no fast bf16"
        )
    if precision == "fp32":
        return _FP32
    if precision == "tf32":
        if not on_gpu or torch.cuda.get_device_capability(device) < (8, 0):
            raise UserError(
                f"train.precision: tf32 needs an NVIDIA GPU of compute capability 8.0 (Ampere) or more, and this is "
                f"{_named(device)}; take fp32, which gives at least its accuracy everywhere"
            )
        return MixedPrecision("tf32", None, torch.float32, scaled=False)
    if precision == "bf16":
        fast = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        note = "" if fast else f"{_named(device)} computes bf16 no faster than fp32, and mostly slower"
        return MixedPrecision("bf16", torch.bfloat16, torch.float32, scaled=False, note=note)
    if precision == "fp16":
        if not on_gpu and not _cpu_computes(torch.float16):
            raise UserError("train.precision: fp16: torch does not compute fp16 on this CPU; take bf16 or fp32")
        note = "" if on_gpu else f"{_named(device)} computes fp16 no faster than fp32, and mostly slower"
        return MixedPrecision("fp16", torch.float16, torch.float32, scaled=True, note=note)
    if precision == "fp8":
        _check_fp8(device)
        return MixedPrecision("fp8", torch.bfloat16, torch.float32, scaled=False)
    assert precision == "fp64", precision
    return MixedPrecision("fp64", None, torch.float64, scaled=False)


def _named(device: torch.device) -> str:
    if device.type != "cuda":
        return "a CPU"
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} of compute capability {major}.{minor}"


# --------------------------------------------------------------------------------------------------------------------
# Products of fp32 tensors


def float32_products() -> dict[str, str]:
    """Return how torch computes products of fp32 tensors on GPUs: ieee or tf32, by the kind of layer."""
    kinds: dict[str, Any] = {
        "matmul": torch.backends.cuda.matmul,
        "conv": torch.backends.cudnn.conv,  # type: ignore[attr-defined]
        "rnn": torch.backends.cudnn.rnn,
    }
    return {name: "tf32" if kind.fp32_precision == "tf32" else "ieee" for name, kind in kinds.items()}


def _set_float32_products(*, tf32: bool) -> None:
    # These two set torch's newer switches, `fp32_precision`, as well. Setting those alone leaves the older ones behind,
    # and reading an older one is then an error, which torch.compile runs into.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*TF32.*")
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = tf32
    expected = dict.fromkeys(("matmul", "conv", "rnn"), "tf32" if tf32 else "ieee")
    assert float32_products() == expected, float32_products()


# --------------------------------------------------------------------------------------------------------------------
# What a CPU can


def _cpu_computes(dtype: torch.dtype) -> bool:
    """Return whether a layer goes forward and backward on this CPU under autocast."""
    layer = nn.Linear(2, 2)
    try:
        with torch.autocast("cpu", dtype=dtype):
            outputs = layer(torch.ones(1, 2))
        outputs.float().sum().backward()
    except RuntimeError:
        return False
    return True


def _with_fp16_inputs(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    # torch looks at the inputs before autocast does, and takes a kernel for fp32 that then gets fp16 and fails
    def cast(value: Any) -> Any:
        if isinstance(value, tuple) and not isinstance(value, nn.utils.rnn.PackedSequence):
            return tuple(map(cast, value))
        narrow = isinstance(value, Tensor) and value.dtype == torch.float32 and torch.is_autocast_enabled("cpu")
        return value.half() if narrow else value

    return tuple(map(cast, inputs))


# --------------------------------------------------------------------------------------------------------------------
# fp8


def _check_fp8(device: torch.device) -> None:
    problems = []
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        problems.append(f"a GPU of compute capability 8.9 (Ada, Hopper) or more, and this is {_named(device)}")
    if not _has_torchao():
        others = [name for name in ("transformer_engine", "msamp") if importlib.util.find_spec(name) is not None]
        instead = f" (in place of {others[0]}, whose layers keep state of a kind of their own)" if others else ""
        problems.append(f"the package torchao, 0.6.1 or later: pip install torchao{instead}")
    if problems:
        raise UserError(f"train.precision: fp8 needs {'; and '.join(problems)}. Take bf16 without them")


def _has_torchao() -> bool:
    from accelerate.utils.imports import is_torchao_available

    return bool(is_torchao_available())


def _with_float8_layers(model: nn.Module) -> str:
    """Have a model's linear layers computed in float8, in place; returns what was done, in a sentence."""
    from accelerate.utils.ao import convert_model_to_fp8_ao
    from torchao.float8.float8_linear import Float8Linear

    linear = sum(isinstance(module, nn.Linear) for module in model.modules())
    # The first and the last stay, as training is unstable with them, and so do those whose sizes the kernels cannot
    # take. Dynamic scales: they are computed anew each time, so there is no state beside the weights.
    convert_model_to_fp8_ao(model)
    converted = sum(isinstance(module, Float8Linear) for module in model.modules())
    if not converted:
        raise UserError(
            f"train.precision: fp8 is for linear layers whose sizes are multiples of 16, apart from the first and the "
            f"last, and of this model's {linear} there are none; take bf16"
        )
    return f"fp8 in {converted} of {linear} linear layers; the rest, and all other layers, in bf16"


# --------------------------------------------------------------------------------------------------------------------
# Scaling the loss

_FLOOR = 2.0**-10
_GROWS_AFTER = 2000
_LARGEST = torch.finfo(torch.float32).max


class LossScale:
    """What the loss is multiplied by under fp16, whose smallest numbers are too large for most gradients.

    It starts at 65536, doubles after 2000 steps in a row whose gradients were finite, and halves with each gradient
    that was not, whose step is made again: the rule of torch.amp.GradScaler, here for every strategy, since each has a
    scaler of its own with other numbers. All ranks call its methods with the same answers, so it is the same on all.
    """

    def __init__(self, scale: float = 65536.0, good_steps: int = 0):
        self.scale = scale
        self.good_steps = good_steps
        """Steps since the scale has last changed."""
        self.grows_after = _GROWS_AFTER
        self._before: dict[str, float | int] | None = None
        """The state at the start of a step whose gradient has overflowed."""

    def overflows(self, norm: float, loss: float | None) -> bool:
        """Return whether to make the step again with the scale that is now smaller, as its gradient is not finite.

        `norm` is that of the gradient. Where `loss` is given, somebody judges what is not finite at any scale: then
        False is returned for a loss that is not finite, or a scale that has become too small to be the reason.
        Otherwise such a scale raises UserError.
        """
        if math.isfinite(norm) or (loss is not None and not math.isfinite(loss)):
            return False
        self._before = self._before or self.state()
        try:
            self.update(True)
        except UserError:
            if loss is None:
                raise
            return False
        return True

    def end_step(self, *, taken: bool) -> None:
        """Count a step that was taken; restore the scale of the start of one that was skipped."""
        if taken:
            self.update(False)
        elif self._before is not None:
            self.load(self._before)
        self._before = None

    def update(self, overflow: bool) -> None:
        """Halve the scale on an `overflow`, on any rank; otherwise count the step, and double it after enough of them.

        Raises UserError when the scale has become so small that it cannot be the reason.
        """
        if overflow:
            self.scale, self.good_steps = self.scale / 2, 0
            if self.scale < _FLOOR:
                raise UserError(
                    f"the gradients are not finite whatever the loss is scaled by, down to {_FLOOR:g}: the model's own "
                    "numbers leave fp16's range of 65504, or it divides by zero. Take train.precision bf16, which has "
                    "the range of fp32, or fp32"
                )
            return
        self.good_steps += 1
        if self.good_steps >= self.grows_after:
            self.scale, self.good_steps = (self.scale * 2 if self.scale * 2 <= _LARGEST else self.scale), 0

    def state(self) -> dict[str, float | int]:
        """Return what a checkpoint holds of it."""
        return {"scale": self.scale, "good_steps": self.good_steps}

    def load(self, state: Mapping[str, Any]) -> None:
        """Resume from what `state` returned. Raises UserError for numbers that it never returns."""
        scale, good_steps = state.get("scale"), state.get("good_steps")
        if not (
            isinstance(scale, int | float)
            and math.isfinite(scale)
            and scale >= _FLOOR
            and isinstance(good_steps, int)
            and 0 <= good_steps < _GROWS_AFTER
        ):
            raise UserError(f"the stored scale of the loss is {state!r}; expected a scale of {_FLOOR:g} or more")
        self.scale, self.good_steps = float(scale), good_steps


def load_scales(scales: Mapping[str, LossScale], stored: Mapping[str, Any] | None) -> None:
    """Load what a checkpoint holds: the state of one scale, which each then begins with, or a state by optimizer."""
    if not stored:
        return
    by_optimizer = all(isinstance(state, Mapping) for state in stored.values())
    for name, scale in scales.items():
        if found := stored.get(name) if by_optimizer else stored:
            scale.load(found)
