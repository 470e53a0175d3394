"""Predictions of a model for the samples of a split, a file or a folder."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from distrain.config import UserError
from distrain.data import Transform, build_eval_loader, given_source
from distrain.datasets.base import AnySource, Batch, is_stream, keys_of, warnings_of
from distrain.diagnose.index_errors import explaining_errors, given
from distrain.inference.outputs import (
    PredictionFile,
    Predictions,
    PredictionTable,
    open_predictions,
    predicted,
    target_columns,
)
from distrain.inference.trained import Trained, batch_size_of, log_error
from distrain.run import heartbeat
from distrain.training.context import to_device

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

_NEW_TOKENS = 128
"""Most tokens that a language model generates after a prompt."""


@dataclass(frozen=True)
class PredictionSummary:
    """What `predict_file` wrote."""

    samples: int
    skipped: list[str]
    """Why each skipped sample does not decode."""


def predict_file(target: Path | str, inputs: str, out: str, *, changed_data: bool = False) -> PredictionSummary:
    """Write the model's prediction for each sample of `inputs` that decodes to `out`.

    `inputs` is a file or folder that the data set can read, or the name of a split. `out` is a .csv or .parquet table,
    a .npy array, or FOLDER/ with a file for each sample: see `distrain.inference.outputs`. A table's columns by task:
    `prediction` and `probability` (of the predicted class, or of the positive one), `probability_NAME` for each class
    or label, `prediction` or `prediction_0`, … in the targets' own units, and `text` for what is generated. `row`
    counts the samples of `inputs`, `file` names their files where each has its own. Where samples have targets,
    `target` or `target_NAME` holds them in the same terms. Raises UserError, with nothing written, for what cannot be
    read, predicted or written so, and for a split of data that are not those of the training unless `changed_data`.
    """
    file = open_predictions(out)
    try:
        found = _predict_into(file, target, inputs, changed_data)
        file.write()
    finally:
        file.discard()
    return found


def predict_table(
    target: Path | str, inputs: Any, *, out: Path | str | None = None, changed_data: bool = False
) -> pd.DataFrame:
    """Return the table that `predict_file` writes, and write it where `out` is given; warns of what is skipped.

    `inputs` may also be arrays or a Dataset, where the data of the run are the user's own (`data.given_source`). A
    prediction with dimensions of its own is an array in the column `prediction`.
    """
    file = PredictionTable() if out is None else open_predictions(str(out))
    try:
        found = _predict_into(file, target, str(inputs) if isinstance(inputs, Path) else inputs, changed_data)
        file.write()
    finally:
        file.discard()
    for why in found.skipped:
        logger.warning(f"skipped: {why}")
    return file.table()


def _predict_into(file: PredictionFile, target: Path | str, inputs: Any, changed_data: bool) -> PredictionSummary:
    """Append the predictions for all of `inputs` to `file`."""
    trained = Trained.load(target)
    try:
        split = inputs if isinstance(inputs, str) and inputs in trained.data.splits else None
        source = _source(trained, inputs) if isinstance(inputs, str) else given_source(trained.recipe, inputs)
        trained.check_inputs(split, changed_data=changed_data)
        for warning in warnings_of(source):
            logger.warning(warning)
        skipped: dict[int, str] = {}
        heartbeat.enter_phase("evaluate")
        what = inputs if isinstance(inputs, str) else "the inputs"
        with explaining_errors(lambda: (trained.model, None), log_error):
            count = sum(_predict(trained, source, trained.transform(), what, file, skipped))
    finally:
        trained.world.close()
    return PredictionSummary(count, [why for _, why in sorted(skipped.items())])


def _source(trained: Trained, inputs: str) -> AnySource:
    data, name = trained.data, trained.recipe.data.name
    if inputs in data.splits:
        return data.splits[inputs]
    path = Path(inputs)
    if not path.exists():
        raise UserError(
            f"there is no file {inputs}, and data set {name!r} has no such split ({', '.join(data.splits)})"
        )
    if data.read is None:
        raise UserError(
            f"data set {name!r} cannot read files for prediction; name one of its splits: {', '.join(data.splits)}"
        )
    return data.read(path)


def _predict(
    trained: Trained,
    source: AnySource,
    transform: Transform,
    what: str,
    file: PredictionFile,
    skipped: dict[int, str],
) -> Iterator[int]:
    """Append the predictions of each batch to `file`, and yield their count; `skipped` gets {id: why} of others."""
    recipe, world, meta = trained.recipe, trained.world, trained.data.meta
    loader = build_eval_loader(
        source,
        rank=0,
        world_size=1,
        batch_size=batch_size_of(recipe, world_size=1),
        transform=transform,
        split=what,
        skip_corrupt=0 if is_stream(source) else len(source),
    )
    loss = trained.objective.loss
    is_probability = loss is not None and loss.takes_probabilities
    meaningless: list[int] = []
    with torch.no_grad():
        for batch in loader:
            skipped |= batch.get("corrupt_samples", {})
            ids = batch["ids"].numpy()
            keep = ids >= 0
            if not keep.any():
                continue
            given(what, [batch])
            batch = to_device(batch, world)
            if recipe.form in ("language_modeling", "seq2seq"):
                found = Predictions({"text": _generated(trained, batch)}, None)
            else:
                outputs = trained.objective.predict(trained.model, batch).cpu()
                meaningless += ids[keep & outputs.isnan().flatten(1).any(1).numpy()].tolist()
                targets = batch["targets"].cpu() if isinstance(batch.get("targets"), Tensor) else None
                found = predicted(recipe.form, outputs, targets, meta, is_probability)
                if targets is not None and found.columns:
                    found.columns.update(target_columns(recipe.form, targets, meta))
            file.append({"row": ids[keep]} | keys_of(source, ids[keep]), found.keep(keep))
            yield int(keep.sum())
    if meaningless:
        shown = ", ".join(map(str, meaningless[:8])) + (", …" if len(meaningless) > 8 else "")
        logger.warning(
            f"the model gives NaN for {len(meaningless):,} samples, whose predictions mean nothing: the rows "
            f"{shown}; look for NaN in their inputs"
        )


def _generated(trained: Trained, batch: Batch) -> list[str]:
    generate, decode = getattr(trained.model, "generate", None), trained.data.meta.decode
    if generate is None or decode is None:
        raise UserError(
            f"model {trained.recipe.model.name!r} cannot generate text: it needs a method "
            "generate(tokens, max_new_tokens)"
        )
    inputs = batch["inputs"]
    if isinstance(inputs, dict):
        source = inputs["source"]
        return [decode(row) for row in generate(source, max_new_tokens=2 * source.shape[1] + 8).tolist()]
    # one by one: generation must continue the prompt, not its padding
    lengths = batch.get("lengths", torch.full((len(inputs),), inputs.shape[1])).tolist()
    prompts = [inputs[index : index + 1, :length] for index, length in enumerate(lengths)]
    return [
        decode(generate(prompt, max_new_tokens=_max_new_tokens(trained.model, prompt))[0].tolist())
        for prompt in prompts
    ]


def _max_new_tokens(model: nn.Module, prompt: Tensor) -> int:
    """Return how many tokens to generate after a prompt (1, tokens): a transformers model has limited positions."""
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    tokens = _NEW_TOKENS if positions is None else min(_NEW_TOKENS, positions - prompt.shape[1])
    if tokens < 1:
        raise UserError(f"a prompt has {prompt.shape[1]} tokens, and the model {positions} positions; shorten it")
    return tokens
