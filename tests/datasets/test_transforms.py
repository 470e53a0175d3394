from __future__ import annotations

import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from distrain.config import TransformsSection, UserError, mix
from distrain.datasets.randomness import isolated_randomness, seed_globally, stream_of
from distrain.datasets.transforms import FINISH, Masks, Transform, finished
from distrain.datasets.transforms.steps import transform_names


def build(*items: Any, seed: int = 0) -> Transform:
    return Transform(TransformsSection.model_validate({"train": list(items)}).train, seed, "data.transforms.train")


def batch_of(images: Any, ids: Any = None) -> dict[str, Any]:
    return {"inputs": images, "ids": torch.arange(len(images)) if ids is None else torch.as_tensor(ids)}


def apply(transform: Transform, images: Any, ids: Any = None, epoch: int = 0) -> torch.Tensor:
    images = images.clone() if isinstance(images, torch.Tensor) else list(images)
    return transform(batch_of(images, ids), np.full(len(images), epoch))["inputs"]


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(0, 256, (12, 3, 10, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_numbers_are_double_where_the_run_is() -> None:
    items = [
        {"name": "ToDtype", "dtype": "float32", "scale": True},
        {"name": "RandomApply", "p": 1.0, "transforms": [{"name": "Normalize", "mean": [0.485], "std": [0.229]}]},
        {"name": "Normalize", "mean": [0.1], "std": [0.7]},
    ]
    section = TransformsSection.model_validate({"train": items}).train
    pixels = torch.arange(256, dtype=torch.uint8).reshape(4, 1, 8, 8)
    wanted = ((pixels.double() / 255 - 0.485) / 0.229 - 0.1) / 0.7
    for chosen, expected in ((section, wanted), ([], pixels.double() / 255)):
        for dtype, near in ((torch.float64, 1e-14), (torch.float32, 1e-5)):
            transform = Transform(chosen, 0, "data.transforms.train", dtype)
            batch = {"inputs": pixels.clone(), "ids": torch.arange(4)}
            found = transform(batch, np.zeros(4, np.int64))["inputs"]
            assert found.dtype == dtype
            torch.testing.assert_close(found.double(), expected, rtol=0, atol=near)


def test_uint8_images_become_floats_in_the_end(images: torch.Tensor) -> None:
    assert torch.equal(apply(build(), images), v2.functional.to_dtype(images, torch.float32, scale=True))
    assert torch.allclose(apply(build(), images), images.float() / 255)
    tokens = torch.zeros(4, 7, dtype=torch.uint8)
    assert apply(build(), tokens).dtype == torch.uint8


def test_what_treats_all_alike_is_torchvision_s(images: torch.Tensor) -> None:
    items = [
        {"name": "Resize", "size": [12, 12], "interpolation": "bicubic"},
        {"name": "CenterCrop", "size": 10},
        {"name": "Grayscale", "num_output_channels": 3},
        {"name": "ToDtype", "dtype": "float32", "scale": True},
        {"name": "Normalize", "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]},
    ]
    expected = v2.Compose(
        [
            v2.Resize([12, 12], interpolation=v2.InterpolationMode.BICUBIC),
            v2.CenterCrop(10),
            v2.Grayscale(3),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.1, 0.2, 0.3], [0.5, 0.6, 0.7]),
        ]
    )(images)
    result = apply(build(*items), images)
    assert torch.equal(result, expected)
    assert type(result) is torch.Tensor


RANDOM = [
    {"name": "RandomCrop", "size": [8, 6], "padding": 2},
    {"name": "RandomHorizontalFlip"},
    {"name": "RandomVerticalFlip", "p": 0.3},
    {"name": "ColorJitter", "brightness": 0.5, "hue": 0.2},
    {"name": "RandomResizedCrop", "size": 8},
    {"name": "RandAugment"},
    {"name": "TrivialAugmentWide"},
    {"name": "AutoAugment", "policy": "cifar10"},
    {"name": "RandomApply", "transforms": [{"name": "GaussianBlur", "kernel_size": 3}], "p": 0.5},
    {"name": "RandomChoice", "transforms": ["RandomHorizontalFlip", "RandomGrayscale"]},
    {"name": "RandomErasing"},
    {"name": "RandomRotation", "degrees": 30},
]


@pytest.mark.parametrize("item", RANDOM, ids=lambda item: item["name"])
def test_a_sample_looks_the_same_in_any_batch(item: dict, images: torch.Tensor) -> None:
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    transform = build(item, seed=5)
    whole = apply(transform, images)
    for ids in ([3], [7, 3], list(range(11, -1, -1))):
        assert torch.equal(apply(transform, images[ids], ids), whole[ids])
    assert torch.equal(apply(transform, list(images)), whole)
    assert not torch.equal(apply(transform, images, epoch=1), whole)
    assert not torch.equal(apply(build(item, seed=6), images), whole)
    # nothing is drawn from the global random state
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]
    assert np.random.get_state()[1].tolist() == state[2]


def test_two_equal_transforms_draw_differently() -> None:
    image = torch.arange(64.0).view(1, 1, 1, 64).expand(200, 1, 1, 64)
    once = apply(build("RandomHorizontalFlip"), image)[:, 0, 0, 0] == 63
    twice = apply(build("RandomHorizontalFlip", "RandomHorizontalFlip"), image)[:, 0, 0, 0] == 63
    assert 60 < once.sum() < 140
    assert 60 < twice.sum() < 140


def test_flips_happen_as_often_as_asked() -> None:
    image = torch.tensor([0.0, 1.0]).view(1, 1, 1, 2).expand(20000, 1, 1, 2)
    for probability in (0.0, 0.25, 1.0):
        flipped = apply(build({"name": "RandomHorizontalFlip", "p": probability}), image)[:, 0, 0, 0].mean()
        assert abs(flipped - probability) < 0.015
    tall = torch.tensor([0.0, 1.0]).view(1, 1, 2, 1).expand(10, 1, 2, 1)
    assert apply(build({"name": "RandomVerticalFlip", "p": 1.0}), tall)[:, 0, 0, 0].sum() == 10


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [8, 16, 5, 12])
def test_batches_are_flipped_and_cut_as_their_images_are(dtype: torch.dtype, width: int) -> None:
    pixels = torch.arange(6 * 3 * 10 * width).remainder(251).view(6, 3, 10, width).to(dtype)
    for step in (
        {"name": "RandomHorizontalFlip", "p": 0.5},
        {"name": "RandomVerticalFlip", "p": 0.5},
        {"name": "RandomCrop", "size": [7, 4]},
        {"name": "RandomCrop", "size": [10, width], "padding": [1, 2]},
        {"name": "RandomCrop", "size": [10, width], "padding": 3, "fill": 1},
    ):
        (built,) = build(step)._steps
        epochs, ids = np.zeros(6, np.int64), np.arange(6)
        found = built(pixels.clone(), epochs, ids)
        assert isinstance(found, torch.Tensor)
        assert found.is_contiguous()
        assert torch.equal(found, torch.stack(built(list(pixels), epochs, ids)))  # type: ignore[arg-type]


@pytest.mark.parametrize("images_in_a_batch", [1, 7])
@pytest.mark.parametrize("side", [3, 200])
def test_bytes_become_the_floats_of_torchvision(images_in_a_batch: int, side: int) -> None:
    pixels = torch.arange(images_in_a_batch * 3 * side * side).remainder(256).to(torch.uint8)
    pixels = pixels.view(images_in_a_batch, 3, side, side)
    mean, std = [0.49, 0.48, 0.45], [0.25, 0.24, 0.26]
    items = [{"name": "ToDtype", "dtype": "float32", "scale": True}, {"name": "Normalize", "mean": mean, "std": std}]
    wanted = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])(pixels)
    assert torch.equal(apply(build(*items), pixels), wanted)
    assert torch.equal(apply(build(items[0]), pixels), v2.functional.to_dtype(pixels, torch.float32, scale=True))
    with pytest.raises(UserError, match="Normalize failed on inputs"):
        apply(build(items[0], items[1] | {"mean": [0.5] * 2, "std": [0.5] * 2}), pixels)


def test_every_crop_is_cut_from_the_padded_image_and_as_often() -> None:
    image = torch.arange(1.0, 17.0).view(1, 1, 4, 4)
    crops = apply(build({"name": "RandomCrop", "size": 4, "padding": 1, "fill": 99}), image.expand(9000, 1, 4, 4))
    padded = v2.functional.pad(image, [1, 1, 1, 1], fill=99)
    expected = {tuple(padded[0, 0, t : t + 4, le : le + 4].flatten().tolist()) for t in range(3) for le in range(3)}
    counts: dict[tuple, int] = {}
    for crop in crops:
        counts[tuple(crop.flatten().tolist())] = counts.get(tuple(crop.flatten().tolist()), 0) + 1
    assert set(counts) == expected
    assert all(880 < count < 1120 for count in counts.values())


def test_crops_pad_where_needed_and_refuse_where_not(images: torch.Tensor) -> None:
    crop = {"name": "RandomCrop", "size": [20, 9], "pad_if_needed": True, "padding_mode": "edge"}
    assert apply(build(crop), images).shape == (12, 3, 20, 9)
    with pytest.raises(UserError, match="RandomCrop to 20 × 9 does not fit into 10 × 8; set padding"):
        apply(build({"name": "RandomCrop", "size": [20, 9]}), images)
    assert (
        apply(build({"name": "RandomCrop", "size": [10, 8]}, "RandomHorizontalFlip"), images.bfloat16()).dtype
        == torch.bfloat16
    )


def test_images_of_different_sizes_are_made_equal(images: torch.Tensor) -> None:
    mixed = [images[0], images[1, :, :7], images[2, :, :, :6]]
    resized = apply(build({"name": "Resize", "size": [5, 5]}), mixed)
    assert resized.shape == (3, 3, 5, 5)
    alone = apply(build({"name": "Resize", "size": [5, 5]}), [mixed[1]], ids=[1])
    assert torch.equal(resized[1:2], alone)
    cropped = apply(build({"name": "RandomCrop", "size": 6}, "RandomHorizontalFlip"), mixed)
    assert torch.equal(
        cropped[2:], apply(build({"name": "RandomCrop", "size": 6}, "RandomHorizontalFlip"), [mixed[2]], ids=[2])
    )
    with pytest.raises(UserError, match=r"must end with one size, found \(3, 10, 6\), \(3, 10, 8\)"):
        apply(build(), mixed)


OWN = """
import numpy as np
import torch
class Noise:
    def __init__(self, scale=1.0):
        self.scale = scale
    def __call__(self, image):
        return image + self.scale * np.random.rand() + torch.rand(())
def brighter(image, by):
    return image + by
"""


def test_transforms_of_one_s_own(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    images = torch.zeros(5, 1, 2, 2)
    brighter = build({"name": f"{tmp_path / 'own.py'}:brighter", "by": 2.0})
    assert apply(brighter, images).unique().tolist() == [2.0]
    noise = build({"name": f"{tmp_path / 'own.py'}:Noise", "scale": 3.0})
    whole = apply(noise, images)
    assert len(whole.unique()) == 5
    assert torch.equal(apply(noise, images[3:4], [3]), whole[3:4])
    with pytest.raises(UserError, match="has no argument 'bye'; did you mean 'by'"):
        build({"name": f"{tmp_path / 'own.py'}:brighter", "bye": 2.0})


def test_every_problem_is_reported_at_once() -> None:
    with pytest.raises(UserError) as caught:
        build(
            "RandomHorizontalFlop",
            {"name": "Normalize", "mean": [0.5]},
            {"name": "RandomCrop", "sise": 3, "size": 3},
            {"name": "ToDtype", "dtype": "float33"},
            {"name": "Resize", "size": 3, "interpolation": "bilinaer"},
            "CutMix",
            {"name": "RandomCrop", "size": [1, 2, 3]},
        )
    lines = str(caught.value).splitlines()
    expected = [
        "item 1: no transform 'RandomHorizontalFlop' in torchvision.transforms.v2; did you mean 'RandomHorizontalFlip'",
        "item 2: Normalize needs 'std'",
        "item 3: RandomCrop has no argument 'sise'; did you mean 'size'?",
        "item 4: ToDtype: 'float33' is not a dtype",
        "item 5: Resize: no interpolation 'bilinaer'; did you mean 'bilinear'",
        "item 6: CutMix cannot be used: it mixes samples",
        "item 7: RandomCrop: Please provide only two dimensions",
    ]
    for line, text in zip(lines, expected, strict=True):
        assert line.startswith("data.transforms.train, ")
        assert text in line


def test_what_wants_floats_reports_how_to_make_them(images: torch.Tensor) -> None:
    normalize = {"name": "Normalize", "mean": [0.5], "std": [0.5]}
    with pytest.raises(UserError, match=r"put \{name: ToDtype, dtype: float32, scale: true\} before it"):
        apply(build(normalize), images)
    made = apply(build({"name": "ToDtype", "dtype": "float32", "scale": True}, normalize), images)
    torch.testing.assert_close(made, images.float() / 127.5 - 1)


def test_transforms_are_for_a_single_tensor() -> None:
    with pytest.raises(UserError, match="found the inputs source, target, expected a single tensor"):
        build("RandomHorizontalFlip")(
            {"inputs": {"source": torch.zeros(1), "target": torch.zeros(1)}, "ids": torch.zeros(1)}, np.zeros(1)
        )


def test_names_are_those_that_can_be_used() -> None:
    names = transform_names()
    assert {"Resize", "RandomCrop", "RandAugment"} <= set(names)
    assert "CutMix" not in names


# --------------------------------------------------------------------------------------------------------------------
# The last transforms, where a batch arrives

SCALED = {"name": "ToDtype", "dtype": "float32", "scale": True}
NORMALISED = {"name": "Normalize", "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
CROPPED = [{"name": "RandomCrop", "size": [6, 6]}, {"name": "RandomHorizontalFlip"}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("items", "are_bytes"),
    [
        ([], True),
        (CROPPED, True),
        ([*CROPPED, SCALED], True),
        ([*CROPPED, SCALED, NORMALISED], True),
        ([{"name": "ToImage"}, SCALED, NORMALISED, {"name": "ToPureTensor"}], True),
        ([{"name": "ConvertImageDtype"}, NORMALISED], True),
        ([{"name": "ToDtype", "dtype": "float32"}, {"name": "Normalize", "mean": [127.5], "std": [50.0]}], True),
        ([SCALED, NORMALISED, {"name": "Normalize", "mean": [0.1], "std": [0.7]}], True),
        # what follows has to see floats, so they are made on the host
        ([SCALED, {"name": "GaussianNoise"}, NORMALISED], False),
        ([SCALED, *CROPPED], False),
        ([{"name": "ToDtype", "dtype": "bfloat16", "scale": True}], False),
    ],
)
def test_bytes_become_the_same_floats_later(items: Any, are_bytes: bool, dtype: torch.dtype, images: Any) -> None:
    section = TransformsSection.model_validate({"train": items}).train
    whole, parts = (Transform(section, 0, "data.transforms.train", dtype) for _ in range(2))
    parts.leave_bytes()
    batch = parts(batch_of(images.clone()), np.zeros(len(images)))
    assert (FINISH in batch) == parts.met_bytes == are_bytes
    assert (batch["inputs"].dtype == torch.uint8) == are_bytes
    wanted = apply(whole, images)
    assert torch.equal(finished(batch)["inputs"], wanted)
    for layout in (torch.contiguous_format, torch.channels_last):
        found = batch["inputs"].contiguous(memory_format=layout)
        if are_bytes:
            found = pickle.loads(pickle.dumps(batch[FINISH]))(found)  # it comes from a loader process
        assert found.is_contiguous(memory_format=layout)
        assert torch.equal(found, wanted)
        assert type(found) is torch.Tensor


def test_floats_and_sequences_are_left_alone() -> None:
    transform = build(NORMALISED)
    transform.leave_bytes()
    batch = transform(batch_of(torch.rand(2, 3, 4, 4)), np.zeros(2))
    assert FINISH not in batch
    tokens = torch.zeros(4, 7, dtype=torch.uint8)
    empty = build()
    empty.leave_bytes()
    assert FINISH not in empty(batch_of(tokens), np.zeros(4))


@pytest.mark.parametrize(
    ("items", "before", "one_size"),
    [
        ([], True, True),
        ([], False, False),
        ([*CROPPED, SCALED, NORMALISED], False, True),
        ([{"name": "Resize", "size": [8, 8]}, SCALED], False, True),
        ([{"name": "Resize", "size": 8}, SCALED], True, False),
        ([{"name": "RandomRotation", "degrees": 9, "expand": True}], True, False),
        ([{"name": "RandomHorizontalFlip"}], True, True),
    ],
)
def test_whether_images_have_one_size(items: Any, before: bool, one_size: bool) -> None:
    assert build(*items).gives_one_size(before) is one_size


AUGMENTS: list[tuple[dict[str, Any], torch.nn.Module]] = [
    ({"name": "RandAugment", "num_ops": 3, "magnitude": 12}, v2.RandAugment(num_ops=3, magnitude=12)),
    ({"name": "TrivialAugmentWide"}, v2.TrivialAugmentWide()),
    ({"name": "AugMix"}, v2.AugMix()),
    ({"name": "RandomErasing", "p": 0.7}, v2.RandomErasing(p=0.7)),
]


@pytest.mark.parametrize(("item", "theirs"), AUGMENTS, ids=[item["name"] for item, _ in AUGMENTS])
def test_augmentations_are_torchvision_s_for_the_same_draw(item: Any, theirs: Any, images: torch.Tensor) -> None:
    ids, epoch = [7, 3, 11, 7], 2
    found = apply(build(item, seed=5), images[ids], ids, epoch)
    for row, sample in zip(found, ids, strict=True):
        number = int(stream_of(mix(5, "transform", 0), np.array([epoch]), np.array([sample]))[0])
        with isolated_randomness():
            seed_globally(number)
            expected = theirs(images[sample])
        assert torch.equal(row, v2.functional.to_dtype(expected, torch.float32, scale=True))
    assert torch.equal(found[0], found[3]), "a sample is augmented once in an epoch, however often it is asked for"


# --------------------------------------------------------------------------------------------------------------------
# Masks


def with_masks(*items: Any, fill: int | None = 255) -> Transform:
    section = TransformsSection.model_validate({"train": list(items)}).train
    return Transform(section, 0, "data.transforms.train", masks=Masks(fill))


NEAREST = {"interpolation": "nearest"}
RESIZE = {"name": "Resize", "size": [24, 20], **NEAREST}
MOVING = {
    "flip": [{"name": "RandomHorizontalFlip"}, {"name": "RandomVerticalFlip"}],
    "crop": [{"name": "RandomCrop", "size": [16, 12]}],
    "padded crop": [{"name": "RandomCrop", "size": [24, 28], "padding": 3}],
    "reflected crop": [{"name": "RandomCrop", "size": [24, 28], "padding": 3, "padding_mode": "reflect"}],
    "cut": [{"name": "RandomResizedCrop", "size": [16, 16], **NEAREST}],
    "centre": [RESIZE, {"name": "CenterCrop", "size": 16}],
    "pad": [{"name": "Pad", "padding": [1, 2, 3, 4]}],
    "rotation": [{"name": "RandomRotation", "degrees": 40}],
    "affine": [{"name": "RandomAffine", "degrees": 10, "translate": [0.3, 0.2], "shear": 5}],
    "perspective": [{"name": "RandomPerspective", "p": 1.0, **NEAREST}],
    "zoom": [{"name": "RandomZoomOut", "p": 1.0}, RESIZE],
    # what draws for images alone comes first
    "several": [
        {
            "name": "RandomApply",
            "transforms": [{"name": "GaussianNoise", "sigma": 0.0}, {"name": "RandomRotation", "degrees": 30}],
        }
    ],
}


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("kind", MOVING)
def test_a_mask_moves_with_its_image(kind: str, apart: bool) -> None:
    masks = torch.randint(1, 200, (8, 24, 28), generator=torch.Generator().manual_seed(0))
    images = (masks[:, None].float() / 256).repeat(1, 3, 1, 1)
    batch = {"inputs": images.clone(), "targets": masks.clone(), "ids": torch.arange(8)}
    if apart:
        batch |= {"inputs": list(batch["inputs"]), "targets": list(batch["targets"])}
    found = with_masks(*MOVING[kind])(batch, np.zeros(8, np.int64))
    assert (found["targets"].dtype, found["targets"].dim()) == (torch.int64, 3)
    beyond = found["targets"] == 255
    assert torch.equal(found["inputs"][:, 0] * 256, found["targets"].where(~beyond, 0).float())
    assert bool(beyond.any()) == (
        kind in ("padded crop", "pad", "rotation", "affine", "perspective", "zoom", "several")
    )
    assert found["targets"].shape != masks.shape or not torch.equal(found["targets"], masks)


def test_a_mask_keeps_its_classes_where_its_image_is_interpolated_or_coloured() -> None:
    masks = torch.randint(0, 2, (4, 9, 9), generator=torch.Generator().manual_seed(0)) * 7
    images = torch.rand(4, 3, 9, 9)
    items = [
        {"name": "Resize", "size": [14, 14]},
        {"name": "ColorJitter", "brightness": 0.5},
        {"name": "Normalize", "mean": [0.5] * 3, "std": [0.2] * 3},
    ]
    found = with_masks(*items, fill=None)(
        {"inputs": images, "targets": masks, "ids": torch.arange(4)}, np.zeros(4, np.int64)
    )
    nearest = torch.nn.functional.interpolate(masks[:, None].float(), (14, 14), mode="nearest")[:, 0].long()
    assert torch.equal(found["targets"], nearest)
    assert found["inputs"].shape == (4, 3, 14, 14)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"name": "RandomRotation", "degrees": 9}, r"pixels that its mask has no class for; set loss\.ignore_index"),
        ({"name": "RandomCrop", "size": 4, "padding": 1}, r"set loss\.ignore_index"),
        ({"name": "RandomApply", "transforms": [{"name": "Pad", "padding": 2}]}, r"set loss\.ignore_index"),
        ({"name": "RandAugment"}, r"RandAugment moves images without their masks"),
        ({"name": "builtins:abs"}, r"builtins:abs is given images alone"),
    ],
)
def test_what_would_leave_a_mask_behind_is_refused(item: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        with_masks(item, fill=None)


def test_a_mask_is_not_filled_up_in_the_middle_of_its_image() -> None:
    batch = {"inputs": torch.rand(2, 3, 4, 4), "targets": torch.zeros(2, 4, 4).long(), "ids": torch.arange(2)}
    with pytest.raises(UserError, match=r"CenterCrop to 6 × 6 would fill up an image of 4 × 4"):
        with_masks({"name": "CenterCrop", "size": 6})(batch, np.zeros(2, np.int64))
