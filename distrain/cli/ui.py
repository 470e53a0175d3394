"""`distrain ui`, which `distrain.cli.main` has among its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from distrain.system.output import echo, one_line


def ui(
    folder: Annotated[
        Path, typer.Argument(metavar="RUN|SWEEP", help="The folder of a run or sweep, or one that holds them.")
    ] = Path("runs"),
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="The port of 127.0.0.1.", show_default="any free one")
    ] = 0,
    open_browser: Annotated[
        bool, typer.Option("--open", help="Open the page in this machine's browser; without it, print its address.")
    ] = False,
) -> None:
    """Show runs in a browser: a live list, curves, comparisons, ranks, logs. Nothing is written, nothing leaves."""
    from distrain.report.ui.server import Server

    server = Server(folder, port)
    echo(f"{one_line(folder)} is shown at {server.address}")
    echo("The address is for you alone: whoever has it sees what you see. Ctrl+C ends it.")
    if open_browser:
        import webbrowser

        webbrowser.open(server.address)
    server.run()
