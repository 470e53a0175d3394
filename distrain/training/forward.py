"""What a failed forward pass of a model says of the micro-batch, the configuration or the dtypes that it had."""

from __future__ import annotations

import re

import torch
from torch import nn

from distrain.config import UserError
from distrain.networks.huggingface import is_transformers
from distrain.parallel import World

_TOO_FEW = (
    "Expected more than 1 value per channel when training",
    "Expected more than 1 spatial element when training",
)
"""What torch says of layers that are to normalise over a single number."""


class TooFewValues(UserError):
    """A layer needs more samples than a micro-batch has."""


_SPECIAL_TOKEN = re.compile(r"\b((?:pad|bos|eos|decoder_start)_token_id|padding token)\b")
"""What models of transformers say they miss."""

FAILS = (ValueError, RuntimeError, AttributeError)
"""What `explain` may know more of."""


def explain(error: Exception, model: nn.Module, samples: int) -> None:
    """Raise UserError for what a forward pass of a micro-batch of `samples` has raised, or add a note to it.

    TooFewValues where a layer has too few numbers to normalise over.
    """
    if isinstance(error, UserError | torch.OutOfMemoryError):
        return
    if str(error).startswith("No available kernel") and not torch.backends.cuda.math_sdp_enabled():
        raise UserError(
            "torch has no flash kernel for an attention of this model and its inputs, and tune.flash_attention is "
            "true; take auto"
        ) from error
    if str(error).startswith("view size is not compatible"):
        error.add_note("where channels are last in memory: take flatten or reshape, or tune.channels_last: false")
    if "same dtype" in str(error):
        dtypes = sorted({str(each.dtype).removeprefix("torch.") for each in model.parameters()})
        error.add_note(
            f"the model's parameters are {' and '.join(dtypes)}, whatever dtype its code gave them (train.precision); "
            "cast what goes into a layer to the dtype of its weight: x.to(self.layer.weight.dtype)"
        )
    if (token := _SPECIAL_TOKEN.search(str(error))) and any(map(is_transformers, model.modules())):
        key = token[1].replace("padding token", "pad_token_id")
        facts = ", and its data no pad_id (in the meta of a data set)" if key == "pad_token_id" else ""
        raise UserError(
            f"the model needs a {key} and its configuration has none{facts}; write model.config.{key}, or with "
            "model.path in the config.json of that folder"
        ) from error
    if str(error).startswith(_TOO_FEW):
        raise TooFewValues(_too_few(error, model, samples)) from None
    # the number of samples is made from batch.global, batch.micro and the number of processes, not by the model
    error.add_note(f"in the forward pass of a micro-batch of {samples} samples (batch.micro)")


def _too_few(error: Exception, model: nn.Module, samples: int) -> str:
    layer, trace = None, error.__traceback__
    while trace is not None:
        module = trace.tb_frame.f_locals.get("self")
        if isinstance(module, nn.Module):
            layer = module
        trace = trace.tb_next
    names = {id(module): name for name, module in model.named_modules()}
    name = names.get(id(layer), "").removeprefix("module.").removeprefix("model.")
    kind = type(layer).__name__ if layer is not None else "a layer"
    what = f"layer {name} ({kind})" if name and layer is not model else kind
    shape = str(error).partition("torch.Size(")[2].partition(")")[0]
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):
        return (
            f"{what} needs more than one value per channel to train, and got an input of shape {shape} from a "
            f"micro-batch of {samples}. Set batch.micro to a larger number; where it is batch.global / processes "
            "already, a larger batch.global or fewer processes leave more samples to each"
        )
    return (
        f"{what} has a single value to normalise over: its input has the shape {shape} with a micro-batch of {samples} "
        "(batch.micro). Give the model larger inputs, or normalise otherwise there (LayerNorm over the channels)"
    )


def check_layers(model: nn.Module, world: World) -> None:
    """Raise UserError for layers that cannot train in this world."""
    scripted = [name for name, module in model.named_modules() if isinstance(module, torch.jit.ScriptModule)]
    if scripted and (not scripted[0] or world.strategy != "single"):
        what, trained = (f"layer {scripted[0]}", f"under {world.strategy}") if scripted[0] else ("the model", "here")
        raise UserError(
            f"{what} is TorchScript (torch.jit.script or trace), which takes no hooks and cannot train {trained}; "
            "build it from its Python class, and set train.compile for speed"
        )
    if world.world_size == 1 or world.device.type != "cpu":
        return
    found = [name for name, module in model.named_modules() if isinstance(module, nn.SyncBatchNorm)]
    if found:
        raise UserError(
            f"layer {found[0] or 'of the model'} is a SyncBatchNorm, which torch has for GPUs only; these "
            f"{world.world_size} processes compute on the CPU. Use BatchNorm, whose statistics are those of each "
            "process's micro-batch, or a single process"
        )
