"""`submit`: all is checked that can be, the run made with its script and a copy of its code, and handed to sbatch."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import distrain
from distrain.config import Recipe, UserError
from distrain.config.strategies import describe_strategy
from distrain.config.yaml import LoadedRecipe, given_values, load_recipe, values_text
from distrain.launchers import (
    Options,
    RunRequest,
    StartEnvironment,
    Target,
    all_of,
    open_run,
    read_target,
    recipe_differences,
    recipe_text,
    resolve,
    shared_file,
)
from distrain.launchers.searches import SearchAsked, ask_search
from distrain.launchers.slurm.plan import Plan, make_plan, seconds_of
from distrain.launchers.slurm.queue import find_command, sbatch
from distrain.launchers.slurm.rendering import log_pattern, render_sbatch
from distrain.launchers.slurm.sites import Site, load_site
from distrain.launchers.slurm.snapshot import (
    Snapshot,
    differences,
    moved,
    moved_values,
    own_package,
    take_snapshot,
    write_copy,
)
from distrain.launchers.slurm.tracking import note_job, queued_job
from distrain.launchers.sweeps import STOP, SweepRecord, SweepRun, best_of, expand, is_sweeping
from distrain.run.folder import Launch, RunDir
from distrain.run.json_files import write_atomically, write_json
from distrain.system.bounded_json import read_json

BASE = "base.yaml"
"""Beside the script of a search: the recipe that its runs have in common."""


@dataclass(frozen=True)
class Wanted:
    """What a person asks for on the command line; None leaves it to the site, or to a default."""

    nodes: int = 1
    gpus_per_node: int = 0
    processes_per_node: int | None = None
    time: str | None = None
    cpus_per_task: int | None = None
    mem: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    site: str | None = None
    notice_s: int | None = None
    sbatch: Sequence[str] = ()
    strategy: str = "auto"
    offload: str | None = None
    parallel: int | None = None
    replicate: str | None = None


@dataclass(frozen=True)
class Prepared:
    """A job that was checked, and of which nothing has been written."""

    plan: Plan
    script: str
    recipe: Recipe
    """That of one of its runs."""
    runs: list[tuple[RunDir, LoadedRecipe]]
    """Each run with its recipe, whose code is in the copy; of a search those that were begun before."""
    requests: list[RunRequest]
    """What the nodes of its job read, one for each run."""
    snapshot: Snapshot
    package: Snapshot | None
    """distrain itself, where it is copied."""
    record: SweepRecord | None
    """What the folder of a sweep holds of it."""
    base: str | None
    """Of a search: the recipe that its runs have in common, as YAML, whose code is in the copy."""
    update: bool
    keeps_code: bool
    """Whether the copy that is there stays."""
    notes: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """Where the script and the copy of the code go."""
        return Path(self.plan.folder) / "submit"


def prepare(
    target: str,
    overrides: Sequence[str],
    wanted: Wanted,
    *,
    run_dir: str | None = None,
    arrays: Sequence[str] = (),
    update: bool = False,
    search: int | None = None,
    prune: bool = True,
) -> Prepared:
    """Check a submission as far as that can be done here, and write its script. Writes nothing to disk.

    `arrays` are values to sweep over, each `key=value,value`, of which a `search` draws so many runs. Raises UserError
    with what is wrong.
    """
    site = load_site(wanted.site) if wanted.site is not None else Site()
    sweep = expand(target, overrides, arrays, run_dir) if arrays and search is None else None
    asked = None if search is None else _ask(target, overrides, arrays, search, run_dir, update=update)
    begun = asked.begun() if asked is not None else {}
    runs_of = [*begun.values(), *asked.corners()] if asked is not None else sweep.runs if sweep is not None else []
    targets = [_target_of(target, each, update) for each in runs_of]
    targets = targets or [read_target(target, overrides, run_dir, update=update)]

    processes = wanted.processes_per_node or wanted.gpus_per_node or 1
    # this machine trains nothing, so that its GPUs do not count
    environment = StartEnvironment(wanted.nodes * processes, wanted.nodes, here=0, argv=tuple(sys.argv))
    options = Options(wanted.strategy, wanted.offload, replicate=wanted.replicate)
    requests: list[RunRequest] = []
    problems: list[UserError] = []
    for number, each in enumerate(targets):
        check_names = number in (0, len(begun)) or sweep is None or sweep.changes_names
        try:
            requests.append(resolve(each, options, environment, check_names=check_names, check_run=False))
        except UserError as error:
            problems.append(error)
            break  # the other runs of a sweep differ in values
    found = [(each.run, each.recipe) for each in targets if each.run is not None and each.recipe is not None]
    if len(found) < len(targets):
        raise all_of(problems)
    named = asked or sweep
    folder, named_run = (named.folder, False) if named is not None else (found[0][0].path, targets[0].is_run)
    resuming = requests[: len(begun)] or requests  # what a search has begun says how it continues
    strategies = {(each.strategy, each.offload, str(each.replicate)) for each in resuming}
    strategies = strategies if not problems else {("ddp", "none", "1")}
    if len(strategies) > 1:
        problems.append(UserError(f"the runs of {folder} resume with different strategies; name one with --strategy"))
    strategy, offload, replicate = min(strategies)

    code = folder / "submit" / "code"
    keeps_code = named_run and code.is_dir() and not update
    snapshot = Snapshot() if keeps_code else take_snapshot(*(loaded.recipe for _, loaded in found))
    package = own_package()
    try:
        plan = job_plan(
            wanted,
            site,
            folder,
            [folder] if asked is not None else [run.path for run, _ in found],
            tasks=asked.left() if asked is not None else [],
            prunes=asked is not None and prune,
            name=named.name if named is not None else found[0][1].recipe.name,
            strategy=strategy,
            offload=offload,
            replicate=replicate,
            processes=processes,
            copies_package=package is not None,
            packages=[str(code / name) for name in snapshot.packages],
        )
    except UserError as error:
        problems.append(error)
    if problems:
        raise all_of(problems)
    if keeps_code and (earlier := _earlier_plan(folder)) is not None:
        plan = plan.model_copy(update={"python_path": tuple(dict.fromkeys((*plan.python_path, *earlier)))})
    recipe = found[0][1].recipe
    runs = [(run, moved(loaded, snapshot, code)) for run, loaded in (found if asked is None else found[: len(begun)])]
    record = None
    if sweep is not None:
        sweep.earlier()
        record = sweep.record(best_of(recipe, sweep.runs[0].values))
    elif asked is not None:
        record = asked.record(best_of(recipe, asked.axes))
    for run, loaded in runs:
        _check_folder(run, loaded, snapshot, code, update=update)
    base = None
    if asked is not None:
        if not plan.tasks:
            raise UserError(
                f"all {asked.count} runs of {folder} have come to their ends; a larger --search continues it"
            )
        base = values_text(moved_values(given_values(target, overrides), snapshot, code))
        kept = [place for place, number in enumerate(begun) if number in plan.tasks]
        runs, requests = [runs[place] for place in kept], [requests[place] for place in kept]
    elif not update and all(run.finished is not None for run, _ in runs):
        raise UserError(f"{folder} is finished; choose another --run-dir to train anew, or --update to continue")
    script, notes = render_sbatch(plan), list(snapshot.notes)
    return Prepared(plan, script, recipe, runs, requests, snapshot, package, record, base, update, keeps_code, notes)


def _ask(
    target: str, overrides: Sequence[str], arrays: Sequence[str], count: int, run_dir: str | None, *, update: bool
) -> SearchAsked:
    if not arrays:
        raise UserError("--search needs --array KEY=LOW..HIGH or KEY=VALUE,VALUE, which says what is drawn")
    if update:
        raise UserError(
            "--update with --search: a search compares runs of one recipe, data and code; choose another --run-dir"
        )
    return ask_search(target, overrides, arrays, count, run_dir, "--run-dir")


def _target_of(target: str, run: SweepRun, update: bool) -> Target:
    return Target(target, RunDir(run.folder), load_recipe(target, run.overrides), False, update)


def job_plan(
    wanted: Wanted,
    site: Site,
    folder: Path,
    runs: Sequence[Path],
    *,
    tasks: Sequence[int] = (),
    prunes: bool = False,
    name: str,
    strategy: str,
    offload: str,
    replicate: str,
    processes: int,
    copies_package: bool,
    packages: Sequence[str],
) -> Plan:
    """Return the plan of a job in `folder`, from what a person asks for and what the site says.

    `processes` are those of each node, `packages` folders where Python is to look first. Raises UserError with all that
    is wrong.
    """
    time = wanted.time or site.time
    if time is None:
        raise UserError("no time limit is set; give --time, such as 4:00:00. What is left then resumes in another job")
    cpus = wanted.cpus_per_task
    if cpus is None:
        cpus = (site.cpus_per_gpu or 0) * wanted.gpus_per_node if wanted.gpus_per_node else processes
    notice = wanted.notice_s or site.notice_s
    if notice is None:
        try:
            notice = max(5, min(120, seconds_of(time) // 3))
        except ValueError:
            notice = 120  # the plan says what is wrong with the time
    own = [str(folder / "submit" / "distrain")] if copies_package else []
    variables = os.environ
    return make_plan(
        name=name,
        folder=str(folder),
        runs=tuple(map(str, runs)),
        tasks=tuple(tasks),
        prunes=prunes,
        parallel=wanted.parallel,
        nodes=wanted.nodes,
        gpus_per_node=wanted.gpus_per_node,
        gpu_type=site.gpu_type if wanted.gpus_per_node else None,
        gpu_option=site.gpu_option,
        processes_per_node=processes,
        cpus_per_task=cpus or None,
        mem=wanted.mem or site.mem,
        time=time,
        notice_s=notice,
        # what a person has set for every sbatch of theirs
        partition=wanted.partition or site.partition or variables.get("SBATCH_PARTITION") or None,
        account=wanted.account or site.account or variables.get("SBATCH_ACCOUNT") or None,
        qos=wanted.qos or site.qos or variables.get("SBATCH_QOS") or None,
        constraint=site.constraint or variables.get("SBATCH_CONSTRAINT") or None,
        reservation=site.reservation or variables.get("SBATCH_RESERVATION") or None,
        sbatch=(*site.sbatch, *wanted.sbatch),
        strategy=strategy,
        offload=offload,
        replicate="auto" if replicate == "auto" else int(replicate),
        python=site.python or sys.executable,
        node_script=str(folder / "submit" / "node.py"),
        modules=site.modules,
        sources=site.sources,
        variables=site.environment,
        python_path=(*packages, *own),
        interface=site.interface,
        scratch=site.scratch,
        container=site.container,
    )


def _earlier_plan(folder: Path) -> tuple[str, ...] | None:
    try:
        found = read_json(folder / "submit" / "plan.json")
        return tuple(path for path in found["plan"]["python_path"] if Path(path).is_dir())
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _check_folder(run: RunDir, loaded: LoadedRecipe, snapshot: Snapshot, code: Path, *, update: bool) -> None:
    """Raise UserError where the folder is not this run's, or the run was started with another recipe or other code."""
    if not run.exists:
        others = {"submit"}
        if run.holds_other_files() and {path.name for path in run.path.iterdir()} - others:
            raise UserError(f"{run.path} holds files and is not a run; choose another --run-dir")
        return
    if update or not run.has_trained:
        return
    # the run may have been started with the code in its own place
    if lines := recipe_differences(moved(load_recipe(run.recipe_path), snapshot, code), loaded):
        raise UserError(
            f"{run.path} was started with another recipe:\n  "
            + "\n  ".join(lines)
            + "\nChoose another --run-dir for a new run, or --update to continue with the new values."
        )
    if snapshot.files and code.is_dir() and (changed := differences(code, snapshot)):
        raise UserError(
            f"{run.path} was started with other code, which differs in {', '.join(changed[:10])}. "
            f"`distrain submit {run.path}` resumes with the code as it was, --update with the code as it is"
        )


def planned(prepared: Prepared) -> list[str]:
    """Return the lines of `distrain plan` for a job on GPUs, or how to have them; none for one on CPUs."""
    plan = prepared.plan
    if not plan.gpus_per_node:
        return []
    from distrain.plan.gpus import known_gpu

    gpu = known_gpu(plan.gpu_type) if plan.gpu_type else None
    per_node = plan.processes_per_node
    if gpu is None:
        options = f"--nodes {plan.nodes} --gpus-per-node {per_node}"
        found = (
            f"does not know {plan.gpu_type}" if plan.gpu_type else "is not told the kind of GPU (gpu_type of a site)"
        )
        return [f"no plan, as it {found}: distrain plan RECIPE --gpu NAME {options}"]
    from distrain.plan.command import plan_of
    from distrain.plan.showing import plan_lines

    try:
        return plan_lines(plan_of(prepared.recipe, gpu, plan.nodes, per_node))
    except UserError as error:
        return [f"no plan: {error}"]


def submit(prepared: Prepared) -> str:
    """Write the run and submit its job; returns the job's number. Raises UserError where a job of it is queued."""
    plan, folder = prepared.plan, prepared.folder
    if find_command("sbatch") is None:
        raise UserError(
            "there is no sbatch here, so this machine does not belong to a SLURM cluster; log in to one that does. "
            "--dry-run shows the script"
        )
    if prepared.record is not None and is_sweeping(Path(plan.folder)):
        raise UserError(
            f"a `distrain sweep` starts the runs of {plan.folder}; wait for it to end, or `distrain stop {plan.folder}`"
        )
    for place in dict.fromkeys((Path(plan.folder), *(run.path for run, _ in prepared.runs))):
        if (job := queued_job(place)) is not None:
            raise UserError(
                f"{place} is in the queue already, as job {job.id} ({job.state}); wait for it to end, or "
                f"`distrain cancel {place}`"
            )
    launch = Launch.describe(plan.world_size, plan.strategy, plan.offload, plan.replicate)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if prepared.snapshot.files:
            write_copy(prepared.snapshot, folder / "code")
        if prepared.package is not None:
            write_copy(prepared.package, folder / "distrain")
        shutil.copyfile(shared_file("launch", "node.py"), folder / "node.py")
        write_atomically(folder / "train.sbatch", prepared.script)
        record = {
            "distrain": distrain.__version__,
            "argv": sys.argv,
            "time": time.time(),
            "plan": plan.model_dump(mode="json"),
            "code": {name: str(root) for root, name in prepared.snapshot.roots.items()},
        }
        write_json(folder / "plan.json", record)
        if prepared.base is not None:
            write_atomically(folder / BASE, prepared.base)
        if prepared.record is not None:
            prepared.record.write(Path(plan.folder))
            (Path(plan.folder) / STOP).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}; choose another --run-dir") from error
    for (run, loaded), request in zip(prepared.runs, prepared.requests, strict=True):
        # the file UPDATE tells the first attempt; a requeued job must not update again
        launch = replace(launch, request=replace(request, update=False).record())
        if not run.exists or recipe_differences(load_recipe(run.recipe_path), loaded):
            run.create(recipe_text(loaded), launch)
        open_run(run, None, launch, update=prepared.update)
        if prepared.update:
            run.clear_markers()
        run.stop_path.unlink(missing_ok=True)
        run.checkpoints.mkdir(exist_ok=True)
    number = sbatch(folder / "train.sbatch")
    note_job(Path(plan.folder), number, nodes=plan.nodes, tasks=plan.task_count)
    return number


def announced(prepared: Prepared, number: str) -> list[str]:
    """Return the lines that describe what was submitted, and how to follow it."""
    plan = prepared.plan
    log = log_pattern(plan).replace("%A", number).replace("%j", number).replace("%a", "TASK")
    device = f"{plan.gpus_per_node} GPU{'s' * (plan.gpus_per_node > 1)}" if plan.gpus_per_node else "CPUs"
    processes = f"{plan.world_size} process{'es' * (plan.world_size > 1)}"
    each = f"{plan.processes_per_node} on the {device} of each"
    offload = "" if plan.offload == "none" else f", offloading {plan.offload}"
    lines = [
        f"job {number}: " + (f"{plan.task_count} runs in {plan.folder}" if plan.is_array else plan.folder),
        f"  nodes  {plan.nodes}, {processes}, {each}; {describe_strategy(plan.strategy, plan.replicate)}{offload}",
        f"  time   {plan.time}; asked to save and stop {plan.notice_s} s before, and queued again",
    ]
    if plan.tasks:
        others = f"; {len(begun)} were begun before" if (begun := prepared.runs) else ""
        lines.append(f"  search each task draws the values of its run when it starts{others}")
    if prepared.keeps_code:
        lines.append(f"  code   as it was: {prepared.folder / 'code'}")
    elif prepared.snapshot.files:
        lines.append(f"  code   {len(prepared.snapshot.files)} files, copied to {prepared.folder / 'code'}")
    lines += [f"  note   {note}" for note in prepared.notes]
    short = os.path.relpath(plan.folder) if Path(plan.folder).is_relative_to(Path.cwd()) else plan.folder
    follow = f"distrain status {shlex.quote(short)}"
    if not plan.is_array:
        follow += f", distrain logs -f {shlex.quote(short)}"
    return [*lines, f"  log    {log}", f"follow it: {follow}"]
