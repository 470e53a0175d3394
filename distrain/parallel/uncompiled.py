"""What wraps models without an import of torch's compiler, for as long as nothing else imports it.

Its import takes a third of the start of a run, in each process. Where a release of torch, Accelerate or DeepSpeed has
other names than those here, nothing is changed, and it imports what it imports.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import accelerate.accelerator
import torch
from torch.nn.parallel import DistributedDataParallel

from distrain.optim.uncompiled import KEEPS_OUT, unmarked
from distrain.system.compiler import compiler_imported, without_compiler

_SHARDED = "torch.distributed.tensor"
"""It imports SymPy and a part of the compiler."""


@contextmanager
def wrapping_in_ddp() -> Iterator[None]:
    """Have Accelerate wrap a model in DDP without imports that only tell that it is neither compiled nor sharded."""
    if compiler_imported():
        yield
        return
    # a generator that DDP enters around each forward pass
    marked = getattr(vars(DistributedDataParallel).get("_inside_ddp_forward"), "__wrapped__", None)
    if marked is not None and getattr(marked, "__code__", None) is KEEPS_OUT:
        setattr(DistributedDataParallel, "_inside_ddp_forward", contextmanager(unmarked(marked)))  # noqa: B010
    with without_compiler():
        looks = vars(accelerate.accelerator).get("model_has_dtensor")
        if looks is None:
            yield
            return
        with _replaced(
            accelerate.accelerator, "model_has_dtensor", lambda model: _SHARDED in sys.modules and looks(model)
        ):
            yield


@contextmanager
def compiling_when_called() -> Iterator[None]:
    """Have a function that is given to torch.compile within be compiled with its first call, in place of now."""
    compile_now = torch.compile

    def compile_later(model: Any = None, **how: Any) -> Any:
        if model is None:
            return functools.partial(compile_later, **how)
        if not isinstance(model, FunctionType):
            return compile_now(model, **how)
        compiled: Callable[[], Callable[..., Any]] = functools.cache(lambda: compile_now(model, **how))

        @functools.wraps(model)
        def call(*args: Any, **kwargs: Any) -> Any:
            return compiled()(*args, **kwargs)

        return call

    with _replaced(torch, "compile", compile_later):
        yield


@contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
