"""Checks across the sections of a recipe."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from distrain.config.durations import Duration
from distrain.config.optim_sections import ScheduleSection
from distrain.config.schedules import SCHEDULES_WITH
from distrain.config.sections import LENGTHS, FoldSplit
from distrain.config.tasks import FORMS, unknown_task

ATTRIBUTES = {"global": "global_batch_size", "micro": "micro_batch_size", "async": "asynchronous"}


@dataclass(frozen=True)
class Known:
    """The valid parts of a recipe, which are checked even if others are invalid."""

    sections: Mapping[str, Any]
    """The valid values of Recipe's fields."""
    invalid: Collection[str] = field(default_factory=frozenset)
    """Dotted keys of refused values, which `sections` omits."""

    def __call__(self, key: str) -> Any:
        """Return the value at a dotted key; raises KeyError for an invalid one."""
        if any(f"{bad}.".startswith(f"{key}.") or f"{key}.".startswith(f"{bad}.") for bad in self.invalid):
            raise KeyError(key)
        section, _, name = key.partition(".")
        value = self.sections[section]
        return getattr(value, ATTRIBUTES.get(name, name)) if name else value

    def given(self, key: str) -> bool:
        """Whether the recipe itself sets `section.field`."""
        section, _, name = key.partition(".")
        return name in self.sections[section].model_fields_set


def disagreements(known: Known) -> list[tuple[str, str]]:
    """Return (dotted key, problem) for each value that is valid alone but contradicts the rest of the recipe."""
    problems: list[tuple[str, str]] = []
    for check in _CHECKS:
        try:
            problems += check(known)
        except KeyError:
            continue  # a compared value is invalid, which is reported already
    return problems


Problems = Iterator[tuple[str, str]]


def _length(known: Known) -> Problems:
    given = [unit for unit in LENGTHS if known(f"train.{unit}") is not None]
    if len(given) > 1:
        yield "train", f"found {' and '.join(given)}, expected one of them; set the others to null or remove them"
    if not given:
        yield "train", "found none of epochs, steps and tokens, expected one: the length of training"


def _batch(known: Known) -> Problems:
    total, micro = known("batch.global"), known("batch.micro")
    if micro == "auto":
        return
    if micro > total:
        yield "batch.micro", f"found {micro}, expected at most batch.global = {total}; raise one or lower the other"
    elif total % micro:
        below = total - total % micro
        yield (
            "batch.global",
            f"found {total}, expected a multiple of batch.micro = {micro} times the processes; one process can have "
            f"{below} or {below + micro}",
        )


def _split(known: Known) -> Problems:
    split = known("data.split")
    if isinstance(split, list):
        if len(split) not in (2, 3):
            yield "data.split", f"found {len(split)} fractions, expected [train, test] or [train, valid, test]"
        elif abs(math.fsum(split) - 1) > 1e-9:
            yield (
                "data.split",
                f"found {split}, which sums to {math.fsum(split):.10g}, expected fractions that sum to 1",
            )
    elif isinstance(split, FoldSplit) and split.fold > split.of:
        yield "data.split.fold", f"found {split.fold}, expected a fold from 1 to data.split.of = {split.of}"
    elif isinstance(split, dict) and "train" not in split:
        yield "data.split", f"found {', '.join(split) or 'nothing'}, expected at least 'train' among the splits"


def _task(known: Known) -> Problems:
    if (problem := unknown_task(known("task").name)) is not None:
        yield "task", problem


def _stratify(known: Known) -> Problems:
    if not known("data.stratify"):
        return
    if not isinstance(known("data.split"), list | FoldSplit):
        yield "data.stratify", "found true, but data.split has no fractions or folds to stratify; remove it"
    task = known("task").name
    if task in FORMS and FORMS[task] not in ("classification", "binary"):
        yield "data.stratify", f"found true, but task {task} has no single class for each sample; remove it"


def _schedule(known: Known) -> Problems:
    name = known("schedule.name")
    if not isinstance(known.sections["schedule"], ScheduleSection):
        return  # the signature of a user function is checked where it is called
    for key, names in SCHEDULES_WITH.items():
        if known.given(f"schedule.{key}") and name not in names:
            yield f"schedule.{key}", f"does nothing in schedule {name!r}, only in {' and '.join(names)}; remove it"


def _warmup(known: Known) -> Problems:
    phases = {"schedule.warmup": known("schedule.warmup")}
    if known("schedule.name") == "warmup_stable_decay":
        phases["schedule.decay"] = known("schedule.decay")
    amounts = {unit: known(f"train.{unit}") for unit in LENGTHS}
    length = next((Duration(float(amount), unit) for unit, amount in amounts.items() if amount is not None), None)
    for run in (Duration(100, "%"), length):
        found = {key: phase for key, phase in phases.items() if run and phase.unit == run.unit}
        total = math.fsum(phase.amount for phase in found.values())
        # a decay alone may take the entire run; a warm-up may not, as it would never use the peak
        if run and (total > run.amount or (total == run.amount and list(found) == ["schedule.warmup"])):
            text = " + ".join(f"'{phase}'" for phase in found.values())
            yield next(iter(found)), f"found {text}, expected less than the length of training, '{run}'"


def _early_stop(known: Known) -> Problems:
    if known("eval.early_stop") is not None and known("eval.every") is None:
        yield "eval.early_stop", "can never act, as eval.every is null; say how often to evaluate, or set this to null"


def _prepare(known: Known) -> Problems:
    if known("data.prepare") is not None and known("data.path") is None:
        yield "data.prepare", "is called with data.path, which is not given; add data.path or remove this"


def _weights_strict(known: Known) -> Problems:
    if not known("model.weights_strict") and known("model.weights") is None:
        yield "model.weights_strict", "does nothing without model.weights; add that or remove this"


def _anomalies(known: Known) -> Problems:
    for key in known("anomalies").unused:
        if known.given(f"anomalies.{key}"):
            needed = "nonfinite or anomalies.spike: skip" if key == "max_skips" else "spike: stop, skip"
            yield f"anomalies.{key}", f"does nothing without anomalies.{needed} or rollback; add that or remove this"


def _tune(known: Known) -> Problems:
    if known("train.precision") == "tf32" and known("tune.tf32") is False:
        yield "tune.tf32", "found false, but train.precision is tf32; take fp32, or remove this"


def _groups(known: Known) -> Problems:
    optim = known.sections["optim"]
    if not isinstance(optim, Mapping):
        yield from _twice("optim.groups", [group.params for group in known("optim.groups")])
        return
    for name, part in optim.items():
        yield from _twice(f"optim.{name}.groups", [group.params for group in part.groups])


def _optimizers(known: Known) -> Problems:
    parts = known.sections["optim"]
    if not isinstance(parts, Mapping):
        return
    if (slowest := min((part.every for part in parts.values()), default=1)) > 1:
        yield (
            "optim",
            f"each has an `every` of {slowest} or more, expected 1 for at least one: a step must train something",
        )
    for name, part in parts.items():
        if part.layer_decay is not None:
            yield (
                f"optim.{name}.layer_decay",
                "is found by the depth of a whole model, and this optimizer trains a part of one; give it groups with "
                "lr_scale instead",
            )
        if part.schedule is not None:
            inner = Known({"schedule": part.schedule, "train": known("train")}, known.invalid)
            for key, problem in (*_schedule(inner), *_warmup(inner)):
                yield f"optim.{name}.{key}", problem


def _metrics(known: Known) -> Problems:
    return _twice("eval.metrics", known("eval.metrics") or [])


def _twice(key: str, items: list[Any]) -> Problems:
    for place, item in enumerate(items):
        if (first := items.index(item)) != place:
            yield f"{key}.{place}", f"is the same as {key}.{first}; remove one of them"


_CHECKS: tuple[Callable[[Known], Problems], ...] = (
    _length,
    _batch,
    _task,
    _split,
    _stratify,
    _schedule,
    _warmup,
    _early_stop,
    _prepare,
    _weights_strict,
    _anomalies,
    _tune,
    _groups,
    _optimizers,
    _metrics,
)
