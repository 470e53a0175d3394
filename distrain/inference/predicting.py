"""Predictions of a model for the samples of a split, a file or a folder."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from distrain.config import UserError
from distrain.data import given_source
from distrain.datasets.base import AnySource, Batch, is_stream, keys_of, token_places, warnings_of
from distrain.datasets.evaluation import build_eval_loader
from distrain.datasets.text import Prompts
from distrain.diagnose.index_errors import explaining_errors, given
from distrain.inference.embeddings import Embeddings
from distrain.inference.files import PredictionFile, PredictionTable, open_predictions
from distrain.inference.generating import read_prompts
from distrain.inference.generation import GenerationOptions, Generator, before_answers, unpadded
from distrain.inference.trained import SPLITS, Trained, batch_size_of, data_overrides, log_error, writes
from distrain.networks.decoding import Sampling
from distrain.run import heartbeat
from distrain.system.environment import rank_told
from distrain.system.numbers import counted
from distrain.training.company import warn_of_company
from distrain.training.context import to_device
from distrain.training.outputs import (
    Predictions,
    nested,
    predicted,
    predicted_tags,
    raw_outputs,
    target_columns,
)

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

_NEW_TOKENS = 128
"""Most tokens that a language model generates after a prompt."""

Output = Literal["predictions", "probabilities", "logits", "embeddings", "text"]
OUTPUTS: tuple[Output, ...] = ("predictions", "probabilities", "logits", "embeddings", "text")


@dataclass(frozen=True)
class PredictionSummary:
    """What `predict_file` wrote."""

    samples: int
    skipped: list[str]
    """Why each skipped sample does not decode."""


def predict_file(
    target: Path | str,
    inputs: str | None,
    out: str,
    *,
    output: Output | None = None,
    layer: str | None = None,
    data: Sequence[str] = (),
    changed_data: bool = False,
    initial_weights: str | None = None,
) -> PredictionSummary:
    """Write the model's prediction for each sample of `inputs` that decodes to `out`. All ranks call; rank 0 writes.

    `inputs` is a file or folder that the data set can read, or the name of a split; None: that of `path=…` in `data`,
    which holds keys of the recipe's data section, `KEY=VALUE`. `out`: see `distrain.inference.files`. `output`:

    - predictions, by default: a table's columns by task are `prediction` and `probability` (of the predicted class, or
      of the positive one), `probability_NAME` for each class or label, `prediction` or `prediction_0`, … in the
      targets' own units
    - probabilities, logits: of each class or label
    - of tokens with a tag each: `tokens`, and `tags`, a list for each sample
    - embeddings: what the output layer reads, or what `layer` returns
    - text, by default of a model that writes: what it generates, behind its prompt

    `row` counts the samples of `inputs`, `file` names their files where each has its own. Where samples have targets,
    `target` or `target_NAME` holds them in the same terms. The batches, and so the numbers, are the same on any number
    of processes. Raises UserError, with nothing written, for what cannot be read, predicted or written so, and for a
    split of data that are not those of the training unless `changed_data`.
    `initial_weights` is that of `Trained.load`.
    """
    path, overrides = _overrides(inputs, data)
    file = open_predictions(out) if rank_told() == 0 else None
    try:
        found = _predict_into(
            [] if file is None else [file],
            target,
            path,
            overrides,
            output,
            layer,
            changed_data=changed_data,
            initial_weights=initial_weights,
        )
    finally:
        if file is not None:
            file.discard()
    return found


def predict_table(
    target: Path | str,
    inputs: Any,
    *,
    out: Path | str | None = None,
    output: Output | None = None,
    layer: str | None = None,
    changed_data: bool = False,
) -> pd.DataFrame:
    """Return the table that `predict_file` writes, and write it where `out` is given; warns of what is skipped.

    `inputs` may also be arrays or a Dataset, where the data of the run are the user's own (`data.given_source`). A
    prediction with dimensions of its own is an array in the column `prediction`, `embedding`, `probability` or `logit`.
    """
    table = PredictionTable()
    written = [table, *([] if out is None else [open_predictions(str(out))])]
    named = str(inputs) if isinstance(inputs, Path) else inputs
    try:
        found = _predict_into(written, target, named, (), output, layer, changed_data=changed_data)
    finally:
        for file in written:
            file.discard()
    for why in found.skipped:
        logger.warning(f"skipped: {why}")
    return table.table()


def _predict_into(
    files: Sequence[PredictionFile],
    target: Path | str,
    inputs: Any,
    overrides: Sequence[str],
    output: Output | None,
    layer: str | None,
    *,
    changed_data: bool,
    initial_weights: str | None = None,
) -> PredictionSummary:
    """Write the predictions for all of `inputs` to rank 0's files."""
    if layer is not None and output != "embeddings":
        raise UserError("--layer names the layer of embeddings; add --output embeddings")
    is_split = isinstance(inputs, str) and (inputs in SPLITS or not Path(inputs).exists())
    reads = inputs if isinstance(inputs, str) and not is_split else None
    trained = Trained.load(
        target,
        overrides,
        inputs_only=not is_split,
        reads=reads,
        initial_weights=initial_weights,
        to_write=output in (None, "text"),
    )
    world = trained.world
    try:
        work = world.run_on_all(lambda: _Predictor(trained, inputs, output, layer))
        trained.check_inputs(inputs if is_split else None, changed_data=changed_data)
        for warning in warnings_of(work.source):
            logger.warning(warning)
        if work.output != "text":
            trained.warn_of_padding(work.source)
        heartbeat.enter_phase("evaluate")
        with explaining_errors(lambda: (trained.model, None), log_error):
            count = _collect(trained, work, files)
        skipped = dict(sorted(each for part in world.gather(work.skipped) for each in part.items()))
        if count == 0:
            why = next(iter(skipped.values()), "there is none")
            raise UserError(f"no sample of {work.name} could be predicted: {why}")

        def complete() -> None:
            for file in files:
                file.write()

        world.run_on_rank0(complete)
    finally:
        world.close()
    return PredictionSummary(count, list(skipped.values()))


def _overrides(inputs: str | None, data: Sequence[str]) -> tuple[str, list[str]]:
    """Return what is predicted, and the overrides of the recipe."""
    paths = [each.partition("=")[2] for each in data if each.startswith("path=")]
    if len(paths) + (inputs is not None) != 1:
        raise UserError(
            "name what is predicted once: a file, a folder or a split behind the run, or --data path=FILE; found "
            f"{', '.join([*([inputs] if inputs is not None else []), *paths]) or 'neither'}"
        )
    overrides = data_overrides([each for each in data if not each.startswith("path=")])
    return inputs if inputs is not None else paths[0], overrides


def _collect(trained: Trained, work: _Predictor, files: Sequence[PredictionFile]) -> int:
    """Have rank 0 append all predictions to its files in the order of the samples; returns how many there are."""
    world, count = trained.world, 0
    parts = work.parts()
    while True:
        mine = world.run_on_all(lambda: next(parts, None))
        everyone = world.gather(mine)
        if all(each is None for each in everyone):
            return count

        def append(everyone: list[_Part | None] = everyone) -> None:
            for index, found in itertools.chain.from_iterable(each for each in everyone if each is not None):
                for file in files:
                    file.append(index, found)

        world.run_on_rank0(append)
        count += sum(len(index["row"]) for part in everyone if part is not None for index, _ in part)


_Part = list[tuple[dict[str, Any], Predictions]]
"""What identifies the samples of a batch and what is predicted for them, in one piece or in several."""


@dataclass
class _Predictor:
    """Predicts this rank's share of a source."""

    trained: Trained
    what: Any
    """A split, a file or a folder by its name; or arrays or a Dataset."""
    output: Output | None
    layer: str | None
    source: AnySource = field(init=False)
    skipped: dict[int, str] = field(default_factory=dict)
    """{id: why} of samples that do not decode."""

    def __post_init__(self) -> None:
        recipe = self.trained.recipe
        text = writes(recipe)
        self.output = self.output or ("text" if text else "predictions")
        if self.output == "text" and not text:
            raise UserError(f"--output text: a model for task {recipe.task.name} writes none; it gives predictions")
        if self.output == "predictions" and text:
            raise UserError(
                f"--output predictions: a model for task {recipe.task.name} gives text, logits or embeddings"
            )
        if self.output == "probabilities" and recipe.form in ("regression", "custom"):
            raise UserError(
                f"--output probabilities: task {recipe.task.name} has none; it gives predictions, logits and embeddings"
            )
        self.name = self.what if isinstance(self.what, str) else "the inputs"
        self.source = _source(self.trained, self.what)
        self._embeddings = Embeddings(self.trained.model, self.layer) if self.output == "embeddings" else None
        self._generator = Generator(self.trained) if self.output == "text" else None
        loss = self.trained.objective.loss
        self._is_probability = loss is not None and loss.takes_probabilities
        self._meaningless: list[int] = []

    @torch.no_grad()
    def parts(self) -> Iterator[_Part]:
        """Yield the predictions of each batch of this rank."""
        recipe, world = self.trained.recipe, self.trained.world
        loader = build_eval_loader(
            self.source,
            rank=world.rank,
            world_size=world.world_size,
            batch_size=batch_size_of(recipe, world_size=1),
            transform=self.trained.transform(),
            workers=recipe.data.workers,
            split=self.name,
            skip_corrupt=0 if is_stream(self.source) else len(self.source),
            even=False,
        )
        untried = True
        for batch in loader:
            self.skipped |= batch.get("corrupt_samples", {})
            ids = batch["ids"].numpy()
            keep = ids >= 0
            if not keep.any():
                yield []
                continue
            given(self.name, [batch])
            index = {"row": ids[keep]} | keys_of(self.source, ids[keep])
            batch = to_device(batch, world)
            if untried and self.output != "text" and "lengths" not in batch:
                untried = False
                warn_of_company(self.trained.model, self.trained.objective, batch, world)
            yield list(self._predicted(batch, keep, index))
        if self._meaningless:
            shown = ", ".join(map(str, self._meaningless[:8])) + (", …" if len(self._meaningless) > 8 else "")
            logger.warning(
                f"the model gives NaN or infinity for {counted(len(self._meaningless), 'sample')}, whose predictions "
                f"mean nothing: the rows {shown}; look for NaN in their inputs, and for numbers that overflow"
            )

    def _predicted(
        self, batch: Batch, keep: np.ndarray, index: dict[str, Any]
    ) -> Iterator[tuple[dict[str, Any], Predictions]]:
        task, meta = self.trained.recipe.form, self.trained.data.meta
        if self.output == "text":
            yield index, Predictions({"text": self._texts(batch)}, None).keep(keep)
            return
        inputs = batch["inputs"]
        if isinstance(inputs, dict) and task == "seq2seq" and "target" not in inputs:
            raise UserError(f"--output {self.output}: these pairs have no targets, which the model reads; name a split")
        if "lengths" in batch:
            # what stands at padding is no token's: each prompt alone, as long as it is
            for row, length in enumerate(batch["lengths"].tolist()):
                alone = {"inputs": inputs[row : row + 1, :length], "ids": batch["ids"][row : row + 1]}
                values = self._values(alone, alone["ids"].numpy())
                named = {name: each[row : row + 1] for name, each in index.items()}
                if isinstance(values, Predictions):
                    yield named, values
                else:
                    yield named, raw_outputs(self.output or "", values, task, meta, self._is_probability)
            return
        values = self._values(batch, np.where(keep, batch["ids"].numpy(), -1))
        targets = batch["targets"].cpu() if isinstance(batch.get("targets"), Tensor) else None
        if isinstance(values, Tensor) and self.output == "predictions" and task == "token_classification":
            places = token_places(self.source, batch["ids"].cpu().numpy()[keep])
            if places is not None:
                rows = torch.from_numpy(keep)
                yield index, predicted_tags(values[rows], None if targets is None else targets[rows], places, meta)
                return
        if isinstance(values, Predictions):
            found = values
        elif self.output == "predictions":
            found = predicted(task, values, targets, meta, self._is_probability)
        else:
            found = raw_outputs(self.output or "", values, task, meta, self._is_probability)
        if targets is not None:
            true = Predictions(target_columns(task, targets, meta), None).keep(keep).columns
            if found.columns:
                found = found.keep(keep)
                found.columns.update(true)
                yield index, found
                return
            index = index | true
        yield index, found.keep(keep)

    def _values(self, batch: Batch, ids: np.ndarray) -> Tensor | Predictions:
        """Return the outputs of the model or of a layer, (batch, ...), or what a task predicts of several tensors.

        `ids` are -1 where they do not count.
        """

        def outputs() -> Any:
            return self.trained.objective.predict(self.trained.model, batch)

        values = outputs() if self._embeddings is None else self._embeddings.of(outputs, len(ids))
        found = values.cpu() if isinstance(values, Tensor) else nested(values, len(ids))
        parts = [found] if isinstance(found, Tensor) else map(torch.from_numpy, found.parts.values())
        bad = np.zeros(len(ids), dtype=bool)
        for each in parts:
            # an output that masks classes is -inf
            bad |= (each.isnan() | (each == math.inf)).reshape(len(ids), -1).any(1).numpy()
        self._meaningless += ids[(ids >= 0) & bad].tolist()
        return found

    def _texts(self, batch: Batch) -> list[str]:
        """Return what is generated: for a prompt behind it, for a source alone, at most about twice as long."""
        assert self._generator is not None
        generator, decode, inputs = self._generator, self.trained.data.meta.decode, batch["inputs"]
        assert decode is not None
        pairs = generator.pairs
        if isinstance(inputs, dict) and "position_ids" in inputs:
            raise UserError(
                f"--output text: a row of {self.name} holds several documents, which are no prompts; give a file of "
                "prompts, or write --output embeddings"
            )
        prompts = unpadded(batch, self.trained.data.meta, pairs)
        if self.trained.data.chat is not None and isinstance(batch.get("targets"), Tensor):
            whole, prompts = prompts, before_answers(batch, prompts)
            if any(len(prompt) == len(row) for prompt, row in zip(prompts, whole, strict=True)):
                raise UserError(
                    f"--output text: a row of {self.name} is learned from its first token on, so where its answers "
                    "begin is not known; give a file of conversations, or write --output embeddings"
                )
        for prompt in prompts:
            generator.check(prompt, "a prompt")
        limits = [2 * len(prompt) + 8 if pairs else _NEW_TOKENS for prompt in prompts]
        found = generator.generate(prompts, GenerationOptions(max(limits), Sampling()), limits=limits)
        return [each.text if pairs else decode(prompt) + each.text for prompt, each in zip(prompts, found, strict=True)]


def _source(trained: Trained, inputs: Any) -> AnySource:
    if not isinstance(inputs, str):
        return given_source(trained.recipe, inputs, trained.data.state)
    data, name = trained.data, trained.recipe.data.name
    if inputs in data.splits:
        return data.splits[inputs]
    path = Path(inputs)
    if not path.exists():
        raise UserError(
            f"there is no file {inputs}, and data set {name!r} has no such split ({', '.join(data.splits)})"
        )
    if trained.recipe.form == "language_modeling" and path.suffix == ".jsonl" and data.chat is None:
        tokens = [np.asarray(each.tokens(trained)) for each in read_prompts(path)]
        return Prompts(tokens, data.meta.eos_id or 0)
    if data.read is None:
        raise UserError(
            f"data set {name!r} cannot read files for prediction; name one of its splits: {', '.join(data.splits)}"
        )
    return data.read(path)
