"""Images with a mask of classes each: files of equal names in two folders."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from distrain.config import UserError
from distrain.config.registry import datasets
from distrain.datasets.base import (
    SPLIT_NAMES,
    AnySource,
    Batch,
    Data,
    DataMeta,
    DataRequest,
    split_indices,
)
from distrain.datasets.image_layouts import folders_in, image_paths
from distrain.datasets.images import Channels, ImageFiles, height_and_width, image_reader, not_decoded
from distrain.datasets.labels import Labels

logger = logging.getLogger(__name__)

IMAGES, MASKS = "images", "masks"
EXPECTED = f"a folder with the folders {IMAGES} and {MASKS}, or with such a folder for each split, named train and test"


@datasets.register("image_masks", tasks=("segmentation",))
def image_masks(
    request: DataRequest,
    classes: int | list[str],
    size: int | list[int] | None = None,
    channels: Channels = "rgb",
) -> Data:
    """Images, and for each a mask whose pixels are the numbers of classes; read on demand.

    `data.path` holds the folders `images` and `masks`, cut by `data.split` (by default [0.8, 0.2]); or such a folder
    for each split, named in `data.split` as {train: ..., test: ...}, or called train, val or valid, and test. The mask
    of images/a.jpg is masks/a.png: grey or with a palette, of the same size. `classes` are the names of the classes,
    or their number; a pixel of the loss's `ignore_index` has none. `size`, a number or [height, width], resizes images,
    and masks to the nearest pixel; `channels` is rgb or gray. Transforms move the pixels of a mask with its image.
    Inputs are (batch, channels, height, width) as in `image_folder`, targets (batch, height, width) int64.
    """
    names = tuple(classes) if isinstance(classes, list) else None
    count = len(classes) if isinstance(classes, list) else classes
    if count < 2 or (names is not None and len(set(names)) < count):
        raise UserError(f"data.classes: found {classes}, expected the names of at least two classes, or their number")
    shape = height_and_width(size)
    meta = DataMeta(num_classes=count, class_names=names)
    reader = image_reader(shape, channels)
    if request.inputs_only and request.state is not None:
        return Data({}, meta, request.state, reader)
    root = request.path(EXPECTED)
    folders = _folders(root, request)
    pairs = {split: _pairs(folder) for split, folder in folders.items()}
    splits: dict[str, AnySource] = {}
    if set(pairs) == {"train"}:
        images, masks = pairs["train"]
        base = folders["train"] / IMAGES
        for split, indices in split_indices(len(images), request.section, request.seed).items():
            chosen = [images[i] for i in indices], [masks[i] for i in indices]
            splits[split] = ImageMasks(*chosen, shape, channels, base, request.labels(split, count))
    else:
        for split, (images, masks) in pairs.items():
            base = folders[split] / IMAGES
            splits[split] = ImageMasks(images, masks, shape, channels, base, request.labels(split, count))
    counts = ", ".join(f"{len(images):,}" for images, _ in pairs.values())
    logger.info(f"image_masks: {counts} images with masks of {count} classes")
    read = [path for pair in pairs.values() for paths in pair for path in paths]
    return Data(splits, meta, {"classes": count}, reader, read)


def _folders(root: Path, request: DataRequest) -> Mapping[str, Path]:
    """Return the folder of each split; `train` alone where it is one piece, to be cut."""
    if isinstance(request.section.split, dict):
        return {split: root / place for split, place in request.section.split.items()}
    found: dict[str, Path] = {}
    for name in folders_in(root):
        if (split := SPLIT_NAMES.get(name.lower())) is not None and (root / name / MASKS).is_dir():
            if split in found:
                raise UserError(
                    f"data.path: {root} has the folders {found[split].name} and {name} for one split; name those that "
                    "are meant in data.split"
                )
            found[split] = root / name
    whole = (root / MASKS).is_dir()
    if "train" not in found or (whole and found):
        if whole and not found:
            return {"train": root}
        problem = "both, which leaves open what is meant" if whole else f"{', '.join(folders_in(root)) or 'no folder'}"
        raise UserError(f"data.path: {root} holds {problem}; expected {EXPECTED}")
    if len(found) > 1 and request.section.split is not None:
        raise UserError(
            f"data.split: found {request.section.split}, and {root} has a folder for each split, {', '.join(found)}; "
            f"remove it, or set data.path to {found['train']} to cut that alone"
        )
    return found


def _pairs(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the images of a folder and the mask of each, by their names without the suffix."""
    if lacking := next((name for name in (IMAGES, MASKS) if not (folder / name).is_dir()), None):
        raise UserError(f"{folder} has no folder {lacking}; expected {EXPECTED}")
    images, masks = (_by_stem(folder / name) for name in (IMAGES, MASKS))
    for one, other, what in ((images, masks, "mask"), (masks, images, "image")):
        if alone := sorted(one.keys() - other.keys()):
            raise UserError(
                f"{one[alone[0]]} has no {what} of its name, nor have {len(alone) - 1:,} others of {len(one):,}; "
                f"expected {folder / IMAGES}/NAME.jpg with {folder / MASKS}/NAME.png"
            )
    return list(images.values()), [masks[name] for name in images]


def _by_stem(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in image_paths(folder):
        stem = path.relative_to(folder).with_suffix("").as_posix()
        if stem in found:
            raise UserError(f"{found[stem]} and {path} have one name, which identifies a pair; remove one of them")
        found[stem] = path
    return found


class ImageMasks:
    """Images and masks, decoded when fetched; a batch has lists of both where their sizes differ."""

    def __init__(
        self,
        images: Sequence[Path],
        masks: Sequence[Path],
        size: tuple[int, int] | None,
        channels: Channels,
        root: Path,
        labels: Labels,
    ):
        """`size`: (height, width) to resize to, or None. `root`: as for `ImageFiles`. `labels`: the classes."""
        self._images = ImageFiles(images, None, size, channels, root=root)
        self._masks = masks
        self._labels = labels
        self.size = size

    def __len__(self) -> int:
        return len(self._masks)

    def fetch(self, ids: np.ndarray) -> Batch:
        batch = self._images.fetch(ids)
        masks = [self._mask(number) for number in ids.tolist()]
        for number, image, mask in zip(ids.tolist(), batch["inputs"], masks, strict=True):
            if image.shape[-2:] != mask.shape:
                raise UserError(
                    f"sample {number}: {self._images.paths[number]} has {_by(image.shape[-2:])} pixels and its mask "
                    f"{self._masks[number]} has {_by(mask.shape)}; expected as many"
                )
        same = isinstance(batch["inputs"], torch.Tensor)
        batch["targets"] = torch.stack(masks) if same else masks
        return batch

    def keys(self, ids: np.ndarray) -> dict[str, Sequence[Any]]:
        return self._images.keys(ids)

    def _mask(self, number: int) -> torch.Tensor:
        path = self._masks[number]
        try:
            with Image.open(path) as file:
                mode = file.mode
                ImageOps.exif_transpose(file, in_place=True)  # as its image
                size = file.size if self.size is None else self.size[::-1]
                pixels = np.asarray(file if file.size == size else file.resize(size, Image.Resampling.NEAREST))
        except Exception as error:
            raise not_decoded(number, path, error, "a mask", "the file and its image") from error
        if pixels.ndim != 2 or pixels.dtype.kind not in "iub":
            raise UserError(
                f"sample {number}, {path} is a picture of mode {mode}; expected a PNG whose pixels are the numbers of "
                "classes, grey (L) or with a palette (P)"
            )
        mask = torch.from_numpy(pixels.astype(np.int64))
        if (found := self._labels.problem(mask[None])) is not None:
            raise UserError(
                f"sample {number}, {path}: {found[1]}; correct the mask or data.classes, or set loss.ignore_index to "
                "the number of pixels without a class"
            )
        return mask


def _by(shape: Sequence[int]) -> str:
    return f"{shape[0]} × {shape[1]}"
