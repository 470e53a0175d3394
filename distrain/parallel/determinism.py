"""The same bits in each attempt: what torch, cuBLAS, cuDNN and the compiler need for them on a GPU."""

from __future__ import annotations

import os
import re
import sys
from typing import Any, Literal

import torch

PROOF = "DISTRAIN_PROOF"
"""The environment variable that the processes of a proof have."""

_WORKSPACES = (":4096:8", ":16:8")
"""What CUBLAS_WORKSPACE_CONFIG may be for cuBLAS to add up in one order."""


def wants_determinism(asked: bool | Literal["auto"], *, on_cpu: bool) -> bool:
    """Return what `train.deterministic` comes to: auto is True in proofs on GPUs alone.

    On CPUs the same bits come of the ordinary operations, and checks of each one would only cost time.
    """
    return (not on_cpu and PROOF in os.environ) if asked == "auto" else asked


def turn_on() -> None:
    """Have every operation of this process be deterministic, or raise; before anything is computed on a GPU."""
    if os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in _WORKSPACES:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = _WORKSPACES[0]  # read when CUDA starts
    torch.use_deterministic_algorithms(True)
    # else each tensor that is about to be written is filled first
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    # the compiler would choose kernels by what is faster just now; read at its import, also in its own processes
    os.environ["TORCHINDUCTOR_DETERMINISTIC"] = "1"
    inductor: Any = sys.modules.get("torch._inductor.config")
    if hasattr(inductor, "deterministic"):
        inductor.deterministic = True


def is_on() -> bool:
    """Whether this process computes deterministically, as read from what was set."""
    return torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()


_NO_FORM = re.compile(r"(\S+) does not have a deterministic implementation")
_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


def refused_operation(error: BaseException | None) -> str | None:
    """Return the operation that an error, or one it was raised from, says has no deterministic form; else None."""
    while error is not None:
        text = str(error)
        if found := _NO_FORM.search(text):
            return found[1]
        if isinstance(error, RuntimeError) and "not deterministic because it uses CuBLAS" in text:
            return f"a product by cuBLAS ({_CUBLAS} was set to {os.environ.get(_CUBLAS, 'nothing')} when CUDA started)"
        error = error.__cause__ or error.__context__
    return None
