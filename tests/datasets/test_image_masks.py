"""Images with masks: pairs by name, their splits, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from distrain.config import DataSection, UserError
from distrain.datasets.base import Data, DataRequest, keys_of
from distrain.datasets.labels import Labels
from distrain.datasets.user import named_data


def _pair(folder: Path, name: str, mode: str = "L", size: tuple[int, int] = (4, 6), top: int = 2) -> np.ndarray:
    """Write an image and its mask, of classes 0 to `top`; return the mask."""
    generator = np.random.default_rng(sum(map(ord, name)))
    mask = generator.integers(0, top + 1, size, dtype=np.uint8)
    for kind in ("images", "masks"):
        (folder / kind / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.stack([mask * 50] * 3, 2)).save(folder / "images" / f"{name}.jpg", quality=95)
    picture = Image.fromarray(mask)
    if mode == "P":
        picture.putpalette([*range(0, 250, 5)])
    picture.convert(mode).save(folder / "masks" / f"{name}.png")
    return mask


def _build(folder: Path, ignored: int | None = None, **section: Any) -> Data:
    made = DataSection.model_validate({"name": "image_masks", "path": str(folder), "classes": 3, **section})

    def labels(split: str, known: int | None) -> Labels:
        return Labels(classes=known, ignored=ignored, integer=True)

    return named_data(DataRequest(made, "segmentation", 0, labels=labels))


@pytest.mark.parametrize("mode", ["L", "P", "I;16"])
def test_a_mask_is_found_by_the_name_of_its_image(tmp_path: Path, mode: str) -> None:
    if mode == "I;16":
        masks = {name: _pair(tmp_path, name) for name in ("a", "b", "deep/c")}
        for name, mask in masks.items():
            Image.fromarray(mask.astype(np.uint16)).save(tmp_path / "masks" / f"{name}.png")
    else:
        masks = {name: _pair(tmp_path, name, mode) for name in ("a", "b", "deep/c")}
    data = _build(tmp_path, split=[0.67, 0.33], classes=["sky", "sea", "land"])
    assert (data.meta.num_classes, data.meta.class_names) == (3, ("sky", "sea", "land"))
    seen = {}
    for source in data.splits.values():
        ids = np.arange(len(source))
        batch = source.fetch(ids)  # type: ignore[union-attr]
        assert batch["inputs"].shape == (len(ids), 3, 4, 6)
        assert batch["targets"].dtype == torch.int64
        files = keys_of(source, ids)["file"]
        seen |= {name.removesuffix(".jpg"): mask.numpy() for name, mask in zip(files, batch["targets"], strict=True)}
    assert seen.keys() == masks.keys()
    assert all(np.array_equal(seen[name], mask) for name, mask in masks.items())


@pytest.mark.parametrize("named", [False, True])
def test_a_split_is_a_folder(tmp_path: Path, named: bool) -> None:
    for split, names in {"train": "abc", "val": "de"}.items():
        for name in names:
            _pair(tmp_path / split, name)
    data = _build(tmp_path, **({"split": {"train": "train", "valid": "val"}} if named else {}))
    assert {split: len(source) for split, source in data.splits.items()} == {"train": 3, "valid": 2}  # type: ignore[arg-type]


def test_sizes_differ_or_are_given(tmp_path: Path) -> None:
    _pair(tmp_path, "a", size=(4, 6))
    large = _pair(tmp_path, "b", size=(8, 12))
    ids = np.arange(2)
    batch = _build(tmp_path, split=[1.0]).splits["train"].fetch(ids)  # type: ignore[union-attr]
    assert [tuple(mask.shape) for mask in batch["targets"]] == [(4, 6), (8, 12)]
    batch = _build(tmp_path, split=[1.0], size=[4, 6]).splits["train"].fetch(ids)  # type: ignore[union-attr]
    assert batch["inputs"].shape == (2, 3, 4, 6)
    nearest = Image.fromarray(large).resize((6, 4), Image.Resampling.NEAREST)
    assert np.array_equal(batch["targets"][1].numpy(), np.asarray(nearest))


def test_a_mask_is_turned_as_its_file_says_like_its_image(tmp_path: Path) -> None:
    mask = _pair(tmp_path, "a", size=(6, 6))
    turned = Image.Exif()
    turned[0x0112] = 6  # to be shown a quarter turn clockwise
    Image.fromarray(np.stack([mask * 50] * 3, 2)).save(tmp_path / "images" / "a.png", exif=turned)
    (tmp_path / "images" / "a.jpg").unlink()
    Image.fromarray(mask).save(tmp_path / "masks" / "a.png", exif=turned)
    batch = _build(tmp_path, split=[1.0]).splits["train"].fetch(np.arange(1))  # type: ignore[union-attr]
    assert np.array_equal(batch["inputs"][0, 0] // 50, batch["targets"][0])
    assert np.array_equal(batch["targets"][0], np.rot90(mask, -1))


def test_pixels_of_no_class_are_those_that_the_loss_ignores(tmp_path: Path) -> None:
    mask = _pair(tmp_path, "a")
    mask[0] = 255
    Image.fromarray(mask).save(tmp_path / "masks" / "a.png")
    batch = _build(tmp_path, 255, split=[1.0]).splits["train"].fetch(np.arange(1))  # type: ignore[union-attr]
    assert np.array_equal(batch["targets"][0].numpy(), mask)
    with pytest.raises(UserError, match=r"a target is 255, expected 0 to 2; .* set loss\.ignore_index"):
        _build(tmp_path, split=[1.0]).splits["train"].fetch(np.arange(1))  # type: ignore[union-attr]


def _without_mask(folder: Path) -> None:
    (folder / "masks" / "b.png").unlink()


def _without_image(folder: Path) -> None:
    (folder / "images" / "b.jpg").unlink()


def _twice(folder: Path) -> None:
    Image.new("RGB", (6, 4)).save(folder / "images" / "a.png")


def _coloured(folder: Path) -> None:
    Image.new("RGB", (6, 4)).save(folder / "masks" / "b.png")


def _of_another_size(folder: Path) -> None:
    Image.new("L", (5, 4)).save(folder / "masks" / "b.png")


def _whole_and_cut(folder: Path) -> None:
    _pair(folder / "train", "c")


@pytest.mark.parametrize(
    ("spoil", "section", "message"),
    [
        (_without_mask, {}, r"b\.jpg has no mask of its name"),
        (_without_image, {}, r"b\.png has no image of its name"),
        (_twice, {}, r"a\.jpg and .*a\.png have one name"),
        (_coloured, {}, r"b\.png is a picture of mode RGB; expected a PNG whose pixels are the numbers of classes"),
        (_of_another_size, {}, r"b\.jpg has 4 × 6 pixels and its mask .* has 4 × 5"),
        (_whole_and_cut, {}, r"holds both, which leaves open what is meant"),
        (None, {"classes": 1}, r"data\.classes: found 1"),
        (None, {"classes": ["a", "a"]}, r"data\.classes: found \['a', 'a'\]"),
        (None, {"classes": 2}, r"a target is 2, expected 0 to 1"),
        (None, {"size": [0, 3]}, r"data\.size: found \[0, 3\]"),
        (None, {"split": {"train": "nowhere"}}, r"nowhere has no folder images"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, spoil: Any, section: dict[str, Any], message: str) -> None:
    for name in "ab":
        _pair(tmp_path, name)
    if spoil is not None:
        spoil(tmp_path)
    with pytest.raises(UserError, match=message):
        _build(tmp_path, **{"split": [1.0], **section}).splits["train"].fetch(np.arange(2))  # type: ignore[union-attr]
