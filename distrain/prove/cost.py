"""What deterministic operations cost, where a proof has turned them on."""

from __future__ import annotations

import statistics

from distrain.config import Recipe
from distrain.run.folder import RunDir


def turned_on(recipe: Recipe, run: RunDir) -> bool:
    """Whether a proof, and not its recipe, had the run take deterministic operations alone."""
    return recipe.train.deterministic == "auto" and bool((run.effect() or {}).get("deterministic"))


def cost_in_words(run: RunDir, without: RunDir) -> str:
    """Return how fast the run was, and how fast the same run `without` deterministic operations."""
    said = (
        "train.deterministic was on for this proof; `distrain train` leaves it off on a GPU where the recipe says "
        "auto, and the last bits may then differ from start to start. What it costs here: "
    )
    rates = [_rate(each) for each in (run, without)]
    if not all(rates):
        return said + "not known, as too few steps were logged"
    with_it, without_it = rates
    return (
        said
        + f"{with_it:,.0f} samples/s with it, {without_it:,.0f} without: {without_it / with_it - 1:+.0%} time a step"
    )


def _rate(run: RunDir) -> float:
    """Return the median of the samples per second of a run; the first step, which may compile, is left out."""
    rates = [row["samples_per_s"] for row in run.rows() if row["event"] == "train"][1:]
    return statistics.median(rates) if rates else 0.0
