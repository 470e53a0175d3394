"""`train`: one attempt at a run, in this process or in several that are started as the command starts them."""

from __future__ import annotations

import faulthandler
import importlib
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distrain.api.objects import Objects
from distrain.api.recipes import read_recipe
from distrain.api.run import Run
from distrain.api.surroundings import own_surroundings
from distrain.config import Recipe, UserError
from distrain.config.user_files import handing_over, is_importing
from distrain.launchers.preflight import StartEnvironment, gpu_count, launcher_environment, worker_environment
from distrain.launchers.request import Options, RunRequest, Target, check_same_recipe, find_run, resolve
from distrain.run.folder import RunDir
from distrain.system import logs
from distrain.system.environment import own_start, say_ignored

if TYPE_CHECKING:
    from torch import nn

    from distrain.training.callbacks.base import Callback
    from distrain.training.tasks import Task

logger = logging.getLogger(__name__)


def train(
    recipe: str | Path | Mapping[str, Any] | Recipe | Run | None = None,
    *,
    task: str | Mapping[str, Any] | type[Task] | None = None,
    model: str | Mapping[str, Any] | nn.Module | Callable[..., nn.Module] | None = None,
    data: Any = None,
    loss: str | Mapping[str, Any] | Callable[..., Any] | None = None,
    metrics: Sequence[str | Mapping[str, Any] | Callable[..., Any]] | None = None,
    callbacks: Sequence[str | Mapping[str, Any] | type[Callback] | Callback] | None = None,
    run_dir: str | Path | None = None,
    processes: int = 1,
    strategy: str = "auto",
    update: bool = False,
    **overrides: Any,
) -> Run:
    """Train, or resume where an earlier call, or `distrain train`, has left the run. Returns the `Run`.

    The same call resumes a run that was interrupted, and returns a finished one at once. In a notebook the interrupt
    button, and elsewhere Ctrl-C, has the run save its state; the `Run` then has the status "stopped".

    Arguments:
        recipe: the path of a recipe file, a dict of the same keys, a `Recipe`; or a run (its folder, or a `Run`) to
            resume. Without it everything comes from the other arguments.
        task: classification, binary, multilabel, regression, language_modeling or seq2seq; or a class of
            `distrain.Task`, which says itself what a batch means.
        model: a class or function that builds a torch.nn.Module (its initial weights then depend on `seed` alone, and
            arguments such as `num_classes` that the data determine are passed to it), a module, of which a copy is
            trained, a name (`distrain list models`), or {"name": any of these, ...} with arguments.
        data: a map-style or iterable Dataset, `(inputs, targets)` as tensors or arrays, a dict
            {"train": …, "eval": …, "test": …} or a tuple (train, test), (train, eval, test) of these, a function that
            makes one, or a name. A single one is cut by `data__split`, by default [0.8, 0.2].
        loss: a function `(outputs, targets)`, a loss of torch.nn, or a name. By default the task's usual one.
        metrics: names, functions `(outputs, targets)`, classes of torchmetrics.
        callbacks: classes of `distrain.Callback`, or objects of them.
        run_dir: the run's folder; by default runs/NAME. Without `name`, its last part is the run's name.
        processes: how many are started on this machine; 1 trains in this process.
        strategy: auto, ddp, zero1, zero2, zero3 or fsdp2, for several processes.
        update: whether a run that exists is resumed with another recipe, data or code.
        **overrides: keys of the recipe: `batch={"global": 64}`, `train={"epochs": 3}`, `optim__lr=0.1`. They change
            those keys alone, of a section given by name all.

    Objects that can be imported are in the run's recipe as `path/to/file.py:NAME`, and any process can use the run.
    Others (of a notebook, a lambda, an object) are `object.KEY:NAME`: give them to `distrain.load` in another process.
    For several processes these are pickled.

    Raises UserError (a ValueError) with everything that is wrong, before anything is written wherever that is
    possible. An option `--run-dir` in a message is the argument `run_dir` here. What your own code raises is raised.
    """
    if is_importing():
        raise UserError(
            "distrain.train was called while its file was imported, in a process that needs a class or function of it; "
            "put the call under `if __name__ == '__main__':`"
        )
    if threading.current_thread() is not threading.main_thread():
        raise UserError("distrain.train was called in a thread, where no interrupt arrives; call it in the main thread")
    with own_surroundings(computes=False):
        return _train(
            recipe,
            {"task": task, "model": model, "data": data, "loss": loss, "metrics": metrics, "callbacks": callbacks},
            overrides,
            run_dir,
            Options(strategy=strategy, processes=processes),
            update=update,
        )


def _train(
    recipe: Any,
    passed: Mapping[str, Any],
    overrides: dict[str, Any],
    run_dir: str | Path | None,
    options: Options,
    *,
    update: bool,
) -> Run:
    if run_dir is not None and not isinstance(run_dir, str | Path):
        raise UserError(f"run_dir: found {run_dir!r}; expected the path of a folder")
    if type(update) is not bool:
        raise UserError(f"update: found {update!r}; expected True or False")
    given = {key: value for key, value in passed.items() if value is not None}
    if isinstance(recipe, Run) or (isinstance(recipe, str | Path) and Path(recipe).is_dir()):
        objects, target = _of_run(recipe, given, overrides, run_dir, update)
    else:
        objects, target = _of_recipe({} if recipe is None else recipe, given, overrides, run_dir, update)
    assert target.run is not None
    _import_progress_bars()
    with objects.here(), _as_before():
        request = _resolved(target, options)
        _attempt(request, objects)
    return Run(target.run.path, objects.given)


def _of_run(
    run: str | Path | Run, given: Mapping[str, Any], overrides: Mapping[str, Any], run_dir: Any, update: bool
) -> tuple[Objects, Target]:
    """Return a run's objects and what names it."""
    objects = Objects(run.given if isinstance(run, Run) else None)
    folder = str(run.path if isinstance(run, Run) else run)
    if overrides or run_dir is not None:
        first = next(iter(overrides), "run_dir")
        raise UserError(
            f"{first}: {folder} is a run, whose recipe is fixed; to resume it with other values, give its recipe: "
            f"train({str(Path(folder) / 'recipe.yaml')!r}, ..., run_dir={folder!r}, update=True)"
        )
    found, _ = find_run(folder, (), None)
    loaded = _load_run(found)
    objects.fill(loaded.recipe, given)
    return objects, Target(folder, found, loaded, is_run=True, update=update)


def _load_run(run: RunDir) -> Any:
    from distrain.config.yaml import load_recipe

    return load_recipe(run.recipe_path)


def _of_recipe(
    recipe: Any, given: Mapping[str, Any], overrides: dict[str, Any], run_dir: str | Path | None, update: bool
) -> tuple[Objects, Target]:
    """Return the objects of a recipe, and what it names."""
    if run_dir is not None and "name" not in overrides and isinstance(recipe, Mapping) and "name" not in recipe:
        overrides = {"name": Path(run_dir).name, **overrides}
    objects = Objects()
    loaded = read_recipe(recipe, objects, given, overrides)
    run = RunDir(run_dir if run_dir is not None else Path("runs") / loaded.recipe.name)
    name = str(recipe) if isinstance(recipe, str | Path) else "the recipe"
    return objects, Target(name, run, loaded, is_run=False, update=update)


def _resolved(target: Target, options: Options) -> RunRequest:
    processes = options.processes
    if not isinstance(options.strategy, str | None):
        raise UserError(f"strategy: found {options.strategy!r}; expected a name, as in strategy='ddp'")
    if type(processes) is not int or processes < 1:
        raise UserError(f"processes: found {processes!r}; expected a whole number of 1 or more")
    say_ignored(own_start(os.environ, processes))
    logs.show_on_terminal(converses=True)
    environment: StartEnvironment = launcher_environment(processes) if processes > 1 else worker_environment()
    return resolve(target, options, environment)


def _attempt(request: RunRequest, objects: Objects) -> None:
    """Train what was requested; raises what it failed of."""
    from distrain.launchers.local import LocalLauncher
    from distrain.launchers.worker import begin_worker, train_here

    own = objects.handed_over()
    if request.is_finished:
        if request.given is not None:
            check_same_recipe(request.run, request.given)
        logger.info(f"{request.run.path} is finished; update=True continues it, another run_dir trains anew")
        return
    if request.processes > 1:
        with handing_over(own):
            status = LocalLauncher(forks=False).submit(request).status
        if status:
            raise _failure(request.run)
        return
    begin_worker()
    failures: list[BaseException] = []
    with ExitStack() as around:
        if own and gpu_count() and request.recipe.recipe.batch.micro_batch_size == "auto":
            try:
                around.enter_context(handing_over(own))  # sizes are tried in a process of their own
            except UserError as error:
                raise UserError(f"batch.micro is auto, which tries sizes in other processes. {error}") from error
        around.enter_context(own_surroundings(trains=True))
        train_here(request, failures=failures)
    if failures:
        raise failures[0]


def _import_progress_bars() -> None:
    """Import what Accelerate imports, without its warning about bars of a notebook, which nothing here shows."""
    if "IPython" in sys.modules and "tqdm.auto" not in sys.modules:
        with warnings.catch_warnings(), suppress(ImportError):
            warnings.filterwarnings("ignore", "IProgress not found")
            importlib.import_module("tqdm.auto")


def _failure(run: RunDir) -> Exception:
    """Return the error of processes that were started: of the first that failed, where it has said why."""
    failed = run.failed
    if failed is None:
        return RuntimeError(f"the processes ended without saying why; see the messages above and {run.log_path(0)}")
    message = str(failed.get("message") or failed.get("error"))
    if failed.get("traceback"):
        return RuntimeError(f"rank {failed.get('rank')} failed: {message}\n{failed['traceback']}")
    return UserError(message)


@contextmanager
def _as_before() -> Iterator[None]:
    """Leave this process as it was: its variables, signals, logging, and what it does when C code ends it."""
    variables, shows_faults = dict(os.environ), faulthandler.is_enabled()
    numbers = [number for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1") if (number := _signal(name))]
    handlers = {number: signal.getsignal(number) for number in numbers}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    elastic = logging.getLogger("torch.distributed.elastic")
    level = elastic.level
    try:
        yield
    finally:
        elastic.setLevel(level)
        logs.reset()
        if not shows_faults:
            faulthandler.disable()
        for number, handler in handlers.items():
            if handler is not None:  # None: of C code, which Python cannot put back
                signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for name in os.environ.keys() - variables.keys():
            del os.environ[name]
        os.environ.update(variables)


def _signal(name: str) -> signal.Signals | None:
    return getattr(signal, name, None)
