"""`distrain doctor`."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from distrain.cli import completion
from distrain.cli.cluster import Account, CpusPerTask, Mem, Partition, Qos, SbatchOptions, SiteName
from distrain.cli.options import Json, Overrides, RunFolder
from distrain.system.output import echo

if TYPE_CHECKING:
    from distrain.doctor.findings import Report
    from distrain.system.terminal import Console


def doctor(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE|RUN",
            help="A recipe file, or the folder of a run; what it needs is then looked at as well.",
            autocompletion=completion.runs,
        ),
    ] = None,
    overrides: Overrides = None,
    run_dir: RunFolder = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Processes of a run here.", show_default="one for each GPU, else 1")
    ] = None,
    nodes: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Look at this many nodes of a SLURM cluster and between them: in a job that is queued, or in the "
            "allocation that this is in.",
            show_default="this machine alone, in an allocation its nodes",
        ),
    ] = None,
    gpus_per_node: Annotated[int, typer.Option(min=0, help="GPUs of each node.")] = 0,
    site: SiteName = None,
    time: Annotated[
        str | None, typer.Option(help="The time limit of the job.", show_default="the site's, else 15 minutes")
    ] = None,
    cpus_per_task: CpusPerTask = None,
    mem: Mem = None,
    partition: Partition = None,
    account: Account = None,
    qos: Qos = None,
    sbatch: SbatchOptions = None,
    limit: Annotated[float, typer.Option(min=1, help="Seconds that ranks wait for the next one to come.")] = 60.0,
    as_json: Json = False,
) -> None:
    """Look for what is wrong with this machine, or nodes of a cluster, before a run finds out, and say what to do.

    Exit status 1: an error.
    """
    from distrain.launchers.slurm.job_environment import allocated_nodes

    allocated = allocated_nodes(os.environ) or 1
    if nodes is not None or allocated > 1:
        from distrain.doctor.context import make_context
        from distrain.doctor.nodes.job import Request, examine_nodes
        from distrain.launchers.slurm.submitting import Wanted

        about = make_context(target, overrides or [], run_dir=run_dir, processes=processes, nodes=nodes or 1)
        wanted = Wanted(
            nodes or allocated, gpus_per_node, processes, time, cpus_per_task, mem, partition, account, qos,
            site, sbatch=sbatch or [],
        )  # fmt: skip
        arguments = [target, *(overrides or [])] if target is not None else []
        asked = Request(wanted, about.existing, arguments, run_dir, limit, lambda line: echo(line, error=True))
        _print(examine_nodes(asked), as_json)
    from distrain.doctor.command import examine
    from distrain.doctor.context import make_context
    from distrain.doctor.findings import Finding
    from distrain.doctor.showing import finding_row

    context = make_context(target, overrides or [], run_dir=run_dir, processes=processes)
    if as_json:
        _print_json(examine(context))
    console, width = _console()

    def show(finding: Finding) -> None:
        console.print(finding_row(finding, width), soft_wrap=True)

    _print_problems(examine(context, show=show), console, width)


def _print(report: Report, as_json: bool) -> NoReturn:
    """Print what was found on several nodes, and end with its status."""
    from distrain.doctor.showing import finding_row, of_nodes

    if as_json:
        _print_json(report)
    console, width = _console()
    together = of_nodes(report)
    for each in together.findings:
        console.print(finding_row(each, width, hosts=True), soft_wrap=True)
    _print_problems(together, console, width, hosts=True)


def _console() -> tuple[Console, int]:
    from distrain.doctor.showing import text_width
    from distrain.system.terminal import Console

    console = Console(width=None if sys.stdout.isatty() else 1000)
    return console, text_width(console.width)


def _print_json(report: Report) -> NoReturn:
    typer.echo(json.dumps(report.to_json(), indent=2))
    raise typer.Exit(report.exit_status)


def _print_problems(report: Report, console: Console, width: int, *, hosts: bool = False) -> NoReturn:
    """Print warnings and errors with what to do, the worst first, and end with the status of the report."""
    from distrain.doctor.findings import Level
    from distrain.doctor.showing import problem_lines, summary

    for level in (Level.error, Level.warning):
        for each in report.of(level):
            console.print()
            console.print(problem_lines(each, width, hosts=hosts), soft_wrap=True)
    console.print()
    console.print(summary(report))
    raise typer.Exit(report.exit_status)
