"""What the operating system lets the processes of a run have: CPUs, threads, memory, open files, processes."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from distrain.doctor.context import Context
from distrain.doctor.findings import Finding, error, ok, warning
from distrain.system.memory import GIB, cgroup_folders, gib, limits

_FILES_OF_A_PROCESS = 256
"""Open files of a process that trains: libraries, sockets to its peers, a log, shards of data and checkpoints."""
_FILES_OF_A_WORKER = 32
"""Open files that each loader process adds to it: pipes, and tensors on their way."""
_THREADS_OF_A_PROCESS = 32
"""Threads of a process that trains, beside those that compute: of its log, checkpoints, collectives and CUDA."""
_MEMORY_OF_A_PROCESS = GIB // 2
"""What a process of PyTorch takes before it has a model."""
_SMALL_SHARED = 256 * 2**20
"""Bytes of shared memory below which a machine's is said to be small; containers have 64 MiB unless asked."""


def processors(context: Context) -> Iterator[Finding]:
    """The CPUs that a run may use, against its processes and their loader processes."""
    allowed = len(os.sched_getaffinity(0))
    quota = cpu_quota()
    usable = allowed if quota is None else min(allowed, quota)
    parts = [f"{allowed} of {os.cpu_count()} CPUs"]
    if quota is not None and quota < allowed:
        parts.append(f"of which the cgroup gives the time of {quota:g}")
    found = ", ".join(parts)
    needed, workers = context.processes, context.processes * context.workers
    if usable < needed + workers:
        loaders = f" and {workers} loader processes" if workers else ""
        yield warning(
            f"{found}, for {needed} process{'es' * (needed > 1)}{loaders}",
            "they take turns: steps are slow, and collectives wait for whoever has no CPU",
            "ask for more CPUs (--cpus-per-task of submit, --cpus of a container), end the pinning (taskset, numactl), "
            "or take fewer processes or data.workers",
        )
    else:
        yield ok(found)


def cpu_quota() -> float | None:
    """Return how many CPUs' time the cgroups of this process get; None: as much as there is."""
    quotas = []
    for folder, new in cgroup_folders("cpu"):
        with suppress(OSError, ValueError):
            if new:
                most, period = (folder / "cpu.max").read_text().split()
            else:
                most, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
            if most not in ("max", "-1"):
                quotas.append(int(most) / int(period))
    return min(quotas, default=None)


def threads(context: Context) -> Iterator[Finding]:
    """The numbers of threads that variables set."""
    cpus = len(os.sched_getaffinity(0))
    wrong = False
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        text = context.variables.get(name)
        if text is None:
            continue
        first = text.split(",")[0].strip()
        if not first.isdecimal() or int(first) == 0:
            wrong = True
            yield warning(
                f"{name}={text} is not a count of threads",
                "libraries ignore it, and each process takes as many threads as there are CPUs",
                f"export {name}={max(1, cpus // context.processes)}, or unset it",
            )
        elif int(first) > 1 and int(first) * context.processes > cpus:
            wrong = True
            yield warning(
                f"{name}={text} in {context.processes} process{'es' * (context.processes > 1)}, on {cpus} CPUs",
                "threads take turns on the CPUs and wait for each other: steps take several times as long",
                f"export {name}={max(1, cpus // context.processes)}, or unset it: each process then takes its share",
            )
    if not wrong:
        given = context.variables.get("OMP_NUM_THREADS")
        yield ok(f"OMP_NUM_THREADS={given}" if given else "not limited: each process takes its share of the CPUs")


def memory(context: Context) -> Iterator[Finding]:
    """The memory that is free, and limits of a process's address space."""
    found = limits()
    wrong = False
    for each in found:
        if not each.shared:
            wrong = True
            say = error if each.nbytes < 8 * GIB else warning
            yield say(
                f"{each.what} is {gib(each.nbytes)}",
                "PyTorch and CUDA map many times what they use: they fail to load, or a run ends with a MemoryError",
                "lift it before the start: ulimit -v unlimited; ulimit -d unlimited",
            )
    shared = [each for each in found if each.shared]
    if not shared:
        return
    least = min(shared, key=lambda each: each.nbytes - each.used)
    free = max(least.nbytes - least.used, 0)
    needed = context.processes * (1 + context.workers) * _MEMORY_OF_A_PROCESS
    if free < needed:
        yield error(
            f"{gib(free)} of {gib(least.nbytes)} are free, by {least.what}",
            f"{context.processes * (1 + context.workers)} processes of PyTorch take {gib(needed)} before they have a "
            "model: the kernel kills one of them",
            "end what else is there, ask for more memory (--mem of submit), or take fewer processes or data.workers",
        )
    elif not wrong:
        yield ok(f"{gib(free)} of {gib(least.nbytes)} free")


def shared_memory(context: Context) -> Iterator[Finding]:
    """The memory through which processes hand tensors to each other."""
    place = Path("/dev/shm")
    needs = context.workers > 0 or context.gpus > 1
    say = error if needs else warning
    means = "loader processes (data.workers) hand batches through it, and NCCL data between GPUs: both fail"
    do = "mount a tmpfs at /dev/shm; in a container give it a size (docker run --shm-size 16g, or --ipc host)"
    try:
        file = place / f".distrain-doctor-{os.getpid()}"
        file.touch(exist_ok=False)
        file.unlink()
        status = os.statvfs(place)
    except OSError as problem:
        yield say(f"/dev/shm cannot be written: {problem.strerror}", means, do)
        return
    free, total = status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize
    if free < _SMALL_SHARED:
        yield warning(
            f"{gib(free)} of {gib(total)} are free in /dev/shm",
            "loader processes (data.workers) hand batches through it, and NCCL data between GPUs: a run ends with a "
            "bus error once it is full",
            f"clear what earlier runs left there (ls /dev/shm); {do}",
        )
    else:
        yield ok(f"{gib(free)} of {gib(total)} free in /dev/shm")


def open_files(context: Context) -> Iterator[Finding]:
    """The limit of open files of a process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = _FILES_OF_A_PROCESS + _FILES_OF_A_WORKER * context.workers
    if soft == resource.RLIM_INFINITY or soft >= max(needed, 1024):
        yield ok(f"a process may open {_count(soft)}")
        return
    higher = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    do = f"raise it before the start: ulimit -n {higher}"
    if higher <= soft:
        do = "have the administrator raise it (limits.conf, or LimitNOFILE of the service that starts jobs)"
    found = f"a process may open {_count(soft)} files"
    if soft < needed:
        means = f"a run needs about {needed}: its loaders or checkpoints fail with 'Too many open files'"
        yield error(found, means, do)
    else:
        yield warning(found, "enough for this run; data in many files, and many processes, need more", do)


def process_count(context: Context) -> Iterator[Finding]:
    """The limit of processes and threads, of the user and of the cgroup."""
    cores = len(os.sched_getaffinity(0))
    needed = context.processes * (1 + context.workers) * (_THREADS_OF_A_PROCESS + cores // context.processes)
    left: dict[str, int] = {}
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if soft != resource.RLIM_INFINITY and os.geteuid() != 0:  # the kernel does not hold root to it
        left["ulimit -u"] = soft - _threads_of_user()
    for folder, _ in cgroup_folders("pids"):
        with suppress(OSError, ValueError):
            left["the cgroup's pids.max"] = int((folder / "pids.max").read_text()) - int(
                (folder / "pids.current").read_text()
            )
    limit = min(left, key=lambda each: left[each], default=None)
    if limit is not None and left[limit] < needed:
        yield error(
            f"{max(left[limit], 0):,} more processes and threads may be started, by {limit}",
            f"a run here takes about {needed:,}: it ends with 'Resource temporarily unavailable' or 'can't start new "
            "thread'",
            "end what is left over of earlier runs, raise the limit (ulimit -u, pids.max), or take fewer processes or "
            "data.workers",
        )
    else:
        yield ok("not limited" if limit is None else f"{left[limit]:,} more may be started, by {limit}")


def _threads_of_user() -> int:
    """Return how many threads the user of this process has on this machine, which is what the limit counts."""
    count = 0
    for folder in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            if folder.name.isdecimal() and folder.stat().st_uid == os.getuid():
                count += len(os.listdir(folder / "task"))
    return count


def locked_memory(context: Context) -> Iterator[Finding]:
    """The limit of memory that a process may lock, which InfiniBand needs; and whether crashes leave core files."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    adapters = infiniband_adapters()
    if adapters and soft != resource.RLIM_INFINITY:
        yield (error if soft < 64 * 2**20 else warning)(
            f"a process may lock {gib(soft)}, and this machine has InfiniBand ({', '.join(adapters)})",
            "NCCL registers its buffers as locked memory: it fails with 'ibv_reg_mr' or falls back to slow sockets",
            "ulimit -l unlimited before the start; on SLURM PropagateResourceLimitsExcept=MEMLOCK, and "
            "LimitMEMLOCK=infinity of slurmd",
        )
        return
    most = "as much as it likes" if soft == resource.RLIM_INFINITY else gib(soft)
    yield ok(f"a process may lock {most}{'' if adapters else '; no InfiniBand here'}")


def infiniband_adapters() -> list[str]:
    """Return the names of this machine's InfiniBand and RoCE adapters."""
    with suppress(OSError):
        return sorted(os.listdir("/sys/class/infiniband"))
    return []


def file_size(context: Context) -> Iterator[Finding]:
    """The limit of a file's size, and of core files."""
    soft, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if soft != resource.RLIM_INFINITY:
        yield error(
            f"a process may write files of {gib(soft)} at most",
            "a checkpoint or an export that is larger ends the run with SIGXFSZ, 'File size limit exceeded'",
            "lift it before the start: ulimit -f unlimited",
        )
        return
    core, _ = resource.getrlimit(resource.RLIMIT_CORE)
    cores = "no core files" if core == 0 else "a crash may leave a core file as large as the process"
    yield ok(f"files of any size; {cores}")


def _count(limit: int) -> str:
    return "any number of" if limit == resource.RLIM_INFINITY else f"{limit:,}"
