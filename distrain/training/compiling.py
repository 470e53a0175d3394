"""What the recipe's `train.compile` comes to: the model and its loss as one compiled function, kept across attempts."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import struct
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distrain.config import CompileSection, UserError

logger = logging.getLogger(__name__)

CACHE = "TORCHINDUCTOR_CACHE_DIR"
"""Where the compiler keeps what it has compiled, Triton's kernels too; one that is set already stays."""


@dataclass(frozen=True)
class Compiled:
    """What is compiled in a run, and why."""

    how: CompileSection | None = None
    """None compiles nothing."""
    why: str = "train.compile is false"
    lenient: bool = False
    """Whether what cannot be compiled runs as it is."""

    @property
    def on(self) -> bool:
        return self.how is not None

    def record(self) -> dict[str, Any]:
        """Return what effect.json holds; after the first step with what was compiled, and what could not be."""
        if self.how is None:
            return {"on": False, "why": self.why}
        found: dict[str, Any] = {"on": True, "why": self.why, "cache": os.environ.get(CACHE)} | self.how.model_dump()
        graphs, failures = graphs_and_failures()
        return found | {"graphs": graphs} | ({"failures": failures} if failures else {})


NOTHING = Compiled()


def resolve_compile(
    setting: bool | str | CompileSection,
    device: torch.device,
    capability: tuple[int, int] | None = None,
    has_triton: bool | None = None,
) -> Compiled:
    """Return what a recipe's `train.compile` comes to on `device`.

    `auto` compiles on an NVIDIA GPU that Triton has kernels for, where a compiled step is mostly much faster, and
    nowhere else. `capability` of the GPU and `has_triton` are found out where they are not given.
    """
    if isinstance(setting, CompileSection):
        return Compiled(setting, "train.compile says how")
    if setting is True:
        return Compiled(CompileSection(), "train.compile is true")
    if setting is False:
        return NOTHING
    if device.type != "cuda":
        return Compiled(None, "auto: a CPU gains little by it")
    if not (importlib.util.find_spec("triton") is not None if has_triton is None else has_triton):
        return Compiled(None, "auto: the package triton is not installed")
    if (capability := capability or torch.cuda.get_device_capability(device)) < (7, 0):
        return Compiled(
            None, f"auto: Triton needs compute capability 7.0, and this GPU has {capability[0]}.{capability[1]}"
        )
    return Compiled(CompileSection(), "auto: on this GPU", lenient=True)


def compile_model(model: nn.Module, compiled: Compiled) -> None:
    """Compile a model's calls, in place: at the first of them, or anew for sizes that differ.

    Raises UserError for a backend that torch does not have.
    """
    if compiled.how is None:
        return
    import torch._dynamo  # takes two seconds
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    if os.environ.get(CACHE) in (None, default_cache_dir()):  # which torch sets itself, in /tmp
        os.environ[CACHE] = str(cache_folder())
    discard_unfinished(Path(os.environ[CACHE]))
    how = compiled.how
    torch._dynamo.config.suppress_errors = compiled.lenient
    try:
        model.compile(
            mode=how.mode,
            fullgraph=how.fullgraph,
            dynamic=None if how.dynamic == "auto" else how.dynamic,
            backend=how.backend,
        )
    except torch._dynamo.exc.InvalidBackend as error:
        known = ", ".join(torch._dynamo.list_backends())
        raise UserError(f"train.compile.backend: torch has no {how.backend!r}; it has {known}") from error


def cache_folder() -> Path:
    """Return the folder of what was compiled for this user: a next attempt, or another run, compiles none of it anew.

    All ranks of a node share it; the compiler's own names in it say for which versions and which GPU.
    """
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "distrain" / "compiled"


def discard_unfinished(folder: Path) -> None:
    """Remove from such a folder what a process was linking when it was killed, which the compiler would take for whole.

    What a process is linking now is locked, and stays.
    """
    from filelock import FileLock, Timeout  # as PyTorch locks it

    for path in folder.glob("*/*"):
        if path.suffix not in (".o", ".so"):
            continue
        builds = path.with_name(f"{path.stem}_CxxBuild")  # a folder that is there until the file is whole
        if _is_whole(path) and not builds.exists():
            continue
        with suppress(Timeout, OSError), FileLock(folder / "locks" / f"{path.name.partition('.')[0]}.lock", timeout=0):
            if not _is_whole(path) or builds.exists():
                path.unlink(missing_ok=True)
                shutil.rmtree(builds, ignore_errors=True)


def _is_whole(path: Path) -> bool:
    """Whether an object file reaches to the end of its table of sections, which linkers write last."""
    with suppress(OSError), path.open("rb") as file:
        header = file.read(64)
        if not header.startswith(b"\x7fELF") and sys.platform != "linux":
            return True
        if len(header) < 64:
            return False
        (offset,), (nbytes, count) = struct.unpack_from("<Q", header, 40), struct.unpack_from("<HH", header, 58)
        return header.startswith(b"\x7fELF") and 0 < offset + nbytes * count <= os.fstat(file.fileno()).st_size
    return True


def graphs_and_failures() -> tuple[int, list[str]]:
    """Return how many graphs this process has compiled, and why others could not be."""
    from torch._dynamo import utils

    failures = {
        f"{each.fail_type}: {' '.join((each.fail_reason or '').split())[:300]}": None
        for each in utils.get_compilation_metrics()
        if each.fail_type is not None
    }
    return utils.counters["stats"]["unique_graphs"], [*failures]


def warn_of_failures(compiled: Compiled) -> None:
    """Log what could not be compiled, once the first step is there, where it runs as it is."""
    if compiled.on and compiled.lenient and (failures := graphs_and_failures()[1]):
        logger.warning(
            f"train.compile: auto: what could not be compiled runs as it is, and slower: {'; '.join(failures)}. Set "
            "train.compile: false to try no more, or true for the whole error"
        )
