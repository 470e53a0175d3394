"""Build data, model and optimizer; restore the checkpoint that a run resumes from.

All ranks build it together: what fails on one of them fails on all, before anything is trained.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import nn

from distrain.checkpoint import Frozen, Manifest, Reader
from distrain.checkpoints.export.companion_files import FOLDER, companions_of, keep_companions
from distrain.config import BatchSection, Horizon, Recipe, mix
from distrain.config.strategies import STRATEGIES
from distrain.data import build_data, build_loader, build_transform, float_dtype
from distrain.datasets.base import Batch, Data, is_stream, warnings_of
from distrain.datasets.batch_sizes import batch_shape
from distrain.datasets.mixing import Mixing
from distrain.datasets.order import SampleOrder
from distrain.datasets.preparing import encode_ahead, prepare_data
from distrain.datasets.transforms import Transform
from distrain.diagnose.index_errors import given
from distrain.models import build_model
from distrain.networks.blocks import checkpoint_activations
from distrain.networks.calling import calling_convention
from distrain.networks.flops import peak_of, without_storage
from distrain.networks.huggingface import PREFIX as TRANSFORMERS
from distrain.networks.summary import ModelSummary, describe_model
from distrain.optim import (
    build_optimizer,
    describe_groups,
    frozen_names,
    fused_kernel,
    make_dense,
    plan_migration,
    resolve_schedule,
    unregistered_layers,
)
from distrain.parallel import BuildSpec, World, build_strategy, prepare_to_save
from distrain.parallel.frozen import TRAINING, explaining_source, referred
from distrain.parallel.verifying import find_newest_verified
from distrain.run.folder import RunDir
from distrain.run.micro_batch import CachedMicroBatch, CacheKey, cached_micro_batch
from distrain.training.callbacks.outside_files import VARIABLE
from distrain.training.checks import horizon_of, length_warnings
from distrain.training.compiling import compile_model, resolve_compile
from distrain.training.context import TrainContext, seed_dropout, to_device
from distrain.training.coupling import check_cut, couples_samples, cut_of, describe_cut, warning
from distrain.training.documents import check_documents_apart
from distrain.training.forward import check_layers
from distrain.training.inner_loss import compute_loss_inside, logits_of
from distrain.training.skipping import Anomalies
from distrain.training.tasks import SupervisedObjective, TaskContext, build_objective
from distrain.training.updates import Inputs, take_inputs

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataPipeline:
    """What one rank reads of the data, and in which pieces."""

    recipe: Recipe
    world: World
    data: Data
    transforms: dict[str, Transform]
    """`train`, and `eval` for all other splits."""
    total_steps: int
    micro_batch_size: int
    accumulation: int
    autobatch: CachedMicroBatch | None
    """What `batch.micro: auto` was found to be, where it was tried."""

    def batches(self, start_step: int) -> Iterator[list[Batch]]:
        """Return the micro-batches of each step from this one on."""
        source = self.data.splits["train"]
        length = len(source) if not is_stream(source) else None
        return build_loader(
            source,
            SampleOrder(length, self.recipe.seed) if length is not None else None,
            recipe=self.recipe,
            rank=self.world.mesh.data_rank,
            world_size=self.world.mesh.data_size,
            micro_batch_size=self.micro_batch_size,
            start_step=start_step,
            stop_step=self.total_steps,
            transform=self.transforms["train"],
            pin_memory=self.world.device.type == "cuda",
            mixing=Mixing.of(self.recipe, self.data.meta, float_dtype(self.recipe)),
        )


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
    data = world.run_on_all(lambda: build_data(recipe, state=resumed.scalars["data"] if resumed is not None else None))
    transforms = {"train": build_transform(recipe, "train"), "eval": build_transform(recipe, "eval")}
    bare = transforms["train"]
    transforms["train"] = world.run_on_all(lambda: wrap_transform(bare))
    if transforms["train"] is not bare:  # what is around it may look at its floats
        data = replace(data, byte_images=False)
    horizon = horizon_of(recipe, data)
    assert horizon.total_steps is not None
    updated, accepted = world.run_on_rank0(lambda: (run.update_path.exists(), (run.inputs() or {}).get("cut")))
    # a proof compares all samples itself, and says why they differ
    inputs: Inputs = world.run_on_rank0(
        lambda: take_inputs(run, recipe, data, horizon.total_steps or 0, resumed, items=VARIABLE not in os.environ)
    )
    autobatch = cached_batch(run, recipe, world)
    batch: BatchSection = recipe.batch if autobatch is None else autobatch.section(recipe.batch)
    feed = DataPipeline(
        recipe,
        world,
        data,
        transforms,
        horizon.total_steps,
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
    training, model, uncounted = _training(feed, horizon, run.path / FOLDER, resumed)
    if data.packed:
        narrow = world.mixed_precision.autocast is not None
        model_call = calling_convention(training.strategy.model)
        check_documents_apart(
            training.strategy.model, model_call, data.meta.vocab_size or 0, world.device, narrow=narrow
        )
    anomalies = training.anomalies = Anomalies(run, recipe, world, fence, resumed.step if resumed is not None else 0)
    if reader is not None:
        for note in training.strategy.restore(reader):
            logger.info(note)
        anomalies.load(reader.manifest.scalars)
        training.step = reader.manifest.step
        reader.close()
    warnings = [*data.warnings, *(each for source in data.splits.values() for each in warnings_of(source))]
    warnings += length_warnings(recipe, horizon)
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
    return TrainSetup(feed, horizon, training, anomalies, resumed, skipped, model, inputs, warnings, uncounted, beside)


def _keep_beside(run: RunDir, recipe: Recipe, world: World, fence: Callable[[], None]) -> list[str] | None:
    """Keep what lies beside the weights of a transformers model, for exports; return its names. All ranks call."""
    path = recipe.model.args.get("path") if recipe.model.name.startswith(TRANSFORMERS) else None
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
) -> tuple[TrainContext, ModelSummary, nn.Module | None]:
    """Return what a step needs, the model's size, and `TrainSetup.uncounted`.

    Initial weights are loaded unless the run has `resumed` from a checkpoint that stores all of them.
    """
    recipe, world, meta = feed.recipe, feed.world, feed.data.meta
    objective = world.run_on_all(lambda: build_objective(recipe, meta))
    loss = objective.loss
    compiled = resolve_compile(recipe.train.compile, world.device)
    logits_per_sample = 0
    summary: ModelSummary | None = None
    uncounted: nn.Module | None = None
    frozen: Frozen | None = None
    initial = resumed is None or resumed.frozen is not None
    counts = world.rank == 0 and peak_of(world.device, world.precision, recipe.log.peak_tflops) is not None

    def fit(model: nn.Module) -> None:
        nonlocal summary, uncounted, logits_per_sample, frozen
        uncounted = without_storage(model) if counts else None  # before anything is put around its blocks
        names = frozen_names(model, recipe.optim)
        summary = describe_model(model, names)  # whole: a sharded one has only its shards
        frozen = referred(recipe, model, names, resumed, hashes=world.sources[world.rank] == world.rank)
        describe_groups(model, recipe.optim, horizon)
        if lost := unregistered_layers(model):
            logger.warning(
                f"{', '.join(lost)}: layers in a plain list or dict belong to no model, and are neither "
                "trained nor saved; put them into nn.ModuleList or nn.ModuleDict"
            )
        check_layers(model, world)
        per_sample = meta.tokens_per_sample
        tokens = None if per_sample is None else per_sample * feed.micro_batch_size
        logits = logits_of(recipe, world, loss, model, tokens)
        world.tune(
            recipe.tune,
            model,
            meta.input_shape,
            byte_images=feed.data.byte_images,
            fixed_shapes=feed.data.fixed_shapes,
            logits=logits,
            fused=fused_kernel(recipe.optim, model),
        )
        if world.tuning["uint8_inputs"]:
            for transform in feed.transforms.values():
                transform.leave_bytes()
        world.mixed_precision.fit(model, world.device)
        make_dense(
            model,
            recipe.optim,
            world.strategy,
            norms=recipe.optim.clip_norm is not None or recipe.anomalies.skips or recipe.anomalies.spike is not None,
            scaled=world.mixed_precision.scaled,
        )
        prepare_to_save(model, sharded=STRATEGIES[world.strategy].shards)
        checkpoint_activations(model, recipe.train.activation_checkpointing)
        chunked = world.tuning["chunked_loss"]
        logits_per_sample = (logits.count or 0) // feed.micro_batch_size if chunked else 0
        objective.bind(model, TaskContext.of(recipe, meta, world.device, kept))
        if isinstance(objective, SupervisedObjective) and (compiled.on or chunked):
            objective.inside = True
            compute_loss_inside(model, objective.loss, logits.head if chunked else "")

    def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
        section = recipe.optim
        return build_optimizer(model, section, fused=world.tuning["fused_optimizer"], horizon=horizon)

    def build() -> nn.Module:
        with explaining_source(None if resumed is None else resumed.frozen, "the run's checkpoint", TRAINING):
            model = build_model(recipe, meta, weights=initial, kept=kept)
        fit(model)
        return model

    first_step = cache(lambda: next(feed.batches(start_step=0)))

    def loss_sum(model: nn.Module, index: int) -> torch.Tensor:
        seed_dropout(world, mix(recipe.seed, "dropout", 0, world.mesh.data_rank, index))  # dropout is as then
        given("the first step", [first_step()[index]])
        found = objective.loss_sum(model, to_device(first_step()[index], world))
        return found.sum() if found.dim() else found

    plan = BuildSpec(
        model=build,
        optimizer=optimizer_of,
        loss_sum=loss_sum,
        micro_batch_size=feed.micro_batch_size,
        accumulation=feed.accumulation,
        clip_norm=recipe.optim.clip_norm,
        ema=recipe.train.ema,
        section=recipe.optim,
        migrate=lambda stored_class, keys: plan_migration(stored_class, keys, recipe.optim),
        initial=initial,
        constant=lambda: [name.removeprefix("model/") for name in frozen.tensors] if frozen is not None else (),
    )
    strategy = build_strategy(world, plan)
    strategy.state.refer(frozen)
    strategy.model.train()
    if compiled.on:
        if loss is not None:
            loss.prepare(world.device, world.mixed_precision.weights)
        world.run_on_all(lambda: compile_model(strategy.model, compiled))
    schedule = resolve_schedule(recipe.schedule, horizon)
    assert summary is not None
    return TrainContext(recipe, strategy, objective, schedule, logits_per_sample, compiled), summary, uncounted
