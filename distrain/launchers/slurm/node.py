"""What runs once on each node of a job: the launcher of that node's processes, with the address of the others."""

from __future__ import annotations

import json
import os
import shutil
import socket
import stat
import sys
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from distrain.config import UserError
from distrain.launchers import (
    TYPED,
    LaunchPlan,
    Options,
    PortTaken,
    RunRequest,
    StartEnvironment,
    autobatch,
    check_gpus,
    configuration_file,
    gpu_count,
    launch,
    launcher_environment,
    open_run,
    read_target,
    resolve,
    shared_file,
    work,
)
from distrain.launchers.slurm.job_environment import read_slurm
from distrain.run.folder import RunDir
from distrain.run.lease import Holder, check_free
from distrain.run.micro_batch import cache_micro_batch
from distrain.system.environment import forget_launchers, say_ignored, use_interfaces
from distrain.system.job_environment import job_environment
from distrain.system.output import echo

if TYPE_CHECKING:
    from distrain.training.callbacks.base import Callback


def job_name(variables: Mapping[str, str] = os.environ) -> str:
    """Return the job as SLURM's commands take it: 17, or 17_3 for a task of an array."""
    return read_slurm(variables).queue_id or "0"


def processes_here(asked: str) -> int:
    """Return how many processes a node starts, when `asked` is a number or auto: one for each GPU, else one."""
    return int(asked) if asked != "auto" else max(1, gpu_count())


def create(
    target: str,
    overrides: Sequence[str],
    *,
    nodes: int,
    processes: str,
    strategy: str,
    offload: str,
    replicate: str = "",
    run_dir: str | None = None,
    update: bool = False,
) -> Path:
    """Create the run of a recipe and overrides, or open the existing one; returns its folder.

    A requeued job resumes its run, whatever has become of the recipe's file.
    """
    job = job_environment()
    if job.requeued and (earlier := run_of_job(job.job, run_dir)) is not None:
        return earlier
    here = processes_here(processes)
    environment = StartEnvironment(nodes * here, nodes, here, gpu_count(), argv=tuple(sys.argv))
    options = Options(strategy, None if offload == "auto" else offload, replicate=replicate or None)
    request = resolve(read_target(target, overrides, run_dir, update=update), options, environment)
    run = request.run
    if run.exists:
        check_free(run, Holder.of_this_process(job))
    # the file UPDATE tells the first attempt; a requeued job must not update again
    open_run(run, request.given, replace(request, update=False).launch(), update=update)
    if update:
        run.clear_markers()
    return run.path


def request_of_job(
    run: RunDir, nodes: int, here: int, strategy: str, offload: str, replicate: str = ""
) -> RunRequest | None:
    """Return the request in a run's folder where it is for a job of this shape.

    None where the folder is of an earlier version, or the run was started in another way since.
    """
    found = RunRequest.of_run(run) if run.launch_path.exists() else None
    if found is None or found.update or (found.nodes, found.processes) != (nodes, nodes * here):
        return None
    same = strategy in ("auto", found.strategy) and offload in ("auto", found.offload)
    return found if same and replicate in ("", str(found.replicate)) else None


def run_of_job(job: str | None, run_dir: str | None) -> Path | None:
    """Return the run that a job has begun, where it is below runs/ or at `run_dir`; None where there is none."""
    for folder in [Path(run_dir)] if run_dir else sorted(Path("runs").glob("*")):
        run = RunDir(folder)
        if run.exists and any(row.get("job") == job for row in run.attempts()):
            return run.path
    return None


def start_node(
    folder: str,
    *,
    nodes: int,
    processes: str,
    strategy: str = "auto",
    offload: str = "auto",
    replicate: str = "",
    address: str = "",
    port: int = 0,
    interface: str | None = None,
    scratch: str | None = None,
    callbacks: Sequence[Callback] = (),
) -> int:
    """Start this node's processes of a run and wait for them; returns the exit status. Every node calls.

    `address` and `port` say where the first node's launcher is reached; how many processes there are in all is
    `nodes` times `processes`. `callbacks` are called after the recipe's where this node's process is the only one; of
    several, each process has its own. The run's folder records how it ended, as launchers end in many ways.
    """
    run = RunDir(folder)
    if not run.exists:
        raise UserError(
            f"{run.path} is not a run on {socket.gethostname()}: it has no recipe.yaml. A run's folder must be on a "
            "file system that all nodes share"
        )
    # what srun brought from where the job was submitted
    say_ignored(forget_launchers(os.environ) + use_interfaces(os.environ, alone=nodes == 1))
    rank, count = node_rank(nodes, os.environ), processes_here(processes)
    world_size = nodes * count
    check_gpus(count, gpu_count())
    set_environment(os.environ, count, address, interface)
    wanted = None if offload == "auto" else offload
    stored = request_of_job(run, nodes, count, strategy, offload, replicate)
    with scratch_folder(scratch, os.environ):
        if world_size == 1 and stored is not None:
            return work(str(run.path), request=stored.id, callbacks=callbacks)
        if world_size == 1:
            given = Options(strategy, wanted, 1, replicate or None)
            return work(str(run.path), callbacks=callbacks, **vars(given))
        arguments: tuple[str, ...]
        imports: tuple[str, ...] = ()
        if stored is not None:
            request, arguments, imports = stored, stored.worker_arguments, stored.imports
        else:
            options = Options(strategy, wanted, replicate=replicate or None)
            request = resolve(read_target(str(run.path)), options, launcher_environment(world_size, nodes))
            arguments = (str(run.path), "--processes", str(world_size), *request.spec.options)
            if run.launch_path.exists():
                os.environ.setdefault(TYPED, json.dumps(run.launch().argv))
        plan = LaunchPlan(
            shared_file("launch", "train.py"),
            arguments,
            count,
            configuration_file(request.strategy, nodes),
            request.offload,
            nodes,
            rank,
            address,
            port,
            imports,
        )
        # the processes of the other nodes wait for those of this one
        tries = rank == 0 and run.finished is None
        if tries and (found := autobatch(request, count)) is not None:
            cache_micro_batch(run, found)
        try:
            status = launch(plan, run)
        except PortTaken:
            note_taken(run, port)
            return 1
    return 0 if run.preempted is not None or run.finished is not None else status


def node_rank(nodes: int, variables: Mapping[str, str]) -> int:
    """Return which of the job's nodes this is, by srun's variables; raises UserError without them."""
    if nodes == 1:
        return 0
    told = read_slurm(variables).node or ""
    if not told.isdecimal() or int(told) >= nodes:
        raise UserError(
            f"SLURM_NODEID is {told or 'not set'}, expected a number below the {nodes} nodes; srun sets it: start this "
            "with `srun --nodes N --ntasks-per-node 1`"
        )
    return int(told)


def set_environment(
    variables: MutableMapping[str, str], processes: int, address: str = "", interface: str | None = None
) -> None:
    """Set what libraries read: threads for each process, and the network between nodes. What is set already stays."""
    cpus = len(os.sched_getaffinity(0))
    if (told := read_slurm(variables).cpus) is not None:
        cpus = min(cpus, told)  # where SLURM binds nothing, a process sees all CPUs of the node
    variables.setdefault("OMP_NUM_THREADS", str(max(1, cpus // processes)))
    if interface is not None:
        there = [name for _, name in socket.if_nameindex()]
        if interface not in there:
            raise UserError(
                f"{socket.gethostname()} has no network interface {interface!r}, it has {', '.join(there)}; "
                "correct `interface` of the site"
            )
        variables.setdefault("NCCL_SOCKET_IFNAME", interface)
    if address and (found := interface or interface_towards(address)):
        # gloo takes the address that the node's own name resolves to, which may be none or 127.0.0.1
        variables.setdefault("GLOO_SOCKET_IFNAME", found)


def interface_towards(address: str) -> str | None:
    """Return the network interface over which this machine reaches `address`, or None where that is not known."""
    import psutil

    try:
        family, kind, _, _, place = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(place)  # nothing is sent
            own = probe.getsockname()[0]
    except OSError as error:
        raise UserError(
            f"{address}, the address of the job's first node, cannot be reached from here: {error}"
        ) from error
    found = psutil.net_if_addrs().items()
    return next((name for name, held in found if own in {each.address.partition("%")[0] for each in held}), None)


def note_taken(run: RunDir, port: int) -> None:
    """Tell the batch script that another port is to be tried."""
    name = f"port-taken-{job_name(os.environ)}-{read_slurm(os.environ).restart}"
    (run.path / "submit").mkdir(exist_ok=True)
    (run.path / "submit" / name).write_text(f"{port}\n")
    echo(f"distrain: port {port} of {socket.gethostname()} was taken; another is tried", error=True)


@contextmanager
def scratch_folder(scratch: str | None, variables: MutableMapping[str, str]) -> Iterator[None]:
    """Have temporary files and what libraries compile in a folder of the node's own while the block runs.

    The temporary files go when it ends. What was compiled stays, for the next job of the same user.
    """
    if scratch is None:
        yield
        return
    base = os.path.expandvars(scratch)
    if "$" in base or not base.startswith("/"):
        raise UserError(
            f"the site's scratch folder {scratch!r} is {base!r} on {socket.gethostname()}, expected an absolute path; "
            "variables in it must be set there"
        )
    own = Path(base) / f"distrain-{os.getuid()}"
    name = f"{job_name(variables)}-{read_slurm(variables).node or 0}"
    temporary = own / f"job-{name}"
    try:
        own.mkdir(parents=True, exist_ok=True, mode=0o700)
        seen = own.lstat()
        if not stat.S_ISDIR(seen.st_mode) or seen.st_uid != os.getuid() or seen.st_mode & 0o022:
            raise UserError(f"{own} on {socket.gethostname()} is not a folder that only you can write; remove it")
        shutil.rmtree(temporary, ignore_errors=True)  # of a start that was killed
        temporary.mkdir(mode=0o700)
    except OSError as error:
        raise UserError(f"cannot use the scratch folder {own} on {socket.gethostname()}: {error}") from error
    variables["TMPDIR"] = str(temporary)
    for cache in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TORCH_EXTENSIONS_DIR"):
        variables.setdefault(cache, str(own / "cache" / cache.removesuffix("_DIR").lower()))
    try:
        yield
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
