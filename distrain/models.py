"""Models by name, with their initial weights; how to call them.

A name is one of `distrain.networks`, any model of torchvision.models, `transformers:CLASS`, or your own class or
function. Nothing is ever downloaded. `build_model` finds the builder, checks the recipe's arguments against its
signature, adds the facts of the data, builds the model under its own seed, and loads `model.weights`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from distrain.config import Recipe, UserError, mix
from distrain.data import float_dtype
from distrain.datasets.base import DataMeta
from distrain.datasets.randomness import isolated_randomness, seed_globally
from distrain.networks.builders import find_builder, torchvision_names
from distrain.networks.calling import ModelOutput, calling_convention, compiled_in_place, forward, unwrap_model
from distrain.networks.facts import FACT_NAMES, facts, num_outputs
from distrain.networks.huggingface import PREFIX as TRANSFORMERS
from distrain.networks.huggingface import build_transformers, check_transformers, transformers_config
from distrain.networks.lora import add_adapters
from distrain.networks.meta_device import is_building_on_meta
from distrain.networks.sequential import check_layers, shown
from distrain.networks.summary import ModelSummary, describe_model
from distrain.networks.weights import WeightsReport, load_weights, tied_names

__all__ = [
    "ModelOutput",
    "ModelSummary",
    "WeightsReport",
    "build_model",
    "calling_convention",
    "check_model",
    "describe_model",
    "facts",
    "forward",
    "library_call",
    "load_weights",
    "num_outputs",
    "tied_names",
    "torchvision_names",
    "transformers_config",
    "unwrap_model",
]

logger = logging.getLogger(__name__)


def check_model(recipe: Recipe) -> list[str]:
    """Return the problems of the model's name and arguments that show without data and without building it."""
    args = recipe.model.args
    try:
        if recipe.model.name.startswith(TRANSFORMERS):
            return check_transformers(recipe.model.name, args)
        builder = find_builder(recipe)
    except UserError as error:
        return [str(error)]
    problems = builder.problems(args, FACT_NAMES)
    if builder.name == "sequential" and "layers" in args:
        problems += check_layers(args["layers"])
    return problems


def build_model(
    recipe: Recipe,
    meta: DataMeta,
    *,
    base: Path = Path(),
    weights: bool = True,
    kept: Path | None = None,
    as_kept: bool = False,
) -> nn.Module:
    """Return the recipe's model on the CPU, in training mode, in fp32 (fp64 for train.precision fp64).

    Its initial weights depend on the recipe's seed alone, and no random state outside changes. `base`: the folder that
    relative paths start from. `weights`: whether model.weights (or the weights in the `path` of a transformers model)
    are loaded; without them a checkpoint is expected to follow that stores all of them. With model.lora the layers that
    it names have adapters, of initial values that depend on the seed alone, and the rest is frozen. What was loaded or
    adapted is logged.
    `kept`: what a run has kept of that `path` (see `distrain.checkpoints.export.companion_files`), whose config.json is
    read where the other is gone, or `as_kept` says so.
    """
    section, known = recipe.model, facts(recipe.form, meta)
    dtype = float_dtype(recipe)
    with isolated_seed(mix(recipe.seed, "init")):
        if section.name.startswith(TRANSFORMERS):
            files: dict[str, Any] = {"base": base, "weights": weights, "kept": kept, "as_kept": as_kept}
            model = build_transformers(section.name, section.args, known | {"task": recipe.form}, **files)
        else:
            model = compiled_in_place(_build(recipe, known))
            _size_lazy(model, meta, section.name)
    # what is on the meta device cannot leave it
    device = None if is_building_on_meta() else "cpu"
    tensors = (*model.named_parameters(), *model.named_buffers())
    if device is not None and (empty := [name for name, tensor in tensors if tensor.is_meta]):
        raise UserError(
            f"model.name: {section.name} leaves {', '.join(empty[:5])} on the meta device, without values; create "
            f"{'it' if len(empty) == 1 else 'them'} on the CPU, or give values before the model is returned"
        )
    if any(p.device.type != "cpu" or p.dtype != _converted(p.dtype, dtype) for p in model.parameters()):
        # not .to(dtype=...), which makes complex tensors real
        model = model._apply(lambda tensor: tensor.to(device, _converted(tensor.dtype, dtype)))
    model.train()
    if weights and recipe.model.weights is not None:
        path = base / recipe.model.weights
        logger.info("%s", load_weights(model, path, strict=recipe.model.weights_strict))
    if section.lora is not None:
        with isolated_seed(mix(recipe.seed, "lora")):
            add_adapters(model, section.lora)
    return model


def _converted(own: torch.dtype, dtype: torch.dtype) -> torch.dtype:
    """Return what a tensor becomes in a model of `dtype`: complex ones stay complex, at least as wide."""
    if own.is_complex:
        return torch.promote_types(own, dtype)
    return dtype if own.is_floating_point else own


def library_call(recipe: Recipe, meta: DataMeta) -> dict[str, Any] | None:
    """Return how code without distrain builds the model: {library, arguments, object}.

    `library`: torchvision, timm or own, whose `object` is `path/to/file.py:name` or `package.module:name`.

    None for a model of distrain's or of transformers, whose config.json says it.
    """
    if recipe.model.name.startswith((TRANSFORMERS, "object.")):
        return None
    builder = find_builder(recipe)
    args = builder.arguments(recipe.model.args, facts(recipe.form, meta))
    if builder.call is None:
        return None
    return {"library": builder.origin, "arguments": builder.call(args), "object": builder.spec}


def _build(recipe: Recipe, known: dict[str, Any]) -> nn.Module:
    builder, given = find_builder(recipe), recipe.model.args
    problems = builder.problems(given, set(known))
    if problems:
        raise UserError("\n".join(problems))
    args = builder.arguments(given, known)
    of_classes = recipe.form in ("classification", "segmentation", "token_classification")
    if of_classes and "num_classes" in given and "num_classes" in known:
        classes = given["num_classes"]
        if isinstance(classes, int) and classes < known["num_classes"]:
            raise UserError(
                f"model.num_classes: {classes}, and the data have {known['num_classes']} classes; remove it to "
                "use the number of the data"
            )
    call = shown(builder.name, (), args)
    try:
        model = builder.build(**args)
    except UserError:
        raise
    except Exception as error:
        if builder.own:
            # the traceback of the user's code says more than our message
            error.add_note(f"while building the recipe's model, {call}")
            raise
        raise UserError(f"model: {call} cannot be built: {error}; it takes {builder.shown()}") from error
    if not isinstance(model, nn.Module):
        raise UserError(f"model.name: {builder.name} returned {type(model).__name__}; expected a torch.nn.Module")
    return model


@contextmanager
def isolated_seed(seed: int) -> Iterator[None]:
    """Seed Python's, NumPy's and PyTorch's CPU generators, and restore their states at the end."""
    with isolated_randomness():
        seed_globally(seed)
        yield


def _size_lazy(model: nn.Module, meta: DataMeta, name: str) -> None:
    """Give lazy parameters their shapes by a forward pass over zeros."""
    lazy = [key for key, parameter in model.named_parameters() if is_lazy(parameter)]
    if not lazy:
        return
    if meta.input_shape is None:
        raise UserError(
            f"model.name: {name} has lazy parameters, such as {lazy[0]!r}, and the shape of a sample is unknown; "
            "give their sizes"
        )
    dtype = torch.get_default_dtype() if meta.vocab_size is None else torch.int64
    with torch.no_grad():
        forward(model.eval(), torch.zeros(2, *meta.input_shape, dtype=dtype))
    model.train()
