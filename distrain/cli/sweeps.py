"""The command `distrain sweep`, which `distrain.cli.main` has among its own."""

from __future__ import annotations

from typing import Annotated

import typer

from distrain.cli.cluster import print_statuses
from distrain.cli.options import AUTO, Json, NoPrune, OffloadTo, Overrides, Replicate, SearchRuns, Strategy
from distrain.system.output import echo_loading


def sweep(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file.")],
    overrides: Overrides = None,
    array: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE,VALUE",
            help="A run for each value; for all combinations of several. With --search also a range, LOW..HIGH or "
            "LOW..HIGH:log.",
            show_default="must be given",
        ),
    ] = None,
    search: SearchRuns = None,
    no_prune: NoPrune = False,
    parallel: Annotated[
        int, typer.Option(min=1, help="How many runs at a time; GPUs and CPU threads are divided among them.")
    ] = 1,
    processes: Annotated[
        int | None,
        typer.Option(min=1, help="Processes of each run.", show_default="one for each of its GPUs, else 1"),
    ] = None,
    sweep_dir: Annotated[str | None, typer.Option(help="The sweep's folder.", show_default="runs/NAME")] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Resume runs that have failed; skipped without it.")
    ] = False,
    strategy: Strategy = AUTO,
    offload: OffloadTo = None,
    replicate: Replicate = None,
    as_json: Json = False,
) -> None:
    """Train a recipe with several values, on this machine. The same command resumes a sweep that was stopped."""
    echo_loading(on_terminal=True)
    from distrain.launchers import Options
    from distrain.sweep import SweepOptions, run_sweep

    launch = Options(strategy.value, offload.value if offload is not None else None, processes, replicate)
    options = SweepOptions(parallel, launch, retry_failed, search, not no_prune, quiet=as_json)
    folder, complete = run_sweep(recipe, overrides or [], array or [], options, sweep_dir)
    print_statuses(folder, as_json=as_json)
    raise typer.Exit(0 if complete else 1)
