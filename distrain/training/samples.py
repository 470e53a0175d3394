"""A few samples with what the model predicts for them, after each evaluation: `eval.samples`.

The samples are the same in each evaluation and on any number of processes: all ranks take all of them through the
model, as a model of which each holds a part needs all ranks, and rank 0 keeps what comes of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from copy import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distrain.config import Form, Recipe, UserError
from distrain.datasets.base import AnySource, Batch, DataMeta, is_stream, keys_of
from distrain.datasets.batches import Batches
from distrain.datasets.evaluation import build_eval_loader
from distrain.datasets.labels import IGNORED
from distrain.datasets.transforms import Transform
from distrain.parallel import Strategy
from distrain.run.media import Encoded, encode_image, encode_table
from distrain.training.context import to_device
from distrain.training.evaluation import generated_texts
from distrain.training.outputs import class_label, predicted, target_columns
from distrain.training.tasks import Objective

NAME = "samples"
_TEXT = ("language_modeling", "seq2seq")
_MOST_TEXT = 2000
"""Characters of one cell."""
_CELL = 96
"""Pixels of the longer side of a picture in a grid, at least."""


class SampleView:
    """What is shown of the samples of a run. All ranks call `take` alike."""

    def __init__(
        self, recipe: Recipe, strategy: Strategy, objective: Objective, meta: DataMeta, transform: Transform | None
    ):
        """Raises UserError for a task of one's own without a method `show`."""
        self._count, self._form = recipe.eval.samples, recipe.form
        self._strategy, self._objective, self._meta = strategy, objective, meta
        self._transform = copy(transform)
        if isinstance(self._transform, Transform):
            self._transform.leave_bytes()  # bytes can be shown as they are
        self._read: dict[str, Batch] = {}
        self._skip_corrupt = recipe.data.skip_corrupt
        if self._form == "custom" and not objective.shows:
            raise UserError(
                f"eval.samples: task {recipe.task.name!r} does not say what to show of its samples; give it a method "
                "show(model, batch) that calls log_image, log_table or log_text"
            )

    def take(self, source: AnySource, split: str) -> list[Encoded]:
        """Return what there is to show of a split's samples on rank 0, an empty list on the others."""
        if split not in self._read:
            self._read[split] = self._batch(source, split)
        host = self._read[split]
        strategy, objective = self._strategy, self._objective
        model, world = strategy.model, strategy.world
        batch = to_device(dict(host), world, again=True)
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                if objective.shows:
                    return objective.show(model, batch, keep=world.rank == 0)
                texts = self._generated(model, batch)
                outputs = None if texts is not None else objective.predict(model, batch)
        finally:
            model.train(training)
        if world.rank != 0:
            return []
        keys = {} if is_stream(source) else keys_of(source, host["ids"].numpy())
        return self._shown(host, None if outputs is None else outputs.detach().cpu(), texts, keys)

    def _batch(self, source: AnySource, split: str) -> Batch:
        """Return the samples on the host: spread evenly over the split, of a stream the first ones."""
        if is_stream(source):
            loader = build_eval_loader(
                source, rank=0, world_size=1, batch_size=self._count, transform=self._transform, split=split, even=False
            )
            return next(iter(loader))
        count = min(self._count, len(source))
        ids = np.arange(count, dtype=np.int64) * len(source) // max(count, 1)
        batches = Batches(source, self._transform, self._skip_corrupt, once=True)
        batch = batches.batch((np.zeros(count, np.int64), ids))
        batch.pop("corrupt_samples", None)  # the evaluation tells of them
        return batch

    def _generated(self, model: nn.Module, batch: Batch) -> list[str] | None:
        """Return the text that a model writes for sources; None where it does not."""
        if self._form != "seq2seq" or self._meta.decode is None or "references" not in batch:
            return None
        if not hasattr(model, "generate"):
            return None
        # each rank writes by itself
        alone = self._strategy.unsharded() if self._strategy.world.forward_is_collective else nullcontext()
        with alone:
            return generated_texts(model, batch, self._meta)[0]

    def _shown(
        self, batch: Batch, outputs: Tensor | None, texts: list[str] | None, keys: Mapping[str, Sequence[Any]]
    ) -> list[Encoded]:
        keep = (batch["ids"] >= 0).numpy()
        first = {"id": batch["ids"].tolist(), **{name: list(each) for name, each in keys.items()}}
        targets = batch["targets"]
        loss = self._objective.loss
        if self._form in _TEXT:
            columns = self._text_columns(batch, outputs, texts)
            return [_table({**first, **columns}, keep)]
        assert outputs is not None
        if self._form == "token_classification":
            return [_table({**first, **self._token_columns(batch, outputs)}, keep)]
        probabilities = loss is not None and loss.takes_probabilities
        found = predicted(self._form, outputs, targets, self._meta, probabilities)
        pictures = _pictures(batch["inputs"])
        if not found.columns:
            masks = isinstance(targets, Tensor) and found.values is not None and targets.dim() == found.values.ndim == 3
            if pictures is None or not masks:
                return []
            assert found.values is not None
            return [_masks(pictures[keep], targets.numpy()[keep], found.values[keep])]
        columns = target_columns(self._form, targets, self._meta) | {
            name: each for name, each in found.columns.items() if not name.startswith("probability_")
        }
        shown = [_table({**first, **columns}, keep)]
        if pictures is not None:
            shown.insert(0, _grid(pictures[keep], _labels(self._form, columns, targets, found.values, keep)))
        return shown

    def _text(self, tokens: Tensor) -> str:
        ids = tokens.tolist()
        text = self._meta.decode(ids) if self._meta.decode is not None else " ".join(map(str, ids))
        return text if len(text) <= _MOST_TEXT else f"{text[:_MOST_TEXT]}…"

    def _text_columns(self, batch: Batch, outputs: Tensor | None, texts: list[str] | None) -> dict[str, list[Any]]:
        """Return what should follow and what the model takes for likeliest, given all that is before each token."""
        targets = batch["targets"]
        columns = {"text": [self._text(row[row != IGNORED]) for row in targets]}
        if "references" in batch:
            columns["text"] = list(batch["references"])
        if texts is not None:
            return columns | {"predicted": texts}
        assert outputs is not None
        likeliest = outputs.argmax(-1)
        predicted_ids = zip(likeliest, targets, strict=True)
        return columns | {"predicted": [self._text(row[of != IGNORED]) for row, of in predicted_ids]}

    def _token_columns(self, batch: Batch, outputs: Tensor) -> dict[str, list[Any]]:
        targets, ignored = batch["targets"], getattr(self._objective.loss, "ignore_index", IGNORED)

        def words(row: Tensor) -> str:
            return " ".join(class_label(each, self._meta) for each in row.tolist())

        likeliest = outputs.argmax(-1)
        return {
            "target": [words(row[row != ignored]) for row in targets],
            "prediction": [words(row[of != ignored]) for row, of in zip(likeliest, targets, strict=True)],
        }


def _table(columns: Mapping[str, Any], keep: np.ndarray) -> Encoded:
    rows = [row for row, kept in zip(zip(*map(list, columns.values()), strict=True), keep, strict=True) if kept]
    return encode_table(NAME, list(columns), rows)


def _labels(
    form: Form, columns: Mapping[str, Any], targets: Tensor, values: np.ndarray | None, keep: np.ndarray
) -> list[tuple[str, bool | None]]:
    """Return what stands below each picture, and whether it is right; None where that is no question."""
    rows: list[tuple[str, bool | None]]
    if form == "multilabel":
        names = [name.removeprefix("prediction_") for name in columns if name.startswith("prediction_")]
        assert values is not None
        rows = [
            (", ".join(name for name, one in zip(names, row, strict=True) if one) or "none", bool((row == of).all()))
            for row, of in zip(values, targets.numpy() > 0.5, strict=True)
        ]
    elif "target" in columns and "prediction" in columns:
        numbers = form == "regression"
        pairs = zip(columns["target"], columns["prediction"], strict=True)
        rows = [
            (f"{of:.3g} > {one:.3g}", None) if numbers else (str(one) if of == one else f"{of} > {one}", of == one)
            for of, one in pairs
        ]
    else:
        rows = [("", None)] * len(keep)
    return [row for row, kept in zip(rows, keep, strict=True) if kept]


# --------------------------------------------------------------------------------------------------------------------
# Pictures


def _pictures(inputs: Any) -> np.ndarray | None:
    """Return (n, height, width, 3) uint8 of a batch of pictures (n, channels, height, width); None of others."""
    if not isinstance(inputs, Tensor) or inputs.dim() != 4 or inputs.shape[1] not in (1, 3) or 0 in inputs.shape:
        return None
    if inputs.dtype != torch.uint8:
        floats = inputs.float()
        least, greatest = (edge(floats, dim=(1, 2, 3), keepdim=True) for edge in (torch.amin, torch.amax))
        inside = bool(floats.min() >= 0 and floats.max() <= 1)
        # what was normalised is shown from its darkest to its brightest
        scaled = floats if inside else (floats - least) / (greatest - least).clamp(min=1e-12)
        inputs = (scaled.nan_to_num(0.0, 1.0, 0.0).clamp(0, 1) * 255).round().to(torch.uint8)
    found: np.ndarray = inputs.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    return found


def _grid(pictures: np.ndarray, labels: Sequence[tuple[str, bool | None]]) -> Encoded:
    """Return the pictures with what stands below each."""
    from PIL import Image, ImageDraw, ImageFont

    height, width = pictures.shape[1:3]
    factor = max(1, -(-_CELL // max(height, width)))
    font = ImageFont.load_default()
    line = 14
    wide = max(width * factor, _CELL)
    across = int(np.ceil(np.sqrt(len(pictures))))
    down = -(-len(pictures) // max(across, 1))
    sheet = Image.new("RGB", (max(across, 1) * (wide + 4), max(down, 1) * (height * factor + line + 4)), "white")
    draw = ImageDraw.Draw(sheet)
    for place, (picture, (label, right)) in enumerate(zip(pictures, labels, strict=True)):
        left, top = place % across * (wide + 4), place // across * (height * factor + line + 4)
        shown = Image.fromarray(picture).resize((width * factor, height * factor), Image.Resampling.NEAREST)
        sheet.paste(shown, (left, top))
        colour = {True: "#0a7d32", False: "#c0182b", None: "#333333"}[right]
        text = label.encode("latin-1", "replace").decode("latin-1")  # what the built-in font has
        draw.text((left, top + height * factor + 1), text[: wide // 6], fill=colour, font=font)
    return encode_image(NAME, sheet, "target > prediction; green: right, red: wrong")


def _masks(pictures: np.ndarray, targets: np.ndarray, values: np.ndarray) -> Encoded:
    """Return a row for each picture: itself, its mask, and the predicted mask."""
    rows = [
        np.concatenate([picture, _coloured(of), _coloured(found)], axis=1)
        for picture, of, found in zip(pictures, targets, values, strict=True)
    ]
    return encode_image(NAME, np.concatenate(rows), "picture, target, prediction")


def _coloured(mask: np.ndarray) -> np.ndarray:
    """Return (height, width, 3) uint8 of a mask (height, width) of classes; black for 0, grey for what is no class."""
    numbers = np.arange(256, dtype=np.uint32)
    # far apart for neighbours: multiples of odd numbers near parts of 256 by the golden ratio
    palette = np.stack([numbers * factor % 256 for factor in (159, 97, 223)], axis=-1).astype(np.uint8)
    classes = mask.astype(np.int64)
    return np.where((classes < 0)[..., None], np.uint8(128), palette[np.clip(classes, 0, None) % 256])
