"""What no section of a recipe can check alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from distrain.config.durations import Duration
from distrain.config.schedules import SCHEDULES_WITH
from distrain.config.sections import LENGTHS, FoldSplit, ScheduleSection

ATTRIBUTES = {"global": "global_batch_size", "micro": "micro_batch_size", "async": "asynchronous"}


@dataclass(frozen=True)
class Known:
    """The parts of a recipe that could be read, so that these are checked even when others could not."""

    sections: Mapping[str, Any]
    """The values of Recipe's fields that could be read."""
    unreadable: Collection[str] = field(default_factory=frozenset)
    """Dotted keys of values that were refused, and are left out of `sections`."""

    def __call__(self, key: str) -> Any:
        """Return the value at a dotted key; raises KeyError where it could not be read."""
        if any(f"{bad}.".startswith(f"{key}.") or f"{key}.".startswith(f"{bad}.") for bad in self.unreadable):
            raise KeyError(key)
        section, _, name = key.partition(".")
        value = self.sections[section]
        return getattr(value, ATTRIBUTES.get(name, name)) if name else value

    def given(self, key: str) -> bool:
        """Whether the recipe itself says what is at `section.field`."""
        section, _, name = key.partition(".")
        return name in self.sections[section].model_fields_set


def disagreements(known: Known) -> list[tuple[str, str]]:
    """Return (dotted key, problem) for each thing that is valid alone and wrong beside the rest of the recipe."""
    problems: list[tuple[str, str]] = []
    for check in _CHECKS:
        try:
            problems += check(known)
        except KeyError:
            continue  # what the check compares could not be read, and is reported for that
    return problems


Problems = Iterator[tuple[str, str]]


def _length(known: Known) -> Problems:
    given = [unit for unit in LENGTHS if known(f"train.{unit}") is not None]
    if len(given) > 1:
        yield "train", f"found {' and '.join(given)}, expected one of them; set the others to null or take them out"
    if not given:
        yield "train", "found none of epochs, steps and tokens, expected one: it says how long to train"


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
            f"found {total}, expected a multiple of batch.micro = {micro}; try {below} or {below + micro}",
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


def _stratify(known: Known) -> Problems:
    if not known("data.stratify"):
        return
    if not isinstance(known("data.split"), list | FoldSplit):
        yield "data.stratify", "found true, but data.split has no fractions or folds to stratify; take it out"
    if (task := known("task")) not in ("classification", "binary"):
        yield "data.stratify", f"found true, but task {task} has no single class for each sample; take it out"


def _schedule(known: Known) -> Problems:
    name = known("schedule.name")
    if not isinstance(known.sections["schedule"], ScheduleSection):
        return  # what a function of the user's own takes is seen in its signature
    for key, names in SCHEDULES_WITH.items():
        if known.given(f"schedule.{key}") and name not in names:
            yield (
                f"schedule.{key}",
                f"does nothing in schedule {name!r}, only in {' and '.join(names)}; take it out",
            )


def _warmup(known: Known) -> Problems:
    phases = {"schedule.warmup": known("schedule.warmup")}
    if known("schedule.name") == "warmup_stable_decay":
        phases["schedule.decay"] = known("schedule.decay")
    amounts = {unit: known(f"train.{unit}") for unit in LENGTHS}
    length = next((Duration(float(amount), unit) for unit, amount in amounts.items() if amount is not None), None)
    for whole in (Duration(100, "%"), length):
        found = {key: phase for key, phase in phases.items() if whole and phase.unit == whole.unit}
        total = math.fsum(phase.amount for phase in found.values())
        # A decay alone may be the whole run; a warm-up may not, as the peak would never be used.
        if whole and (total > whole.amount or (total == whole.amount and list(found) == ["schedule.warmup"])):
            text = " + ".join(f"'{phase}'" for phase in found.values())
            yield next(iter(found)), f"found {text}, expected less than the whole of training, '{whole}'"


def _early_stop(known: Known) -> Problems:
    if known("eval.early_stop") is not None and known("eval.every") is None:
        yield "eval.early_stop", "can never act, as eval.every is null; say how often to evaluate, or set this to null"


def _prepare(known: Known) -> Problems:
    if known("data.prepare") is not None and known("data.path") is None:
        yield "data.prepare", "is called with data.path, which is not given; add data.path or take this out"


def _weights_strict(known: Known) -> Problems:
    if not known("model.weights_strict") and known("model.weights") is None:
        yield "model.weights_strict", "does nothing without model.weights; add that or take this out"


def _anomalies(known: Known) -> Problems:
    spike, leaves_out = known("anomalies.spike"), known("anomalies").leaves_out
    looks, leaves = (
        "anomalies.spike: stop, skip or rollback",
        "anomalies.nonfinite or anomalies.spike: skip or rollback",
    )
    idle = {
        "factor": (spike is None, looks),
        "most": (not leaves_out, leaves),
        "window": (spike is None and not leaves_out, looks),
    }
    for key, (does_nothing, without) in idle.items():
        if known.given(f"anomalies.{key}") and does_nothing:
            yield f"anomalies.{key}", f"does nothing without {without}; add that or take this out"


def _groups(known: Known) -> Problems:
    return _twice("optim.groups", [group.params for group in known("optim.groups")])


def _metrics(known: Known) -> Problems:
    return _twice("eval.metrics", known("eval.metrics") or [])


def _twice(key: str, items: list[Any]) -> Problems:
    for place, item in enumerate(items):
        if (first := items.index(item)) != place:
            yield f"{key}.{place}", f"is the same as {key}.{first}; take one of them out"


_CHECKS: tuple[Callable[[Known], Problems], ...] = (
    _length,
    _batch,
    _split,
    _stratify,
    _schedule,
    _warmup,
    _early_stop,
    _prepare,
    _weights_strict,
    _anomalies,
    _groups,
    _metrics,
)
