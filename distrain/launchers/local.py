"""This machine as a `Launcher`, and how a machine's processes are started: `launch_argv` and `launch`."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import distrain
from distrain.config import UserError
from distrain.config.registry import datasets, launchers, losses, metrics, models, optimizers, tasks
from distrain.launchers.evaluating import EvaluationRequest, evaluate_here, resolve_evaluation
from distrain.launchers.forking import Meeting, PortTaken, can_fork, import_once, in_copy, run_forked
from distrain.launchers.launcher import Job, Submitted
from distrain.launchers.predicting import PredictionRequest, print_prediction, resolve_prediction
from distrain.launchers.preflight import gpu_count, launcher_environment, worker_environment
from distrain.launchers.request import TRAINING_IMPORTS, Options, RunRequest, prepare, read_target, resolve
from distrain.launchers.worker import begin_worker, show_finished, train_here
from distrain.run.folder import RunDir
from distrain.run.heartbeat import ending_hung, hang_of
from distrain.system.compiler import COMPILER, compiler_imported
from distrain.system.environment import (
    LAUNCHED_BY,
    SWEPT_BY,
    forget_launchers,
    is_quiet,
    own_start,
    say_ignored,
    share_cores,
)
from distrain.system.importing import importing
from distrain.system.job_environment import job_environment
from distrain.system.logs import show_on_terminal
from distrain.system.memory import oom_kills
from distrain.system.output import echo_error, echo_loading
from distrain.system.processes import end_with_parent

_OUT_OF_MEMORY = (
    ": the memory ran out, and the kernel ended it for that. What takes less: a smaller batch.micro (the step stays "
    "the same), train.activation_checkpointing: true, --strategy fsdp2, which spreads the state over the processes"
)
_SIGNAL_HINTS = {"SIGKILL": "; out of memory is the usual reason (see dmesg), or somebody did it"}


def shared_file(*parts: str) -> Path:
    """Return the path of a file that comes with distrain: a recipe, a launch script, a configuration.

    They lie beside the package in a checkout, and inside it (`share/`) when it was installed from a wheel.
    """
    package = Path(distrain.__file__).parent
    roots = [package / "share", package.parent]
    found = next((root.joinpath(*parts) for root in roots if root.joinpath(*parts).exists()), None)
    if found is None:
        raise UserError(f"{'/'.join(parts)} is not part of this installation of distrain; install it again")
    return found


def configuration_file(strategy: str, nodes: int = 1) -> Path:
    """Return the accelerate configuration that starts a strategy's processes on this machine, one of `nodes`."""
    if strategy == "ddp" and not gpu_count():
        return shared_file("accelerate_configs", "multi_cpu.yaml")
    return shared_file("accelerate_configs", f"{strategy}_multinode.yaml" if nodes > 1 else f"{strategy}.yaml")


@dataclass(frozen=True)
class LaunchPlan:
    """How one machine's processes are started."""

    script: Path
    """What each process runs, in launch/: train.py, evaluate.py or predict.py."""
    arguments: tuple[str, ...]
    """Its arguments."""
    processes: int
    """On this machine."""
    config: Path
    """The accelerate configuration."""
    offload: str = "none"
    """What the configuration's strategy keeps in the memory of the CPU: none, optimizer or all."""
    nodes: int = 1
    """How many machines there are, each with a launcher of its own and as many processes."""
    node_rank: int = 0
    """Which of them this is; its processes have the ranks from node_rank * processes on."""
    address: str = ""
    """Where the first machine is reached by all; only for several."""
    port: int = 0
    """Where its launcher listens; 0 takes a free one, which works for one machine only."""
    imports: tuple[str, ...] = ()
    """Modules that each process imports: where they are known it may be forked from one that has."""

    def __post_init__(self) -> None:
        assert 0 <= self.node_rank < self.nodes
        assert self.nodes == 1 or (self.address and self.port), "machines meet at an address that all know"

    @property
    def meeting(self) -> Meeting:
        """Where its processes meet those of the other machines."""
        return Meeting(self.address, self.port, self.nodes, self.node_rank) if self.nodes > 1 else Meeting()


def launch_argv(plan: LaunchPlan) -> list[str]:
    """Return the arguments of `accelerate launch`. Pure."""
    offload = {
        "none": (),
        "optimizer": ("--offload_optimizer_device", "cpu"),
        "all": ("--offload_optimizer_device", "cpu", "--offload_param_device", "cpu", "--fsdp_offload_params", "true"),
    }
    return [
        "--config_file",
        str(plan.config),
        *offload[plan.offload],
        "--num_processes",
        str(plan.processes * plan.nodes),
        *_meeting(plan),
        str(plan.script),
        *plan.arguments,
    ]


def _meeting(plan: LaunchPlan) -> list[str]:
    if plan.nodes == 1:
        # a free port, so that several runs fit on one machine
        return [
            *("--num_machines", "1", "--machine_rank", "0"),
            *("--rdzv_backend", "static", "--main_process_port", "0"),
        ]
    # static, explicitly: otherwise rank 0 need not be on the first machine, and announces a
    # host name which others may not be able to resolve
    return [
        *("--num_machines", str(plan.nodes), "--machine_rank", str(plan.node_rank), "--rdzv_backend", "static"),
        *("--main_process_ip", plan.address, "--main_process_port", str(plan.port)),
    ]


def launch(plan: LaunchPlan, run: RunDir | None = None) -> int:
    """Start the plan's processes, wait for them, and return 0 when all of them ended well, otherwise 1.

    Raises PortTaken, with none started, where the first of several machines cannot listen at the plan's port. Those
    that are stuck when `run` is recorded to hang are killed.

    Without GPUs they are forked from this process, which imports once what all need. Elsewhere it is `accelerate
    launch` itself, so that its report of a failed worker (a page of Python traces around an exit code) is not shown:
    the worker has already reported why.
    """
    # torch's launcher takes PET_* for its options, and hands the rest to its processes
    forget_launchers(os.environ)
    os.environ[LAUNCHED_BY] = str(os.getpid())
    share_cores(plan.processes)
    # who stops a run waits for its last step and checkpoint; torch would kill it after 30 s
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(24 * 3600))
    killed_before = oom_kills()
    exit_codes = _forked(plan, run) if _import_for(plan) else _launched(plan, run)
    if exit_codes is None or (any(exit_codes.values()) and run is not None and hang_of(run) is not None):
        return 1  # a hang is reported
    killed = None if killed_before is None else (oom_kills() or 0) - killed_before
    for line in unsaid_failures(exit_codes, killed):
        echo_error(line)
    return int(any(exit_codes.values()))


def _import_for(plan: LaunchPlan) -> bool:
    """Import what starting the plan's processes takes, which is seconds; returns whether they can be forked."""
    if not gpu_count():
        # accelerate imports DeepSpeed, which otherwise warns that it found no GPU
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    forks = bool(plan.imports) and can_fork()
    import_once(plan.imports if forks else ("accelerate.commands.launch",))
    return forks


def _forked(plan: LaunchPlan, run: RunDir | None) -> dict[int, int] | None:
    """Fork the plan's processes; returns the exit code of each, None where a signal ended this one."""
    codes, told = run_forked(
        plan.script,
        plan.arguments,
        plan.processes,
        meeting=plan.meeting,
        # as `accelerate launch` does by its configuration
        variables={"ACCELERATE_USE_CPU": "true"} if plan.config.name == "multi_cpu.yaml" else {},
        notice=job_environment().notice,
        patience_s=float(os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]),
        watching=nullcontext if run is None else partial(ending_hung, run, started=True),
    )
    return None if told else codes


def _launched(plan: LaunchPlan, run: RunDir | None) -> dict[int, int] | None:
    """Be the plan's `accelerate launch`; returns the exit codes other than 0, None where a signal ended it."""
    with importing():
        from accelerate.commands.launch import launch_command, launch_command_parser
        from torch.distributed import DistNetworkError
        from torch.distributed.elastic.multiprocessing.api import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    arguments = launch_command_parser().parse_args(launch_argv(plan))
    try:
        with _passed_on(job_environment().notice), ending_hung(run) if run is not None else nullcontext():
            launch_command(arguments)
    except ChildFailedError as error:
        return {rank: failure.exitcode for rank, failure in error.failures.items()}
    except SignalException:
        return None
    except (ConnectionError, DistNetworkError) as error:
        # accelerate looks whether the port is free, and torch may find it taken a moment later
        if type(error) is ConnectionError or any(name in str(error) for name in ("EADDRINUSE", "EACCES")):
            raise PortTaken(plan.port) from error
        raise
    return {}


@contextmanager
def _passed_on(number: signal.Signals) -> Iterator[None]:
    """Pass a signal on to the processes that this one starts.

    torch's launcher would die of it. It is blocked here, and so from their first moment in what is started here: it
    waits for the handler that `StopRequest` installs, where it would end a process that is still importing.
    """
    import psutil

    done = threading.Event()

    def pass_on() -> None:
        while not done.is_set():
            if signal.sigtimedwait([number], 0.2) is not None:
                for child in psutil.Process().children():
                    with suppress(psutil.NoSuchProcess):
                        child.send_signal(number)

    before = signal.pthread_sigmask(signal.SIG_BLOCK, [number])
    thread = threading.Thread(target=pass_on, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def unsaid_failures(exit_codes: Mapping[int, int], oom_kills: int | None = None) -> list[str]:
    """Return a line for each way in which ranks exited without an error message. Pure.

    A process that raised has reported why and exited with 1; those terminated because of it, by SIGTERM, are omitted.
    `oom_kills`: how many processes the kernel has killed meanwhile, for want of memory; None where that
    is not known.
    """
    ranks: dict[str, list[int]] = {}
    for rank, code in sorted(exit_codes.items()):
        if code < 0 and -code != signal.SIGTERM:
            name = signal.Signals(-code).name if -code in [*signal.Signals] else f"signal {-code}"
            hint = _OUT_OF_MEMORY if name == "SIGKILL" and oom_kills else _SIGNAL_HINTS.get(name, "")
            ranks.setdefault(f"{{were}} ended by {name}{hint}", []).append(rank)
        elif code > 1:
            ranks.setdefault(f"exited with code {code} without an error message", []).append(rank)
    return [
        f"rank {which[0]} {how.replace('{were}', 'was')}"
        if len(which) == 1
        else f"ranks {', '.join(map(str, which))} {how.replace('{were}', 'were')}"
        for how, which in ranks.items()
    ]


def _plan(request: RunRequest | EvaluationRequest | PredictionRequest) -> LaunchPlan:
    script, config = shared_file("launch", request.script), configuration_file(request.strategy)
    return LaunchPlan(
        script, request.worker_arguments, request.processes, config, request.offload, imports=request.imports
    )


@launchers.register("local")
class LocalLauncher:
    """Processes of this machine, which end with the command that started them."""

    name = "local"

    def __init__(self, *, forks: bool = True):
        """`forks`: whether they may be forked from this one, in which no code of a user has run."""
        self.forks = forks

    def submit(self, start: RunRequest) -> Submitted:
        """Start a request's processes and wait for them; a single one is this process."""
        run = start.run
        if start.is_finished:
            return Submitted(status=show_finished(run), run=run.path)
        if start.processes == 1:
            return Submitted(status=train_here(start), run=run.path)
        prepare(start)
        plan = _plan(start)
        status = launch(plan if self.forks else replace(plan, imports=()), run)
        # a launcher that was signalled calls that a failure, and the run folder knows better
        return Submitted(status=0 if run.preempted is not None else status, run=run.path)

    def knows(self, folder: Path) -> bool:
        """Whether a job was submitted: there are none here, only processes."""
        return False

    def status(self, folders: Sequence[Path]) -> dict[Path, list[Job]] | None:
        """Return None: this machine has no queue, and a run's folder holds the state of its processes."""
        return None

    def cancel(self, folder: Path) -> list[Job]:
        """Raise UserError with how to end processes of this machine."""
        raise UserError(
            f"{folder} was not submitted by `distrain submit`, so its job is not known; `scancel JOB` cancels one, and "
            f"`distrain stop {folder}` has a run save and end"
        )


def start(
    target: str, overrides: Sequence[str] = (), *, run_dir: str | None = None, update: bool = False, **options: Any
) -> Submitted:
    """Train a recipe or resume a run on this machine, as `distrain train` does; returns how that ended.

    `options` are those of `Options`. Raises UserError with all that is wrong, before anything is written.
    """
    show_on_terminal(converses=True)
    if os.environ.pop(SWEPT_BY, None) == str(os.getppid()):
        end_with_parent(signal.SIGTERM)
    asked = Options(**options)
    say_ignored(own_start(os.environ, asked.processes))
    named = read_target(target, overrides, run_dir, update=update)
    if not named.problems and not is_quiet():
        echo_loading(on_terminal=False)
    count = asked.processes or (1 if asked.strategy == "single" else max(gpu_count(), 1))
    wanted = replace(asked, processes=count)
    if count > 1 and can_fork():
        share_cores(count)
        import_once(TRAINING_IMPORTS)
        with importing():
            for kind in (datasets, losses, metrics, models, optimizers, tasks):
                kind.load()
        request, compiler = in_copy(lambda: (resolve(named, wanted, launcher_environment(count)), compiler_imported()))
        if compiler:  # what the recipe names imports it, in each process
            import_once((COMPILER,))
        return LocalLauncher().submit(request)
    if count == 1:
        begin_worker()
    with importing():
        environment = launcher_environment(count) if count > 1 else worker_environment()
        request = resolve(named, wanted, environment)
    return LocalLauncher().submit(request)


def start_evaluation(target: str, split: str, *, processes: int, **options: Any) -> int:
    """Evaluate a run's or a checkpoint's model on this machine; returns the exit status. What `distrain evaluate` does.

    `options` are further fields of `EvaluationRequest`. Raises UserError where it cannot be, before any process is
    started.
    """
    say_ignored(own_start(os.environ, processes if processes > 1 else None, "evaluate"))
    environment = launcher_environment(processes) if processes > 1 else worker_environment()
    request = resolve_evaluation(target, split, processes, environment, **options)
    return evaluate_here(request) if processes == 1 else launch(_plan(request))


def start_prediction(target: str, **options: Any) -> int:
    """Predict with a run's or a checkpoint's model on this machine; returns the exit status.

    What `distrain predict` does; `options` are the fields of `PredictionRequest`. Raises UserError where it cannot be.
    """
    processes = options["processes"]
    say_ignored(own_start(os.environ, processes if processes > 1 else None, "predict"))
    environment = launcher_environment(processes) if processes > 1 else worker_environment()
    request = resolve_prediction(target, environment, **options)
    if processes > 1:
        return launch(_plan(request))
    print_prediction(request)
    return 0
