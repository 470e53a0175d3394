"""What the recipe's section `tune` comes to, once in a run: for the device, the precision, the strategy, the model.

A rule for each key says what `auto` is, why, and whether `true` is possible at all. To add one: a field in
`TuneSection`, a rule here, and `world.tuning["key"]` where it acts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn

from distrain.config import TuneSection, UserError
from distrain.config.strategies import STRATEGIES
from distrain.system.memory import GIB, gib


class Choice(NamedTuple):
    """What a key comes to."""

    on: bool
    why: str
    possible: bool = True
    """Whether it works here; where not, `true` is refused."""
    required: bool = False
    """Whether nothing works here without it; where so, `false` is refused."""
    asked: bool = False
    """Whether the recipe says true, and not auto."""


@dataclass(frozen=True)
class Logits:
    """The logits of a language model, as far as its loss can take them in chunks."""

    head: str = ""
    """The layer that makes them; empty where it is not known, or was not looked for."""
    count: int | None = 0
    """How many a micro-batch has; None where that varies."""
    obstacle: str = "the model is not trained here"
    """Why its loss cannot take them in chunks; empty where it can."""


NO_LOGITS = Logits()


@dataclass(frozen=True)
class Facts:
    """What rules go by. The same on every rank."""

    device: str
    """cuda or cpu."""
    capability: tuple[int, int]
    """Of the GPU; (0, 0) for a CPU."""
    precision: str
    """The recipe's, with `auto` resolved."""
    autocast: bool
    """Whether the forward pass is cast to something narrower."""
    deterministic: bool
    strategy: str
    model: nn.Module
    """As it was built, before it is sharded; maybe on the meta device."""
    offloads_weights: bool = False
    casts_gradients: bool = False
    """Whether they are to be reduced in bf16."""
    byte_images: bool = False
    """Whether inputs are images of bytes until their last transforms, which scale and normalise them."""
    channels_last_problem: Callable[[], str | None] | None = None
    """Tries the model on images with the channels last, and returns why it fails; None: there is nothing to try."""
    fixed_shapes: bool = False
    """Whether all inputs have one shape."""
    fused: str | None = None
    """What `distrain.optim.fused_kernel` returns; None also where there is no optimizer."""

    logits: Logits = NO_LOGITS

    def has(self, *kinds: type[nn.Module]) -> bool:
        """Whether the model has a layer of these kinds."""
        return any(isinstance(module, kinds) for module in self.model.modules())


@dataclass(frozen=True)
class Tuning:
    """Which optimisations a run uses, and why."""

    choices: Mapping[str, Choice] = field(default_factory=dict)

    def __getitem__(self, key: str) -> bool:
        """Whether `tune.key` is on; nothing is where no model has been built yet."""
        return key in self.choices and self.choices[key].on

    def without(self, key: str, why: str) -> Tuning:
        """Return this without a key that turned out not to work; raises UserError where the recipe says true."""
        if self.choices[key].asked:
            raise _refused(key, why)
        return Tuning({**self.choices, key: _no(why)})

    def record(self) -> dict[str, dict[str, object]]:
        """Return what effect.json holds: {key: {on, why}}."""
        return {key: {"on": each.on, "why": each.why} for key, each in self.choices.items()}

    def describe(self, *, off: bool) -> str:
        """Return what is on, and with `off` also what could be, and why it is not, in a line."""
        on = ", ".join(key for key, each in self.choices.items() if each.on) or "nothing"
        possible = {key: each for key, each in self.choices.items() if each.possible}
        others = ", ".join(f"{key} ({each.why})" for key, each in possible.items() if not each.on)
        return f"{on}; off: {others}" if off and others else on


def resolve_tuning(section: TuneSection, facts: Facts, *, lenient: bool = False) -> Tuning:
    """Return what a recipe's section `tune` comes to.

    Raises UserError naming each key that is true and cannot work here; with `lenient`, for a model that is only used
    and maybe elsewhere than it was trained, such a key is off.
    """
    choices, problems = {}, []
    for key, rule in RULES.items():
        asked, choice = getattr(section, key), rule(facts)
        if asked is False and not choice.required:
            choice = Choice(False, f"tune.{key} is false")
        elif asked is False and not lenient:
            problems.append(f"tune.{key} is false, and cannot be: {choice.why}; auto is true there")
        elif asked is True and choice.possible:
            choice = Choice(True, choice.why if choice.on else f"tune.{key} is true", asked=True)
        elif asked is True and not lenient:
            problems.append(str(_refused(key, choice.why)))
        choices[key] = choice
    if problems:
        raise UserError("\n".join(problems))
    return Tuning(choices)


def _refused(key: str, why: str) -> UserError:
    return UserError(f"tune.{key} is true, and cannot work here: {why}; auto takes it where it can")


def _no(why: str) -> Choice:
    return Choice(False, why, possible=False)


# --------------------------------------------------------------------------------------------------------------------
# The rules


def _tf32(facts: Facts) -> Choice:
    if facts.device != "cuda" or facts.capability < (8, 0):
        return _no("TF32 needs an NVIDIA GPU of compute capability 8.0 (Ampere) or more")
    if facts.precision == "tf32":
        return Choice(True, "train.precision is tf32")
    if facts.precision == "fp64":
        return _no("under fp64 nothing is computed in fp32")
    if not facts.autocast:
        return Choice(False, f"train.precision is {facts.precision}")
    return Choice(True, f"for what stays fp32 under {facts.precision}")


def _cast_before_gather(facts: Facts) -> Choice:
    if facts.strategy != "fsdp2":
        return _no("of fsdp2 alone")
    if not facts.autocast:
        return _no(f"under {facts.precision} nothing is cast")
    from torch.distributed.fsdp import MixedPrecisionPolicy  # a second to import, and only sharded models need it

    if "param_dtype_override_fn" not in MixedPrecisionPolicy.__dataclass_fields__:
        return _no(f"torch {torch.__version__} gathers all weights of a block in one dtype, 2.15 does not")
    return Choice(True, "the same bits")


def _cast_before_reduce(facts: Facts) -> Choice:
    if facts.strategy != "fsdp2":
        return _no("of fsdp2 alone")
    if facts.precision not in ("bf16", "fp8"):
        return _no(f"for gradients that are computed in bf16, and train.precision is {facts.precision}")
    return Choice(False, "its sums have eight bits")


def _prefetch(facts: Facts) -> Choice:
    if facts.strategy != "fsdp2":
        return _no("of fsdp2 alone")
    if facts.device != "cuda":
        return Choice(False, "on a CPU nothing is gathered beside the computing")
    return Choice(True, "one block ahead")


WHOLE_GRADIENTS = 4 * GIB
"""Bytes up to which whole gradients are kept between micro-batches. A number, and no part of a machine's memory: the
order of sums, and so the last bits, may not depend on where a run is resumed."""


def _reduce_every_micro(facts: Facts) -> Choice:
    if facts.strategy in ("zero2", "zero3"):
        return Choice(True, f"{facts.strategy} keeps no more than its part of a gradient", required=True)
    if facts.strategy != "fsdp2":
        return _no(f"{facts.strategy} has room for whole gradients")
    if facts.offloads_weights:
        return Choice(True, "weights are offloaded")
    if facts.casts_gradients:
        return Choice(True, "reduced in bf16, gradients are added up in fp32", required=True)
    whole = sum(each.numel() * each.element_size() for each in facts.model.parameters() if each.requires_grad)
    fits = whole <= WHOLE_GRADIENTS
    return Choice(not fits, f"whole gradients are {gib(whole)}, {'within' if fits else 'over'} {gib(WHOLE_GRADIENTS)}")


def _channels_last(facts: Facts) -> Choice:
    if not facts.has(nn.Conv2d, nn.ConvTranspose2d):
        return _no("the model has no Conv2d")
    if facts.device != "cuda":
        return Choice(False, "for GPUs")
    if STRATEGIES[facts.strategy].shards:
        return Choice(False, f"{facts.strategy} holds flat weights, and true lays out the images alone")
    if facts.channels_last_problem is None:
        return Choice(False, "the inputs are not one tensor of images")
    if (problem := facts.channels_last_problem()) is not None:
        return _no(f"tried once, the model fails with it: {problem}")
    return Choice(True, "convolutions on a GPU")


def _cudnn_benchmark(facts: Facts) -> Choice:
    if facts.device != "cuda":
        return _no("cuDNN needs a GPU")
    if facts.deterministic:
        return _no("train.deterministic: the fastest algorithm may be another one in each start")
    if not facts.has(nn.modules.conv._ConvNd):
        return _no("the model has no convolution")
    if not facts.fixed_shapes:
        return Choice(False, "inputs may have many shapes")
    if facts.autocast and not facts.has(nn.Conv1d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose3d):
        return Choice(False, f"cuDNN's first choice is as fast for channels_last in {facts.precision}")
    return Choice(True, "convolutions of one shape")


def _uint8_inputs(facts: Facts) -> Choice:
    if not facts.byte_images:
        return _no("the inputs are no images of bytes until the last transforms, or a callback wraps these")
    if facts.device != "cuda":
        return Choice(False, "for GPUs")
    return Choice(True, "a quarter of the bytes to copy")


def _copy_stream(facts: Facts) -> Choice:
    if facts.device != "cuda":
        return _no("a CPU computes where the batch is")
    return Choice(True, "batches of 1 MiB or more")


def _fused_optimizer(facts: Facts) -> Choice:
    if facts.fused is None:
        return _no("the optimizer has no fused kernel")
    if facts.fused == "own":
        return _no("the recipe's section optim decides")
    if facts.fused == "exact":
        return Choice(True, "one kernel for all parameters")
    if STRATEGIES[facts.strategy].shards:
        return _no("its kernel may round otherwise in another cut of the weights")
    if facts.device != "cuda":
        return Choice(False, "no faster on a CPU")
    return Choice(True, "one kernel for all parameters")


def _flash_attention(facts: Facts) -> Choice:
    return Choice(True, "where torch has a kernel for the inputs")


MANY_LOGITS = 2**24
"""Of a micro-batch, 64 MiB in fp32: with more of them their chunks are worth it."""


def _chunked_loss(facts: Facts) -> Choice:
    logits = facts.logits
    if logits.obstacle:
        return _no(logits.obstacle)
    if logits.count is None:
        return Choice(True, f"by {logits.head}, for any number of tokens")
    if logits.count <= MANY_LOGITS:
        return Choice(False, f"a micro-batch has few logits ({logits.count:,})")
    return Choice(True, f"{logits.count:,} logits of a micro-batch, by {logits.head}")


RULES: dict[str, Callable[[Facts], Choice]] = {
    "channels_last": _channels_last,
    "cudnn_benchmark": _cudnn_benchmark,
    "uint8_inputs": _uint8_inputs,
    "copy_stream": _copy_stream,
    "fused_optimizer": _fused_optimizer,
    "flash_attention": _flash_attention,
    "tf32": _tf32,
    "chunked_loss": _chunked_loss,
    "cast_before_gather": _cast_before_gather,
    "cast_before_reduce": _cast_before_reduce,
    "prefetch": _prefetch,
    "reduce_every_micro": _reduce_every_micro,
}
"""By the keys of `TuneSection`, all of them."""

# --------------------------------------------------------------------------------------------------------------------
# What follows


def set_switches(section: TuneSection, tuning: Tuning) -> None:
    """Set torch's switches of this process; where a key is auto, and torch does the same by itself, they stay."""
    if section.cudnn_benchmark is False or tuning["cudnn_benchmark"]:
        torch.backends.cudnn.benchmark = tuning["cudnn_benchmark"]
    if section.flash_attention != "auto":
        kernels = torch.backends.cuda
        for enable in (kernels.enable_flash_sdp, kernels.enable_mem_efficient_sdp, kernels.enable_cudnn_sdp):
            enable(section.flash_attention)
        kernels.enable_math_sdp(not section.flash_attention)
