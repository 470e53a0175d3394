"""The sections of a report about several runs."""

from __future__ import annotations

from distrain.report.contents import Report
from distrain.report.html.charts import chart
from distrain.report.html.markup import section, table, text
from distrain.report.html.sections import badge
from distrain.system.numbers import number


def comparison(report: Report) -> str:
    """Return what came out, what differs, and the curves side by side."""
    found = report.comparison
    assert found is not None
    rows = []
    for outcome in found.outcomes:
        cells = []
        for place, value in enumerate(outcome.values):
            shown = badge(str(value)) if outcome.name == "state" else text(number(value))
            cells.append(f"<b class=right>{shown}</b>" if place in outcome.best else shown)
        rows.append([text(outcome.name), *cells])
    names = [text(name) for name in found.runs]
    everywhere = range(1, len(names) + 1)
    body = section("What came out", table(["", *names], rows, numbers=everywhere), "outcomes")
    differing = [
        [text(difference.key), *(f"<span class=code>{text(value)}</span>" for value in difference.values)]
        for difference in found.differences
    ]
    said = "".join(f"<p class=message>{text(problem)}</p>" for problem in found.problems)
    alike = f"<p class=note>{found.same} keys of the recipes are alike.</p>"
    differences = table(["", *names], differing, kind="keys") if differing else "<p>Nothing differs.</p>"
    body += section("What differs", said + differences + alike, "differences")
    drawn = "".join(chart(panel) for panel in report.panels)
    return body + section("Curves", f"<div class=charts>{drawn}</div>" if drawn else "", "curves")
