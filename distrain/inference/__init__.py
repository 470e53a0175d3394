"""Evaluate a checkpoint on a split, and predict a file of inputs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distrain.checkpoint import find_checkpoint, read_manifest
from distrain.checkpoints.export.companion_files import FOLDER, run_of
from distrain.config import Recipe, UserError
from distrain.config.yaml import parse_recipe
from distrain.data import Transform, build_data, build_eval_loader, build_transform
from distrain.datasets.base import AnySource, Batch, Data, is_stream, keys_of, warnings_of
from distrain.datasets.waiting import reading
from distrain.diagnose.hang_diagnosis import Limits
from distrain.diagnose.index_errors import explaining_errors, given
from distrain.fingerprints import DRAWN_ANEW, compare, fingerprint
from distrain.inference.outputs import PredictionFile, Predictions, open_predictions, predicted, target_columns
from distrain.metrics import build_metrics
from distrain.models import build_model
from distrain.networks.calling import Convention, calling_convention
from distrain.optim import build_loss
from distrain.parallel import World, load_weights, open_world, with_mixed_precision
from distrain.parallel.verifying import open_verified
from distrain.run import heartbeat
from distrain.system.logs import EACH_RANK
from distrain.training.context import to_device
from distrain.training.evaluation import evaluate

logger = logging.getLogger(__name__)

_NEW_TOKENS = 128
"""Most tokens that a language model generates after a prompt."""


@dataclass(frozen=True)
class Trained:
    """A trained model, ready for evaluation and prediction."""

    checkpoint: Path
    recipe: Recipe
    data: Data
    model: nn.Module
    call: Convention
    world: World
    inputs: dict[str, Any]
    """Fingerprint of data and code of the training; empty where the checkpoint has none."""

    @classmethod
    def load(cls, target: Path | str) -> Trained:
        """Load a run's or a checkpoint's model, with the average of its weights where one was kept. All ranks call."""
        # the arithmetic must be known before there is a world; once there is one, rank 0's choice is everybody's, for a
        # run that is still training may write or delete a checkpoint in between
        checkpoint = find_checkpoint(target)
        world = open_world(_recipe_in(read_manifest(checkpoint).recipe, checkpoint).train.precision)
        try:
            return cls._load(world, Path(world.broadcast(str(checkpoint))))
        except BaseException:
            world.close()
            raise

    @classmethod
    def _load(cls, world: World, checkpoint: Path) -> Trained:
        with open_verified(world, checkpoint) as reader:
            recipe = _recipe_in(reader.manifest.recipe, checkpoint)
            _end_waits(recipe)

            def build() -> tuple[Data, nn.Module]:
                with reading("the data set"):
                    data = build_data(recipe, state=reader.manifest.scalars["data"])
                model = build_model(recipe, data.meta, weights=False, kept=run_of(checkpoint) / FOLDER)
                load_weights(model, reader, averaged=recipe.train.ema is not None)
                # cuDNN may choose another algorithm in each evaluation
                fixed = data.fixed_shapes and recipe.train.deterministic is not True
                facts = {"byte_images": data.byte_images, "fixed_shapes": fixed}
                world.tune(recipe.tune, model, data.meta.input_shape, lenient=True, **facts)
                return data, model.to(world.device).eval()

            data, model = world.run_on_all(build)
            inputs = reader.manifest.scalars.get("inputs") or {}
        return cls(
            checkpoint, recipe, data, with_mixed_precision(world, model), calling_convention(model), world, inputs
        )

    def transform(self) -> Transform:
        """Return the transforms of what is evaluated and predicted."""
        transform = build_transform(self.recipe, "eval")
        if self.world.tuning["uint8_inputs"]:
            transform.leave_bytes()
        return transform

    def check_inputs(self, split: str | None, *, changed_data: bool) -> list[str]:
        """Compare data and code with those of the training; returns how the data differ. All ranks call.

        Raises UserError where they do, `split` is of them, and `changed_data` does not allow it. Other code is only
        a warning on standard error: projects change, and a checkpoint that does not fit does not load.
        """

        def check() -> list[str]:
            if not self.inputs:
                return []
            with reading("the data set"):
                found = compare(self.inputs, fingerprint(self.recipe, self.data, None, self.checkpoint))
            data = [] if split is None else list(found.data)
            if data and not changed_data:
                lines = [f"the data changed since {self.checkpoint} was trained:", *(f"  {line}" for line in data)]
                lines += [] if isinstance(self.recipe.data.split, dict) else [DRAWN_ANEW]
                lines.append("Put them back as they were, or take them as they are now with --changed-data.")
                raise UserError("\n".join(lines))
            for line in [*data, *found.code, *(found.unsure if split is not None else ())]:
                logger.warning(f"since {self.checkpoint.name} was trained: {line}")
            return data

        return self.world.run_on_rank0(check)


def _recipe_in(text: str, checkpoint: Path) -> Recipe:
    return parse_recipe(text, f"the recipe in {checkpoint}")


def _end_waits(recipe: Recipe) -> None:
    """Let this process wait for data as long as the watchdog of a training run would, unless one looks after it."""
    if not heartbeat.now().watched:
        now, limits = heartbeat.begin(), Limits.of(recipe.watchdog)
        now.limit = lambda: limits.at(now)


def _batch_size(recipe: Recipe, world_size: int) -> int:
    """Return how many samples go through the model at a time: no more than in training on as many processes."""
    micro = recipe.batch.micro_batch_size
    return recipe.eval.batch or (-(-recipe.batch.global_batch_size // world_size) if micro == "auto" else micro)


def evaluate_checkpoint(target: Path | str, split: str, *, changed_data: bool = False) -> dict[str, Any]:
    """Return the metrics of a run's or a checkpoint's model on a split, with its checkpoint. All ranks call.

    Raises UserError for data that are not those of the training; with `changed_data` the result says how they differ.
    """
    trained = Trained.load(target)
    try:
        return _evaluate(trained, split, changed_data)
    finally:
        trained.world.close()


def _evaluate(trained: Trained, split: str, changed_data: bool) -> dict[str, Any]:
    recipe, data, world = trained.recipe, trained.data, trained.world
    if split not in data.splits:
        raise UserError(f"data set {recipe.data.name!r} has no split {split!r}; it has {', '.join(data.splits)}")
    changes = trained.check_inputs(split, changed_data=changed_data)
    source = data.splits[split]
    for warning in warnings_of(source):
        logger.warning(warning)
    loss, metrics = build_loss(recipe, data.meta), build_metrics(recipe, data.meta)
    heartbeat.enter_phase("evaluate")
    with explaining_errors(lambda: (trained.model, loss), _log_error):
        values = evaluate(
            trained.model,
            trained.call,
            source,
            world=world,
            loss=loss,
            metrics=metrics,
            batch_size=_batch_size(recipe, world.world_size),
            transform=trained.transform(),
            workers=recipe.data.workers,
            decode=data.meta.decode,
            split=split,
            skip_corrupt=recipe.data.skip_corrupt,
        )
    nothing = metrics.caveats | ({"loss": values["nonfinite"]} if "nonfinite" in values else {})
    for name, why in nothing.items():
        logger.warning(f"{name} on split '{split}' says nothing: {why}")
    result: dict[str, Any] = {"checkpoint": str(trained.checkpoint), "split": split, "processes": world.world_size}
    return result | ({"changed_data": changes} if changes else {}) | values


def _log_error(error: UserError) -> None:
    logger.error("%s", error, extra=EACH_RANK)


# --------------------------------------------------------------------------------------------------------------------
# Predicting


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
        trained = Trained.load(target)
        source = _source(trained, inputs)
        trained.check_inputs(inputs if inputs in trained.data.splits else None, changed_data=changed_data)
        for warning in warnings_of(source):
            logger.warning(warning)
        skipped: dict[int, str] = {}
        heartbeat.enter_phase("evaluate")
        with explaining_errors(lambda: (trained.model, None), _log_error):
            count = sum(_predict(trained, source, trained.transform(), inputs, file, skipped))
        file.write()
    finally:
        file.discard()
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
        batch_size=_batch_size(recipe, world_size=1),
        transform=transform,
        split=what,
        skip_corrupt=0 if is_stream(source) else len(source),
    )
    is_probability = build_loss(recipe, meta).takes_probabilities
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
            if recipe.task in ("language_modeling", "seq2seq"):
                found = Predictions({"text": _generated(trained, batch)}, None)
            else:
                outputs = trained.call(trained.model, batch["inputs"]).logits.cpu()
                meaningless += ids[keep & outputs.isnan().flatten(1).any(1).numpy()].tolist()
                targets = batch["targets"].cpu() if isinstance(batch.get("targets"), Tensor) else None
                found = predicted(recipe.task, outputs, targets, meta, is_probability)
                if targets is not None and found.columns:
                    found.columns.update(target_columns(recipe.task, targets, meta))
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
