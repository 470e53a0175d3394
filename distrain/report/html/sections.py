"""The sections of a report about one run."""

from __future__ import annotations

import shlex
import time

from distrain.report.contents import RunReport
from distrain.report.html.charts import chart, stacked
from distrain.report.html.examined import examination
from distrain.report.html.markup import block, facts, folded, section, table, text
from distrain.system.numbers import number
from distrain.training.callbacks.trackers import duration

_GOOD, _BAD = ("finished",), ("failed", "hanging", "gone")


def badge(state: str) -> str:
    """Return the state of a run as a label."""
    kind = " good" if state in _GOOD else " bad" if state in _BAD else ""
    return f'<span class="badge{kind}">{text(state)}</span>'


def first_screen(run: RunReport, prefix: str, level: int) -> str:
    """Return what came out, what it cost, and how to train it again."""
    cards = "".join(
        f"<div class=card><span>{text(fact.name)}</span><b>{text(fact.value)}</b><small>{text(fact.note)}</small></div>"
        for fact in run.headline
        if fact.name != "state"
    )
    message = f"<p class=message>{text(run.message)}</p>" if run.message else ""
    if run.state == "failed" and run.failure.strip() not in ("", run.message):
        message += folded("The whole error", f"<pre class=wrap>{block(run.failure)}</pre>")
    again = "".join(f"<pre class=wrap>{text(line)}</pre>" for line in run.reproduce)
    return (
        f"{message}<div class=cards>{cards}</div>"
        f"<h{level + 1}>Train it again</h{level + 1}>{again}"
        f"{section('Results', results(run), f'{prefix}results', level + 1)}"
    )


def results(run: RunReport) -> str:
    """Return the last evaluation of each split as a table."""
    names = list(dict.fromkeys(name for result in run.results for name in result["values"]))
    if not run.results:
        return "<p class=note>Nothing was evaluated.</p>"
    rows = []
    for result in run.results:
        what = "exported model" if result["exported"] else "last evaluation"
        rows.append(
            [text(result["split"]), text(what), f"{result['step']:,}"]
            + [text(number(result["values"].get(name))) for name in names]
        )
    return table(["split", "of", "step", *map(text, names)], rows, numbers=range(2, 3 + len(names)))


_SCALE = (
    ("restart", "an attempt resumed here"),
    ("saved", "checkpoint"),
    ("best", "best evaluation"),
)


def curves(run: RunReport) -> str:
    """Return all curves."""
    if not run.panels:
        return "<p class=note>The run has written fewer than two rows of numbers, which make no curve.</p>"
    there = {"restart": bool(run.restarts), "saved": bool(run.checkpoints), "best": run.best_step is not None}
    ways = {"restart": "M13 0V12", "saved": "M13 12V4", "best": "M13 0V12"}
    scale = "".join(
        f'<span><svg viewBox="0 0 26 12"><path class={kind} d="{ways[kind]}"/></svg>{said}</span>'
        for kind, said in _SCALE
        if there[kind]
    )
    drawn = "".join(
        chart(panel, restarts=run.restarts, checkpoints=run.checkpoints, best=run.best_step) for panel in run.panels
    )
    return (f"<div class=scale>{scale}</div>" if scale else "") + f"<div class=charts>{drawn}</div>"


def cost(run: RunReport, level: int) -> str:
    """Return where the time and the memory of a step went."""
    body = ""
    if run.step_time:
        parts = [(share.name, share.share, seconds(share.seconds)) for share in run.step_time]
        whole = f"<p class=note>{seconds(run.step_s or 0)} a step, the mean of all rows.</p>"
        body += f"<div><h{level}>Time of a step</h{level}>{whole}{stacked(parts)}</div>"
    if run.run_time:
        parts = [(share.name, share.share, duration(share.seconds)) for share in run.run_time]
        body += f"<div><h{level}>Time of all attempts</h{level}>{stacked(parts)}</div>"
    if run.memory:
        listed = facts((fact.name, fact.value, fact.note) for fact in run.memory)
        body += f"<div><h{level}>Memory</h{level}>{listed}</div>"
    return f"<div class=columns>{body}</div>" if body else ""


def seconds(value: float) -> str:
    """Return seconds of a step in the unit that fits."""
    for limit, unit, factor in ((1.0, "s", 1.0), (1e-3, "ms", 1e3), (0.0, "µs", 1e6)):
        if value >= limit:
            return f"{factor * value:.3g} {unit}"
    return f"{value:.3g} s"


def attempts(run: RunReport) -> str:
    """Return a table of all attempts."""
    rows = [
        [
            str(part.number),
            text(clock(part.began)),
            f"{part.step:,}",
            f"{part.reached:,}",
            f"{part.lost:,}" if part.lost else "",
            text(duration(part.seconds)),
            text(duration(part.idle_s)) if part.idle_s is not None else "",
            f"{part.processes} × {text(part.strategy)}",
            text(part.host) + (f" <small>job {text(part.job)}</small>" if part.job else ""),
            text(part.ended),
        ]
        for part in run.attempts
    ]
    if not rows:
        return "<p class=note>The run has not begun.</p>"
    head = ["", "began", "from step", "to step", "trained again", "worked", "then idle", "world", "rank 0 on", "ended"]
    note = ""
    if len(rows) > 1:
        note = (
            "<p class=note>Trained again: steps that an attempt finished and had not saved, so the next one began "
            "before them. Idle: the time until the next attempt began.</p>"
        )
    return table(head, rows, numbers=(0, 2, 3, 4, 5, 6)) + note


def clock(when: float) -> str:
    """Return seconds since 1970 as date and time in UTC."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(when)) if when else "unknown"


def recipe(run: RunReport) -> str:
    """Return the recipe, what was set first."""
    if run.recipe_problem is not None:
        return f"<p class=message>{text(run.recipe_problem)}</p>" + folded(
            "recipe.yaml", f"<pre>{block(run.recipe_text)}</pre>"
        )

    def rows(default: bool) -> str:
        found = [
            [text(row.key), f"<span class=code>{text(row.value)}</span>", f"<small>{text(row.origin)}</small>"]
            for row in run.recipe
            if row.is_default == default
        ]
        return table(["key", "value", "from"], found, kind="keys wide") if found else ""

    unset = sum(row.is_default for row in run.recipe)
    return (
        rows(False)
        + folded(f"{unset} keys with their defaults", rows(True))
        + folded("recipe.yaml, which trains the same run", f"<pre>{block(run.recipe_text)}</pre>")
    )


def whole_run(run: RunReport, prefix: str = "", level: int = 2) -> str:
    """Return every section of a run behind the first screen. `prefix` makes anchors of several runs distinct."""
    listed = {
        name: facts((fact.name, fact.value, fact.note) for fact in found)
        for name, found in (("environment", run.environment), ("data", run.data), ("events", run.events))
    }
    looked = examination(run.examination, run.not_examined, prefix, level + 1)
    evaluate = f"distrain report {shlex.quote(run.folder)} --split test"
    if run.examination is None and not run.not_examined:
        looked = f"<p class=note>Not looked at. <code>{text(evaluate)}</code> adds it, where the data are.</p>"
    data = listed["data"] or "<p class=note>The run has recorded nothing of its data.</p>"
    return "".join(
        (
            section("Curves", curves(run), f"{prefix}curves", level),
            section("Time and memory", cost(run, level + 1), f"{prefix}cost", level),
            section("What the model does", looked, f"{prefix}model", level),
            section("Attempts", attempts(run), f"{prefix}attempts", level),
            section("Not as usual", listed["events"], f"{prefix}events", level),
            section("Recipe", recipe(run), f"{prefix}recipe", level),
            section("Data", data, f"{prefix}data", level),
            section("Environment", listed["environment"], f"{prefix}environment", level),
        )
    )
