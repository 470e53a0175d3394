"""The memory limits of this process, its peak, and the kernel's out-of-memory kills. Imports no torch."""

from __future__ import annotations

import ctypes
import functools
import resource
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

GIB = 2**30


@dataclass(frozen=True)
class Limit:
    """A memory limit of this process, with its current and peak use."""

    what: str
    """Such as "the limit of the cgroup"."""
    nbytes: int
    used: int
    peak: int
    """The known peak; of a shared limit, of all its processes."""
    shared: bool
    """Whether all processes of the machine or the cgroup share it."""
    set_by_someone: bool = True
    """False for the size of the machine itself."""


def limits() -> list[Limit]:
    """Return every memory limit of this process, the one closest to being reached first."""
    status = _numbers("/proc/self/status")
    found = []
    for number, what, now, most in (
        (resource.RLIMIT_AS, "the limit of a process's address space (ulimit -v)", "VmSize", "VmPeak"),
        (resource.RLIMIT_DATA, "the limit of a process's data (ulimit -d)", "VmData", "VmData"),
    ):
        limit, _ = resource.getrlimit(number)
        if limit != resource.RLIM_INFINITY:
            found.append(Limit(what, limit, status.get(now, 0), status.get(most, 0), shared=False))
    machine = _numbers("/proc/meminfo")
    total = machine.get("MemTotal", 0)
    found += [each for each in _of_cgroups() if not total or each.nbytes < total]
    if total:
        used = total - machine.get("MemAvailable", total)
        found.append(Limit("this machine's memory", total, used, used, shared=True, set_by_someone=False))
    return sorted(found, key=lambda each: each.peak / max(each.nbytes, 1), reverse=True)


def peak_bytes() -> int:
    """Return the peak memory of this process in bytes, with shared pages. Takes a microsecond."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return peak if peak > _peak_before() else _numbers("/proc/self/status").get("VmHWM", peak)


@functools.cache
def _peak_before() -> int:
    """Return the peak of the program that this process ran before this one, or its parent did; 0: it was no higher.

    `getrusage` takes it for this one's, and the kernel's file, which does not, takes sixty times as long to read.
    """
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return peak if peak > _numbers("/proc/self/status").get("VmHWM", peak) else 0


def oom_kills() -> int | None:
    """Return the number of out-of-memory kills in this process's cgroup, or else on the machine; None: unknown."""
    for folder, _ in cgroup_folders():
        for name in ("memory.events", "memory.oom_control"):
            if (count := _counter(folder / name, "oom_kill")) is not None:
                return count
    return _counter(Path("/proc/vmstat"), "oom_kill")


def gib(nbytes: float) -> str:
    """Return bytes as text in GiB or MiB."""
    return f"{nbytes / GIB:.2f} GiB" if nbytes >= GIB / 10 else f"{nbytes / 2**20:.1f} MiB"


# --------------------------------------------------------------------------------------------------------------------
# The kernel's files


def _numbers(path: str) -> dict[str, int]:
    """Return the sizes in a file of lines such as `VmHWM:   1234 kB`, in bytes."""
    found = {}
    for line in _text(Path(path)).splitlines():
        name, _, rest = line.partition(":")
        parts = rest.split()
        if len(parts) == 2 and parts[1] == "kB" and parts[0].isdigit():
            found[name] = int(parts[0]) * 1024
    return found


def _counter(path: Path, name: str) -> int | None:
    for line in _text(path).splitlines():
        parts = line.split()
        if len(parts) == 2 and parts[0] == name and parts[1].isdigit():
            return int(parts[1])
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdigit() else None


def cgroup_folders(controller: str = "memory") -> Iterator[tuple[Path, bool]]:
    """Yield (folder, whether it is of cgroup v2) of this process's cgroups of a controller, from its own upwards."""
    own: dict[bool, str] = {}
    for line in _text(Path("/proc/self/cgroup")).splitlines():
        number, controllers, place = line.split(":", 2)
        if number == "0" or controller in controllers.split(","):
            own[number == "0"] = place
    for line in _text(Path("/proc/self/mountinfo")).splitlines():
        before, _, after = line.partition(" - ")
        kind, options = after.split()[0], after.split()[-1]
        if kind not in ("cgroup", "cgroup2") or (kind == "cgroup" and controller not in options.split(",")):
            continue
        if (path := own.get(kind == "cgroup2")) is None:
            continue
        root, mount = before.split()[3:5]
        # a container may mount its own cgroup as the root
        inside = path.removeprefix(root.rstrip("/")).strip("/") if path.startswith(root) else ""
        folder = Path(mount) / inside
        while True:
            if folder.is_dir():
                yield folder, kind == "cgroup2"
            if folder == Path(mount):
                break
            folder = folder.parent


def _of_cgroups() -> Iterator[Limit]:
    for folder, new in cgroup_folders():
        names = ("max", "current", "peak") if new else ("limit_in_bytes", "usage_in_bytes", "max_usage_in_bytes")
        limit, used, peak = (_number(folder / f"memory.{name}") for name in names)
        if limit is None or limit >= 2**62:
            continue
        # the page cache is freed on demand
        idle = _counter(folder / "memory.stat", "inactive_file" if new else "total_inactive_file") or 0
        in_use = max((used or 0) - idle, 0)
        yield Limit("the limit of the cgroup", limit, in_use, max(peak or 0, in_use), shared=True)


_FREED = 32 * 2**20
"""Bytes that are freed before they are given back."""

_freed = 0


def give_back(nbytes: int) -> None:
    """Note that so much was freed, and now and then give what is free back to the operating system.

    The C library keeps a freed block below one that is in use, so a process that frees a model piece by piece
    would stay as large as it was.
    """
    global _freed
    _freed += nbytes
    if _freed >= _FREED and (trim := _malloc_trim()) is not None:
        trim(0)
        _freed = 0


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
