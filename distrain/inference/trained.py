"""A trained model, ready for use."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from distrain.checkpoint import Manifest, Reader, find_checkpoint, read_manifest
from distrain.checkpoints.export.companion_files import FOLDER, run_of
from distrain.config import Recipe, UserError
from distrain.config.yaml import parse_recipe
from distrain.data import Transform, build_data, build_transform, fitted_keys
from distrain.datasets.base import AnySource, Data, DataMeta, find_dataset, is_stream
from distrain.datasets.stored_meta import meta_from_json
from distrain.datasets.waiting import reading
from distrain.diagnose.hang_diagnosis import Limits
from distrain.fingerprints import DRAWN_ANEW, changed_weights, compare, fingerprint
from distrain.parallel import World, open_world, with_mixed_precision
from distrain.parallel.frozen import initial_weights, with_initial_weights
from distrain.parallel.stored import load_task_state
from distrain.parallel.verifying import open_verified
from distrain.run import heartbeat
from distrain.system.logs import EACH_RANK
from distrain.training.padding import padded_samples, padding_warnings
from distrain.training.restored import restored_model
from distrain.training.same_data import check_same_data
from distrain.training.tasks import Objective, TaskContext, build_objective

logger = logging.getLogger(__name__)

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Trained:
    """A trained model, ready for evaluation and prediction."""

    checkpoint: Path
    recipe: Recipe
    data: Data
    model: nn.Module
    objective: Objective
    """What it was trained for."""
    world: World
    inputs: dict[str, Any]
    """Fingerprint of data and code of the training; empty where the checkpoint has none."""

    @classmethod
    def load(
        cls,
        target: Path | str,
        overrides: Sequence[str] = (),
        *,
        inputs_only: bool = False,
        reads: str | None = None,
        evaluates: Path | None = None,
        initial_weights: str | None = None,
        to_write: bool = False,
    ) -> Trained:
        """Load a run's or a checkpoint's model, with the average of its weights where one was kept. All ranks call.

        `overrides`: `data.KEY=VALUE`, of how its data are read. `inputs_only`, `reads`: see `build_data`.
        `evaluates`: a file or folder with targets, which is the split `test` then.

        `to_write`: whether a model that can is to write text. It then computes in the precision of its weights: in 16
        bits the token that is likeliest, or drawn, would depend on what else is in the batch. All else is computed as
        it was in training. `initial_weights`: where those are now that the checkpoint refers to; None: where the
        recipe says.
        """
        # the arithmetic must be known before there is a world; once there is one, rank 0's choice is everybody's, for a
        # run that is still training may write or delete a checkpoint in between
        checkpoint = find_checkpoint(target)
        recipe = _recipe_in(read_manifest(checkpoint).recipe, checkpoint)
        precision = recipe.train.precision
        if to_write and writes(recipe) and precision != "fp64":
            precision = "fp32"
        world = open_world(precision)
        try:
            found = Path(world.broadcast(str(checkpoint)))
            options = {"inputs_only": inputs_only, "reads": reads}
            return cls._load(world, found, overrides, evaluates, initial_weights, **options)
        except BaseException:
            world.close()
            raise

    @classmethod
    def _load(
        cls,
        world: World,
        checkpoint: Path,
        overrides: Sequence[str],
        evaluates: Path | None,
        initial_weights: str | None,
        **options: Any,
    ) -> Trained:
        with open_verified(world, checkpoint) as reader:
            inputs = reader.manifest.scalars.get("inputs") or {}
            recipe = _recipe_in(reader.manifest.recipe, checkpoint, overrides)
            recipe = with_initial_weights(recipe, initial_weights)
            if evaluates is not None:
                recipe = _on_file(recipe, evaluates)
            _end_waits(recipe)

            def build() -> tuple[Data, nn.Module, Objective]:
                with reading("the data set"):
                    if overrides:
                        _check_fitted(recipe, _recipe_in(reader.manifest.recipe, checkpoint), reader.manifest)
                    data = build_data(recipe, state=reader.manifest.scalars["data"], **options)
                if evaluates is not None:
                    _check_read(recipe, data, evaluates)
                model = restored_model(reader, recipe, data.meta, averaged=recipe.train.ema is not None)
                # cuDNN may choose another algorithm in each evaluation
                fixed = data.fixed_shapes and recipe.train.deterministic is not True
                facts = {"byte_images": data.byte_images, "fixed_shapes": fixed}
                world.tune(recipe.tune, model, data.meta.input_shape, lenient=True, **facts)
                objective = build_objective(recipe, data.meta)
                kept = run_of(checkpoint) / FOLDER
                context = TaskContext.of(recipe, data.meta, world.device, kept)

                def initial_model() -> nn.Module:
                    _check_initial(recipe, inputs, checkpoint)
                    return context.initial_model()

                objective.bind(model, replace(context, initial_model=initial_model))
                objective.at_step(reader.manifest.step)
                load_task_state(model, reader)
                objective.load(reader.manifest.scalars)
                return data, model.to(world.device).eval(), objective

            data, model, objective = world.run_on_all(build)
            check_same_data(world, data)
        return cls(checkpoint, recipe, data, with_mixed_precision(world, model), objective, world, inputs)

    def transform(self) -> Transform:
        """Return the transforms of what is evaluated and predicted."""
        transform = build_transform(self.recipe, "eval")
        if self.world.tuning["uint8_inputs"]:
            transform.leave_bytes()
        return transform

    def warn_of_padding(self, source: AnySource) -> None:
        """Warn where what the model computes for a sample depends on the samples beside it. All ranks call."""
        if self.data.packed or is_stream(source):  # a stream that is given may be read once only
            return
        with reading("the data set"):
            padded = padded_samples(source, self.transform(), self.data.meta, self.world)
        for found in [] if padded is None else padding_warnings(self.model, self.objective, padded, self.world):
            logger.warning(found)

    def check_inputs(self, split: str | None, *, changed_data: bool) -> list[str]:
        """Compare data and code with those of the training; returns how the data differ. All ranks call.

        Raises UserError where they do, `split` is of them, and `changed_data` does not allow it. Other code, and other
        files that it is given, are only a warning on standard error: projects change, and a checkpoint that does not
        fit does not load.
        """

        def check() -> list[str]:
            if not self.inputs:
                return []
            with reading("the data set"):
                now = fingerprint(self.recipe, self.data, None, self.checkpoint)
                # the model's own files were checked where it was built from them
                found = compare(self.inputs, now, unread=initial_weights(self.recipe)[0])
            data = [] if split is None else list(found.data)
            if data and not changed_data:
                lines = [f"the data changed since {self.checkpoint} was trained:", *(f"  {line}" for line in data)]
                lines += [] if isinstance(self.recipe.data.split, dict) else [DRAWN_ANEW]
                lines.append("Put them back as they were, or take them as they are now with --changed-data.")
                raise UserError("\n".join(lines))
            for line in [*data, *found.code, *found.model, *(found.unsure if split is not None else ())]:
                logger.warning(f"since {self.checkpoint.name} was trained: {line}")
            return data

        return self.world.run_on_rank0(check)


def writes(recipe: Recipe) -> bool:
    """Whether the model of a recipe writes text."""
    return recipe.form in ("language_modeling", "seq2seq")


def trained_model(checkpoint: Path) -> nn.Module:
    """Return the model of a checkpoint on the CPU, in eval mode, with the average of its weights where one was kept.

    Without its data the model is built from its arguments alone. Raises UserError where the checkpoint is damaged.
    """
    with Reader(checkpoint) as reader:
        recipe = _recipe_in(reader.manifest.recipe, checkpoint)
        missing: UserError | None = None
        meta = DataMeta()
        try:
            scalars = reader.manifest.scalars
            meta = (
                meta_from_json(scalars["meta"]) if "meta" in scalars else build_data(recipe, state=scalars["data"]).meta
            )
        except UserError as error:
            missing = error
        try:
            model = restored_model(reader, recipe, meta, averaged=recipe.train.ema is not None)
        except UserError as error:
            raise error if missing is None else UserError(f"{error}\nThe data are not here: {missing}") from missing
    return model.eval()


def _recipe_in(text: str, checkpoint: Path, overrides: Sequence[str] = ()) -> Recipe:
    return parse_recipe(text, f"the recipe in {checkpoint}", overrides)


def data_overrides(data: Sequence[str]) -> list[str]:
    """Return keys of the data section, `KEY=VALUE`, as overrides of the recipe; raises UserError."""
    if bad := [each for each in data if "=" not in each]:
        raise UserError(f"--data {bad[0]!r} is not KEY=VALUE")
    return [f"data.{each}" for each in data]


def _on_file(recipe: Recipe, path: Path) -> Recipe:
    """Return the recipe with a file or folder as its data; raises UserError where the data set cannot read one."""
    section, place = recipe.data, str(path.absolute())
    if not find_dataset(section, recipe.form).registered:
        raise UserError(
            f"data set {section.name!r} is your own, with arguments of its own; give it {path} by one of them, as in "
            f"--data path={path} --split test --changed-data"
        )
    split = {"train": place, "test": place}  # the state of the training is there, so nothing is fitted to them
    folder = place if path.is_dir() else str(path.absolute().parent)  # what a table's files are in
    return recipe.model_copy(update={"data": section.model_copy(update={"path": folder, "split": split})})


def _check_fitted(recipe: Recipe, trained: Recipe, manifest: Manifest) -> None:
    """Raise UserError for keys of the data that would change nothing, as a model keeps what was fitted for it."""
    if keys := fitted_keys(recipe, trained.data, manifest.scalars["data"]):
        named = ", ".join(f"data.{key}" for key in keys)
        raise UserError(
            f"{named} changes what is fitted to the training split when a run begins (statistics, categories, classes, "
            "vocabularies), and the model keeps what it was trained with; leave it as it was"
        )


def _check_read(recipe: Recipe, data: Data, path: Path) -> None:
    """Raise UserError where the data set has its samples from elsewhere."""
    place = path.absolute()
    if not any(place == file.absolute() or place in file.absolute().parents for file in data.files):
        raise UserError(
            f"data set {recipe.data.name!r} has its samples from elsewhere than {path}; name one of its splits"
        )


def _check_initial(recipe: Recipe, inputs: dict[str, Any], checkpoint: Path) -> None:
    """Raise UserError where a task would compare a model with other initial weights than it was trained beside."""
    key, path = initial_weights(recipe)
    if lines := changed_weights(inputs, recipe, key):
        shown = "".join(f"\n  {line}" for line in lines)
        raise UserError(
            f"task {recipe.task.name} compares with the initial weights, and those in {path} are not the ones that "
            f"{checkpoint} was trained with:{shown}\nPut them back as they were"
        )


def _end_waits(recipe: Recipe) -> None:
    """Let this process wait for data as long as the watchdog of a training run would, unless one looks after it."""
    if not heartbeat.now().watched:
        now, limits = heartbeat.begin(), Limits.of(recipe.watchdog)
        now.limit = lambda: limits.at(now)


def batch_size_of(recipe: Recipe, world_size: int) -> int:
    """Return how many samples go through the model at a time: no more than in training on as many processes."""
    micro = recipe.batch.micro_batch_size
    return recipe.eval.batch or (-(-recipe.batch.global_batch_size // world_size) if micro == "auto" else micro)


def log_error(error: UserError) -> None:
    """Log an error of this rank."""
    logger.error("%s", error, extra=EACH_RANK)
