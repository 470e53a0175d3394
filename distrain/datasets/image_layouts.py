"""Where the images of a folder and their classes are: found by what is there, and said.

flowers/rose/1.jpg, flowers/lily/2.jpg                      a folder for each class, cut by data.split
flowers/train/rose/1.jpg, flowers/val/rose/7.jpg            such folders for each split
flowers/labels.csv, flowers/1.jpg or flowers/images/1.jpg   a table of files and labels
flowers/train.csv, flowers/train/1.jpg, flowers/test/9.jpg  the same with names as of Kaggle's sets
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from distrain.config import UserError, close_names
from distrain.datasets.base import SPLIT_NAMES
from distrain.datasets.table_columns import spelled_alike
from distrain.system.output import error_line, in_utf8, one_line

logger = logging.getLogger(__name__)

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
_OF_SYSTEMS = ("thumbs.db", "desktop.ini")
_TABLES = {".csv": ",", ".tsv": "\t"}
CLASS_FOLDERS = "a folder with one folder of images for each class, or such folders named train and test"
FOLDERS = "folders"
"""What a recipe gives as `labels` where folders name the classes."""
_LABEL_NAMES = ("label", "labels", "class", "class_name", "category", "target")
_TRIED = 20
"""Rows by which a column of files is known."""
_PLACES = 50
"""Folders below the table's in which its files are looked for."""


@dataclass(frozen=True)
class Listing:
    """The images of one split."""

    paths: list[Path]
    labels: list[str]
    """The class of each."""
    root: Path | None
    """The folder that their names in predictions are relative to; None: they are not in one."""


@dataclass(frozen=True)
class Layout:
    """What was found in a folder."""

    about: str
    """In words."""
    splits: Mapping[str, Callable[[], Listing]]
    """By split; `train` alone where it is one piece, to be cut."""
    tables: tuple[Path, ...] = ()
    """The files that hold the labels."""
    write: str = ""
    """What to give in a recipe, so that it is this one."""


def find_layout(
    root: Path, split: Any, labels: str | None, file_column: str | None, label_column: str | None
) -> Layout:
    """Return how images and classes lie in `root`; `split` is data.split, the others are the data set's arguments.

    Raises UserError where nothing is found, or several, naming what to give for each.
    """
    columns = file_column, label_column
    if isinstance(split, dict):
        named = {name: root / place for name, place in split.items()}
        return _of_named(root, named, columns)
    if labels == FOLDERS and any(columns):
        raise UserError(f"data.file_column and data.label_column are of a table, and data.labels is {FOLDERS}")
    if labels is not None and labels != FOLDERS:
        return _of_tables(root, {"train": _table_at(root, labels)}, columns)
    root = _inner(root)
    found = [] if labels == FOLDERS else [*_table_layouts(root, columns)]
    if not any(columns):
        # without a table a class folder that is empty is an error of its own
        found += [*_folder_layouts(root, split, least=2 if found else 1)]
    if len(found) > 1:
        candidates = "\n".join(f"  - {each.about}: {each.write}" for each in found)
        raise UserError(
            f"data.path: {root} can be read in {len(found)} ways; say in the recipe which is meant:\n{candidates}"
        )
    if not found:
        raise UserError(_nothing(root))
    return found[0]


def class_names(listing: Listing, layout: Layout, where: Path) -> list[str]:
    """Return the classes of the training split: sorted, whole numbers of a table by their value."""
    names = sorted(set(listing.labels))
    if len(names) < 2:
        found = f"only {names[0]!r}" if names else "no folder"
        raise UserError(f"{where} holds {found}; expected {CLASS_FOLDERS}")
    if not_utf8 := [name for name in names if in_utf8(name) != name]:
        raise UserError(
            f"{where} holds the folder '{one_line(not_utf8[0])}', whose name is not UTF-8, and checkpoints store "
            "class names as UTF-8; rename it"
        )
    by_value = layout.tables and all(name.isascii() and name.isdigit() for name in names)
    return sorted(names, key=int) if by_value else names


def class_numbers(listing: Listing, names: Sequence[str]) -> np.ndarray:
    """Return the class of each image (n,) int64; raises UserError for one that the training split does not have."""
    numbers = {name: number for number, name in enumerate(names)}
    if (unknown := next((label for label in listing.labels if label not in numbers), None)) is not None:
        path = listing.paths[listing.labels.index(unknown)]
        is_folder = listing.root is not None and (listing.root / unknown).is_dir()
        what = f"{listing.root} has a folder {unknown!r}" if is_folder else f"{path} is of {unknown!r}"
        classes = ", ".join(names[:20])
        raise UserError(f"{what}, which is not a class of the training split: {classes}{close_names(unknown, names)}")
    return np.array([numbers[label] for label in listing.labels], dtype=np.int64)


def image_paths(path: Path, others: list[Path] | None = None) -> list[Path]:
    """Return `path` itself if it is a file, or the images in and below it, sorted, without hidden ones.

    `others` is given what else is there.
    """
    if not path.exists():
        raise UserError(f"there is nothing at {path}; expected an image or a folder of images")
    if path.is_file():
        return [path]
    if not (found := [*_images(path, others)]):
        raise UserError(f"{path} holds no image; expected files ending in {', '.join(_SUFFIXES)}")
    return found


def _images(path: Path, others: list[Path] | None = None) -> Iterator[Path]:
    """Yield the images in and below a folder; `others` is given what else is there."""
    for folder, folders, files in os.walk(path, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if name.lower().endswith(_SUFFIXES) and not name.startswith("."):
                yield Path(folder, name)
            elif others is not None and not name.startswith(".") and name.lower() not in _OF_SYSTEMS:
                others.append(Path(folder, name))


def folders_in(path: Path) -> list[str]:
    """Return the names of the folders in a folder, sorted, without hidden ones."""
    return sorted(each.name for each in path.iterdir() if each.is_dir() and not each.name.startswith("."))


def _has_images(path: Path) -> bool:
    return next(_images(path), None) is not None


def _inner(root: Path) -> Path:
    """Return the folder in which there is more than one other folder: archives often hold one that holds all."""
    while len(names := folders_in(root)) == 1 and names[0].lower() not in SPLIT_NAMES:
        inner = root / names[0]
        if any(each.suffix.lower() in (*_SUFFIXES, *_TABLES) for each in root.iterdir()) or not folders_in(inner):
            break
        root = inner
    return root


# --------------------------------------------------------------------------------------------------------------------
# Folders


def _folder_layouts(root: Path, split: Any, least: int) -> Iterator[Layout]:
    names = folders_in(root)
    known: dict[str, list[str]] = {}
    for name in names:
        if (which := SPLIT_NAMES.get(name.lower())) is not None and _class_folders(root / name):
            known.setdefault(which, []).append(name)
    if "train" in known:
        if bare := [name for name in names if name.lower() in SPLIT_NAMES and _is_bare(root / name)]:
            raise UserError(
                f"{root / bare[0]} has folders of classes without an image in them; add images, or remove the folder, "
                "and data.split cuts the images for training"
            )
        if twice := next((each for each in known.values() if len(each) > 1), None):
            raise UserError(
                f"data.path: {root} has the folders {' and '.join(twice)} for one split; name those that are meant, as "
                f"data.split: {{train: {known['train'][0]}, valid: ..., test: ...}}"
            )
        places = {which: root / known[which][0] for which in ("train", "valid", "test") if which in known}
        if len(places) > 1 and split is not None:
            given = ", ".join(each.name for each in places.values())
            raise UserError(
                f"data.split: found {split}, and {root} has a folder for each split, {given}; remove it, or set "
                f"data.path to {places['train']} to cut that alone"
            )
        shown = " and ".join([", ".join(f"{each.name}/" for each in places.values())])
        yield Layout(f"class folders in {shown}", {w: _lister(p) for w, p in places.items()}, (), f"labels: {FOLDERS}")
    elif (
        len(names) > 1 and len(_class_folders(root)) >= least and not all(name.lower() in SPLIT_NAMES for name in names)
    ):
        yield Layout("a folder for each class", {"train": _lister(root)}, (), f"labels: {FOLDERS}")


def _class_folders(folder: Path) -> list[str]:
    return [name for name in folders_in(folder) if _has_images(folder / name)]


def _is_bare(folder: Path) -> bool:
    return bool(folders_in(folder)) and not _has_images(folder)


def _lister(folder: Path) -> Callable[[], Listing]:
    def listed() -> Listing:
        others: list[Path] = []
        by_class = {name: image_paths(folder / name, others) for name in folders_in(folder)}
        if others:
            kinds = ", ".join(sorted({each.suffix.lower() or "no suffix" for each in others})[:10])
            logger.warning(
                f"{folder}: files in folders of classes that are not read, as their names do not end as images: "
                f"{len(others):,} ({kinds}), such as {others[0]}; save images as .jpg or .png, or remove the files"
            )
        paths = [path for each in by_class.values() for path in each]
        return Listing(paths, [name for name, each in by_class.items() for _ in each], folder)

    return listed


def _of_named(root: Path, places: Mapping[str, Path], columns: tuple[str | None, str | None]) -> Layout:
    """Return the layout of a split that the recipe names: folders, or tables."""
    tables = {name: place for name, place in places.items() if place.suffix.lower() in _TABLES and place.is_file()}
    if len(tables) == len(places):
        return _of_tables(root, tables, columns)
    for name, place in places.items():
        if not place.is_dir():
            raise UserError(
                f"data.split: there is no folder {place} for {name}{close_names(place.name, folders_in(root))}"
            )
        if not folders_in(place):
            tables_there = [each.name for each in _tables_in(place)]
            name_it = f"; name {' or '.join(tables_there)} in it, if that lists files and labels" * bool(tables_there)
            raise UserError(f"{place} has no folders of classes{name_it}")
    return Layout("the folders that data.split names", {name: _lister(place) for name, place in places.items()})


# --------------------------------------------------------------------------------------------------------------------
# Tables


def _table_at(root: Path, name: str) -> Path:
    path = root / name
    if not path.is_file() or path.suffix.lower() not in _TABLES:
        there = [each.name for each in _tables_in(root)]
        raise UserError(
            f"data.labels: there is no table {path}"
            + close_names(name, there, f"expected a .csv or .tsv file in data.path, of files and labels, or {FOLDERS}")
        )
    return path


def _tables_in(root: Path) -> list[Path]:
    return sorted(
        each
        for each in root.iterdir()
        if each.is_file() and each.suffix.lower() in _TABLES and not each.name.startswith(".")
    )


def _table_layouts(root: Path, columns: tuple[str | None, str | None]) -> Iterator[Layout]:
    tables = {path: table for path in _tables_in(root) if (table := _Table.open(path, root, columns)) is not None}
    labelled = {path: table for path, table in tables.items() if table.label_columns}
    by_split = {which: path for path in labelled if (which := SPLIT_NAMES.get(path.stem.lower())) is not None}
    if "train" in by_split:
        for path in tables.keys() - labelled.keys():
            logger.info(f"{path.name} has no labels, and is no split; distrain predict reads its images")
        yield _of_tables(root, by_split, columns)
        labelled = {path: table for path, table in labelled.items() if path not in by_split.values()}
    for path in labelled:
        yield _of_tables(root, {"train": path}, columns)


def _of_tables(root: Path, places: Mapping[str, Path], columns: tuple[str | None, str | None]) -> Layout:
    names = " and ".join(path.name for path in places.values())
    write = (
        f"labels: {names}"
        if len(places) == 1
        else f"split: {{{', '.join(f'{w}: {p.name}' for w, p in places.items())}}}"
    )
    tables: dict[str, _Table] = {}
    for which, path in places.items():
        table = _Table.open(path, root, columns)
        if table is None:
            raise UserError(_no_files(path, root, columns[0]))
        tables[which] = table
    first = tables["train"]
    about = f"files and labels in {names}, columns {first.file_column!r} and {first.label_column()!r}"
    about += f", images in {first.where}" if first.where else ""
    splits: dict[str, Callable[[], Listing]] = {which: table.listing for which, table in tables.items()}
    if len(tables) == 1:
        first.check_split_column()
    for table in tables.values():
        table.warn()
    if len(tables) == 1 and (column := first.split_column()) is not None:
        splits = {which: partial(first.listing, column, which) for which in first.splits(column)}
        about += f", splits by the column {column!r}"
    return Layout(about, splits, tuple(places.values()), write)


class _Table:
    """A table with a column that names images."""

    def __init__(
        self, path: Path, root: Path, frame: Any, file_column: str, base: Path, suffix: str, label: str | None
    ):
        self.path = path
        self.root = root
        self.frame = frame
        self.file_column = file_column
        self.base = base
        self.suffix = suffix
        self.label = label
        others = [name for name in frame.columns if name not in (file_column, self.split_column())]
        if label is not None:
            others = [label]
        self.label_columns = [
            name for name in others if str(name).lower() in _LABEL_NAMES or len(others) == 1
        ] or others  # fmt: skip

    @property
    def where(self) -> str:
        """The folder of the images, where that is not the table's."""
        return "" if self.base == self.root else f"{self.base.relative_to(self.root)}/"

    @classmethod
    def open(cls, path: Path, root: Path, columns: tuple[str | None, str | None]) -> _Table | None:
        """Return a table; None where no column of it names images."""
        frame = _read(path)
        if not len(frame):
            return None
        file_column, label_column = columns
        for key, name in (("file_column", file_column), ("label_column", label_column)):
            if name is not None and name not in frame.columns:
                if key == "label_column":
                    return None
                names = [*map(str, frame.columns)]
                hint = close_names(name, names, f"it has {', '.join(names)}")
                raise UserError(f"data.{key}: {path} has no column {name!r}{hint}")
        tried = [file_column] if file_column is not None else [n for n in frame.columns if n != label_column]
        found = {name: places for name in tried if (places := [*_places(root, frame[name].head(_TRIED), ("",))])}
        if not found:  # numbers of classes may be names without a suffix, too
            names = [name for name in tried if name == file_column or str(name).lower() not in _LABEL_NAMES]
            found = {
                name: places for name in names if (places := [*_places(root, frame[name].head(_TRIED), _SUFFIXES)])
            }
        if not found:  # one of which some names are wrong is a table all the same, and not passed over
            found = {
                name: places
                for name in tried
                if (places := [*_places(root, frame[name].head(_TRIED), ("",), least=0.5)])
            }
        if len(found) > 1:
            raise UserError(
                f"{path} names images in the columns {' and '.join(map(str, found))}; give data.file_column"
            )
        if not found:
            return None
        ((name, places),) = found.items()
        if len(places) > 1:
            shown = " and ".join(str(base / f"{frame[name].iloc[0]}{suffix}") for base, suffix in places)
            raise UserError(
                f"{path} names images that are in several places, such as {shown}; keep one of them, or write names "
                "with their folder"
            )
        return cls(path, root, frame, name, *places[0], label_column)

    def label_column(self) -> str:
        """Return the column of labels; raises UserError unless it is one."""
        if len(self.label_columns) != 1:
            others = ", ".join(map(str, self.label_columns))
            raise UserError(
                f"{self.path}: which column holds the labels is not clear; give data.label_column"
                + (f": {others}" if others else f", as it has {self.file_column!r} alone")
            )
        return self.label_columns[0]

    def split_column(self) -> str | None:
        """Return the column that says of which split a row is, or None."""
        column = self._column_of_splits()
        values = {_split_of(each) for each in self.frame[column].unique()} if column is not None else {None}
        return column if None not in values and "train" in values and len(values) > 1 else None

    def _column_of_splits(self) -> str | None:
        column = next((name for name in self.frame.columns if str(name).lower() in ("split", "subset")), None)
        return None if column == self.file_column else column

    def check_split_column(self) -> None:
        """Raise UserError where some rows name a split and others something else: all would be cut anew."""
        if (column := self._column_of_splits()) is None or column == self.label:
            return
        values = self.frame[column].unique().tolist()
        odd = [each for each in values if _split_of(each) is None]
        if odd and len(odd) < len(values):
            raise UserError(
                f"{self.path}: the column {column!r} holds {odd[0]!r}, which is no split; expected train, val and "
                "test, or another name for the column"
            )

    def warn(self) -> None:
        """Warn of images that are there twice, and of classes that differ in how they are written."""
        files, labels = self.frame[self.file_column], self.frame[self.label_column()]
        if again := int(files.duplicated().sum()):
            other = int(self.frame.groupby(files)[labels.name].nunique().gt(1).sum())
            first = files[files.duplicated()].iloc[0]
            logger.warning(
                f"{self.path} names images again that an earlier row names, {again:,} times, such as {first!r}"
                + (f"; images with several labels: {other:,}" if other else "")
                + ". Where data.split cuts the rows, an image may be in several splits"
            )
        for line in spelled_alike({"categorical": [], "targets": [labels.name], "classes": labels.unique().tolist()}):
            logger.warning(f"{self.path}: {line}")

    def splits(self, column: str) -> list[str]:
        there = {_split_of(each) for each in self.frame[column].unique()}
        return [which for which in ("train", "valid", "test") if which in there]

    def listing(self, column: str | None = None, which: str = "") -> Listing:
        """Return the images of all rows, or of those of one split by a column."""
        label, frame = self.label_column(), self.frame
        if column is not None:
            frame = frame[[_split_of(each) == which for each in frame[column]]]
        files, labels = frame[self.file_column].tolist(), frame[label].tolist()
        if (bare := next((place for place, each in enumerate(labels) if each == ""), None)) is not None:
            raise UserError(
                f"{self.path}: {files[bare]!r} has no label in the column {label!r}; give it one or remove it"
            )
        paths = [self.base / f"{file}{self.suffix}" for file in files]
        if missing := next((path for path in paths if not path.is_file()), None):
            raise UserError(f"{self.path} names {missing}, which is not there; add the file, or remove the row")
        inside = all(path.is_relative_to(self.root) for path in paths)
        return Listing(paths, labels, self.root if inside else None)


def _split_of(value: Any) -> str | None:
    return SPLIT_NAMES.get(str(value).strip().lower())


def _read(path: Path) -> Any:
    import pandas as pd  # only tables need it

    try:
        frame = pd.read_csv(path, sep=_TABLES[path.suffix.lower()], dtype=str, keep_default_na=False)
        # without a line of names, the first is an image itself
        if str(frame.columns[0]).lower().endswith(_SUFFIXES):
            frame = pd.read_csv(path, sep=_TABLES[path.suffix.lower()], dtype=str, keep_default_na=False, header=None)
            frame.columns = [f"column {number}" for number in range(1, frame.shape[1] + 1)]
    except Exception as error:
        raise UserError(f"{path} cannot be read as a table: {error_line(error)}") from error
    return frame


def _places(
    root: Path, names: Iterable[str], suffixes: Sequence[str], least: float = 1.0
) -> Iterator[tuple[Path, str]]:
    """Yield (folder, suffix) for each place in which all of the named images are, or the `least` share of them."""
    names = [*names]
    if not all(names):
        return
    bases = [root, *(root / name for name in itertools.islice(folders_in(root), _PLACES))]
    for base, suffix in itertools.product(bases, suffixes):
        missing = int(len(names) * (1 - least))
        if all((base / f"{name}{suffix}").is_file() or (missing := missing - 1) >= 0 for name in names):
            yield base, suffix


def _no_files(path: Path, root: Path, file_column: str | None) -> str:
    what = f"the column {file_column!r}" if file_column is not None else "no column"
    verb = "does not name" if file_column is not None else "names"
    return (
        f"{path}: {what} {verb} images in {root} or a folder of it, with or without their suffix; correct the names, "
        "or give data.file_column"
    )


def _nothing(root: Path) -> str:
    names = folders_in(root)
    tables = [each.name for each in _tables_in(root)]
    loose = any(each.suffix.lower() in _SUFFIXES for each in root.iterdir())
    found = f"only {names[0]!r}" if len(names) == 1 else f"the folders {', '.join(names[:5])}" if names else "no folder"
    found += f", the tables {', '.join(tables[:5])}, none of which names images that are there" if tables else ""
    found += ", and images without a class" if loose else ""
    return f"{root} holds {found}; expected {CLASS_FOLDERS}, or a .csv of files and labels beside the images"
