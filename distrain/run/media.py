"""Pictures, tables and texts of a run: files below RUN/media, which rows of metrics.jsonl name. Imports no torch.

    RUN/media/step-00000200/valid-samples.png

A row has them as `media`: a list of {"name", "kind", "file", "caption"}, where `file` is relative to the run folder.
"""

from __future__ import annotations

import io
import json
import math
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from distrain.run.json_files import json_safe
from distrain.system import bounded_json as bounded
from distrain.system.errors import UserError
from distrain.system.numbers import a_kind

KEY = "media"
"""Of a row."""
MOST_PIXELS = 1 << 26
MOST_CELLS = 1 << 20
MOST_CHARACTERS = 1 << 24

_SUFFIXES = {"image": "png", "table": "json", "text": "txt"}
_FILE = re.compile(r"media/step-[0-9]{8,}/[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Media:
    """A picture, table or text as a row names it."""

    name: str
    kind: Literal["image", "table", "text"]
    file: str
    """Below the run folder."""
    caption: str = ""


@dataclass(frozen=True)
class Encoded:
    """One that is not yet in the run folder."""

    name: str
    kind: Literal["image", "table", "text"]
    content: bytes
    caption: str = ""


# --------------------------------------------------------------------------------------------------------------------
# Made


def encode_image(name: str, image: Any, caption: str = "") -> Encoded:
    """Return a picture as PNG.

    `image`: a tensor or array (height, width), (channels, height, width) or (height, width, channels) with 1, 3 or 4
    channels, or a batch (n, channels, height, width), which becomes a grid; floats in [0, 1], integers in [0, 255] or
    booleans. Or a picture of Pillow. Raises UserError for other shapes and values.
    """
    from PIL import Image

    _check(name, caption)
    picture = image if isinstance(image, Image.Image) else Image.fromarray(_pixels(name, image))
    if picture.width * picture.height > MOST_PIXELS:
        raise UserError(
            f"image {name!r} has {picture.width:,} × {picture.height:,} pixels; expected at most {MOST_PIXELS:,}"
        )
    if picture.mode not in ("L", "RGB", "RGBA"):
        picture = picture.convert("RGB")
    file = io.BytesIO()
    picture.save(file, "png")
    return Encoded(name, "image", file.getvalue(), caption)


def encode_table(name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], caption: str = "") -> Encoded:
    """Return a table as JSON, {"columns": [...], "rows": [[...], ...]}.

    Cells are text, numbers (NaN included), booleans and None. Raises UserError for others, and for a row that has not a
    cell for each column.
    """
    _check(name, caption)
    names, cells = [str(column) for column in columns], [list(row) for row in rows]
    for place, row in enumerate(cells):
        if len(row) != len(names):
            raise UserError(f"table {name!r}: row {place} has {len(row)} cells for {len(names)} columns")
        cells[place] = [_cell(name, cell) for cell in row]
    if len(names) * len(cells) > MOST_CELLS:
        raise UserError(f"table {name!r} has {len(names) * len(cells):,} cells; expected at most {MOST_CELLS:,}")
    content = json.dumps(json_safe({"columns": names, "rows": cells}), ensure_ascii=False) + "\n"
    return Encoded(name, "table", content.encode(), caption)


def encode_text(name: str, text: str, caption: str = "") -> Encoded:
    """Return a text in UTF-8."""
    _check(name, caption)
    if not isinstance(text, str):
        raise UserError(f"text {name!r} is {a_kind(text)}; expected a str")
    if len(text) > MOST_CHARACTERS:
        raise UserError(f"text {name!r} has {len(text):,} characters; expected at most {MOST_CHARACTERS:,}")
    return Encoded(name, "text", json_safe(text).encode(), caption)


def _check(name: Any, caption: Any) -> None:
    for value, what in ((name, "name"), (caption, "caption")):
        if not isinstance(value, str):
            raise UserError(f"found the {what} {value!r} of a picture, table or text; expected a str")
    if not name.strip():
        raise UserError("found no name of a picture, table or text; expected a word")


def _cell(name: str, value: Any) -> Any:
    if hasattr(value, "item") and getattr(value, "shape", None) == ():  # a number of NumPy or torch
        value = value.item()
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise UserError(f"table {name!r} has a cell {type(value).__name__}; expected text, a number, true, false or None")


def _pixels(name: str, image: Any) -> Any:
    """Return (height, width) or (height, width, channels) uint8."""
    import numpy as np

    if hasattr(image, "detach"):
        tensor = image.detach()
        tensor = tensor.float() if tensor.is_floating_point() else tensor  # NumPy has no bfloat16
        image = tensor.cpu().numpy()
    pixels = np.asarray(image)
    shape = pixels.shape
    if pixels.ndim == 4:
        pixels = _grid(pixels)
    elif pixels.ndim == 3 and shape[0] in (1, 3, 4):
        pixels = pixels.transpose(1, 2, 0)
    if not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[-1] in (1, 3, 4))) or 0 in pixels.shape:
        raise UserError(
            f"image {name!r} has the shape {shape}; expected (height, width), (channels, height, width), (height, "
            "width, channels) or (n, channels, height, width) with 1, 3 or 4 channels"
        )
    pixels = pixels[..., 0] if pixels.ndim == 3 and pixels.shape[-1] == 1 else pixels
    if pixels.dtype == bool:
        return pixels.astype(np.uint8) * 255
    whole = np.issubdtype(pixels.dtype, np.integer)
    if not whole and not np.issubdtype(pixels.dtype, np.floating):
        raise UserError(f"image {name!r} is of {pixels.dtype}; expected numbers")
    least, greatest, most = float(pixels.min()), float(pixels.max()), 255 if whole else 1
    slack = 0 if whole else 1e-3  # what arithmetic in 16 bits adds
    if not (least >= -slack and greatest <= most + slack):
        raise UserError(
            f"image {name!r} has values from {least:g} to {greatest:g}; expected {'integers' if whole else 'floats'} "
            f"from 0 to {most}: scale them first"
        )
    return pixels.astype(np.uint8) if whole else (pixels.clip(0, 1) * 255).round().astype(np.uint8)


def _grid(pixels: Any) -> Any:
    """Return (n, channels, height, width) as (height, width, channels) of about as many rows as columns."""
    import numpy as np

    count, channels, height, width = pixels.shape
    across = math.ceil(math.sqrt(count))
    down = -(-count // max(across, 1))
    cells = np.zeros((down * across, channels, height, width), pixels.dtype)
    cells[:count] = pixels
    return (
        cells.reshape(down, across, channels, height, width)
        .transpose(0, 3, 1, 4, 2)
        .reshape(down * height, across * width, channels)
    )


# --------------------------------------------------------------------------------------------------------------------
# In the run folder


def write_media(
    folder: Path, step: int, place: str, found: Sequence[Encoded], fence: Callable[[], None] = lambda: None
) -> list[dict[str, Any]]:
    """Rank 0: write files below the run folder, and return what the row of `step` has as `media`.

    `place` tells those of one row from those of others of the step. The same names give the same files.
    """
    below = Path("media") / f"step-{step:08d}"
    fence()
    (folder / below).mkdir(parents=True, exist_ok=True)
    items, taken = [], set[str]()
    for each in found:
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{place}-{each.name}").strip("-.")[:120] or each.kind
        name, number = f"{stem}.{_SUFFIXES[each.kind]}", 1
        while name in taken:
            number += 1
            name = f"{stem}-{number}.{_SUFFIXES[each.kind]}"
        taken.add(name)
        path = folder / below / name
        temporary = path.with_name(f".{name}.new")
        temporary.write_bytes(each.content)
        temporary.replace(path)
        items.append(asdict(Media(each.name, each.kind, str(below / name), each.caption)))
    return items


def media_of(row: Mapping[str, Any]) -> list[Media]:
    """Return the pictures, tables and texts that a row names; raises UserError for a file outside the run's media."""
    found = row.get(KEY, [])
    if not isinstance(found, list):
        return []  # a number of an earlier version under this name
    items = []
    for each in found:
        try:
            item = bounded.as_record(Media, each)
            if item.kind not in _SUFFIXES or not _FILE.fullmatch(item.file):
                raise ValueError(f"its file is {item.file[:80]!r}")
        except ValueError as error:
            raise UserError(
                f"the row {row.get('event')!r} of step {row.get('step')} names no picture, table or text: {error}"
            ) from error
        items.append(item)
    return items


def read_table(path: Path) -> tuple[list[str], list[list[Any]]]:
    """Return columns and rows of a table; raises ValueError or OSError where it is none."""
    found = bounded.read_json(path, bounded.ROW)
    if (
        not isinstance(found, dict)
        or not isinstance(found.get("columns"), list)
        or not isinstance(found.get("rows"), list)
    ):
        raise ValueError(f"{path} holds no table")
    return found["columns"], found["rows"]


def cut_media(folder: Path, step: int) -> None:
    """Remove what is of steps after `step`, which are trained again."""
    below = folder / "media"
    for path in below.glob("step-*") if below.is_dir() else ():
        number = path.name.removeprefix("step-")
        if number.isdecimal() and int(number) > step:
            shutil.rmtree(path, ignore_errors=True)
