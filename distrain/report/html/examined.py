"""The section about what a model does with the samples of a split."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from distrain.report.curves import Curve, Panel
from distrain.report.html.charts import chart
from distrain.report.html.markup import block, section, table, text
from distrain.system.numbers import counted

_NUMBERED = 16
"""Classes of a confusion matrix whose cells hold their numbers; with more, colours alone."""
_PICTURE = re.compile(r"data:image/png;base64,[A-Za-z0-9+/=]+")


def examination(found: dict[str, Any] | None, why: str, prefix: str, level: int) -> str:
    """Return it, or the reason why there is none."""
    if found is None:
        return f"<p class=note>Not looked at: {text(why)}</p>" if why else ""
    looked, total = found["samples"], found["of"]
    of = counted(looked, "sample")
    if total is None:
        of = f"the first {counted(looked, 'sample')}"
    elif looked < total:
        of = f"{looked:,} of {total:,} samples, evenly spread over the split"
    notes = "".join(f"<p class=note>{text(note)}</p>" for note in found.get("notes", ()))
    parts = [
        ("Confusion matrix", _confusion(found)),
        ("Classes", _classes(found.get("per_class") or ())),
        ("Calibration", _calibration(found.get("calibration"))),
        ("Predictions and targets", _scatter(found.get("scatter"))),
        ("Worst samples", _samples(found.get("worst") or ())),
        ("Best samples", _samples(found.get("best") or ())),
        ("Sample generations", _generations(found.get("generations") or ())),
    ]
    wide = {"Worst samples", "Best samples", "Sample generations"}
    beside = "".join(
        section(title, body, f"{prefix}{title.split()[0].lower()}", level) for title, body in parts if title not in wide
    )
    below = "".join(
        section(title, body, f"{prefix}{title.split()[0].lower()}", level) for title, body in parts if title in wide
    )
    head = f"<p class=note>Split {text(found['split'])}, {of}; model {text(found['checkpoint'])}.</p>"
    return head + notes + (f"<div class=columns>{beside}</div>" if beside else "") + below


def _confusion(found: dict[str, Any]) -> str:
    matrix, names = found.get("confusion"), found.get("classes") or []
    body = ""
    if matrix:
        dense = len(matrix) > _NUMBERED
        rows = []
        for true, row in enumerate(matrix):
            total = sum(row) or 1
            cells = "".join(_cell(names, true, guess, count, total, dense) for guess, count in enumerate(row))
            rows.append(f'<tr><th title="{text(names[true])}">{text(names[true])}</th>{cells}</tr>')
        head = "".join(f'<th title="{text(name)}">{text(name)}</th>' for name in names)
        kind = "matrix dense" if dense else "matrix"
        body = (
            "<p class=note>Rows are what is true, columns what is predicted; the colour is the share of the row.</p>"
            f'<div class=scroll><table class="{kind}"><thead><tr><th></th>{head}</tr></thead>'
            f"<tbody>{''.join(rows)}</tbody></table></div>"
        )
    pairs = found.get("confused") or []
    if pairs:
        rows_of = [[text(pair["true"]), text(pair["predicted"]), f"{pair['count']:,}"] for pair in pairs]
        body += table(["most confused: true", "predicted", "samples"], rows_of, numbers=(2,))
    return body


def _cell(names: Sequence[str], true: int, guess: int, count: int, total: int, dense: bool) -> str:
    share = count / total
    title = f"true {names[true]}, predicted {names[guess]}: {count:,}"
    hot = " class=hot" if share > 0.55 else ""
    shown = "" if dense or not count else f"{count:,}"
    return f'<td{hot} style="--v:{share:.3f}" title="{text(title)}">{shown}</td>'


def _classes(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return ""
    names = [name for name in ("support", "predicted", "precision", "recall", "f1", "iou") if name in rows[0]]

    def shown(value: Any) -> str:
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return "–"
        return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"

    cells = [[text(row["name"]), *(shown(row[name]) for name in names)] for row in rows]
    return table(["class", *names], cells, numbers=range(1, len(names) + 1))


def _calibration(found: dict[str, Any] | None) -> str:
    if not found:
        return ""
    bins = [each for each in found["bins"] if each["count"]]
    curves = [
        Curve("the model", [each["confidence"] for each in bins], [each["accuracy"] for each in bins]),
        Curve("perfect", [0.0, 1.0], [0.0, 1.0]),
    ]
    panel = Panel("How often it is right", "share", curves, zero=True, over="how sure it is", marks=False)
    rows = [
        [
            f"{each['low']:.1f}–{each['high']:.1f}",
            f"{each['count']:,}",
            f"{each['confidence']:.3f}",
            f"{each['accuracy']:.3f}",
        ]
        for each in bins
    ]
    said = f"<p class=note>Expected calibration error {found['error']:.4f}, over {len(found['bins'])} bins.</p>"
    return said + chart(panel) + table(["sure", "samples", "mean", "right"], rows, numbers=(1, 2, 3))


def _scatter(found: dict[str, Any] | None) -> str:
    if not found:
        return ""
    panel = Panel(
        "Predicted", "", [Curve("samples", found["target"], found["prediction"])], over="target", marks=False, dots=True
    )
    rows = [[text(name), f"{value:.4g}"] for name, value in found["numbers"].items()]
    return chart(panel) + table([], rows, numbers=(1,), kind="plain")


def _samples(found: Sequence[dict[str, Any]]) -> str:
    if not found:
        return ""
    cards = []
    for sample in found:
        picture = sample.get("picture") or ""
        shown = f'<img alt="sample {sample["row"]}" src="{picture}">' if _PICTURE.fullmatch(picture) else ""
        if sample.get("text"):
            shown += f"<pre>{block(sample['text'])}</pre>"
        if sample.get("features"):
            shown += table(
                [], [[text(name), text(value)] for name, value in sample["features"]], numbers=(1,), kind="plain"
            )
        right = {True: "right", False: "wrong", None: ""}[sample.get("right")]
        sure = f" <small>{sample['confidence']:.1%} sure</small>" if sample.get("confidence") is not None else ""
        said = ""
        if sample.get("prediction") is not None:
            said += f'<p class="{right}">predicted {text(sample["prediction"])}{sure}</p>'
        if sample.get("target") is not None:
            said += f"<p>true {text(sample['target'])}</p>"
        named = "".join(f" {text(value)}" for value in (sample.get("keys") or {}).values())
        cards.append(
            f"<div class=sample>{shown}{said}<p><small>loss {sample['loss']:.4g}, row {sample['row']:,}{named}"
            "</small></p></div>"
        )
    kind = " texts" if any(sample.get("text") for sample in found) else ""
    kind = " rows" if not kind and any(sample.get("features") for sample in found) else kind
    return f'<div class="samples{kind}">{"".join(cards)}</div>'


def _generations(found: Sequence[dict[str, Any]]) -> str:
    cards = []
    for each in found:
        body = f"<p><small>given</small></p><pre>{block(each['prompt'])}</pre>"
        body += f"<p><small>generated</small></p><pre>{block(each['text'])}</pre>"
        if each.get("reference"):
            body += f"<p><small>in the data</small></p><pre>{block(each['reference'])}</pre>"
        cards.append(f"<div class=sample>{body}</div>")
    return f'<div class="samples texts">{"".join(cards)}</div>' if cards else ""
