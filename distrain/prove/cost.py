"""What deterministic operations cost, where a proof has turned them on."""

from __future__ import annotations

import statistics

from distrain.config import Recipe
from distrain.run.folder import RunDir


def determinism_turned_on(recipe: Recipe, run: RunDir) -> bool:
    """Whether the proof, and not the recipe, turned on deterministic operations in this run."""
    return recipe.train.deterministic == "auto" and bool((run.effect() or {}).get("deterministic"))


def determinism_cost(run: RunDir, without: RunDir) -> str:
    """Return a sentence with the throughput of a run, and of the same run `without` deterministic operations."""
    intro = (
        "train.deterministic was on for this proof; `distrain train` leaves it off on a GPU where the recipe says "
        "auto, and the last bits may then differ from run to run. What it costs here: "
    )
    rates = [_rate(each) for each in (run, without)]
    if not all(rates):
        return intro + "unknown, as too few steps were logged"
    with_it, without_it = rates
    return (
        intro
        + f"{with_it:,.0f} samples/s with it, {without_it:,.0f} without: {without_it / with_it - 1:+.0%} time a step"
    )


def _rate(run: RunDir) -> float:
    """Return the median samples per second of a run; skips the first step, which may compile."""
    rates = [row["samples_per_s"] for row in run.rows() if row["event"] == "train"][1:]
    return statistics.median(rates) if rates else 0.0
