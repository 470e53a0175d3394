"""How images and classes lie in a folder: found, said, and an error where it is not clear."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from logged import logged
from PIL import Image

from distrain.config import DataSection, UserError
from distrain.datasets.base import Data, DataRequest, keys_of
from distrain.datasets.user import named_data

CLASSES = ("ant", "bee")


def _picture(path: Path, value: int = 7) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(path)
    return path.name


def _table(path: Path, header: str, rows: list[str]) -> None:
    path.write_text("\n".join([header, *rows] if header else rows) + "\n")


def _build(folder: Path, state: dict[str, Any] | None = None, **section: Any) -> Data:
    section = {"name": "image_folder", "path": str(folder), **section}
    return named_data(DataRequest(DataSection.model_validate(section), "classification", 0, state=state))


def _splits(data: Data) -> dict[str, dict[str, str]]:
    """Return the class of each file, by split."""
    names = data.meta.class_names or ()
    return {
        split: {
            file: names[target]
            for file, target in zip(
                keys_of(source, np.arange(len(source)))["file"],  # type: ignore[arg-type]
                source.targets.tolist(),  # type: ignore[union-attr]
                strict=True,
            )
        }
        for split, source in data.splits.items()
    }


def _listed(root: Path, images: str, suffix: bool = True, names: str = "image,label") -> dict[str, str]:
    """Write ten images, with labels in labels.csv; return the class of each file."""
    files = {f"{number:02}.png": CLASSES[number % 2] for number in range(10)}
    for file in files:
        _picture(root / images / file)
    _table(root / "labels.csv", names, [f"{f if suffix else f[:-4]},{label}" for f, label in files.items()])
    return {f"{images}/{file}".lstrip("./"): label for file, label in files.items()}


@pytest.mark.parametrize(
    ("images", "suffix", "names"),
    [("", True, "image,label"), ("images", True, "file,kind"), ("images", False, "id,breed"), ("all/png", True, "")],
)
def test_a_table_of_files_and_labels(images, suffix, names, tmp_path):
    written = _listed(tmp_path, images, suffix, names)
    if "/" in images:  # names with their folder
        text = (tmp_path / "labels.csv").read_text()
        (tmp_path / "labels.csv").write_text("".join(f"{images}/{line}\n" for line in text.splitlines()))
    with logged() as lines:
        data = _build(tmp_path)
    found = _splits(data)
    assert found["train"] | found["test"] == written
    assert len(found["train"]) == 8
    assert any("files and labels in labels.csv" in line and "10 images of 2 classes" in line for line in lines), lines
    assert tmp_path / "labels.csv" in data.files, "its labels are part of the fingerprint"
    assert _splits(_build(tmp_path, state={"class_names": ["bee", "ant"]})) == found


def test_names_as_of_kaggle(tmp_path):
    rows = {f"img{number}": CLASSES[number % 2] for number in range(6)}
    for name in rows:
        _picture(tmp_path / "train" / f"{name}.jpg")
    for number in range(3):
        _picture(tmp_path / "test" / f"new{number}.jpg")
    _table(tmp_path / "train.csv", "id,breed", [f"{name},{label}" for name, label in rows.items()])
    _table(tmp_path / "test.csv", "id", [f"new{number}" for number in range(3)])
    _table(tmp_path / "sample_submission.csv", "id,breed", ["new,ant"])
    with logged() as lines:
        found = _splits(_build(tmp_path, split=[0.5, 0.5]))
    assert found["train"] | found["test"] == {f"train/{name}.jpg": label for name, label in rows.items()}
    assert any("test.csv has no labels" in line for line in lines), lines
    assert any("train.csv" in line and "images in train/" in line for line in lines), lines


def test_a_table_with_a_wrong_name_is_not_passed_over(tmp_path: Path) -> None:
    """Beside class folders too, where it would not be missed."""
    for number in range(4):
        _picture(tmp_path / CLASSES[number % 2] / f"{number}.png")
    _table(tmp_path / "labels.csv", "file,label", [f"{CLASSES[n % 2]}/{n}.png,{n % 2}" for n in range(5)])
    with pytest.raises(UserError, match=r"can be read in 2 ways.*\n.*files and labels in labels\.csv"):
        _build(tmp_path)
    with pytest.raises(UserError, match=r"4\.png, which is not there; add the file, or remove the row"):
        _build(tmp_path, labels="labels.csv")
    assert len(_splits(_build(tmp_path, labels="folders", split=[1.0]))["train"]) == 4


def test_a_table_for_each_split_and_a_column_of_splits(tmp_path):
    for number in range(6):
        _picture(tmp_path / f"{number}.png")
    apart, column = (
        ["0.png,0", "1.png,10", "2.png,2"],
        ["0.png,a,train", "1.png,b,train", "2.png,a,val", "3.png,b,test"],
    )
    _table(tmp_path / "train.csv", "file,label", apart)
    _table(tmp_path / "val.csv", "file,label", ["3.png,2"])
    data = _build(tmp_path)
    assert data.meta.class_names == ("0", "2", "10"), "numbers by their value"
    assert _splits(data) == {"train": {"0.png": "0", "1.png": "10", "2.png": "2"}, "valid": {"3.png": "2"}}
    _table(tmp_path / "val.csv", "file,label", ["3.png,7"])
    with pytest.raises(UserError, match=r"3.png is of '7', which is not a class of the training split: 0, 2, 10"):
        _build(tmp_path)
    named = {"train": "val.csv", "test": "train.csv"}
    _table(tmp_path / "val.csv", "file,label", [*apart, "3.png,7"])
    assert {split: len(files) for split, files in _splits(_build(tmp_path, split=named)).items()} == {
        "train": 4,
        "test": 3,
    }
    (tmp_path / "val.csv").unlink()
    _table(tmp_path / "train.csv", "file,label,split", column)
    assert _splits(_build(tmp_path)) == {
        "train": {"0.png": "a", "1.png": "b"}, "valid": {"2.png": "a"}, "test": {"3.png": "b"},
    }  # fmt: skip


def test_images_named_twice_and_classes_in_two_spellings_are_told(tmp_path):
    rows = [f"{file},{label}" for file, label in _listed(tmp_path, "").items()]
    with logged() as silent:
        _build(tmp_path)
    _table(tmp_path / "labels.csv", "image,label", [*rows, "00.png,ant", "01.png, bee"])
    with logged() as lines:
        _build(tmp_path)
    more = " ".join(lines)
    assert "again" not in " ".join(silent)
    assert "again that an earlier row names, 2 times, such as '00.png'; images with several labels: 1." in more
    assert "'bee' and ' bee' differ only in how they are written" in more


def test_a_column_of_splits_that_names_something_else_too_is_refused(tmp_path):
    rows = [f"{file},{label}" for file, label in _listed(tmp_path, "").items()]
    for odd in ("holdout", ""):
        splits = [*["train"] * 6, *["Test "] * 3, odd]
        _table(tmp_path / "labels.csv", "image,label,split", [f"{r},{s}" for r, s in zip(rows, splits, strict=True)])
        with pytest.raises(UserError, match=f"the column 'split' holds '{odd}', which is no split; expected train"):
            _build(tmp_path)
    _table(tmp_path / "labels.csv", "image,label,split", [f"{r},{s}" for r, s in zip(rows, splits[:9], strict=False)])
    assert {split: len(files) for split, files in _splits(_build(tmp_path)).items()} == {"train": 6, "test": 3}


def test_folders_of_classes_and_of_splits(tmp_path):
    flat = tmp_path / "archive" / "flowers"  # in a folder of its own, as archives have it
    for name in CLASSES:
        for number in range(5):
            _picture(flat / name / f"{number}.png")
    with logged() as lines:
        assert set(_splits(_build(tmp_path))) == {"train", "test"}
    assert any("a folder for each class; 10 images of 2 classes" in line for line in lines)
    for split in ("Training", "validation"):
        for name in CLASSES:
            _picture(tmp_path / "both" / split / name / "0.png")
    with logged() as lines:
        assert set(_splits(_build(tmp_path / "both"))) == {"train", "valid"}
    assert any("class folders in Training/, validation/; 2, 2 images" in line for line in lines)
    # a class may be called train
    _picture(tmp_path / "vehicles" / "train" / "0.png")
    _picture(tmp_path / "vehicles" / "bus" / "0.png")
    assert _build(tmp_path / "vehicles", split=[0.5, 0.5]).meta.class_names == ("bus", "train")


def test_files_that_are_no_images_by_their_names_are_told(tmp_path):
    for name in CLASSES:
        for number in range(3):
            _picture(tmp_path / name / f"{number}.PNG")
        (tmp_path / name / "Thumbs.db").touch()
        (tmp_path / name / ".0.png").touch()
    with logged() as lines:
        _build(tmp_path, split=[0.5, 0.5])
    assert not [line for line in lines if "not read" in line]
    (tmp_path / "bee" / "4.jfif").write_bytes((tmp_path / "bee" / "0.PNG").read_bytes())
    (tmp_path / "bee" / "5").touch()
    with logged() as lines:
        _build(tmp_path, split=[0.5, 0.5])
    (line,) = (line for line in lines if "not read" in line)
    assert f"2 (.jfif, no suffix), such as {tmp_path / 'bee' / '4.jfif'}" in line


def test_a_split_without_images_is_an_error(tmp_path):
    for name in CLASSES:
        _picture(tmp_path / "train" / name / "0.png")
        _picture(tmp_path / "train" / name / "1.png")
        (tmp_path / "val" / name).mkdir(parents=True)
    with pytest.raises(UserError, match="val has folders of classes without an image in them; add images, or remove"):
        _build(tmp_path)
    _picture(tmp_path / "val" / "0.png")  # without a class: for a prediction
    for name in CLASSES:
        (tmp_path / "val" / name).rmdir()
    assert set(_splits(_build(tmp_path))) == {"train", "test"}


def _two_ways(root: Path) -> None:
    for name in CLASSES:
        _picture(root / name / "0.png")
        _picture(root / name / "1.png")
    _table(root / "labels.csv", "file,label", ["ant/0.png,x", "ant/1.png,y", "bee/0.png,x", "bee/1.png,y"])


def test_what_can_be_read_in_two_ways_is_an_error_that_names_both(tmp_path):
    _two_ways(tmp_path)
    with pytest.raises(UserError) as caught:
        _build(tmp_path)
    assert "labels.csv, columns 'file' and 'label': labels: labels.csv" in str(caught.value)
    assert "a folder for each class: labels: folders" in str(caught.value)
    assert _build(tmp_path, labels="labels.csv").meta.class_names == ("x", "y")
    assert _build(tmp_path, labels="folders").meta.class_names == CLASSES


@pytest.mark.parametrize(
    ("header", "row", "section", "words"),
    [
        ("file,a,b", "0.png,x,y", {}, ["which column holds the labels is not clear", "data.label_column: a, b"]),
        ("file,copy,label", "0.png,0.png,x", {}, ["images in the columns file and copy", "data.file_column"]),
        ("file", "0.png", {"labels": "labels.csv"}, ["as it has 'file' alone"]),
        ("file,label", "9.png,x", {}, ["labels.csv", "none of which names images that are there"]),
        ("file,label", "9.png,x", {"labels": "labels.csv"}, ["no column names images"]),
        ("file,label", "0.png,", {}, ["'0.png' has no label"]),
        ("file,label", "0.png,x", {"labels": "label.csv"}, ["there is no table", "did you mean 'labels.csv'"]),
        ("file,label", "0.png,x", {"file_column": "fil"}, ["no column 'fil'; did you mean 'file'"]),
    ],
)
def test_a_table_that_is_not_clear_is_an_error(header, row, section, words, tmp_path):
    _picture(tmp_path / "0.png")
    _table(tmp_path / "labels.csv", header, [row])
    with pytest.raises(UserError) as caught:
        _build(tmp_path, **section)
    assert all(word in str(caught.value) for word in words), caught.value


def test_columns_that_are_named_and_files_that_are_gone(tmp_path):
    for number in range(30):
        _picture(tmp_path / f"{number}.png")
    rows = [f"{number}.png,{number % 3},{CLASSES[number % 2]}" for number in range(30)]
    _table(tmp_path / "labels.csv", "file,age,kind", rows)
    assert _build(tmp_path, label_column="kind").meta.class_names == CLASSES
    assert _build(tmp_path, label_column="age").meta.class_names == ("0", "1", "2")
    (tmp_path / "29.png").unlink()
    with pytest.raises(UserError, match=r"names .*29.png, which is not there"):
        _build(tmp_path, label_column="kind")


def test_split_folders_with_fractions_and_two_names_for_a_split_are_errors(tmp_path):
    for split in ("train", "val", "valid"):
        for name in CLASSES:
            _picture(tmp_path / split / name / "0.png")
    with pytest.raises(UserError, match=r"folders val and valid for one split"):
        _build(tmp_path)
    (tmp_path / "valid").rename(tmp_path / "test")
    with pytest.raises(UserError, match=r"data.split: found \[0.8, 0.2\], and .* has a folder for each split"):
        _build(tmp_path, split=[0.8, 0.2])
