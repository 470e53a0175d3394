"""`distrain report` and `distrain compare`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from distrain.cli.options import ChangedData, InitialWeights, Json
from distrain.config import UserError
from distrain.system.output import echo, one_line

Runs = Annotated[
    list[Path],
    typer.Argument(metavar="RUN", help="Folders of runs; of a sweep, or one that holds runs, all of them."),
]
_SPLITS = ("train", "valid", "test")
_SUFFIXES = {".html": "html", ".htm": "html", ".md": "md", ".json": "json", ".png": "png"}


def report(
    runs: Runs,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o", "--out", metavar="FILE", help="What to write.", show_default="report.html in the run's folder"
        ),
    ] = None,
    md: Annotated[
        bool, typer.Option("--md", help="Markdown, and not HTML as without it; printed unless -o names a file.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="JSON, and not HTML as without it; printed unless -o names a file.")
    ] = False,
    png: Annotated[
        bool,
        typer.Option("--png", help="The curves as one picture, by the extra 'report', and not HTML as without it."),
    ] = False,
    split: Annotated[
        str | None,
        typer.Option(
            help="Take samples of a split through the model, and show what it does with them: train, valid or test.",
            show_default="none",
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, max=100, help="How many of the worst and of the best to show.")] = 8,
    limit: Annotated[
        int, typer.Option(min=1, help="How many samples of the split to look at, evenly spread over it.")
    ] = 10_000,
    changed_data: ChangedData = False,
    initial_weights: InitialWeights = None,
) -> None:
    """Write what a run, or several side by side, did as one HTML file that opens without a network."""
    from distrain.report.contents import build_report

    kind = _kind(out, md=md, as_json=as_json, png=png)
    if split is not None and split not in _SPLITS:
        raise UserError(f"--split {split!r}: expected one of {', '.join(_SPLITS)}")
    folders = run_folders(runs)
    examined = None
    if split is not None:
        options = {"samples": samples, "limit": limit, "changed_data": changed_data, "initial_weights": initial_weights}
        examined = [_examined(folder, split, options) for folder in folders]
    made = build_report(folders, examined)
    where = out
    if where is None and kind in ("html", "png"):
        where = (folders[0] if len(folders) == 1 else Path()) / f"report.{kind}"
    if kind == "png":
        from distrain.report.pictures import write_picture

        assert where is not None
        _write(where, lambda path: write_picture(made, path))
    else:
        content = _text(made, kind)
        if where is None:
            echo(content, end="" if content.endswith("\n") else "\n")
            return
        _write(where, lambda path: path.write_text(content, encoding="utf-8"))
    echo(one_line(f"wrote {where}"))


def _kind(out: Path | None, *, md: bool, as_json: bool, png: bool) -> str:
    """Return what is to be written: html, md, json or png."""
    asked = [name for name, given in (("md", md), ("json", as_json), ("png", png)) if given]
    if len(asked) > 1:
        raise UserError(f"--{' and --'.join(asked)}: a report is one of them; name one")
    if out is None:
        return asked[0] if asked else "html"
    found = _SUFFIXES.get(out.suffix.lower())
    if found is None:
        raise UserError(f"-o {out}: found the suffix {out.suffix!r}, expected one of {', '.join(_SUFFIXES)}")
    if asked and found != asked[0]:
        raise UserError(
            f"-o {out} is the name of a .{found} file, and --{asked[0]} asks for another; leave one of them out"
        )
    return found


def _text(made: Any, kind: str) -> str:
    if kind == "json":
        return json.dumps(made.to_json(), indent=2) + "\n"
    if kind == "md":
        from distrain.report.markdown import render as as_markdown

        return as_markdown(made)
    from distrain.report.html import render as as_html

    return as_html(made)


def _write(path: Path, write: Any) -> None:
    try:
        write(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; name another file with -o") from error


def run_folders(given: list[Path]) -> list[Path]:
    """Return the folders of the runs that are named, those of a sweep or right below a folder among them."""
    from distrain.report.status import statuses
    from distrain.run.folder import RunDir

    found: list[Path] = []
    for folder in given:
        if RunDir(folder).exists:
            found.append(folder)
            continue
        named = [Path(each.run) for each in statuses(folder)]
        below = [run for run in named if RunDir(run).exists]
        if waiting := len(named) - len(below):
            echo(
                one_line(
                    f"{waiting} of the {len(named)} runs of {folder} {'has' if waiting == 1 else 'have'} not begun"
                ),
                error=True,
            )
        if not below:
            raise UserError(f"{folder} is no run folder and holds none; name folders such as runs/NAME")
        found += below
    return list({folder.resolve(): folder for folder in found}.values())


def _examined(folder: Path, split: str, options: dict[str, Any]) -> tuple[dict[str, Any] | None, str]:
    """Return what the model of a run does with a split, or why that cannot be known here."""
    from distrain.inference import examine

    try:
        return examine(folder, split, **options), ""
    except UserError as error:
        echo(one_line(f"{folder}: the model was not looked at: {error}"), error=True)
        return None, str(error)


def compare(runs: Runs, as_json: Json = False) -> None:
    """Print what differs in the recipes of runs, and what came of each."""
    from dataclasses import asdict

    from distrain.report.contents import labels
    from distrain.report.differences import compare_runs, comparison_lines
    from distrain.report.history import History
    from distrain.run.json_files import json_safe
    from distrain.system.terminal import Console

    folders = run_folders(runs)
    if len(folders) < 2:
        raise UserError(
            f"{folders[0]} is one run; name another to compare it with, or see `distrain status {folders[0]}`"
        )
    found = compare_runs(folders, labels(folders), [History(folder) for folder in folders])
    if as_json:
        typer.echo(json.dumps(json_safe(asdict(found)), indent=2))
        return
    # in a file or a pipe nothing is cut off
    console = Console(width=None if sys.stdout.isatty() else 1000)
    for each in comparison_lines(found, console.holds):
        console.print(each)
