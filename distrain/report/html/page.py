"""The page."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files

from distrain.report.contents import Report, RunReport
from distrain.report.html.compared import comparison
from distrain.report.html.markup import folded, section, text
from distrain.report.html.sections import badge, clock, first_screen, whole_run

_PARTS = (
    ("curves", "Curves"),
    ("cost", "Time and memory"),
    ("model", "What the model does"),
    ("attempts", "Attempts"),
    ("recipe", "Recipe"),
    ("data", "Data"),
    ("environment", "Environment"),
)


@cache
def _asset(name: str) -> str:
    return files("distrain.report.html").joinpath(name).read_text(encoding="utf-8")


def render(report: Report) -> str:
    """Return the report as one HTML document, which loads nothing and runs no script but its own."""
    body = _single(report.runs[0]) if report.comparison is None else _several(report)
    style, script = _asset("report.css"), _asset("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # the browser itself refuses whatever a text of a run might load or execute
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>{text(report.title)} – distrain</title><style>{style}</style></head><body><main>{body}"
        f"<footer>Written by distrain {text(report.version)} on {text(clock(report.made))}.</footer>"
        f"</main><script>{script}</script></body></html>\n"
    )


def _header(title: str, below: str, label: str = "") -> str:
    return (
        f"<header><h1>{text(title)}</h1>{label}<button id=theme type=button hidden>dark</button>"
        f"<p>{text(below)}</p></header>"
    )


def _single(run: RunReport) -> str:
    links = "".join(
        f'<a href="#{anchor}">{name}</a>' for anchor, name in _PARTS if anchor != "cost" or run.step_time or run.memory
    )
    return (
        _header(run.name, run.folder, badge(run.state))
        + f"<nav>{links}</nav>"
        + first_screen(run, "", 2)
        + whole_run(run)
    )


def _several(report: Report) -> str:
    assert report.comparison is not None
    runs = "".join(
        folded(
            f"{name}: {run.state}",
            f"<p class=note>{text(run.folder)}</p>"
            + first_screen(run, f"r{place}-", 3)
            + whole_run(run, f"r{place}-", 3),
        )
        for place, (name, run) in enumerate(zip(report.comparison.runs, report.runs, strict=True))
    )
    return (
        _header(report.title, ", ".join(report.comparison.runs))
        + comparison(report)
        + section("Each run", runs, "runs")
    )
