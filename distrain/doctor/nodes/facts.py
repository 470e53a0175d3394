"""What a node is: versions, environment, network, CPUs. Imports no torch."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash

import distrain
from distrain.launchers.preflight import gpu_count
from distrain.launchers.slurm.plan import is_secret
from distrain.system.gpus import gpu_models

PACKAGES = (
    *("distrain", "torch", "accelerate", "deepspeed", "transformers", "numpy", "safetensors", "torchvision", "triton"),
    *("pydantic", "xxhash"),
)
"""Whose versions are to be the same on every node, where they are installed."""

_MATTERS = re.compile(
    r"(NCCL|GLOO|UCX|UCC|FI|TORCH|TORCH_\w+|TORCHINDUCTOR|PYTORCH|CUDA|CUBLAS|CUDNN|OMP|MKL|OPENBLAS|KMP|DS|ACCELERATE"
    r"|HF|TRANSFORMERS|DISTRAIN|OMPI_MCA|TRITON|NVIDIA|GOMP)_\w+"
    r"|PYTHON\w+|LD_LIBRARY_PATH|LD_PRELOAD|MALLOC_\w+|TZ|LC_ALL|LANG|[a-z]+_proxy|VIRTUAL_ENV|CONDA_PREFIX"
)
_OF_EACH = re.compile(r"CUDA_VISIBLE_DEVICES|DISTRAIN_LAUNCHER|NVIDIA_VISIBLE_DEVICES|HF_TOKEN\w*")
"""Variables that nodes have of their own."""


def facts(names: Sequence[str], address: str, folder: Path, variables: Mapping[str, str]) -> dict[str, Any]:
    """Return what this node is; `names` are those of all nodes, `address` is that of the first one.

    `folder` is the one that all are to share.
    """
    return {
        "host": socket.gethostname(),
        "versions": versions(),
        "executable": sys.executable,
        "environment": environment_that_matters(variables),
        "interfaces": interfaces(),
        "own": resolve(socket.gethostname()),
        "resolves": {name: resolve(name) for name in (*names[:64], *([address] if address else []))},
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "gpus": gpu_count(variables),
        "gpu_models": gpu_models(),
        "mount": mount_of(folder),
    }


def versions() -> dict[str, str]:
    """Return the version of all that nodes are to have the same of; what is not there is missing."""
    found = {"Python": platform.python_version(), "glibc": platform.libc_ver()[1]}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["distrain's code"] = own_code()
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return found
    if match := re.search(r"Kernel Module\D*([\d.]+)", text):
        found["NVIDIA driver"] = match[1]
    return found


def own_code() -> str:
    """Return a fingerprint of the files of this package, as they are on this node."""
    digest = xxhash.xxh3_64()
    package = Path(distrain.__file__).parent
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package).as_posix()}\0".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def environment_that_matters(variables: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that libraries of a run act on, but for secrets and what each node has of its own. Pure."""
    return {
        name: value[:1000]
        for name, value in sorted(variables.items())
        if _MATTERS.fullmatch(name) and not _OF_EACH.fullmatch(name) and not is_secret(name) and "@" not in value
    }


def interfaces() -> dict[str, dict[str, Any]]:
    """Return the network interfaces of this machine: their addresses, whether they are up, and their MTU in bytes."""
    import psutil

    stats = psutil.net_if_stats()
    return {
        name: {
            "addresses": [
                each.address.partition("%")[0] for each in found if each.family in (socket.AF_INET, socket.AF_INET6)
            ],
            "up": name in stats and stats[name].isup,
            "mtu": stats[name].mtu if name in stats else 0,
        }
        for name, found in psutil.net_if_addrs().items()
    }


def resolve(name: str) -> list[str]:
    """Return the addresses that a name has on this machine, sorted; none where it does not resolve."""
    try:
        return sorted({str(each[4][0]) for each in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)})
    except (OSError, UnicodeError):
        return []


def mount_of(folder: Path) -> str:
    """Return what is mounted where a folder is, such as `nfs4 server:/home on /home`; empty where it is not known."""
    try:
        lines = Path("/proc/self/mounts").read_text(errors="replace").splitlines()
    except OSError:
        return ""
    best = ("", "")
    for line in lines:
        source, place, kind = line.split(" ")[:3]
        place = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), place)
        if folder.is_relative_to(place) and len(place) >= len(best[0]):  # of equal ones the last hides the others
            best = (place, f"{kind} {source} on {place}")
    return best[1]
