"""The builder of a model by its name, and the check of the recipe's arguments against its signature."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from distrain.config import ModelSection, Recipe, UserError
from distrain.config.arguments import argument_problems, named_parameters, shown_parameters
from distrain.config.registry import Entry, models
from distrain.networks.facts import FACT_NAMES, HEAD_NAMES
from distrain.networks.timm_models import REFUSED as REFUSED_BY_TIMM
from distrain.networks.timm_models import build_timm, timm_arguments, timm_parameters
from distrain.system.compiler import without_compiler

logger = logging.getLogger(__name__)

_NO_DOWNLOAD = "weights are never downloaded; name a local file in model.weights"
_NO_SECOND_HEAD = "an auxiliary head needs the targets in the forward pass, so it cannot be trained here; remove it"
_REFUSED = {
    **dict.fromkeys(("pretrained", "pretrained_backbone", "weights_backbone"), _NO_DOWNLOAD),
    **dict.fromkeys(("aux_logits", "aux_loss"), _NO_SECOND_HEAD),
}
_OPTIONAL = inspect.Parameter("in_channels", inspect.Parameter.KEYWORD_ONLY, default=None)


@dataclass(frozen=True)
class Builder:
    """A model's constructor: built in, torchvision's, or the user's."""

    name: str
    build: Callable[..., Any]
    parameters: Mapping[str, inspect.Parameter]
    """Its parameters by name, without *args and **kwargs."""
    takes_any: bool
    """Whether it takes keys besides its parameters."""
    own: bool = False
    """Whether it is the user's code."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Refused arguments, with reasons."""
    spec: str | None = None
    """`path/to/file.py:name` or `package.module:name` of the user's code."""
    origin: str | None = None
    """Whose it is: torchvision, timm, or own; None: distrain's."""
    call: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    """What the library itself is called with, from the arguments of `build`; None for distrain's models."""

    def arguments(self, given: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
        """Return what `build` is called with: the recipe's arguments, and the facts among its parameters."""
        return {key: value for key, value in known.items() if key in self.parameters} | {**given}

    def problems(self, args: Mapping[str, Any], known: set[str]) -> list[str]:
        """Return the problems of the recipe's arguments, given the facts named `known`."""
        return argument_problems(
            self.build,
            args,
            "model",
            self.name,
            filled=known,
            section_keys=ModelSection.model_fields,
            parameters=self.parameters,
            takes_any=self.takes_any,
            refused=self.refused,
            missing=dict.fromkeys(FACT_NAMES, "the data do not determine it; set it in the recipe")
            | dict.fromkeys(
                HEAD_NAMES,
                "the data do not determine it; set it in the recipe, or give a data set of classes the attribute "
                "`classes`, their names",
            ),
        )

    def shown(self) -> str:
        return shown_parameters(self.parameters)


def find_builder(recipe: Recipe) -> Builder:
    name = recipe.model.name
    entry = models.find(name, recipe.form)
    if entry.metadata.get("library") == "torchvision":
        return _torchvision_builder(name)
    if entry.metadata.get("library") == "timm":
        parameters, takes_any = timm_parameters(entry)
        return Builder(
            name,
            functools.partial(build_timm, entry),
            parameters,
            takes_any,
            refused=REFUSED_BY_TIMM,
            origin="timm",
            call=lambda args: timm_arguments(entry, **args),
        )
    if not callable(entry.value):
        raise UserError(
            f"model.name: {name} is {type(entry.value).__name__}, not a class or function that builds a model"
        )
    own = entry.spec is not None
    found = Builder(name, entry.value, *named_parameters(entry.value), own=own)
    return replace(found, spec=entry.spec, origin="own", call=dict) if own else found


@functools.cache
def torchvision_names() -> tuple[str, ...]:
    """Return the models of torchvision that map one tensor to one: images, video, segmentation."""
    library = _torchvision_models()
    modules = (library, library.video, library.segmentation)
    return tuple(sorted({name for module in modules for name in library.list_models(module=module)}))


def _torchvision_models() -> Any:
    with without_compiler():
        from torchvision import models
    return models


def _in_torchvision(name: str) -> Entry[Callable[..., Any]] | None:
    library = _torchvision_models()
    if name in torchvision_names():
        return Entry(name, library.get_model_builder(name), metadata={"library": "torchvision"})
    if name in library.list_models():
        why = (
            "of torchvision is for detection, optical flow or quantized inference, which no task here trains; wrap it "
            "in your own class and name that, as path/to/file.py:Class"
        )
        return Entry(name, library.get_model_builder(name), metadata={"refused": why})
    return None


models.add_library(torchvision_names, _in_torchvision)


def _torchvision_builder(name: str) -> Builder:
    from torchvision.models import get_model_builder

    builder = get_model_builder(name)
    outer, _ = named_parameters(builder)
    parameters = dict(outer)
    kind = inspect.signature(builder).return_annotation
    if "weights_backbone" not in outer:  # segmentation models ignore their **kwargs
        # **kwargs goes to the class, where arguments that the builder sets have no default
        inner, _ = named_parameters(kind)
        empty = inspect.Parameter.empty
        parameters |= {key: p for key, p in inner.items() if key not in outer and p.default is not empty}
        # except image_size, which builders of vision transformers read from **kwargs first
        parameters |= {key: inner[key].replace(default=224) for key in ("image_size",) if key in inner}
    for key in ("weights", "progress", *_REFUSED):
        parameters.pop(key, None)
    parameters.setdefault("in_channels", _OPTIONAL)
    fixed: dict[str, Any] = {"weights": None}
    fixed |= {"weights_backbone": None} if "weights_backbone" in outer else {}
    if name in ("googlenet", "inception_v3"):
        # DistributedDataParallel refuses a second head without gradient; the default initialisation warns
        fixed |= {"aux_logits": False, "init_weights": True}

    def build(in_channels: int | None = None, **args: Any) -> nn.Module:
        model: nn.Module = builder(**(fixed | args))
        if in_channels is not None and (layer := _set_in_channels(model, in_channels)):
            logger.info(f"{name}: its first layer, {layer}, was rebuilt for in_channels {in_channels}")
        return model

    def call(args: dict[str, Any]) -> dict[str, Any]:
        return fixed | args

    return Builder(name, build, parameters, takes_any=False, refused=_REFUSED, origin="torchvision", call=call)


def _set_in_channels(model: nn.Module, in_channels: int) -> str | None:
    """Rebuild the first convolution for `in_channels`; returns its name, or None if it has so many already."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            if module.in_channels == in_channels:
                return None
            assert module.groups == 1
            new = type(module)(
                in_channels,
                module.out_channels,
                module.kernel_size,  # type: ignore[arg-type]
                module.stride,  # type: ignore[arg-type]
                module.padding,  # type: ignore[arg-type]
                module.dilation,  # type: ignore[arg-type]
                bias=module.bias is not None,
            )
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, new)
            return name
    raise UserError(f"model.in_channels: {type(model).__name__} has no convolution to change")
