"""What the caller's process is set to: a run does not depend on it, and leaves it as it was.

`torch.autocast`, a default dtype or a switched off gradient around a call would make other numbers of a recipe than the
command does, or other processes. And what a run sets, such as `train.deterministic`, is for that run alone.
"""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from distrain.config import UserError

logger = logging.getLogger(__name__)


_turn = threading.RLock()
"""Held by the thread that computes: what is set for it, and Accelerate's state, are the whole process's."""
_trains = False


@contextmanager
def _one_at_a_time(*, trains: bool) -> Iterator[None]:
    """Wait for other threads that compute, but for a training, which may take days. Raises UserError there."""
    global _trains
    while not _turn.acquire(timeout=0.1):
        if _trains:
            raise UserError(
                "another thread of this process trains a run, which sets PyTorch for the whole process; call this when "
                "it has ended, or in another process"
            )
    before, _trains = _trains, _trains or trains
    try:
        yield
    finally:
        _trains = before
        _turn.release()


@contextmanager
def own_surroundings(*, computes: bool = True, trains: bool = False) -> Iterator[None]:
    """Run a block with torch as it is set in a new process; afterwards all is as it was, random generators too.

    Imports torch; a block that `computes` nothing needs it only where the caller has imported it. Of blocks that
    compute one runs at a time; `trains`: whether others do not wait for this one, but are refused.
    """
    if not computes and "torch" not in sys.modules:
        yield
        return
    import torch

    from distrain.datasets.randomness import isolated_randomness

    with ExitStack() as around:
        if computes:
            around.enter_context(_one_at_a_time(trains=trains))
        around.enter_context(isolated_randomness())
        around.enter_context(_gpu_randomness())
        put_back = _switches()
        around.callback(put_back)
        around.enter_context(torch.inference_mode(False))
        around.enter_context(torch.enable_grad())
        ignored = []
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                ignored.append(f"torch.autocast({device!r}) (train.precision decides that)")
                around.enter_context(torch.autocast(device, enabled=False))
        if (dtype := torch.get_default_dtype()) != torch.float32:
            ignored.append(f"the default dtype {dtype} (train.precision: fp64 computes in float64)")
            around.callback(torch.set_default_dtype, dtype)
            torch.set_default_dtype(torch.float32)
        if (default := torch.get_default_device()).type != "cpu":
            ignored.append(f"the default device {default} (a run finds its device itself)")
            around.enter_context(torch.device("cpu"))
        if ignored:
            logger.warning(f"this process has set {' and '.join(ignored)}, which does not hold in a run")
        yield


def _switches() -> Callable[[], None]:
    """Note torch's switches that a run sets; returns what sets them again."""
    import torch

    cudnn, kernels = torch.backends.cudnn, torch.backends.cuda
    modes = _deterministic()
    places: list[tuple[Any, str]] = [
        (torch.utils.deterministic, "fill_uninitialized_memory"),
        (cudnn, "benchmark"),
        (cudnn, "deterministic"),
    ]
    if (inductor := sys.modules.get("torch._inductor.config")) is not None:
        places.append((inductor, "deterministic"))
    values = [(where, name, getattr(where, name)) for where, name in places if hasattr(where, name)]
    products = [(where, where.fp32_precision) for where in _fp32_places()]
    attention = [
        (getattr(kernels, f"enable_{kind}_sdp"), getattr(kernels, f"{kind}_sdp_enabled")())
        for kind in ("flash", "mem_efficient", "cudnn", "math")
    ]
    older: tuple[str, bool] | None = None
    with suppress(RuntimeError):  # of a caller who has set the newer switches alone
        older = torch.get_float32_matmul_precision(), cudnn.allow_tf32

    def put_back() -> None:
        if _deterministic() != modes:  # which imports torch's compiler
            torch.use_deterministic_algorithms(modes[0], warn_only=modes[1])
        for where, name, value in values:
            setattr(where, name, value)
        config: Any = sys.modules.get("torch._inductor.config")
        if inductor is None and hasattr(config, "deterministic"):
            config.deterministic = False
        for enable, enabled in attention:
            enable(enabled)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*TF32.*")
            if older is not None:
                torch.set_float32_matmul_precision(older[0])
                cudnn.allow_tf32 = older[1]
            for where, value in products:
                if where.fp32_precision != value:
                    where.fp32_precision = value

    return put_back


def _deterministic() -> tuple[bool, bool]:
    import torch

    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def _fp32_places() -> list[Any]:
    """Return where torch says how products of fp32 tensors are computed."""
    import torch

    found: list[Any] = [torch.backends.cuda.matmul]
    for library in (torch.backends.cudnn, torch.backends.mkldnn):
        found += [getattr(library, kind) for kind in ("matmul", "conv", "rnn") if hasattr(library, kind)]
    return [each for each in found if hasattr(each, "fp32_precision")]


@contextmanager
def _gpu_randomness() -> Iterator[None]:
    """Restore the random states of the GPUs that this process uses already."""
    import torch

    states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        if states is not None:
            torch.cuda.set_rng_state_all(states)
