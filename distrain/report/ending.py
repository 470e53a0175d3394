"""The report of a run that has just ended, which `log.report` asks for. No torch."""

from __future__ import annotations

from pathlib import Path

from distrain.config.registry import reports
from distrain.report.contents import build_report
from distrain.report.html import render
from distrain.run.json_files import write_atomically


@reports.register("html")
def write_report(folder: Path) -> Path:
    """Write report.html into a run's folder, as `distrain report` does; returns its path."""
    path = folder / "report.html"
    write_atomically(path, render(build_report([folder], ended=True)))
    return path
