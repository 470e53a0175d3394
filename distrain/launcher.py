"""From a recipe to running processes: `launch_argv` says how, `launch` does it, `work` is what each process runs."""

from __future__ import annotations

import functools
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import distrain
from distrain.checkpoint import find_checkpoint, list_checkpoints, read_manifest
from distrain.config import Recipe, UserError
from distrain.heartbeat import ending_hung, hang_of
from distrain.lease import Holder, Lease, check_free, take
from distrain.memory import oom_kills
from distrain.probed import Probed, remember
from distrain.probing import settled
from distrain.recipe_file import LoadedRecipe, dump_recipe, load_recipe, parse_recipe, show
from distrain.rundir import Launch, RunDir, effect_in_words

if TYPE_CHECKING:
    from distrain.strategy import Asked, Configuration

log = logging.getLogger("distrain")
log.addHandler(logging.NullHandler())  # until a run has a folder to log to


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


def gpu_count(variables: Mapping[str, str] = os.environ) -> int:
    """Return the number of NVIDIA GPUs that a process started here may use, without importing torch."""
    visible = variables.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([part for part in visible.split(",") if part.strip() not in ("", "-1")])
    try:
        return len(os.listdir("/proc/driver/nvidia/gpus"))
    except OSError:
        return 0


def configuration_file(strategy: str, nodes: int = 1) -> Path:
    """Return the accelerate configuration that starts a strategy's processes on this machine, one of `nodes`."""
    if strategy == "ddp" and not gpu_count():
        return shared_file("accelerate_configs", "multi_cpu.yaml")
    return shared_file("accelerate_configs", f"{strategy}_multinode.yaml" if nodes > 1 else f"{strategy}.yaml")


@dataclass(frozen=True)
class LaunchPlan:
    """How one machine's processes are started."""

    script: Path
    """What each process runs: launch/train.py or launch/evaluate.py."""
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

    def __post_init__(self) -> None:
        assert 0 <= self.node_rank < self.nodes
        assert self.nodes == 1 or (self.address and self.port), "machines meet at an address that all know"


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
        return ["--main_process_port", "0"]
    # static, said rather than left to defaults: otherwise rank 0 need not be on the first machine, and announces a
    # host name which others may not be able to resolve
    return [
        *("--num_machines", str(plan.nodes), "--machine_rank", str(plan.node_rank), "--rdzv_backend", "static"),
        *("--main_process_ip", plan.address, "--main_process_port", str(plan.port)),
    ]


def launch(plan: LaunchPlan, run: RunDir | None = None) -> int:
    """Start the plan's processes, wait for them, and return 0 when all of them ended well, otherwise 1.

    Those that are stuck when `run` is recorded to hang are killed.

    This process is `accelerate launch` itself, so that its report of a failed worker (a page of Python traces around an
    exit code) can be left out: the worker has already said why.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # who stops a run waits for its last step and checkpoint; torch would kill it after 30 s
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(24 * 3600))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // plan.processes)))
    if not gpu_count():
        # accelerate imports DeepSpeed, which otherwise warns that it found no GPU
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    arguments = launch_command_parser().parse_args(launch_argv(plan))
    killed_before = oom_kills()
    try:
        with _passed_on(signal.SIGUSR1), ending_hung(run) if run is not None else nullcontext():
            launch_command(arguments)
    except ChildFailedError as error:
        if run is not None and hang_of(run) is not None:
            return 1  # which is said
        killed = None if killed_before is None else (oom_kills() or 0) - killed_before
        for line in unsaid_failures({rank: failure.exitcode for rank, failure in error.failures.items()}, killed):
            print(f"error: {line}", file=sys.stderr)
        return 1
    except SignalException:
        return 1
    return 0


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
    """Return a line for each way in which ranks ended without a word of their own. Pure.

    A process that raised has said why and ended with 1; those which were ended here because of it, by SIGTERM, have
    nothing to say. `oom_kills`: how many processes the kernel has killed meanwhile, for want of memory; None where that
    is not known.
    """
    ranks: dict[str, list[int]] = {}
    for rank, code in sorted(exit_codes.items()):
        if code < 0 and -code != signal.SIGTERM:
            name = signal.Signals(-code).name if -code in [*signal.Signals] else f"signal {-code}"
            hint = _OUT_OF_MEMORY if name == "SIGKILL" and oom_kills else _SIGNAL_HINTS.get(name, "")
            ranks.setdefault(f"ended by {name}{hint}", []).append(rank)
        elif code > 1:
            ranks.setdefault(f"gone with exit code {code}, without a word of why", []).append(rank)
    return [
        (f"rank {which[0]} was " if len(which) == 1 else f"ranks {', '.join(map(str, which))} were ") + how
        for how, which in ranks.items()
    ]


TYPED = "DISTRAIN_COMMAND"
"""The environment variable that tells processes started here what was typed."""


def end_with_launcher() -> None:
    """Have this process killed when its launcher is: alone it would go on, beside those of the next start."""
    # torch's launchers, also inside `accelerate launch`, start each worker in a session of its own and set this
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, int(signal.SIGKILL))


_OUT_OF_MEMORY = (
    ": the memory ran out, and the kernel ended it for that. What takes less: a smaller batch.micro (the step stays "
    "the same), train.activation_checkpointing: true, --strategy fsdp2, which spreads the state over the processes"
)
_SIGNAL_HINTS = {"SIGKILL": "; out of memory is the usual reason (see dmesg), or somebody did it"}


# --------------------------------------------------------------------------------------------------------------------
# Runs


def find_run(target: str, overrides: Sequence[str], run_dir: str | None) -> tuple[RunDir, LoadedRecipe | None]:
    """Return the run folder that a command means, and the recipe when a recipe was named. Writes nothing.

    `target` is a recipe file or the folder of an existing run.
    """
    if Path(target).is_dir():
        run = RunDir(target)
        if not run.exists:
            raise UserError(
                f"{target} is a folder without recipe.yaml, so it is not a run; name a recipe or a run folder"
            )
        if run_dir is not None or overrides:
            raise UserError(
                f"{target} is a run, whose recipe is fixed: --run-dir and KEY=VALUE go with a recipe file. "
                f"To go on with other values: distrain train {run.recipe_path} KEY=VALUE --run-dir {target} --update"
            )
        return run, None
    loaded = load_recipe(target, overrides)
    return RunDir(run_dir or Path("runs") / loaded.recipe.name), loaded


def open_run(run: RunDir, loaded: LoadedRecipe | None, launch: Launch, *, update: bool = False) -> None:
    """Create the run, or take up the existing one. Raises UserError when that one has another recipe."""
    if loaded is None:
        run.write_launch(launch)
        return
    if not run.exists and run.holds_other_files():
        raise UserError(f"{run.path} holds files and is not a run; choose another --run-dir")
    # without a row of metrics nothing was trained yet: an attempt that failed before may be mended
    if not run.exists or update or not run.metrics_path.exists():
        run.create(recipe_text(loaded), launch)
    else:
        check_same_recipe(run, loaded)
        run.write_launch(launch)


def check_same_recipe(run: RunDir, loaded: LoadedRecipe) -> None:
    """Raise UserError with every value that differs, unless the run was started with this recipe."""
    if differences := recipe_differences(load_recipe(run.recipe_path), loaded):
        raise UserError(
            f"{run.path} was started with another recipe:\n  "
            + "\n  ".join(differences)
            + "\nChoose another --run-dir for a new run, or --update to go on with the new values."
        )


def recipe_text(loaded: LoadedRecipe) -> str:
    """Return the resolved recipe as it is stored in a run, with where each value came from."""
    return "# The resolved recipe: training it again is the same run.\n" + dump_recipe(loaded.recipe, loaded.origins)


def recipe_differences(old: LoadedRecipe, new: LoadedRecipe) -> list[str]:
    """Return a line for each key whose value differs."""
    before = {key: value for key, value, _ in show(old)}
    after = {key: value for key, value, _ in show(new)}
    return [
        f"{key}: was {before.get(key, 'absent')}, now {after.get(key, 'absent')}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def start(
    target: str,
    overrides: Sequence[str] = (),
    *,
    run_dir: str | None = None,
    processes: int | None = None,
    update: bool = False,
    strategy: str = "auto",
    offload: str | None = None,
) -> int:
    """Train a recipe or go on with a run on this machine; returns the exit status. What `distrain train` does."""
    run, loaded = find_run(target, overrides, run_dir)
    count = processes or (1 if strategy == "single" else max(gpu_count(), 1))
    if count == 1:
        return work(target, overrides, run_dir=run_dir, processes=1, update=update, strategy=strategy, offload=offload)
    from distrain.loop import check_recipe
    from distrain.strategy import check_precision, read_configuration

    configuration = read_configuration([], os.environ)
    asked = asked_for(run, count, strategy, offload, configuration)
    stored = loaded or load_recipe(run.recipe_path)
    check_one_owner(configuration, stored.recipe, count, stored.origins)
    check_precision(stored.recipe.train.precision, asked.strategy)

    if loaded is not None:
        check_recipe(loaded.recipe, target)
    if run.exists and not run.finished:
        holder = Holder.of_this_process()
        check_free(run, holder)  # before its recipe may be replaced
        # a failure of this start must not be taken for an earlier preemption
        run.clear_markers(requeued=holder.restart > 0)
    # the recipe is read once: workers go by the run folder
    open_run(run, loaded, Launch.describe(count, asked.strategy, asked.offload), update=update)
    if (update or not run.finished) and (found := probed(run, stored.recipe, asked, count, count)) is not None:
        remember(run, found)
    arguments = [str(run.path), "--strategy", asked.strategy, "--offload", asked.offload]
    arguments += ["--update"] if update else []
    os.environ[TYPED] = json.dumps(sys.argv)
    script, config = shared_file("launch", "train.py"), configuration_file(asked.strategy)
    status = launch(LaunchPlan(script, tuple(arguments), count, config, asked.offload), run)
    # a launcher that was signalled calls that a failure, and the run folder knows better
    return 0 if run.preempted is not None else status


def work(
    target: str,
    overrides: Sequence[str] = (),
    *,
    run_dir: str | None = None,
    processes: int | None = None,
    update: bool = False,
    strategy: str = "auto",
    offload: str | None = None,
) -> int:
    """Train in this process, one of those that a launcher started; returns the exit status. All ranks call.

    Nothing is written before the world and the strategy have been found to be those that were asked for: by
    `processes`, `strategy` and `offload`, by the run's launch.json, or by the launcher's command line and files.
    """
    end_with_launcher()
    # noted from here on, and read by the loop when it runs: a scheduler's notice may come during the imports
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    rank = int(os.environ.get("RANK", "0"))

    def prepare() -> tuple[RunDir, LoadedRecipe | None, Asked, list[str]]:
        from distrain.strategy import unused

        run, loaded = find_run(target, overrides, run_dir)
        world_size, configuration = join_launcher(processes or (run.launch().processes if loaded is None else None))
        asked = asked_for(run, world_size, strategy, offload, configuration, resumes=loaded is None)
        from distrain.loop import check_recipe

        stored = loaded or load_recipe(run.recipe_path)
        check_recipe(stored.recipe, target)
        check_one_owner(configuration, stored.recipe, world_size, stored.origins)
        notes = [f"{place} has no part in this run" for place in unused(configuration)]
        if strategy == "ddp" and asked.strategy == "single":
            notes.append("--strategy ddp in one process is single")
        return run, loaded, asked, notes

    try:
        run, loaded, asked, notes = prepare()
    except UserError as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            leave_to_rank_0(rank, error)
        return 1

    status = 0

    def train_here() -> None:
        nonlocal status
        from distrain.loop import train
        from distrain.strategy import open_world
        from distrain.watchdog import Watchdog

        recipe = loaded.recipe if loaded is not None else load_recipe(run.recipe_path).recipe
        found: Probed | None = None
        if "RANK" not in os.environ and (update or not run.finished):
            # before this process has anything of a GPU; of several, the launcher does it
            if run.exists:
                check_free(run, Holder.of_this_process())
            found = probed(run, recipe, asked, 1, 1)
        world = open_world(recipe.train.precision, asked, timeout_s=recipe.watchdog.collectives_s)

        lease: Lease | None = None

        def begin() -> dict[str, Any] | Lease:
            if run.finished and loaded is not None and not update:
                check_same_recipe(run, loaded)
            if not update and (done := run.finished):
                return done
            holder = Holder.of_this_process()
            if run.exists:
                check_free(run, holder)  # before its recipe may be replaced
            typed = json.loads(os.environ.get(TYPED, "null"))
            this_start = Launch.describe(world.world_size, asked.strategy, asked.offload, argv=typed)
            open_run(run, loaded, this_start, update=update)
            if found is not None:
                remember(run, found)
            step = max((info.step for info in list_checkpoints(run.checkpoints)), default=0)
            taken = take(run, holder, step=step, processes=world.world_size, strategy=asked.strategy)
            run.clear_markers(requeued=holder.restart > 0)
            return taken

        try:
            begun = world.first(begin)
            if not isinstance(begun, Lease):
                if world.rank == 0:
                    from rich.console import Console

                    from distrain.telemetry import show_summary

                    show_summary(begun, Console(highlight=False))
                    if effect := run.effect():
                        print(f"took effect: {effect_in_words(effect)}")
                    print(f"{run.path} is finished; choose another --run-dir to train anew, or --update to go on")
                return
            # each in the folder that it sees
            lease = mine = begun if world.rank == 0 else Lease(run, begun.holder)
            world.together(lambda: mine.check_seen(world.rank))
            _log_to(run, world.rank)
            for note in notes if world.rank == 0 else []:
                print(note)
                log.info(note)
            # inside: the rank that fails must say so before leaving makes the others fail as well
            placed = {"rank": world.rank, "world_size": world.world_size, "may_write": lease.mine}
            with Watchdog.over(run, recipe.watchdog, **placed):
                status = reported(run, rank, lambda: train(run, world, lease), lease)
        finally:
            if lease is not None and world.rank == 0:
                lease.release(clean=status == 0)
            world.close()

    return reported(None, rank, train_here) or status


def probed(run: RunDir, recipe: Recipe, asked: Asked, processes: int, here: int) -> Probed | None:
    """Return what `batch.micro: auto` is newly found to be for a start that is about to be made; see `probing`."""
    say = functools.partial(print, flush=True)
    return settled(run, recipe, asked, processes=processes, here=here, gpus=gpu_count(), say=say)


def join_launcher(expected: int | None) -> tuple[int, Configuration]:
    """Return the size of the world and what its launcher was told, of which the environment is then rid.

    Raises UserError unless the world is the one that was asked for, by `expected` or by the launcher's own words.
    """
    from distrain.strategy import Environment, check_world, launcher_argv, read_configuration, take_over

    environment, argv = Environment.read(os.environ), launcher_argv()
    configuration = read_configuration(argv, os.environ)
    count = configuration.get("num_processes")
    configured = (int(count.value), count.place) if count is not None and str(count.value).isdigit() else None
    check_world(environment, expected, argv, configured)
    if (cpu := configuration.get("use_cpu")) is not None and str(cpu.value).lower() == "true":
        os.environ["CUDA_VISIBLE_DEVICES"] = (
            ""  # accelerate tells this to processes that it starts alone, not to several
        )
    import torch

    if 0 < (gpus := torch.cuda.device_count()) < environment.local_world_size:
        raise UserError(
            f"the launcher started {environment.local_world_size} processes on this machine, which has "
            f"{gpus} GPU{'s' * (gpus > 1)}; nothing was written. Start one for each: --processes of `distrain train`, "
            "--num_processes of `accelerate launch`, --nproc-per-node of `torchrun`"
        )
    take_over(os.environ)
    return environment.world_size, configuration


def asked_for(
    run: RunDir,
    world_size: int,
    strategy: str,
    offload: str | None,
    configuration: Configuration,
    *,
    resumes: bool = False,
) -> Asked:
    """Return the strategy that the options, the launcher's configuration and the run's launch.json agree on.

    `resumes`: the run itself was named, so that its launch.json says what this start is to be. Otherwise it is only
    what the run was started with before, and holds where nothing else is said. Raises UserError where two differ.
    """
    from distrain.strategy import Wish, settle, strategy_wishes

    option = None if strategy == "auto" else strategy
    wishes = [Wish("--strategy", option), Wish("--offload", None, offload)]
    earlier = None
    if option is None and run.launch_path.exists():
        record = run.launch()
        earlier = Wish(
            str(run.launch_path),
            "ddp" if record.strategy == "single" else record.strategy,
            record.offload if offload is None else None,
        )
    wishes += [earlier] if resumes and earlier is not None else []
    return settle(world_size, [*wishes, *strategy_wishes(configuration)], earlier)


def check_one_owner(
    configuration: Configuration, recipe: Recipe, world_size: int, origins: Mapping[str, str] | None = None
) -> None:
    """Raise UserError with each of the launcher's settings that differs from the recipe, which owns them.

    `origins`: where each of the recipe's values came from, by its dotted key.
    """
    from distrain.strategy import disagreements

    auto = "fp32"
    if "mixed_precision" in configuration and recipe.train.precision == "auto":
        import torch

        auto = "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported(False) else auto
    if lines := disagreements(configuration, recipe, world_size, auto=auto, origins=origins):
        raise UserError(
            "the launcher's configuration and the recipe disagree; nothing was written.\n  - "
            + "\n  - ".join(lines)
            + "\nThe recipe owns batch, accumulation, clipping and arithmetic: take these out of the launcher's "
            "configuration, or change the recipe."
        )


def _log_to(run: RunDir, rank: int) -> None:
    handler = logging.FileHandler(run.log_path(rank), encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.setLevel(logging.INFO)
    log.propagate = False
    for old in list(log.handlers):
        log.removeHandler(old)
        old.close()
    log.addHandler(handler)
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").addHandler(handler)


def reported(run: RunDir | None, rank: int, action: Callable[[], Any], lease: Lease | None = None) -> int:
    """Run `action`; returns 0, or 1 after saying why it failed: on the terminal, in the rank's log, in FAILED.json.

    When several ranks fail only the first to record it speaks, so that one cause is one message; a rank that was told
    of another's failure leaves the telling to that one. Without a run, rank 0 speaks, and whoever has a traceback.
    A start whose `lease` another one has leaves no FAILED.json in what is now that one's run.
    """
    try:
        action()
        return 0
    except (Exception, KeyboardInterrupt) as error:
        teaches = isinstance(error, UserError)
        text = str(error) if teaches else "".join(traceback.format_exception(error))
        if not teaches and (faults := gpu_faults_behind(error)):
            text += "the driver reports: " + "; ".join(faults) + "\n"
        log.error("%s", text)
        record = {
            "rank": rank,
            "host": socket.gethostname(),
            "error": type(error).__name__,
            "message": str(error),
            "traceback": None if teaches else text,
            # what a person has to mend another start would find again
            "restart": not teaches,
        }
        told = getattr(error, "of_another_rank", False)
        first = rank == 0 or not (teaches or told)
        if run is not None and run.exists and (lease is None or lease.mine()):
            try:
                first = not told and run.mark_failed(record)
            except OSError as disk:
                print(f"warning: FAILED.json could not be written: {disk}", file=sys.stderr)
        if first:
            who = "" if int(os.environ.get("WORLD_SIZE", "1")) == 1 else f" (rank {rank})"
            print(f"error{who}: {text}" if teaches else f"error{who}:\n{text}", file=sys.stderr, flush=True)
        elif run is None and not told:
            leave_to_rank_0(rank, error)
        return 1


def gpu_faults_behind(error: BaseException) -> list[str]:
    """Return what the driver reports of this machine's GPUs, where an error can come of that."""
    words = ("CUDA", "NCCL", "CUBLAS", "CUDNN")
    if not isinstance(error, RuntimeError) or not any(word in str(error) for word in words):
        return []
    from distrain.watchdog import gpu_faults

    return gpu_faults()


def leave_to_rank_0(rank: int, error: BaseException) -> None:
    """Let rank 0 say what every rank has found, and say it where that one has not found it.

    torch's launchers end all processes as soon as one has left: rank 0 too, before it has come so far.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        time.sleep(30)
        print(f"error (rank {rank}): {error}", file=sys.stderr, flush=True)


# --------------------------------------------------------------------------------------------------------------------
# Evaluation


def start_evaluation(target: str, split: str, *, processes: int, as_json: bool) -> int:
    """Score a run's or a checkpoint's model in that many processes of this machine; returns the exit status."""
    if processes == 1:
        return work_evaluation(target, split, processes=1, as_json=as_json)
    arguments = [target, "--split", split, "--processes", str(processes), *(["--json"] if as_json else [])]
    script, config = shared_file("launch", "evaluate.py"), configuration_file("ddp")
    return launch(LaunchPlan(script, tuple(arguments), processes, config))


def work_evaluation(target: str, split: str, *, processes: int | None = None, as_json: bool = False) -> int:
    """Score in this process, one of those that a launcher started; returns the exit status. All ranks call."""
    end_with_launcher()
    rank = int(os.environ.get("RANK", "0"))

    def score() -> None:
        from distrain.strategy import strategy_wishes

        _, configuration = join_launcher(processes)
        for wish in strategy_wishes(configuration):
            if wish.strategy not in (None, "single", "ddp"):
                raise UserError(
                    f"{wish.place} asks for {wish.strategy}, and scoring has the whole model on each process, whatever "
                    "the run was trained with; start with accelerate_configs/ddp.yaml or multi_cpu.yaml"
                )
        if (precision := configuration.get("mixed_precision")) is not None:
            recipe = parse_recipe(read_manifest(find_checkpoint(target)).recipe, target)
            check_one_owner({"mixed_precision": precision}, recipe, 1)
        from distrain.inference import evaluate_checkpoint

        values = evaluate_checkpoint(target, split)
        if rank != 0:
            return
        if as_json:
            print(json.dumps(values, indent=2))
            return
        for name, value in values.items():
            print(f"{name:<20} {f'{value:.6g}' if isinstance(value, float) else value}")

    return reported(None, rank, score)
