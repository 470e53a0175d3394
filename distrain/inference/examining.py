"""What a trained model does with the samples of a split, as values for a report."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distrain.config import UserError
from distrain.datasets.base import AnySource, Batch, is_stream, keys_of, warnings_of
from distrain.datasets.batches import Batches
from distrain.datasets.evaluation import build_eval_loader
from distrain.diagnose.index_errors import explaining_errors, given
from distrain.inference.class_tables import ClassTables
from distrain.inference.generation import GenerationOptions, Generator, before_answers, unpadded
from distrain.inference.sample_contents import described
from distrain.inference.trained import Trained, batch_size_of, log_error, writes
from distrain.networks.decoding import Sampling
from distrain.run import heartbeat
from distrain.training.context import to_device
from distrain.training.outputs import predicted, target_columns

logger = logging.getLogger(__name__)

_SCATTERED = 500
"""Points of a scatter plot."""
_GENERATED, _NEW_TOKENS = 4, 64
"""Texts that are generated, and their tokens."""


def examine(
    target: Path | str,
    split: str,
    *,
    samples: int = 8,
    limit: int = 10_000,
    changed_data: bool = False,
    initial_weights: str | None = None,
) -> dict[str, Any]:
    """Return what the model of a run or a checkpoint does with a split, as JSON values.

    At most `limit` samples are looked at, evenly spread over the split (of a stream the first). The keys:

    - `split`, `checkpoint`, `task`, `samples` (looked at), `of` (all; None for a stream), `notes` (sentences)
    - `classes`, `confusion`, `confused`, `per_class`, `calibration`: see `ClassTables`
    - `scatter`: `target` and `prediction` of a regression, in the targets' own units, and `numbers` about all of them
    - `worst`, `best`: `samples` of the greatest and of the smallest loss, with `row`, `loss`, `keys`, `prediction`,
      `target`, `confidence`, `right`, and `picture` (a PNG as a data URL), `text` or `features` (name, value)
    - `generations`: `prompt`, `text` and `reference` of a model that writes

    `changed_data` and `initial_weights` are those of `evaluate_checkpoint`. Raises UserError where the data are not
    there, or are not those of the training.
    """
    trained = Trained.load(target, initial_weights=initial_weights, to_write=True)
    try:
        if split not in trained.data.splits:
            raise UserError(
                f"data set {trained.recipe.data.name!r} has no split {split!r}; it has {', '.join(trained.data.splits)}"
            )
        changes = trained.check_inputs(split, changed_data=changed_data)
        source = trained.data.splits[split]
        heartbeat.enter_phase("evaluate")
        with explaining_errors(lambda: (trained.model, trained.objective.loss), log_error):
            found = _Examination(trained, source, split, samples).of(limit)
        return {**found, "notes": [*changes, *warnings_of(source), *found["notes"]]}
    finally:
        trained.world.close()


@dataclass
class _Sample:
    """A sample that is among the worst or the best up to now."""

    row: int
    loss: float
    about: dict[str, Any]
    inputs: Any
    """As the model read them."""


@dataclass
class _Examination:
    trained: Trained
    source: AnySource
    split: str
    wanted: int
    """How many of the worst and of the best samples to keep."""
    notes: list[str] = field(default_factory=list)
    samples: int = 0
    worst: list[_Sample] = field(default_factory=list)
    best: list[_Sample] = field(default_factory=list)
    targets: list[float] = field(default_factory=list)
    predictions: list[float] = field(default_factory=list)
    prompts: list[Batch] = field(default_factory=list)

    @torch.no_grad()
    def of(self, limit: int) -> dict[str, Any]:
        """Look at no more than `limit` samples."""
        trained, recipe = self.trained, self.trained.recipe
        loss = trained.objective.loss
        are_probabilities = loss.takes_probabilities if loss is not None else False
        ignored = getattr(loss, "ignore_index", None)
        tables = ClassTables(recipe.form, trained.data.meta, are_probabilities, ignored)
        for batch in self._batches(limit):
            ids = batch["ids"].numpy()
            given(self.split, [batch])
            self._look(to_device(batch, trained.world), ids, tables)
        if not self.samples:
            raise UserError(f"no sample of the split {self.split!r} could be read")
        if loss is None:
            self.notes.append(
                f"Task {recipe.task.name} has no loss of a single sample, so none is the worst or the best"
            )
        return {
            "split": self.split,
            "checkpoint": str(trained.checkpoint),
            "task": recipe.task.name,
            "samples": self.samples,
            "of": None if is_stream(self.source) else len(self.source),
            "notes": self.notes,
            **tables.found(),
            "scatter": self._scatter(),
            "worst": [self._shown(each) for each in self.worst],
            "best": [self._shown(each) for each in self.best],
            "generations": self._generations(),
        }

    def _batches(self, limit: int) -> Iterator[Batch]:
        """Yield the batches to look at, each with its own `ids`; those that are -1 do not count."""
        transform, size = self.trained.transform(), batch_size_of(self.trained.recipe, 1)
        if is_stream(self.source):
            whole = build_eval_loader(
                self.source, rank=0, world_size=1, batch_size=min(size, limit), transform=transform, split=self.split,
                even=False,
            )  # fmt: skip
            yield from itertools.islice(whole, max(1, limit // size))
            return
        count = len(self.source)
        rows = np.arange(count) if count <= limit else np.linspace(0, count - 1, limit).astype(np.int64)
        if not count:
            raise UserError(f"the split {self.split!r} has no samples to look at")
        batches = Batches(self.source, transform, count, once=True)
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            yield batches.batch((np.zeros(len(part), np.int64), part))

    def _look(self, batch: Batch, ids: np.ndarray, tables: ClassTables) -> None:
        keep = ids >= 0
        self.samples += int(keep.sum())
        if len(self.prompts) < _GENERATED and writes(self.trained.recipe):
            self.prompts.append(batch)
        outputs = self.trained.objective.evaluate(self.trained.model, batch, predict=True)
        loss, targets = self.trained.objective.loss, batch.get("targets")
        if loss is None or not isinstance(targets, Tensor):
            return
        values, selected = outputs.logits, loss.select(outputs)
        if not isinstance(values, Tensor):
            return
        about = self._about(values.cpu(), targets.cpu(), keep, tables, batch.get("references"))
        for place in np.flatnonzero(keep).tolist():
            one = slice(place, place + 1)
            total, count = loss.sum_and_count(_rows(selected, one), targets[one])
            mean = float(total / count) if float(count) else math.nan
            if math.isnan(mean):
                continue
            row = int(ids[place])
            self._keep(self.worst, row, mean, about(place), batch, place, key=lambda each: -each.loss)
            self._keep(self.best, row, mean, about(place), batch, place, key=lambda each: each.loss)

    def _keep(
        self,
        held: list[_Sample],
        row: int,
        loss: float,
        about: dict[str, Any],
        batch: Batch,
        place: int,
        *,
        key: Callable[[_Sample], float],
    ) -> None:
        """Hold a sample if it is among the first by `key`."""
        sample = _Sample(row, loss, about, None)
        if len(held) == self.wanted and key(sample) >= key(held[-1]):
            return
        inputs = batch["inputs"]
        sample.inputs = (
            {name: each[place] for name, each in inputs.items()} if isinstance(inputs, dict) else inputs[place]
        )
        held.append(sample)
        held.sort(key=key)
        del held[self.wanted :]

    def _about(
        self,
        values: Tensor,
        targets: Tensor,
        keep: np.ndarray,
        tables: ClassTables,
        references: Sequence[str] | None,
    ) -> Callable[[int], dict[str, Any]]:
        """Count a batch, and return what is predicted and true of each of its samples."""
        form, meta = self.trained.recipe.form, self.trained.data.meta
        tables.add(values, targets, torch.from_numpy(keep))
        if writes(self.trained.recipe) or form in ("custom", "segmentation", "token_classification"):
            return lambda place: {} if references is None else {"target": str(references[place])}
        loss = self.trained.objective.loss
        columns = predicted(form, values, targets, meta, loss is not None and loss.takes_probabilities).columns
        true = target_columns(form, targets, meta)
        if form == "regression" and "prediction" in columns and "target" in true:
            self.targets += np.asarray(true["target"])[keep].tolist()
            self.predictions += np.asarray(columns["prediction"])[keep].tolist()

        def about(place: int) -> dict[str, Any]:
            guess = _said(columns, "prediction", place)
            target = _said(true, "target", place)
            single = form in ("classification", "binary")
            sure = columns.get("probability")
            confidence = None
            if sure is not None and single:
                confidence = float(sure[place])
                confidence = max(confidence, 1 - confidence) if form == "binary" else confidence
            right = guess == target if single and guess is not None and target is not None else None
            return {"prediction": guess, "target": target, "confidence": confidence, "right": right}

        return about

    def _shown(self, sample: _Sample) -> dict[str, Any]:
        keys = keys_of(self.source, np.array([sample.row])) if not is_stream(self.source) else {}
        return {
            "row": sample.row,
            "loss": sample.loss,
            "keys": {name: str(values[0]) for name, values in keys.items() if not isinstance(values[0], list)},
            **sample.about,
            **described(self.source, sample.row, sample.inputs, self.trained.data.meta, writes(self.trained.recipe)),
        }

    def _scatter(self) -> dict[str, Any] | None:
        if len(self.targets) < 2:
            return None
        true, guess = np.array(self.targets), np.array(self.predictions)
        chosen = np.unique(np.linspace(0, len(true) - 1, min(len(true), _SCATTERED)).astype(int))
        error = guess - true
        numbers = {
            "mean absolute error": float(np.abs(error).mean()),
            "root mean square error": float(np.sqrt((error**2).mean())),
            "mean error": float(error.mean()),
            "median absolute error": float(np.median(np.abs(error))),
            "largest absolute error": float(np.abs(error).max()),
        }
        order = chosen[np.argsort(true[chosen], kind="stable")]
        return {"target": true[order].tolist(), "prediction": guess[order].tolist(), "numbers": numbers}

    def _generations(self) -> list[dict[str, str]]:
        """Return what a model that writes makes of the first samples.

        Of their sources, of conversations up to their last answer, or of the first half.
        """
        decode, recipe = self.trained.data.meta.decode, self.trained.recipe
        if not self.prompts or decode is None:
            return []
        try:
            generator = Generator(self.trained)
            prompts, references, rows = self._prompts(generator.pairs, decode)
            options = GenerationOptions(_NEW_TOKENS, Sampling())
            texts = generator.generate(prompts, options)
        except UserError as error:
            self.notes.append(f"No text was generated: {error}")
            return []
        begin = (
            "the first half of a sample" if self.trained.data.chat is None else "a conversation up to its last answer"
        )
        shown = self._sources(prompts, rows) if generator.pairs else [decode(prompt) for prompt in prompts]
        self.notes.append(
            f"Generations are of the likeliest tokens, {_NEW_TOKENS} at most"
            + ("" if recipe.form == "seq2seq" else f", after {begin}")
        )
        return [
            {"prompt": prompt, "text": found.text, "reference": reference}
            for prompt, found, reference in zip(shown, texts, references, strict=True)
        ]

    def _prompts(
        self, pairs: bool, decode: Callable[[Sequence[int]], str]
    ) -> tuple[list[list[int]], list[str], list[int]]:
        """Return prompts, what follows them in the data, and of which samples they are."""
        prompts: list[list[int]] = []
        references: list[str] = []
        rows: list[int] = []
        for batch in self.prompts:
            written = unpadded(batch, self.trained.data.meta, pairs)
            begun = before_answers(batch, written) if self.trained.data.chat is not None else written
            for place in np.flatnonzero(batch["ids"].numpy() >= 0).tolist():
                if len(prompts) == _GENERATED:
                    return prompts, references, rows
                rows.append(int(batch["ids"][place]))
                if pairs:
                    prompts.append(written[place])
                    references.append(str(batch["references"][place]) if "references" in batch else "")
                else:
                    row, end = written[place], len(begun[place])
                    if end == len(row):
                        end = max(1, min(len(row) // 2, 256))
                    prompts.append(row[:end])
                    references.append(decode(row[end : end + _NEW_TOKENS]))
        return prompts, references, rows

    def _sources(self, prompts: Sequence[Sequence[int]], rows: Sequence[int]) -> list[str]:
        """Return the sources of pairs as text, where the data set can tell, else their tokens."""
        texts = getattr(self.source, "texts", None)
        if texts is not None:
            return [str(each) for each in texts(np.array(rows))]
        return [" ".join(map(str, prompt)) for prompt in prompts]


def _rows(outputs: Any, rows: slice) -> Any:
    return tuple(each[rows] for each in outputs) if isinstance(outputs, tuple) else outputs[rows]


def _said(columns: dict[str, Any], name: str, place: int) -> str | None:
    """Return what columns say of a sample: the one of this name, or all that begin with it."""
    found = {key: each[place] for key, each in columns.items() if key == name or key.startswith(f"{name}_")}
    if name in found:
        value = found[name]
        return f"{value:.6g}" if isinstance(value, float | np.floating) else str(value)
    positive = [key.removeprefix(f"{name}_") for key, value in found.items() if value]
    if found and all(isinstance(value, bool | np.bool_) or value in (0, 1) for value in found.values()):
        return ", ".join(positive) or "none"
    return ", ".join(f"{value:.4g}" for value in found.values()) or None
