"""The search for `batch.micro: auto`: the largest micro-batch that fits, before the run starts.

Each try runs in its own processes, as many as the run has on this machine: they build the run's model, optimizer and
strategy, take two steps, and exit, so that a failed try leaves nothing behind. A size fits if a tenth of the memory
stays free: of a GPU, of the cgroup, or of the limit of a process.

On CPUs it searches only under a memory limit (of a cgroup, as schedulers and containers set, or of ulimit). The memory
of the machine is not a limit, because other programs use it too.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distrain.config import BatchSection, LogSection, Recipe, UserError
from distrain.config.yaml import dump_recipe
from distrain.run.micro_batch import CachedMicroBatch, CacheKey, cached_micro_batch
from distrain.system import memory
from distrain.system.gpus import gpu_models
from distrain.system.memory import gib
from distrain.system.processes import end_with_parent

if TYPE_CHECKING:
    from distrain.parallel import StrategySpec
    from distrain.run.folder import RunDir

logger = logging.getLogger(__name__)

MARGIN = 0.1
"""The share of the memory that stays free."""
_STEPS = 2  # the optimizer's state exists after the first, so the second takes the most memory
_TIMEOUT_S = 1800.0  # for one try: a model may be compiled in it


class SearchFailed(Exception):
    """A try failed for another reason than memory; the run itself reports it better."""


@dataclass(frozen=True)
class _TryResult:
    """The result of one try."""

    reason: str = ""
    """Why it does not fit; empty if it does."""
    peak: int = 0
    """Peak memory of a process, in bytes."""
    limit: int = 0
    """Memory limit of a process, in bytes."""


def needs_search(recipe: Recipe, *, gpus: int) -> bool:
    """Return whether the recipe asks for a search and a memory limit exists."""
    return recipe.batch.micro_batch_size == "auto" and (gpus > 0 or _cpu_limit() is not None)


def search_if_needed(
    run: RunDir, recipe: Recipe, spec: StrategySpec, *, processes: int, here: int, gpus: int
) -> CachedMicroBatch | None:
    """Return the largest micro-batch that fits, of those with which whole accumulation steps make the global batch.

    `processes` are those of the run, `here` of them on this machine. If these are fewer, each holds more of what is
    sharded than in the run, and what fits here fits there. Returns None if there is nothing to search, if a valid entry
    is cached, or, after logging why, if something else fails. Raises UserError if not even one sample fits.
    """
    from distrain.datasets.batch_sizes import micro_batch_sizes

    if not needs_search(recipe, gpus=gpus):
        return None
    key = CacheKey.of(recipe, processes, spec.strategy, spec.offload, spec.replicate)
    cached = cached_micro_batch(run, key)
    if cached is not None and is_valid(cached, gpus=gpus, here=here):
        return None
    sizes = micro_batch_sizes(recipe.batch.global_batch_size, processes)
    if not sizes:
        return None  # the start of the run refuses it
    tries: dict[int, _TryResult] = {}

    def fits(size: int) -> bool:
        began = time.monotonic()
        done = tries[size] = _try(recipe, spec, size, processes, here, gpus)
        peak = f", {gib(done.peak)} of {gib(done.limit)} for each process" if done.peak else ""
        result = "does not fit" if done.reason else "fits"
        logger.info(f"batch.micro auto: {size} {result}{peak} ({time.monotonic() - began:.1f} s)")
        return not done.reason

    guess = _guess(recipe, spec, sizes, processes, here) if gpus else None
    begins = f", from {guess} on, as planned" if guess is not None else ""
    logger.info(f"batch.micro auto: trying sizes up to {sizes[-1]}{begins}, in processes of their own")
    try:
        size = largest(sizes, fits, guess)
    except SearchFailed as error:
        logger.info(f"batch.micro auto: not found by trying, and taken as global / processes: {error}")
        return None
    if size is None:
        raise UserError(f"not even a micro-batch of {sizes[0]} fits.\n{tries[sizes[0]].reason}")
    found = tries[size]
    tried = tuple((each, not done.reason) for each, done in tries.items())
    return CachedMicroBatch(key, size, hardware(gpus), found.limit, found.peak, tried)


def largest(sizes: Sequence[int], fits: Callable[[int], bool], guess: int | None = None) -> int | None:
    """Return the largest of the ascending `sizes` that fits, None if none does; larger sizes take no less memory.

    Tries the `guess` first, one of the sizes, and the size next to it; without one the largest, as it mostly fits. Then
    by bisection.
    """
    low, high = -1, len(sizes)  # where the largest is that fits, and the smallest that does not
    place = sizes.index(guess) if guess in sizes else len(sizes) - 1
    near = guess in sizes
    while high - low > 1:
        if fits(sizes[place]):
            low = place
            place += 1
        else:
            high = place
            place -= 1
        if not near or not low < place < high:
            place = (low + high) // 2
        near = False
    return sizes[low] if low >= 0 else None


def _guess(recipe: Recipe, spec: StrategySpec, sizes: Sequence[int], processes: int, here: int) -> int | None:
    """Return the largest of the sizes that fits this machine's GPUs by a plan; None where there is none."""
    from distrain.plan.asking import ask, largest_of
    from distrain.plan.gpus import known_gpu

    models = gpu_models()
    gpu = known_gpu(models[0]) if len(models) == 1 else None
    if gpu is None or spec.offload != "none":
        return None
    plan = ask(recipe, gpu.name, nodes=processes // here, per_node=here)
    if plan is None:
        return None
    strategy = "hsdp" if spec.replicate != 1 else spec.strategy
    checkpointing = bool(recipe.train.activation_checkpointing)
    found = largest_of(plan, strategy, checkpointing=checkpointing)
    return found if found in sizes else None


def is_valid(autobatch: CachedMicroBatch, *, gpus: int, here: int) -> bool:
    """Return whether an entry was found on the same hardware, with no more memory than is free now."""
    if autobatch.hardware != hardware(gpus):
        return False
    # a measured limit varies by some bytes
    return gpus > 0 or (limit := _cpu_limit()) is None or _share(limit, here) >= 0.9 * autobatch.limit


def hardware(gpus: int) -> str:
    """Return the models of this machine's GPUs, or cpu."""
    if not gpus:
        return "cpu"
    return ", ".join(gpu_models()) or "gpu"


def _cpu_limit() -> memory.Limit | None:
    """Return the memory limit set on this machine that leaves the least free, or None."""
    found = [limit for limit in memory.limits() if limit.set_by_someone]
    return min(found, key=lambda limit: limit.nbytes - limit.used, default=None)


def _share(limit: memory.Limit, here: int) -> int:
    """Return the bytes that each of `here` processes may use of what a limit leaves free."""
    return (limit.nbytes - limit.used) // here if limit.shared else limit.nbytes


# --------------------------------------------------------------------------------------------------------------------
# One try


def _try(recipe: Recipe, spec: StrategySpec, size: int, processes: int, here: int, gpus: int) -> _TryResult:
    """Try a size in `here` processes; raises SearchFailed if one fails for another reason than memory."""
    quiet = recipe.model_copy(
        update={
            "batch": BatchSection(global_batch_size=recipe.batch.global_batch_size, micro_batch_size=size),
            "log": LogSection(),
            "anomalies": type(recipe.anomalies)(),
        }
    )
    limit = None if gpus else _cpu_limit()
    folder = Path(tempfile.mkdtemp(prefix="distrain-try-"))
    try:
        (folder / "recipe.yaml").write_text(dump_recipe(quiet), encoding="utf-8")
        how = {
            "strategy": spec.strategy,
            "offload": spec.offload,
            # so that as many processes share a replica as in the run, or all that are here
            "replicate": max(1, here // (processes // spec.replicate)) if spec.replicate != "auto" else 1,
            # the private memory of each process, of what counts against the limit
            "data_limit": int(_share(limit, here) * (1 - MARGIN)) if limit is not None and limit.shared else None,
        }
        (folder / "how.json").write_text(json.dumps(how), encoding="utf-8")
        return _outcome(folder, _run(folder, here), limit, here)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run(folder: Path, here: int) -> list[int]:
    """Run the processes of one try; returns their exit codes. When one fails, kills the others."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    common = {key: value for key, value in os.environ.items() if not key.startswith(("DISTRAIN_TRACE", "ACCELERATE_"))}
    common.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // here)))
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(here)}
    common |= {"LOCAL_WORLD_SIZE": str(here)}
    processes = []
    try:
        for rank in range(here):
            with (folder / f"output-{rank}.txt").open("wb") as output:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "-c", _COMMAND, str(folder)],
                        env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                )
        until = time.monotonic() + _TIMEOUT_S
        while time.monotonic() < until:
            codes = [process.poll() for process in processes]
            if all(code is not None for code in codes) or any(codes):
                break
            time.sleep(0.02)
        # a process that is out of memory reports it before the others notice its exit
        time.sleep(0.1)
        return [process.poll() or 0 if process.poll() is not None else -signal.SIGTERM for process in processes]
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


# with -c Python imports modules from the current folder, as in the run itself
_COMMAND = "import sys; from distrain.autobatch.search import main; main(sys.argv[1])"


def _outcome(folder: Path, codes: list[int], limit: memory.Limit | None, here: int) -> _TryResult:
    results = [_read_result(folder, rank) for rank in range(here)]
    for each in results:
        if each is not None and each["does_not_fit"]:
            return _TryResult(each["error"])
    if -signal.SIGKILL in codes:
        rank = codes.index(-signal.SIGKILL)
        return _TryResult(f"The kernel killed the process of rank {rank}, as it does when memory runs out.")
    for rank, (each, code) in enumerate(zip(results, codes, strict=True)):
        if each is None and code == -signal.SIGTERM:
            continue  # killed by `_run`, because another failed, or after the timeout
        if each is None or each["error"]:
            text = each["error"] if each is not None else (folder / f"output-{rank}.txt").read_text(errors="replace")
            line = next((line for line in reversed(text.splitlines()) if line.strip()), f"exit code {code}")
            raise SearchFailed(f"rank {rank}: {line.strip()[:300]}")
    done = [each for each in results if each is not None]
    if len(done) < here:
        raise SearchFailed(f"a try took longer than {_TIMEOUT_S / 60:.0f} min")
    peak = max(each["peak"] for each in done)
    if limit is not None:
        return _TryResult("", peak, _share(limit, here))
    total = min(each["total"] for each in done)
    fits = peak <= (1 - MARGIN) * total
    reason = "" if fits else f"It takes {gib(peak)} of the {gib(total)} of a GPU; a tenth must stay free."
    return _TryResult(reason, peak, total)


def _read_result(folder: Path, rank: int) -> dict[str, Any] | None:
    try:
        return json.loads((folder / f"result-{rank}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


# --------------------------------------------------------------------------------------------------------------------
# In a process of a try


def main(place: str) -> None:
    """Take the first steps of the recipe in a folder, and write their peak memory there."""
    folder, rank = Path(place), int(os.environ["RANK"])
    _limit_memory(folder)
    result: dict[str, Any] = {"does_not_fit": False, "error": "", "peak": 0, "total": 0}
    try:
        result |= take_steps(folder)
    except Exception as error:
        from distrain.diagnose.memory_advice import is_out_of_memory
        from distrain.training.forward import TooFewValues

        # a micro-batch that is too small for a layer cannot be used, like one that is too large
        if isinstance(error, TooFewValues):
            result |= {"does_not_fit": True, "error": str(error)}
        else:
            result |= {"does_not_fit": is_out_of_memory(error), "error": f"{type(error).__name__}: {error}"}
    temporary = folder / f".result-{rank}"
    temporary.write_text(json.dumps(result), encoding="utf-8")
    temporary.replace(folder / f"result-{rank}.json")
    sys.stdout.flush()
    os._exit(1 if result["error"] else 0)  # at once: there is nothing to clean up


def _limit_memory(folder: Path) -> None:
    """Make this process, and no other, fail when it exceeds its share of the memory."""
    end_with_parent(signal.SIGKILL)
    with contextlib.suppress(OSError):  # otherwise the kernel chooses by size
        Path("/proc/self/oom_score_adj").write_text("1000")
    limit, hard = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_AS, (int(limit * (1 - MARGIN)), hard))
    data_limit = json.loads((folder / "how.json").read_text(encoding="utf-8"))["data_limit"]
    if data_limit is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (data_limit, hard))


def take_steps(folder: Path) -> dict[str, int]:
    """Take the first steps in which all is trained that the recipe trains; returns the memory that they take."""
    import torch

    from distrain.config.yaml import load_recipe
    from distrain.loop import train_step
    from distrain.optim import thaws
    from distrain.parallel import StrategySpec, open_world
    from distrain.run.folder import Launch, RunDir
    from distrain.training.run_loop import Session

    how = json.loads((folder / "how.json").read_text(encoding="utf-8"))
    loaded = load_recipe(folder / "recipe.yaml")
    spec = StrategySpec.of(how["strategy"], how["offload"], how["replicate"])
    world = open_world(loaded.recipe.train.precision, spec, deterministic=loaded.recipe.train.deterministic)
    recipe = loaded.recipe.model_copy(update={"callbacks": []})  # they are for the run itself
    run = RunDir(folder / "run")
    launch = Launch.describe(world.world_size, spec.strategy, spec.offload, spec.replicate)
    world.run_on_rank0(lambda: run.create(dump_recipe(recipe), launch))
    with Session.open(run, recipe, world, built_in=()) as session:
        # what acts only at some steps, or is frozen until one, takes its memory then
        session.t.turns = [replace(turn, every=1) for turn in session.t.turns]
        session.t.step = max(thaws(session.t.strategy.optimizer.param_groups), default=0)
        steps = session.batches()
        spare: Any = None
        for _ in range(_STEPS):
            if (micro_batches := next(steps, None)) is None:
                break
            # more of them take no more memory, unless a loss takes all samples together
            train_step(session.t, micro_batches if session.t.objective.couples else micro_batches[:2]).read()
            if spare is None and world.device.type == "cpu" and loaded.recipe.checkpoint.asynchronous:
                spare = torch.ones(_saved_bytes(session), dtype=torch.uint8)  # what a save copies
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
            free, total = torch.cuda.mem_get_info(world.device)
            others = max(total - free - torch.cuda.memory_reserved(world.device), 0)
            return {"peak": torch.cuda.max_memory_reserved(world.device) + others, "total": total}
        limits = [limit for limit in memory.limits() if not limit.shared and limit.set_by_someone]
        return {"peak": max([memory.peak_bytes(), *(limit.peak for limit in limits)]), "total": 0}


def _saved_bytes(session: Any) -> int:
    """Return the bytes of the state that this rank writes into a checkpoint."""
    held, mesh = session.t.strategy.state.held().values(), session.world.mesh
    return sum(each.nbytes // (mesh.world_size if each.replicated else mesh.replicas) for each in held)
