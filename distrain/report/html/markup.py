"""Pieces of HTML. Every text that comes from a run goes through `text`."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from typing import Any

from distrain.system.output import lines, one_line


def text(value: object) -> str:
    """Return any text as HTML that shows it: nothing in it is markup, and control characters are escaped."""
    return html.escape(one_line(value), quote=True)


def block(value: object) -> str:
    """Return text of several lines as HTML, for `<pre>`."""
    return html.escape(lines(value), quote=True)


def data(value: Any) -> str:
    """Return a value as JSON that can stand within `<script type="application/json">`."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c").replace("&", "\\u0026")


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Iterable[int] = (), kind: str = "") -> str:
    """Return a table of cells that are HTML already; `numbers`: the columns that are aligned on the right."""
    right = set(numbers)

    def cells(row: Sequence[str], tag: str) -> str:
        return "".join(f"<{tag}{' class=n' if place in right else ''}>{cell}</{tag}>" for place, cell in enumerate(row))

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    top = f"<thead><tr>{cells(head, 'th')}</tr></thead>" if head else ""
    return f'<div class=scroll><table class="{kind}">{top}<tbody>{body}</tbody></table></div>'


_WIDE = 60
"""Characters beyond which a value has a line of its own."""


def facts(pairs: Iterable[tuple[str, str, str]]) -> str:
    """Return a list of (name, value, remark), all plain text."""
    rows = "".join(
        f"<div{' class=wide' * (len(value) > _WIDE)}><dt>{text(name)}</dt>"
        f"<dd>{text(value)}{f' <small>{text(note)}</small>' if note else ''}</dd></div>"
        for name, value, note in pairs
    )
    return f"<dl class=facts>{rows}</dl>" if rows else ""


def section(title: str, body: str, identity: str, level: int = 2) -> str:
    """Return a section with a heading, nothing where its body is empty. `title` is plain text."""
    return f'<section id="{identity}"><h{level}>{text(title)}</h{level}>{body}</section>' if body else ""


def folded(title: str, body: str) -> str:
    """Return a part that is folded until it is asked for; printed it is unfolded."""
    return f"<details><summary>{text(title)}</summary>{body}</details>" if body else ""
