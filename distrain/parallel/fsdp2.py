"""FSDP2: every rank holds rows of each parameter, of its gradient, of its optimizer's state and of its average.

Hybrid, there are several replicas: all rows are sharded over the ranks of one, and gradients are averaged over the
replicas once they have been reduced within each.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate
from torch.distributed.tensor import Shard as Sharded
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from distrain.config import UserError
from distrain.optim import drop_frozen
from distrain.parallel.collective_forward import GatherOrder
from distrain.parallel.comm import World
from distrain.parallel.materialize import build_in_shards, fill_shards
from distrain.parallel.matrices import give_matrices
from distrain.parallel.model_tensors import buffers_to
from distrain.parallel.parameter_writes import check_hooks, holds, lost, replaced
from distrain.parallel.shards import Shard, whole
from distrain.parallel.state import TrainingState
from distrain.parallel.step_record import StepFlags, StepRecord
from distrain.parallel.strategy import (
    BuildSpec,
    Strategy,
    did_not_take_effect,
    dtype_name,
    make_ema,
    make_optimizer,
    square_of,
    with_mixed_precision,
)
from distrain.parallel.units import has_rows, sharding_units
from distrain.parallel.unused_parameters import cast_parameters, sparse_gradient


class FSDP2Strategy(Strategy):
    """The parameters are DTensors, sharded by rows; a block's are gathered when it computes."""

    def __init__(self, world: World, plan: BuildSpec):
        super().__init__(world, plan)
        model, values = build_in_shards(world, plan.model)
        buffers_to(model, world.device)
        self.model = self.wrapped = with_mixed_precision(world, model)
        self._early = self._cast_early(plan, model)
        """The parameters that are cast before they are gathered."""
        self._shard_model(model)
        _give_memory(model, torch.device("cpu") if world.asked.offload_parameters else world.device, world.device)
        if plan.initial:
            fill_shards(world, values, {name: self.shard(parameter) for name, parameter in model.named_parameters()})
        del values
        # on the sharded parameters, so that its state is sharded as they are
        self.optimizer = world.run_on_all(lambda: make_optimizer(plan, model))
        self._take_optimizer()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._sharded = [parameter for parameter in trained if isinstance(parameter, DTensor)]
        self._replicated = [parameter for parameter in trained if not isinstance(parameter, DTensor)]
        if self._sharded:
            shards = {name: self.shard(each) for name, each in model.named_parameters() if each.requires_grad}
            mesh = self._sharded[0].device_mesh
            group = mesh.get_group(mesh.ndim - 1)  # that of the shards, where there are replicas
            give_matrices(self.optimizer, shards, world.device, group)
        self.state = TrainingState(model, self.optimizer, make_ema(plan, model), self.shard, migrate=plan.migrate)
        self._passes = 0
        """The backward passes of this step that have reduced gradients, each with those that it found there."""
        self._missed: dict[Tensor, int] = {}
        """How many of them have found none for a parameter on this rank."""
        self._filled: set[Tensor] = set()
        """The parameters that were given zeros in this backward pass."""
        self._given: set[Tensor] = set()
        """Those that had a gradient in it, maybe after the zeros: one used twice has it with the last of its uses."""
        self._not_used: list[int] = []
        """Of the trained parameters, those that this rank has not used in the step."""
        self._local_gradients: tuple[list[Tensor], list[Tensor]] = [], []
        """This rank's part of the gradient: of the parameters that are sharded, and of those that are not."""
        self._gather_order = GatherOrder(world, model, lambda: id(self._acting))
        self._units = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self._groups: list[Any] = []
        """What FSDP2 gathers and reduces together: one for each unit that has parameters of its own."""
        self._reduce_all()
        self._of_groups = {each.sharded_param: each for group in self._groups for each in group.fsdp_params}
        """By sharded parameter what FSDP2 gathers of it, which is a tensor of its own."""
        self._seen: dict[Any, int] = {}
        """How often what is gathered of a parameter was written to in place, when it was last looked at."""
        self._going_back = False
        """Whether this step's backward pass is under way, and not one within a forward pass."""
        self._reducing = self._averaging = True
        """Whether a backward pass reduces gradients, and averages them over the replicas."""
        if world.tuning["prefetch"]:
            for unit, following in itertools.pairwise(self._units):
                unit.set_modules_to_forward_prefetch([following])

    def _cast_early(self, plan: BuildSpec, model: nn.Module) -> set[str]:
        """Return the parameters that are gathered in the dtype to which autocast casts them. All ranks call.

        Of these the forward pass uses nothing else, so neither it nor the gradient differs by a bit.
        """
        world, dtype = self.world, self.world.mixed_precision.autocast
        if dtype is None or not world.tuning["cast_before_gather"]:
            return set()
        if len(plan.sections) > 1:
            world.tuning = world.tuning.without("cast_before_gather", "each of several optimizers has its own losses")
            return set()
        # a part of the model may be used on some ranks alone
        ranks = world.gather(cast_parameters(model, lambda model: plan.loss_sum(model, 0), world.device, dtype))
        if any(names is None for names in ranks):
            why = (
                f"which weights are only cast to {dtype_name(dtype)} is tried without values, and the model needs them"
            )
            world.tuning = world.tuning.without("cast_before_gather", why)
            return set()
        return set.intersection(*ranks)

    def _shard_model(self, model: nn.Module) -> None:
        """Shard as Accelerate's plugin says, but in units of our own.

        Its own give embeddings and heads units by what models of transformers call them, and cannot shard a model
        that shares a weight between two units.
        """
        plugin = self.world.accelerator.state.fsdp_plugin
        early = {id(parameter) for name, parameter in model.named_parameters() if name in self._early}
        policy: dict[str, Any] = {"reduce_dtype": torch.bfloat16} if self.world.tuning["cast_before_reduce"] else {}
        if early:
            policy |= {
                "param_dtype": self.world.mixed_precision.autocast,
                "param_dtype_override_fn": lambda parameter: None if id(parameter) in early else parameter.dtype,
                "cast_forward_inputs": False,
            }
        for parameter in model.parameters():
            if not parameter.is_contiguous():
                parameter.data = parameter.data.contiguous()
        settings: dict[str, Any] = {
            # (shards,), or (replicas, shards)
            "mesh": self.world.mesh.device_mesh(self.world.device.type, self.world.timeout),
            "reshard_after_forward": plugin.reshard_after_forward,
            "mp_policy": MixedPrecisionPolicy(**policy),
            "offload_policy": CPUOffloadPolicy(pin_memory=self.world.device.type == "cuda")
            if self.world.asked.offload_parameters
            else OffloadPolicy(),
            # rows are what is sharded, and these have none: FSDP2 refuses the first and does not gather the second
            "ignored_params": {each for each in model.parameters() if not has_rows(each)},
        }
        for unit in sharding_units(model):
            fully_shard(unit, **settings)
        # the root's own are needed first in the backward pass
        fully_shard(model, **settings | {"reshard_after_forward": False})

    def _need_gradients(self, parameters: Sequence[Tensor], needed: bool) -> None:
        super()._need_gradients(parameters, needed)
        for parameter in parameters:
            # there from the first forward pass on, and made alike
            whole = getattr(self._of_groups.get(parameter), "_unsharded_param", None)
            if whole is not None:
                whole.requires_grad_(needed)

    def micro_batch(self, last: bool) -> AbstractContextManager[Any]:
        reducing = last or self.world.tuning["reduce_every_micro"]
        # between the replicas, which are mostly machines, once in a step is enough
        averaging = last or not self.world.mesh.is_hybrid
        if (reducing, averaging) != (self._reducing, self._averaging):
            self._reducing, self._averaging = reducing, averaging
            for unit in self._units:
                unit.set_requires_gradient_sync(reducing, recurse=False)
                unit.set_requires_all_reduce(reducing and averaging, recurse=False)
        return super().micro_batch(last)

    def agree_async(self, loss: Tensor, flags: StepFlags) -> Callable[[], StepRecord]:
        if self._looks:
            self._look()
        elif self._versions:
            self._note_late()

        def agree() -> StepRecord:
            gradients, own = self._local_gradients
            # over all ranks: so that replicas of what is sharded count once together, and so do those of what is not
            square = square_of(gradients) / self.world.mesh.replicas
            square = square + (square_of(own) / self.world.world_size if own else 0.0)
            trained, missed = (*self._sharded, *self._replicated), self._not_used
            record = StepRecord.reduce(self.world, loss, flags, square, self._used(len(trained), missed))
            if missed:
                assert record.used is not None
                counts = record.used.tolist()
                for place in missed:
                    if not counts[place]:
                        trained[place].grad = None
            return record

        return agree

    def backward(self, loss_sum: Tensor, scale: Tensor, *, last: bool) -> None:
        self._going_back = True
        try:
            loss_sum.backward(scale)
        finally:
            self._going_back = False
        self._gather_order.end()
        if self._reducing:
            for parameter in self._filled - self._given:
                self._missed[parameter] = self._missed.get(parameter, 0) + 1
            self._filled.clear()
            self._given.clear()
            self._passes += 1
        if last:
            self._not_used = self._complete()
            if self._thaws:
                drop_frozen(self.optimizer, self._step)
            sharded = [p.grad.to_local() for p in self._sharded if p.grad is not None]  # type: ignore[attr-defined]
            self._local_gradients = sharded, [p.grad for p in self._replicated if p.grad is not None]
            self._note_gradients(each for kind in self._local_gradients for each in kind)

    def apply(self, coefficient: Tensor | None) -> None:
        if coefficient is not None:
            _multiply([each for kind in self._local_gradients for each in kind], coefficient)
        self._acting.step()
        self.skip()

    def skip(self) -> None:
        super().skip()
        self._local_gradients = [], []

    def _complete(self) -> list[int]:
        """Average what is not sharded over the ranks; returns which trained parameters this rank has not used.

        In the order of `_sharded` and then `_replicated`.
        """
        missed = [place for place, p in enumerate(self._sharded) if self._missed.get(p) == self._passes]
        for place, parameter in enumerate(self._replicated, len(self._sharded)):
            if not parameter.requires_grad:
                continue  # it is not this optimizer's turn
            if parameter.grad is None:
                missed.append(place)
                parameter.grad = torch.zeros_like(parameter)
            if self.world.world_size > 1:
                dist.all_reduce(parameter.grad)
                parameter.grad /= self.world.world_size
        self._missed.clear()
        self._passes = 0
        return missed

    def _reduce_all(self) -> None:
        """Have each unit reduce all its gradients with each micro-batch, zeros where that has not used a parameter.

        FSDP2 reduces those that it finds, and ranks that do not find the same would sum other things.
        """
        for name, module in self.model.named_modules():
            if isinstance(module, FSDPModule):
                state: Any = module._get_fsdp_state()
                # older torch has one at most
                for group in getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]:
                    if group is not None:
                        self._groups.append(group)
                        group.unshard = partial(self._gather_unit, group.unshard, f"gathering {name}")
                        group.post_backward = partial(self._reduce_unit, group, group.post_backward)
                        group.post_forward = partial(self._end_unit, group, group.post_forward)

    def _gather_unit(self, gather: Callable[..., None], part: str, *args: Any, **kwargs: Any) -> None:
        if torch._C._current_graph_task_id() != -1 and not self._going_back:
            raise UserError(
                "losses compute a gradient within the forward pass (torch.autograd.grad) through a block "
                f"({part}), and fsdp2 frees a block's weights after its backward pass, before a second one needs them; "
                "use ddp"
            )
        # also where it is gathered still: what is left of the pass before must not make another order of this one
        self._gather_order.reach(part)
        gather(*args, **kwargs)

    def check_state(self) -> None:
        # a hook that is called with an accumulated gradient is called with a shard's
        check_hooks(self.model, self.world.strategy, accumulating=False)
        super().check_state()

    def _end_unit(self, group: Any, end: Callable[..., Any], *args: Any) -> Any:
        """End a unit's forward pass, after which what was gathered is of no more use than to its backward pass."""
        if self.model.training:
            for each in group.fsdp_params:
                gathered, place = getattr(each, "_unsharded_param", None), each._module_info
                if gathered is None:
                    continue
                if place.module._parameters.get(place.param_name) is not gathered:
                    raise replaced([each._param_fqn])
                version = gathered._version
                if (self._looks or self._seen.get(each) != version) and self._was_written(gathered, each.sharded_param):
                    raise lost([each._param_fqn], self.world.strategy)
                self._seen[each] = version
        order = group.comm_ctx.post_forward_order
        before = len(order)
        ended = end(*args)
        goes_back = torch.is_grad_enabled() or (self.model.training and self._gather_order.goes_back)
        if len(order) > before and not goes_back:
            # no backward pass follows, and that of the next step would gather ahead in the order of this one, too
            order.pop()
            group._post_forward_indices.pop()
        return ended

    def _was_written(self, gathered: Tensor, parameter: nn.Parameter) -> bool:
        shard = self.shard(parameter)
        return type(gathered) is nn.Parameter and not holds(gathered, shard.values, shard.start)

    def _whole(self) -> list[nn.Parameter]:
        return [each for each in self.model.parameters() if not isinstance(each, DTensor)]

    def _reduce_unit(self, group: Any, reduce: Callable[..., None], *unused: Any) -> None:
        for parameter in group.fsdp_params:
            whole = getattr(parameter, "_unsharded_param", None)
            if whole is None or not whole.requires_grad:
                continue
            if whole.grad is None:
                if not self._reducing:
                    continue
                # newer torch may hold it in another dtype than the parameter
                dtype = getattr(parameter, "unsharded_grad_dtype", whole.dtype)
                whole.grad = torch.zeros_like(whole, dtype=dtype)
                self._filled.add(parameter.sharded_param)
                continue
            self._given.add(parameter.sharded_param)
            if whole.grad.layout is not torch.strided:
                raise sparse_gradient(parameter._param_fqn, self.world.strategy)
        reduce(*unused)

    def shard(self, parameter: nn.Parameter) -> Shard:
        if not isinstance(parameter, DTensor):
            return whole(parameter)
        shape = tuple(parameter.shape)
        _, offset = compute_local_shape_and_global_offset(shape, parameter.device_mesh, parameter.placements)
        values = parameter.detach().to_local()  # type: ignore[attr-defined]
        # a rank behind the last row has an empty part, which begins nowhere
        start = offset[0] * math.prod(shape[1:]) if values.numel() else 0
        entry = parameter if parameter.requires_grad else None
        return Shard(shape, start, values, replicated=False, entry=entry)

    def reshard(self) -> None:
        for group in self._groups:
            group.wait_for_unshard()  # what was gathered ahead and not used, or its next use would be of old weights
        for module in self._units:
            module.reshard()

    @contextmanager
    def unsharded(self) -> Iterator[None]:
        for module in self._units:
            module.unshard()
            module.set_reshard_after_forward(False, recurse=False)
        try:
            with self._gather_order.paused():
                yield
        finally:
            for module in self._units:
                module.set_reshard_after_forward(module is not self.model, recurse=False)
                module.reshard()

    def check(self) -> None:
        super().check()
        mesh = self.world.mesh
        placements: tuple[Placement, ...] = (Replicate(), Sharded(0)) if mesh.is_hybrid else (Sharded(0),)
        shape = (mesh.replicas, mesh.shards) if mesh.is_hybrid else (mesh.shards,)
        odd = [
            name
            for name, parameter in self.model.named_parameters()
            if has_rows(parameter)
            and not (
                isinstance(parameter, DTensor)
                and (parameter.placements, parameter.device_mesh.shape) == (placements, shape)
            )
        ]
        if odd:
            where = f"over {mesh.shards} ranks" + (f", in {mesh.replicas} replicas" if mesh.is_hybrid else "")
            raise did_not_take_effect(
                str(self.world.asked), f"{odd[0]} and {len(odd) - 1} others are not sharded {where}"
            )

    def effect(self) -> dict[str, Any]:
        sharded = [parameter for parameter in self.model.parameters() if isinstance(parameter, DTensor)]
        return super().effect() | {
            "engine": "FSDPModule",
            "units": len(self._units),
            "gathered_bytes": self._gathered_bytes(),
            "mesh": ", ".join(sorted({str(parameter.device_mesh) for parameter in sharded})),
            "placements": ", ".join(sorted({str(parameter.placements) for parameter in sharded})),
        }

    def _gathered_bytes(self) -> dict[str, int]:
        """Return the bytes of the whole weights as they are gathered, by dtype."""
        found: dict[str, int] = {}
        for group in self._groups:
            for each in group.fsdp_params:
                dtype = each.mp_policy.param_dtype or each.sharded_param.dtype
                name = dtype_name(dtype)
                found[name] = found.get(name, 0) + each.sharded_param.numel() * dtype.itemsize
        return found

    def _offloaded(self) -> str:
        devices = {p.device.type for p in self.model.parameters() if isinstance(p, DTensor)}
        return "all" if devices == {"cpu"} and self.world.device.type != "cpu" else "none"


def _multiply(tensors: list[Tensor], factor: Tensor) -> None:
    by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        by_kind.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    for (device, dtype), alike in by_kind.items():
        torch._foreach_mul_(alike, factor.to(device, dtype))


def _give_memory(model: nn.Module, device: torch.device, own: torch.device) -> None:
    """Give what is on the meta device uninitialised memory: shards on `device`, and what is not sharded on `own`."""
    # by hand: to_empty would make two of a parameter that has two names, and empty the buffers
    new: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and not isinstance(parameter, DTensor):
                if id(parameter) not in new:
                    empty = torch.empty_like(parameter, device=own)
                    new[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                module._parameters[key] = new[id(parameter)]
    model._apply(lambda t: torch.empty_like(t, device=device) if isinstance(t, DTensor) and t.is_meta else t)
