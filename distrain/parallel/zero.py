"""ZeRO-1, 2 and 3 by DeepSpeed: what the optimizer trains is cut into equal flat parts, one for each rank.

DeepSpeed is run in its fp32 mode whatever the precision: it then keeps weights, gradients and their reduction in fp32,
and autocast is put around the model as under every other strategy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor, nn

from distrain.config import UserError
from distrain.networks.memory import own_tensors
from distrain.optim import canonical_name, is_frozen
from distrain.parallel.collective_forward import GatherOrder
from distrain.parallel.comm import World
from distrain.parallel.deepspeed_ways import buffer_sizes, thrifty_linear, with_own_adagrad, without_broadcast
from distrain.parallel.materialize import build_in_shards, fill_shards
from distrain.parallel.matrices import give_matrices
from distrain.parallel.model_tensors import buffers_to, model_to
from distrain.parallel.optimizer_state import group_names
from distrain.parallel.parameter_writes import Slots, Unwritten, Written, holds, lost
from distrain.parallel.shards import Shard, whole
from distrain.parallel.state import TrainingState
from distrain.parallel.step_record import StepFlags, StepRecord
from distrain.parallel.strategy import (
    BuildSpec,
    Strategy,
    did_not_take_effect,
    make_ema,
    make_optimizer,
    square_of,
    with_mixed_precision,
)
from distrain.parallel.unused_parameters import no_gradient, reached_parameters, sparse_gradient, unused_parameters
from distrain.system.numbers import a_kind


class ZeROStrategy(Strategy):
    """A DeepSpeedEngine. In stages 1 and 2 every rank computes with whole weights, in stage 3 they are sharded too."""

    stage: int
    wrapped: Any
    """The DeepSpeedEngine."""

    def __init__(self, world: World, plan: BuildSpec):
        super().__init__(world, plan)
        self.stage = int(world.strategy[-1])
        if world.accelerator.state.deepspeed_plugin is None:
            found = world.accelerator.distributed_type.value
            raise did_not_take_effect(world.strategy, f"Accelerate has prepared for {found}")
        self._trained: dict[int, str] = {}
        self._reached: set[int] = set()
        """Of the trained parameters, those that a micro-batch of this step has used on this rank."""
        self._order: list[nn.Parameter] = []
        self._seen: list[int] = []
        """The versions of its parameters in the step before."""
        self._versions_of: dict[nn.Parameter, int] = {}
        """In stage 3 the version of each parameter when its module began or ended last."""
        self._coefficient: Tensor | None = None
        """What the gradients of the step under way are multiplied by."""
        self._refused = False
        """Whether DeepSpeed is to drop the gradient instead of stepping."""
        self.model, optimizer = self._build(plan)
        self._slots = Slots(self.model)
        groups = group_names(self.model, optimizer)
        self._prepare(plan, optimizer)
        self._zero: Any = self.wrapped.optimizer
        self._reduce_in_order()
        self._take_over_clipping()
        self._gather_order = GatherOrder(world, self.model) if self.stage == 3 else None
        if self._gather_order is not None:
            self._versions_of = {parameter: parameter._version for parameter in self.model.parameters()}
            self._fetch_in_order(self._gather_order)
        self.optimizer = self._zero.optimizer
        named = self.model.named_parameters()
        shards = {name: self.shard(each) for name, each in named if id(each) in self._trained}
        give_matrices(self.optimizer, shards, world.device)
        self._take_optimizer()
        ema = make_ema(plan, _Weights(self))
        self.state = TrainingState(self.model, self.optimizer, ema, self.shard, groups, plan.migrate, self._stepping)

    # ----------------------------------------------------------------------------------------------------------------
    # Set-up

    def _build(self, plan: BuildSpec) -> tuple[nn.Module, torch.optim.Optimizer]:
        world = self.world
        if self.stage == 3:
            model, values = build_in_shards(world, plan.model)
            buffers_to(model, world.device)
            slots = Slots(model)
            reached = self._reached_in_first_step(plan, model, self._reached_without_memory)
            world.run_on_all(slots.check)
            shards = _partition(model, world)
            if plan.initial:
                fill_shards(world, values, shards)
            del values, shards
            optimizer = world.run_on_all(lambda: make_optimizer(plan, model))
            with_mixed_precision(world, model)
        else:
            model = world.run_on_all(lambda: model_to(plan.model(), world.device))
            optimizer = world.run_on_all(lambda: make_optimizer(plan, model))
            with_mixed_precision(world, model)
            reached = self._reached_in_first_step(plan, model, partial(reached_parameters, world))
        # DeepSpeed would step them all the same, with gradients of zero: decayed, and with a state that no other
        # strategy has
        names = {id(p): name for name, p in model.named_parameters()}
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if names[id(p)] in reached]
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                self._trained[id(parameter)] = names[id(parameter)]
                parameter.register_post_accumulate_grad_hook(self._note_reached)
        for name, parameter in model.named_parameters():
            if name not in reached and parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(partial(_refuse_gradient, name))
        parameters = dict(model.named_parameters())
        self._order = [parameters[name] for name in reached if id(parameters[name]) in self._trained]
        return model, optimizer

    def _reached_in_first_step(
        self, plan: BuildSpec, model: nn.Module, reached: Callable[[BuildSpec, nn.Module, int], list[list[str]]]
    ) -> list[str]:
        """Return the parameters to which any rank gives a gradient in the first step, in the order of the first such.

        `reached` returns what each rank reaches with one of its micro-batches; it is called no more often than needed.
        """
        trained = sum(parameter.requires_grad for parameter in model.parameters())
        found: dict[str, None] = {}
        for index in range(plan.accumulation):
            for names in reached(plan, model, index):
                found.update(dict.fromkeys(names))
            if len(found) == trained:
                break
        return list(found)

    def _reached_without_memory(self, plan: BuildSpec, model: nn.Module, index: int) -> list[list[str]]:
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad][::-1]
        written = Written()
        unused = unused_parameters(model, lambda model: plan.loss_sum(model, index), self.world.device, written)
        if names := list(dict.fromkeys(name for rank in self.world.gather([*written.names]) for name in rank)):
            raise lost(names, self.world.strategy)
        # where the model cannot run so, all count as used; if no rank uses one after all, `agree_async` reports it
        return self.world.gather([name for name in trained if name not in (unused or ())])

    def _note_reached(self, parameter: nn.Parameter) -> None:
        if parameter.grad is not None and parameter.grad.layout is not torch.strided:
            raise sparse_gradient(self._trained[id(parameter)], self.world.strategy)
        self._reached.add(id(parameter))

    def _fetch_in_order(self, gather_order: GatherOrder) -> None:
        """Note what each module fetches before DeepSpeed does, whose own record of it must be one on all ranks."""
        names = {id(module): name for name, module in self.model.named_modules()}
        waits = {
            id(module): any(
                not getattr(parameter, "ds_persist", False) for parameter in module.parameters(recurse=False)
            )
            for module in self.model.modules()
        }

        def noted(direction: str, fetch: Callable[[nn.Module], None]) -> Callable[[nn.Module], None]:
            def note(module: nn.Module) -> None:
                self._slots.check(module)
                if direction == "forward":
                    self._check_unwritten(module)
                if (name := names.get(id(module))) is not None:
                    gather_order.reach(f"{direction} {name}", waits=waits[id(module)])
                fetch(module)

            return note

        offload = self._zero.parameter_offload
        offload.pre_sub_module_forward_function = noted("forward", offload.pre_sub_module_forward_function)
        offload.pre_sub_module_backward_function = noted("backward", offload.pre_sub_module_backward_function)
        release = offload.post_sub_module_forward_function

        def end(module: nn.Module) -> None:
            self._slots.check(module)
            self._check_unwritten(module, self._looks)
            release(module)

        offload.post_sub_module_forward_function = end

    def _reduce_in_order(self) -> None:
        """Have the ranks reduce gradients in one order, whichever of them their micro-batches use.

        DeepSpeed packs them as they come, and ranks that do not use the same parameters would sum other things.
        """
        zero, order = self._zero, self._order
        if self.stage == 1:  # reduces at the end of a step, in the order of its groups
            reduce_all = zero.reduce_gradients

            def complete(*args: Any, **kwargs: Any) -> None:
                for parameter in order:
                    if parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)
                reduce_all(*args, **kwargs)

            zero.reduce_gradients = complete
            return
        name = "process_gradients" if self.stage == 2 else "reduce_ready_partitions_and_remove_grads"
        reduce, finish = getattr(zero, name), zero.overlapping_partition_gradients_reduce_epilogue
        places = {id(parameter): place for place, parameter in enumerate(order)}
        waiting: dict[int, tuple[Any, ...]] = {}
        done = 0

        def come(parameter: nn.Parameter, *group: int) -> None:
            nonlocal done
            place = places[id(parameter)]
            if place < done:  # for the second time in a backward pass, which DeepSpeed accepts or refuses
                reduce(parameter, *group)
                return
            waiting[place] = group
            while done in waiting:
                reduce(order[done], *waiting.pop(done))
                done += 1

        def end() -> None:
            nonlocal done
            for place in range(done, len(order)):
                if place >= done and place not in waiting:
                    _give_zeros(order[place])
                    come(order[place], *groups[place])
            done = 0
            finish()

        groups = [(self._group_of[id(parameter)],) if self.stage == 2 else () for parameter in order]
        setattr(zero, name, come)
        zero.overlapping_partition_gradients_reduce_epilogue = end

    def _prepare(self, plan: BuildSpec, optimizer: torch.optim.Optimizer) -> None:
        accelerator = self.world.accelerator
        accelerator.gradient_accumulation_steps = plan.accumulation
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        config["train_micro_batch_size_per_gpu"] = plan.micro_batch_size
        config["gradient_accumulation_steps"] = plan.accumulation
        config["train_batch_size"] = plan.micro_batch_size * plan.accumulation * self.world.world_size
        config["gradient_clipping"] = 0.0  # `apply` is given the coefficient
        config["zero_optimization"] |= buffer_sizes(self.stage, self.model)
        with without_broadcast(), with_own_adagrad(self.stage):
            self.wrapped, _ = accelerator.prepare(self.model, optimizer)
        # Accelerate silently falls back to DDP, and nothing that follows would work
        if not isinstance(self.wrapped, deepspeed.DeepSpeedEngine):
            raise did_not_take_effect(self.world.strategy, f"what trains is {a_kind(self.wrapped)}")
        if (found := self.wrapped.optimizer.optimizer) is not optimizer:
            raise did_not_take_effect(f"optim.name {type(optimizer).__name__}", f"another {type(found).__name__} steps")

    @contextmanager
    def _stepping(self) -> Iterator[None]:
        """Stage 3 fills the optimizer's groups only while it steps."""
        if self.stage < 3:
            yield
            return
        self._zero._set_fp32_optimizer_param_groups()
        try:
            yield
        finally:
            self._zero._clear_fp32_optimizer_param_groups()

    # ----------------------------------------------------------------------------------------------------------------
    # A step

    def micro_batch(self, last: bool) -> AbstractContextManager[Any]:
        """In stage 3 linear layers free their gathered weights until the backward pass."""
        context = super().micro_batch(last)
        compiled = self.model._compiled_call_impl is not None
        return context if self.stage < 3 or compiled else thrifty_linear()

    def agree_async(self, loss: Tensor, flags: StepFlags) -> Callable[[], StepRecord]:
        if self._looks:
            self._look()
        else:
            self._note_late()
            self._check_written()

        def agree() -> StepRecord:
            missed = [place for place, key in enumerate(self._trained) if key not in self._reached]
            self._reached.clear()
            square, used = square_of(self._own_gradients()), self._used(len(self._trained), missed)
            record = StepRecord.reduce(self.world, loss, flags, square, used)
            if missed:
                assert record.used is not None
                counts, names = record.used.tolist(), list(self._trained.values())
                if unused := [names[place] for place in missed if not counts[place]]:
                    raise no_gradient(unused, self.world)
            return record

        return agree

    def backward(self, loss_sum: Tensor, scale: Tensor, *, last: bool) -> None:
        self.wrapped.set_gradient_accumulation_boundary(last)
        self.wrapped.backward((loss_sum * scale).sum(), scale_wrt_gas=False)
        if self._gather_order is not None:
            self._gather_order.end()
        if last:
            self._note_gradients(each for kept in self._zero.averaged_gradients.values() for each in kept or ())

    def apply(self, coefficient: Tensor | None) -> None:
        self._coefficient = coefficient
        self.wrapped.step()
        assert self.wrapped.was_step_applied()

    def skip(self) -> None:
        self._refused = True
        self.wrapped.step()
        self._refused = False
        assert not self.wrapped.was_step_applied(), "DeepSpeed took a step that was to be skipped"

    def _whole(self) -> list[nn.Parameter]:
        return super()._whole() if self.stage < 3 else []

    @cached_property
    def _computed_with(self) -> Unwritten:
        """What this rank holds whole; nothing may be put in the place of a parameter."""
        return Unwritten(self._whole())

    def _look(self) -> None:
        super()._look()
        self._slots.check()
        self._check_copies()

    def check_state(self) -> None:
        self._check_copies()  # callbacks have seen the weights as well
        super().check_state()

    def _check_copies(self) -> None:
        """Raise UserError unless the model computes with what the optimizer steps. All ranks call."""
        found = self._other_copies()
        if names := list(dict.fromkeys(name for rank in self.world.gather(found) for name in rank)):
            raise lost(names, self.world.strategy)

    def _check_written(self) -> None:
        """Raise UserError on a rank whose passes have written into its part of what the optimizer steps."""
        versions = self._computed_with.versions()
        if versions != self._seen and (found := self._other_copies()):
            raise lost(found, self.world.strategy)
        self._seen = versions

    def _check_unwritten(self, module: nn.Module, looks: bool = False) -> None:
        """Raise UserError for what has been written into a module's parameters, which stage 3 gathers and frees."""
        written = []
        for name, parameter in self._slots.of(module):
            version, seen = parameter._version, self._versions_of[parameter]
            self._versions_of[parameter] = version
            freed = parameter.numel() != math.prod(parameter.ds_shape)  # type: ignore[attr-defined]
            if (version != seen and freed) or ((version != seen or looks) and self._differs(parameter)):
                written.append(name)
        if written:
            raise lost(written, self.world.strategy)

    def _other_copies(self) -> list[str]:
        """Return the names of which this rank computes with something else than what the optimizer steps."""
        return [name for name, parameter in self.model.named_parameters() if self._differs(parameter)]

    def _differs(self, parameter: nn.Parameter) -> bool:
        shard = self.shard(parameter)
        if shard.replicated or parameter.numel() != math.prod(shard.shape):
            return False  # trained as it is, or freed
        if getattr(parameter, "ds_status", ZeroParamStatus.AVAILABLE) != ZeroParamStatus.AVAILABLE:
            return False  # being gathered ahead of its use: it holds anything until then
        return not holds(parameter, shard.values, shard.start)

    def _take_over_clipping(self) -> None:
        """Have DeepSpeed multiply gradients by what `apply` is given, and take no norm of its own.

        Its own norm costs a reduction for each group, and the host waits for it. To a norm that is infinite it answers
        by dropping the gradient and leaving the rest as it was.
        """
        zero = self._zero

        def norm() -> float:
            return math.inf if self._refused else 0.0

        def multiply(which: Any, _norm: Any) -> None:
            if self._coefficient is not None:
                for gradient in which if self.stage < 3 else [zero.fp32_partitioned_groups_flat[which].grad]:
                    gradient.mul_(self._coefficient.to(gradient))

        zero.unscale_and_clip_grads = multiply
        if self.stage < 3:
            zero.scaled_global_norm = norm
        else:
            zero._get_norm_groups = lambda: [norm()]

    def _own_gradients(self) -> list[Tensor]:
        """Return this rank's part of the gradient that the optimizer is about to step with."""
        zero = self._zero
        if zero.offload_optimizer if self.stage == 3 else zero.cpu_offload:
            if (wait := getattr(zero, "_wait_for_offload_copies", None)) is not None:
                wait()
            flats = zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups
            return [flat.grad for at, flat in enumerate(flats) if flat.grad is not None and not self._is_frozen(at)]
        gradients = zero.averaged_gradients.items()
        return [each for at, kept in gradients if not self._is_frozen(at) for each in kept or ()]

    def _is_frozen(self, place: int) -> bool:
        """Whether one of DeepSpeed's groups, which in stage 3 are parts of the optimizer's, is not trained yet."""
        if not self._thaws:
            return False
        group = self._zero.sub_group_to_group_id[place] if self.stage == 3 else place
        return is_frozen(self.optimizer.param_groups[group], self._step)

    # ----------------------------------------------------------------------------------------------------------------
    # Its state

    def shard(self, parameter: nn.Parameter) -> Shard:
        return self._shard_3(parameter) if self.stage == 3 else self._shard_12(parameter)

    def _shard_12(self, parameter: nn.Parameter) -> Shard:
        """DeepSpeed lays a group's parameters end to end, and cuts that into equal parts."""
        zero = self._zero
        group = self._group_of.get(id(parameter))
        if group is None:
            return replace(whole(parameter), entry=None)
        entry = zero.single_partition_of_fp32_groups[group]
        shape, mapping = tuple(parameter.shape), parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return Shard(shape, 0, entry.detach()[:0], replicated=False, entry=entry)
        start, numel = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
        offset = mapping.hp_fragment_address.start
        values = entry.detach()[offset : offset + numel]
        return Shard(shape, start, values, replicated=False, entry=entry, offset=offset)

    @cached_property
    def _group_of(self) -> dict[int, int]:
        """The place of each trained parameter's group, by the parameter's identity; looked up at every step."""
        return {id(p): index for index, group in enumerate(self._zero.bit16_groups) for p in group}

    def _shard_3(self, parameter: Any) -> Shard:
        shape, (start, numel) = tuple(parameter.ds_shape), _range_3(parameter, self.world.rank)
        place = self._zero.grad_position.get(self._zero.get_param_id(parameter)) if parameter.requires_grad else None
        if place is None:
            return Shard(shape, start, parameter.ds_tensor.detach()[:numel], replicated=False, entry=None)
        group, offset, _ = place
        entry = self._zero.fp32_partitioned_groups_flat[group]
        values = entry.detach()[offset : offset + numel]
        return Shard(shape, start, values, replicated=False, entry=entry, offset=offset)

    def sync_compute_weights(self) -> None:
        zero = self._zero
        if self.stage < 3:
            zero.update_lp_params()
            return
        for index in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(index)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].partition(zero.persistent_parameters)
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    @contextmanager
    def unsharded(self) -> Iterator[None]:
        if self.stage < 3:
            yield
            return
        assert self._gather_order is not None
        with (
            deepspeed.zero.GatheredParameters(list(self.model.parameters())),
            self._unhooked(),
            self._gather_order.paused(),
        ):
            yield

    @contextmanager
    def _unhooked(self) -> Iterator[None]:
        """Take out the hooks that gather each weight before its use, with the other ranks, and free it after."""
        offload = self._zero.parameter_offload
        handles = (*offload.forward_hooks, *offload.backward_hooks, offload.fwd_pre_hook)
        ours = {handle.id for handle in handles}
        found = {id(hooks): hooks for handle in handles if (hooks := handle.hooks_dict_ref()) is not None}
        kept = [(hooks, dict(hooks)) for hooks in found.values()]
        for hooks, before in kept:
            for key in before.keys() & ours:
                del hooks[key]
        try:
            yield
        finally:
            for hooks, before in kept:
                hooks.clear()
                hooks.update(before)

    def check(self) -> None:
        super().check()
        if (found := self.wrapped.zero_optimization_stage()) != self.stage:
            raise did_not_take_effect(self.world.strategy, f"DeepSpeed runs ZeRO stage {found}")
        if (found := self.wrapped.dp_world_size) != self.world.world_size:
            raise did_not_take_effect(self.world.strategy, f"DeepSpeed spans {found} of {self.world.world_size} ranks")

        engine = self.wrapped
        if (found := (engine.gradient_accumulation_steps(), engine.gradient_clipping())) != (self.accumulation, 0.0):
            asked = f"accumulation {self.accumulation} without clipping of DeepSpeed's own"
            raise did_not_take_effect(asked, f"DeepSpeed accumulates {found[0]} and clips to {found[1]}")

    def effect(self) -> dict[str, Any]:
        engine = self.wrapped
        effect = super().effect() | {
            "stage": engine.zero_optimization_stage(),
            "accumulation": engine.gradient_accumulation_steps(),
        }
        if self.stage < 3:  # beside those that are trained
            own = sum(group.nbytes for group in self._zero.bit16_groups_flat)
            effect["computing_weights_bytes"] = {"ranks": self.world.gather(own)}
        effect["versions"] |= {"deepspeed": deepspeed.__version__}
        return effect

    def _offloaded(self) -> str:
        offloads = [self.wrapped.zero_offload_param(), self.wrapped.zero_offload_optimizer()]
        parameters, optimizer = (each is not None and each.device != "none" for each in offloads)
        return "all" if parameters else "optimizer" if optimizer else "none"


def _give_zeros(parameter: nn.Parameter) -> None:
    """Give a parameter that was not used a gradient, also where stage 3 has freed its values."""
    shape, values = getattr(parameter, "ds_shape", parameter.shape), parameter.data
    if values.shape != shape:
        parameter.data = values.new_zeros(()).expand(shape)  # what a gradient is held against
    parameter.grad = torch.zeros(shape, dtype=values.dtype, device=values.device)
    parameter.data = values


def _refuse_gradient(name: str, parameter: nn.Parameter) -> None:
    raise UserError(
        f"parameter {name} got no gradient from the first batch and gets one now; ZeRO must know at the start what is "
        "trained. Use fsdp2 or ddp, or freeze it (optim.freeze)"
    )


class _Weights(Mapping[str, Tensor]):
    """A rank's part of the weights that are trained, and its buffers, by canonical name: what an average is made of."""

    def __init__(self, strategy: ZeROStrategy):
        self._strategy = strategy
        self._parameters: dict[str, nn.Parameter] = {}
        self._buffers: dict[str, str] = {}
        seen: set[int] = set()
        for name, tensor in own_tensors(strategy.model).items():
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            if isinstance(tensor, nn.Parameter):
                self._parameters[canonical_name(name)] = tensor
            else:
                self._buffers[canonical_name(name)] = name

    def __getitem__(self, name: str) -> Tensor:
        if name in self._parameters:
            return self._strategy.shard(self._parameters[name]).values
        return self._strategy.model.get_buffer(self._buffers[name])

    def __iter__(self) -> Iterator[str]:
        return iter((*self._parameters, *self._buffers))

    def __len__(self) -> int:
        return len(self._parameters) + len(self._buffers)


def _partition(model: nn.Module, world: World) -> dict[str, Shard]:
    """Cut parameters on the meta device into the ranks' parts, without values; return this rank's, to be filled."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((module, key))
    named = dict(model.named_parameters())
    if empty := [name for name, parameter in named.items() if not parameter.numel()]:
        raise UserError(
            f"parameter {empty[0]} has no elements (its shape is {tuple(named[empty[0]].shape)}), and ZeRO-3 cannot "
            "gather what is empty; use fsdp2 or zero2, or make it a buffer"
        )
    init = deepspeed.zero.Init(
        module=None, config_dict_or_path=world.accelerator.state.deepspeed_plugin.deepspeed_config
    )
    shards = {}
    for name, old in named.items():
        empty_one = torch.empty(old.shape, dtype=old.dtype, device=world.device)
        new: Any = nn.Parameter(empty_one, requires_grad=old.requires_grad)
        del empty_one
        init._convert_to_deepspeed_param(new)
        new.partition()
        for module, key in places[id(old)]:
            module._parameters[key] = new
        start, numel = _range_3(new, world.rank)
        shards[name] = Shard(tuple(new.ds_shape), start, new.ds_tensor.detach()[:numel], replicated=False, entry=None)
    return shards


def _range_3(parameter: Any, rank: int) -> tuple[int, int]:
    """Return the start and the length of a rank's part: all are equal, and the last one is padded."""
    part = parameter.partition_numel()
    start = min(rank * part, parameter.ds_numel)
    return start, min(part, parameter.ds_numel - start)
