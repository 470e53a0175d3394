"""The NVIDIA GPUs of a machine, as the kernel and the driver's own tool tell. Imports no torch."""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from distrain.doctor.context import Context
from distrain.doctor.findings import Finding, error, ok, warning
from distrain.system.errors import some
from distrain.system.gpus import gpu_models

_PCI = Path("/sys/bus/pci/devices")
_DRIVER = Path("/proc/driver/nvidia")
_DEVICES = Path("/dev")
_NVIDIA = "0x10de"
_SMI_S = 30.0
_BUSY = 0.05
"""The share of a GPU's memory that is in use before a run, from which on it is said."""
_QUERY = ("index", "uuid", "name", "compute_mode", "memory.used", "memory.total",
          "ecc.errors.uncorrected.volatile.total", "clocks_throttle_reasons.hw_thermal_slowdown")  # fmt: skip


def driver(context: Context) -> Iterator[Finding]:
    """Whether the GPUs that are plugged in have a driver, and this process their devices."""
    plugged = [each for each in _PCI.glob("*/vendor") if _text(each) == _NVIDIA and _is_gpu(each.parent)]
    version = re.search(r"Kernel Module.*?\s(\d+[.\d]+)\s", _text(_DRIVER / "version"))
    count = gpus_of_machine()
    if not count:
        if plugged and version is None:
            yield error(
                f"{len(plugged)} NVIDIA GPU{'s' * (len(plugged) > 1)} without a driver",
                "a run computes on the CPU, many times slower",
                "install the driver and load it (modprobe nvidia); in a container have it passed in "
                "(docker run --gpus all, apptainer --nv)",
            )
        else:
            yield ok("no NVIDIA GPU: runs compute on the CPU")
        return
    missing = [name for name in ("nvidiactl", "nvidia-uvm") if not (_DEVICES / name).exists()]
    if missing:
        yield error(
            f"{count} GPU{'s' * (count > 1)} of the driver, and no {some([f'/dev/{name}' for name in missing])}",
            "CUDA finds no GPU, and a run computes on the CPU",
            "in a container pass the devices in (docker run --gpus all, apptainer --nv); in a job ask for GPUs "
            "(--gpus-per-node); on the machine itself run nvidia-modprobe -u",
        )
        return
    smi = smi_output("--query-gpu=driver_version", "--format=csv,noheader")
    if isinstance(smi, Finding):
        yield smi
        return
    cuda = "" if (highest := _cuda_of_driver()) is None else f", CUDA {highest[0]}.{highest[1]} at most"
    models = " and ".join(gpu_models()) or "GPU of NVIDIA"
    yield ok(f"{count} x {models}, driver {version[1] if version else 'of an unknown version'}{cuda}")
    if len(gpu_models()) > 1:
        yield warning(
            f"GPUs of {len(gpu_models())} kinds: {some(gpu_models())}",
            "each step takes as long as the slowest needs, and the memory is that of the smallest",
            "name those that are alike in CUDA_VISIBLE_DEVICES",
        )


def gpus_of_machine() -> int:
    """Return how many GPUs the driver has, whatever CUDA_VISIBLE_DEVICES says."""
    return len(list((_DRIVER / "gpus").glob("*")))


def _is_gpu(device: Path) -> bool:
    return _text(device / "class").startswith(("0x0300", "0x0302"))  # VGA or 3D controller


def smi_output(*arguments: str) -> str | Finding:
    """Return what `nvidia-smi` prints, or what is wrong with the driver where it fails; empty where it is not there."""
    if (program := shutil.which("nvidia-smi")) is None:
        return ""
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=_SMI_S, check=False)
    if done.returncode == 0:
        return done.stdout
    lines = (done.stdout + done.stderr).strip().splitlines()
    return error(
        f"nvidia-smi failed: {lines[0] if lines else f'exit code {done.returncode}'}",
        "the driver does not answer: CUDA finds no GPU, or a run ends with an error of CUDA",
        "where versions differ the driver was updated: restart the machine or load it again; where a GPU is lost, "
        "restart the machine and see `dmesg | grep -i xid`",
    )


def _cuda_of_driver() -> tuple[int, int] | None:
    """Return the highest CUDA version that the driver runs, as `nvidia-smi` says it."""
    told = smi_output()
    found = re.search(r"CUDA Version: (\d+)\.(\d+)", told) if isinstance(told, str) else None
    return (int(found[1]), int(found[2])) if found else None


def visible(context: Context) -> Iterator[Finding]:
    """What CUDA_VISIBLE_DEVICES leaves of the GPUs."""
    count = gpus_of_machine()
    given = context.variables.get("CUDA_VISIBLE_DEVICES")
    if given is None or not count:
        return
    names = [each.strip() for each in given.split(",") if each.strip()]
    said = f"CUDA_VISIBLE_DEVICES={given}"
    if not names or names[0] == "-1":
        yield warning(
            f"{said} hides {count} GPU{'s' * (count > 1)}", "a run computes on the CPU", "unset it, or name GPUs in it"
        )
        return
    wrong = [each for each in names if (each.isdecimal() and int(each) >= count) or not _names_gpu(each)]
    twice = sorted({each for each in names if names.count(each) > 1})
    if wrong or twice:
        what = f"{some(wrong)} is none of {count} GPUs" if wrong else f"{some(twice)} is there twice"
        yield error(
            f"{said}: {what}",
            "CUDA ignores what follows a name that it does not know, and everything where one is there twice: "
            "fewer GPUs than processes, or none",
            f"name GPUs from 0 to {count - 1}, each once, or unset it",
        )
        return
    if len(names) < context.processes:
        yield error(
            f"{said}: {len(names)} GPU{'s' * (len(names) > 1)} for {context.processes} processes",
            "the run is refused: each process needs a GPU",
            "name more GPUs, or start fewer processes",
        )
        return
    yield ok(f"{said}: {len(names)} of {count}")


def _names_gpu(name: str) -> bool:
    return name.isdecimal() or name.startswith(("GPU-", "MIG-"))


def state(context: Context) -> Iterator[Finding]:
    """Compute mode, memory in use, memory errors and heat of each GPU that is visible."""
    if not gpus_of_machine():
        return
    told = smi_output(f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits")
    if isinstance(told, Finding) or not told:
        return  # said with the driver
    rows = [dict(zip(_QUERY, (cell.strip() for cell in row), strict=False)) for row in csv.reader(told.splitlines())]
    rows = [row for row in rows if _is_visible(row, context.variables)]
    before = 0
    for row in rows:
        for each in _of_gpu(row):
            before += 1
            yield each
    if not before:
        yield ok(f"{len(rows)} GPU{'s' * (len(rows) != 1)} free, without memory errors")


def _is_visible(row: Mapping[str, str], variables: Mapping[str, str]) -> bool:
    given = variables.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        return True
    names = [each.strip() for each in given.split(",")]
    return row["index"] in names or any(name.startswith("GPU-") and row["uuid"].startswith(name) for name in names)


def _of_gpu(row: Mapping[str, str]) -> Iterator[Finding]:
    gpu = f"GPU {row['index']} ({row['name']})"
    if row["compute_mode"] == "Prohibited":
        yield error(
            f"{gpu} is in compute mode Prohibited", "no process may compute on it", f"nvidia-smi -i {row['index']} -c 0"
        )
    elif row["compute_mode"] == "Exclusive_Process":
        yield warning(
            f"{gpu} is in compute mode Exclusive_Process",
            "a second process on it fails, such as an evaluation beside the training",
            f"nvidia-smi -i {row['index']} -c 0, where nothing else asks for this mode",
        )
    used, total = _number(row["memory.used"]), _number(row["memory.total"])
    if used is not None and total and used > _BUSY * total:
        yield warning(
            f"{gpu}: {used:,.0f} of {total:,.0f} MiB are in use{_users(row['uuid'])}",
            "a run has the rest alone, and shares the GPU's time: it is slow or ends for lack of memory",
            "end what is left over of earlier runs, or name other GPUs in CUDA_VISIBLE_DEVICES",
        )
    if _number(row["ecc.errors.uncorrected.volatile.total"]):
        yield error(
            f"{gpu}: {row['ecc.errors.uncorrected.volatile.total']} memory errors that ECC could not correct",
            "numbers in its memory were lost since the driver started; runs on it end with CUDA errors",
            f"reset it (nvidia-smi -i {row['index']} -r) or restart the machine; if they come again have it replaced",
        )
    if row.get("clocks_throttle_reasons.hw_thermal_slowdown") == "Active":
        yield warning(
            f"{gpu} is slowed down by heat",
            "all ranks wait for it in each step",
            "look at its cooling, or leave it out",
        )


def _users(uuid: str) -> str:
    told = smi_output("--query-compute-apps=gpu_uuid,pid,process_name", "--format=csv,noheader")
    rows: list[Sequence[str]] = list(csv.reader(told.splitlines())) if isinstance(told, str) else []
    names = [
        f"{row[1].strip()} ({Path(row[2].strip()).name})" for row in rows if len(row) > 2 and row[0].strip() == uuid
    ]
    return f" by process {some(names)}" if names else ""


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # [N/A] of a GPU without it
        return None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
