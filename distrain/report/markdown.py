"""A report as Markdown, for an issue, a chat or a repository: tables and no pictures."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from distrain.report.contents import Fact, Report, RunReport
from distrain.report.html.sections import clock, seconds
from distrain.system.numbers import counted, number
from distrain.system.output import lines, one_line
from distrain.training.callbacks.trackers import duration

_MARKUP = re.compile(r"([\\`*_{}\[\]<>#|~!$&])")


def text(value: object) -> str:
    """Return any text as Markdown that shows it: nothing in it is markup or HTML."""
    return _MARKUP.sub(r"\\\1", one_line(value))


def code(value: object) -> str:
    """Return any text as code within a line or a cell."""
    said = one_line(value)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", said)), default=0))
    padded = f" {said} " if said.startswith("`") or said.endswith("`") else said
    return f"{fence}{padded}{fence}".replace("|", "\\|") if said else ""


def _block(value: str, language: str = "") -> str:
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", value)), default=0))
    return f"{fence}{language}\n{lines(value).rstrip()}\n{fence}\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Iterable[int] = ()) -> str:
    right = set(numbers)
    rule = ["---:" if place in right else "---" for place in range(len(head))]
    return "".join(f"| {' | '.join(row)} |\n" for row in [head, rule, *rows]) + "\n"


def render(report: Report) -> str:
    """Return the report as Markdown."""
    body = f"# {text(report.title)}\n\n"
    found = report.comparison
    if found is None:
        body += _run(report.runs[0], 2)
    else:
        names = [text(name) for name in found.runs]
        everywhere = range(1, len(names) + 1)
        rows = []
        for outcome in found.outcomes:
            cells = [text(number(value)) for value in outcome.values]
            rows.append([text(outcome.name), *(f"**{c}**" if p in outcome.best else c for p, c in enumerate(cells))])
        body += "## What came out\n\n" + _table(["", *names], rows, everywhere)
        body += "## What differs\n\n"
        body += "".join(f"{text(problem)}\n\n" for problem in found.problems)
        differing = [[code(each.key), *map(code, each.values)] for each in found.differences]
        body += _table(["", *names], differing) if differing else "Nothing.\n\n"
        body += f"{found.same} keys of the recipes are alike.\n\n"
        for name, run in zip(names, report.runs, strict=True):
            body += f"## {name}\n\n{_run(run, 3)}"
    return f"{body}Written by distrain {text(report.version)} on {clock(report.made)}.\n"


def _facts(title: str, found: Sequence[Fact], level: int) -> str:
    if not found:
        return ""
    rows = [[text(fact.name), text(fact.value), text(fact.note)] for fact in found]
    return f"{'#' * level} {title}\n\n" + _table(["", "", ""], rows)


def _run(run: RunReport, level: int) -> str:
    hashes = "#" * level
    rows = [[text(fact.name), text(fact.value), text(fact.note)] for fact in run.headline]
    body = f"{code(run.folder)}\n\n" + _table(["", "", ""], rows)
    body += f"{hashes} Train it again\n\n" + _block("\n".join(run.reproduce), "bash") + "\n"
    names = list(dict.fromkeys(name for result in run.results for name in result["values"]))
    if run.results:
        rows = [
            [text(each["split"]), f"{each['step']:,}", *(text(number(each["values"].get(name))) for name in names)]
            for each in run.results
        ]
        body += f"{hashes} Results\n\n" + _table(["split", "step", *map(text, names)], rows, range(1, 2 + len(names)))
    if run.run_time:
        rows = [[text(each.name), duration(each.seconds), f"{100 * each.share:.1f} %"] for each in run.run_time]
        body += f"{hashes} Time of all attempts\n\n" + _table(["", "", ""], rows, (1, 2))
    if run.step_time:
        rows = [[text(each.name), seconds(each.seconds), f"{100 * each.share:.1f} %"] for each in run.step_time]
        body += f"{hashes} Time of a step\n\n" + _table(["", "", ""], rows, (1, 2))
    body += _facts("Memory", run.memory, level)
    body += _examined(run, level)
    attempts = [
        [
            str(part.number),
            clock(part.began),
            f"{part.step:,}",
            f"{part.reached:,}",
            f"{part.lost:,}" if part.lost else "",
            duration(part.seconds),
            duration(part.idle_s) if part.idle_s is not None else "",
            f"{part.processes} × {text(part.strategy)}",
            text(part.ended),
        ]
        for part in run.attempts
    ]
    if attempts:
        head = ["", "began", "from step", "to step", "trained again", "worked", "then idle", "world", "ended"]
        body += f"{hashes} Attempts\n\n" + _table(head, attempts, (0, 2, 3, 4, 5, 6))
    body += _facts("Not as usual", run.events, level)
    body += f"{hashes} Recipe\n\n"
    if run.recipe_problem is not None:
        body += f"{text(run.recipe_problem)}\n\n"
    rows = [[code(row.key), code(row.value), text(row.origin)] for row in run.recipe if not row.is_default]
    body += _table(["key", "value", "from"], rows) if rows else ""
    body += "Keys that are not listed have their defaults.\n\n" if rows else ""
    return body + _facts("Data", run.data, level) + _facts("Environment", run.environment, level)


def _examined(run: RunReport, level: int) -> str:
    found, hashes = run.examination, "#" * level
    if found is None:
        return (
            f"{hashes} What the model does\n\nNot looked at: {text(run.not_examined)}\n\n" if run.not_examined else ""
        )
    body = f"{hashes} What the model does\n\n"
    body += f"Split {text(found['split'])}, {counted(found['samples'], 'sample')}.\n\n"
    if classes := found.get("per_class"):
        names = [name for name in classes[0] if name != "name"]
        rows = [[text(each["name"]), *(text(number(each[name])) for name in names)] for each in classes]
        body += _table(["class", *names], rows, range(1, 1 + len(names)))
    if calibration := found.get("calibration"):
        body += f"Expected calibration error {calibration['error']:.4f}.\n\n"
    if scatter := found.get("scatter"):
        body += _table(["", ""], [[text(name), f"{value:.4g}"] for name, value in scatter["numbers"].items()], (1,))
    if worst := found.get("worst"):
        rows = [
            [
                f"{each['row']:,}",
                f"{each['loss']:.4g}",
                text(each.get("target") or ""),
                text(each.get("prediction") or ""),
            ]
            for each in worst
        ]
        body += "Worst samples:\n\n" + _table(["row", "loss", "true", "predicted"], rows, (0, 1))
    for each in found.get("generations") or ():
        body += "Given:\n\n" + _block(each["prompt"]) + "\nGenerated:\n\n" + _block(each["text"]) + "\n"
    return body
