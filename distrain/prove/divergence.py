"""Where two runs part: the first step, what, on which ranks, and both values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from distrain.checkpoint import CheckpointError, Difference, Reader, difference, list_checkpoints
from distrain.checkpoints.comparing import chunks, elements
from distrain.prove.legs import Attempt, Leg
from distrain.prove.traces import Record, Values
from distrain.run.folder import RunDir

ORDER = (
    "start", "ids", "samples", "inputs", "targets", "lr", "loss", "norm", "gradients", "state", "values", "evaluation",
    "checkpoint", "done",
)  # fmt: skip
"""What is compared, causes before their effects; `start` is the state that an attempt starts from, `done` what only one
of the runs did."""

WRITTEN = ", which training writes"
"""What is said of a file that is not read."""

OF_STEPS = ORDER[ORDER.index("ids") : ORDER.index("evaluation")]

IN_WORDS = {
    "start": "the state at the start of an attempt",
    "ids": "the ids of the samples",
    "samples": "a sample, as the data set gives it",
    "inputs": "the inputs of a sample, as the model gets them",
    "targets": "the targets of a sample, as the loss gets them",
    "lr": "the learning rates",
    "loss": "the loss",
    "norm": "the norm of the gradient before clipping",
    "gradients": "the gradient of a tensor",
    "state": "a tensor after the step",
    "values": "what the optimizer keeps besides tensors",
    "evaluation": "an evaluation",
    "checkpoint": "the checkpoint",
    "done": "what was done",
}


@dataclass
class Divergence:
    """The first difference between a run and the straight one."""

    leg: str
    step: int
    """The step (the first is 1) that differs; for `start`, the steps that were done."""
    what: str
    """One of ORDER."""
    subject: str
    """The tensor, sample or key; empty where `what` says all."""
    ranks: list[int]
    """The ranks on which it differs."""
    straight: str
    """What the straight run had there, on the first of these ranks."""
    other: str
    """What this one had."""
    attempt: int = 0
    """Which start of the leg, from 0."""
    resumed_at: int = 0
    """The step that attempt had started at."""
    gap: float | None = None
    """How far apart two numbers are, relative to their size."""
    suspects: list[tuple[str, str, str]] = field(default_factory=list)
    """(path, in the straight run, in this one) of what no checkpoint holds and differed when the step began."""
    files: list[tuple[str, str, str]] = field(default_factory=list)
    """The same of files that the user's code writes and reads, or that were changed between the two runs, as each was
    found when it was first read."""
    more: list[str] = field(default_factory=list)
    """Further tensors, samples or lines."""
    cause: str = ""
    advice: str = ""

    def __str__(self) -> str:
        what = IN_WORDS[self.what] + (f" ({self.subject})" if self.subject else "")
        at = f"with {self.step} steps done" if self.what == "start" else f"in step {self.step}"
        since = f"after the resume at step {self.resumed_at}" if self.attempt else "before any interruption"
        ranks = f", on rank{'s' if len(self.ranks) > 1 else ''} {', '.join(map(str, self.ranks))}" if self.ranks else ""
        width = max(len("straight run"), len(self.leg))
        lines = [
            f"first divergence: {at}, {since}{ranks}: {what}",
            f"  {'straight run':<{width}}  {self.straight}",
            f"  {self.leg:<{width}}  {self.other}",
        ]
        lines += [f"  {line}" for line in self.more[:4]]
        if len(self.more) > 4:
            lines.append(f"  and {len(self.more) - 4} more")
        if self.cause:
            lines.append(f"  {'likely cause':<{width}}  {self.cause}")
        indent = " " * (width + 4)
        shown = [*self.suspects[:4], *self.files[:2]]
        lines += [f"{indent}{path}: {one} in the straight run, {other} here" for path, one, other in shown]
        if self.advice:
            lines.append(f"  {'what to do':<{width}}  {self.advice}")
        return "\n".join(lines)


def earliest(found: list[Divergence]) -> Divergence | None:
    """Return the one that comes first in training; of equals, the cause before its effect."""
    # what an attempt starts from comes after all of the step that it goes on from
    return min(found, key=lambda d: (d.step, len(ORDER) if d.what == "start" else ORDER.index(d.what)), default=None)


# --------------------------------------------------------------------------------------------------------------------
# To the bit


def exact(straight: Leg, other: Leg) -> Divergence | None:
    """Return the first difference of a run in the same placement; every bit counts, also of steps taken twice."""
    reference = straight.attempts[0].record
    found = [
        divergence
        for number, attempt in enumerate(other.attempts)
        if (divergence := _exact_attempt(reference, attempt, number, other.name)) is not None
    ]
    found += _evaluations(straight, other)
    found += _checkpoints(straight, other)
    found += not_done(straight, other)
    first = earliest(found)
    if first is not None and first.attempt < len(other.attempts):
        # for an evaluation or a checkpoint, which are of the whole run, what the last attempt held
        first.suspects = _suspects(reference, other.attempts[first.attempt].record, first)
        first.files = _files(reference, [attempt.record for attempt in other.attempts[: first.attempt + 1]])
    return first


def already_differs(straight: Leg, other: Leg) -> bool:
    """Whether the last attempt of a run has noted something else than the straight run: more attempts add nothing."""
    return _exact_attempt(straight.attempts[0].record, other.attempts[-1], 0, other.name) is not None


def _exact_attempt(reference: Record, attempt: Attempt, number: int, leg: str) -> Divergence | None:
    record = attempt.record

    def divergence(
        step: int, what: str, differing: dict[int, tuple[str, str, str, float | None, list[str]]]
    ) -> Divergence:
        ranks = sorted(differing)
        subject, one, two, gap, more = differing[ranks[0]]
        return Divergence(leg, step, what, subject, ranks, one, two, number, record.start_step, gap, more=more)

    begun = record.start_step
    differing = {}
    for rank, start in record.starts.items():
        then = reference.starts.get(rank) if begun == 0 else reference.steps.get(begun, {}).get(rank)
        if then is None or "state" not in then:
            continue
        if gap := _first_tensor(then["state"] | then.get("between", {}), start["state"]):
            differing[rank] = gap
    if differing:
        return divergence(begun, "start", differing)
    for step in sorted(record.steps):
        for what in OF_STEPS:
            differing = {}
            for rank, noted in record.steps[step].items():
                if gap := _first_gap(what, reference.steps.get(step, {}).get(rank, {}), noted):
                    differing[rank] = gap
            if differing:
                return divergence(step, what, differing)
    return None


Gap = tuple[str, str, str, float | None, list[str]]
"""(subject, in the straight run, in the other, relative distance, further subjects)"""


def _first_gap(what: str, one: Values, two: Values) -> Gap | None:
    """Return how two ranks' notes of a step differ in `what`, if both have it."""
    if what == "values":
        one, two = ({what: _optimizer_values(noted["scalars"])} if "scalars" in noted else {} for noted in (one, two))
    if (
        what not in one
        or what not in two
        or one[what] == two[what]
        or (one[what] != one[what] and two[what] != two[what])
    ):
        return None
    a, b = one[what], two[what]
    if what in ("loss", "norm"):
        return "", repr(a), repr(b), relative(a, b), []
    if what in ("gradients", "state"):
        return _first_tensor(a, b)
    if what in ("samples", "inputs", "targets"):
        return _first_sample(what, one, two)
    if what == "values":
        keys = [key for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]
        return keys[0], _short(a.get(keys[0], "nothing")), _short(b.get(keys[0], "nothing")), None, keys[1:]
    return "", _short(a), _short(b), None, []


def _first_tensor(a: Mapping[str, Any], b: Mapping[str, Any]) -> Gap | None:
    names = [name for name in [*a, *(key for key in b if key not in a)] if _digest(a, name) != _digest(b, name)]
    if not names:
        return None
    # what trains before what is made of it
    names.sort(key=lambda name: (not name.startswith("model/"), name.startswith("ema/")))
    one, two = a.get(names[0]), b.get(names[0])
    gap = relative(one[1], two[1]) if one and two else None
    # what a rank holds a range of is written with where that begins; buffers are whole
    buffer = " (buffer)" if names[0].startswith("model/") and "@" not in names[0] else ""
    return (
        names[0].partition("@")[0] + buffer,
        _of_tensor(one),
        _of_tensor(two),
        gap,
        [n.partition("@")[0] for n in names[1:]],
    )


def _digest(tensors: Mapping[str, Any], name: str) -> str | None:
    return tensors[name][0] if name in tensors else None


def _of_tensor(noted: Any) -> str:
    if noted is None:
        return "no such tensor"
    return f"norm {noted[1]!r} (bits {noted[0]})" if not math.isnan(noted[1]) else f"bits {noted[0]}"


def _first_sample(what: str, one: Values, two: Values) -> Gap:
    rows = [
        (sample, a, b, *workers)
        for ids, first, second, *workers in zip(
            one["ids"], one[what], two[what], one["workers"], two["workers"], strict=True
        )
        for sample, a, b in zip(ids, first, second, strict=True)
        if a != b
    ]
    sample, a, b, worker, its_worker = rows[0]
    said = (
        ("", "") if worker is None else (f", read by loader process {worker}", f", read by loader process {its_worker}")
    )
    more = [f"and {len(rows) - 1} more samples of this step"] if len(rows) > 1 else []
    return f"sample {sample}", f"bits {a}{said[0]}", f"bits {b}{said[1]}", None, more


def _optimizer_values(scalars: Values) -> Values:
    """Return an optimizer's values that are no tensors, by parameter and group."""
    values = {
        f"{name}.{key}": value
        for name, held in scalars.get("optimizer_values", {}).items()
        for key, value in held.items()
    }
    for index, held in enumerate(scalars.get("optimizer_group_values", [])):
        values |= {f"group {index}.{key}": value for key, value in held.items()}
    return values


def _evaluations(straight: Leg, other: Leg) -> Iterator[Divergence]:
    """Yield how the rows of evaluations differ; a run has one for each step, however often it was resumed."""
    ours = {
        (row["step"], row["event"]): row for row in RunDir(straight.run_dir).rows() if row["event"] in ("eval", "final")
    }
    for row in RunDir(other.run_dir).rows():
        mine = ours.get((row["step"], row["event"]))
        if mine is None:
            continue
        keys = [key for key in mine if key not in ("time", "seconds") and mine[key] != row.get(key)]
        if keys:
            a, b = mine[keys[0]], row.get(keys[0])
            number = other.attempt_of(row["step"])
            yield Divergence(
                other.name, row["step"], "evaluation", keys[0], [0], _short(a), _short(b), number,
                other.attempts[number].resumed_at, more=keys[1:],
            )  # fmt: skip


def not_done(straight: Leg, other: Leg) -> Iterator[Divergence]:
    """Yield what only one of two runs did: the first step, the first evaluation; and that they share no checkpoint.

    What was not done in both cannot be compared, so without this a run that did less would agree. A step counts as
    taken where every rank has noted its state.
    """

    def divergence(step: int, subject: str, one: str, two: str, more: Sequence[str] = ()) -> Divergence:
        number = other.attempt_of(step)
        begun = other.attempts[number].resumed_at if other.attempts else 0
        return Divergence(other.name, step, "done", subject, [], one, two, number, begun, more=list(more))

    ours, theirs = _steps_taken(straight), _steps_taken(other)
    if alone := sorted(ours ^ theirs):
        rest = [f"and {len(alone) - 1} more steps that only one of the runs took"] if len(alone) > 1 else []
        held = [
            f"{len(steps)} steps, {'with' if alone[0] in steps else 'without'} step {alone[0]}"
            for steps in (ours, theirs)
        ]
        yield divergence(alone[0], "a step that only one of the runs took on every rank", held[0], held[1], rest)
    scored, its = _evaluated(straight), _evaluated(other)
    if unshared := sorted(scored.keys() ^ its.keys(), key=lambda key: (scored | its)[key]):
        step = (scored | its)[unshared[0]]
        rest = [f"and {len(unshared) - 1} more evaluations that only one has"] if len(unshared) > 1 else []
        said = ["scored after this step" if unshared[0] in each else "not scored" for each in (scored, its)]
        yield divergence(step, "an evaluation that only one of the runs has", said[0], said[1], rest)
    if not shared_checkpoints(straight.run_dir, other.run_dir):
        step = max(ours | theirs, default=0)
        saved, its_saved = _saved_steps(straight.run_dir), _saved_steps(other.run_dir)
        yield divergence(step, "no checkpoint that both runs have", saved, its_saved)


def _steps_taken(leg: Leg) -> set[int]:
    return {
        step
        for attempt in leg.attempts
        for step, ranks in attempt.record.steps.items()
        if sum("state" in noted for noted in ranks.values()) == attempt.record.facts["world_size"]
    }


def _evaluated(leg: Leg) -> dict[tuple[str, str, int], int]:
    """Return the steps of a run's evaluations by what they are; the final one may be of any, whichever was best."""
    return {
        (row["event"], row["split"], row["step"] if row["event"] == "eval" else 0): row["step"]
        for row in RunDir(leg.run_dir).rows()
        if row["event"] in ("eval", "final")
    }


def _saved_steps(run_dir: Path) -> str:
    steps = sorted(info.step for info in list_checkpoints(RunDir(run_dir).checkpoints))
    return f"checkpoints of the steps {', '.join(map(str, steps))}" if steps else "no checkpoint"


def _checkpoints(straight: Leg, other: Leg) -> Iterator[Divergence]:
    """Yield how the checkpoints of the same steps differ, tensor by tensor, the earliest one that does."""
    for step, one, two in shared_checkpoints(straight.run_dir, other.run_dir):
        try:
            found = difference(one, two)
        except CheckpointError as error:
            found = Difference((str(error),), (), ())
        if found.identical:
            continue
        lines = [*found.listing, *map(str, found.tensors)]
        number = other.attempt_of(step)
        begun = other.attempts[number].resumed_at
        if not found.tensors:
            yield Divergence(other.name, step, "checkpoint", "", [], one.name, lines[0], number, begun, more=lines[1:])
            return
        first = found.tensors[0]
        subject, values = element(one, two, first.name)
        yield Divergence(
            other.name, step, "checkpoint", subject, [], *values, number, begun, first.max_rel, more=lines
        )  # fmt: skip
        return


def element(one: Path, other: Path, name: str) -> tuple[str, tuple[str, str]]:
    """Return which element of a tensor is the first that differs in two checkpoints, and its values in words."""
    with Reader(one, verify=False) as a, Reader(other, verify=False) as b:
        for start, *both in chunks(a, b, name):
            x, y = (elements(raw, reader.spec(name).dtype) for raw, reader in zip(both, (a, b), strict=True))
            for place in np.flatnonzero(x != y)[:1]:
                return f"{name}, element {start + int(place)}", (repr(x[place].item()), repr(y[place].item()))
    return name, ("the same values", "the same values, in other bits")


def shared_checkpoints(one: Path, other: Path) -> list[tuple[int, Path, Path]]:
    """Return (step, path, path) of the steps that both runs have saved, in order."""
    ours, theirs = (
        {info.step: info.path for info in list_checkpoints(RunDir(run).checkpoints)} for run in (one, other)
    )
    return [(step, ours[step], theirs[step]) for step in sorted(ours.keys() & theirs.keys())]


def _suspects(reference: Record, record: Record, divergence: Divergence) -> list[tuple[str, str, str]]:
    """Return what no checkpoint holds and was another thing in the two runs when the step began."""
    step = divergence.step if divergence.what != "start" else divergence.step + 1
    after = divergence.what in ("evaluation", "checkpoint")  # which come when the step is done
    found = []
    for rank in divergence.ranks[:1] or [0]:
        before, now = (each.hidden_before(step, rank, after=after) for each in (reference, record))
        for path in sorted(before.keys() | now.keys()):
            one, other = before.get(path, "nothing"), now.get(path, "nothing")
            if one != other:
                found.append((path, one, other))
        # what changes at every step is likelier to matter than what was set once
        changes = reference.hidden_changes(step, rank)
        found.sort(key=lambda suspect: -changes.get(suspect[0], 0))
    return found


def _files(reference: Record, attempts: Sequence[Record]) -> list[tuple[str, str, str]]:
    """Return what the user's code keeps in files: those that it writes and reads, or else what may be such."""
    ours, here = reference.files, attempts[-1].files
    written = {path for record in (reference, *attempts) for path, (_, wrote) in record.files.items() if wrote}
    read: list[tuple[str, str, str]] = []
    kept: list[tuple[str, str, str]] = []
    for path in sorted(ours.keys() | here.keys()):
        one, two = (files.get(path, (None, False))[0] for files in (ours, here))
        if {one, two} == {None, "not there"}:
            continue  # one that a run makes for itself
        pair = (one or "not read", two or "not read")
        if path in written and (one or two):
            read.append((f"the file {path}, which training writes and reads", *pair))
        elif one and two and one != two:
            read.append((f"the file {path}, which something has changed meanwhile", *pair))
        elif path in written and path in ours and path in here:
            kept.append((f"the file {path}{WRITTEN}", *pair))
    return sorted(read, key=lambda file: file[1] == file[2]) or kept


def relative(a: float, b: float) -> float:
    """Return |a - b| relative to the larger of the two."""
    size = max(abs(a), abs(b))
    return abs(a - b) / size if size else 0.0


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
