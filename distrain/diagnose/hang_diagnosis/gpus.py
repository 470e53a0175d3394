"""What the driver of NVIDIA GPUs has noted about them: its Xid errors and uncorrectable errors of their memory."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_DRIVER = Path("/proc/driver/nvidia")
_PATIENCE_S = 2.0
"""A command that asks a broken driver may never return."""

_XID = re.compile(
    r"^(?:<\d+>)?\s*\[\s*(?P<time>\d+\.\d+)\]\s*(?:\[[^\]]*\]\s*)?NVRM: Xid \(PCI:(?P<gpu>[0-9a-fA-F:.]+)\): "
    r"(?P<code>\d+),?\s*(?P<text>.*)$",
    re.MULTILINE,
)

_MEANINGS = {
    13: "an error in a kernel, usually an index out of bounds in the program",
    31: "a memory page fault, usually an address out of bounds in the program",
    43: "the GPU stopped processing",
    45: "the driver ended the program's work on the GPU, because of an earlier error",
    48: "a double-bit error in memory that cannot be corrected",
    61: "an internal breakpoint of the GPU's microcontroller",
    62: "the GPU's microcontroller halted",
    63: "a row or page of memory is to be replaced",
    64: "a row or page of memory could not be replaced",
    69: "an error of the graphics engine",
    74: "an error of NVLink",
    79: "the GPU has fallen off the bus",
    92: "a high rate of single-bit errors in memory",
    94: "an uncorrectable error in memory that was contained to one program",
    95: "an uncorrectable error in memory that was not contained",
    109: "a timeout in switching contexts",
    119: "the GPU's system processor does not answer",
    120: "an error of the GPU's system processor",
    140: "an uncorrectable error in memory",
    143: "the GPU's initialisation failed",
    145: "an error of NVLink",
    149: "an error of NVLink",
    154: "the GPU must be reset or the machine restarted before it can be used again",
}
"""NVIDIA, "Xid Errors": the ones that end training."""


@dataclass(frozen=True)
class Xid:
    """An error that the driver wrote into the kernel's log."""

    time_s: float
    """Seconds since the machine started."""
    gpu: str
    """Its address on the PCI bus."""
    code: int
    text: str

    def __str__(self) -> str:
        meaning = _MEANINGS.get(self.code)
        return f"GPU {self.gpu}: Xid {self.code}" + (f" ({meaning})" if meaning else "") + f": {self.text}".rstrip(": ")


def parse_xids(kernel_log: str) -> list[Xid]:
    """Return the Xid errors in what `dmesg` prints."""
    return [
        Xid(float(match["time"]), match["gpu"].lower(), int(match["code"]), match["text"].strip())
        for match in _XID.finditer(kernel_log)
    ]


MEMORY_QUERY = ("index", "pci.bus_id", "ecc.errors.uncorrected.volatile.total")


def parse_memory_errors(csv: str) -> dict[str, int]:
    """Return {GPU: uncorrectable memory errors since the driver was loaded} where there are any.

    `csv` is what `nvidia-smi --query-gpu=... --format=csv,noheader,nounits` prints for MEMORY_QUERY. GPUs without
    error correction say [N/A].
    """
    found = {}
    for line in csv.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) == len(MEMORY_QUERY) and parts[2].isdecimal() and int(parts[2]):
            found[f"{parts[0]} ({parts[1].lower()})"] = int(parts[2])
    return found


def describe_gpus(xids: list[Xid], memory_errors: Mapping[str, int], *, since_s: float = 0.0) -> list[str]:
    """Return a line for each fault; of Xid errors those that came later than `since_s` after the machine started."""
    lines = [str(xid) for xid in xids if xid.time_s >= since_s]
    lines += [f"GPU {gpu}: {count} uncorrectable memory errors" for gpu, count in memory_errors.items()]
    return list(dict.fromkeys(lines))


def gpu_faults(since_s: float | None = None) -> list[str]:
    """Return a line for each fault of this machine's GPUs; none where there is no NVIDIA driver or it may not be read.

    `since_s`: Xid errors from this second after the machine's start on (None: of the last day).
    """
    if not _DRIVER.is_dir():
        return []
    if since_s is None:
        since_s = time.clock_gettime(time.CLOCK_BOOTTIME) - 24 * 3600
    query = ["nvidia-smi", f"--query-gpu={','.join(MEMORY_QUERY)}", "--format=csv,noheader,nounits"]
    return describe_gpus(parse_xids(_said(["dmesg"])), parse_memory_errors(_said(query)), since_s=since_s)


def _said(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_PATIENCE_S)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
