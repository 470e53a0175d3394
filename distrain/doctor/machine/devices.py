"""Whether PyTorch finds what the machine has, and computes right and as fast on each of its devices."""

from __future__ import annotations

import importlib.metadata as metadata
import multiprocessing
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distrain.doctor.context import Context
from distrain.doctor.findings import Finding, error, ok, warning
from distrain.doctor.machine.gpus import gpus_of_machine
from distrain.system.errors import some
from distrain.system.output import error_line

if TYPE_CHECKING:
    import torch

SLOWER = 0.85
"""The share of its peers' median speed below which a device is said to be slow."""
_TURNS = 5


def build(context: Context) -> Iterator[Finding]:
    """What PyTorch was built for, against the driver and the GPUs."""
    import torch

    about = f"torch {torch.__version__}"
    there = gpus_of_machine()
    if torch.version.cuda is None:
        if there:
            yield error(
                f"{about} was built without CUDA, and this machine has {there} GPU{'s' * (there > 1)}",
                "runs compute on the CPU, many times slower",
                "install PyTorch's build for a CUDA that the driver runs (nvidia-smi shows up to which)",
            )
        else:
            yield ok(f"{about}, built for CPUs")
        return
    about += f", built for CUDA {torch.version.cuda}"
    if not there or not context.gpus:
        yield ok(f"{about}, on the CPU")
        return
    try:
        torch.cuda.init()
    except Exception as problem:
        yield error(
            f"{about}, finds no GPU: {error_line(problem)}",
            "runs compute on the CPU or are refused",
            "where the driver is too old update it, or install a torch that is built for its CUDA version "
            "(nvidia-smi shows it); where it does not answer restart the machine",
        )
        return
    if (found := torch.cuda.device_count()) < context.gpus:
        yield error(
            f"{about}, finds {found} of {context.gpus} GPUs",
            "the run is refused, or has fewer processes",
            "see CUDA_VISIBLE_DEVICES and nvidia-smi for the one that is missing",
        )
        return
    architectures = torch.cuda.get_arch_list()
    for index in range(found):
        major, minor = torch.cuda.get_device_capability(index)
        if not any(_runs(each, major, minor) for each in architectures):
            yield error(
                f"{about}, has no kernels for GPU {index} ({torch.cuda.get_device_name(index)}, sm_{major}{minor})",
                "the first operation on it fails: no kernel image is available",
                f"install a torch that is built for it; this one is for {some(architectures, 20)}",
            )
    yield from _nccl(about)


def _runs(architecture: str, major: int, minor: int) -> bool:
    """Whether code for an architecture such as sm_90, sm_90a or compute_80 runs on a GPU of this capability."""
    kind, _, digits = architecture.partition("_")
    number = int("".join(filter(str.isdigit, digits)) or 0)
    if kind == "compute":  # compiled on the machine, for any later one
        return number <= major * 10 + minor
    return number // 10 == major and number % 10 <= minor


def _nccl(about: str) -> Iterator[Finding]:
    import torch

    if not torch.distributed.is_nccl_available():
        yield error(
            f"{about}, without NCCL",
            "processes on GPUs cannot exchange gradients",
            "install the usual build of torch for CUDA",
        )
        return
    built = torch.cuda.nccl.version()
    major = (torch.version.cuda or "").partition(".")[0]
    try:
        installed = metadata.version(f"nvidia-nccl-cu{major}")
    except metadata.PackageNotFoundError:
        installed = ""  # in the build itself
    if installed and installed.split(".")[:2] != [str(each) for each in built[:2]]:
        yield warning(
            f"{about} and NCCL {'.'.join(map(str, built))}, and NCCL {installed} is installed",
            "collectives run with another NCCL than torch was tested with",
            "install torch again, with what it needs",
        )
        return
    yield ok(f"{about}, NCCL {installed or '.'.join(map(str, built))}")


# --------------------------------------------------------------------------------------------------------------------
# A matrix product on each device


@dataclass(frozen=True)
class Product:
    """How one device multiplied matrices."""

    device: str
    right: bool
    """Whether a product of whole numbers is exact."""
    repeats: bool
    """Whether the same product has the same bits each time."""
    tflops: float


def products(context: Context) -> Iterator[Finding]:
    """A matrix product on each GPU, or in each process on the CPU, against whole numbers and against its peers."""
    import torch

    if context.gpus and torch.cuda.is_available():
        done = [_product(torch.device("cuda", index)) for index in range(torch.cuda.device_count())]
        yield from judge(done, "GPU")
        return
    forks = multiprocessing.get_context("fork")
    count = min(context.processes, 64)
    channels = [forks.Pipe(duplex=False) for _ in range(count)]
    threads = max(1, torch.get_num_threads() // count)
    workers = [
        forks.Process(target=_send_product, args=(theirs, threads, index)) for index, (_, theirs) in enumerate(channels)
    ]
    for each in workers:
        each.start()
    done = [ours.recv() for ours, _ in channels]
    for each in workers:
        each.join()
    yield from judge(done, "process")


def _send_product(channel: Any, threads: int, index: int) -> None:
    import torch

    torch.set_num_threads(threads)
    channel.send(_product(torch.device("cpu"), f"process {index}"))


def _product(device: torch.device, name: str | None = None) -> Product:
    """Multiply (n, n) matrices of whole numbers, whose products fp32 holds exactly, then time larger ones."""
    import torch

    on_gpu = device.type == "cuda"
    size, large = (2048, 8192) if on_gpu else (384, 512)
    with torch.inference_mode():
        # a[i, k] = i + k and b[k, j] = j - k, both modulo 16: a product sums at most 16 * 16 * n, below 2^24
        row = torch.arange(size)
        a = ((row[:, None] + row[None, :]) % 16).float()
        b = ((row[None, :] - row[:, None]) % 16).float()
        # period 16 in each index: the product of one period, as often as it is there
        period = (a[:16, :16].long() @ b[:16, :16].long()) * (size // 16)
        expected = period.repeat(size // 16, size // 16).float().to(device)
        a, b = a.to(device), b.to(device)
        right = bool(torch.equal(a @ b, expected))
        generator = torch.Generator().manual_seed(0)
        kind = torch.bfloat16 if on_gpu else torch.float32
        c = torch.randn(large, large, generator=generator).to(device, kind)
        first = c @ c
        times, repeats = [], True
        for _ in range(_TURNS):
            if on_gpu:
                torch.cuda.synchronize(device)
            began = time.perf_counter()
            again = c @ c
            if on_gpu:
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - began)
            repeats = repeats and bool(torch.equal(again, first))
    return Product(name or f"GPU {device.index}", right, repeats, 2 * large**3 / min(times) / 1e12)


def judge(done: Sequence[Product], kind: str) -> Iterator[Finding]:
    """Yield what products say of the devices that made them, a `kind` such as GPU each. Pure."""
    wrong = [each.device for each in done if not each.right]
    unlike = [each.device for each in done if each.right and not each.repeats]
    if wrong or unlike:
        what = f"{some(wrong)} multiplies wrongly" if wrong else f"{some(unlike)} has other bits each time"
        yield error(
            f"a matrix product: {what}",
            "a run on it learns from wrong numbers, without an error",
            "take it out of use, and have its memory and its cooling looked at",
        )
        return
    usual = statistics.median(each.tflops for each in done)
    slow = [each for each in done if each.tflops < SLOWER * usual] if kind == "GPU" else []
    for each in slow:
        yield warning(
            f"{each.device} multiplies at {each.tflops:.3g} TFLOPS, its peers at {usual:.3g}",
            "all ranks wait for it in each step",
            "see its clocks, its heat and who else computes on it (nvidia-smi -q -d PERFORMANCE,PIDS), or leave it out",
        )
    if not slow:
        unit, scale = ("TFLOPS", 1.0) if usual >= 1 else ("GFLOPS", 1e3)
        speeds = sorted(each.tflops * scale for each in done)
        each_of = f"{len(done)} {kind}{('es' if kind.endswith('s') else 's') * (len(done) > 1)}"
        between = f"{speeds[0]:.3g}" if len(done) == 1 else f"{speeds[0]:.3g} to {speeds[-1]:.3g}"
        yield ok(f"{each_of}: exact, {between} {unit}")
