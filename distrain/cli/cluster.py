"""The commands for a SLURM cluster, which `distrain.cli.main` has among its own. Each is thin."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distrain.cli import completion
from distrain.cli.options import (
    AUTO,
    Json,
    NoPrune,
    OffloadTo,
    Overrides,
    RecipeOrRun,
    Replicate,
    RunFolder,
    SearchRuns,
    Strategy,
    Update,
)
from distrain.config import UserError
from distrain.system.output import echo, one_line

if TYPE_CHECKING:
    from distrain.launchers.slurm.submitting import Prepared


def _by_site(help: str) -> Any:
    return typer.Option(help=help, show_default="the site's, else SLURM's")


SiteName = Annotated[
    str | None,
    typer.Option(
        autocompletion=completion.sites,
        envvar="DISTRAIN_SITE",
        help="Defaults of a cluster; `distrain sites` lists them.",
        show_default="none",
    ),
]
CpusPerTask = Annotated[
    int | None, typer.Option(min=1, help="CPUs of each node.", show_default="one for each process, or the site's")
]
Mem = Annotated[str | None, _by_site("Memory of each node, such as 64G.")]
Partition = Annotated[str | None, _by_site("The partition.")]
Account = Annotated[str | None, _by_site("The account.")]
Qos = Annotated[str | None, _by_site("The quality of service.")]
SbatchOptions = Annotated[
    list[str] | None,
    typer.Option(metavar="OPTION", help="A further option, as --sbatch=--exclusive.", show_default="the site's"),
]


def submit(
    target: RecipeOrRun,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=0, help="GPUs of each node; 0 trains on CPUs.")] = 0,
    processes_per_node: Annotated[
        int | None, typer.Option(min=1, help="Processes on each node.", show_default="one for each GPU, else 1")
    ] = None,
    time: Annotated[
        str | None,
        typer.Option(help="The time limit, such as 4:00:00.", show_default="the site's, else it must be given"),
    ] = None,
    site: SiteName = None,
    strategy: Strategy = AUTO,
    offload: OffloadTo = None,
    replicate: Replicate = None,
    run_dir: RunFolder = None,
    array: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE,VALUE",
            help="A run for each value; for all combinations of several. With --search also a range, LOW..HIGH or "
            "LOW..HIGH:log.",
            show_default="one run",
        ),
    ] = None,
    search: SearchRuns = None,
    no_prune: NoPrune = False,
    parallel: Annotated[
        int | None,
        typer.Option(min=1, help="How many runs of a sweep run at a time.", show_default="as many as SLURM starts"),
    ] = None,
    cpus_per_task: CpusPerTask = None,
    mem: Mem = None,
    partition: Partition = None,
    account: Account = None,
    qos: Qos = None,
    notice: Annotated[
        int | None,
        typer.Option(
            min=5,
            help="Seconds before the time limit to save and stop.",
            show_default="the site's, else 120, or a third of it",
        ),
    ] = None,
    sbatch: SbatchOptions = None,
    update: Update = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print the script, and what distrain plan says of its GPUs; write and submit nothing, which is done "
            "without it.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Train on a SLURM cluster. The run resumes after time limits and preemptions until it is finished."""
    from distrain.launchers import find_launcher
    from distrain.launchers.slurm.submitting import Wanted, announced, planned, prepare

    wanted = Wanted(
        nodes, gpus_per_node, processes_per_node, time, cpus_per_task, mem, partition, account, qos, site, notice,
        sbatch or [], strategy.value, offload.value if offload is not None else None, parallel, replicate,
    )  # fmt: skip
    prepared = prepare(
        target, overrides or [], wanted, run_dir=run_dir, arrays=array or [], update=update, search=search,
        prune=not no_prune,
    )  # fmt: skip
    _check_search(prepared, search, no_prune=no_prune)
    if dry_run:
        echo(prepared.script, end="")
        for line in planned(prepared):
            echo(one_line(line), error=True)  # the script alone is what can be kept
        return
    job = find_launcher("slurm").submit(prepared).job
    assert job is not None
    if as_json:
        plan = prepared.plan
        of_search = {"tasks": list(plan.tasks)} if plan.tasks else {}
        runs = [str(run.path) for run, _ in prepared.runs]
        typer.echo(
            json.dumps({"job": job, "folder": plan.folder, "runs": runs, "nodes": plan.nodes, **of_search}, indent=2)
        )
        return
    for line in announced(prepared, job):
        echo(one_line(line))


def _check_search(prepared: Prepared, search: int | None, *, no_prune: bool) -> None:
    if no_prune and search is None:
        raise UserError("--no-prune goes with --search N, which stops runs that are worse than the others")
    if search is not None and prepared.plan.container is None and prepared.plan.python == sys.executable:
        from distrain.sweep.search import import_optuna

        import_optuna()  # the nodes have this Python


def sites(
    name: Annotated[str | None, typer.Argument(metavar="SITE", help="One of them, or a file.")] = None,
    as_json: Json = False,
) -> None:
    """List the clusters that have defaults for `submit`, or the values of one."""
    from distrain.launchers.slurm.sites import site_lines, sites_as_json

    if as_json:
        typer.echo(json.dumps(sites_as_json(name), indent=2))
        return
    for line in site_lines(name):
        echo(one_line(line))


Folder = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.", autocompletion=completion.runs)]
Runs = Annotated[
    Path,
    typer.Argument(
        metavar="RUN|SWEEP",
        help="The folder of a run or sweep, or one that holds them.",
        autocompletion=completion.runs,
    ),
]


def status(
    run: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Show the state of runs: queue, step, time left, loss, restarts."""
    print_statuses(run, as_json=as_json)


def watch(
    run: Runs = Path("runs"),
) -> None:
    """Watch runs on a terminal as they go: curves, ranks, time left, log."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UserError("distrain watch draws on a terminal, and this is none; distrain status prints the same numbers")
    try:
        from distrain.report.watching import Watch
    except ImportError as error:
        raise UserError(f"distrain watch is drawn by textual: pip install 'distrain[watch]' ({error})") from error
    Watch(run).run()


def print_statuses(run: Path, *, as_json: bool) -> None:
    """Print how a run is doing, or a table of several."""
    from distrain.report.status import as_json as told
    from distrain.report.status import best_line, status_rows, statuses, table, waiting_line
    from distrain.run.folder import RunDir
    from distrain.system.terminal import Console

    found = statuses(run)
    single = RunDir(run).exists
    if as_json:
        typer.echo(json.dumps(told(found[0]) if single else [told(each) for each in found], indent=2))
    elif single:
        echo(one_line(run))
        for name, value in status_rows(found[0]):
            echo(one_line(f"  {name:<9} {value}"))
    elif not found:
        echo(waiting_line(run) or f"{run} holds no runs")
    else:
        if problem := next((each.queue for each in found if each.queue), None):
            echo(f"the state of SLURM's queue is not known: {problem.splitlines()[0]}", error=True)
        # in a file or a pipe nothing is cut off
        console = Console(width=None if sys.stdout.isatty() else 1000)
        console.print(table(found, run, console.holds))
        for line in (waiting_line(run), best_line(run, found)):
            if line:
                echo(one_line(line))


def logs(
    run: Folder,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Follow until the run has ended; without it, print what is there.")
    ] = False,
    rank: Annotated[int | None, typer.Option(min=0, help="One process's own log.", show_default="the job's")] = None,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="How many of the last ones; 0: all.")] = 100,
) -> None:
    """Print the log of a run."""
    from distrain.report.logs import follow as read_on
    from distrain.report.logs import log_file
    from distrain.report.status import statuses

    ended = (lambda: not any(each.alive for each in statuses(run))) if follow else None
    try:
        for text in read_on(log_file(run, rank), lines, ended):
            echo(text, end="")
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def cancel(
    run: Annotated[
        Path, typer.Argument(metavar="RUN|SWEEP", help="The folder of a run or sweep.", autocompletion=completion.runs)
    ],
) -> None:
    """Cancel the jobs of a run at once. What was not saved is trained again when it is submitted again."""
    from distrain.report.status import cancel_jobs

    for line in cancel_jobs(run):
        echo(one_line(line))


def stop(
    run: Annotated[
        Path, typer.Argument(metavar="RUN|SWEEP", help="The folder of a run or sweep.", autocompletion=completion.runs)
    ],
) -> None:
    """Have a run save and end, wherever it runs."""
    from distrain.report.status import stop_run

    for line in stop_run(run):
        echo(one_line(line))
