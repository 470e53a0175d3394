"""A run's model on its way from its builder to a strategy: what is done to it, and noted of it, while it is whole."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distrain.checkpoint import Frozen, Manifest
from distrain.config import Horizon, mix
from distrain.config.strategies import STRATEGIES
from distrain.datasets.base import Batch
from distrain.diagnose.index_errors import given
from distrain.models import build_model
from distrain.networks.blocks import checkpoint_activations
from distrain.networks.flops import peak_of, without_storage
from distrain.networks.summary import ModelSummary, describe_model
from distrain.optim import (
    StateMigration,
    build_optimizers,
    check_parts,
    describe_groups,
    frozen_names,
    full_keys,
    fused_kernel,
    make_dense,
    plan_migration,
    unregistered_layers,
)
from distrain.parallel import BuildSpec, check_hooks, prepare_to_save
from distrain.parallel.frozen import TRAINING, explaining_source, referred
from distrain.parallel.tuning import Logits
from distrain.training.compiling import Compiled
from distrain.training.context import seed_dropout, to_device
from distrain.training.forward import check_layers
from distrain.training.inner_loss import compute_loss_inside, logits_of
from distrain.training.pipeline import DataPipeline
from distrain.training.tasks import Objective, SupervisedObjective, TaskContext
from distrain.training.trying import parameters_beside, tried_objective

logger = logging.getLogger(__name__)


class Fitting:
    """Builds the model and its optimizer for a strategy."""

    model: ModelSummary
    """The size of the model, whole, with what the recipe freezes."""
    uncounted: nn.Module | None = None
    """On rank 0 a copy of the model without storage, where its operations are to be counted."""
    frozen: Frozen | None = None
    """What checkpoints refer to, and do not store."""
    objectives: Mapping[str, Objective]
    """What trains each optimizer, by its name."""
    logits_per_sample = 0
    """Of a language model whose loss is computed in chunks of them."""

    def __init__(
        self,
        feed: DataPipeline,
        objective: Objective,
        compiled: Compiled,
        horizon: Horizon,
        kept: Path,
        resumed: Manifest | None,
    ):
        """Initial weights are loaded unless the run has `resumed` from a checkpoint that stores all of them."""
        self.feed, self.recipe, self.world, self.meta = feed, feed.recipe, feed.world, feed.data.meta
        self._objective, self._compiled, self._horizon = objective, compiled, horizon
        self._kept, self._resumed = kept, resumed
        self._initial = resumed is None or resumed.frozen is not None

    def spec(self) -> BuildSpec:
        """Return what a strategy is built from."""
        recipe = self.recipe
        clips = {name: section.clip_norm for name, section in recipe.optimizers.items()}
        return BuildSpec(
            model=self._build,
            optimizer=self._optimizer,
            loss_sum=self._loss_sum,
            micro_batch_size=self.feed.micro_batch_size,
            accumulation=self.feed.accumulation,
            clip_norm=clips.get("", clips),
            ema=recipe.train.ema,
            sections=recipe.optimizers,
            migrate=self._migrate,
            initial=self._initial,
            constant=self._constant,
            beside=lambda: parameters_beside(self._objective),
        )

    def _build(self) -> nn.Module:
        stored = None if self._resumed is None else self._resumed.frozen
        with explaining_source(stored, "the run's checkpoint", TRAINING):
            model = build_model(self.recipe, self.meta, weights=self._initial, kept=self._kept)
        self._note(model)
        logits = self._tune(model)
        self._wrap(model, logits)
        return model

    def _note(self, model: nn.Module) -> None:
        recipe, world = self.recipe, self.world
        if world.rank == 0 and peak_of(world.device, world.precision, recipe.log.peak_tflops) is not None:
            self.uncounted = without_storage(model)  # before anything is put around its blocks
        sections = recipe.optimizers
        check_parts(model, sections)
        names = frozen_names(model, *sections.values())
        if self.uncounted is not None:  # what is frozen has no gradients to compute
            for name, parameter in self.uncounted.named_parameters():
                parameter.requires_grad_(parameter.requires_grad and name not in names)
        self.model = describe_model(model, names)  # whole: a sharded one has only its shards
        self.frozen = referred(recipe, model, names, self._resumed, hashes=world.sources[world.rank] == world.rank)
        for name, section in sections.items():
            with full_keys(name):
                describe_groups(model, section, self._horizon)
        if lost := unregistered_layers(model):
            logger.warning(
                f"{', '.join(lost)}: layers in a plain list or dict belong to no model, and are neither "
                "trained nor saved; put them into nn.ModuleList or nn.ModuleDict"
            )
        check_layers(model, world)

    def _tune(self, model: nn.Module) -> Logits:
        recipe, world, feed = self.recipe, self.world, self.feed
        per_sample = self.meta.tokens_per_sample
        tokens = None if per_sample is None else per_sample * feed.micro_batch_size
        logits = logits_of(recipe, world, self._objective.loss, model, tokens)
        self._kernels = {name: fused_kernel(section, model) for name, section in recipe.optimizers.items()}
        world.tune(
            recipe.tune,
            model,
            self.meta.input_shape,
            byte_images=feed.data.byte_images,
            fixed_shapes=feed.data.fixed_shapes,
            logits=logits,
            fused=min(self._kernels.values(), key=("gpu", "exact", "own", None).index),
        )
        if world.tuning["uint8_inputs"]:
            for transform in feed.transforms.values():
                transform.leave_bytes()
        return logits

    def _wrap(self, model: nn.Module, logits: Logits) -> None:
        recipe, world, objective = self.recipe, self.world, self._objective
        sections = recipe.optimizers
        world.mixed_precision.fit(model, world.device)
        make_dense(
            model,
            sections.values(),
            world.strategy,
            norms=any(each.clip_norm is not None for each in sections.values())
            or recipe.anomalies.skips
            or recipe.anomalies.spike is not None,
            scaled=world.mixed_precision.scaled,
        )
        if world.forward_is_collective:  # it gathers others into the place of the parameters
            check_hooks(model, world.strategy)
        objective.bind(model, TaskContext.of(recipe, self.meta, world.device, self._kept))
        prepare_to_save(model, sharded=STRATEGIES[world.strategy].shards)
        checkpoint_activations(model, recipe.train.activation_checkpointing)
        chunked = world.tuning["chunked_loss"]
        self.logits_per_sample = (logits.count or 0) // self.feed.micro_batch_size if chunked else 0
        self.objectives = {name: objective.of(name) if name else objective for name in sections}
        if isinstance(objective, SupervisedObjective) and (self._compiled.on or chunked):
            objective.inside = True
            compute_loss_inside(model, objective.loss, logits.head if chunked else "")

    def _optimizer(self, model: nn.Module) -> Any:
        fused = {
            name: self.world.tuning["fused_optimizer"] and kernel in ("gpu", "exact")
            for name, kernel in self._kernels.items()
        }
        return build_optimizers(model, self.recipe.optimizers, fused=fused, horizon=self._horizon)

    def _migrate(self, stored_class: str, keys: Collection[str], optimizer: str = "") -> StateMigration:
        return plan_migration(stored_class, keys, self.recipe.optimizers[optimizer])

    def _constant(self) -> Sequence[str]:
        return () if self.frozen is None else [name.removeprefix("model/") for name in self.frozen.tensors]

    @cached_property
    def _first_step(self) -> list[Batch]:
        return next(self.feed.batches(start_step=0))

    def _loss_sum(self, model: nn.Module, index: int, optimizer: str = "") -> torch.Tensor:
        """Return the loss (0-d) of a micro-batch of the first step: all losses, or those of one of several optimizers.

        Dropout is as then. Neither the task nor the loss keeps anything of it.
        """
        world = self.world
        seed_dropout(world, mix(self.recipe.seed, "dropout", 0, world.mesh.data_rank, index))
        given("the first step", [self._first_step[index]])
        objective = tried_objective(self.objectives[optimizer] if optimizer else self._objective)
        found = objective.loss_sum(model, to_device(self._first_step[index], world))
        return found.sum() if found.dim() else found
