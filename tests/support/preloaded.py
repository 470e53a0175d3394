"""What the server of test processes imports once for all of them: see worlds.py."""

import os

# before DeepSpeed is first imported, which otherwise looks for a GPU; CUDA that was started here would fail in children
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["DS_ACCELERATOR"] = "cpu"

import atexit
import ctypes
import functools
import gc
import importlib
import importlib.metadata
import pkgutil
from pathlib import Path

# what is installed stays what it is, and reading it takes a process as long as several steps; each start asks for these
for name in ("entry_points", "version"):
    setattr(importlib.metadata, name, functools.cache(getattr(importlib.metadata, name)))
importlib.metadata.entry_points(group="torch.distributed.backends")
for name in ("torch", "torchvision", "accelerate", "deepspeed"):
    importlib.metadata.version(name)

import distrain.parallel.comm  # noqa: E402

_HUGE_PAGE = 1 << 21
_MADV_COLLAPSE = 25

# what a start imports on its way, each time anew: with ZeRO, DeepSpeed imports torch's compiler and accelerate
# transformers, which takes longer than the few steps of most tests
for name in (
    "accelerate.commands.launch",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.triton_ops",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "optuna",
    "pandas",
    "pytest",
    "sklearn.datasets",
    "torch._dynamo",
    "torch.distributed.algorithms.ddp_comm_hooks",
    "torch.utils.tensorboard",
    "torchvision.transforms.v2",
    "transformers.integrations.deepspeed",
    "transformers.models.llama.modeling_llama",
    "logged",  # what tests share, and what most of their functions that run in worlds are beside
    "places",
    "runs",
    "warm",
    "worlds",
    *(module.name for module in pkgutil.walk_packages(distrain.__path__, "distrain.")),
):
    if name != "distrain.__main__":
        importlib.import_module(name)

distrain.parallel.comm.quiet_deepspeed()


def in_huge_pages() -> None:
    """Have the system hold this process's own memory in pages of 2 MiB, where it can.

    To fork a process and to end it takes time for each page: with pages of 4 KiB, more than most worlds need for all
    else.
    """
    advise = ctypes.CDLL(None, use_errno=True).madvise
    for line in Path("/proc/self/maps").read_text().splitlines():
        place, may, _, _, _, *name = line.split(maxsplit=5)
        if not may.startswith("rw") or name not in ([], ["[heap]"]):
            continue
        begin, end = (int(address, 16) for address in place.split("-"))
        begin, end = -(-begin // _HUGE_PAGE) * _HUGE_PAGE, end // _HUGE_PAGE * _HUGE_PAGE
        if begin < end:
            advise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_COLLAPSE)  # older systems refuse


SERVER = os.getpid()


def end_at_once() -> None:
    """End the server without what compiled modules print of themselves at the end of a process."""
    if os.getpid() == SERVER:
        os._exit(0)


atexit.register(end_at_once)
gc.collect()
gc.freeze()  # collecting what was imported, again in each process, would take most of the time
in_huge_pages()
