"""Build data, model and optimizer; restore the checkpoint that a run resumes from.

All ranks build it together: what fails on one of them fails on all, before anything is trained.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from distrain.checkpoint import Manifest, Reader
from distrain.checkpoints.export.companion_files import FOLDER, companions_of, keep_companions
from distrain.config import BatchSection, Horizon, PartSection, Recipe
from distrain.data import build_data, build_transform
from distrain.datasets.base import warnings_of
from distrain.datasets.batch_sizes import batch_shape
from distrain.datasets.preparing import encode_ahead, prepare_data
from distrain.datasets.transforms import Transform
from distrain.networks.calling import calling_convention
from distrain.networks.huggingface import folder_of
from distrain.networks.summary import ModelSummary
from distrain.optim import full_keys, resolve_schedule
from distrain.parallel import World, build_strategy
from distrain.parallel.parameter_writes import restored
from distrain.parallel.stirring import stirred
from distrain.parallel.verifying import find_newest_verified
from distrain.run.folder import RunDir
from distrain.run.micro_batch import CachedMicroBatch, CacheKey, cached_micro_batch
from distrain.training.callbacks.outside_files import VARIABLE
from distrain.training.checks import horizon_of, length_warnings
from distrain.training.compiling import compile_model, resolve_compile
from distrain.training.context import TrainContext, Turn
from distrain.training.coupling import check_cut, couples_samples, cut_of, describe_cut, warning
from distrain.training.documents import check_documents_apart
from distrain.training.fitting import Fitting
from distrain.training.imported_settings import changed_settings
from distrain.training.padding import padded_samples, padding_warnings
from distrain.training.pipeline import DataPipeline
from distrain.training.same_data import check_same_data
from distrain.training.skipping import Anomalies
from distrain.training.sums import may_be_no_sums, sums_warnings
from distrain.training.tasks import build_objective
from distrain.training.trying import tried_model, tried_objective
from distrain.training.untrained import may_hold_parameters, untrained_warnings
from distrain.training.updates import Inputs, check_average, check_fitted, take_inputs

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainSetup:
    """All of it. What changes from here on is inside `training`."""

    feed: DataPipeline
    horizon: Horizon
    training: TrainContext
    anomalies: Anomalies
    resumed: Manifest | None
    """The checkpoint that the run resumes from; None for a new run."""
    skipped: list[tuple[Path, str]]
    """Newer checkpoints that could not be used, and why."""
    model: ModelSummary
    """The size of the model, whole, with what the recipe freezes."""
    inputs: Inputs
    """What it all depends on besides the recipe."""
    warnings: list[str]
    """What a person may want to change: of the data as they were read, and of what the recipe makes of them."""
    uncounted: nn.Module | None
    """On rank 0 a copy of the model without storage, where its operations are to be counted."""
    beside: list[str] | None
    """Files that the run has kept of the folder of a transformers model; None where it started from no folder."""

    @property
    def eval_batch_size(self) -> int:
        """Samples in one forward pass of an evaluation, unless the recipe says: as many as in training.

        Fewer where training never holds the logits whole, so that a micro-batch may have more than fit.
        """
        micro, each = self.feed.micro_batch_size, self.training.logits_per_sample
        return min(micro, max(1, EVAL_LOGITS // each)) if each else micro


EVAL_LOGITS = 2**28
"""Of a batch of an evaluation, which holds them whole: 1 GiB in fp32, and as much again for the loss."""


def set_up(
    run: RunDir,
    recipe: Recipe,
    world: World,
    fence: Callable[[], None],
    wrap_transform: Callable[[Transform], Transform] = lambda transform: transform,
) -> TrainSetup:
    """Build everything up to the first step. All ranks call.

    `fence` is called before anything is written into the run, and raises when this process may write no more.
    `wrap_transform` is given what transforms the training split, and returns what does so.
    """
    world.run_on_rank0(lambda: prepare_data(recipe))
    world.run_on_rank0(lambda: encode_ahead(recipe))
    checkpoint, skipped = find_newest_verified(world, run.checkpoints)
    reader = world.run_on_all(lambda: Reader(checkpoint, verify=False)) if checkpoint is not None else None
    resumed = reader.manifest if reader is not None else None
    if resumed is not None:
        world.run_on_rank0(lambda: check_fitted(recipe, resumed))
        world.run_on_rank0(lambda: check_average(recipe, resumed))
    data = world.run_on_all(lambda: build_data(recipe, state=resumed.scalars["data"] if resumed is not None else None))
    transforms = {"train": build_transform(recipe, "train"), "eval": build_transform(recipe, "eval")}
    bare = transforms["train"]
    transforms["train"] = world.run_on_all(lambda: wrap_transform(bare))
    if transforms["train"] is not bare:  # what is around it may look at its floats
        data = replace(data, byte_images=False)
    horizon = horizon_of(recipe, data)
    total_steps = horizon.total_steps
    assert total_steps is not None
    alone = VARIABLE not in os.environ
    if alone:  # a proof compares all samples itself, and says why they differ
        check_same_data(world, data)
    updated, accepted = world.run_on_rank0(lambda: (run.update_path.exists(), (run.inputs() or {}).get("cut")))
    inputs: Inputs = world.run_on_rank0(lambda: take_inputs(run, recipe, data, total_steps, resumed, items=alone))
    autobatch = cached_batch(run, recipe, world)
    batch: BatchSection = recipe.batch if autobatch is None else autobatch.section(recipe.batch)
    feed = DataPipeline(
        recipe,
        world,
        data,
        transforms,
        total_steps,
        *batch_shape(batch, world.mesh.data_size),
        autobatch=autobatch,
    )
    cut = cut_of(feed.micro_batch_size, world.world_size)
    before = (resumed.scalars.get("inputs") or {}).get("cut") if resumed is not None else None
    if resumed is not None and before is not None and before != cut:
        if not updated and accepted != cut:
            check_cut(before, cut, recipe.loss.name if recipe.loss else recipe.task.name)
        line = f"loss: {describe_cut(before)} -> {describe_cut(cut)}"
        inputs.lines.append(f"updated  {line}")
        if accepted != cut:
            inputs = inputs.with_change(line, resumed.step)
    beside = _keep_beside(run, recipe, world, fence)
    training, fitting = _training(feed, horizon, run.path / FOLDER, resumed)
    if data.packed:
        narrow = world.mixed_precision.autocast is not None
        model_call = calling_convention(training.strategy.model)
        model = training.strategy.model
        with stirred(training.strategy), restored(model, () if world.forward_is_collective else model.parameters()):
            check_documents_apart(model, model_call, data.meta.vocab_size or 0, world.device, narrow=narrow)
    tried = _tried(training, feed, fitting.model.parameters, run.path / FOLDER)
    anomalies = training.anomalies = Anomalies(run, recipe, world, fence, resumed.step if resumed is not None else 0)
    training.objective.load(resumed.scalars if resumed is not None else {})  # also after what was tried
    if reader is not None:
        for note in training.strategy.restore(reader):
            logger.info(note)
        anomalies.load(reader.manifest.scalars)
        training.step = reader.manifest.step
        if "imported_from" in reader.manifest.scalars:
            training.set_lr(training.step)
            for note in changed_settings(
                reader.manifest.scalars["optimizer_groups"], training.strategy.state.settings()
            ):
                logger.info(note)
        reader.close()
    warnings = [*data.warnings, *(each for source in data.splits.values() for each in warnings_of(source))]
    warnings += [*length_warnings(recipe, horizon), *tried]
    couples = before is not None or couples_samples(training, lambda: feed.batches(start_step=0))
    if couples is None:
        warnings.append(
            f"whether loss {training.objective.name} takes samples together could not be tried before the first step; "
            "if it does, it means another objective with another batch.micro or number of processes"
        )
    if couples:
        inputs.fingerprint["cut"] = cut  # in checkpoints from now on
        world.run_on_rank0(lambda: run.record_inputs(inputs.fingerprint))
        if found := warning(training.objective.name, cut, recipe.batch.global_batch_size):
            warnings.append(found)
    return TrainSetup(
        feed=feed,
        horizon=horizon,
        training=training,
        anomalies=anomalies,
        resumed=resumed,
        skipped=skipped,
        model=fitting.model,
        inputs=inputs,
        warnings=warnings,
        uncounted=fitting.uncounted,
        beside=beside,
    )


def _tried(t: TrainContext, feed: DataPipeline, parameters: int, kept: Path) -> list[str]:
    """Return the warnings for a model that reads padding, and for losses that are no sums, or have parameters."""
    data, objective, world, found = feed.data, t.objective, t.world, list[str]()
    source, transform = data.splits["train"], feed.transforms["eval"]
    padded = None if data.packed else padded_samples(source, transform, data.meta, world)
    if padded is None and not may_be_no_sums(objective) and not may_hold_parameters(objective):
        return []
    with tried_model(t, data.meta, parameters, kept) as model:
        if model is not None:
            objective = tried_objective(objective)
            if padded is not None:
                found += padding_warnings(model, objective, padded, world)
            if may_be_no_sums(objective):
                found += sums_warnings(model, objective, source, transform, world, feed.micro_batch_size)
            if may_hold_parameters(objective):
                found += untrained_warnings(model, objective, source, transform, world)
    return found


def _keep_beside(run: RunDir, recipe: Recipe, world: World, fence: Callable[[], None]) -> list[str] | None:
    """Keep what lies beside the weights of a transformers model, for exports; return its names. All ranks call."""
    path = folder_of(recipe.model)
    if path is None:
        return None

    def keep() -> list[str]:
        fence()
        for note in keep_companions(Path(path), run.path):
            logger.info(note)
        return [*companions_of(run.path / FOLDER)[0]]

    names: list[str] = world.run_on_rank0(keep)
    return names


def cached_batch(run: RunDir, recipe: Recipe, world: World) -> CachedMicroBatch | None:
    """Return what `batch.micro: auto` was found to be for such a start, or None. All ranks call; all get the same."""
    if recipe.batch.micro_batch_size != "auto":
        return None
    where = CacheKey.of(recipe, world.world_size, world.strategy, world.asked.offload, world.asked.replicate)
    found: CachedMicroBatch | None = world.run_on_rank0(lambda: cached_micro_batch(run, where))
    return found if found is not None and (found.hardware == "cpu") == (world.device.type == "cpu") else None


def _training(
    feed: DataPipeline, horizon: Horizon, kept: Path, resumed: Manifest | None
) -> tuple[TrainContext, Fitting]:
    """Return what a step needs, and what is known of its model."""
    recipe, world = feed.recipe, feed.world
    objective = world.run_on_all(lambda: build_objective(recipe, feed.data.meta))
    if objective.loss is not None:  # before passes without values, which would leave it such tensors, and compiled code
        objective.loss.prepare(world.device, world.mixed_precision.weights)
    compiled = resolve_compile(recipe.train.compile, world.device)
    fitting = Fitting(feed, objective, compiled, horizon, kept, resumed)
    strategy = build_strategy(world, fitting.spec())
    strategy.state.refer(fitting.frozen)
    strategy.model.train()
    if compiled.on:
        world.run_on_all(lambda: compile_model(strategy.model, compiled))
    turns = []
    for number, (name, section) in enumerate(recipe.optimizers.items()):
        own = recipe.schedules[name] is not recipe.schedule
        with full_keys(name if own else ""):
            schedule = resolve_schedule(recipe.schedules[name], horizon)
        every = section.every if isinstance(section, PartSection) else 1
        turns.append(Turn(name, number, section, schedule, fitting.objectives[name], every))
    return TrainContext(recipe, strategy, objective, turns, fitting.logits_per_sample, compiled), fitting
