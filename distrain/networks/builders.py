"""The builder of a model by its name, and a check of the recipe's arguments against its signature."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_type_hints

import torchvision
from pydantic import TypeAdapter, ValidationError
from torch import nn

from distrain.config import ModelSection, Recipe, UserError, close_names, is_object_spec, resolve_object
from distrain.networks import find, model_names
from distrain.networks.facts import FACT_NAMES

logger = logging.getLogger(__name__)

_NO_DOWNLOAD = "weights are never downloaded; name a local file in model.weights"
_NO_SECOND_HEAD = "an auxiliary head needs the targets in the forward pass, so it cannot be trained here; leave it out"
_REFUSED = {
    **dict.fromkeys(("pretrained", "pretrained_backbone", "weights_backbone"), _NO_DOWNLOAD),
    **dict.fromkeys(("aux_logits", "aux_loss"), _NO_SECOND_HEAD),
}
_OPTIONAL = inspect.Parameter("in_channels", inspect.Parameter.KEYWORD_ONLY, default=None)


@dataclass(frozen=True)
class Builder:
    """A way to build a model: of this project, torchvision's, or the user's."""

    name: str
    build: Callable[..., Any]
    parameters: Mapping[str, inspect.Parameter]
    """Its parameters by name, without *args and **kwargs."""
    takes_any: bool
    """Whether it takes keys beside its parameters."""
    own: bool = False
    """Whether it is the user's code."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Arguments that are not passed on, and why."""
    types: Mapping[str, Any] = field(default_factory=dict)
    """What the values of arguments must be, where that is checked: for the networks written here."""

    def problems(self, args: Mapping[str, Any], known: set[str]) -> list[str]:
        """Return what is wrong with the recipe's arguments when the facts named `known` are filled in."""
        choices = [*self.parameters, *ModelSection.model_fields]
        unknown = [] if self.takes_any else [key for key in args if key not in self.parameters]
        found = [
            f"model.{key}: {self.refused[key]}"
            if key in self.refused
            else f"model.{key}: {self.name} takes no such argument{close_names(key, choices)}; it takes {self.shown()}"
            for key in unknown
        ]
        for key, value in args.items():
            try:
                TypeAdapter(self.types.get(key, Any)).validate_python(value, strict=True)
            except ValidationError as error:
                reasons = "; ".join(dict.fromkeys(each["msg"] for each in error.errors()))
                found.append(f"model.{key}: {value!r} does not fit: {reasons}")
        empty = inspect.Parameter.empty
        for key, parameter in self.parameters.items():
            if parameter.default is empty and key not in args and key not in known:
                why = "the data do not say it" if key in FACT_NAMES else "it has no default"
                found.append(f"model.{key}: {self.name} needs this argument, and {why}; write it in the recipe")
        return found

    def shown(self) -> str:
        empty = inspect.Parameter.empty
        parts = [key if p.default is empty else f"{key}={p.default!r}" for key, p in self.parameters.items()]
        return ", ".join(parts) or "none"


def _named_parameters(target: Callable[..., Any]) -> tuple[dict[str, inspect.Parameter], bool]:
    """Return the parameters of `target` that can be given by name, and whether it takes any others."""
    try:
        every = inspect.signature(target).parameters.values()
    except ValueError:  # written in C without a signature
        return {}, True
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {p.name: p for p in every if p.kind in kinds}, any(p.kind is inspect.Parameter.VAR_KEYWORD for p in every)


def find_builder(recipe: Recipe, say: Callable[[str], None] = logger.info) -> Builder:
    name, task = recipe.model.name, recipe.task
    if entry := find(name):
        if task not in entry.tasks:
            others = ", ".join(other for other in model_names() if task in getattr(find(other), "tasks", ()))
            raise UserError(
                f"model.name: {name} is for {', '.join(entry.tasks)}, and the task is {task}; for that there are "
                f"{others}, or a model of your own"
            )
        target = vars(entry.build)["__init__"] if isinstance(entry.build, type) else entry.build
        types = get_type_hints(target, include_extras=True)
        return Builder(name, entry.build, *_named_parameters(entry.build), types=types)
    if is_object_spec(name):
        target = resolve_object(name)
        if not callable(target):
            raise UserError(
                f"model.name: {name} is {type(target).__name__}, not a class or function that builds a model"
            )
        return Builder(name, target, *_named_parameters(target), own=True)
    if name in torchvision_names():
        return _torchvision_builder(name, say)
    choices = [*model_names(), *torchvision_names()]
    if name in torchvision.models.list_models():
        raise UserError(
            f"model.name: {name} of torchvision is for detection, optical flow or quantized inference, which no task "
            "here trains; wrap it in a class of your own and name that, as path/to/file.py:Class"
        )
    raise UserError(
        f"model.name: no model {name!r}{close_names(name, choices)}; expected {', '.join(model_names())}, any model of "
        "torchvision.models, transformers:CLASS, path/to/file.py:NAME or package.module:NAME"
    )


@functools.cache
def torchvision_names() -> tuple[str, ...]:
    """Return the models of torchvision that map one tensor to one: of images, of video, and of pixels."""
    models = torchvision.models
    modules = (models, models.video, models.segmentation)
    return tuple(sorted({name for module in modules for name in models.list_models(module=module)}))


def _torchvision_builder(name: str, say: Callable[[str], None]) -> Builder:
    builder = torchvision.models.get_model_builder(name)
    outer, _ = _named_parameters(builder)
    parameters = dict(outer)
    kind = inspect.signature(builder).return_annotation
    if "weights_backbone" not in outer:  # models of pixels drop their **kwargs
        # **kwargs goes to the class, where what the builder itself sets has no default
        inner, _ = _named_parameters(kind)
        empty = inspect.Parameter.empty
        parameters |= {key: p for key, p in inner.items() if key not in outer and p.default is not empty}
        # but for what a builder of vision transformers takes out of **kwargs first
        parameters |= {key: inner[key].replace(default=224) for key in ("image_size",) if key in inner}
    for key in ("weights", "progress", *_REFUSED):
        parameters.pop(key, None)
    parameters.setdefault("in_channels", _OPTIONAL)
    fixed: dict[str, Any] = {"weights": None}
    fixed |= {"weights_backbone": None} if "weights_backbone" in outer else {}
    if name in ("googlenet", "inception_v3"):
        # a second head would have no gradient, which DistributedDataParallel refuses; the default initialisation warns
        fixed |= {"aux_logits": False, "init_weights": True}

    def build(in_channels: int | None = None, **args: Any) -> nn.Module:
        model: nn.Module = builder(**(fixed | args))
        if in_channels is not None and (layer := _set_in_channels(model, in_channels)):
            say(f"{name}: its first layer, {layer}, was rebuilt for in_channels {in_channels}")
        return model

    return Builder(name, build, parameters, takes_any=False, refused=_REFUSED)


def _set_in_channels(model: nn.Module, in_channels: int) -> str | None:
    """Give the first convolution `in_channels`, freshly initialised; return its name, or None where it has so many."""
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
