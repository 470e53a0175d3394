"""Folders of images, one folder for each class, and CIFAR and MNIST from their published files."""

from __future__ import annotations

import functools
import io
import logging
import math
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps

from distrain.config import UserError
from distrain.config.registry import datasets
from distrain.datasets.base import (
    AnySource,
    Batch,
    CorruptSample,
    Data,
    DataMeta,
    DataRequest,
    Source,
    TensorSource,
    split_indices,
)
from distrain.datasets.image_layouts import CLASS_FOLDERS, class_names, class_numbers, find_layout, image_paths
from distrain.datasets.slots import room
from distrain.datasets.transforms import Windows
from distrain.system.compiler import without_compiler
from distrain.system.output import error_line

logger = logging.getLogger(__name__)

_BYTES = (0, 255)
_SIXTEEN_BITS = (0, 65535)
_FRAMED = (".gif", ".tif", ".tiff", ".webp", ".png", ".apng", ".mpo")
"""Suffixes of files that may hold several images."""

Channels = Literal["rgb", "gray"]
Decoder = Literal["pil", "torchvision"]
Range = tuple[float, float]
"""(black, white) of images whose values are not bytes."""
Window = Callable[[int, int], tuple[int, int, int, int]]
"""(height, width) of an image -> (top, left, bottom, right) of the part of it that is wanted."""


class ImageFiles:
    """Image files, decoded when fetched: inputs (batch, channels, height, width) uint8, a list where sizes differ."""

    def __init__(
        self,
        paths: Sequence[Path],
        targets: np.ndarray | None,
        size: tuple[int, int] | None,
        channels: Channels,
        black_to_white: Range | None = None,
        root: Path | None = None,
        decoder: Decoder = "pil",
    ):
        """`targets`: (n,) int64 or None. `size`: (height, width) to resize to, or None. `black_to_white`, `decoder`:
        see `decode_image`. `root`: the folder that file names in predictions are relative to.
        """
        self.paths = paths
        self.targets = targets
        self.size = size
        self.channels = channels
        self.black_to_white = black_to_white
        self.root = root
        self.decoder = decoder

    def __len__(self) -> int:
        return len(self.paths)

    def fetch(self, ids: np.ndarray) -> Batch:
        return self._batch(ids)

    def fetch_cut(self, ids: np.ndarray, windows: Windows) -> Batch:
        """As `fetch`, with what `windows` cuts of each image. Raises UserError for images that are too small."""
        return self._batch(ids, windows)

    def _batch(self, ids: np.ndarray, windows: Windows | None = None) -> Batch:
        # each is copied before the next is decoded, into the same memory, which a cache then has
        whole = np.empty(0)
        apart: list[np.ndarray] = []
        for row, number in enumerate(ids.tolist()):
            image = self._decoded(number, None if windows is None else functools.partial(windows.of, row))
            if row == 0:
                if windows is not None and windows.channels_last:
                    # these go to the device as they are, so nobody here refers to them afterwards
                    whole = room((len(ids), *image.shape[1:], image.shape[0])).transpose(0, 3, 1, 2)
                else:
                    whole = np.empty((len(ids), *image.shape), np.uint8)
            if not apart and image.shape != whole.shape[1:]:
                apart = list(whole[:row])
            if apart:
                apart.append(image.copy(order="C"))
            else:
                whole[row] = image
            del image
        batch: Batch = {"inputs": list(map(torch.from_numpy, apart)) if apart else torch.from_numpy(whole)}
        if self.targets is not None:
            batch["targets"] = torch.from_numpy(self.targets[ids])
        batch["ids"] = torch.from_numpy(ids)
        return batch

    def keys(self, ids: np.ndarray) -> dict[str, Sequence[Any]]:
        paths = [self.paths[number] for number in ids.tolist()]
        return {"file": [path.name if self.root is None else path.relative_to(self.root).as_posix() for path in paths]}

    def _decoded(self, number: int, window: Window | None) -> np.ndarray:
        path = self.paths[number]
        try:
            return decode_image(path, self.size, self.channels, self.black_to_white, self.decoder, window)
        except UserError as error:
            raise UserError(f"sample {number}, {error}") from error
        except Exception as error:
            raise not_decoded(number, path, error, "an image", "the file") from error


def not_decoded(number: int, path: Path, error: Exception, what: str, files: str) -> UserError:
    """Return the error of a file that could not be read as an image, or as a mask."""
    where = f"sample {number}, {path}, cannot be"
    if not CorruptSample.is_why(error):
        return UserError(f"{where} read: {error_line(error)}")
    return CorruptSample(number, f"{where} decoded as {what}: {error_line(error)}; repair or remove {files}")


def decode_image(
    path: Path,
    size: tuple[int, int] | None,
    channels: Channels,
    black_to_white: Range | None = None,
    decoder: Decoder = "pil",
    window: Window | None = None,
) -> np.ndarray:
    """Return an image as (channels, height, width) uint8, upright, resized to `size` (height, width) if given.

    With `window` only that part of it. The array may be read-only, with channels last in memory. Values of more than 8
    bits are scaled from `black_to_white`, by default from 0..65535 for 16 bits. The `decoder` torchvision reads JPEG
    files with its `decode_jpeg`, and Pillow all others. Raises UserError for 32-bit integers and floats without a
    range, and for values outside the range.
    """
    jpeg = _jpeg(path) if decoder == "torchvision" else None
    if jpeg is not None and channels == "rgb" and size in (None, jpeg.shape[1:]):
        if window is None:
            return jpeg
        top, left, bottom, right = window(*jpeg.shape[1:])
        return jpeg[:, top:bottom, left:right]
    if jpeg is not None:
        return pixels_of(Image.fromarray(jpeg.transpose(1, 2, 0)), size, channels, window=window)
    with Image.open(path) as image:
        return pixels_of(image, size, channels, black_to_white, path, window)


def pixels_of(
    image: Image.Image,
    size: tuple[int, int] | None,
    channels: Channels,
    black_to_white: Range | None = None,
    path: Path = Path(),
    window: Window | None = None,
) -> np.ndarray:
    """Return the pixels of an image, which may be changed, as `decode_image` does; `path` is for its errors."""
    ImageOps.exif_transpose(image, in_place=True)  # otherwise it would copy an image that is upright
    # Pillow clips such values to 0..255 or truncates them instead of scaling
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        image = Image.fromarray(_bytes(np.asarray(image), black_to_white or _SIXTEEN_BITS, path))
    elif image.mode in ("I", "F"):
        if black_to_white is None:
            kind = "32-bit integers" if image.mode == "I" else "32-bit floats"
            least, most = image.getextrema()
            raise UserError(
                f"{path}: mode {image.mode} holds {kind}, here from {least:g} to {most:g}, with unknown black and "
                "white; set data.range, such as [0, 1] or [0, 65535], or save the images with 8 or 16 bits"
            )
        image = Image.fromarray(_bytes(np.asarray(image), black_to_white, path))
    elif image.mode == "La":
        image = image.convert("LA")
    elif image.mode == "LAB":
        image = image.convert("RGB")
    mode = "RGB" if channels == "rgb" else "L"
    if image.mode != mode:  # an image of the same mode would be copied
        image = image.convert(mode)
    if size is not None and image.size != (size[1], size[0]):
        image = image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    if window is not None:
        top, left, bottom, right = window(image.height, image.width)
        image = image.crop((left, top, right, bottom))  # less to copy than of the array
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


_JPEG = b"\xff\xd8\xff"


@functools.cache
def _jpeg_decoder() -> Callable[[bytearray], torch.Tensor]:
    """Return torchvision's, without its function in Python, which warns and logs at each image."""
    with without_compiler():
        from torchvision.io import ImageReadMode
    decode, mode = torch.ops.image.decode_jpeg.default, ImageReadMode.RGB.value
    return lambda encoded: decode(torch.frombuffer(encoded, dtype=torch.uint8), mode, apply_exif_orientation=True)


def _jpeg(path: Path) -> np.ndarray | None:
    """Return a JPEG file, decoded by torchvision, as (3, height, width), with channels last in memory; None for other
    files, and broken ones.
    """
    with open(path, "rb") as file:
        encoded = bytearray(os.fstat(file.fileno()).st_size)
        file.readinto(encoded)
    if not encoded.startswith(_JPEG):
        return None
    try:
        return _jpeg_decoder()(encoded).numpy()
    except RuntimeError:
        return None  # Pillow reads some that lack their end, and describes what is wrong with the others


def _bytes(numbers: np.ndarray, black_to_white: Range, where: Path) -> np.ndarray:
    """Return numbers from black to white in 256 equal steps, uint8; raises UserError for numbers outside."""
    black, white = black_to_white
    least, most = numbers.min(), numbers.max()
    if not (black <= least and most <= white):  # also for NaN
        raise UserError(
            f"{where} holds numbers from {least:g} to {most:g}, expected {black:g} to {white:g}; set data.range to "
            "that of all images, or repair the file"
        )
    if black_to_white == _SIXTEEN_BITS and numbers.dtype.kind in "iu":
        return (numbers >> 8).astype(np.uint8)
    return np.minimum((numbers.astype(np.float64) - black) * (256 / (white - black)), 255).astype(np.uint8)


def image_reader(
    size: tuple[int, int] | None, channels: Channels, black_to_white: Range | None = None, decoder: Decoder = "pil"
) -> Any:
    """Return a function that reads inputs for prediction: an image, a folder of images, or a .npy of pixels.

    The pixels of a .npy are scaled from `black_to_white` if given; otherwise they are integers from 0 to 255.
    """

    def read(path: Path) -> Source:
        if path.suffix != ".npy":
            root = path if path.is_dir() else None
            return ImageFiles(image_paths(path), None, size, channels, black_to_white, root, decoder)
        pixels = pixels_from_npy(path, size, channels, _BYTES if black_to_white is None else (-math.inf, math.inf))
        if pixels.dtype != torch.uint8 and black_to_white is not None:
            return TensorSource(torch.from_numpy(_bytes(pixels.numpy(), black_to_white, path)), None)
        if pixels.is_floating_point() and (pixels.max() <= 1 or bool((pixels != pixels.floor()).any())):
            raise UserError(
                f"{path} holds {pixels.dtype} from {pixels.min():g} to {pixels.max():g}, expected integers from 0 to "
                "255; scale them and save them as uint8, or give image_folder a data.range"
            )
        return TensorSource(pixels.to(torch.uint8), None)

    return read


def pixels_from_npy(
    path: Path, size: tuple[int, int] | None, channels: Channels, bounds: tuple[float, float]
) -> torch.Tensor:
    """Return the pixels of a .npy as (n, channels, height, width), of one image or of many, with values in `bounds`."""
    try:
        pixels = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a .npy file: {error}") from error
    depth = 3 if channels == "rgb" else 1
    shape = pixels.shape
    if pixels.ndim == 2 and depth == 1:
        pixels = pixels[None, None]
    elif pixels.ndim == 3:
        pixels = pixels[:, None] if depth == 1 else pixels[None]
    if pixels.ndim == 4 and pixels.shape[1] != depth and pixels.shape[-1] == depth:
        pixels = pixels.transpose(0, 3, 1, 2)
    expected = f"(n, {depth}, " + (f"{size[0]}, {size[1]})" if size else "height, width)")
    if pixels.ndim != 4 or pixels.shape[1] != depth or (size is not None and pixels.shape[2:] != size):
        raise UserError(f"{path} holds an array of shape {shape}; expected {expected}")
    if not (np.issubdtype(pixels.dtype, np.number) and pixels.min() >= bounds[0] and pixels.max() <= bounds[1]):
        raise UserError(f"{path}: expected pixels from {bounds[0]} to {bounds[1]}, found others ({pixels.dtype})")
    return torch.from_numpy(np.ascontiguousarray(pixels))


# --------------------------------------------------------------------------------------------------------------------
# Folders


@datasets.register("image_folder", tasks=("classification",))
def image_folder(
    request: DataRequest,
    size: int | list[int] | None = None,
    channels: Channels = "rgb",
    range: list[int | float] | None = None,
    decoder: Decoder = "pil",
    labels: str | None = None,
    file_column: str | None = None,
    label_column: str | None = None,
) -> Data:
    """Images in one folder for each class, or listed with their labels in a CSV; read on demand.

    `data.path` holds the class folders, cut by `data.split` (by default [0.8, 0.2]); or it holds such a folder for each
    split, named in `data.split` as {train: ..., test: ...}, or called train, val or valid, and test; or a table of
    files and labels beside the images: see `distrain.datasets.image_layouts`. `labels` says which where that is not
    clear, as the table's name or `folders`; `file_column` and `label_column` are columns of it. Classes are numbered by
    the sorted names of the training split. `size`, a number or [height, width], resizes each image;
    `channels` is rgb or gray. `range` is [black, white] for images of more than 8 bits; by default 16-bit images have 0
    to 65535, and others are refused. `decoder` torchvision reads JPEG files with its `decode_jpeg`, which is faster:
    where both have libjpeg-turbo, pixels are those of pil. Inputs are uint8 until a transform changes them, and finally
    float32 in [0, 1].
    """
    if decoder == "torchvision":
        _check_jpeg()
    if range is not None and (len(range) != 2 or not all(map(math.isfinite, range)) or range[0] >= range[1]):
        raise UserError(f"data.range: found {range}, expected the numbers of black and of white, such as [0, 65535]")
    black_to_white = None if range is None else (range[0], range[1])
    shape = height_and_width(size)
    reader = image_reader(shape, channels, black_to_white, decoder)
    if request.inputs_only and request.state is not None:
        known = tuple(request.state["class_names"])
        return Data({}, DataMeta(num_classes=len(known), class_names=known), request.state, reader)
    root = request.path(CLASS_FOLDERS)
    if not root.is_dir():
        raise UserError(f"data.path: {root} is a file, expected {CLASS_FOLDERS}")
    layout = find_layout(root, request.section.split, labels, file_column, label_column)
    listings = {split: read() for split, read in layout.splits.items()}
    names = list((request.state or {"class_names": class_names(listings["train"], layout, root)})["class_names"])
    numbers = {split: class_numbers(listing, names) for split, listing in listings.items()}
    splits: dict[str, AnySource] = {}
    if set(listings) == {"train"}:
        listing, targets = listings["train"], numbers["train"]
        for split, indices in split_indices(len(targets), request.section, request.seed, targets).items():
            chosen = [listing.paths[index] for index in indices]
            splits[split] = ImageFiles(chosen, targets[indices], shape, channels, black_to_white, listing.root, decoder)
    else:
        for split, listing in listings.items():
            splits[split] = ImageFiles(
                listing.paths, numbers[split], shape, channels, black_to_white, listing.root, decoder
            )
    counts = ", ".join(f"{len(listing.paths):,}" for listing in listings.values())
    logger.info(f"image_folder: {layout.about}; {counts} images of {len(names)} classes")
    meta = DataMeta(num_classes=len(names), class_names=tuple(names))
    read = [*layout.tables, *(path for listing in listings.values() for path in listing.paths)]
    warnings = _several_frames([path for listing in listings.values() for path in listing.paths])
    return Data(splits, meta, {"class_names": names}, reader, read, warnings)


def height_and_width(size: int | list[int] | None) -> tuple[int, int] | None:
    """Return what `data.size` says; raises UserError."""
    if size is None:
        return None
    sides = [size] if isinstance(size, int) else size
    if len(sides) not in (1, 2) or min(sides) < 1:
        raise UserError(f"data.size: found {size}, expected a number or [height, width], at least 1")
    return sides[0], sides[-1]


def _several_frames(paths: Sequence[Path]) -> tuple[str, ...]:
    """Return a warning where files that may have several frames or pages have them; looks at a few of them."""
    suspects = [path for path in paths if path.suffix.lower() in _FRAMED]
    for path in suspects[:: max(1, len(suspects) // 16)]:
        with suppress(Exception), Image.open(path) as image:  # corrupt files are told when they are read
            if (count := getattr(image, "n_frames", 1)) > 1:
                return (f"{path} has {count} frames or pages; of such files only the first is read",)
    return ()


def _check_jpeg() -> None:
    """Raise UserError where torchvision cannot decode JPEG files."""
    encoded = io.BytesIO()
    Image.new("RGB", (8, 8)).save(encoded, "JPEG")
    try:
        _jpeg_decoder()(bytearray(encoded.getvalue()))
    except (ImportError, RuntimeError, AttributeError) as error:
        raise UserError(
            f"data.decoder is torchvision, and the one installed cannot decode JPEG: {error_line(error)}; install a "
            "torchvision that is built with libjpeg-turbo, or use decoder: pil"
        ) from error


# --------------------------------------------------------------------------------------------------------------------
# Well-known sets, in memory


@datasets.register("cifar10", tasks=("classification",))
def cifar10(request: DataRequest) -> Data:
    """CIFAR-10: 60 000 colour images of 32 × 32 in 10 classes, from its `cifar-10-batches-py` folder.

    Nothing is downloaded. The files are pickles, which can run code: torchvision compares the MD5 of each with the
    published one first. Fractions or a fold in `data.split` cut the training images into train and valid; the test
    images stay as they are.
    """
    return _torchvision_set(request, "CIFAR10", "cifar-10-batches-py", ["data_batch_1", "test_batch", "batches.meta"])


@datasets.register("cifar100", tasks=("classification",))
def cifar100(request: DataRequest) -> Data:
    """CIFAR-100: 60 000 colour images of 32 × 32 in 100 classes, from its `cifar-100-python` folder.

    As with `cifar10`, the files are pickles, read only if their MD5 is the published one.
    """
    return _torchvision_set(request, "CIFAR100", "cifar-100-python", ["train", "test", "meta"])


_IDX_FILES = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]


@datasets.register("mnist", tasks=("classification",))
def mnist(request: DataRequest) -> Data:
    """MNIST: 70 000 grey images of 28 × 28 of handwritten digits, from its `MNIST/raw` folder."""
    return _torchvision_set(request, "MNIST", "MNIST/raw", _IDX_FILES)


@datasets.register("fashion_mnist", tasks=("classification",))
def fashion_mnist(request: DataRequest) -> Data:
    """Fashion-MNIST: 70 000 grey images of 28 × 28 of clothes in 10 classes, from its `FashionMNIST/raw` folder."""
    return _torchvision_set(request, "FashionMNIST", "FashionMNIST/raw", _IDX_FILES)


def _torchvision_set(request: DataRequest, kind: str, folder: str, files: list[str]) -> Data:
    with without_compiler():
        from torchvision import datasets

    root = request.path(f"the folder that holds {folder}, with {', '.join(files)} in it")
    # the inner folder itself is accepted too
    if not (root / folder).exists() and root.resolve().match(folder):
        root = root.resolve().parents[len(Path(folder).parts) - 1]
    if missing := [str(root / folder / name) for name in files if not (root / folder / name).is_file()]:
        raise UserError(
            f"data.path: {request.section.name} is incomplete in {root}: there is no {', '.join(missing)}; unpack the "
            "published archive there (nothing is downloaded)"
        )
    try:
        train, test = (getattr(datasets, kind)(root, train=part, download=False) for part in (True, False))
    except Exception as error:
        raise UserError(f"data.path: {root / folder} cannot be read: {error_line(error)}") from error
    images = _in_memory(train)
    splits: dict[str, AnySource] = {"train": images}
    if request.section.split is not None:
        cut = split_indices(len(images), request.section, request.seed, np.asarray(train.targets))
        if set(cut) != {"train", "test"}:
            raise UserError(
                f"data.split: {request.section.name} has its own test images; give [train, valid] fractions"
            )
        splits = {"train": images.select(cut["train"]), "valid": images.select(cut["test"])}
    splits["test"] = _in_memory(test)
    assert isinstance(images.inputs, torch.Tensor)
    depth, height, width = images.inputs.shape[1:]
    names = tuple(map(str, train.classes))
    meta = DataMeta(input_shape=(depth, height, width), num_classes=len(names), class_names=names)
    reader = image_reader((height, width), "rgb" if depth == 3 else "gray")
    return Data(splits, meta, {}, reader, [root / folder / name for name in files])


def _in_memory(dataset: Any) -> TensorSource:
    pixels = torch.as_tensor(dataset.data)
    pixels = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
    return TensorSource(pixels.contiguous(), torch.as_tensor(dataset.targets, dtype=torch.int64))
