"""The transforms of torchvision and of the user, on whole batches or sample by sample."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from distrain.config import Component, UserError, close_names, is_object_spec, mix, resolve_object
from distrain.datasets.randomness import below, isolated_randomness, seed_globally, stream_of, uniform
from distrain.datasets.transforms import Finish, Images, Masks, Step, Windows, too_small

_ON_BATCHES = (
    v2.CenterCrop,
    v2.ConvertImageDtype,
    v2.Grayscale,
    v2.Identity,
    v2.Normalize,
    v2.Pad,
    v2.Resize,
    v2.RGB,
    v2.ToDtype,
    v2.ToImage,
    v2.ToPureTensor,
)
_MOVING = (v2.CenterCrop, v2.Pad, v2.Resize)
"""Those of them that move the pixels of an image."""
_UNCHANGED = (v2.Identity, v2.ToImage, v2.ToPureTensor)
"""What leaves tensors as they are."""
_FLOATS = (torch.float32, torch.float64)
_CONTAINERS = (v2.Compose, v2.RandomApply, v2.RandomChoice, v2.RandomOrder)
_OF_IMAGES_ALONE = ("AugMix", "AutoAugment", "RandAugment", "TrivialAugmentWide")
_UNFIT = {
    "CutMix": "it mixes samples of a batch, whichever they are; data.cutmix does so, alike in every batch and world",
    "MixUp": "it mixes samples of a batch, whichever they are; data.mixup does so, alike in every batch and world",
    "FiveCrop": "it makes several images of one",
    "TenCrop": "it makes several images of one",
    "Lambda": "name the function itself, as 'path/to/file.py:name'",
    "Transform": "it is a base class",
    "RandomIoUCrop": "it is for bounding boxes",
    "SanitizeBoundingBoxes": "it is for bounding boxes",
    "ClampBoundingBoxes": "it is for bounding boxes",
    "ConvertBoundingBoxFormat": "it is for bounding boxes",
    "ClampKeyPoints": "it is for key points",
    "SanitizeKeyPoints": "it is for key points",
    "SetClampingMode": "it is for bounding boxes",
    "UniformTemporalSubsample": "it is for video",
}

# --------------------------------------------------------------------------------------------------------------------
# Building


def transform_names() -> list[str]:
    """Return the usable names of torchvision.transforms.v2."""
    return sorted(
        name
        for name, value in vars(v2).items()
        if inspect.isclass(value) and issubclass(value, torch.nn.Module) and name not in _UNFIT
    )


def _build(item: Component, dtype: torch.dtype, masks: Masks | None) -> Callable[[Any], Any]:
    """Return the transform of one item, a function of one sample or of a batch; `dtype` replaces float32."""
    if is_object_spec(item.name):
        made = resolve_object(item.name)
        args = _arguments(made, item, dtype, masks)
        transform: Any = made(**args) if inspect.isclass(made) else functools.partial(made, **args)
        return transform
    if item.name in _UNFIT:
        raise UserError(f"{item.name} cannot be used: {_UNFIT[item.name]}")
    names = transform_names()
    if item.name not in names:
        hint = close_names(item.name, names, "your own is 'path/to/file.py:name'")
        raise UserError(f"no transform {item.name!r} in torchvision.transforms.v2{hint}")
    kind: Any = getattr(v2, item.name)
    args = _arguments(kind, item, dtype, masks)
    if masks is not None and "fill" in inspect.signature(kind).parameters:
        args |= _filled(item, masks)
    if kind is v2.ConvertImageDtype:
        args.setdefault("dtype", dtype)
    if kind is v2.Normalize:
        args.setdefault("inplace", True)  # a batch is fresh memory, and allocating more takes half the time
    try:
        return kind(**args)
    except (TypeError, ValueError) as error:
        raise UserError(f"{item.name}: {error}") from error


def _arguments(made: Any, item: Component, dtype: torch.dtype, masks: Masks | None) -> dict[str, Any]:
    """Return the item's arguments, checked against the signature and with names turned into what they name."""
    parameters = dict(inspect.signature(made).parameters)
    if is_object_spec(item.name) and not inspect.isclass(made):
        parameters.pop(next(iter(parameters), ""), None)  # the sample itself
    args = item.args
    any_key = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if unknown := [key for key in args if key not in parameters and not any_key]:
        takes = f"it takes {', '.join(parameters) or 'nothing'}"
        raise UserError(f"{item.name} has no argument {unknown[0]!r}{close_names(unknown[0], parameters, takes)}")
    for key, parameter in parameters.items():
        wanted = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if wanted and parameter.default is parameter.empty and key not in args:
            raise UserError(f"{item.name} needs {key!r}, and it was not given")
    if is_object_spec(item.name):
        return args
    for key, value in args.items():
        if key == "dtype" and isinstance(value, str):
            args[key] = getattr(torch, value, None)
            if not isinstance(args[key], torch.dtype):
                raise UserError(f"{item.name}: {value!r} is not a dtype of torch, such as float32 or uint8")
            if args[key] == torch.float32:
                args[key] = dtype
        elif key in ("interpolation", "policy") and isinstance(value, str):
            enumeration = v2.InterpolationMode if key == "interpolation" else v2.AutoAugmentPolicy
            choices = [str(each.value) for each in enumeration]
            if value not in choices:
                hint = close_names(value, choices, f"expected one of {', '.join(choices)}")
                raise UserError(f"{item.name}: no {key} {value!r}{hint}")
            args[key] = enumeration(value)
        elif key == "transforms":
            entries = value if isinstance(value, list) else [value]
            args[key] = [
                _build(Component.model_validate(e if isinstance(e, dict) else {"name": e}), dtype, masks)
                for e in entries
            ]
    return args


def _filled(item: Component, masks: Masks) -> dict[str, Any]:
    """Return the argument that gives pixels beyond the edge of a mask the class that the loss ignores."""
    if item.name in _OF_IMAGES_ALONE:
        raise UserError(
            f"{item.name} moves images without their masks; name what it does one by one, such as RandomRotation and "
            "ColorJitter"
        )
    if item.name == "RandomCrop" and not (item.args.get("padding") or item.args.get("pad_if_needed")):
        return {}
    if masks.fill is None:
        raise UserError(
            f"{item.name} gives an image pixels that its mask has no class for; set loss.ignore_index, as in "
            "loss: {name: cross_entropy, ignore_index: 255}"
        )
    return {"fill": {tv_tensors.Mask: masks.fill, "others": item.args.get("fill", 0)}}


def build_step(item: Component, dtype: torch.dtype, seed: int, index: int, masks: Masks | None = None) -> Step:
    """Return what the recipe's item at `index` does to a batch. Raises UserError for what does not fit the item."""
    transform = _build(item, dtype, masks)
    if masks is not None and not isinstance(transform, v2.Transform):
        raise UserError(
            f"{item.name} is given images alone, whose masks would not follow; let it be a class that inherits from "
            "torchvision.transforms.v2.Transform, which is called with both"
        )
    return _step(transform, mix(seed, "transform", index))


def _step(transform: Callable[[Any], Any], seed: int) -> Step:
    # subclasses may do anything, so only the exact classes count
    kind = type(transform)
    if kind in _ON_BATCHES:
        return functools.partial(_at_once, transform)
    if isinstance(transform, (v2.RandomHorizontalFlip, v2.RandomVerticalFlip)):
        return functools.partial(_flipped, transform, seed)
    if kind is v2.RandomCrop:
        return functools.partial(_cropped, transform, seed)
    return functools.partial(_one_by_one, transform, seed)


def finish_of(steps: Sequence[Step], dtype: torch.dtype) -> tuple[int, Finish]:
    """Return from which step on all that is done to images of bytes is a `Finish`, and that one."""
    finishes = ((start, _as_finish(steps[start:], dtype)) for start in range(len(steps) + 1))
    return next((start, finish) for start, finish in finishes if finish is not None)


def _as_finish(steps: Sequence[Step], dtype: torch.dtype) -> Finish | None:
    """Return what the steps do to images of bytes, where a `Finish` does that too."""
    found: Finish | None = None
    for step in steps:
        transform: Any = step.args[0] if isinstance(step, functools.partial) and step.func is _at_once else None
        kind = type(transform)
        if kind in _UNCHANGED:
            continue
        if kind is v2.Normalize and found is not None:
            by_channel = tuple(map(float, transform.mean)), tuple(map(float, transform.std))
            found = dataclasses.replace(found, normalised=(*found.normalised, by_channel))
        elif kind in (v2.ToDtype, v2.ConvertImageDtype) and found is None and transform.dtype in _FLOATS:
            found = Finish(transform.dtype, scaled=kind is v2.ConvertImageDtype or transform.scale)
        else:
            return None
    return found if found is not None else Finish(dtype)


# --------------------------------------------------------------------------------------------------------------------
# The steps


def on_both(step: Step, images: Images, masks: Images, epochs: np.ndarray, ids: np.ndarray) -> tuple[Images, Images]:
    """Return images and masks (batch, 1, height, width) after a step, with one draw; classes are not interpolated."""
    assert isinstance(step, functools.partial)
    transform = step.args[0]
    if step.func is _one_by_one:
        pairs = [(image, tv_tensors.Mask(mask)) for image, mask in zip(images, masks, strict=True)]
        results = _one_by_one(lambda pair: transform(*pair), step.args[1], pairs, epochs, ids)
        return [image for image, _ in results], [mask.as_subclass(torch.Tensor) for _, mask in results]
    if step.func is _cropped:
        return step(images, epochs, ids), step(masks, epochs, ids, kind=tv_tensors.Mask)
    if step.func is _flipped:
        return step(images, epochs, ids), step(masks, epochs, ids)
    if isinstance(transform, _MOVING):
        if isinstance(transform, v2.CenterCrop):
            _refuse_small(transform, masks)
        return step(images, epochs, ids), _at_once(lambda mask: transform(tv_tensors.Mask(mask)), masks, epochs, ids)
    return step(images, epochs, ids), masks


def _refuse_small(transform: v2.CenterCrop, masks: Images) -> None:
    height, width = transform.size
    for rows, columns in (mask.shape[-2:] for mask in masks):
        if rows < height or columns < width:
            raise UserError(
                f"CenterCrop to {height} × {width} would fill up an image of {rows} × {columns}, whose mask has no "
                "class there; put Resize before it"
            )


def _at_once(transform: Callable[[Any], Any], images: Images, epochs: np.ndarray, ids: np.ndarray) -> Images:
    return transform(images) if isinstance(images, torch.Tensor) else [transform(image) for image in images]


def _one_by_one(
    transform: Callable[[Any], Any], seed: int, images: Images, epochs: np.ndarray, ids: np.ndarray
) -> Images:
    results = []
    with isolated_randomness():
        for image, number in zip(images, stream_of(seed, epochs, ids).tolist(), strict=True):
            seed_globally(number)
            results.append(transform(image))
    return results


def _flipped(
    transform: v2.RandomHorizontalFlip | v2.RandomVerticalFlip,
    seed: int,
    images: Images,
    epochs: np.ndarray,
    ids: np.ndarray,
) -> Images:
    chosen = uniform(stream_of(seed, epochs, ids)) < transform.p
    horizontal = isinstance(transform, v2.RandomHorizontalFlip)
    if not isinstance(images, torch.Tensor):
        flip = functional.horizontal_flip if horizontal else functional.vertical_flip
        return [flip(image) if flips else image for image, flips in zip(images, chosen, strict=True)]
    values, rows = _bits(images), chosen.nonzero()[0]
    if not horizontal:
        values[rows] = values[rows][..., ::-1, :]
    elif values.itemsize == 1 and values.shape[-1] % 8 == 0 and values.flags.c_contiguous:
        # eight bytes at a time, which are turned by reading them in the other byte order
        values.view("<u8")[rows] = values.view(">u8")[rows][..., ::-1]
    elif not values.flags.c_contiguous:
        for image in (images[row] for row in rows.tolist()):
            image.copy_(image.flip(-1))
    else:
        values[rows] = values[rows][..., ::-1]
    return images


def _cropped(
    transform: v2.RandomCrop,
    seed: int,
    images: Images,
    epochs: np.ndarray,
    ids: np.ndarray,
    kind: type = torch.Tensor,
) -> Images:
    """Return what is cut of images, or of masks (`kind`), which have a fill of their own."""
    height, width = transform.size
    is_batch = isinstance(images, torch.Tensor)
    padded = [_padded(transform, each, kind) for each in ([images] if is_batch else images)]
    sizes = np.array([functional.get_size(each) for each in padded])
    if (sizes < (height, width)).any():
        raise UserError(too_small((height, width), sizes.min(axis=0)))
    tops, lefts = below(_draws(seed, epochs, ids), (sizes - (height, width) + 1).T)
    if not is_batch:
        corners = zip(padded, tops.tolist(), lefts.tolist(), strict=True)
        cut = [functional.crop(image, top, left, height, width) for image, top, left in corners]
        return [each.contiguous() if isinstance(each, torch.Tensor) else each for each in cut]
    # NumPy copies all windows in one call; a call for each image would take longer than the copies
    windows = np.lib.stride_tricks.sliding_window_view(_rows(padded[0], width), height, axis=-2)
    chosen = np.ascontiguousarray(windows[np.arange(len(tops)), ..., tops, lefts, :])
    result = torch.from_numpy(chosen.view(_bits(padded[0]).dtype)).view(padded[0].dtype)
    return result.view(*padded[0].shape[:-2], height, width)


def _draws(seed: int, epochs: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Return random bits for top and left of the crop of each image, (2, batch) uint64."""
    return stream_of(seed, epochs, ids, np.arange(2)[:, None])


def are_flips(steps: Sequence[Step]) -> bool:
    """Whether the steps do no more than flip images, which may then have any layout in memory."""
    return all(isinstance(step, functools.partial) and step.func is _flipped for step in steps)


def windows_of(step: Step) -> Callable[..., Windows] | None:
    """Return (epochs, ids) -> the windows of a step that cuts images and does not pad them; None of all others."""
    if not isinstance(step, functools.partial) or step.func is not _cropped:
        return None
    transform, seed = step.args
    if transform.pad_if_needed or any(transform.padding or ()):
        return None
    height, width = transform.size

    def windows(epochs: np.ndarray, ids: np.ndarray, *, channels_last: bool = False) -> Windows:
        return Windows(height, width, _draws(seed, epochs, ids).T.tolist(), channels_last)

    return windows


def _padded(transform: v2.RandomCrop, images: Any, kind: type) -> Any:
    fill: Any = transform.fill
    fill = fill.get(kind, fill["others"]) if isinstance(fill, dict) else fill
    left, right, top, bottom = transform.padding or (0, 0, 0, 0)
    if transform.pad_if_needed:
        height, width = functional.get_size(images)
        vertical = max(0, transform.size[0] - (height + top + bottom))
        horizontal = max(0, transform.size[1] - (width + left + right))
        left, right, top, bottom = left + horizontal, right + horizontal, top + vertical, bottom + vertical
    if not any((left, right, top, bottom)):
        return images
    if isinstance(images, torch.Tensor) and transform.padding_mode == "constant" and fill == 0:
        height, width = images.shape[-2:]
        result = images.new_zeros((*images.shape[:-2], top + height + bottom, left + width + right))
        _rows(result, width)[..., top : top + height, left] = _rows(images, width)[..., 0]  # in less time than torch's
        return result
    return functional.pad(images, [left, top, right, bottom], fill=fill, padding_mode=transform.padding_mode)


def _rows(images: torch.Tensor, width: int) -> np.ndarray:
    """Return what begins at each column of (..., height, columns), `width` elements as one item, which NumPy copies as
    a whole: (..., height, columns - width + 1).
    """
    values = np.ascontiguousarray(_bits(images))
    shape = (*values.shape[:-1], values.shape[-1] - width + 1)
    return np.ndarray(shape, f"V{values.itemsize * width}", values, 0, values.strides)


def _bits(images: torch.Tensor) -> np.ndarray:
    """Return a NumPy view of the tensor; of bfloat16, which NumPy lacks, as integers."""
    return (images.view(torch.int16) if images.dtype == torch.bfloat16 else images).numpy()
