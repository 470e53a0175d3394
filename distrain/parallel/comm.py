"""The processes of a run, and how they agree; who of them holds what is in mesh.py."""

from __future__ import annotations

import importlib
import logging
import math
import os
import pickle
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from accelerate import (
    Accelerator,
    DeepSpeedPlugin,
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
    PartialState,
)
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn

from distrain.config import TuneSection, UserError
from distrain.config.strategies import STRATEGIES
from distrain.networks.layouts import channels_last_problem, lay_channels_last
from distrain.parallel import determinism
from distrain.parallel.accelerate_config import take_over
from distrain.parallel.copying import CopyStream
from distrain.parallel.mesh import Mesh
from distrain.parallel.precision import MixedPrecision, resolve
from distrain.parallel.strategy_spec import StrategySpec, check_precision
from distrain.parallel.tuning import Facts, Tuning, resolve_tuning, set_switches
from distrain.parallel.uncompiled import compiling_when_called
from distrain.run.heartbeat import progress
from distrain.system.environment import Environment, forget_world, has_launcher
from distrain.system.logs import EACH_RANK

logger = logging.getLogger(__name__)

AT_ONCE = 1024
"""Numbers that the first reduction of `World.sum_of_all` carries: to send 8 KB takes as long as to send one."""

_PATIENCE = timedelta(days=1)
"""How long ranks wait while rank 0 does something for all of them."""

_WORD_AFTER_S = 30.0
"""After how long a process says that it waits for others which no launcher has started."""


class World:
    """The processes of this run: who they are, and how they agree. Every method is called by all ranks.

    Satisfies `distrain.checkpoint.Communicator`.
    """

    deterministic = False
    """Whether this process computes deterministically."""

    tuning = Tuning()
    """What the recipe's section `tune` comes to, once the model is built; see `tune`."""

    copies: CopyStream | None = None
    """What copies large batches; None where they go in line with the kernels."""

    mesh: Mesh
    """Who shards, who replicates, and which part of the data each rank reads."""

    sources: Sequence[int]
    """Of each rank, the first one of its node, which builds models for all of that node."""

    def __init__(
        self,
        accelerator: Accelerator,
        mixed_precision: MixedPrecision,
        asked: StrategySpec,
        timeout: timedelta,
        closing: Callable[[], None] = lambda: None,
    ):
        """`closing` is called at the end of `close`."""
        self.accelerator, self._closing = accelerator, closing
        self.mixed_precision = mixed_precision
        self.precision = mixed_precision.name
        """The recipe's, with `auto` resolved."""
        self.asked = asked
        self.timeout = timeout
        """Of every collective but those of `run_on_rank0`."""
        self.strategy = asked.strategy
        """single, ddp, zero1, zero2, zero3 or fsdp2."""
        self.forward_is_collective = STRATEGIES[asked.strategy].forward_is_collective
        """forward() runs collectives, so every rank must call it equally often."""
        self.rank = accelerator.process_index
        self.world_size = accelerator.num_processes
        self.device = accelerator.device
        # NCCL moves only device memory, and its object collectives wait for the device: small talk goes over gloo
        needs_own = self.world_size > 1 and dist.get_backend() != "gloo"
        self._control: Any = dist.new_group(backend="gloo", timeout=timeout) if needs_own else None
        self._patient: dist.ProcessGroup | None = None
        if self.world_size > 1:
            self._patient = dist.new_group(backend="gloo", timeout=_PATIENCE)  # type: ignore[assignment]
        self._store_flags = 0
        self._packed: tuple[tuple[Any, ...], Tensor] = (), torch.empty(0)
        """Flags that were packed, with their dtype, and the tensor on the device."""

    def tune(
        self,
        section: TuneSection,
        model: nn.Module,
        input_shape: tuple[int, ...] | None = None,
        *,
        lenient: bool = False,
        **facts: Any,
    ) -> None:
        """Resolve the recipe's section `tune` for this world and a model as it was built, and have both follow it.

        `input_shape`: of a sample, where inputs are one tensor. `facts` are those of `Facts` that neither knows. Raises
        UserError as `resolve_tuning` does.
        """
        if not lenient:
            self.mixed_precision.check_kept()  # building the model has run the user's code
        capability = torch.cuda.get_device_capability(self.device) if self.device.type == "cuda" else (0, 0)
        known = Facts(
            device=self.device.type,
            capability=capability,
            precision=self.precision,
            autocast=self.mixed_precision.autocast is not None,
            deterministic=self.deterministic,
            strategy=self.strategy,
            model=model,
            offloads_weights=self.asked.offload_parameters,
            casts_gradients=section.cast_before_reduce is True,
            channels_last_problem=self._channels_last_problem(model, input_shape)
            if input_shape is not None and len(input_shape) == 3 and section.channels_last is not False
            else None,
            **facts,
        )
        self.tuning = resolve_tuning(section, known, lenient=lenient)
        self.mixed_precision = self.mixed_precision.with_tf32(self.tuning["tf32"])
        set_switches(section, self.tuning)
        if self.tuning["channels_last"] and not STRATEGIES[self.strategy].shards:
            lay_channels_last(model)
        self.copies = CopyStream(self.device) if self.tuning["copy_stream"] else None

    def _channels_last_problem(self, model: nn.Module, shape: tuple[int, ...]) -> Callable[[], str | None]:
        return lambda: channels_last_problem(
            model, shape, self.device, self.mixed_precision.context(self.device.type, cache=False)
        )

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over all ranks of `values`, the same bits on every rank."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def sum_async(self, values: Tensor) -> Callable[[], Tensor]:
        """Begin to sum `values` over all ranks, in place; returns a function that waits for the sum and returns it.

        On a GPU the device waits, and not the host.
        """
        work = dist.all_reduce(values, async_op=True) if self.world_size > 1 else None

        def wait() -> Tensor:
            if work is not None:
                work.wait()
            return values

        return wait

    def pin(self, values: Tensor) -> Tensor:
        """Return `values` (on the host) in memory from which they go to a GPU while the host continues."""
        return values.pin_memory() if self.device.type == "cuda" else values

    def to_device(self, values: Tensor) -> Tensor:
        """Return `values` (on the host, pinned or not) on the device; the host does not wait for it."""
        return self.put(self.pin(values))

    def put(self, values: Tensor) -> Tensor:
        """Return `values` on the device; the host does not wait where they are pinned."""
        return values.to(self.device, non_blocking=True)

    def pack_metrics(self, loss: Tensor, flags: Sequence[float], dtype: torch.dtype = torch.float64) -> Tensor:
        """Return `loss` (0-d) and the flags as one tensor on the device, without waiting for the device."""
        if (*flags, dtype) != self._packed[0]:  # most steps have the flags of the one before
            self._packed = (*flags, dtype), self.to_device(torch.tensor(tuple(flags), dtype=dtype))
        return torch.cat((loss.reshape(1).to(dtype), self._packed[1]))

    def to_host_async(self, *values: Tensor) -> Callable[[], list[float]]:
        """Return a function that reads all `values` (each 1-D); a step later it does not wait for the device."""
        if values[0].device.type == "cpu":
            return lambda: [number for each in values for number in each.tolist()]
        together = torch.cat(values)
        host = torch.empty(together.shape, dtype=together.dtype, pin_memory=True)
        host.copy_(together, non_blocking=True)
        done = torch.cuda.Event()
        done.record()

        def read() -> list[float]:
            done.synchronize()
            return host.tolist()

        return read

    def gather(self, value: Any, *, patient: bool = False) -> list[Any]:
        """Return every rank's `value` (a small object), in the order of ranks, on every rank.

        `patient`: ranks may come up to a day apart.
        """
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._patient if patient else self._control)
        progress()
        return values

    def gather_tensors(self, values: Tensor) -> list[Tensor]:
        """Return every rank's `values`, on the device and of one shape and dtype, in the order of ranks."""
        if self.world_size == 1:
            return [values]
        own = values.contiguous()
        parts = [torch.empty_like(own) for _ in range(self.world_size)]
        # as bytes, as not every backend knows every dtype
        dist.all_gather([each.view(-1).view(torch.uint8) for each in parts], own.view(-1).view(torch.uint8))
        return parts

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's `value` (a small object) on every rank."""
        return self._broadcast(value, self._control)

    def _broadcast(self, value: Any, group: dist.ProcessGroup | None) -> Any:
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=group)
        progress()
        return values[0]

    def send(self, values: Tensor, rank: int) -> None:
        """Send `values` (on the CPU, contiguous) to one rank, which calls `receive`."""
        dist.send(values, rank, group=self._control)

    def receive(self, values: Tensor, rank: int) -> None:
        """Fill `values` (on the CPU, contiguous) with what `rank` sends."""
        dist.recv(values, rank, group=self._control)

    def store_flag(self) -> StoreFlag:
        """Return something that one rank can set and the others read without waiting."""
        self._store_flags += 1
        store = dist.distributed_c10d._get_default_store() if self.world_size > 1 else None
        return StoreFlag(store, f"distrain/flag/{self._store_flags}")

    def run_on_rank0(self, action: Callable[[], Any]) -> Any:
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

    def run_on_all(self, action: Callable[[], Any]) -> Any:
        """Every rank runs `action` and returns its own result; if any rank fails, all raise the first failure.

        For work in which ranks can fail alone, so that none waits for another that has already given up. `action` must
        not speak to other ranks.
        """
        result, own = _attempt(action)
        self._sum_unless_failed(own, torch.zeros(0, dtype=torch.float64))
        return result

    def sum_of_all(self, action: Callable[[], Tensor], at_once: int = AT_ONCE) -> Tensor:
        """Every rank runs `action` and returns the sum of what all ranks return; if any fails, all raise as above.

        `action` returns 1-D float64 of one length on all ranks, and must not speak to other ranks. The sum is on the
        CPU, with the same bits on every rank. One reduction carries all: up to `at_once` numbers and whether a rank
        has failed, which may not know how many numbers the others have. What is left of more numbers takes another.
        """
        # over the control group, so that a rank whose device has failed can tell the others
        values, own = _attempt(lambda: action().cpu())
        first = torch.zeros(at_once, dtype=torch.float64)
        if values is not None:
            first[: len(values)] = values[:at_once]
        first = self._sum_unless_failed(own, first)
        assert values is not None
        if len(values) <= at_once:
            return first[: len(values)]
        rest = values[at_once:].clone()
        if self.world_size > 1:
            dist.all_reduce(rest, group=self._control)
        return torch.cat((first, rest))

    def _sum_unless_failed(self, own: Exception | None, values: Tensor) -> Tensor:
        """Return the sum over ranks of `values`, float64 on the CPU; raises the first failure, of which `own` is ours.

        All ranks give equally many numbers, a rank that failed any.
        """
        if self.world_size == 1:
            if own is not None:
                raise own
            return values
        together = torch.cat((values, torch.tensor([own is not None], dtype=torch.float64)))
        dist.all_reduce(together, group=self._control)
        progress()
        if not together[-1]:
            return together[:-1]
        for rank, failure in enumerate(self.gather(own and _picklable(own))):
            if failure is None:
                continue
            if rank == self.rank and own is not None:
                raise own
            if not isinstance(failure, UserError):
                failure = RuntimeError(f"rank {rank} failed: {type(failure).__name__}: {failure}")
            raise _of_another_rank(failure)
        raise AssertionError("a rank failed without an error")

    def close(self) -> None:
        """Leave the process group in order; ending a process without it can abort under gloo."""
        if dist.is_initialized() or self.device.type != "cpu":
            self.accelerator.free_memory()  # looks for garbage among all that is imported, which takes a while
        if dist.is_initialized():
            _leave_group()
        self._closing()


class StoreFlag:
    """A fact that any rank can set and every rank can look up, without a collective."""

    _LOOK_EVERY_S = 0.5

    def __init__(self, store: dist.Store | None, key: str):
        self._store, self._key = store, key
        self._is_set = False
        self._looked_at = -math.inf

    def set(self) -> None:
        """Set the flag on all ranks."""
        if not self._is_set and self._store is not None:
            self._store.set(self._key, "")
        self._is_set = True

    def is_set(self) -> bool:
        """Whether some rank has set it; asks the others' store twice a second at most."""
        if not self._is_set and self._store is not None and time.monotonic() - self._looked_at > self._LOOK_EVERY_S:
            self._looked_at = time.monotonic()
            self._is_set = self._store.check([self._key])
        return self._is_set


def _attempt(action: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return action(), None
    except Exception as error:
        return None, error


def _picklable(error: Exception) -> Exception:
    """Return `error`, or where it does not come out of pickling as it went in, a RuntimeError with the same text."""
    try:
        if type(pickle.loads(pickle.dumps(error))) is type(error):
            return error
    except Exception:  # whatever a class of the user's does there, what went wrong before matters more
        pass
    return RuntimeError(f"{type(error).__name__}: {error}")


def _of_another_rank(error: Exception) -> Exception:
    # read where failures are reported: the rank that failed has the traceback, and reports it
    error.of_another_rank = True  # type: ignore[attr-defined]
    return error


def open_world(
    precision: str,
    asked: StrategySpec | None = None,
    *,
    timeout_s: float = 600.0,
    deterministic: bool | Literal["auto"] = False,
) -> World:
    """Join the processes of this run. All ranks call; raises UserError when the world is not the launcher's.

    `precision` is the recipe's `train.precision`. `asked` is the strategy, None for single or ddp. `timeout_s` bounds
    every collective but those of `run_on_rank0`. `deterministic` is the recipe's `train.deterministic`.
    """
    environment = Environment.read(os.environ)
    if environment.world_size == 1:
        forget_world(os.environ)  # Accelerate would wait for whoever is at its address
    if asked is None:
        asked = StrategySpec("single" if environment.world_size == 1 else "ddp")
    check_precision(precision, asked.strategy)
    on_cpu = not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    if turned_on := determinism.wants_determinism(deterministic, on_cpu=on_cpu):
        determinism.turn_on()
    # what is left of the launcher's settings: with this one Accelerate turns DeepSpeed off silently
    take_over(os.environ)
    os.environ.pop("ACCELERATE_USE_CPU", None)
    put_back = _forget_accelerate()
    try:
        return _joined(
            precision, asked, environment, timeout_s, on_cpu=on_cpu, deterministic=turned_on, closing=put_back
        )
    except BaseException:
        if dist.is_initialized():  # ending a process without leaving it can abort under gloo
            _leave_group()
        put_back()
        raise


def _leave_group() -> None:
    comm: Any = sys.modules.get("deepspeed.comm.comm")
    if comm is not None and comm.cdb is not None:
        comm.destroy_process_group()  # and DeepSpeed's own names for it, which the next run would use
    else:
        dist.destroy_process_group()


def _forget_accelerate() -> Callable[[], None]:
    """Have Accelerate prepare anew, whatever it has prepared in this process; returns what puts that back.

    It keeps one state for a process, and would refuse another precision, or keep the strategy of the run before.
    """
    states = [each._shared_state for each in (PartialState, AcceleratorState, GradientState)]
    before = [dict(state) for state in states]

    def put_back() -> None:
        for state, content in zip(states, before, strict=True):
            state.clear()
            state.update(content)

    for state in states:
        state.clear()
    return put_back


def _joined(
    precision: str,
    asked: StrategySpec,
    environment: Environment,
    timeout_s: float,
    *,
    on_cpu: bool,
    deterministic: bool,
    closing: Callable[[], None],
) -> World:
    arrangements = {"plain": _plainly, "fsdp2": _for_fsdp2, "deepspeed": _for_deepspeed}
    arrange = arrangements[STRATEGIES[asked.strategy].accelerate]
    with warnings.catch_warnings(), _waiting(environment, timeout_s):
        warnings.filterwarnings("ignore", message=".*OMP_NUM_THREADS/MKL_NUM_THREADS unset.*")
        accelerator = Accelerator(
            # autocast is put around the model by hand, the same under every strategy
            mixed_precision="no",
            # accumulation has one owner: train_step
            gradient_accumulation_steps=1,
            step_scheduler_with_optimizer=False,
            **arrange(asked, environment, timedelta(seconds=timeout_s), on_cpu=on_cpu),
        )
    if accelerator.device.type == "cpu":
        # without an index, as tensors name it: moving there what is there already would copy it
        accelerator.state.device = PartialState._shared_state["device"] = torch.device("cpu")
    mixed_precision = resolve(precision, accelerator.device)
    found = accelerator.process_index, accelerator.num_processes
    if found != (environment.rank, environment.world_size):
        raise UserError(
            f"the launcher made this process rank {environment.rank} of {environment.world_size}, but it came up "
            f"as rank {found[0]} of {found[1]}; check that MASTER_ADDR and MASTER_PORT are the same everywhere"
        )
    world = World(accelerator, mixed_precision, asked, timedelta(seconds=timeout_s), closing)
    world.deterministic = deterministic
    nodes = world.gather((environment.rank - environment.local_rank, environment.local_world_size))
    # where a launcher does not number the ranks of a node one after the other, one of them stands for all
    world.sources = [first if nodes[first][0] == first else 0 for first, _ in nodes]
    world.mesh = world.run_on_all(lambda: Mesh.of(asked, world.rank, nodes))
    return world


@contextmanager
def _waiting(environment: Environment, timeout_s: float) -> Iterator[None]:
    """Say whom this process waits for, where no launcher is there that has started the others too."""

    def warn() -> None:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        logger.warning(
            f"this process waits for the {environment.world_size - 1} others at {place}, as RANK, "
            f"WORLD_SIZE, MASTER_ADDR and MASTER_PORT in the environment say, for up to {timeout_s:g} s; where nobody "
            "started others, unset these",
            extra=EACH_RANK,
        )

    timer = threading.Timer(_WORD_AFTER_S, warn)
    timer.daemon = True
    if environment.world_size > 1 and not has_launcher():
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _plainly(asked: StrategySpec, environment: Environment, timeout: timedelta, *, on_cpu: bool) -> dict[str, Any]:
    # without cpu=True several CPU processes are each rank 0 of 1
    handlers = [DistributedDataParallelKwargs(gradient_as_bucket_view=True), InitProcessGroupKwargs(timeout=timeout)]
    return {"cpu": on_cpu, "kwargs_handlers": handlers}


def _join(environment: Environment, timeout: timedelta, *, on_cpu: bool) -> None:
    """Form the process group first, where Accelerate would not do it right under a sharding strategy."""
    if environment.world_size == 1:
        # sharding over one process still speaks to a group, and nobody else makes one
        os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"})
        os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"})
        backend = "gloo" if on_cpu else "cuda:nccl,cpu:gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    PartialState(cpu=on_cpu, timeout=timeout)


def _for_fsdp2(asked: StrategySpec, environment: Environment, timeout: timedelta, *, on_cpu: bool) -> dict[str, Any]:
    _join(environment, timeout, on_cpu=on_cpu)
    if on_cpu or environment.world_size == 1:
        # Accelerate honours FSDP only where it believes in several GPUs, and falls back to DDP elsewhere without a
        # word. FSDP2 itself works on CPUs over gloo, and with one process.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=True,
        auto_wrap_policy="transformer_based_wrap",
        cpu_ram_efficient_loading=False,
        cpu_offload=asked.offload_parameters,
    )
    return {"fsdp_plugin": plugin, "kwargs_handlers": [InitProcessGroupKwargs(timeout=timeout)]}


def _for_deepspeed(
    asked: StrategySpec, environment: Environment, timeout: timedelta, *, on_cpu: bool
) -> dict[str, Any]:
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    os.environ["DS_ACCELERATOR"] = "cpu" if on_cpu else "cuda"
    quiet_deepspeed()
    if on_cpu or environment.world_size == 1:
        _join(environment, timeout, on_cpu=on_cpu)
    zero: dict[str, Any] = {"stage": int(asked.strategy[-1])}
    if asked.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": not on_cpu}
    if asked.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": not on_cpu}
    plugin = DeepSpeedPlugin(
        hf_ds_config={
            "zero_optimization": zero,
            # the recipe's own optimizer, also where its state is on the CPU: what is saved must not depend on it
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": None,
            # set when an engine is made
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0,
        }
    )
    return {"deepspeed_plugin": plugin, "kwargs_handlers": [InitProcessGroupKwargs(timeout=timeout)]}


def quiet_deepspeed() -> None:
    """Import DeepSpeed with its log at warnings, and without what it would compile or prepare to compile first.

    The C++ collective for CPUs serves inference on one machine alone, and takes a compiler and half a minute. The
    functions of its own Muon, which is not used here, import torch's compiler where they are defined.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed.ops
    from deepspeed.utils import logger as deepspeed_logger

    deepspeed_logger.setLevel(logging.WARNING)
    # found out by trial compilations otherwise, and asked for by that collective alone
    vars(deepspeed.ops).setdefault("__compatible_ops__", {})
    with compiling_when_called(), suppress(ImportError):
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
