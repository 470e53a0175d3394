"""The curves of a report as one picture, by matplotlib, which is the extra `report`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distrain.report.contents import Report
from distrain.report.curves import Panel
from distrain.system.errors import UserError
from distrain.system.output import one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = ("#0b6fb8", "#d0570b", "#0a8f68", "#b04d8e", "#8a6d00", "#2f9bd0", "#5b4fb3", "#444b55")
_STYLES = ("-", "--", ":", "-.", "-", "--", ":", "-.")
_DPI = 110


def write_picture(report: Report, path: Path) -> None:
    """Write the curves of a report as a PNG. Raises UserError where matplotlib is missing, and for no curves."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(
            "--png draws by matplotlib, which is not installed; pip install 'distrain[report]', or write HTML"
        ) from error
    panels = report.panels if report.comparison is not None else report.runs[0].panels
    if not panels:
        raise UserError(f"{report.title} has written fewer than two rows of numbers, which make no curve to draw")
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure: Any = Figure(figsize=(5.2 * columns, 3.1 * rows + 0.5), dpi=_DPI, layout="constrained")
    figure.suptitle(_plain(report.title), fontsize=14)
    FigureCanvasAgg(figure)
    run = report.runs[0] if report.comparison is None else None
    for place, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, place + 1)
        _draw(axes, panel)
        if run is not None and panel.marks:
            for step in dict.fromkeys(run.restarts):
                axes.axvline(step, color="#b3361b", linestyle="--", linewidth=0.9)
            for step in run.checkpoints[:: -(-len(run.checkpoints) // 120) or 1]:
                axes.axvline(step, ymax=0.03, color="#5a6473", linewidth=0.9)
            if run.best_step is not None:
                axes.axvline(run.best_step, color="#0a7a50", linestyle=":", linewidth=1.1)
    figure.savefig(path, format="png")


def _draw(axes: Axes, panel: Panel) -> None:
    for place, curve in enumerate(panel.curves):
        values = [math.nan if value is None else value for value in curve.values]
        faint = curve.trend is not None
        axes.plot(
            curve.steps,
            values,
            alpha=0.3 if faint else 1.0,
            color=_COLOURS[place],
            linestyle=_STYLES[place],
            linewidth=1.4,
            label=None if faint else _plain(curve.name),
        )
        if curve.trend is not None:
            color, style = _COLOURS[place], _STYLES[place]
            axes.plot(*curve.trend, color=color, linestyle=style, linewidth=1.6, label=_plain(curve.name))
    if panel.log:
        axes.set_yscale("log")
    if panel.zero:
        axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    unit = f" ({panel.unit})" if panel.unit else ""
    axes.set_title(_plain(panel.title) + unit, fontsize=10, loc="left")
    axes.set_xlabel(panel.over, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    if len(panel.curves) > 1:
        axes.legend(fontsize=7)


def _plain(text: str) -> str:
    """Return text in which nothing is a formula, nor hidden from a legend by its first character."""
    said = one_line(text).replace("$", r"\$")
    return f" {said}" if said.startswith("_") else said
