"""What was found, for a terminal: a line for each finding, and below them what is to be done."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import replace

from rich.text import Text

from distrain.doctor.findings import Finding, Level, Report
from distrain.system.output import one_line

NAME = 17
"""Columns of a check's name."""
_STYLES = {Level.ok: "green", Level.warning: "yellow", Level.error: "bold red"}
_LEAST, _MOST = 40, 120
"""Columns that text is wrapped to at least, and at most."""


def finding_row(finding: Finding, width: int, *, hosts: bool = False) -> Text:
    """Return `ok       open files       1,048,576`, wrapped below its last column; with the `hosts` that it is of."""
    level = f"{finding.level.value:<9}"
    name = f"{one_line(finding.check):<{NAME}} "
    wrapped = _wrapped(_where(finding, hosts) + finding.found, width, len(level) + len(name))
    return Text.assemble((level, _STYLES[finding.level]), name, "\n".join(wrapped))


def problem_lines(finding: Finding, width: int, *, hosts: bool = False) -> Text:
    """Return a warning or an error with what it means and what to do."""
    head = f"{finding.level.value}: "
    parts: list[str | tuple[str, str]] = [(head, _STYLES[finding.level])]
    found = f"{finding.check}: {_where(finding, hosts)}{finding.found}"
    parts.append("\n".join(_wrapped(found, width, 2, first=len(head))))
    for label, text in (("means", finding.means), ("do", finding.do)):
        if text:
            parts += [(f"\n  {label:<6} ", "bold"), "\n".join(_wrapped(text, width, 9))]
    return Text.assemble(*parts)


def summary(report: Report) -> Text:
    """Return how many findings there are of each level."""
    counts = {level: len(report.of(level)) for level in (Level.error, Level.warning, Level.ok)}
    if not counts[Level.error] and not counts[Level.warning]:
        return Text.assemble(("sound", "bold green"), f": nothing found by {_checks(report)} in {report.seconds:.1f} s")
    told = [
        f"{count} {level.value}{'s' * (count != 1 and level is not Level.ok)}"
        for level, count in counts.items()
        if count
    ]
    worst = Level.error if counts[Level.error] else Level.warning
    return Text.assemble(
        (told[0], _STYLES[worst]), "".join(f", {each}" for each in told[1:]) + f" in {report.seconds:.1f} s"
    )


def _checks(report: Report) -> str:
    count = len({each.check for each in report.findings})
    return f"{count} check{'s' * (count != 1)}"


def merged(findings: Sequence[Finding]) -> Iterator[Finding]:
    """Yield what several machines or ranks have found, each once, with the names of those that found the same."""
    same: dict[Finding, list[Finding]] = {}
    for each in findings:
        same.setdefault(replace(each, host="", rank=None), []).append(each)
    for alike, said in same.items():
        hosts = list(dict.fromkeys(each.host for each in said))
        yield replace(alike, host=", ".join(hosts), rank=said[0].rank if len(said) == 1 else None)


def of_nodes(report: Report) -> Report:
    """Return a report of several nodes for people: what nodes have found alike once, and of a check without problems
    what one of them has found.
    """
    hosts = dict.fromkeys(each.host for each in report.findings)
    bad = {each.check for each in report.findings if each.level is not Level.ok}
    told: dict[str, str] = {}
    alike = []
    for each in report.findings:
        if each.level is Level.ok:
            if each.check in bad:
                continue
            each = replace(each, found=told.setdefault(each.check, each.found), rank=None)
        alike.append(each)
    findings = [
        replace(each, host=f"all {len(hosts)} nodes") if len(each.host.split(", ")) == len(hosts) > 1 else each
        for each in merged(alike)
    ]
    return replace(report, findings=tuple(findings))


def text_width(width: int) -> int:
    """Return the columns that text is wrapped to on a console of `width` columns."""
    return max(_LEAST, min(width, _MOST))


def _where(finding: Finding, hosts: bool) -> str:
    """Return whom it is about, where that is not all there is."""
    where = [*([finding.host] if hosts else []), *([] if finding.rank is None else [f"rank {finding.rank}"])]
    return f"{', '.join(where)}: " if where else ""


def _wrapped(text: str, width: int, indent: int, *, first: int | None = None) -> list[str]:
    """Return lines of at most `width` columns, the first with `first` columns before it and the others indented."""
    lead = " " * (indent if first is None else first)
    lines = textwrap.wrap(
        one_line(text), width, initial_indent=lead, subsequent_indent=" " * indent, break_on_hyphens=False,
        break_long_words=False,
    )  # fmt: skip
    return [lines[0][len(lead) :], *lines[1:]] if lines else [""]
