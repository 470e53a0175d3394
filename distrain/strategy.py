"""All that differs between the ways of spreading a run over processes.

Building the `Accelerator`, checking that the world is the one that was asked for, wrapping a model, agreeing on
numbers, and turning the state of training into flat pieces for `distrain.checkpoint` and back. The other rooms ask a
`World` and never look at a strategy.
"""

from __future__ import annotations

import os
import pickle
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor, nn

from distrain.checkpoint import Piece, Reader, TensorSpec, explain_difference
from distrain.config import UserError
from distrain.optim import Ema, plain_name

# --------------------------------------------------------------------------------------------------------------------
# The world that was asked for, and the one that is there


@dataclass(frozen=True)
class Environment:
    """What a launcher told this process through environment variables."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    launched: bool
    """Whether a launcher set the variables at all."""

    @classmethod
    def read(cls, variables: Mapping[str, str]) -> Environment:
        """Read RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE; raises UserError when only some are there."""
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
        given = [name for name in names if name in variables]
        if not given:
            return cls(0, 0, 1, 1, launched=False)
        if missing := [name for name in names if name not in variables]:
            raise UserError(
                f"the launcher set {', '.join(given)} but not {', '.join(missing)}; "
                "start with `distrain train`, `accelerate launch` or `torchrun`, or unset them for one process"
            )
        try:
            rank, local_rank, world_size = (int(variables[name]) for name in names)
            local_world_size = int(variables.get("LOCAL_WORLD_SIZE", world_size))
        except ValueError:
            values = ", ".join(f"{name}={variables[name]!r}" for name in names)
            raise UserError(f"expected whole numbers from the launcher, found {values}") from None
        return cls(rank, local_rank, world_size, local_world_size, launched=True)


_PROCESSES_ASKED = re.compile(r"--(?:num[-_]processes|nproc[-_]per[-_]node)(?:=(\d+))?")


def processes_asked(launcher_argv: Sequence[str]) -> int | None:
    """Return the number of processes that a launcher's command line asks for, or None where it names none."""
    for index, argument in enumerate(launcher_argv):
        if match := _PROCESSES_ASKED.fullmatch(argument):
            text = match[1] or (launcher_argv[index + 1] if index + 1 < len(launcher_argv) else "")
            return int(text) if text.isdigit() else None
    return None


def launcher_argv() -> list[str]:
    """Return the parent's command line when it is a launcher, otherwise an empty list (always so outside Linux).

    `accelerate launch --cpu --num_processes 2` starts one process and says nothing: only its own command line still
    knows that two were asked for.
    """
    try:
        argv = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []
    is_launcher = any(re.search(r"accelerate|torchrun|torch\.distributed\.(run|launch)", part) for part in argv[:4])
    return argv if is_launcher else []


def check_world(environment: Environment, expected: int | None, argv: Sequence[str]) -> None:
    """Raise UserError unless the launcher's world is the one asked for, by `expected` or by the launcher's own argv."""
    found = environment.world_size
    wanted, who = expected, "this run"
    if wanted is None and not environment.launched:
        wanted, who = processes_asked(argv), "the launcher's command"
    if wanted is not None and wanted != found:
        raise UserError(
            f"{who} asks for {_processes(wanted)}, found {found}; nothing was written.\n"
            f"  Start all of them with `distrain train RECIPE --processes {wanted}`, or with\n"
            f"  `accelerate launch --config_file accelerate_configs/multi_cpu.yaml --num_processes {wanted}` "
            "(`accelerate launch --cpu` and plain `python` start only one),\n"
            f"  or run with {_processes(found)}: `--processes {found}`."
        )


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"


# --------------------------------------------------------------------------------------------------------------------
# The world

_PATIENCE = timedelta(days=1)
"""How long ranks wait while rank 0 does something for all of them."""


class World:
    """The processes of this run: who they are, and how they agree. Every method is called by all ranks.

    Satisfies `distrain.checkpoint.Communicator`.
    """

    def __init__(self, accelerator: Accelerator, precision: str):
        self.accelerator = accelerator
        self.precision = precision
        """fp32, bf16 or fp64, with `auto` resolved."""
        self.rank = accelerator.process_index
        self.world_size = accelerator.num_processes
        self.device = accelerator.device
        self.strategy = "single" if self.world_size == 1 else "ddp"
        # NCCL moves only device memory, and its object collectives wait for the device: small talk goes over gloo
        needs_own = self.world_size > 1 and dist.get_backend() != "gloo"
        self._control: dist.ProcessGroup | None = dist.new_group(backend="gloo") if needs_own else None  # type: ignore[assignment]
        self._patient: dist.ProcessGroup | None = None
        if self.world_size > 1:
            self._patient = dist.new_group(backend="gloo", timeout=_PATIENCE)  # type: ignore[assignment]

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over all ranks of `values`, the same bits on every rank."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def later(self, values: Tensor) -> Callable[[], list[float]]:
        """Return a function that reads `values` (k,); called a step later, it does not wait for the device."""
        if values.device.type == "cpu":
            return values.tolist
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        done = torch.cuda.Event()
        done.record()

        def read() -> list[float]:
            done.synchronize()
            return host.tolist()

        return read

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's `value` (a small object), in the order of ranks, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._control)
        return values

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's `value` (a small object) on every rank."""
        return self._broadcast(value, self._control)

    def _broadcast(self, value: Any, group: dist.ProcessGroup | None) -> Any:
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=group)
        return values[0]

    def first(self, action: Callable[[], Any]) -> Any:
        """Rank 0 runs `action`; every rank returns its result, or raises what it raised.

        Ranks wait for it for up to a day: data may be prepared and large checkpoints verified here. A process that has
        ended ends their waiting at once.
        """
        outcome: tuple[Any, Exception | None] = (None, None)
        own: Exception | None = None
        if self.rank == 0:
            try:
                outcome = (action(), None)
            except Exception as error:
                outcome, own = (None, _picklable(error)), error
        result, failure = self._broadcast(outcome, self._patient)
        if failure is not None:
            raise own or _of_another_rank(failure)
        return result

    def together(self, action: Callable[[], Any]) -> Any:
        """Every rank runs `action` and returns its own result; if any rank fails, all raise the first failure.

        For work in which ranks can fail alone, so that none waits for another that has already given up. `action` must
        not speak to other ranks.
        """
        result, own = None, None
        try:
            result = action()
        except Exception as error:
            own = error
        for rank, failure in enumerate(self.gather(own and _picklable(own))):
            if failure is None:
                continue
            if rank == self.rank and own is not None:
                raise own
            if not isinstance(failure, UserError):
                failure = RuntimeError(f"rank {rank} failed: {type(failure).__name__}: {failure}")
            raise _of_another_rank(failure)
        return result

    def for_evaluation(self, model: nn.Module) -> nn.Module:
        """Return a model that only evaluates, in this world's arithmetic."""
        return self.accelerator.prepare_model(model, evaluation_mode=True)

    def close(self) -> None:
        """Leave the process group in order; ending a process without it can abort under gloo."""
        self.accelerator.free_memory()
        if dist.is_initialized():
            dist.destroy_process_group()


def _picklable(error: Exception) -> Exception:
    """Return `error`, or where it does not come out of pickling as it went in, a RuntimeError that says the same."""
    try:
        if type(pickle.loads(pickle.dumps(error))) is type(error):
            return error
    except Exception:  # whatever a class of the user's does there, what went wrong before matters more
        pass
    return RuntimeError(f"{type(error).__name__}: {error}")


def _of_another_rank(error: Exception) -> Exception:
    # read where failures are told: the rank that failed has the traceback, and is to be the one that tells
    error.of_another_rank = True  # type: ignore[attr-defined]
    return error


def open_world(precision: str, *, timeout_s: float = 600.0) -> World:
    """Join the processes of this run. All ranks call; raises UserError when the world is not the launcher's.

    `precision` is the recipe's: auto, fp32, bf16 or fp64. `timeout_s` bounds every collective but those of `first`.
    """
    environment = Environment.read(os.environ)
    on_cpu = not torch.cuda.is_available()
    if precision == "auto":
        precision = "bf16" if not on_cpu and torch.cuda.is_bf16_supported() else "fp32"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*OMP_NUM_THREADS/MKL_NUM_THREADS unset.*")
        accelerator = Accelerator(
            # without it several CPU processes are each rank 0 of 1
            cpu=on_cpu,
            mixed_precision="bf16" if precision == "bf16" else "no",
            # accumulation has one owner: train_step
            gradient_accumulation_steps=1,
            step_scheduler_with_optimizer=False,
            kwargs_handlers=[
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
                InitProcessGroupKwargs(timeout=timedelta(seconds=timeout_s)),
            ],
        )
    world = World(accelerator, precision)
    if (world.rank, world.world_size) != (environment.rank, environment.world_size):
        raise UserError(
            f"the launcher made this process rank {environment.rank} of {environment.world_size}, but it came up as "
            f"rank {world.rank} of {world.world_size}; check that MASTER_ADDR and MASTER_PORT are the same everywhere"
        )
    return world


# --------------------------------------------------------------------------------------------------------------------
# A model among the processes


def prepare(
    world: World, model: nn.Module, optimizer: torch.optim.Optimizer, objective: Callable[[nn.Module], Tensor]
) -> tuple[nn.Module, Any]:
    """Wrap model and optimizer for this world; returns (wrapped model, wrapped optimizer). All ranks call.

    `objective` gives the loss (0-d) of a model, wrapped or not, on a first micro-batch. Among several processes it is
    rehearsed forward and backward, after which gradients and buffers are as before, for two reasons. Parameters that
    get no gradient must be known before wrapping. And DDP lays its buckets out anew after its first backward pass,
    which changes the order in which more than two ranks are summed: without a rehearsal the first step after a resume
    would differ in its last bits from the same step of an uninterrupted run.
    """
    # moves it to the device and puts the arithmetic around its forward, for training and evaluation alike
    model = world.accelerator.prepare_model(model, evaluation_mode=True)
    if world.world_size == 1:
        return model, optimizer

    def without_gradient() -> list[str]:
        with _restored(model):
            objective(model).backward()
            return [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]

    unused = world.together(without_gradient)
    anywhere = sorted({name for names in world.gather(unused) for name in names})
    handler = world.accelerator.ddp_handler
    assert handler is not None, "open_world sets it"
    handler.find_unused_parameters = bool(anywhere)
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    carries = not anywhere and dtypes in ({torch.float32}, {torch.float64})
    # in a module of its own in any case: what is prepared already, Accelerate returns without wrapping it in DDP
    wrapped = world.accelerator.prepare_model(_Carrier(model, dtypes.pop() if carries else None))
    assert isinstance(wrapped, nn.parallel.DistributedDataParallel), "without it no gradient would travel"
    if world.world_size > 2:
        with _restored(model):
            value = objective(wrapped)
            backward(world, wrapped, value, torch.ones_like(value), value.detach(), (0.0, 0.0, 0.0))
    # Accelerate's wrapper looks for optional packages at every step, which costs as much as a small step. It serves
    # gradient scaling and sharding, and there is neither here.
    return wrapped, optimizer


class _Carrier(nn.Module):
    """A model, beside it a parameter that is never trained: its gradient carries numbers from rank to rank.

    DDP averages gradients over the ranks in a few large reductions. A handful of numbers among them costs nothing,
    while a reduction of their own costs a small model's step half as much again.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None):
        """`dtype`: of the numbers, which is that of all the model's gradients; None carries none."""
        super().__init__()
        self.model = model
        self.numbers = nn.Parameter(torch.zeros(4, dtype=dtype)) if dtype is not None else None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


def backward(
    world: World, wrapped: nn.Module, objective: Tensor, share: Tensor, loss: Tensor, flags: Sequence[float]
) -> Callable[[], list[float]]:
    """Go backward from `share * objective` (both 0-d) with the last micro-batch of a step. All ranks call.

    On the way the means over the ranks of `loss` (0-d) and of the three `flags` are taken; the returned function reads
    them, best a step later.
    """
    if world.world_size == 1:
        objective.backward(share)
        read = world.later(loss.reshape(1))
        return lambda: [*read(), *flags]
    numbers = torch.tensor((0.0, *flags), dtype=torch.float64, device=objective.device)
    numbers[0] = loss
    carrier = wrapped.module
    if isinstance(carrier, _Carrier) and carrier.numbers is not None:
        carried = torch.dot(carrier.numbers, numbers.to(carrier.numbers.dtype))
        torch.autograd.backward((objective, carried), (share, torch.ones_like(carried)))
        means, carrier.numbers.grad = carrier.numbers.grad, None
        assert means is not None
        return world.later(means.clone())  # the gradient is a view of DDP's buffer
    objective.backward(share)
    return world.later(world.sum(numbers) / world.world_size)


class _restored(AbstractContextManager[None]):
    """Puts a model's buffers and absent gradients back on leaving."""

    def __init__(self, model: nn.Module):
        self._model = model
        self._buffers = [buffer.clone() for buffer in model.buffers()]

    def __exit__(self, *exception: object) -> None:
        with torch.no_grad():
            for buffer, before in zip(self._model.buffers(), self._buffers, strict=True):
                buffer.copy_(before)
        self._model.zero_grad(set_to_none=True)


def without_sync(world: World, model: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """Return the context for one micro-batch: gradients travel only with the `last` one of a step."""
    return nullcontext() if last or world.world_size == 1 else world.accelerator.no_sync(model)


def align_buffers(world: World, state: TrainingState) -> None:
    """Give every rank rank 0's buffers, as the next training step would, and their averages: all evaluate one model."""
    if world.world_size == 1:
        return
    buffers = list(state.model.buffers())
    if state.ema is not None:
        parameters = {plain_name(name) for name, _ in state.model.named_parameters()}
        buffers += [average for name, average in state.ema.tensors().items() if name not in parameters]
    for buffer in buffers:
        dist.broadcast(buffer, src=0)


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """Scale the whole gradient down to `max_norm` where it is larger; returns the norm that it had (0-d)."""
    return nn.utils.clip_grad_norm_(parameters, max_norm)


# --------------------------------------------------------------------------------------------------------------------
# Pieces of a state

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}


@dataclass
class TrainingState:
    """What a checkpoint holds: everything that is not computed from the recipe and the step."""

    model: nn.Module
    """Unwrapped: its names are the plain ones."""
    optimizer: torch.optim.Optimizer | None
    """Unwrapped; None for a model that is only used."""
    ema: Ema | None

    def __post_init__(self) -> None:
        self._built = [_plain_values(group) for group in self.optimizer.param_groups] if self.optimizer else []

    def tensors(self) -> tuple[dict[str, tuple[str, Tensor]], dict[str, str]]:
        """Return {name: (role, tensor)} in a fixed order, and {alias: name} for tensors that have several names."""
        tensors: dict[str, tuple[str, Tensor]] = {}
        aliases: dict[str, str] = {}
        first_name: dict[int, str] = {}
        parameters = {id(parameter) for parameter in self.model.parameters()}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if not isinstance(tensor, Tensor):
                raise UserError(
                    f"the model's state '{name}' is {type(tensor).__name__}, not a tensor; it cannot be saved"
                )
            if id(tensor) in first_name:
                aliases[f"model/{name}"] = first_name[id(tensor)]
                continue
            first_name[id(tensor)] = f"model/{name}"
            role = "parameter" if id(tensor) in parameters else "buffer"
            tensors[f"model/{name}"] = (role, tensor.detach())
        if self.optimizer is not None:
            for name, parameter in self.model.named_parameters():
                # sorted: a fresh optimizer and a restored one hold them in different orders
                for key, value in sorted(self.optimizer.state.get(parameter, {}).items()):
                    if isinstance(value, Tensor):
                        tensors[f"optimizer/{name}/{key}"] = ("optimizer", value)
        if self.ema is not None:
            for name, tensor in self.ema.tensors().items():
                tensors[f"ema/{name}"] = ("ema", tensor)
        return tensors, aliases

    def scalars(self) -> dict[str, Any]:
        """Return the optimizer's values that are not tensors, and the settings of its groups (for the record)."""
        assert self.optimizer is not None, "scalars are those of training"
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        values = {
            names[id(parameter)]: plain
            for parameter, state in self.optimizer.state.items()
            if (plain := {key: value for key, value in state.items() if not isinstance(value, Tensor)})
        }
        groups = [
            _plain_values(group) | {"params": [names[id(parameter)] for parameter in group["params"]]}
            for group in self.optimizer.param_groups
        ]
        # what an optimizer itself has changed in its groups is state (some count steps there); the rest is the recipe's
        changed = [
            {key: value for key, value in _plain_values(group).items() if value != built.get(key, ...) and key != "lr"}
            for group, built in zip(self.optimizer.param_groups, self._built, strict=True)
        ]
        return {
            "optimizer": type(self.optimizer).__name__,
            "optimizer_values": values,
            "optimizer_groups": groups,
            "optimizer_group_values": changed,
        }

    def specs(self) -> dict[str, TensorSpec]:
        """Return shape, dtype and role of every full tensor."""
        return {
            name: TensorSpec(tuple(tensor.shape), _DTYPE_NAMES[tensor.dtype], role)
            for name, (role, tensor) in self.tensors()[0].items()
        }

    def pieces(self, rank: int, world_size: int) -> Iterator[Piece]:
        """Yield the flat ranges that `rank` writes: an equal share, in bytes, of the state laid end to end."""
        tensors, _ = self.tensors()
        total = sum(tensor.numel() * tensor.element_size() for _, tensor in tensors.values())
        low, high = (total * r // world_size for r in (rank, rank + 1))
        offset = 0
        for name, (_, tensor) in tensors.items():
            size = tensor.element_size()
            # both neighbours round a cut inside this tensor up to the same element
            start, stop = (min(max(-(-(cut - offset) // size), 0), tensor.numel()) for cut in (low, high))
            offset += tensor.numel() * size
            if stop > start:
                flat = tensor.reshape(-1)[start:stop]
                yield Piece(name, start, _bytes_of(flat.cpu()), copied=flat.device.type != "cpu")

    def restore(self, reader: Reader) -> None:
        """Fill model, optimizer and average from a checkpoint. Raises UserError naming all that does not fit."""
        tensors = {name: tensor for name, (role, tensor) in self.tensors()[0].items() if role != "optimizer"}
        check_fit(reader, self.specs(), ("parameter", "buffer") if self.ema is None else ("parameter", "buffer", "ema"))
        for name, tensor in tensors.items():
            fill(tensor, reader, name)
        self._restore_optimizer(reader)

    def _restore_optimizer(self, reader: Reader) -> None:
        manifest = reader.manifest
        assert self.optimizer is not None, "only training is restored"
        was, now = manifest.scalars["optimizer"], type(self.optimizer).__name__
        if was != now:
            raise UserError(
                f"{reader.path} holds the state of {was}, the recipe asks for {now}; "
                "use the same optimizer, or start a new run with model.weights set to the exported model"
            )
        states: dict[str, dict[str, Any]] = {}
        for name, spec in manifest.specs.items():
            if spec.role == "optimizer":
                parameter, _, key = name.removeprefix("optimizer/").rpartition("/")
                value = torch.empty(spec.shape, dtype=_DTYPES[spec.dtype])
                fill(value, reader, name)
                states.setdefault(parameter, {})[key] = value
        for parameter, values in manifest.scalars["optimizer_values"].items():
            states.setdefault(parameter, {}).update(values)
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        trained = [names[id(parameter)] for group in self.optimizer.param_groups for parameter in group["params"]]
        if lost := sorted(set(states) - set(trained)):
            raise UserError(
                f"{reader.path} holds optimizer state for {len(lost)} parameters that this recipe does not train, "
                f"such as {', '.join(lost[:3])}; set optim.freeze as it was"
            )
        # torch's own loader knows which values belong on the device and which stay on the host
        self.optimizer.load_state_dict(
            {
                "state": {index: states[name] for index, name in enumerate(trained) if name in states},
                "param_groups": self.optimizer.state_dict()["param_groups"],
            }
        )
        for group, changed in zip(self.optimizer.param_groups, manifest.scalars["optimizer_group_values"], strict=True):
            group.update(changed)


def _plain_values(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if isinstance(value, int | float | str | bool | None)}


def check_fit(reader: Reader, specs: dict[str, TensorSpec], roles: Sequence[str]) -> None:
    """Raise UserError unless the checkpoint's tensors of these roles are exactly those of `specs`."""
    manifest = reader.manifest
    stored = replace(manifest, tensors={name: t for name, t in manifest.tensors.items() if t.spec.role in roles})
    own = {name: spec for name, spec in specs.items() if spec.role in roles}
    if problems := explain_difference(stored, own):
        raise UserError(
            f"{reader.path} holds another model than the recipe's:\n  "
            + "\n  ".join(problems)
            + "\nUse the recipe that wrote it, or another --run-dir to start anew."
        )


def fill(tensor: Tensor, reader: Reader, name: str) -> None:
    """Copy the stored tensor `name` into `tensor`, which has its shape and dtype, on any device."""
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype)
    reader.read(name, 0, tensor.numel(), _bytes_of(flat))
    with torch.no_grad():
        tensor.copy_(flat.reshape(tensor.shape))


def load_weights(model: nn.Module, reader: Reader, *, averaged: bool) -> None:
    """Fill a model from a checkpoint, with its averaged weights where `averaged`. Raises UserError as `restore`."""
    state = TrainingState(model, None, None)
    check_fit(reader, state.specs(), ("parameter", "buffer"))
    for name, (_, tensor) in state.tensors()[0].items():
        average = name.replace("model/", "ema/", 1)
        fill(tensor, reader, average if averaged and average in reader.manifest.tensors else name)


def _bytes_of(flat: Tensor) -> np.ndarray:
    """Return the memory of a contiguous 1-D host tensor as bytes, without copying."""
    return flat.view(torch.uint8).numpy()
