"""A class for each pixel and for each token: learned, the same in any world, and written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from runs import assert_close, cli, rows, train, write_recipe

SQUARES = """
name: squares
task: segmentation
data:
  name: image_masks
  path: {path}
  classes: [ground, square]
  split: [0.75, 0.25]
  transforms:
    train: [{{name: RandomHorizontalFlip}}, {{name: RandomCrop, size: [16, 16], padding: 2}}]
model: {{name: "own_places:UNet"}}
loss: {{name: cross_entropy, ignore_index: 255}}
optim: {{lr: 2.0e-2}}
batch: {{global: 12}}
train: {{epochs: 15, precision: fp64}}
eval: {{every: null, metrics: [mean_iou, pixel_accuracy, dice, iou_per_class, f1_macro]}}
checkpoint: {{async: false}}
"""


def _squares(folder: Path, count: int = 48) -> Path:
    """Write images of 16 x 16 with a square, which is brighter than the noise around it, at the right end of a line."""
    generator = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for number in range(count):
        top, left = generator.integers(0, 10, 2)
        mask = np.zeros((16, 16), np.uint8)
        mask[top : top + 6, left : left + 6] = 1
        noise = generator.integers(0, 120, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(noise + mask[..., None] * 90).save(folder / "images" / f"{number:02}.png")
        mask[:, 0] = 255
        Image.fromarray(mask).save(folder / "masks" / f"{number:02}.png")
    return folder


def _scores(run: Path) -> dict[str, Any]:
    """Return the last evaluation of a run."""
    return [row for row in rows(run) if row["event"] == "eval"][-1]


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a recipe of squares, and its run in one process."""
    folder = tmp_path_factory.mktemp("squares")
    recipe = write_recipe(folder, SQUARES.format(path=_squares(folder / "data")))
    train(1, recipe, folder / "alone")
    return recipe, folder / "alone"


def test_squares_are_found(squares: tuple[Path, Path]) -> None:
    found = _scores(squares[1])
    assert found["mean_iou"] > 0.85
    assert found["pixel_accuracy"] > 0.95
    assert found["dice"] == pytest.approx(found["f1_macro"])
    assert found["mean_iou"] == pytest.approx(np.mean(found["iou_per_class"]))


def test_pixels_are_the_same_in_two_processes(squares: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, alone = squares
    train(2, recipe, tmp_path / "two", "batch.micro=2")
    assert_close(alone, tmp_path / "two", 1e-9)
    one, two = _scores(alone), _scores(tmp_path / "two")
    for name in ("loss", "mean_iou", "pixel_accuracy", "iou_per_class"):
        assert two[name] == pytest.approx(one[name], rel=1e-9), name


def test_a_map_of_classes_is_written_for_each_image(squares: tuple[Path, Path], tmp_path: Path) -> None:
    data = squares[0].parent / "data"
    assert cli("predict", str(squares[1]), str(data / "images"), "-o", f"{tmp_path / 'maps'}/").status == 0
    maps = sorted((tmp_path / "maps").rglob("*.png"))
    assert len(maps) == 48
    right = pixels = 0
    for path, truth in zip(maps, sorted((data / "masks").iterdir()), strict=True):
        mask = np.asarray(Image.open(truth))
        right += ((np.asarray(Image.open(path)) == mask) & (mask != 255)).sum()
        pixels += (mask != 255).sum()
    assert right / pixels > 0.95


TAGS = """
name: tags
task: token_classification
data: {name: "own_places:Sentences", split: [0.75, 0.25]}
model: {name: "own_places:Tagger"}
optim: {lr: 2.0e-2}
batch: {global: 12}
train: {epochs: 15, precision: fp64}
eval: {every: null, batch: 5}
checkpoint: {async: false}
"""


def test_tokens_are_classified_alike_in_any_world(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, TAGS)
    train(1, recipe, tmp_path / "one")
    train(2, recipe, tmp_path / "two", "batch.micro=2")
    assert_close(tmp_path / "one", tmp_path / "two", 1e-9)
    one, two = _scores(tmp_path / "one"), _scores(tmp_path / "two")
    assert one["token_accuracy"] > 0.9
    for name in ("loss", "token_accuracy", "f1_macro"):
        assert two[name] == pytest.approx(one[name], rel=1e-9), name
    out = tmp_path / "tags.jsonl"
    assert cli("predict", str(tmp_path / "one"), "test", "-o", out).status == 0
    assert len(out.read_text().splitlines()) == one["samples"] == 24
