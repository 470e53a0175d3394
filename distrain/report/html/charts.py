"""Curves as inline SVG: lines are stretched to the width of the page, texts are not.

A chart is an SVG of 1000 × 1000 units without texts, whose lines keep their width whatever its size, and labels beside
it that are placed in percent. So it is as readable at 480 pixels as at 1920.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from distrain.report.curves import Panel
from distrain.report.html.markup import data, text

_SIZE = 1000
_MOST_MARKS = 120
"""Checkpoints that are marked in a chart."""


def nice_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return round numbers from `low` to `high`, at most `most`, at equal distances of 1, 2, 2.5 or 5 × 10^n."""
    if not high > low:
        return [low]
    rough = (high - low) / (most - 1)
    base = 10.0 ** math.floor(math.log10(rough))
    for factor in (1, 2, 2.5, 5, 10, 20):
        step = factor * base
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first + 1 <= most:
            return [round(place * step, 12 - math.floor(math.log10(step))) for place in range(first, last + 1)]
    return [low, high]


def log_ticks(low: float, high: float) -> list[float]:
    """Return powers of ten from `low` to `high`, with 2 and 5 times these where there are fewer than two decades."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = max(1, -(-(last - first) // 6))
    factors = (1, 2, 5) if last - first <= 2 else (1,)
    found = [factor * 10.0**power for power in range(first, last + 1, every) for factor in factors]
    return [tick for tick in found if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]


def tick_label(value: float, ticks: Sequence[float], *, log: bool = False) -> str:
    """Return a tick, as short as the distance to its neighbours allows: 0.05, 1.5k, 2M, 1e-5."""
    largest = max(abs(tick) for tick in ticks)
    if value == 0:
        return "0"
    if log:
        return _short(value)
    unit, sign = next(((limit, sign) for limit, sign in _UNITS if largest >= limit), (1.0, ""))
    decimals = max(len(f"{tick / unit:.10f}".rstrip("0").partition(".")[2]) for tick in ticks)
    if decimals > 4 or largest >= 1e15:
        mantissa, _, power = f"{value:.2e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(power)}"
    return f"{value / unit:.{decimals}f}{sign}"


_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def _short(value: float) -> str:
    if abs(value) < 1e-3:
        mantissa, _, power = f"{value:.0e}".partition("e")
        return f"{mantissa}e{int(power)}"
    unit, sign = next(((limit, sign) for limit, sign in _UNITS if abs(value) >= limit), (1.0, ""))
    return f"{value / unit:.6g}{sign}"


class _Axis:
    """From values to 0…1000, and the ticks."""

    def __init__(self, low: float, high: float, *, log: bool = False, most: int = 6):
        self.log = log
        if log:
            span = math.log10(high / low) or 1.0
            self.low, self.high = math.log10(low) - 0.03 * span, math.log10(high) + 0.03 * span
            self.ticks = log_ticks(10**self.low, 10**self.high) or [low]
        else:
            self.low, self.high = low, high
            self.ticks = nice_ticks(low, high, most)

    def place(self, value: float) -> float:
        """Return 0 at the low end and 1 at the high one."""
        here = math.log10(value) if self.log else value
        return (here - self.low) / ((self.high - self.low) or 1.0)


def _axes(panel: Panel) -> tuple[_Axis, _Axis]:
    steps = [step for curve in panel.curves for step in curve.steps]
    values = [value for curve in panel.curves for value in curve.values if value is not None]
    left, right = min(steps), max(steps)
    if panel.over == "step":
        left = min(left, 0)
    low, high = min(values), max(values)
    if panel.log:
        return _Axis(left, right or 1), _Axis(low, high, log=True)
    if panel.zero:
        low = min(0.0, low)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 0.05
    if low >= 0 and (panel.zero or low - margin < 0):
        low = 0.0 if panel.zero or low < margin else low - margin
        high += margin
    else:
        low, high = low - margin, high + margin
    return _Axis(left, right or 1), _Axis(low, high, most=5)


def chart(
    panel: Panel, *, restarts: Sequence[int] = (), checkpoints: Sequence[int] = (), best: int | None = None
) -> str:
    """Return a panel as `<figure>`, with restarts, checkpoints and the best step marked where it shows steps."""
    across, up = _axes(panel)

    def x(value: float) -> float:
        return round(_SIZE * across.place(value), 1)

    def y(value: float) -> float:
        return round(_SIZE * (1 - up.place(value)), 1)

    drawn = [f'<path class=grid d="M0 {y(tick)}H{_SIZE}"/>' for tick in up.ticks]
    if panel.marks:
        inside = [step for step in dict.fromkeys(restarts) if 0 <= across.place(step) <= 1]
        drawn += [f'<path class=restart d="M{x(step)} 0V{_SIZE}"/>' for step in inside]
        saved = [step for step in checkpoints if 0 <= across.place(step) <= 1]
        saved = saved[:: -(-len(saved) // _MOST_MARKS) or 1]
        drawn += [f'<path class=saved d="M{x(step)} {_SIZE}v-28"/>' for step in saved]
        if best is not None and 0 <= across.place(best) <= 1:
            drawn.append(f'<path class=best d="M{x(best)} 0V{_SIZE}"/>')
    for place, curve in enumerate(panel.curves):
        faint = " faint" if curve.trend is not None else ""
        drawn += _line(curve.steps, curve.values, x, y, f"c{place}{faint}", dots=panel.dots)
    for place, curve in enumerate(panel.curves):
        if curve.trend is not None:
            drawn += _line(*curve.trend, x, y, f"c{place}", dots=False)
    labels = "".join(
        f'<span class=y style="bottom:{100 * up.place(tick):.2f}%">'
        f"{text(tick_label(tick, up.ticks, log=panel.log))}</span>"
        for tick in up.ticks
    ) + "".join(
        f'<span class=x style="left:{100 * across.place(tick):.2f}%">{text(tick_label(tick, across.ticks))}</span>'
        for tick in across.ticks
    )
    unit = f" <small>{text(panel.unit)}</small>" if panel.unit else ""
    log = " <small>log axis</small>" if panel.log else ""
    legend = ""
    if len(panel.curves) > 1:
        legend = (
            "<div class=legend>"
            + "".join(
                f'<span><svg viewBox="0 0 24 8" class=key><path class="c c{place}" d="M0 4H24"/></svg>'
                f"{text(curve.name)}</span>"
                for place, curve in enumerate(panel.curves)
            )
            + "</div>"
        )
    note = f"<p class=note>{text(panel.note)}</p>" if panel.note else ""
    hover = {
        "x": [across.low, across.high],
        "y": [up.low, up.high],
        "log": panel.log,
        "over": panel.over,
        "curves": [[curve.name, curve.steps, curve.values] for curve in panel.curves],
    }
    return (
        f"<figure class=chart><figcaption><b>{text(panel.title)}</b>{unit}{log}</figcaption>{legend}"
        f'<div class=plot><svg viewBox="0 0 {_SIZE} {_SIZE}" preserveAspectRatio=none role=img '
        f'aria-label="{text(_described(panel))}">{"".join(drawn)}</svg>{labels}</div>'
        f"<div class=over>{text(panel.over)}</div>{note}"
        f'<script type="application/json">{data(hover)}</script></figure>'
    )


def _line(steps: Sequence[float], values: Sequence[float | None], x, y, kind: str, *, dots: bool) -> list[str]:  # type: ignore[no-untyped-def]
    """Return the paths of a curve; it is broken where values are missing."""
    if dots:
        points = "".join(
            f"M{x(step):g} {y(value):g}h0" for step, value in zip(steps, values, strict=True) if value is not None
        )
        return [f'<path class="dots {kind}" d="{points}"/>']
    pieces: list[list[tuple[float, float]]] = [[]]
    for step, value in zip(steps, values, strict=True):
        if value is None:
            pieces.append([])
        else:
            pieces[-1].append((x(step), y(value)))
    path = "".join(
        "M" + "L".join(f"{a:g} {b:g}" for a, b in piece) + ("h0" if len(piece) == 1 else "")
        for piece in pieces
        if piece
    )
    return [f'<path class="c {kind}" d="{path}"/>'] if path else []


def _described(panel: Panel) -> str:
    """Return what a chart shows, for those who do not see it."""
    said = []
    for curve in panel.curves:
        there = [value for value in curve.values if value is not None]
        if there:
            said.append(f"{curve.name} from {there[0]:.4g} to {there[-1]:.4g}")
    return f"{panel.title}: " + "; ".join(said)


def stacked(parts: Sequence[tuple[str, float, str]]) -> str:
    """Return a bar of parts (name, share of the whole, text), with its legend."""
    bars = "".join(
        f'<i class="b{place}" style="width:{100 * share:.2f}%" title="{text(f"{name} {said}")}"></i>'
        for place, (name, share, said) in enumerate(parts)
        if share > 0
    )
    rows = "".join(
        f"<tr><td><i class='swatch b{place}'></i>{text(name)}</td><td class=n>{text(said)}</td>"
        f"<td class=n>{100 * share:.1f} %</td></tr>"
        for place, (name, share, said) in enumerate(parts)
    )
    return f"<div class=stack>{bars}</div><table class=plain>{rows}</table>"
