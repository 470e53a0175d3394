"""What people see of a sample: its picture, its text, or its numbers."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distrain.datasets.base import AnySource, DataMeta, is_stream

_SIDE = 160
"""Most pixels of a side of a picture; a larger one is made smaller."""
_CHARACTERS = 1500
_FEATURES = 12


def described(source: AnySource, row: int, inputs: Any, meta: DataMeta, of_text: bool) -> dict[str, Any]:
    """Return `picture` (a PNG as a data URL), `text` or `features` (name, value) of a sample; {} where there is none.

    `inputs`: the sample as the model read it. Pictures are those of the data set before any transform, if it has them.
    """
    if not is_stream(source) and callable(texts := getattr(source, "texts", None)):
        [text] = texts(np.array([row]))
        return {"text": str(text)[:_CHARACTERS]}
    if of_text and meta.decode is not None:
        tokens = inputs.get("input_ids", inputs.get("target")) if isinstance(inputs, dict) else inputs
        if isinstance(tokens, Tensor) and tokens.dim() == 1:
            ids = [token for token in tokens.tolist() if token != meta.pad_id]
            return {"text": meta.decode(ids)[:_CHARACTERS]}
        return {}
    raw = inputs
    if not is_stream(source):
        fetched = source.fetch(np.array([row]))["inputs"]
        raw = fetched[0] if isinstance(fetched, list | Tensor) else {name: each[0] for name, each in fetched.items()}
    for candidate in (raw, inputs):
        if (picture := as_picture(candidate)) is not None:
            return {"picture": picture}
    return _features(inputs, meta)


def as_picture(image: Any) -> str | None:
    """Return an image (channels, height, width) of 1, 3 or 4 channels as a PNG in a data URL; None for anything else.

    Bytes are shown as they are, and numbers from 0 to 1 too; others are stretched from the least to the greatest.
    """
    if isinstance(image, np.ndarray):
        image = torch.from_numpy(image)
    if not isinstance(image, Tensor) or image.dim() != 3 or image.shape[0] not in (1, 3, 4) or min(image.shape[1:]) < 4:
        return None
    if image.dtype != torch.uint8:
        values = image.float().nan_to_num()
        low, high = values.min().item(), values.max().item()
        if low < 0 or high > 1:
            values = (values - low) / (high - low or 1.0)
        image = (255 * values).round().to(torch.uint8)
    from PIL import Image

    pixels = image.permute(1, 2, 0).contiguous().cpu().numpy()
    picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    picture.thumbnail((_SIDE, _SIDE))
    file = io.BytesIO()
    picture.save(file, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _features(inputs: Any, meta: DataMeta) -> dict[str, Any]:
    if isinstance(inputs, dict):
        flat = [(name, value) for name, value in inputs.items() if isinstance(value, Tensor)]
        pairs = [
            (f"{name} {place}" if value.numel() > 1 else str(name), number)
            for name, value in flat
            for place, number in enumerate(value.flatten()[:_FEATURES].tolist())
        ]
    elif isinstance(inputs, Tensor) and inputs.dim() <= 1:
        names = meta.feature_names
        numbers = inputs.reshape(-1).tolist()
        known = (
            names if names is not None and len(names) == len(numbers) else [str(place) for place in range(len(numbers))]
        )
        pairs = list(zip(known, numbers, strict=True))
    else:
        return {}
    more = [("…", f"{len(pairs) - _FEATURES} more")] if len(pairs) > _FEATURES else []
    return {"features": [[name, f"{number:.4g}"] for name, number in pairs[:_FEATURES]] + [list(each) for each in more]}
