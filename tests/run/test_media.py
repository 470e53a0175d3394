"""Pictures, tables and texts: what is taken, what is refused, and which files a row may name."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from distrain.config import UserError
from distrain.run.media import cut_media, encode_image, encode_table, encode_text, media_of, read_table, write_media

GREY = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
COLOURS = np.arange(3 * 5 * 4, dtype=np.uint8).reshape(3, 5, 4)


def pixels(image: Any) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(encode_image("x", image).content)))


@pytest.mark.parametrize(
    ("image", "shown"),
    [
        pytest.param(GREY, (GREY * 255).round(), id="floats"),
        pytest.param(torch.tensor(GREY)[None], (GREY * 255).round(), id="a tensor of one channel"),
        pytest.param(torch.tensor(COLOURS), COLOURS.transpose(1, 2, 0), id="channels first"),
        pytest.param(COLOURS.transpose(1, 2, 0), COLOURS.transpose(1, 2, 0), id="channels last"),
        pytest.param(torch.tensor(COLOURS).long(), COLOURS.transpose(1, 2, 0), id="int64"),
        pytest.param(GREY > 0.5, (GREY > 0.5) * 255, id="booleans"),
        pytest.param(torch.ones(2, 3, requires_grad=True).bfloat16() * 1.0005, np.full((2, 3), 255), id="bfloat16"),
        pytest.param(Image.fromarray(COLOURS[0]), COLOURS[0], id="Pillow"),
    ],
)
def test_pictures_are_taken_in_every_usual_form(image: Any, shown: np.ndarray) -> None:
    assert np.array_equal(pixels(image), shown)


def test_a_batch_becomes_a_grid() -> None:
    batch = np.stack([np.full((1, 2, 3), level, np.uint8) for level in (10, 20, 30)])
    rows = [[10] * 3 + [20] * 3] * 2 + [[30] * 3 + [0] * 3] * 2
    assert pixels(batch).tolist() == rows


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (np.zeros((2, 5, 5)), r"has the shape \(2, 5, 5\); expected"),
        (np.zeros(7), r"has the shape \(7,\)"),
        (np.zeros((0, 4)), r"has the shape \(0, 4\)"),
        (np.full((2, 2), -1.5), r"values from -1.5 to -1.5; expected floats from 0 to 1"),
        (np.full((2, 2), math.nan), r"values from nan to nan"),
        (np.full((2, 2), 256), r"values from 256 to 256; expected integers from 0 to 255"),
        (np.array([["a", "b"]]), r"expected numbers"),
    ],
)
def test_what_is_no_picture_is_refused(image: Any, said: str) -> None:
    with pytest.raises(UserError, match=f"image 'x'.*{said}"):
        encode_image("x", image)


def test_tables_and_texts_come_back(tmp_path: Path) -> None:
    rows = [[1, "eins", torch.tensor(0.5)], [np.int64(2), None, math.nan]]
    found = [encode_table("t", ["n", "word", "value"], rows), encode_text("t", "größer\n<b>"), encode_text("t", "2")]
    row = {"event": "eval", "step": 7, "media": write_media(tmp_path, 7, "valid", found)}
    table, text, second = media_of(json.loads(json.dumps(row)))
    assert [each.file for each in (table, text, second)] == [
        f"media/step-00000007/valid-{name}" for name in ("t.json", "t.txt", "t-2.txt")
    ]
    columns, cells = read_table(tmp_path / table.file)
    assert (columns, cells) == (["n", "word", "value"], [[1, "eins", 0.5], [2, None, "nan"]])
    assert (tmp_path / text.file).read_text("utf-8") == "größer\n<b>"
    cut_media(tmp_path, 7)
    assert (tmp_path / text.file).exists()
    cut_media(tmp_path, 6)
    assert not (tmp_path / text.file).exists()


@pytest.mark.parametrize("rows", [[[1]], [[1, object()]], [[1, torch.zeros(2)]]])
def test_a_table_has_a_plain_cell_for_each_column(rows: Any) -> None:
    with pytest.raises(UserError, match="table 't'"):
        encode_table("t", ["a", "b"], rows)


@pytest.mark.parametrize(
    "item",
    [
        {"name": "x", "kind": "image", "file": "media/step-00000001/../../../etc/passwd"},
        {"name": "x", "kind": "image", "file": "/etc/passwd"},
        {"name": "x", "kind": "image", "file": "media/step-00000001/.x.png"},
        {"name": "x", "kind": "page", "file": "media/step-00000001/x.html"},
        {"name": 1, "kind": "image", "file": "media/step-00000001/x.png"},
        "media/step-00000001/x.png",
    ],
)
def test_a_row_names_files_of_the_run_alone(item: Any) -> None:
    with pytest.raises(UserError, match="the row 'eval' of step 1 names no picture"):
        media_of({"event": "eval", "step": 1, "media": [item]})
