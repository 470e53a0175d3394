"""Which evaluations a run is compared with when it resumes, and what cannot be known of them any more.

A checkpoint says what its numbers are numbers of, and how far the ranking had come. Under another metric, direction,
split or other data a new ranking begins, from the checkpoints that are there and have a number by it. Checkpoints of
before that knew a bare score: for them the rows of metrics.jsonl are read, once.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import xxhash

from distrain.checkpoint import CheckpointError, Criterion, Evaluation, Manifest, list_checkpoints, read_manifest
from distrain.checkpoints.format import canonical_json
from distrain.config import Recipe, UserError
from distrain.datasets.base import Data, is_stream
from distrain.fingerprints import compare
from distrain.metrics import MetricSet, higher_is_better
from distrain.run.folder import RunDir
from distrain.training.intervals import EvalHistory

logger = logging.getLogger(__name__)

_NO_DATA = ("workers", "prepare", "skip_corrupt")
"""Keys of the data section that change nothing in a split."""


def scored_split(data: Data) -> str | None:
    """Return the split that is scored during training."""
    return next((name for name in ("valid", "test") if name in data.splits), None)


def data_since(resumed: Manifest | None, fingerprint: dict[str, Any]) -> int:
    """Return the step from which on the data are what they are now; 0 where they never were changed.

    `fingerprint`: what this start depends on.
    """
    if resumed is None:
        return 0
    if compare(resumed.scalars.get("inputs") or {}, fingerprint).data:
        return resumed.step
    since = (resumed.history or {}).get("data_since", 0)
    return since if type(since) is int else 0


def criterion_for(recipe: Recipe, metrics: MetricSet, data: Data, since: int = 0) -> Criterion:
    """Return what decides which checkpoint of a run is the best; `since` is what `data_since` returned."""
    wanted, split = recipe.eval.best or "loss", scored_split(data)
    section = recipe.data.model_dump(mode="json")
    what: dict[str, Any] = {key: value for key, value in section.items() if key not in _NO_DATA}
    what["path"] = str(what.get("path") or "").rpartition("/")[2]  # a project may be moved as a whole
    what["transforms"] = section["transforms"]["eval"]
    source = data.splits.get(split) if split is not None else None
    size = len(source) if source is not None and not is_stream(source) else None
    digest = xxhash.xxh3_64_hexdigest(canonical_json([what, recipe.seed, size, since]))
    return Criterion(wanted.removeprefix("-"), higher_is_better(wanted, metrics), split, digest)


def evaluation_of(criterion: Criterion, metrics: MetricSet, values: dict[str, Any] | None) -> Evaluation:
    """Return what a checkpoint keeps of an evaluation: the numbers that can decide, now or under another recipe.

    There are none where the loss is not finite.
    """
    directions = {name: metric.higher_is_better for name, metric in metrics.metrics.items() if metric.scalar}
    directions["loss"] = False
    directions.setdefault(criterion.metric, criterion.higher)  # a mean that a task of one's own reports
    if values is not None and criterion.metric not in values:
        means = [name for name, value in values.items() if isinstance(value, float)]
        raise UserError(f"eval.best: {criterion.metric!r} is not among what was evaluated: {', '.join(means)}")
    sound = values is not None and math.isfinite(values["loss"])
    numbers = {
        name: float(value)
        for name in directions
        if sound and values is not None and (value := _number(values, name)) is not None and name not in metrics.caveats
    }
    return Evaluation(criterion, numbers, {name: higher for name, higher in directions.items() if higher is not None})


def _number(row: dict[str, Any], name: str) -> float | None:
    """Return a value of an evaluation or its row, in which NaN is text; None where it is no finite number."""
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def resume_ranking(
    run: RunDir, criterion: Criterion, min_delta: float, resumed: Manifest | None
) -> tuple[EvalHistory, dict[str, float | None]]:
    """Rank 0: return the ranking that a run resumes, and scores of its checkpoints; logs what a person should know.

    `resumed`: the checkpoint that the run resumes from.
    """
    best = EvalHistory(criterion, min_delta)
    if resumed is None:
        return best, {}
    then = resumed.evaluation.criterion if resumed.evaluation is not None else None
    if then == criterion and resumed.history is not None:
        try:
            best.load(resumed.history["best"], min_delta)
            return best, {name: score for name, score in resumed.history["scores"].items() if type(score) is float}
        except (AttributeError, KeyError, TypeError, ValueError):
            then, best = None, EvalHistory(criterion, min_delta)
    there = [info for info in list_checkpoints(run.checkpoints) if info.step <= resumed.step]
    manifests = {}
    for info in there:
        try:
            manifests[info.path.name] = read_manifest(info.path)
        except CheckpointError:  # resuming says what is wrong with it
            continue
    scores = {name: manifest.score_by(criterion) for name, manifest in manifests.items()}
    bare = [name for name, manifest in manifests.items() if manifest.evaluation is None and manifest.score is not None]
    before: dict[str, float | None] = {}
    same = then == criterion if then is not None else resumed.metric in (criterion.metric, None)
    if bare or then is None:
        rows = _evaluations(run, criterion, resumed.step)
        for name in bare:
            score = rows.get(manifests[name].step)
            known = score is not None and math.isfinite(score)
            before[name] = scores[name] = (
                (score if criterion.higher else -score) if known and score is not None else None
            )
        if same:  # a run of before checkpoints said it
            for step, score in sorted(rows.items()):
                best.add(step, score)
            return best, before
    if not same:
        was = str(then) if then is not None else resumed.metric
        of = "other data" if was == str(criterion) else f"{was}, and is {criterion} from here on"
        logger.info(f"the best was chosen by {of}: a new ranking begins")
    ranked = sorted(
        (manifests[name].step, score if criterion.higher else -score)
        for name, score in scores.items()
        if score is not None
    )
    for step, score in ranked:
        best.add(step, score)
    best.since, best.count = 0, len(ranked)
    unknown = sorted(
        manifests[name].step
        for name, score in scores.items()
        if score is None
        and (manifests[name].score is not None or ((found := manifests[name].evaluation) and found.values))
    )
    if best.best is not None:
        logger.info(f"of the checkpoints that are there, step {best.best[0]} is the best by it ({best.best[1]:.4g})")
    if unknown:
        logger.warning(
            f"of the checkpoints of steps {', '.join(map(str, unknown))} the {criterion.metric} by which the "
            "best is chosen now is not known, so none of them is taken for the best"
        )
    return best, before


def _evaluations(run: RunDir, criterion: Criterion, step: int) -> dict[int, float]:
    """Return {step: value} of the evaluations up to a step, from the rows; NaN where one has none."""
    found: dict[int, float] = {}
    for row in run.rows():
        # a recipe that was changed may ask for a metric that was not computed before
        scored = row["event"] == "eval" and row["step"] <= step and criterion.metric in row
        if scored and row.get("split") in (criterion.split, None):
            number = _number(row, criterion.metric)
            found[row["step"]] = math.nan if number is None else number
    return found
