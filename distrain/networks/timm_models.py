"""Models of the timm library: `timm:NAME`. Nothing is ever downloaded.

model: {name: timm:vit_small_patch16_224, drop_path_rate: 0.1, weights: weights/vit_small.safetensors}
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from distrain.config import UserError, close_names
from distrain.config.arguments import named_parameters
from distrain.config.registry import Entry, models
from distrain.system.compiler import without_compiler

PREFIX = "timm:"
_NO_DOWNLOAD = "weights are never downloaded; name a local file in model.weights"
REFUSED = {
    **dict.fromkeys(
        ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"), _NO_DOWNLOAD
    ),
    "in_chans": "the data determine it; remove it, or give in_channels",
    "features_only": "returns several tensors, and a model here returns its predictions; wrap it in a class",
}
_FACTS = ("num_classes", "in_channels", "input_shape")


def _timm() -> Any:
    try:
        with without_compiler():
            import timm
    except ImportError as error:
        raise UserError(f"models {PREFIX}NAME need the library timm: pip install 'distrain[timm]' ({error})") from error
    return timm


@functools.cache
def timm_names() -> tuple[str, ...]:
    """Return `timm:NAME` for every architecture of timm; none where it is not installed."""
    try:
        return tuple(PREFIX + name for name in _timm().list_models())
    except UserError:
        return ()


def _find(name: str) -> Entry[Callable[..., Any]]:
    timm, bare = _timm(), name.removeprefix(PREFIX)
    architecture, _, tag = bare.partition(".")  # the tag names weights, and with them the size of the images
    if not timm.is_model(architecture):
        hint = close_names(architecture, timm.list_models(), "`distrain list models timm:` has all")
        raise UserError(f"model.name: timm has no model {architecture!r}{hint}")
    if tag and bare not in (known := timm.list_models(f"{architecture}.*", pretrained=True)):
        hint = close_names(bare, known, f"the name without {tag!r} does")
        raise UserError(f"model.name: timm knows no {bare!r}{hint}")
    return Entry(name, timm.model_entrypoint(architecture), metadata={"library": "timm"})


models.add_library(timm_names, _find, prefix=PREFIX)


def timm_parameters(entry: Entry[Callable[..., Any]]) -> tuple[dict[str, inspect.Parameter], bool]:
    """Return the arguments that a recipe may give, by name, and whether there may be others."""
    parameters = {name: inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in _FACTS}
    kind = _class_of(entry)
    if kind is None:
        return parameters, True
    inner, takes_any = named_parameters(kind)
    # those without a default are set by the architecture
    own = {key: each for key, each in inner.items() if each.default is not inspect.Parameter.empty}
    return {**{key: each for key, each in own.items() if key not in REFUSED}, **parameters}, takes_any


def _class_of(entry: Entry[Callable[..., Any]]) -> type[nn.Module] | None:
    found = inspect.signature(entry.value).return_annotation
    if isinstance(found, str):
        found = getattr(inspect.getmodule(entry.value), found, None)
    return found if inspect.isclass(found) and issubclass(found, nn.Module) else None


def build_timm(entry: Entry[Callable[..., Any]], **args: Any) -> nn.Module:
    """Return the model, freshly initialised, for images of `input_shape` (channels, height, width).

    Raises UserError for a model whose images have another size, which its class cannot change.
    """
    shape = args.get("input_shape")
    size = tuple(shape[1:]) if shape is not None and len(shape) == 3 else None
    call = timm_arguments(entry, **args)
    model: nn.Module = _timm().create_model(entry.name.removeprefix(PREFIX), pretrained=False, **call)
    found: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    expected = tuple(found.get("input_size", ()))[1:]
    fixed = "img_size" not in call and found.get("fixed_input_size")
    if size is not None and fixed and expected != size:
        raise UserError(
            f"model.name: {entry.name} takes images of {_by(expected)}, and the data have {_by(size)} after the "
            "transforms; resize them (data.size, or Resize), give model.img_size where the class takes that, or take "
            "another model"
        )
    return model


def timm_arguments(
    entry: Entry[Callable[..., Any]],
    *,
    num_classes: int | None = None,
    in_channels: int | None = None,
    input_shape: Sequence[int] | None = None,
    **args: Any,
) -> dict[str, Any]:
    """Return what `timm.create_model` is called with; raises UserError for images of another size than the model's."""
    size = tuple(input_shape[1:]) if input_shape is not None and len(input_shape) == 3 else None
    kind = _class_of(entry)
    takes_size = kind is not None and "img_size" in inspect.signature(kind).parameters
    if size is not None and takes_size:
        given = args.setdefault("img_size", size if size[0] != size[1] else size[0])
        wanted = (given, given) if isinstance(given, int) else tuple(given)
        if wanted != size and not args.get("dynamic_img_size"):
            raise UserError(
                f"model.img_size: {_by(wanted)}, and the images are {_by(size)} after the transforms; remove it, "
                "resize the images, or set dynamic_img_size: true where the model takes that"
            )
    facts = {"num_classes": num_classes, "in_chans": in_channels}
    return {**{key: value for key, value in facts.items() if value is not None}, **args}


def _by(size: Sequence[int]) -> str:
    return " × ".join(map(str, size))
