"""FSDP2: every rank holds rows of each parameter, of its gradient, of its optimizer's state and of its average."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from distrain.networks.blocks import block_classes
from distrain.strategy.engine import Engine, Numbers, Plan, did_not_take_effect, make_ema, with_arithmetic
from distrain.strategy.state import Shard, TrainingState, whole
from distrain.strategy.world import World


class Fsdp2(Engine):
    """The parameters are DTensors, sharded by rows; a block's are gathered when it computes."""

    def __init__(self, world: World, plan: Plan):
        super().__init__(world, plan)
        deferred = world.together(plan.deferred)
        model = deferred.model
        buffers = dict(model.named_buffers())
        values = {name: buffer.detach().clone() for name, buffer in buffers.items()}
        self._shard_model(model)
        offloads = world.asked.offload_parameters
        model.to_empty(device="cpu" if offloads else world.device)
        for name, value in values.items():
            _set_buffer(model, name, value.to(world.device))
        self.model = self.wrapped = with_arithmetic(world, model)
        if plan.initial:
            parameters = dict(model.named_parameters())

            def fill() -> None:
                with torch.no_grad():
                    for name, value in deferred.values():
                        shard = self.shard(parameters[name])
                        flat = value.detach().reshape(-1)[shard.start : shard.start + shard.values.numel()]
                        shard.values.copy_(flat.reshape(shard.values.shape))

            world.together(fill)
        # on the sharded parameters, so that its state is sharded as they are
        self.optimizer = world.together(lambda: plan.optimizer(model))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._sharded = [parameter for parameter in trained if isinstance(parameter, DTensor)]
        self._replicated = [parameter for parameter in trained if not isinstance(parameter, DTensor)]
        self.state = TrainingState(model, self.optimizer, make_ema(plan, model), self.shard, carry=plan.carry)

    def _shard_model(self, model: nn.Module) -> None:
        plugin = self.world.accelerator.state.fsdp_plugin
        plugin.transformer_cls_names_to_wrap = [found.__name__ for found in block_classes(model)]
        # rows are what is sharded, and these have none: FSDP2 refuses them
        rowless = [parameter for parameter in model.parameters() if parameter.dim() == 0]
        if rowless:
            plugin.ignored_modules = [nn.ParameterList(rowless)]
        fsdp2_prepare_model(self.world.accelerator, model)

    def backward(self, objective: Tensor, share: Tensor) -> None:
        # gradients are reduced with every micro-batch: kept whole until the last one, they would not be sharded
        objective.backward(self._scaled(share))

    def step(self, objective: Tensor, share: Tensor, loss: Tensor, flags: Sequence[float]) -> Numbers | None:
        world = self.world
        objective.backward(self._scaled(share))
        self._average_replicated()
        gradients = [p.grad.to_local() for p in self._sharded if p.grad is not None]  # type: ignore[attr-defined]
        own = [p.grad for p in self._replicated if p.grad is not None]
        # the norm and what the ranks tell each other, in one reduction
        numbers = torch.zeros(2 + len(flags), dtype=torch.float64, device=world.device)
        numbers[0] = _square(gradients) + (_square(own) / world.world_size if own else 0.0)
        numbers[1:] = torch.tensor((0.0, *flags), dtype=torch.float64)
        numbers[1] = loss
        world.sum(numbers)
        unscale = 1.0 if self.scale is None else 1.0 / self.scale.scale
        norm = numbers[0].sqrt() * unscale
        coefficient = self._coefficient(norm)
        overflowed = self._overflowed(norm)
        if not overflowed:
            if coefficient is not None:
                _multiply([*gradients, *own], coefficient)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if overflowed:
            return None
        if self.state.ema is not None:
            self.state.ema.update()
        read = world.later(torch.cat((norm.reshape(1), numbers[1:] / world.world_size)))

        def split() -> tuple[float, list[float]]:
            norm, *means = read()
            return (norm if self.clip_norm is not None or self.scale is not None else 0.0), means

        return split

    def _average_replicated(self) -> None:
        for parameter in self._replicated:
            if parameter.grad is not None and self.world.world_size > 1:
                dist.all_reduce(parameter.grad)
                parameter.grad /= self.world.world_size

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

    def settle(self) -> None:
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    @contextmanager
    def whole(self) -> Iterator[None]:
        modules = [module for module in self.model.modules() if isinstance(module, FSDPModule)]
        for module in modules:
            module.unshard()
            module.set_reshard_after_forward(False, recurse=False)
        try:
            yield
        finally:
            for module in modules:
                module.set_reshard_after_forward(True, recurse=False)
                module.reshard()

    def check(self) -> None:
        odd = [
            name
            for name, parameter in self.model.named_parameters()
            if parameter.dim()
            and not (isinstance(parameter, DTensor) and parameter.device_mesh.size() == self.world.world_size)
        ]
        if odd:
            raise did_not_take_effect("fsdp2", f"{odd[0]} and {len(odd) - 1} others are not sharded over all ranks")

    def effect(self) -> dict[str, Any]:
        units = sum(isinstance(module, FSDPModule) for module in self.model.modules())
        return super().effect() | {"engine": "FSDPModule", "units": units}


def _spans(parameter: nn.Parameter, world_size: int) -> bool:
    return isinstance(parameter, DTensor) and parameter.device_mesh.size() == world_size


def _square(tensors: list[Tensor]) -> Tensor:
    """Return the sum of squares (0-d, float64)."""
    tensors = [tensor for tensor in tensors if tensor.numel()]
    if not tensors:
        return torch.zeros((), dtype=torch.float64)
    return torch.stack([norm.double() for norm in torch._foreach_norm(tensors)]).square().sum()


def _multiply(tensors: list[Tensor], factor: Tensor) -> None:
    by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        by_kind.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    for (device, dtype), alike in by_kind.items():
        torch._foreach_mul_(alike, factor.to(device, dtype))


def _set_buffer(model: nn.Module, name: str, value: Tensor) -> None:
    path, _, key = name.rpartition(".")
    model.get_submodule(path)._buffers[key] = value
