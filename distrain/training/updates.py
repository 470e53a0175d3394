"""What a run depends on, compared with the checkpoint that it resumes from: a change is refused, or recorded.

A change of the recipe was let in when the run was opened; what changed of data, code and weights is seen here. What a
person has let in with `--update` stays let in, also for an attempt that resumes from the same checkpoint once more.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Any

from distrain.checkpoint import Manifest
from distrain.config import Recipe, UserError, is_object_spec
from distrain.config.yaml import parse_recipe, shown_value
from distrain.config.yaml.strict_yaml import dotted, leaves
from distrain.data import fitted_keys, is_outdated
from distrain.datasets.base import Data
from distrain.fingerprints import DRAWN_ANEW, Changes, compare, fingerprint
from distrain.run.folder import RunDir
from distrain.run.json_files import rows_backwards
from distrain.system.numbers import counted

EVENT = "update"
"""A row of metrics.jsonl and attempts.jsonl for a start under another recipe, or on other data or code: `recipe` {key:
{from, to}}, `inputs` a line for each change."""

_ADVICE = (
    "Put it back as it was, choose another --run-dir for a new run, or --update to continue with what is there now."
)
_CHANGING = (
    "samples of {} are others each time that they are read: they depend on what was read before, so a resume, loader "
    "processes or another number of processes mean other samples. Draw by the global generators of random, numpy and "
    "torch, which distrain seeds before each item, or by a generator that is made anew from the sample's number"
)
_KEPT = (
    "the data changed, and what the run fitted to its training split when it began (statistics, categories, "
    "vocabularies, counts of classes) stays as it was, as its model was trained with it: new words and categories are "
    "unknown ones"
)


@dataclass(frozen=True)
class Inputs:
    """What a start depends on, and how that differs from what its checkpoint was trained with."""

    fingerprint: dict[str, Any]
    """What is stored in its checkpoints."""
    update: dict[str, Any] | None = None
    """The row of an update that is not recorded yet."""
    lines: list[str] = field(default_factory=list)
    """The same in words."""

    def with_change(self, line: str, step: int) -> Inputs:
        """Return these with one more change that was let in, of a run that resumes from `step`."""
        row = self.update or {"event": EVENT, "step": step, "recipe": {}, "inputs": [], "time": time.time()}
        return replace(self, update=row | {"inputs": [*row["inputs"], line]})


def take_inputs(
    run: RunDir, recipe: Recipe, data: Data, total_steps: int, resumed: Manifest | None, *, items: bool
) -> Inputs:
    """Rank 0: return what this start depends on. Raises UserError for a change that nobody has let in.

    `items`: whether samples are counted, and looked at where no files are known that they come from.
    """
    found = fingerprint(recipe, data, total_steps, run.path, items=items)
    allowed = run.update_path.exists()
    changing = [f"warning: {_CHANGING.format(' and '.join(names))}"] if (names := found.pop("changing", [])) else []
    if resumed is None:
        accept(run, found)
        return Inputs(found, lines=changing)
    # a checkpoint may be older than fingerprints are, or imported
    then: dict[str, Any] = resumed.scalars.get("inputs") or run.inputs() or {}
    old = _recipe_of(resumed.recipe)
    values = _recipe_changes(old, recipe)
    lines = _changes(then, found, total_steps=not values)
    if lines and not allowed and _changes(run.inputs() or then, found, total_steps=not values):
        raise UserError(_refusal(run, recipe, resumed.step, compare(then, found), lines))
    accept(run, found)
    words = [
        f"updated  {key}: was {shown_value(key, change['from'])}, now {shown_value(key, change['to'])}"
        for key, change in values.items()
    ]
    words += [f"updated  {line}" for line in lines]
    changes = compare(then, found)
    words += [f"warning: {line}" for line in changes.unsure]
    if changes.data and is_outdated(recipe, resumed.scalars["data"]):
        words.append(f"warning: {_KEPT}")
    words += changing + _consequences(values, recipe, total_steps, resumed)
    if not then and "imported_from" not in resumed.scalars:
        words.append("the checkpoint does not say what data and code it was trained with, so they are not compared")
    row = {"event": EVENT, "step": resumed.step, "recipe": values, "inputs": lines}
    before = noted(run, resumed.step) or {"recipe": {}, "inputs": []}
    same = all(before.get(key) == row[key] for key in ("recipe", "inputs"))
    return Inputs(found, None if same else {**row, "time": time.time()}, words)


def check_fitted(recipe: Recipe, resumed: Manifest) -> None:
    """Raise UserError for changed keys of the data that would change nothing, as the run keeps what it has fitted."""
    old = _recipe_of(resumed.recipe)
    if old is None or not (keys := fitted_keys(recipe, old.data, resumed.scalars["data"])):
        return
    was, now = ({"name": each.data.name, **each.data.args} for each in (old, recipe))
    words = [
        "the recipe changes what is fitted to the training split when a run begins (statistics, categories, classes, "
        "vocabularies), and this run keeps what its model was trained with:",
        *(f"  data.{key}: was {was.get(key)}, now {now.get(key)}" for key in keys),
        "Put it back as it was (with --update), or choose another --run-dir for a new run.",
    ]
    raise UserError("\n".join(words))


def check_average(recipe: Recipe, resumed: Manifest) -> None:
    """Raise UserError where the recipe asks for an average that the run's checkpoints do not hold."""
    if recipe.train.ema is None or any(spec.role == "ema" for spec in resumed.specs.values()):
        return
    raise UserError(
        f"train.ema is {recipe.train.ema:g}, and the checkpoint of step {resumed.step} holds no average of the "
        "weights: one begins with the run. Put it back as it was (train.ema=null, with --update), or choose another "
        "--run-dir for a new run, which model.weights can begin with these weights."
    )


def noted(run: RunDir, step: int) -> dict[str, Any] | None:
    """Return the newest update on record, where that is one of a start from `step`.

    Ignores attempts before the newest one that resumed from an earlier step.
    """
    for row in rows_backwards(run.attempts_path):
        if row.get("event") == EVENT:
            return row if row["step"] == step else None
        if row["step"] < step:
            return None
    return None


def accept(run: RunDir, found: dict[str, Any]) -> None:
    """Record what this attempt depends on; a later one that finds the same may resume."""
    run.record_inputs(found)
    run.update_path.unlink(missing_ok=True)


def _changes(then: dict[str, Any], found: dict[str, Any], *, total_steps: bool) -> list[str]:
    lines = compare(then, found).lines
    before, after = then.get("total_steps"), found["total_steps"]
    # another recipe may make another number of steps of the same data
    if total_steps and None not in (before, after) and before != after:
        lines.append(f"total steps: {before:,} -> {after:,}")
    return lines


def _refusal(run: RunDir, recipe: Recipe, step: int, changes: Changes, lines: list[str]) -> str:
    kinds = {"data": changes.data, "code files": changes.code, "model's files": changes.model}
    changed = " and ".join(kind for kind, found in kinds.items() if found) or "number of steps"
    words = [f"the {changed} changed since {run.path} was trained to step {step}:", *(f"  {line}" for line in lines)]
    words += [DRAWN_ANEW] if changes.data and not isinstance(recipe.data.split, dict) else []
    return "\n".join([*words, _ADVICE])


def _recipe_of(text: str) -> Recipe | None:
    """Return the recipe of a checkpoint; None where it was imported without one, or has keys of another version."""
    try:
        return parse_recipe(text, "the checkpoint's recipe") if text else None
    except UserError:
        return None


def _recipe_changes(old: Recipe | None, recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Return the values that differ from those of the recipe in a checkpoint, {key: {from, to}}."""
    if old is None:
        return {}
    before, after = (
        {dotted(place): value for place, value in leaves(each.model_dump(mode="json"))} for each in (old, recipe)
    )
    return {
        key: {"from": before.get(key), "to": after.get(key)}
        for key in sorted(before.keys() | after.keys())
        if _place_apart(before.get(key)) != _place_apart(after.get(key))
    }


def _consequences(values: dict[str, dict[str, Any]], recipe: Recipe, total_steps: int, resumed: Manifest) -> list[str]:
    """Return warnings of what changed values of a recipe mean for a run that resumes from a checkpoint."""
    words, step = [], resumed.step
    before, after = (values.get("batch.global", {}).get(key) for key in ("from", "to"))
    if isinstance(before, int) and isinstance(after, int) and step:
        # the samples of a step follow from its number
        done, begin = step * before, step * after
        what = "are skipped" if begin > done else "are taken again"
        words.append(
            f"{step:,} steps of batch.global {before:,} have taken {done:,} samples, and the next step of {after:,} "
            f"begins after {begin:,}: the {abs(begin - done):,} between {what}, and rows count samples and epochs as "
            f"if all steps had been of {after:,}"
        )
    if values and total_steps < step:
        words.append(
            f"the run now has {counted(total_steps, 'step')} and has made {step:,}, so nothing is left to train"
        )
    drawn = [key for key in values if key in ("seed", "data.stratify") or key.startswith("data.split")]
    if drawn and not isinstance(recipe.data.split, dict):
        words.append(f"{' and '.join(drawn)} changed. {DRAWN_ANEW}")
    kept = ("optimizer_group_values", "optimizer_group_nested")
    held = {key for name in kept for group in resumed.scalars.get(name) or () for key in group} - {"lr"}
    words += [
        f"{key} changed, without effect where a callback or the optimizer has changed a group's {setting}, which lasts"
        for key in values
        if key.startswith("optim.") and (setting := key.rpartition(".")[2]) in held
    ]
    if "model.weights" in values:
        words.append("model.weights changed, and a resumed run reads none: it has the weights of its checkpoint")
    if "seed" in values:
        words.append("seed changed, and with it the order: of this epoch some samples are taken again and others never")
    return [f"warning: {text}" for text in words]


def _place_apart(value: Any) -> Any:
    """Return a value without the folder of a file of code: `distrain submit` trains with a copy of it."""
    if isinstance(value, str) and is_object_spec(value) and (where := value.rpartition(":")[0]).endswith(".py"):
        return value[where.rfind("/") + 1 :]
    return value
