from __future__ import annotations

import gzip
import hashlib
import pickle
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10

from distrain.config import Component, DataSection, Recipe, TransformsSection, UserError
from distrain.data import build_data, build_transform
from distrain.datasets.base import Batch, Data, DataRequest
from distrain.datasets.batches import Batches
from distrain.datasets.evaluation import build_eval_loader
from distrain.datasets.images import ImageFiles, decode_image, pixels_of
from distrain.datasets.loading import load
from distrain.datasets.transforms import Transform, finished
from distrain.datasets.user import named_data


def build(name: str, path: Path, state: dict | None = None, **keys: Any) -> Data:
    section = DataSection.model_validate({"name": name, "path": str(path), **keys})
    return named_data(DataRequest(section, "classification", 0, state=state))


def picture(path: Path, shade: int, size: tuple[int, int] = (8, 6), **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade, 0, 255 - shade)).save(path, **options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, name in enumerate(("cat", "ant", "bee")):
        for index, suffix in enumerate(("png", "jpg", "webp", "bmp", "png")):
            picture(tmp_path / "all" / name / f"{index}.{suffix}", 40 * number)
    picture(tmp_path / "all" / "bee" / "nested" / "deep.jpeg", 80)
    (tmp_path / "all" / "bee" / "notes.txt").write_text("not an image")
    (tmp_path / "all" / ".cache").mkdir()
    return tmp_path / "all"


def everything(source: Any) -> dict[str, Any]:
    return source.fetch(np.arange(len(source)))


def test_a_folder_of_classes_is_cut(folder: Path) -> None:
    data = build("image_folder", folder, split=[0.75, 0.25], stratify=True)
    assert data.meta.class_names == ("ant", "bee", "cat")
    assert data.state == {"class_names": ["ant", "bee", "cat"]}
    assert {name: len(source) for name, source in data.splits.items()} == {"train": 12, "test": 4}
    for source in data.splits.values():
        batch = everything(source)
        assert batch["inputs"].shape[1:] == (3, 6, 8)
        assert batch["inputs"].dtype == torch.uint8
        shades = (batch["inputs"][:, 0].float().mean((1, 2)) / 40).round().long()
        assert torch.equal(shades, torch.tensor([1, 2, 0])[batch["targets"]])


def test_folders_for_the_splits(tmp_path: Path) -> None:
    for part, count in (("train", 3), ("val", 2), ("test", 1)):
        for name in ("a", "b"):
            for index in range(count):
                picture(tmp_path / part / name / f"{index}.png", 9)
    (tmp_path / "val" / "b").rename(tmp_path / "gone")
    found = build("image_folder", tmp_path)
    assert {name: len(source) for name, source in found.splits.items()} == {"train": 6, "valid": 2, "test": 2}
    named = build("image_folder", tmp_path, split={"train": "test", "test": "train"})
    assert {name: len(source) for name, source in named.splits.items()} == {"train": 2, "test": 6}
    with pytest.raises(UserError, match=r"no folder .*tset for test; did you mean 'test'"):
        build("image_folder", tmp_path, split={"train": "train", "test": "tset"})
    picture(tmp_path / "test" / "bb" / "0.png", 9)
    with pytest.raises(UserError, match=r"has a folder 'bb'.*not a class of the training split: a, b"):
        build("image_folder", tmp_path)


def test_classes_are_those_of_the_training(folder: Path) -> None:
    data = build("image_folder", folder, state={"class_names": ["zebra", "cat", "bee", "ant"]})
    assert data.meta.num_classes == 4
    assert set(everything(data.splits["train"])["targets"].tolist()) <= {1, 2, 3}


def test_sizes_may_differ_until_a_transform(folder: Path) -> None:
    picture(folder / "ant" / "big.png", 40, size=(20, 10))
    recipe = Recipe.model_validate(
        {
            "name": "t",
            "task": "classification",
            "data": {
                "name": "image_folder",
                "path": str(folder),
                "transforms": {
                    "train": [{"name": "RandomResizedCrop", "size": 5}],
                    "eval": [{"name": "Resize", "size": [5, 5]}],
                },
            },
            "model": "m",
            "batch": {"global": 4},
            "train": {"steps": 1},
        }
    )
    data = build_data(recipe)
    assert data.meta.input_shape == (3, 5, 5)
    transform = build_transform(recipe, "eval")
    for workers in (0, 2):
        loader = build_eval_loader(
            data.splits["train"], rank=0, world_size=1, batch_size=32, transform=transform, workers=workers
        )
        [batch] = loader
        assert batch["inputs"].shape == (14, 3, 5, 5)
        assert batch["inputs"].dtype == torch.float32
        assert batch["inputs"].max() <= 1


def test_images_can_be_resized_when_read(folder: Path) -> None:
    picture(folder / "ant" / "big.png", 40, size=(20, 10))
    assert everything(build("image_folder", folder, size=[4, 7]).splits["train"])["inputs"].shape[1:] == (3, 4, 7)
    assert everything(build("image_folder", folder, size=4, channels="gray").splits["train"])["inputs"].shape[1:] == (
        1,
        4,
        4,
    )
    with pytest.raises(UserError, match=r"expected a number or \[height, width\]"):
        build("image_folder", folder, size=[1, 2, 3])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.fault(21)
def test_a_file_that_does_not_decode_is_named(folder: Path, workers: int) -> None:
    source = build("image_folder", folder, split=[0.5, 0.5]).splits["train"]
    broken = source.paths[4]  # type: ignore[union-attr]
    broken.write_bytes(broken.read_bytes()[:40])
    loader = build_eval_loader(source, rank=0, world_size=1, batch_size=2, workers=workers)
    with pytest.raises(
        UserError, match=rf"^sample 4, {broken}, cannot be decoded as an image: .*; repair or remove the file"
    ):
        list(loader)


def test_unusual_images_are_read_as_they_look(tmp_path: Path) -> None:
    deep = np.linspace(0, 65535, 12).reshape(3, 4).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert decode_image(tmp_path / "deep.png", None, "gray")[0].tolist() == (deep >> 8).tolist()
    turned = Image.new("RGB", (8, 4))
    exif = turned.getexif()
    exif[0x0112] = 6  # the camera was held upright
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert decode_image(tmp_path / "turned.jpg", None, "rgb").shape == (3, 8, 4)
    Image.new("RGBA", (3, 3)).save(tmp_path / "clear.png")
    assert decode_image(tmp_path / "clear.png", None, "rgb").shape == (3, 3, 3)
    Image.new("P", (3, 3)).save(tmp_path / "few.gif")
    assert decode_image(tmp_path / "few.gif", (2, 5), "rgb").shape == (3, 2, 5)


@pytest.mark.parametrize("decoder", ["pil", "torchvision"])
@pytest.mark.parametrize("channels", ["gray", "rgb"])
def test_images_that_are_cut_first_are_those_of_whole_batches(tmp_path: Path, decoder: str, channels: str) -> None:
    for number in range(6):
        path = tmp_path / "ab"[number % 2] / f"{number}.{('jpg', 'png')[number % 3 == 0]}"
        path.parent.mkdir(exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    source = build("image_folder", tmp_path, decoder=decoder, channels=channels, split=[0.8, 0.2]).splits["train"]
    epochs, ids = np.arange(5), np.array([3, 0, 4, 1, 2])
    for items in (
        [{"name": "RandomCrop", "size": [7, 5]}, {"name": "RandomHorizontalFlip"}],
        [{"name": "RandomCrop", "size": [7, 5]}, {"name": "RandomVerticalFlip"}],
        # of what comes then, no other layout is known to give the same bits
        [{"name": "RandomCrop", "size": [7, 5]}, {"name": "ColorJitter", "hue": 0.1}, {"name": "Grayscale"}],
        [{"name": "RandomCrop", "size": 12, "padding": 2}],
    ):
        transform = Transform([Component.model_validate(item) for item in items], 0, "data.transforms.train")
        whole = transform(source.fetch(ids), epochs)["inputs"]  # type: ignore[union-attr]
        found = Batches(source, transform).batch((epochs, ids))["inputs"]  # type: ignore[arg-type]
        assert torch.equal(found, whole)
        assert found.is_contiguous()
        transform.leave_bytes()
        left = Batches(source, transform).batch((epochs, ids))  # type: ignore[arg-type]
        assert torch.equal(finished(left)["inputs"], whole)
        last = channels == "rgb" and "padding" not in items[0] and len(items) == 2
        assert left["inputs"].is_contiguous() != last
        assert not last or left["inputs"].is_contiguous(memory_format=torch.channels_last)
        for batch in load(Batches(source, transform), [(epochs, ids)] * 5, 1, False):  # type: ignore[arg-type]
            assert batch["inputs"].stride() == left["inputs"].stride()
            assert torch.equal(finished(batch)["inputs"], whole)


def turned(degrees: int) -> dict[str, Any]:
    exif = Image.Exif()
    exif[0x0112] = degrees
    return {"exif": exif}


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("RGB", {}),
        ("RGB", {"progressive": True}),
        ("RGB", {"subsampling": "4:4:4"}),
        ("RGB", {"subsampling": "4:2:2"}),
        ("L", {}),
        ("CMYK", {}),
        *(("RGB", turned(orientation)) for orientation in range(2, 9)),
    ],
)
@pytest.mark.parametrize("channels", ["gray", "rgb"])
def test_both_decoders_read_a_jpeg_alike(tmp_path: Path, mode: str, options: dict[str, Any], channels: Any) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (21, 35, 3), dtype=np.uint8)
    path = tmp_path / "x.jpg"
    Image.fromarray(pixels).convert(mode).save(path, **options)
    for size in (None, (9, 12)):
        ours, theirs = (decode_image(path, size, channels, decoder=each) for each in ("torchvision", "pil"))
        assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("decoder", ["pil", "torchvision"])
def test_a_decoder_reads_a_folder_of_every_format(folder: Path, decoder: str) -> None:
    data = build("image_folder", folder, decoder=decoder)
    wanted = everything(build("image_folder", folder).splits["train"])
    assert torch.equal(everything(data.splits["train"])["inputs"], wanted["inputs"])
    assert data.read is not None
    source = data.read(folder / "cat")
    assert torch.equal(everything(source)["inputs"][:, 0].float().mean((1, 2)).round(), torch.zeros(5))
    broken = folder / "cat" / "1.jpg"
    broken.write_bytes(broken.read_bytes()[:300])
    with pytest.raises(UserError, match=rf"^sample 1, {broken}, cannot be decoded as an image: .*; repair or remove"):
        everything(source)
    broken.unlink()
    with pytest.raises(UserError, match=rf"^sample 1, {broken}, cannot be read: .*No such file"):
        everything(source)


@pytest.mark.parametrize("suffix", ["gif", "tif", "png"])
def test_files_of_several_frames_are_warned_of(tmp_path: Path, suffix: str) -> None:
    for name, shade in (("a", 0), ("b", 255)):
        (tmp_path / name).mkdir()
        frames = [Image.new("L", (8, 6), each) for each in (shade, 128, 255 - shade)]
        frames[0].save(tmp_path / name / f"1.{suffix}", save_all=True, append_images=frames[1:])
        frames[0].save(tmp_path / name / f"2.{suffix}")
    data = build("image_folder", tmp_path, split=[1.0])
    assert data.warnings == (
        f"{tmp_path / 'a'}/1.{suffix} has 3 frames or pages; of such files only the first is read",
    )
    batch = everything(data.splits["train"])
    assert (batch["inputs"].float().mean((1, 2, 3)) / 255).round().tolist() == batch["targets"].tolist()


def modes(path: Path) -> dict[str, tuple[Image.Image, str]]:
    """Return one picture of three shades in every mode that Pillow opens, with the ending of a file that keeps it."""
    grey = Image.fromarray(np.array([[0, 120, 255]], np.uint8))
    deep = np.array([[0, 120 * 257, 65535]], np.uint16)
    clear = grey.convert("P")
    clear.info["transparency"] = 0
    lab = Image.merge("LAB", [grey, *[Image.new("L", grey.size, 128)] * 2])
    return {
        "1": (grey.point(lambda shade: 255 * (shade > 100)).convert("1"), "png"),
        **{mode: (grey.convert(mode), "png") for mode in ("L", "LA", "P", "RGB", "RGBA")},
        "P, transparent": (clear, "png"),
        **{mode: (grey.convert("RGB").convert(mode), "tif") for mode in ("CMYK", "YCbCr")},
        "LAB": (lab, "tif"),
        "I;16": (Image.fromarray(deep), "png"),
        "I;16 in TIFF": (Image.fromarray(deep), "tif"),
        "I;16B": (Image.frombytes("I;16B", (3, 1), deep.astype(">u2").tobytes()), "tif"),
        "I in PGM": (Image.fromarray(deep), "pgm"),
    }


@pytest.mark.parametrize("mode", modes(Path()))
@pytest.mark.parametrize("channels", ["gray", "rgb"])
def test_every_mode_is_read_as_it_looks(tmp_path: Path, mode: str, channels: Any) -> None:
    image, ending = modes(tmp_path)[mode]
    image.save(tmp_path / f"x.{ending}")
    pixels = decode_image(tmp_path / f"x.{ending}", None, channels)
    wanted = [0, 255, 255] if mode == "1" else [0, 120, 255]
    # the lightness of LAB is no share of the light
    tolerance = {"LAB": 10, "YCbCr": 1}.get(mode, 0)
    for channel in pixels.reshape(len(pixels), -1):
        assert channel.tolist() == pytest.approx(wanted, abs=tolerance)


@pytest.mark.parametrize(
    ("first", "mode"), [("P", "PA"), ("RGB", "HSV"), ("RGB", "RGBX"), ("LA", "La"), ("RGBA", "RGBa")]
)
def test_modes_that_few_files_hold(first: str, mode: str) -> None:
    grey = Image.fromarray(np.array([[0, 120, 255]], np.uint8)).convert(first).convert(mode)
    for channels in ("gray", "rgb"):
        assert pixels_of(grey.copy(), None, channels)[0].flatten().tolist() == pytest.approx([0, 120, 255], abs=2)


@pytest.mark.parametrize(
    ("pixels", "ending", "ends"),
    [
        (np.array([[0, 30000, 65535]], np.int32), "tif", [0, 65535]),
        (np.array([[-100, 0, 100]], np.int32), "tif", [-100, 100]),
        (np.array([[0, 0.25, 1]], np.float32), "tif", [0, 1]),
        (np.array([[0, 0.25, 1]], np.float32), "pfm", [0, 1.5]),
        (np.array([[0, 1000, 4095]], np.uint16), "png", [0, 4095]),
        (np.array([[0, 1000, 4095]], np.uint16), "pgm", [0, 4095]),
    ],
)
def test_numbers_are_scaled_from_the_range_that_is_given(
    tmp_path: Path, pixels: np.ndarray, ending: str, ends: list[float]
) -> None:
    path = tmp_path / f"x.{ending}"
    Image.fromarray(pixels).save(path, "PPM" if ending in ("pfm", "pgm") else None)
    black, white = ends
    shares = (pixels.astype(float) - black) / (white - black)
    found = decode_image(path, None, "gray", (black, white))[0]
    assert found.tolist() == np.minimum(np.floor(256 * shares), 255).tolist()
    outside = (black, (black + white) / 2)
    with pytest.raises(UserError, match=rf"{path} holds numbers from .*, expected .*; set data.range"):
        decode_image(path, None, "gray", outside)


def deep_folder(root: Path, pixels: np.ndarray, ending: str) -> Path:
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
        for number in range(3):
            Image.fromarray(pixels).save(root / name / f"{number}.{ending}")
    return root


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_numbers_whose_range_is_not_known_are_refused(tmp_path: Path, dtype: Any) -> None:
    root = deep_folder(tmp_path / "all", np.array([[0, 1], [0, 1]], dtype), "tif")
    data = build("image_folder", root, channels="gray")
    assert data.read is not None
    for source in (data.splits["train"], data.read(root), data.read(root / "a" / "0.tif")):
        with pytest.raises(UserError, match=r"sample 0, .*\.tif: mode [IF] holds .*from 0 to 1.* data\.range"):
            everything(source)
    data = build("image_folder", root, channels="gray", range=[0, 2])
    assert data.read is not None
    for source in (data.splits["train"], data.read(root)):
        assert everything(source)["inputs"].unique().tolist() == [0, 128]


@pytest.mark.parametrize("given", [[1], [1, 0], [0, float("nan")], [0, 1, 2]])
def test_ranges_that_are_none(tmp_path: Path, given: list[float]) -> None:
    with pytest.raises(UserError, match=r"data\.range: found .* expected the numbers of black and of white"):
        build("image_folder", deep_folder(tmp_path / "all", np.zeros((2, 2), np.uint8), "png"), range=given)


@pytest.mark.parametrize(
    ("pixels", "ends", "wanted"),
    [
        (np.array([[0, 7], [255, 1]], np.uint8), None, [0, 7, 255, 1]),
        (np.array([[0, 7], [255, 1]], np.uint8), [0, 1], [0, 7, 255, 1]),  # bytes are bytes
        (np.array([[0, 7], [255, 1]], np.float64), None, [0, 7, 255, 1]),
        (np.array([[0, 0.5], [1, 0.25]], np.float32), [0, 1], [0, 128, 255, 64]),
        (np.array([[0, 32768], [65535, 1]], np.uint16), [0, 65535], [0, 128, 255, 0]),
        (np.array([[0, 0.5], [1, 0.25]], np.float32), None, "expected integers from 0 to 255"),
        (np.array([[0, 1], [1, 0]], np.float32), None, "expected integers from 0 to 255"),
        (np.array([[0, 1.5], [200, 0]], np.float32), None, "expected integers from 0 to 255"),
        (np.array([[0, np.nan], [200, 0]], np.float32), None, "expected pixels from 0 to 255"),
        (np.array([[0, 2], [1, 0]], np.float32), [0, 1], "holds numbers from 0 to 2, expected 0 to 1"),
    ],
)
def test_arrays_of_pixels_for_prediction(tmp_path: Path, pixels: np.ndarray, ends: Any, wanted: Any) -> None:
    root = deep_folder(tmp_path / "all", np.zeros((2, 2), np.uint8), "png")
    data = build("image_folder", root, channels="gray", **({} if ends is None else {"range": ends}))
    np.save(tmp_path / "x.npy", pixels)
    assert data.read is not None
    if isinstance(wanted, str):
        with pytest.raises(UserError, match=wanted):
            data.read(tmp_path / "x.npy")
        return
    inputs = everything(data.read(tmp_path / "x.npy"))["inputs"]
    assert (inputs.dtype, inputs.flatten().tolist()) == (torch.uint8, wanted)


@pytest.mark.fault(22)
def test_folders_without_classes_or_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is nothing at"):
        build("image_folder", tmp_path / "gone")
    with pytest.raises(UserError, match="holds no folder; expected a folder with one folder of images"):
        build("image_folder", tmp_path)
    picture(tmp_path / "a" / "x.png", 1)
    with pytest.raises(UserError, match="holds only 'a'"):
        build("image_folder", tmp_path)
    (tmp_path / "b").mkdir()
    with pytest.raises(UserError, match=r"b holds no image; expected files ending in .jpg"):
        build("image_folder", tmp_path)


def test_images_for_prediction(folder: Path, tmp_path: Path) -> None:
    data = build("image_folder", folder, size=5)
    assert data.read is not None
    for path, count in ((folder / "cat", 5), (folder, 16), (folder / "cat" / "1.jpg", 1)):
        batch = everything(data.read(path))
        assert batch["inputs"].shape == (count, 3, 5, 5)
        assert "targets" not in batch
    np.save(tmp_path / "some.npy", np.zeros((2, 5, 5, 3), np.uint8))
    assert everything(data.read(tmp_path / "some.npy"))["inputs"].shape == (2, 3, 5, 5)
    with pytest.raises(UserError, match="there is nothing at"):
        data.read(tmp_path / "gone.png")


# ---------------------------------------------------------------------------------------------------------------------
# Well-known sets, in files made here in their formats


def write_idx(path: Path, values: np.ndarray) -> None:
    header = struct.pack(">HBB", 0, 8, values.ndim) + struct.pack(f">{values.ndim}I", *values.shape)
    path.write_bytes(header + values.astype(np.uint8).tobytes())


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_mnist_is_read_from_its_files(tmp_path: Path, name: str, folder: str) -> None:
    raw = tmp_path / folder / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 20), ("t10k", 7)):
        write_idx(raw / f"{part}-images-idx3-ubyte", np.arange(count * 784).reshape(count, 28, 28) % 251)
        write_idx(raw / f"{part}-labels-idx1-ubyte", np.arange(count) % 10)
    data = build(name, tmp_path)
    assert {split: len(source) for split, source in data.splits.items()} == {"train": 20, "test": 7}
    batch = everything(data.splits["train"])
    assert batch["inputs"].shape == (20, 1, 28, 28)
    assert batch["inputs"].dtype == torch.uint8
    assert batch["inputs"].flatten().tolist() == (np.arange(20 * 784) % 251).tolist()
    assert batch["targets"].tolist() == [*range(10), *range(10)]
    assert data.meta.num_classes == 10
    assert build(name, raw).meta == data.meta
    cut = build(name, tmp_path, split=[0.8, 0.2])
    assert {split: len(source) for split, source in cut.splits.items()} == {"train": 16, "valid": 4, "test": 7}
    with pytest.raises(UserError, match=r"has its own test images; give \[train, valid\]"):
        build(name, tmp_path, split=[0.6, 0.2, 0.2])
    (raw / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(UserError, match=r"incomplete.*there is no .*t10k-labels-idx1-ubyte; unpack"):
        build(name, tmp_path)


def test_cifar_is_read_from_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "cifar-10-batches-py"
    root.mkdir()

    def write(name: str, entry: dict) -> list[str]:
        content = pickle.dumps(entry)
        (root / name).write_bytes(content)
        return [name, hashlib.md5(content).hexdigest()]

    def images(start: int) -> dict:
        values = (np.arange(4 * 3072) + start) % 256
        return {"data": values.reshape(4, 3072).astype(np.uint8), "labels": [0, 1, 2, 3]}

    train = [write(f"data_batch_{index}", images(index)) for index in range(1, 6)]
    test = [write("test_batch", images(9))]
    names = write("batches.meta", {"label_names": [f"class{index}" for index in range(10)]})
    # torchvision reads a file only if its MD5 is the published one, which these cannot have
    monkeypatch.setattr(CIFAR10, "train_list", train)
    monkeypatch.setattr(CIFAR10, "test_list", test)
    monkeypatch.setattr(CIFAR10, "meta", {"filename": names[0], "key": "label_names", "md5": names[1]})
    data = build("cifar10", tmp_path)
    assert {split: len(source) for split, source in data.splits.items()} == {"train": 20, "test": 4}
    batch = everything(data.splits["train"])
    assert batch["inputs"].shape == (20, 3, 32, 32)
    assert batch["inputs"][0].flatten().tolist() == images(1)["data"][0].tolist()
    assert data.meta.class_names is not None
    assert data.meta.class_names[3] == "class3"
    (root / "data_batch_3").write_bytes(b"something else")
    with pytest.raises(UserError, match="cannot be read: RuntimeError: Dataset not found or corrupted"):
        build("cifar10", tmp_path)


def test_packed_files_are_not_enough(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    with gzip.open(raw / "train-images-idx3-ubyte.gz", "wb") as file:
        file.write(b"")
    with pytest.raises(UserError, match="unpack the published archive"):
        build("mnist", tmp_path)
    with pytest.raises(UserError, match=r"needs data.path: the folder that holds cifar-100-python, with train, test"):
        named_data(DataRequest(DataSection(name="cifar100"), "classification", 0))


class Around:
    """What a callback may put around the transform: it is called, and no more."""

    def __init__(self, transform: Transform):
        self.transform = transform

    def __call__(self, batch: Batch, epochs: np.ndarray) -> Batch:
        return self.transform(batch, epochs)


class Below(Transform):
    """The same as a subclass that is made otherwise."""

    def __init__(self, transform: Transform):
        self.transform = transform

    def __call__(self, batch: Batch, epochs: np.ndarray) -> Batch:
        return self.transform(batch, epochs)


@pytest.mark.parametrize("wrap", [Around, Below])
def test_images_that_are_cut_first_are_the_same_through_a_transform_of_ones_own(tmp_path: Path, wrap: Any) -> None:
    paths = []
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 256, (12, 14, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        paths.append(tmp_path / f"{number}.png")
    source = ImageFiles(paths, np.arange(6), None, "rgb")
    chosen = TransformsSection.model_validate({"train": [{"name": "RandomCrop", "size": 8}]}).train
    transform = Transform(chosen, 0, "data.transforms.train")
    assert transform.windows is not None
    place = (np.zeros(6, np.int64), np.arange(6))
    plain, wrapped = (Batches(source, each).batch(place)["inputs"] for each in (transform, wrap(transform)))
    assert torch.equal(plain, wrapped)


def test_an_image_is_in_its_batch_before_the_next_is_decoded(tmp_path: Path) -> None:
    count, side = 12, 100
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    source = ImageFiles([tmp_path / f"{number}.png" for number in range(count)], None, None, "rgb")
    ids = np.arange(count)
    source.fetch(ids)  # what Pillow imports
    tracemalloc.start()
    try:
        batch = source.fetch(ids)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert batch["inputs"].shape == (count, 3, side, side)
    assert peak < (count + 5) * 3 * side**2
