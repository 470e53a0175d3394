"""What the hardware makes of a run: tokens and floating-point operations per second, and memory."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from distrain.datasets.base import Batch
from distrain.datasets.nested import tensors_in
from distrain.datasets.randomness import isolated_randomness
from distrain.datasets.transforms import finished
from distrain.networks.flops import peak_of, training_flops, without_storage
from distrain.networks.undisturbed import undisturbed
from distrain.system.memory import GIB, peak_bytes
from distrain.training.callbacks.base import CallbackRun
from distrain.training.tasks.inside import run_inside
from distrain.training.tasks.objective import SupervisedObjective, TaskObjective
from distrain.training.trying import tried_objective

logger = logging.getLogger(__name__)


class Efficiency:
    """Columns of the `train` rows that are known without waiting for the device; this rank's memory."""

    def __init__(self, run: CallbackRun):
        setup = run.context.setup
        self._device = run.device
        self._tokens_per_sample = setup.feed.data.meta.tokens_per_sample
        self._uncounted = setup.uncounted
        self._objective = setup.training.objective
        self._peak = peak_of(run.device, run.context.world.precision, run.recipe.log.peak_tflops)
        self._flops_per_element: float | None = None
        """Of a forward and a backward pass, by elements of the inputs; None: not counted."""
        self._elements = 0

    def restart(self) -> None:
        """Count from here."""
        self._elements = 0

    def count(self, micro_batches: Sequence[Batch]) -> None:
        """Count what a step of this rank takes, where a share of the peak can be given.

        The operations of the first micro-batch are counted, and others take as many by the elements of their inputs:
        sequences may be longer or shorter.
        """
        if self._uncounted is not None:
            self._count_first(self._uncounted, micro_batches[0])
            self._uncounted = None
        if self._flops_per_element is not None:
            self._elements += sum(map(_elements, micro_batches))

    def _count_first(self, model: nn.Module, micro_batch: Batch) -> None:
        objective, batch = self._objective, finished(micro_batch)
        if type(objective) is TaskObjective and not objective.task.optimizers:
            run_inside(model)
            with isolated_randomness(), undisturbed(model):  # also what is not the model's own
                flops = training_flops(model, tried_objective(objective).loss_sum, batch, self._device)
        elif isinstance(objective, SupervisedObjective):
            counted = copy.copy(objective)
            function = getattr(counted.loss, "function", None)
            # counting takes a loss's tensors to the meta device, from which none comes back
            loss = without_storage(counted.loss, *[function] if isinstance(function, nn.Module) else [])
            if loss is None:
                return
            counted.loss, counted.inside = loss, False
            with undisturbed(model):
                flops = training_flops(model, counted.loss_sum, batch)
        else:
            logger.info(f"rows have no mfu: task {objective.name} couples samples, or has several optimizers")
            return
        if flops is not None and (elements := _elements(micro_batch)):
            self._flops_per_element = flops / elements

    def row(self, samples_per_s: float, seconds: float) -> dict[str, Any]:
        """Return tokens_per_s, mfu (of the `seconds` since `restart`) and the memory, those that are known."""
        found: dict[str, Any] = {}
        if self._tokens_per_sample is not None:
            found["tokens_per_s"] = samples_per_s * self._tokens_per_sample
        if self._flops_per_element is not None and self._peak is not None and seconds:
            found["mfu"] = self._elements * self._flops_per_element / (seconds * self._peak * 1e12)
        if self._device.type == "cuda":
            found["peak_memory_gib"] = torch.cuda.max_memory_allocated(self._device) / GIB
            found["reserved_memory_gib"] = torch.cuda.memory_reserved(self._device) / GIB
        else:
            found["peak_memory_gib"] = peak_bytes() / GIB
        return found


def _elements(batch: Batch) -> int:
    return sum(tensor.numel() for tensor in tensors_in(batch["inputs"]))
