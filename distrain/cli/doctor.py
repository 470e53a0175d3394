"""`distrain doctor`."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from distrain.cli import completion
from distrain.cli.options import Json, Overrides, RunFolder


def doctor(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="[RECIPE|RUN]",
            help="A recipe file, or the folder of a run; what it needs is then looked at as well.",
            autocompletion=completion.runs,
        ),
    ] = None,
    overrides: Overrides = None,
    run_dir: RunFolder = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Processes of a run here.", show_default="one for each GPU, else 1")
    ] = None,
    as_json: Json = False,
) -> None:
    """Look for what is wrong with this machine before a run finds out, and say what to do. Exit status 1: an error."""
    from distrain.doctor.command import examine
    from distrain.doctor.context import make_context
    from distrain.doctor.findings import Finding, Level
    from distrain.doctor.showing import finding_row, problem_lines, summary, text_width
    from distrain.system.terminal import Console

    context = make_context(target, overrides or [], run_dir=run_dir, processes=processes)
    if as_json:
        report = examine(context)
        typer.echo(json.dumps(report.to_json(), indent=2))
        raise typer.Exit(report.exit_status)
    console = Console(width=None if sys.stdout.isatty() else 1000)
    width = text_width(console.width)

    def show(finding: Finding) -> None:
        console.print(finding_row(finding, width), soft_wrap=True)

    report = examine(context, show=show)
    for level in (Level.error, Level.warning):
        for each in report.of(level):
            console.print()
            console.print(problem_lines(each, width), soft_wrap=True)
    console.print()
    console.print(summary(report))
    raise typer.Exit(report.exit_status)
