"""`RunRequest`: what a command asks for, resolved once, with all mistakes reported at once.

`read_target` finds the recipe and the run folder, `resolve` adds the options and what is around the start. Both are
pure: they read files and write nothing. The request goes into the run folder's launch.json, where the processes that
train read it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from distrain.autobatch.search import search_if_needed
from distrain.config import Recipe, UserError
from distrain.config.strategies import strategy_imports
from distrain.config.yaml import LoadedRecipe, dump_recipe, load_recipe, parse_recipe, show, shown_value
from distrain.launchers.preflight import StartEnvironment, all_of, gpu_count
from distrain.run.folder import Launch, RunDir
from distrain.run.lease import Holder, check_free
from distrain.run.micro_batch import CachedMicroBatch, cache_micro_batch
from distrain.system.compiler import COMPILER
from distrain.system.importing import importing
from distrain.system.job_environment import job_environment
from distrain.system.memory import gib
from distrain.system.output import in_utf8

if TYPE_CHECKING:
    from distrain.parallel import Configuration, StrategySpec

TRAINING_IMPORTS = ("distrain.loop", "distrain.training.checks", "distrain.diagnose.hang_diagnosis")
"""Modules that each of several processes of a training imports, whatever the recipe."""


@dataclass(frozen=True)
class Target:
    """What a command names: a recipe and its run folder, as far as they can be found."""

    name: str
    """As typed."""
    run: RunDir | None
    """None where it is not known, as the recipe that names it cannot be read."""
    recipe: LoadedRecipe | None
    """The recipe, of a run its own; None where it cannot be read."""
    is_run: bool
    """Whether a run was named and not a recipe: its recipe is fixed, and its launch.json holds."""
    update: bool = False
    """Whether an existing run may be resumed under a changed recipe, data or code."""
    problems: tuple[UserError, ...] = ()

    @property
    def given(self) -> LoadedRecipe | None:
        """The recipe that the command brings; None where it names a run."""
        return None if self.is_run else self.recipe


@dataclass(frozen=True)
class RunRequest:
    """One attempt at a run, resolved."""

    target: str
    """The recipe file or run folder, as typed."""
    folder: str
    """The run's folder, absolute."""
    is_run: bool
    """Whether the target is the run itself: its recipe is fixed."""
    update: bool
    """Whether this attempt may change the recipe, data or code of an existing run."""
    processes: int
    """Of all nodes."""
    nodes: int
    """Machines, each with as many of the processes."""
    strategy: str
    """single, ddp, zero1, zero2, zero3 or fsdp2."""
    offload: str
    """What is kept in the memory of the CPU: none, optimizer or all."""
    argv: tuple[str, ...]
    """The command as typed."""
    notes: tuple[str, ...]
    """Notes to log when the run begins."""
    recipe: LoadedRecipe
    """The resolved recipe, with where each value came from."""
    replicate: int | Literal["auto"] = 1
    """How many replicas of what is sharded there are; auto: one for each machine that the processes are on."""

    script: ClassVar[str] = "train.py"
    """What each process runs, in launch/."""

    @property
    def worker_arguments(self) -> tuple[str, ...]:
        """Its arguments, once the run folder holds this request."""
        return self.folder, "--request", self.id

    @property
    def imports(self) -> tuple[str, ...]:
        """Modules that each of its processes imports."""
        train = self.recipe.recipe.train
        # without GPUs, where alone processes are forked, auto compiles nothing
        compiles = train.compile not in (False, "auto") or train.activation_checkpointing
        return *TRAINING_IMPORTS, *strategy_imports(self.strategy), *((COMPILER,) if compiles else ())

    @property
    def run(self) -> RunDir:
        """The run's folder."""
        return RunDir(self.folder)

    @property
    def given(self) -> LoadedRecipe | None:
        """The recipe that the command brings; None where it names a run."""
        return None if self.is_run else self.recipe

    @property
    def is_finished(self) -> bool:
        """Whether there is nothing to train: the run is finished, and this attempt does not update it."""
        return not self.update and self.run.finished is not None

    @property
    def spec(self) -> StrategySpec:
        """The strategy with its offload and replicas."""
        from distrain.parallel import StrategySpec

        return StrategySpec.of(self.strategy, self.offload, self.replicate)

    def launch(self) -> Launch:
        """Return the record of this attempt, made now in this process, for the run's launch.json."""
        argv, record = list(self.argv), self.record()
        return Launch.describe(self.processes, self.strategy, self.offload, self.replicate, argv=argv, request=record)

    @property
    def id(self) -> str:
        """A short name of this request: another one has another name."""
        return hashlib.sha256(json.dumps(self.record(), sort_keys=True).encode()).hexdigest()[:12]

    def record(self) -> dict[str, Any]:
        """Return what launch.json holds of it: all but the recipe, which is recipe.yaml beside it, in UTF-8."""
        return {
            name: [in_utf8(each) for each in value] if isinstance(value, list)
            else in_utf8(value) if isinstance(value, str)
            else value
            for name, value in self._values().items()
        }  # fmt: skip

    def _values(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "recipe"}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def to_json(self) -> str:
        """Return it as JSON, which `from_json` reads back as an equal one."""
        loaded = self.recipe
        recipe = {
            "text": dump_recipe(loaded.recipe),
            "origins": dict(loaded.origins),
            "folder": str(loaded.folder),
        }
        return json.dumps(self._values() | {"recipe": recipe})

    @classmethod
    def from_json(cls, text: str) -> RunRequest:
        """Return the request that `to_json` wrote."""
        values = json.loads(text)
        recipe = values.pop("recipe")
        parsed = parse_recipe(recipe["text"], str(values["target"]))
        return cls._of(values, LoadedRecipe(parsed, recipe["origins"], Path(recipe["folder"])))

    @classmethod
    def of_run(cls, run: RunDir) -> RunRequest | None:
        """Return the request in a run's launch.json with the run's recipe; None where launch.json holds none.

        Raises UserError where either cannot be read.
        """
        if (record := run.launch().request) is None:
            return None
        try:
            # the folder as it is named here: a path need not be UTF-8
            return cls._of({**record, "folder": str(run.path)}, load_recipe(run.recipe_path))
        except (TypeError, KeyError) as error:
            raise UserError(
                f"{run.launch_path} holds a request of another version ({error}); start the run again"
            ) from error

    @classmethod
    def _of(cls, values: Mapping[str, Any], recipe: LoadedRecipe) -> RunRequest:
        lists = {name: tuple(values[name]) for name in ("argv", "notes")}
        return cls(**{**values, **lists}, recipe=recipe)


@dataclass(frozen=True)
class Options:
    """The options of a command that decide how its run is launched; None and "auto" are resolved."""

    strategy: str = "auto"
    offload: str | None = None
    processes: int | None = None
    """How many processes there must be; None: any number."""
    replicate: str | None = None


def read_target(
    target: str, overrides: Sequence[str] = (), run_dir: str | None = None, *, update: bool = False
) -> Target:
    """Return the recipe and the run folder that a command means, or what is wrong with them. Writes nothing."""
    try:
        run, loaded = find_run(target, overrides, run_dir)
    except UserError as error:
        return Target(target, RunDir(run_dir) if run_dir else None, None, False, update, (error,))
    try:
        return Target(target, run, loaded or load_recipe(run.recipe_path), loaded is None, update)
    except UserError as error:
        return Target(target, run, None, True, update, (error,))


@importing()
def resolve(
    target: Target,
    options: Options,
    environment: StartEnvironment,
    *,
    check_names: bool = True,
    check_run: bool = True,
) -> RunRequest:
    """Return the request that a command makes; raises UserError with all that is wrong with it. Pure.

    Without `check_names` the recipe's names and arguments are taken to be right, as those of another run of its sweep;
    without `check_run` what is in the run folder, which is then compared in another way.
    """
    from distrain.parallel import check_precision, check_several, unused
    from distrain.training.checks import check_bits, check_recipe

    problems = list(target.problems)
    run, loaded, world = target.run, target.recipe, environment.world
    expected = options.processes
    spec: StrategySpec | None = None
    try:
        if world is not None and expected is None and target.is_run and run is not None:
            expected = run.launch().processes
    except UserError as error:
        problems.append(error)
    problems += environment.problems(expected)
    count = environment.processes
    try:
        resumes = world is not None and target.is_run
        spec = asked_for(
            run, count, options.strategy, options.offload, environment.configuration, replicate=options.replicate,
            resumes=resumes,
        )  # fmt: skip
        spec.replicas(count, environment.nodes)
    except UserError as error:
        problems.append(error)
    checks: list[Callable[[], None]] = []
    if loaded is not None:
        recipe, settings, auto = loaded.recipe, environment.configuration, environment.precision
        origins = loaded.origins
        if check_names:
            checks.append(lambda: check_recipe(recipe, target.name))
        checks.append(lambda: check_one_owner(settings, recipe, count, origins, auto=auto))
        if spec is not None:
            strategy = spec.strategy
            checks.append(lambda: check_precision(recipe.train.precision, strategy))
            checks.append(lambda: check_several(recipe.optimizers, strategy))
            checks.append(lambda: check_bits(recipe, strategy))
    for check in checks:
        try:
            check()
        except UserError as error:
            problems.append(error)
    # Rank 0 looks for all, which it can tell only in their world: refused alone, it would leave them waiting there.
    alone = world is None or count == 1 or (world.rank == 0 and bool(problems))
    if check_run and run is not None and not target.is_run and alone:
        try:
            check_folder(run, loaded, update=target.update)
        except UserError as error:
            problems.append(error)
    if problems:
        raise all_of(problems)
    assert run is not None
    assert loaded is not None
    assert spec is not None
    notes = [f"{place} has no part in this run" for place in unused(environment.configuration)]
    if decides_itself(options, environment, run, target) and spec.strategy == "ddp":
        spec, note = planned_strategy(loaded.recipe, spec, environment)
        notes.append(note)
    if options.strategy == "ddp" and spec.strategy == "single":
        notes.append("--strategy ddp in one process is single")
    return RunRequest(
        target.name, str(run.path), target.is_run, target.update, count, environment.nodes, spec.strategy, spec.offload,
        environment.argv, tuple(notes), loaded, spec.replicate,
    )  # fmt: skip


def decides_itself(options: Options, environment: StartEnvironment, run: RunDir, target: Target) -> bool:
    """Whether nobody has said how a new run on several GPUs of this machine is spread over them."""
    from distrain.parallel import strategy_wishes

    return (
        options.strategy == "auto"
        and environment.world is None
        and environment.gpus > 0
        and environment.processes > 1
        and not target.is_run
        and not run.launch_path.exists()
        and all(wish.strategy is None for wish in strategy_wishes(environment.configuration, environment.processes))
    )


def planned_strategy(recipe: Recipe, usual: StrategySpec, environment: StartEnvironment) -> tuple[StrategySpec, str]:
    """Return the strategy of a new run on this machine's GPUs, and why: the `usual` one unless it does not fit."""
    from distrain.plan.asking import ask
    from distrain.plan.gpus import known_gpu
    from distrain.system.gpus import gpu_models

    models, nodes = gpu_models(), environment.nodes
    gpu = known_gpu(models[0]) if len(models) == 1 else None
    if gpu is None:
        return usual, f"strategy auto: {usual}, as {', '.join(models) or 'this GPU'} is not known to distrain plan"
    plan = ask(recipe, gpu.name, nodes=nodes, per_node=environment.processes // nodes)
    return strategy_of(plan, usual)


def strategy_of(plan: Mapping[str, Any] | None, usual: StrategySpec) -> tuple[StrategySpec, str]:
    """Return the strategy that a plan comes to for the recipe as it is, and why. Pure.

    Where `ddp` does not fit, it is the fastest of those that do without any other change of the recipe.
    """
    from distrain.parallel import StrategySpec

    if plan is None:
        return usual, f"strategy auto: {usual}, as none could be planned"
    asked = plan["options"][0]["activation_checkpointing"]
    options = [each for each in plan["options"] if each["activation_checkpointing"] == asked]
    first = next((each for each in options if each["strategy"] == usual.strategy), None)
    fitting = [each for each in options if each["fits"]]
    if first is None or first["fits"] or not fitting:
        why = "which fits by the plan" if first is not None and first["fits"] else "as nothing fits by the plan"
        return usual, f"strategy auto: {usual}, {why}"
    best = min(fitting, key=lambda each: each["step"]["total_s"])
    name, replicate = ("fsdp2", "auto") if best["strategy"] == "hsdp" else (best["strategy"], 1)
    sizes = f"{gib(first['total_bytes'])} of {gib(plan['gpu_memory_bytes'])} of a GPU"
    spec = StrategySpec.of(name, "none", replicate)
    return spec, f"strategy auto: {spec}, by the plan; {usual} would take {sizes}"


def asked_for(
    run: RunDir | None,
    world_size: int,
    strategy: str,
    offload: str | None,
    configuration: Configuration,
    *,
    replicate: str | None = None,
    resumes: bool = False,
) -> StrategySpec:
    """Return the strategy that the options, the launcher's configuration and the run's launch.json agree on.

    `resumes`: the run itself was named, so that its launch.json is one of the sources that must agree. Otherwise it is
    a fallback, for where no other source names a strategy. Raises UserError where two differ.
    """
    from distrain.parallel import StrategyHint, resolve_strategy, strategy_wishes

    option = None if strategy == "auto" else strategy
    wishes = [StrategyHint("--strategy", option), StrategyHint("--offload", None, offload)]
    wishes.append(StrategyHint("--replicate", None, None, replicate))
    earlier = None
    if option is None and run is not None and run.launch_path.exists():
        record = run.launch()
        earlier = StrategyHint(
            str(run.launch_path),
            "ddp" if record.strategy == "single" else record.strategy,
            record.offload if offload is None else None,
            str(record.replicate) if replicate is None else None,
        )
    wishes += [earlier] if resumes and earlier is not None else []
    return resolve_strategy(world_size, [*wishes, *strategy_wishes(configuration, world_size)], earlier)


def check_one_owner(
    configuration: Configuration,
    recipe: Recipe,
    world_size: int,
    origins: Mapping[str, str] | None = None,
    *,
    auto: str = "fp32",
) -> None:
    """Raise UserError with each of the launcher's settings that differs from the recipe, which owns them.

    `origins`: where each of the recipe's values came from, by its dotted key. `auto`: what `train.precision: auto`
    means on this machine.
    """
    from distrain.parallel import disagreements

    if lines := disagreements(configuration, recipe, world_size, auto=auto, origins=origins):
        raise UserError(
            "the launcher's configuration and the recipe disagree; nothing was written.\n  - "
            + "\n  - ".join(lines)
            + "\nThe recipe owns batch, accumulation, clipping and precision: take these out of the launcher's "
            "configuration, or change the recipe."
        )


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
                f"To resume with other values: distrain train {run.recipe_path} KEY=VALUE --run-dir {target} --update"
            )
        return run, None
    loaded = load_recipe(target, overrides)
    return RunDir(run_dir or Path("runs") / loaded.recipe.name), loaded


def open_run(run: RunDir, loaded: LoadedRecipe | None, launch: Launch, *, update: bool = False) -> None:
    """Create the run, or open the existing one. Raises UserError when that one has another recipe.

    With `update` the run gets the recipe, and the next attempt accepts changed data and code; where that refuses them,
    it puts the earlier recipe back.
    """
    if loaded is not None:
        check_folder(run, loaded, update=update)
    # an attempt that failed before it trained may be mended
    if loaded is not None and (not run.exists or update or not run.has_trained):
        run.create(recipe_text(loaded), launch, keeps=run.exists and run.has_trained)
    else:
        run.write_launch(launch)
    if update:
        run.update_path.touch()
    elif job_environment().job is None:  # who starts the run again may have changed their mind
        run.update_path.unlink(missing_ok=True)


def prepare(request: RunRequest, *, search: bool = True, opened: bool = False) -> None:
    """Open the run, unless it is `opened`, and `search` the size of `batch.micro: auto`, before any process trains.

    One process calls, without a GPU. Raises UserError, with nothing changed, where another attempt is at work.
    """
    run, holder = request.run, Holder.of_this_process()
    if run.exists:
        check_free(run, holder)  # before its recipe may be replaced
    unfinished = run.exists and not run.finished
    if not opened:
        open_run(run, request.given, request.launch(), update=request.update)
    if unfinished:
        # a failure of this attempt must not be taken for an earlier preemption
        run.clear_markers(requeued=holder.restart > 0)
    if search and (found := autobatch(request, request.processes)) is not None:
        cache_micro_batch(run, found)


def autobatch(request: RunRequest, here: int) -> CachedMicroBatch | None:
    """Return a newly found size for `batch.micro: auto`, with `here` of the processes on this machine; else None."""
    count = request.processes
    return search_if_needed(
        request.run, request.recipe.recipe, request.spec, processes=count, here=here, gpus=gpu_count()
    )


def check_folder(run: RunDir, loaded: LoadedRecipe | None, *, update: bool, option: str = "--run-dir") -> None:
    """Raise UserError where the run of a recipe, None where it cannot be read, cannot be created or opened here.

    Writes nothing. `option` is how the command calls the folder.
    """
    if not run.exists and run.holds_other_files():
        raise UserError(f"{run.path} holds files and is not a run; choose another {option}")
    if loaded is not None and run.exists and not update and run.has_trained:
        check_same_recipe(run, loaded, option)


def check_same_recipe(run: RunDir, loaded: LoadedRecipe, option: str = "--run-dir") -> None:
    """Raise UserError with every value that differs, unless the run was started with this recipe."""
    if differences := recipe_differences(load_recipe(run.recipe_path), loaded):
        updates = ", or --update to continue with the new values" if option == "--run-dir" else ""
        raise UserError(
            f"{run.path} was started with another recipe:\n  "
            + "\n  ".join(differences)
            + f"\nChoose another {option} for a new run{updates}."
        )


def recipe_text(loaded: LoadedRecipe) -> str:
    """Return the resolved recipe as it is stored in a run, with where each value came from."""
    return "# The resolved recipe: training it again is the same run.\n" + dump_recipe(loaded.recipe, loaded.origins)


def recipe_differences(old: LoadedRecipe, new: LoadedRecipe) -> list[str]:
    """Return a line for each key whose value differs."""
    before = {key: value for key, value, _ in show(old)}
    after = {key: value for key, value, _ in show(new)}
    return [
        f"{key}: was {shown_value(key, before.get(key, 'absent'))}, now {shown_value(key, after.get(key, 'absent'))}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]
