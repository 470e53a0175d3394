"""A recipe's model and one of its micro-batches, passed forward and backward without values: what is alive when.

The model is built as a run builds it, with its parameters on the meta device, and its passes are run under
FakeTensorMode: shapes, dtypes and the graph are those of the run, and no memory is taken.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from distrain.config import BatchSection, Horizon, Recipe, TuneSection, UserError
from distrain.data import build_data, build_transform
from distrain.datasets.base import Batch, Data
from distrain.datasets.nested import map_tensors, tensors_in
from distrain.networks.meta_device import build_on_meta, take_values
from distrain.optim import Optimizers, frozen_names
from distrain.parallel import Mesh, StrategySpec, World, with_mixed_precision
from distrain.parallel.precision import MixedPrecision
from distrain.parallel.tuning import Facts, resolve_tuning
from distrain.parallel.units import has_rows, sharding_units
from distrain.parallel.unused_parameters import cast_parameters, without_values
from distrain.plan.facts import ModelFacts, OptimizerFacts, ParameterFacts, Trace
from distrain.training.checks import horizon_of
from distrain.training.compiling import NOTHING
from distrain.training.context import to_device
from distrain.training.fitting import Fitting
from distrain.training.pipeline import DataPipeline
from distrain.training.tasks import Objective, build_objective
from distrain.training.trying import tried_objective

_LOADED = 8
"""Samples that are read of the data; a larger micro-batch repeats them, as values do not matter here."""
_LOADED_OF_VARYING = 256
"""Where samples differ in length a micro-batch is as long as its longest one, so more of them are looked at."""
_NARROW = (torch.bfloat16, torch.float16)
_CPU = torch.device("cpu")
_FLASH = "_scaled_dot_product_flash_attention"
_FORMULAS = flop_registry | {
    getattr(torch.ops.aten, f"{_FLASH}_for_cpu{which}"): flop_registry[getattr(torch.ops.aten, f"{_FLASH}{which}")]
    for which in ("", "_backward")
}
"""The operations of each kernel; torch 2.11 has none for attention on a CPU, which is traced for every device."""


class _PlannedWorld(World):
    """One process of the planned world, on a device that need not be here. It computes nothing but shapes."""

    def __init__(self, precision: MixedPrecision, device_type: str, *, shards: bool):
        """`shards`: whether weights are sharded, so that a weight's cast is not kept for its next use."""
        self.mixed_precision, self.precision = precision, precision.name
        self.asked = StrategySpec("ddp")
        self.strategy, self.forward_is_collective = "ddp", shards
        self.rank, self.world_size, self.device = 0, 1, _CPU
        self.mesh, self.timeout = Mesh(0, 1, 1), timedelta(minutes=1)
        self.sources = (-1,)  # no process: what is read of files is read by the run
        self._device_type = device_type

    def tune(
        self,
        section: TuneSection,
        model: nn.Module,
        input_shape: tuple[int, ...] | None = None,
        *,
        lenient: bool = False,
        **facts: Any,
    ) -> None:
        """Resolve the section for the planned device, and set no switch of this process."""
        known = Facts(
            device=self._device_type,
            capability=(8, 0),
            precision=self.precision,
            autocast=self.mixed_precision.autocast is not None,
            deterministic=False,
            strategy=self.strategy,
            model=model,
            **facts,
        )
        self.tuning = resolve_tuning(section, known, lenient=True)


@dataclass
class Planned:
    """A recipe with its data, read once for all passes that are tried."""

    recipe: Recipe
    data: Data
    horizon: Horizon
    precision: MixedPrecision
    device_type: str
    """cuda or cpu: where the run will be."""
    loaded: Batch
    """The first samples, as a micro-batch."""
    rows: int
    """How many they are."""

    @classmethod
    def of(cls, recipe: Recipe, precision: MixedPrecision, device_type: str) -> Planned:
        """Read a recipe's data; raises UserError as a run would."""
        data = build_data(recipe)
        horizon = horizon_of(recipe, data)
        assert horizon.total_steps is not None
        rows = min(_LOADED if data.fixed_shapes else _LOADED_OF_VARYING, recipe.batch.global_batch_size)
        return cls(recipe, data, horizon, precision, device_type, {}, rows)

    def batch(self, feed: DataPipeline, size: int) -> Batch:
        """Return a micro-batch of `size` samples: the first ones, repeated where there are fewer."""
        if not self.loaded:
            several = self.recipe.model_copy(
                update={
                    "batch": BatchSection(global_batch_size=self.rows, micro_batch_size=self.rows),
                    "data": self.recipe.data.model_copy(update={"workers": 0}),
                }
            )
            read = replace(feed, recipe=several, micro_batch_size=self.rows, accumulation=1, total_steps=1)
            batches = read.batches(start_step=0)
            self.loaded = next(batches)[0]
            batches.close()  # type: ignore[attr-defined]
        rows = torch.arange(size) % self.rows
        found = dict(self.loaded)
        for key in ("inputs", "targets", "ids"):
            if key in found:
                found[key] = map_tensors(
                    lambda each: each[rows] if each.dim() and len(each) == self.rows else each, found[key]
                )
        return found


class Tracer:
    """The recipe's model as one process of the run would build it, to be passed through as often as is needed."""

    def __init__(self, planned: Planned, micro_batch_size: int, *, checkpointing: bool | str, shards: bool = False):
        """`micro_batch_size`: for what is decided by it, such as whether logits are taken in chunks.

        Raises UserError as building the model in a run would.
        """
        recipe = planned.recipe.model_copy(
            update={"train": planned.recipe.train.model_copy(update={"activation_checkpointing": checkpointing})}
        )
        self.planned = planned
        self.world = _PlannedWorld(planned.precision, planned.device_type, shards=shards)
        transforms = {"train": build_transform(recipe, "train"), "eval": build_transform(recipe, "eval")}
        self.feed = DataPipeline(
            recipe, self.world, planned.data, transforms, planned.horizon.total_steps or 1, micro_batch_size, 1, None
        )
        self.objective: Objective = build_objective(recipe, planned.data.meta)
        fitting = Fitting(self.feed, self.objective, NOTHING, planned.horizon, Path("unused"), None)
        self._spec = fitting.spec()
        try:
            self.model = build_on_meta(self._spec.model)
        except Exception:  # one that computes while it is built; what else is wrong with it, building says again
            self.model = self._spec.model()
            take_values(self.model)
        with_mixed_precision(self.world, self.model)
        self.model.train()
        self.logits_per_sample = fitting.logits_per_sample
        self._units = sharding_units(self.model)

    def trace(self, size: int) -> Trace:
        """Return a forward and a backward pass over `size` samples. Raises CannotTrace where values are needed."""
        batch = to_device(self.planned.batch(self.feed, size), self.world)
        tape, spans = _Tape(), _Spans(self._units)
        kept = [each.nbytes for key in ("inputs", "targets") for each in tensors_in(batch.get(key, ()))]
        try:
            with without_values(self.model, _CPU, tape) as mode, spans.noted(tape):
                names = {id(parameter): name for name, parameter in self.model.named_parameters()}
                with tape.watching(self.model, names):
                    with tape:
                        found = tried_objective(self.objective).loss_sum(self.model, batch)
                        total = found.sum() if found.dim() else found
                    tape.begin_backward()
                    with mode, tape:
                        total.backward()
                        del found, total
        except UserError:
            raise
        except Exception as error:
            raise CannotTrace(
                f"a pass of the model cannot be traced without values: {type(error).__name__}: {str(error)[:300]}"
            ) from error
        return tape.trace(size, sum(kept), spans.found)

    def facts(self) -> ModelFacts:
        """Return what a strategy spreads: the parameters in their units, buffers, and what the optimizer keeps."""
        model, recipe = self.model, self.planned.recipe
        frozen = set(frozen_names(model, *recipe.optimizers.values()))
        units = {id(each): 0 for each in model.parameters()}
        for number, unit in reversed([*enumerate(self._units, 1)]):
            units |= {id(each): number for each in unit.parameters()}
        cast = self._cast()
        parameters = [
            ParameterFacts(
                name,
                tuple(each.shape),
                each.element_size(),
                trained=each.requires_grad and name not in frozen,
                unit=units[id(each)],
                cast=name in cast,
                rows=has_rows(each),
            )
            for name, each in model.named_parameters()
        ]
        buffers = {id(each): each.nbytes for each in model.buffers()}
        return ModelFacts(tuple(parameters), sum(buffers.values()), self._optimizer(), self.logits_per_sample)

    def _cast(self) -> set[str]:
        dtype = self.world.mixed_precision.autocast
        if dtype is None:
            return set()
        batch = to_device(self.planned.batch(self.feed, min(2, self.planned.rows)), self.world)
        objective = tried_objective(self.objective)
        return cast_parameters(self.model, lambda model: objective.loss_sum(model, batch), _CPU, dtype) or set()

    def _optimizer(self) -> OptimizerFacts:
        """Return what an optimizer keeps and takes, from a step of it without values."""
        optimizer = self._spec.optimizer(self.model)
        parts = [*optimizer.parts.values()] if isinstance(optimizer, Optimizers) else [optimizer]
        names = " and ".join(dict.fromkeys(type(each).__name__ for each in parts))
        trained = [each for group in optimizer.param_groups for each in group["params"]]
        elements = sum(each.numel() for each in trained)
        largest = max((each.nbytes for each in trained), default=0)
        fused = any(group.get("fused") for group in optimizer.param_groups)
        for group in optimizer.param_groups:
            if group.get("fused"):
                group["fused"] = False  # its kernel is not there for shapes alone, and needs no memory of its own
            elif self.planned.device_type == "cuda" and group.get("foreach", True) is None:
                group["foreach"] = True  # as torch decides on a GPU
        together = any(group.get("foreach") for group in optimizer.param_groups)
        tape = _Tape()
        try:
            with torch.no_grad():
                for each in trained:
                    each.grad = torch.empty_like(each)
            with tape, _SomeNumbers():
                for each in parts:
                    each.step()
        except Exception:  # one that looks at values: taken for one with two moments, as most are
            return OptimizerFacts(names, 8.0, 0, 0.0, together, measured=False)
        finally:
            for each in trained:
                each.grad = None
        kept: dict[int, Tensor] = {}
        for state in optimizer.state.values():
            kept |= {id(value): value for value in tree_leaves(state) if isinstance(value, Tensor)}
        sizes = sum(each.nbytes for each in kept.values() if each.dim())
        extra = 0 if fused else max(tape.peak - sizes, 0)
        whole = sum(each.nbytes for each in trained) if together else largest
        return OptimizerFacts(
            names, sizes / max(elements, 1), sum(each.nbytes for each in kept.values()) - sizes,
            extra / max(whole, 1), together,
        )  # fmt: skip


class _SomeNumbers(TorchDispatchMode):
    """Has an optimizer find 0.5 or 1 where it reads the number in a tensor: what it keeps depends on none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            (tensor,) = args
            return 0.5 if tensor.is_floating_point() else 1
        return func(*args, **(kwargs or {}))


class CannotTrace(Exception):
    """A model that needs values: the message says which of its parts."""


class _Spans:
    """When each unit is in its forward pass, as places on a tape."""

    def __init__(self, units: list[nn.Module]):
        self._units = units
        self.found: list[tuple[int, int]] = [(0, 0) for _ in units]

    @contextmanager
    def noted(self, tape: _Tape) -> Iterator[None]:
        handles = []
        for number, unit in enumerate(self._units):
            handles.append(unit.register_forward_pre_hook(lambda *_, at=number: self._begin(at, tape)))
            handles.append(unit.register_forward_hook(lambda *_, at=number: self._end(at, tape)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _begin(self, number: int, tape: _Tape) -> None:
        if not tape.backward and self.found[number] == (0, 0):
            self.found[number] = len(tape), len(tape)

    def _end(self, number: int, tape: _Tape) -> None:
        if not tape.backward:
            self.found[number] = self.found[number][0], len(tape)


class _Tape(TorchDispatchMode):
    """Notes each operation of a pass: what it computed, and the bytes of the tensors that are alive after it.

    Tensors that are there before the pass do not count, nor gradients of parameters once they are whole.
    """

    def __init__(self) -> None:
        super().__init__()
        self.backward = False
        self.peak = 0
        self._live = self._casts = 0
        self._inside = False
        self._sizes: dict[int, tuple[int, bool]] = {}
        """Of storages that are alive, by address: bytes, and whether they are a parameter's cast."""
        self._references: dict[int, weakref.ref[Any]] = {}
        self._weights: set[int] = set()
        self._rows: list[tuple[int, int, float, int, bool, bool, bool]] = []
        self._arrivals: dict[str, int] = {}
        self._backward_at = 0

    def __len__(self) -> int:
        return len(self._rows)

    def begin_backward(self) -> None:
        self.backward, self._backward_at = True, len(self)

    @contextmanager
    def watching(self, model: nn.Module, names: dict[int, str]) -> Iterator[None]:
        """Note when the gradient of each parameter is there, and no longer count it."""
        self._weights = {each.untyped_storage()._cdata for each in model.parameters()}

        def arrived(parameter: Tensor) -> None:
            assert parameter.grad is not None
            if parameter.grad.layout is torch.strided:
                self._forget(parameter.grad.untyped_storage()._cdata)
            self._arrivals[names[id(parameter)]] = len(self)

        handles = [p.register_post_accumulate_grad_hook(arrived) for p in model.parameters() if p.requires_grad]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def trace(self, samples: int, batch_bytes: int, spans: list[tuple[int, int]]) -> Trace:
        live, casts, flops, moved, narrow, conv, kernel = (np.array(each) for each in zip(*self._rows, strict=True))
        return Trace(
            samples, batch_bytes, live, casts, flops, moved, narrow, conv, kernel, self._backward_at,
            dict(self._arrivals), tuple(spans),
        )  # fmt: skip

    def _forget(self, key: int, _: object = None) -> None:
        size, cast = self._sizes.pop(key, (0, False))
        self._references.pop(key, None)
        self._live -= size
        self._casts -= size * cast

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._inside:  # entered once more, above FakeTensorMode
            return func(*args, **kwargs)
        self._inside = True
        try:
            result = func(*args, **kwargs)
        finally:
            self._inside = False
        if func.namespace == "prim":
            return result
        given = {_key(each): each for each in tree_leaves((args, kwargs)) if _has_storage(each)}
        new = {_key(each): each for each in tree_leaves(result) if _has_storage(each) and _key(each) not in given}
        cast = func.overloadpacket.__name__ == "_to_copy" and any(key in self._weights for key in given)
        for key, tensor in new.items():
            self._note(key, tensor, cast=cast)
        writes = bool(new) or any(
            argument.alias_info is not None and argument.alias_info.is_write for argument in func._schema.arguments
        )
        flops = 0.0
        if (count := _FORMULAS.get(func.overloadpacket)) is not None:
            flops = float(count(*args, **kwargs, out_val=result))
        moved = sum(each.nbytes for each in (*given.values(), *new.values())) if writes else 0
        narrow = any(each.dtype in _NARROW for each in given.values())
        self.peak = max(self.peak, self._live)
        convolution = "conv" in func.overloadpacket.__name__
        self._rows.append((self._live, self._casts, flops, moved, narrow, convolution, writes))
        return result

    def _note(self, key: int, tensor: Tensor, *, cast: bool) -> None:
        if key in self._sizes or key in self._weights:
            return
        storage = tensor.untyped_storage()
        size = storage.nbytes()
        self._sizes[key] = size, cast
        self._live += size
        self._casts += size * cast
        self._references[key] = weakref.ref(storage, partial(self._forget, key))


def _has_storage(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
