"""One process, and DistributedDataParallel: every rank holds the whole state."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from distrain.config import UserError
from distrain.optim import FusedStep, drop_frozen, parts_of, sparse_layers
from distrain.parallel.comm import World
from distrain.parallel.model_tensors import model_to, share_tensors, travels
from distrain.parallel.parameter_writes import restored
from distrain.parallel.shards import Shard, whole
from distrain.parallel.state import TrainingState
from distrain.parallel.step_record import FIELDS, StepFlags, StepRecord
from distrain.parallel.strategy import (
    NOTHING,
    BuildSpec,
    Strategy,
    did_not_take_effect,
    make_ema,
    make_optimizer,
    with_mixed_precision,
)
from distrain.parallel.uncompiled import wrapping_in_ddp
from distrain.parallel.unused_parameters import reached_parameters
from distrain.system.compiler import compiler_imported
from distrain.system.numbers import a_kind


class DDPStrategy(Strategy):
    """Every rank holds the whole state; DDP averages the gradients where there are several.

    Among several processes a dry run takes a first micro-batch forward and backward and restores gradients and buffers,
    for two reasons. Parameters that get no gradient must be known before wrapping. And DDP lays out its buckets anew
    after its first backward pass, which changes the order in which more than two ranks are summed: without a dry run
    the first step after a resume would differ in its last bits from the same step of an uninterrupted run.
    """

    def __init__(self, world: World, plan: BuildSpec):
        super().__init__(world, plan)

        def build() -> tuple[nn.Module, Any]:
            model = model_to(plan.model(), world.device)
            return model, make_optimizer(plan, model)

        self.model, self.optimizer = world.run_on_all(build)
        self._take_optimizer()
        self._held: list[Tensor] = []
        """The gradients of a step, from its last backward pass on: collected once."""
        self._sends_itself = False
        """Whether there are buffers that DDP cannot send."""
        self._reached: set[Tensor] = set()
        self._carried: Tensor | None = None
        """This rank's numbers, to go to the others with the gradients of the next backward pass."""
        # it is not prepared: Accelerate's wrapper looks for optional packages at every step, which costs as much as a
        # small step. It serves gradient scaling and sharding, and neither is left to it here.
        self.state = TrainingState(self.model, self.optimizer, make_ema(plan, self.model), migrate=plan.migrate)
        with_mixed_precision(world, self.model)
        self._sets: dict[str, _Trained] = {}
        """What is trained together, by the name of the optimizer."""
        for name, part in parts_of(self.optimizer).items():
            with self.only(name):
                mine = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
                alike = len({(parameter.device, parameter.dtype) for parameter in mine}) == 1
                self._now = self._sets[name] = _Trained(mine, alike, self.model, FusedStep(part))
                if world.world_size > 1:
                    self._now.wrapped = self._distribute(plan, name)
        self.wrapped = self._now.wrapped

    @contextmanager
    def _only(self, name: str) -> Iterator[None]:
        if name in self._sets:  # not while they are made
            self._now = self._sets[name]
            self.wrapped = self._now.wrapped
        with super()._only(name):
            yield

    def _distribute(self, plan: BuildSpec, optimizer: str) -> nn.Module:
        world, model = self.world, self.model
        ranks = [set(reached) for reached in reached_parameters(world, plan, model, optimizer=optimizer)]
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        unused = {name for name in trained if not all(name in reached for reached in ranks)}
        handler = world.accelerator.ddp_handler
        assert handler is not None, "open_world sets it"
        handler.find_unused_parameters = bool(unused)
        self._now.all_reached = not unused
        if not unused and plan.accumulation > 1:
            for parameter in self._now.parameters:
                parameter.register_post_accumulate_grad_hook(self._reached.add)
        dtypes = {parameter.dtype for parameter in self._now.parameters}
        self._sends_itself = any(not travels(buffer) for buffer in model.buffers())
        carries = not unused and dtypes in ({torch.float32}, {torch.float64})
        carrier = _Carrier(model, dtypes.pop() if carries else None)
        tensors = (*carrier.named_parameters(), *carrier.named_buffers())
        frozen = [name for name, tensor in tensors if not tensor.requires_grad and not travels(tensor)]
        # their dtypes do not travel with DDP's, and all ranks have the same ones already
        nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(carrier, frozen)
        with wrapping_in_ddp():
            wrapped = world.accelerator.prepare_model(carrier)
        if not isinstance(wrapped, nn.parallel.DistributedDataParallel):
            return wrapped  # `check` says so
        self._now.carries = carrier.numbers
        if world.world_size > 2:
            with restored(model, (*model.parameters(), *plan.beside())):
                loss_sum = plan.loss_of(optimizer)(wrapped, 0)
                agree = self.agree_async(loss_sum.detach(), StepFlags())
                self.backward(loss_sum, torch.ones_like(loss_sum), last=True)
                agree()
            self._gradients, self._held = None, []
        return wrapped

    def micro_batch(self, last: bool) -> AbstractContextManager[Any]:
        """Gradients travel only with the last micro-batch of a step."""
        self._reached.clear()
        if self._first and self._sends_itself:
            share_tensors([buffer for buffer in self.model.buffers() if not travels(buffer)])
        self._first = last
        return NOTHING if last or self.world.world_size == 1 else self.world.accelerator.no_sync(self.wrapped)

    def agree_async(self, loss: Tensor, flags: StepFlags) -> Callable[[], StepRecord]:
        if self._looks:
            self._look()
        elif self._versions:
            self._note_late()
        numbers = self._now.carries
        if numbers is None:
            return StepRecord.reduce_async(self.world, loss, flags)
        self._carried = self.world.pack_metrics(loss, flags, numbers.dtype)

        def arrived() -> StepRecord:
            means, numbers.grad = numbers.grad, None
            assert means is not None, "the last backward pass has brought it"
            return StepRecord(means.clone())  # the gradient is a view of DDP's buffer

        return arrived

    def backward(self, loss_sum: Tensor, scale: Tensor, *, last: bool) -> None:
        carried, self._carried = self._carried, None
        if carried is None:
            _run_backward((loss_sum,), (scale,))
        else:
            assert self._now.carries is not None
            # of what is trained, a gradient is what is handed to it
            _run_backward((loss_sum, self._now.carries), (scale, carried))
        if last:
            self._held = self._held_gradients()
            if self._now.all_reached:
                self._complete()
            if self._thaws and drop_frozen(self.optimizer, self._step):
                self._held = self._held_gradients()
            if self._gradients is None:
                self._note_gradients(self._held)

    def _held_gradients(self) -> list[Tensor]:
        return [gradient for parameter in self._now.parameters if (gradient := parameter.grad) is not None]

    def grad_norm(self, record: StepRecord, *, same_bits: bool) -> Tensor:
        if self._has_sparse_gradient:
            raise UserError(
                "a gradient is sparse, and clipping, watching for anomalies and a scaled loss need dense ones; "
                "have the model compute it with sparse=False"
            )
        if self._now.one_kind and self._held:
            # the bits of get_total_norm, which would sort the gradients by device and dtype in every step
            norm = vector_norm(torch.stack(torch._foreach_norm(self._held)))
        else:
            norm = get_total_norm(self._held)
        if same_bits and self.world.world_size > 1:
            dist.broadcast(norm, src=0)  # its last bits may differ on another kind of GPU
        return norm

    def apply(self, coefficient: Tensor | None) -> None:
        held, now = self._held, self._now
        if coefficient is not None:
            torch._foreach_mul_(held, coefficient)
        now.step(whole=len(held) == len(now.parameters) and not self._has_sparse_gradient)
        self.skip()

    def skip(self) -> None:
        self._held = []
        if type(self._acting).zero_grad is not Optimizer.zero_grad:
            super().skip()
            return
        # as torch's zero_grad does, whose entry in a profile costs more than this
        for parameter in self._now.parameters:
            parameter.grad = None

    def _complete(self) -> None:
        """Give DDP the gradients that it still waits for on this rank; what no rank has used keeps none.

        DDP assumes that each gradient comes with each step, because that was so with the first batch. A gradient that
        does not come after all is negative zero: a sum is that only where every rank gives it, so the ranks that miss a
        parameter see whether another one has used it without a reduction of their own. Waits for the device if any is
        missed.
        """
        # with accumulation the gradients of earlier micro-batches are there, and are not averaged before this
        accumulated = self.accumulation > 1
        if len(self._reached if accumulated else self._held) == len(self._now.parameters):
            return
        missed = [
            each for each in self._now.parameters if (each not in self._reached if accumulated else each.grad is None)
        ]
        if sparse := [
            name for name, layer in sparse_layers(self.model) if any(layer.weight is each for each in missed)
        ]:
            raise UserError(
                f"{sparse[0]} with sparse=True was not used in a step on rank {self.world.rank}, and ddp has no "
                "sparse gradient of nothing to give the others; make it with sparse=False"
            )
        absent = [each for each in missed if each.grad is None]
        views = [each.view_as(each) for each in missed]
        torch.autograd.backward(views, [torch.full_like(each, -0.0) for each in views])
        gradients = [each.grad for each in absent if each.grad is not None]
        if gradients:
            unused = torch.stack([((each == 0) & each.signbit()).all() for each in gradients]).tolist()
            for parameter, nobody in zip(absent, unused, strict=True):
                if nobody:
                    parameter.grad = None
        self._held = self._held_gradients()

    def shard(self, parameter: nn.Parameter) -> Shard:
        return whole(parameter)

    def check(self) -> None:
        super().check()
        if self.world.world_size == 1:
            return
        for wrapped in (each.wrapped for each in self._sets.values()):
            if not isinstance(wrapped, nn.parallel.DistributedDataParallel):
                raise did_not_take_effect("ddp", f"the model that trains is {a_kind(wrapped)}")
            if (found := wrapped.process_group.size()) != self.world.world_size:
                raise did_not_take_effect(
                    "ddp", f"gradients are averaged over {found} of {self.world.world_size} ranks"
                )


@dataclass
class _Trained:
    """What is trained together: all parameters, or those of one of several optimizers."""

    parameters: list[nn.Parameter]
    one_kind: bool
    """Whether all are on one device and of one dtype."""
    wrapped: nn.Module
    """The model, or DDP around it that averages these gradients."""
    step: FusedStep
    """Lets their optimizer step."""
    all_reached: bool = False
    """Whether DDP expects a gradient for each of them with the last micro-batch of each step."""
    carries: nn.Parameter | None = None
    """The one whose gradient carries numbers from rank to rank; None where they travel by themselves."""


def _run_backward(outputs: tuple[Tensor, ...], gradients: tuple[Tensor, ...]) -> None:
    """Do what torch.autograd.backward does, without its checks of what fits already.

    These cost as much as a small layer, and import a package for symbolic mathematics. Threads of a GPU take the
    settings of torch's compiler from it, so it stays where that is in use.
    """
    on_host = outputs[0].device.type == "cpu" or not compiler_imported()
    if on_host and all(
        type(each) in _TENSORS and each.shape == gradient.shape
        for each, gradient in zip(outputs, gradients, strict=True)
    ):
        # graphs are not kept, nor made for second derivatives; what is trained need not be named
        _ENGINE.run_backward(outputs, gradients, False, False, (), allow_unreachable=True, accumulate_grad=True)
    else:
        torch.autograd.backward(outputs, gradients)


_ENGINE = torch.autograd.Variable._execution_engine
_TENSORS = (Tensor, nn.Parameter)


class _Carrier(nn.Module):
    """A model, beside it a parameter that is never trained: its gradient carries numbers from rank to rank.

    DDP averages gradients over the ranks in a few large reductions, and a handful of numbers among them costs nothing.
    A reduction of their own costs a small model's step a quarter more, also where it runs beside the backward pass:
    1.25 times the time (quartiles 1.01 to 1.57) in benchmarks/agreement.py, and 1.33 times where it follows that pass.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None):
        """`dtype`: of the numbers, which is that of all the model's gradients; None carries none."""
        super().__init__()
        # in a module of its own in any case: what is prepared already, Accelerate returns without wrapping it in DDP
        self.model = model
        self.numbers = nn.Parameter(torch.zeros(FIELDS, dtype=dtype)) if dtype is not None else None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)
