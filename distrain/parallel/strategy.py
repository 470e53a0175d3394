"""`Strategy`, the protocol: a model and its optimizer among the processes of a world, as primitives of a step."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from types import MethodType
from typing import Any

import accelerate
import torch
import torch.distributed as dist
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn

from distrain.checkpoint import Reader
from distrain.config import OptimSection, UserError
from distrain.optim import THAW, Ema, canonical_name, classes_of, drop_frozen, parts_of
from distrain.parallel import determinism
from distrain.parallel.comm import World
from distrain.parallel.contents import modules_with_extra_state
from distrain.parallel.model_tensors import (
    as_bytes,
    buffer_slots,
    give_back,
    remember,
    share_tensors,
    travels,
    values_of,
)
from distrain.parallel.optimizer_restoring import MigrationPlanner
from distrain.parallel.parameter_writes import Unwritten, check_alike, late, looks_at, same_bits
from distrain.parallel.precision import LossScale, load_scales
from distrain.parallel.shards import Shard
from distrain.parallel.snapshot import Snapshot
from distrain.parallel.state import TrainingState
from distrain.parallel.step_record import StepFlags, StepRecord


@dataclass(frozen=True)
class BuildSpec:
    """What a strategy is built from. All ranks call its functions alike."""

    model: Callable[[], nn.Module]
    """Builds the whole model on the CPU, or on the meta device where parameters go there; see `build_in_shards`."""
    optimizer: Callable[[nn.Module], Any]
    """Builds the optimizer, or `Optimizers`, and stops frozen parameters from being trained."""
    loss_sum: Callable[..., Tensor]
    """Returns the loss (0-d) of a model, wrapped or not, on a micro-batch of the first step, by its number there. Where
    there are several optimizers it takes `optimizer`, the name of the one whose losses these are."""
    micro_batch_size: int
    accumulation: int
    clip_norm: float | Mapping[str, float | None] | None
    ema: float | None
    sections: Mapping[str, OptimSection] = field(default_factory=dict)
    """The recipe's sections for optimizers by name, to check that they can be sharded; none skips the check."""
    migrate: MigrationPlanner | None = None
    """Returns what an optimizer, by name, loads from the state of another class; None loads that of its own only."""
    initial: bool = True
    """Whether to fill in the initial weights; otherwise a checkpoint follows."""
    constant: Callable[[], Collection[str]] = tuple
    """Returns the names of frozen parameters that checkpoints refer to, once the model was built."""
    beside: Callable[[], Iterable[nn.Parameter]] = tuple
    """Returns the parameters of what else `loss_sum` computes with: a task may write into those of a teacher."""

    def loss_of(self, optimizer: str) -> Callable[[nn.Module, int], Tensor]:
        """Return `loss_sum` of one of several optimizers; without a name that of all losses."""
        return partial(self.loss_sum, optimizer=optimizer) if optimizer else self.loss_sum


NOTHING = nullcontext()
"""The context that does nothing: one for all."""


class Strategy(ABC):
    """A model and its optimizer among the processes of a world. Every method is called by all ranks."""

    model: nn.Module
    """Unwrapped, with canonical names; evaluates."""
    wrapped: nn.Module
    """What a training step calls; the model, or a wrapper around it."""
    optimizer: Any
    """Has the `param_groups` in which the learning rate is set."""
    state: TrainingState

    def __init__(self, world: World, plan: BuildSpec):
        self.world = world
        self.clip_norm = plan.clip_norm
        self.accumulation = plan.accumulation
        names = (plan.sections or ("",)) if world.mixed_precision.scaled else ()
        self._scales = {name: LossScale() for name in names}
        """Of the losses of each optimizer: where one's gradients are large, those of the others stay above zero."""
        self.scale: LossScale | None = self._scales.get("")
        """That of the optimizer that acts; None where losses are not scaled."""
        self._buffers: list[tuple[dict[str, Tensor | None], str]] | None = None
        self._extra: dict[str, nn.Module] = {}
        self._gradients: dict[str, int] | None = None
        """Bytes by dtype."""
        self._has_sparse_gradient = False
        self._first = True
        self._all_used: Tensor | None = None
        self._step = 0
        """The step under way, from 0."""
        self._thaws = False
        """Whether some parameters are not trained before a step; see `optim/freezing.py`."""
        self._acting: Any = None
        """The optimizer that `apply` has step: the only one, or in its turn one of several."""
        self._others: dict[str, list[Tensor]] = {}
        """For each of several optimizers what the others train."""
        self._begun = 0
        """Steps of this attempt, with the one under way."""
        self._looks = True
        """Whether parameters are compared before and after the forward passes of the step under way."""
        self._kept: list[tuple[nn.Parameter, Tensor]] = []
        """Those before the passes under way, and what they were, where the step may be made again."""
        self._written: dict[nn.Parameter, None] = {}
        """Those that the model's own code has written into in such a pass."""
        self._unwritten: Unwritten | None = None
        """The others; None until they are asked for."""
        self._versions: list[int] = []
        """Of these before the passes under way, which may be the first that write into one."""

    # ----------------------------------------------------------------------------------------------------------------
    # A step

    def begin_step(self, step: int) -> None:
        """Begin `step`, from 0: what is not trained yet gets no gradient in it."""
        self._step = step
        self._begun += 1
        self._looks = looks_at(self._begun)

    def _take_optimizer(self) -> None:
        """Have the optimizer pass over what is not trained yet, and note what each of several trains. Call it once."""
        self._thaws = any(THAW in group for group in self.optimizer.param_groups)
        parts = parts_of(self.optimizer)
        if self._thaws:
            for part in parts.values():
                # also where DeepSpeed hands it gradients within its own step
                part.register_step_pre_hook(lambda optimizer, *_: self._drop_frozen(optimizer))
        self._acting = self.optimizer
        own = {name: [p for group in part.param_groups for p in group["params"]] for name, part in parts.items()}
        self._others = {name: [p for key in own if key != name for p in own[key]] for name in own}

    def only(self, name: str) -> AbstractContextManager[None]:
        """Return the context in which one of several optimizers acts: what it does not train gets no gradient.

        Without a name all that is trained gets one.
        """
        return self._only(name) if name else NOTHING

    @contextmanager
    def _only(self, name: str) -> Iterator[None]:
        before, self._acting, self.scale = self._acting, self.optimizer.parts[name], self._scales.get(name)
        self._need_gradients(self._others[name], False)
        try:
            yield
        finally:
            self._acting, self.scale = before, None
            self._need_gradients(self._others[name], True)

    def _need_gradients(self, parameters: Sequence[Tensor], needed: bool) -> None:
        for parameter in parameters:
            parameter.requires_grad_(needed)

    def _drop_frozen(self, optimizer: Any) -> None:
        drop_frozen(optimizer, self._step)

    def micro_batch(self, last: bool) -> AbstractContextManager[Any]:
        """Return the context for one micro-batch's forward and backward pass; the `last` one ends the step."""
        if self._first:
            self.share_buffers()
        self._first = last
        return NOTHING

    def share_buffers(self) -> None:
        """Give every rank rank 0's buffers, where a step begins: as DDP does."""
        if self.world.world_size > 1:
            share_tensors(list(self.model.buffers()))

    @abstractmethod
    def agree_async(self, loss: Tensor, flags: StepFlags) -> Callable[[], StepRecord]:
        """Begin to agree on a step: this rank's `loss` (0-d) and `flags`, and what the strategy adds to them.

        Call it before the backward pass of the last micro-batch, beside which the reduction runs where it can, and the
        function that it returns after that: the gradient is then whole. Raises UserError where no rank has used a
        parameter that the strategy cannot pass over.
        """

    @abstractmethod
    def backward(self, loss_sum: Tensor, scale: Tensor, *, last: bool) -> None:
        """Accumulate the gradient of `scale * loss_sum`; average it over the ranks with the `last` one.

        Both 0-d, or (losses,), whose products are added up.
        """

    def grad_norm(self, record: StepRecord, *, same_bits: bool) -> Tensor:
        """Return the norm (0-d, on the device) of the whole gradient, of all shards.

        `same_bits`: whether ranks act on it, so that it must be the same on all of them to the last bit.
        """
        assert record.square is not None, "a strategy that shards nothing has its own"
        return record.square.sqrt()

    @abstractmethod
    def apply(self, coefficient: Tensor | None) -> None:
        """Multiply the gradient by `coefficient` (0-d; None leaves it), let the optimizer step, drop the gradient."""

    def skip(self) -> None:
        """Drop the gradient, and change neither weights nor the optimizer's state."""
        self.optimizer.zero_grad(set_to_none=True)

    def remember_buffers(self) -> Callable[[], None]:
        """Return a function that restores buffers and extra state as they are now: for a step that is not taken.

        With parameters that the model's own code writes into.
        """
        if self._buffers is None:
            self._buffers = buffer_slots(self.model)
            self._extra = modules_with_extra_state(self.model)
        restore = remember([slot for slot in self._buffers if slot[0][slot[1]] is not None], self._extra)
        kept = values_of(self._whole() if self._looks else self._written)
        self._kept = kept if self._looks else []
        if self._looks:
            return partial(_restore, restore, kept)
        if self._unwritten is None:
            self._unwritten = Unwritten(each for each in self._whole() if each not in self._written)
        unwritten, versions, sizes = self._unwritten, self._unwritten.versions(), self._unwritten.sizes()
        self._versions = versions

        def restore_all() -> None:
            _restore(restore, kept)
            if odd := set(map(id, unwritten.written(versions) + unwritten.resized(sizes))):
                raise late([name for name, each in self.model.named_parameters() if id(each) in odd])

        return restore_all

    def _whole(self) -> list[nn.Parameter]:
        """Return the parameters that this rank holds whole, and computes with."""
        return list(self.model.parameters())

    def _note_late(self) -> None:
        """Note into which parameters the forward passes of a turn are the first to write, once none are compared.

        Called before its last backward pass.
        """
        if self._unwritten is not None and self._versions and (found := self._unwritten.written(self._versions)):
            self._written |= dict.fromkeys(found)
            self._unwritten = None
        self._versions = []

    def _look(self) -> None:
        """Note which parameters the forward passes of a turn have written into; called before its last backward pass.

        Raises UserError for those in which that would be lost, and for those that differ between the ranks.
        """
        if self._begun > 2:  # after the first step `check_state` looks, and the host waits for the device
            check_alike(self.world, self._held_alike())
        self._written |= {
            each: None for each, before in self._kept if not same_bits(each.detach(), before.to(each.device))
        }
        self._kept, self._unwritten = [], None

    @property
    def grad_scale(self) -> float | None:
        """What the next step's loss is multiplied by; None where it is not scaled."""
        return None if self.scale is None else self.scale.scale

    def _note_gradients(self, gradients: Iterable[Tensor]) -> None:
        """Record once what this rank holds of a step's gradients, for `effect`."""
        if self._gradients is None:
            self._gradients = {}
            for each in gradients:
                self._has_sparse_gradient |= each.layout is not torch.strided
                name = dtype_name(each.dtype)
                self._gradients[name] = self._gradients.get(name, 0) + each.numel() * each.element_size()

    def _used(self, count: int, missed: Sequence[int]) -> Tensor:
        """Return 1 for each of `count` parameters that this rank has used in a step, and 0 for the `missed` ones.

        To be summed over the ranks beside other numbers (count,), float64: where nobody has used a parameter, its
        gradient is not zero but absent, and the optimizer passes it over as it does in one process.
        """
        if self._all_used is None:
            self._all_used = torch.ones(count, dtype=torch.float64, device=self.world.device)
        if not missed:
            return self._all_used
        used = self._all_used.clone()
        used[list(missed)] = 0
        return used

    # ----------------------------------------------------------------------------------------------------------------
    # Its state

    @abstractmethod
    def shard(self, parameter: nn.Parameter) -> Shard:
        """Return what this rank holds of a parameter."""

    def sync_compute_weights(self) -> None:  # noqa: B027 - nothing to do where the model computes with what is trained
        """Have the model compute with the weights as they were just written into the shards."""

    def restore(self, reader: Reader) -> list[str]:
        """Load a checkpoint; returns notes for the user. Raises UserError where it does not fit."""
        notes = self.world.run_on_all(lambda: self.state.restore(reader))
        stored = reader.manifest.scalars.get("loss_scale")
        load_scales(self._scales, stored)
        if stored and not self._scales:
            notes.append(f"the stored loss scale is not needed under {self.world.precision}")
        self.sync_compute_weights()
        return notes

    def snapshot(self) -> Snapshot:
        """Return what a checkpoint of this moment holds. Raises UserError naming what it cannot hold."""
        found = self.state.snapshot()
        if self._scales:
            states = {name: scale.state() for name, scale in self._scales.items()}
            found.scalars["loss_scale"] = states.get("", states)
        return found

    def check_state(self) -> None:
        """Check that a checkpoint would lose nothing: once there is an optimizer's state, after the first step.

        Raises UserError naming it, on all ranks alike.
        """
        mine = self.world.run_on_all(self.state.check)
        check_alike(self.world, self._held_alike())
        self._check_digests(mine)

    def check_extra_state(self) -> None:
        """Raise UserError on all ranks where the extra state of modules, or the task's, is not the same on all."""
        if self.world.world_size > 1 and modules_with_extra_state(self.model):
            self._check_digests(self.world.run_on_all(self.state.digests_of_extra))

    def _check_digests(self, mine: Mapping[str, str]) -> None:
        ranks = self.world.gather(mine)
        differing = sorted(name for name in ranks[0] if any(each.get(name) != ranks[0][name] for each in ranks))
        if differing:
            raise UserError(
                f"{', '.join(differing[:5])} differ between the ranks, and a checkpoint holds one value for all; keep "
                "what belongs to a rank in no state, or make it the same on all (torch.distributed.all_reduce)"
            )

    def _held_alike(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters that every rank has whole, by name."""
        for name, parameter in self.model.named_parameters():
            if self.shard(parameter).replicated:
                yield name, parameter

    def reshard(self) -> None:  # noqa: B027 - nothing is gathered where nothing is sharded
        """Free weights that a forward pass without a backward pass has gathered."""

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Have the model hold its averaged weights, where there are any, for an evaluation; then its own."""
        if self.state.ema is None:
            yield
        else:
            with self.state.ema.applied():
                self.sync_compute_weights()
                yield
            self.sync_compute_weights()
        self.reshard()

    def broadcast_buffers(self) -> None:
        """Give every rank rank 0's buffers, as the next training step would, and their averages."""
        if self.world.world_size == 1:
            return
        buffers = list(self.model.buffers())
        if self.state.ema is not None:
            parameters = {canonical_name(name) for name, _ in self.model.named_parameters()}
            buffers += [average for name, average in self.state.ema.tensors().items() if name not in parameters]
        # each is laid out as its neighbours are, whatever its strides are here
        for buffer in buffers:
            whole = buffer.contiguous()
            dist.broadcast(whole if travels(whole) else as_bytes(whole), src=0)
            if whole is not buffer:
                buffer.copy_(whole)

    @contextmanager
    def unsharded(self) -> Iterator[None]:
        """Hold all weights on every rank, so that ranks may call forward() unequally often."""
        yield

    # ----------------------------------------------------------------------------------------------------------------
    # What took effect

    def check(self) -> None:
        """Raise RuntimeError unless the objects that train are what was asked for."""
        expected = self.world.mixed_precision.weights
        for name, parameter in self.model.named_parameters():
            found = self.shard(parameter).values.dtype
            if found.is_floating_point and found != expected:
                asked = f"train.precision {self.world.precision}, with weights in {dtype_name(expected)},"
                raise did_not_take_effect(asked, f"{name} is {dtype_name(found)}")
        if self.world.deterministic and not determinism.is_on():
            raise did_not_take_effect("train.deterministic", "torch.are_deterministic_algorithms_enabled() is False")
        # without a GPU there is nowhere to offload from
        if self.world.device.type != "cpu" and (offloaded := self._offloaded()) != self.world.asked.offload:
            raise did_not_take_effect(f"offload {self.world.asked.offload}", f"{offloaded} is offloaded")

    def effect(self) -> dict[str, Any]:
        """Return what took effect, as read from the objects that train. The same on all ranks."""
        own, full = dict.fromkeys(("parameter", "optimizer", "ema"), 0), dict.fromkeys(("parameter", "optimizer"), 0)
        dtypes: dict[str, set[str]] = {"parameter": set(), "optimizer": set()}
        held = list(self.state.held().values())
        for each in held:
            if each.role in own:
                own[each.role] += each.nbytes
            if each.role in dtypes:
                full[each.role] += math.prod(each.shape) * each.values.element_size()
                if each.values.dim():  # not counters of steps
                    dtypes[each.role].add(dtype_name(each.values.dtype))
        gradients = self._gradients or {}
        ranks = self.world.gather((own["parameter"], own["optimizer"], own["ema"], sum(gradients.values())))
        parameter, optimizer, ema, gradient = (list(each) for each in zip(*ranks, strict=True))
        autocast = self.world.mixed_precision.autocast
        effect: dict[str, Any] = {
            "strategy": self.world.strategy,
            "engine": type(self.wrapped).__name__,
            "optimizer": classes_of(self.state.optimizer),
            "processes": self.world.world_size,
            "replicas": self.world.mesh.replicas,
            "device": self.world.device.type,
            "precision": self.world.precision,
            "deterministic": determinism.is_on(),
            "tune": self.world.tuning.record(),
            "forward": "as stored" if autocast is None else f"autocast to {dtype_name(autocast)}",
            "weights": _listed(dtypes["parameter"]),
            "sharded": any(not each.replicated for each in held),
            "offload": self._offloaded(),
            "accumulation": self.accumulation,
            "clip_norm": self.clip_norm,
            "parameter_bytes": {"full": full["parameter"], "ranks": parameter},
        }
        # what comes into being with the first step
        if self._gradients is not None:
            effect["gradients"] = _listed(gradients)
            effect["gradient_bytes"] = {"ranks": gradient}
        if full["optimizer"]:
            effect["optimizer_state"] = _listed(dtypes["optimizer"])
            effect["optimizer_bytes"] = {"full": full["optimizer"], "ranks": optimizer}
        if self.state.ema is not None:
            effect["ema_bytes"] = {"ranks": ema}
        return effect | {"versions": {"torch": torch.__version__, "accelerate": accelerate.__version__}}

    def _offloaded(self) -> str:
        """Return what is kept in the memory of the CPU beside a GPU: none, optimizer or all; read from the objects."""
        return "none"


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name that people use, such as float32."""
    return str(dtype).removeprefix("torch.")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _restore(buffers: Callable[[], None], kept: Sequence[tuple[nn.Parameter, Tensor]]) -> None:
    buffers()
    give_back(kept)


def square_of(tensors: list[Tensor]) -> Tensor:
    """Return the sum of the squares of all elements (0-d, float64)."""
    tensors = [tensor for tensor in tensors if tensor.numel()]
    if not tensors:
        return torch.zeros((), dtype=torch.float64)
    return torch.stack([norm.double() for norm in torch._foreach_norm(tensors)]).square().sum()


def make_ema(plan: BuildSpec, source: Any) -> Ema | None:
    """Return the average that the plan asks for, of a model or of a mapping of weights."""
    return Ema(source, plan.ema, plan.constant()) if plan.ema is not None else None


def with_mixed_precision(world: World, model: nn.Module) -> nn.Module:
    """Have the model compute in this world's precision, with outputs in full precision; returns the same model.

    Put around its forward by hand and alike under every strategy: left to them, DeepSpeed would cast the weights, FSDP2
    what is gathered, and DDP neither, and one recipe would mean three things.
    """
    if world.mixed_precision.autocast is None:
        return model
    forward = model.forward.__func__ if isinstance(model.forward, MethodType) else None
    inner = model.forward
    precision, device, cache = world.mixed_precision, world.device.type, not world.forward_is_collective

    def compute(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with precision.context(device, cache=cache):
            return forward(self, *args, **kwargs) if forward is not None else inner(*args, **kwargs)

    model.forward = MethodType(convert_outputs_to_fp32(compute), model)
    return model


def make_optimizer(plan: BuildSpec, model: nn.Module) -> Any:
    """Return the optimizer that the plan asks for, or several, without parameters that have no elements.

    There is nothing in them to train, and what an optimizer keeps for them differs by strategy.
    """
    optimizer = plan.optimizer(model)
    for part in parts_of(optimizer).values():
        for group in part.param_groups:
            # what DeepSpeed has sharded is empty to look at
            group["params"] = [each for each in group["params"] if getattr(each, "ds_numel", each.numel())]
        part.param_groups[:] = [group for group in part.param_groups if group["params"]]
    return optimizer


def did_not_take_effect(asked: str, found: str) -> RuntimeError:
    """Return the error of a strategy that the prepared objects do not show."""
    return RuntimeError(
        f"{asked} was asked for and did not take effect: {found}. Nothing was trained; the installed versions of "
        "torch, accelerate or deepspeed may behave differently from those that are tested (constraints.txt)"
    )
