"""What a recipe alone, and then a recipe with its data, must be before anything is built from them."""

from __future__ import annotations

import math
from dataclasses import replace

from distrain.config import Horizon, Recipe, RecipeError, UserError
from distrain.data import check_data
from distrain.datasets.base import Data, is_stream
from distrain.metrics import check_metrics
from distrain.models import check_model
from distrain.optim import check_optimizers, check_schedule, in_part
from distrain.training.callbacks.building import check_callbacks
from distrain.training.callbacks.trackers import check_trackers
from distrain.training.tasks import check_task


def check_recipe(recipe: Recipe, source: str) -> None:
    """Raise RecipeError with all that is wrong with a recipe's names and arguments, as far as that needs no data."""
    problems = [
        *check_data(recipe),
        *check_model(recipe),
        *check_task(recipe),
        *check_optimizers(recipe.optimizers),
        *check_schedule(recipe.schedule),
        *_own_schedules(recipe),
        *check_metrics(recipe),
        *check_callbacks(recipe),
        *check_trackers(recipe),
    ]
    if problems:
        raise RecipeError(source, problems)


def _own_schedules(recipe: Recipe) -> list[str]:
    own = {name: each for name, each in recipe.schedules.items() if each is not recipe.schedule}
    return [in_part(name, problem) for name, section in own.items() for problem in check_schedule(section)]


def check_bits(recipe: Recipe, strategy: str) -> None:
    """Raise UserError where a model with quantized weights cannot be trained as it is wanted."""
    lora = recipe.model.lora
    if lora is None or lora.bits is None:
        return
    if strategy not in ("single", "ddp"):
        raise UserError(
            f"model.lora.bits: {strategy} cuts weights and casts them, and weights of {lora.bits} bits have bytes and "
            "scales that stay as they are; use --strategy ddp, under which each process has all of them, or remove it"
        )
    if recipe.train.compile:
        raise UserError(
            "model.lora.bits: a model with quantized weights is not compiled; set train.compile to false, or remove it"
        )


def horizon_of(recipe: Recipe, data: Data) -> Horizon:
    """Return what durations mean for this recipe and data, with the total number of steps."""
    train = data.splits["train"]
    length = None if is_stream(train) else len(train)
    if length == 0:
        raise UserError(f"data set {recipe.data.name!r} has no samples to train on")
    horizon = Horizon(recipe.batch.global_batch_size, length, data.meta.tokens_per_sample)
    return replace(horizon, total_steps=horizon.steps(recipe.train.length, "train"))


def length_warnings(recipe: Recipe, horizon: Horizon) -> list[str]:
    """Return the problems where one step takes more samples than the whole training is to have."""
    length, batch, epoch = recipe.train.length, horizon.global_batch_size, horizon.samples_per_epoch
    if length.unit == "steps" or not 0 < horizon.exact_steps(length, "train") < 1:
        return []
    wanted = horizon.exact_steps(length, "train") * batch
    passes = f" ({batch / epoch:.4g} epochs)" if epoch else ""
    return [
        f"train is {length}, {math.ceil(wanted):,} samples, and the one step that is made of it takes batch.global "
        f"{batch:,}{passes}; take a batch.global of at most {math.ceil(wanted):,}, or train longer"
    ]
