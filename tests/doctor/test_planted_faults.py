"""Faults that are planted are found, by the check that is for them; a sound machine has none."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import planting
import pytest
import torch
from places import ROOT
from planting import NAMES, NETWORK, found_with, mount_memory, unshare, write
from runs import cli

from distrain.doctor.context import Context, make_context
from distrain.doctor.findings import Finding, Level
from distrain.doctor.machine import CHECKS
from distrain.doctor.machine.devices import Product, judge

BY_NAME = {check.name: check for check in CHECKS}
_NVIDIA_VERSION = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  Tue Sep 23 10:11:16 UTC 2025\n"


@dataclass(frozen=True)
class Fault:
    """A fault, and what is to be said of it."""

    check: str
    found: str
    """Words of the finding."""
    plant: Callable[[Context], None]
    """Makes the fault, in the process of the check."""
    level: str = "error"
    variables: dict[str, str] = field(default_factory=dict)
    context: dict[str, Any] = field(default_factory=dict)
    namespaces: bool = False
    """Whether it is made in namespaces."""


def limit(kind: int, most: int) -> Callable[[Context], None]:
    def plant(context: Context) -> None:
        resource.setrlimit(kind, (most, resource.getrlimit(kind)[1]))

    return plant


def few_processes(context: Context) -> None:
    if os.geteuid() == 0:
        os.setresuid(65534, 65534, 65534)  # root is not held to the limit
    resource.setrlimit(resource.RLIMIT_NPROC, (3, 3))


def raises(module: Any, name: str, code: int) -> Callable[[Context], None]:
    """Have a function of the standard library fail, as a file system does that cannot do what it is asked."""

    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    def plant(context: Context) -> None:
        setattr(module, name, fail)

    return plant


def no_locks(context: Context) -> None:
    fcntl.lockf = lambda *_: None


def over(place: str, options: str = "", **how: bool) -> Callable[[Context], None]:
    def plant(context: Context) -> None:
        mount_memory(context.folder if place == "folder" else place, options, **how)

    return plant


def no_exec(context: Context) -> None:
    tempfile.tempdir = str(mount_memory(context.folder, "size=200m", no_exec=True))


def named(name: str) -> Callable[[Context], None]:
    def plant(context: Context) -> None:
        unshare(NAMES, NETWORK)  # without a network nobody is asked for the name
        socket.sethostname(name)

    return plant


def few_ports(context: Context) -> None:
    unshare(NETWORK)
    planting.loopback_up()
    Path("/proc/sys/net/ipv4/ip_local_port_range").write_text("40000 40100")


def later(context: Context) -> None:
    now = time.time
    time.time = lambda: now() - 3600  # the folder's server is an hour ahead


def metadata(*versions: str, name: str = "numpy") -> Callable[[Context], None]:
    """Put installations of a package before all others."""

    def plant(context: Context) -> None:
        for version in versions:
            text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
            write(context.folder, {f"{name}-{version}.dist-info/METADATA": text})
        sys.path.insert(0, str(context.folder))

    return plant


def hidden(context: Context) -> None:
    write(context.folder, {"torch.py": "print('mine')"})
    os.chdir(context.folder)


def library(context: Context) -> None:
    write(context.folder, {"libnccl.so.2": ""})


def plugged(context: Context) -> None:
    write(mount_memory("/sys/bus/pci/devices"), {"0000:01:00.0/vendor": "0x10de\n", "0000:01:00.0/class": "0x030200\n"})


def two_gpus(context: Context, smi: str = "", *, devices: bool = True) -> None:
    """Have a driver with two GPUs, its devices, and an nvidia-smi that prints `smi`."""
    model = "Model: \t NVIDIA H200\n"
    gpus = {f"nvidia/gpus/0000:0{number}:00.0/information": model for number in (1, 2)}
    write(mount_memory("/proc/driver"), {"nvidia/version": _NVIDIA_VERSION, **gpus})
    write(context.folder, {"bin/nvidia-smi": f"#!/bin/sh\n{smi}\n"})
    (context.folder / "bin/nvidia-smi").chmod(0o755)
    os.environ["PATH"] = f"{context.folder}/bin:/usr/bin:/bin"
    if devices:
        write(mount_memory("/dev"), {"nvidiactl": "", "nvidia-uvm": ""})


def gpus(smi: str = "", *, devices: bool = True) -> Callable[[Context], None]:
    return lambda context: two_gpus(context, smi, devices=devices)


def row(mode: str = "Default", used: int = 10, ecc: str = "0", heat: str = "Not Active") -> str:
    cells = ["GPU-abc", "NVIDIA H200", mode, str(used), "143771", ecc, heat]
    return f"echo '1, {', '.join(cells)}'"


def wrong_products(context: Context) -> None:
    right = torch.Tensor.__matmul__
    torch.Tensor.__matmul__ = lambda a, b: right(a, b) + (a.dtype == torch.float32)  # type: ignore[method-assign]


def nothing(context: Context) -> None:
    pass


FAULTS = {
    # limits
    "few open files": Fault("open files", "may open 200 files", limit(resource.RLIMIT_NOFILE, 200)),
    "a limit of files": Fault("file size", "files of 1.0 MiB at most", limit(resource.RLIMIT_FSIZE, 2**20)),
    "a limit of memory": Fault("memory", "(ulimit -v) is 4.00 GiB", limit(resource.RLIMIT_AS, 2**32)),
    "few processes": Fault("processes", "more processes and threads may be started, by ulimit -u", few_processes),
    "one CPU for two": Fault(
        "CPUs", "1 of ", lambda _: os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}), "warning",
        context={"processes": 2},
    ),
    "more threads than CPUs": Fault(
        "threads", "OMP_NUM_THREADS=4096 in 2 processes", nothing, "warning", {"OMP_NUM_THREADS": "4096"},
        context={"processes": 2},
    ),
    "no number of threads": Fault("threads", "OMP_NUM_THREADS=all", nothing, "warning", {"OMP_NUM_THREADS": "all"}),
    "little shared memory": Fault(
        "shared memory", "1.0 MiB of 1.0 MiB are free", over("/dev/shm", "size=1m"), "warning", namespaces=True
    ),
    "no shared memory": Fault(
        "shared memory", "/dev/shm cannot be written", over("/dev/shm", read_only=True), context={"gpus": 2},
        namespaces=True,
    ),
    # folders
    "a folder that is read-only": Fault(
        "run folder", "cannot be written: Read-only file system", over("folder", read_only=True), namespaces=True
    ),
    "a disk that cannot sync": Fault("run folder", "fsync does not work", raises(os, "fsync", errno.EIO)),
    "no space for a trial": Fault("run folder", "has no space for a file", over("folder", "size=16k"), namespaces=True),
    "a quota that is used up": Fault("run folder", "has no space for a file", raises(os, "fsync", errno.EDQUOT)),
    "a file system without rename": Fault("run folder", "renaming over a file", raises(os, "rename", errno.EXDEV)),
    "a file system without locks": Fault(
        "run folder", "locking does not work", raises(fcntl, "lockf", errno.ENOLCK), "warning"
    ),
    "locks that do not lock": Fault("run folder", "two processes hold", no_locks),
    "a full disk": Fault("space", "1.0 MiB of 1.0 MiB free", over("folder", "size=1m"), namespaces=True),
    "no more files": Fault("space", "more files may be made", over("folder", "size=2g,nr_inodes=20"), namespaces=True),
    "a server with another clock": Fault("clock", "3,600.0 s ahead of", later, "warning"),
    "programs may not run": Fault("temporary folder", "mounted without exec", no_exec, "warning", namespaces=True),
    "a home that is read-only": Fault(
        "caches", "HOME and HF_HOME and TRITON_CACHE_DIR lead there", over("folder", read_only=True), "warning",
        {"HOME": "FOLDER"}, namespaces=True,
    ),
    # the network
    "no loopback": Fault("loopback", "a connection to 127.0.0.1 fails", lambda _: unshare(NETWORK), namespaces=True),
    "few ports": Fault("loopback", "101 ports", few_ports, "warning", namespaces=True),
    "a name without an address": Fault(
        "host name", "nowhere.invalid has no address", named("nowhere.invalid"), context={"nodes": 2}, namespaces=True
    ),
    "a name of the loopback": Fault(
        "host name", "localhost leads to", named("localhost"), context={"nodes": 2}, namespaces=True
    ),
    "no such interface": Fault("interfaces", "=ib7, and", nothing, "warning", {"NCCL_SOCKET_IFNAME": "ib7"}),
    "an interface that is down": Fault(
        "interfaces", "the interface lo that", lambda _: unshare(NETWORK), variables={"GLOO_SOCKET_IFNAME": "lo"},
        namespaces=True,
    ),
    "no such adapter": Fault("interfaces", "no adapter mlx9", nothing, variables={"NCCL_IB_HCA": "=mlx9_0:1"}),
    "a world that is left over": Fault(
        "launchers", "RANK=1, WORLD_SIZE=2", nothing, variables={"RANK": "1", "WORLD_SIZE": "2"}
    ),
    "settings that are left over": Fault(
        "launchers", "ACCELERATE_MIXED_PRECISION", nothing, "warning", {"ACCELERATE_MIXED_PRECISION": "fp16"}
    ),
    # packages
    "an old package": Fault("versions", "needs numpy>=2.0, and numpy 1.20 is installed", metadata("1.20")),
    "a package that is there twice": Fault("copies", "numpy is there 2 times: 1.20", metadata("1.20"), "warning"),
    "an interrupted installation": Fault("copies", "has numpy as 1.20 and as 1.21", metadata("1.20", "1.21")),
    "a file of the name of a package": Fault("copies", "torch.py hides the package torch", hidden),
    "an earlier installation": Fault(
        "installation", "was installed as 0.0.1", metadata("0.0.1", name="distrain"), "warning"
    ),
    "a preloaded library that is gone": Fault(
        "libraries", "LD_PRELOAD=/gone.so", nothing, "warning", {"LD_PRELOAD": "/gone.so"}
    ),
    "another NCCL on the path": Fault("libraries", "libnccl.so.2", library, "warning", {"LD_LIBRARY_PATH": "FOLDER"}),
    # GPUs
    "a GPU without a driver": Fault("driver", "1 NVIDIA GPU without a driver", plugged, namespaces=True),
    "a container without devices": Fault(
        "driver", "no /dev/nvidiactl, /dev/nvidia-uvm", gpus(devices=False), namespaces=True
    ),
    "a driver that was replaced": Fault(
        "driver", "nvidia-smi failed: Failed to initialize NVML",
        gpus("echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18"), namespaces=True,
    ),
    "GPUs that are hidden": Fault(
        "visible GPUs", "hides 2 GPUs", gpus(), "warning", {"CUDA_VISIBLE_DEVICES": ""}, namespaces=True
    ),
    "a GPU that is not there": Fault(
        "visible GPUs", "2 is none of 2 GPUs", gpus(), variables={"CUDA_VISIBLE_DEVICES": "1,2"}, namespaces=True
    ),
    "a GPU for two processes": Fault(
        "visible GPUs", "1 GPU for 2 processes", gpus(), variables={"CUDA_VISIBLE_DEVICES": "1"},
        context={"processes": 2}, namespaces=True,
    ),
    "a GPU that nobody may use": Fault("GPUs", "compute mode Prohibited", gpus(row("Prohibited")), namespaces=True),
    "a GPU that others use": Fault(
        "GPUs", "70,000 of 143,771 MiB are in use", gpus(row(used=70000)), "warning", namespaces=True
    ),
    "a GPU with broken memory": Fault("GPUs", "3 memory errors", gpus(row(ecc="3")), namespaces=True),
    "a GPU that is hot": Fault("GPUs", "slowed down by heat", gpus(row(heat="Active")), "warning", namespaces=True),
    "CUDA that does not start": Fault("PyTorch", "finds no GPU", gpus(), context={"gpus": 2}, namespaces=True),
    "wrong products": Fault("matrix product", "multiplies wrongly", wrong_products, context={"processes": 2}),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name: str, tmp_path: Path) -> None:
    fault = FAULTS[name]
    if fault.namespaces and not planting.can_unshare():
        pytest.skip("needs namespaces, which this machine does not give")
    variables = {key: value.replace("FOLDER", str(tmp_path)) for key, value in fault.variables.items()}
    context = Context(tmp_path, variables=variables, **fault.context)
    found = found_with(fault.plant, BY_NAME[fault.check], context)
    assert {each.level.value for each in found} == {fault.level}, found
    assert fault.found in found[0].found
    assert found[0].means
    assert found[0].do


def problems(source: Path, check: str, *overrides: str, variables: dict[str, str] | None = None) -> list[Finding]:
    context = make_context(str(source), overrides, run_dir=str(source.parent / "run"), variables=variables or {})
    return found_with(nothing, BY_NAME[check], context)


DIGITS = ROOT / "recipes" / "digits.yaml"


@pytest.mark.parametrize(
    ("overrides", "check", "level", "said"),
    [
        (["optim.name=adamx"], "recipe", "error", "adamx"),
        (["optim.lr=fast"], "recipe", "error", "optim.lr"),
        (["model.weights=gone.safetensors"], "weights", "error", "No such file"),
        (["model.weights=cut.safetensors"], "weights", "error", "cut.safetensors"),
        (["data.name=image_folder", "data.path=gone"], "data", "error", "there is nothing at"),
        (["log.wandb=online"], "trackers", "warning", "wandb: 127.0.0.1:9 does not answer"),
        (["data.workers=64"], "CPUs", "warning", "64 loader processes"),
    ],
)
def test_what_a_recipe_lacks_is_found(overrides: list[str], check: str, level: str, said: str, tmp_path: Path) -> None:
    shutil.copy(DIGITS, tmp_path / "recipe.yaml")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    found = problems(tmp_path / "recipe.yaml", check, *overrides, variables={"WANDB_BASE_URL": "http://127.0.0.1:9"})
    assert (found[0].level.value, said in found[0].found) == (level, True), found
    if check == "trackers":
        assert [each.found for each in found[1:]] == ["wandb has no key for 127.0.0.1"]


@pytest.mark.skipif(not planting.can_unshare(), reason="needs namespaces, which this machine does not give")
@pytest.mark.parametrize(
    ("check", "overrides", "place", "size", "said"),
    [
        ("space", ["model={name: mlp, hidden: [4096, 4096]}"], "FOLDER", "size=100m", "checkpoints of"),
        (
            "data",
            ["data.workers=2", "batch.micro=256", "batch.global=256"],
            "/dev/shm",
            "size=100k",
            "of shared memory",
        ),
    ],
)
def test_what_a_recipe_takes_is_held_against_what_is_left(
    check: str, overrides: list[str], place: str, size: str, said: str, tmp_path: Path
) -> None:
    shutil.copy(DIGITS, tmp_path / "recipe.yaml")
    context = make_context(str(tmp_path / "recipe.yaml"), overrides, run_dir=str(tmp_path / "run"), variables={})
    found = found_with(over(place.replace("FOLDER", str(tmp_path)), size), BY_NAME[check], context)
    assert [each.level.value for each in found] == ["error"], found
    assert said in found[0].found


def test_a_device_is_held_against_its_peers() -> None:
    good = [Product(f"GPU {index}", True, True, 600.0 + index) for index in range(7)]
    (slow,) = judge([*good, Product("GPU 7", True, True, 300.0)], "GPU")
    assert (slow.level, slow.found) == (Level.warning, "GPU 7 multiplies at 300 TFLOPS, its peers at 602")
    (wrong,) = judge([*good, Product("GPU 7", False, True, 600.0), Product("GPU 8", True, False, 600.0)], "GPU")
    assert (wrong.level, wrong.found) == (Level.error, "a matrix product: GPU 7 multiplies wrongly")
    (unlike,) = judge([Product("GPU 0", True, False, 600.0)], "GPU")
    assert unlike.found == "a matrix product: GPU 0 has other bits each time"
    assert [each.level for each in judge(good, "GPU")] == [Level.ok]


def test_nothing_is_found_on_a_sound_machine(tmp_path: Path) -> None:
    ended = cli("doctor", DIGITS, "--run-dir", tmp_path / "run", "--processes", 2, "--json")
    found = json.loads(ended.out)["findings"]
    hidden_by_tests = {"visible GPUs", "PyTorch"}
    assert [each for each in found if each["level"] != "ok" and each["check"] not in hidden_by_tests] == []
    seen = {each["check"] for each in found}
    assert set(BY_NAME) - seen <= {"visible GPUs", "GPUs", "weights", "trackers"}, "those that had nothing to look at"


def test_the_page_lists_every_check_and_every_fault() -> None:
    page = (ROOT / "docs" / "doctor.md").read_text()
    looked, planted = page.split("## What is looked at")[1].split("## What it was tried on")
    first = {name for line in looked.splitlines() if line.startswith("| ") for name in line.split("|")[1].split(",")}
    assert set(BY_NAME) - {name.strip() for name in first} == set()
    assert [name for name in FAULTS if name not in planted] == []
