"""The first difference between two runs: its step, what differs, on which ranks, and both values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from distrain.checkpoint import CheckpointError, Difference, Reader, difference, list_checkpoints
from distrain.checkpoints.comparing import chunks, elements
from distrain.prove.traces import AttemptTrace, Values
from distrain.prove.trial_runs import TrialRun
from distrain.run.folder import RunDir
from distrain.system.numbers import counted

ORDER = (
    "start", "ids", "samples", "inputs", "targets", "lr", "loss", "norm", "gradients", "state", "values", "evaluation",
    "checkpoint", "done",
)  # fmt: skip
"""What is compared, causes before their effects; `start` is the state at the start of an attempt or after a rollback,
`done` what only one of the runs did."""

WRITTEN_ONLY = ", which training writes"
"""Suffix for a file that training writes and never reads."""

COMPARED_EACH_STEP = ORDER[ORDER.index("ids") : ORDER.index("evaluation")]

DESCRIPTIONS = {
    "start": "the state at the start of an attempt, or after a rollback",
    "ids": "the ids of the samples",
    "samples": "a sample, as the data set gives it",
    "inputs": "the inputs of a sample, as the model gets them",
    "targets": "the targets of a sample, as the loss gets them",
    "lr": "the learning rates",
    "loss": "the loss",
    "norm": "the norm of the gradient before clipping",
    "gradients": "the gradient of a tensor",
    "state": "a tensor after the step",
    "values": "the optimizer's state besides tensors",
    "evaluation": "an evaluation",
    "checkpoint": "the checkpoint",
    "done": "the work done",
}


@dataclass
class Divergence:
    """The first difference between a run and its baseline."""

    trial: str
    """Name of the run that differs."""
    step: int
    """The step (the first is 1) that differs; for `start`, the number of steps done."""
    what: str
    """One of ORDER."""
    subject: str
    """The tensor, sample or key; empty where `what` is enough."""
    ranks: list[int]
    """The ranks on which it differs."""
    baseline: str
    """The value in the baseline run, on the first of these ranks."""
    other: str
    """The value in this run."""
    attempt: int = 0
    """Index of the attempt, from 0."""
    resumed_at: int = 0
    """The step that attempt resumed from."""
    gap: float | None = None
    """Relative difference of two numbers, where numbers differ."""
    suspects: list[tuple[str, str, str]] = field(default_factory=list)
    """(path, in the baseline run, here) of state that no checkpoint holds and that differed before the step."""
    files: list[tuple[str, str, str]] = field(default_factory=list)
    """(path, in the baseline run, here) of files that the user's code writes and reads, or that were changed between
    the two runs, as they were when first read."""
    more: list[str] = field(default_factory=list)
    """Further tensors, samples or lines that differ."""
    cause: str = ""
    advice: str = ""

    def __str__(self) -> str:
        what = DESCRIPTIONS[self.what] + (f" ({self.subject})" if self.subject else "")
        at = f"with {counted(self.step, 'step')} done" if self.what == "start" else f"in step {self.step}"
        when = f"after the resume at step {self.resumed_at}" if self.attempt else "before any interruption"
        ranks = f", on rank{'s' if len(self.ranks) > 1 else ''} {', '.join(map(str, self.ranks))}" if self.ranks else ""
        width = max(len("baseline run"), len(self.trial))
        lines = [
            f"first divergence: {at}, {when}{ranks}: {what}",
            f"  {'baseline run':<{width}}  {self.baseline}",
            f"  {self.trial:<{width}}  {self.other}",
        ]
        lines += [f"  {line}" for line in self.more[:4]]
        if len(self.more) > 4:
            lines.append(f"  and {len(self.more) - 4} more")
        if self.cause:
            lines.append(f"  {'likely cause':<{width}}  {self.cause}")
        indent = " " * (width + 4)
        shown = [*self.suspects[:4], *self.files[:2]]
        lines += [f"{indent}{path}: {one} in the baseline run, {other} here" for path, one, other in shown]
        if self.advice:
            lines.append(f"  {'what to do':<{width}}  {self.advice}")
        return "\n".join(lines)


def divergence_in(
    trial: TrialRun,
    step: int,
    what: str,
    subject: str,
    baseline: str,
    other: str,
    *,
    number: int | None = None,
    ranks: Sequence[int] = (),
    gap: float | None = None,
    more: Sequence[str] = (),
) -> Divergence:
    """Return a divergence of a trial run in its attempt `number`, by default the last one that took the step."""
    number = trial.attempt_of(step) if number is None else number
    resumed_at = trial.attempts[number].resumed_at if trial.attempts else 0
    return Divergence(
        trial.name, step, what, subject, list(ranks), baseline, other, number, resumed_at, gap, more=list(more)
    )


def earliest(found: list[Divergence]) -> Divergence | None:
    """Return the divergence that comes first in training; within a step, the cause before its effect."""
    # the state at the start of an attempt comes after everything of the step it resumes from
    return min(found, key=lambda d: (d.step, len(ORDER) if d.what == "start" else ORDER.index(d.what)), default=None)


# --------------------------------------------------------------------------------------------------------------------
# To the bit


def compare_exactly(baseline: TrialRun, other: TrialRun) -> Divergence | None:
    """Return the first difference of a run in the same topology; every bit counts, also in steps taken twice."""
    reference = baseline.attempts[0].trace
    compared = (_compare_attempt(reference, other, number) for number in range(len(other.attempts)))
    found = [divergence for divergence in compared if divergence is not None]
    found += _compare_evaluations(baseline, other)
    found += _compare_checkpoints(baseline, other)
    found += one_sided(baseline, other)
    first = earliest(found)
    if first is not None and first.attempt < len(other.attempts):
        # evaluations and checkpoints are of the run: compare the hidden state of its last attempt
        first.suspects = _suspects(reference, [attempt.trace for attempt in other.attempts], first)
        first.files = _files(reference, [attempt.trace for attempt in other.attempts[: first.attempt + 1]])
    return first


def already_differs(baseline: TrialRun, other: TrialRun) -> bool:
    """Whether the trace of the last attempt differs from the baseline run: more attempts add nothing."""
    return _compare_attempt(baseline.attempts[0].trace, other, len(other.attempts) - 1) is not None


def _compare_attempt(reference: AttemptTrace, trial: TrialRun, number: int) -> Divergence | None:
    trace = trial.attempts[number].trace

    def divergence(step: int, what: str, differing: dict[int, Mismatch]) -> Divergence:
        ranks = sorted(differing)
        subject, one, two, gap, more = differing[ranks[0]]
        return divergence_in(trial, step, what, subject, one, two, number=number, ranks=ranks, gap=gap, more=more)

    for starts in trace.begun():
        differing: dict[int, Mismatch] = {}
        for rank, start in starts.items():
            step = start["step"]
            then = [reference.starts[rank]] if step == 0 and rank in reference.starts else reference.records(step, rank)
            states = [each["state"] | each.get("between", {}) for each in then if "state" in each]
            gaps = [_first_tensor(state, start["state"]) for state in states]
            if gaps and gaps[0] is not None and all(gaps):
                differing[rank] = gaps[0]
        if differing:
            return divergence(step, "start", differing)
    for step in trace.recorded():
        for what in COMPARED_EACH_STEP:
            differing = {}
            for rank in trace.starts:
                for entry in trace.records(step, rank):
                    if gap := _mismatch_of_all(what, reference.records(step, rank), entry):
                        differing[rank] = gap
            if differing:
                return divergence(step, what, differing)
    return None


Mismatch = tuple[str, str, str, float | None, list[str]]
"""(subject, value in the baseline run, value in the other, relative difference, further subjects)"""


def _mismatch_of_all(what: str, passes: Sequence[Values], entry: Values) -> Mismatch | None:
    """Return how an entry differs from the last pass of a step, where it is like none of those that have `what`."""
    having = [each for each in passes if ("scalars" if what == "values" else what) in each]
    gaps = [_first_mismatch(what, each, entry) for each in having]
    return gaps[0] if gaps and all(gaps) else None


def _first_mismatch(what: str, one: Values, two: Values) -> Mismatch | None:
    """Return how the traces of two ranks differ in `what` at a step, if both have it."""
    if what == "values":
        one, two = ({what: _optimizer_values(entry["scalars"])} if "scalars" in entry else {} for entry in (one, two))
    if what not in one or what not in two:
        return None
    a, b = one[what], two[what]
    if a == b or (a != a and b != b):
        return None
    if what in ("loss", "norm"):
        return "", repr(a), repr(b), relative_difference(a, b), []
    if what in ("gradients", "state"):
        return _first_tensor(a, b)
    if what in ("samples", "inputs", "targets"):
        return _first_sample(what, one, two)
    if what == "values":
        keys = [key for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]
        return keys[0], _truncated(a.get(keys[0], "nothing")), _truncated(b.get(keys[0], "nothing")), None, keys[1:]
    return "", _truncated(a), _truncated(b), None, []


def _first_tensor(a: Mapping[str, Any], b: Mapping[str, Any]) -> Mismatch | None:
    names = [name for name in [*a, *(key for key in b if key not in a)] if _digest(a, name) != _digest(b, name)]
    if not names:
        return None
    # weights before their averages and the optimizer's state
    names.sort(key=lambda name: (not name.startswith("model/"), name.startswith("ema/")))
    one, two = a.get(names[0]), b.get(names[0])
    gap = relative_difference(one[1], two[1]) if one and two else None
    # a shard's name ends with its offset; buffers are not sharded
    buffer = " (buffer)" if names[0].startswith("model/") and "@" not in names[0] else ""
    return (
        names[0].partition("@")[0] + buffer,
        _describe_tensor(one),
        _describe_tensor(two),
        gap,
        [n.partition("@")[0] for n in names[1:]],
    )


def _digest(tensors: Mapping[str, Any], name: str) -> str | None:
    return tensors[name][0] if name in tensors else None


def _describe_tensor(entry: Any) -> str:
    if entry is None:
        return "no such tensor"
    return f"norm {entry[1]!r} (bits {entry[0]})" if not math.isnan(entry[1]) else f"bits {entry[0]}"


def _first_sample(what: str, one: Values, two: Values) -> Mismatch:
    rows = [
        (sample, a, b, *workers)
        for ids, first, second, *workers in zip(
            one["ids"], one[what], two[what], one["workers"], two["workers"], strict=True
        )
        for sample, a, b in zip(ids, first, second, strict=True)
        if a != b
    ]
    sample, a, b, worker, other_worker = rows[0]
    one_reader, two_reader = (
        "" if worker is None else f", read by loader process {number}" for number in (worker, other_worker)
    )
    more = [f"and {len(rows) - 1} more samples of this step"] if len(rows) > 1 else []
    return f"sample {sample}", f"bits {a}{one_reader}", f"bits {b}{two_reader}", None, more


def _optimizer_values(scalars: Values) -> Values:
    """Return an optimizer's values other than tensors, by parameter and group."""
    values = {
        f"{name}.{key}": value
        for name, held in scalars.get("optimizer_values", {}).items()
        for key, value in held.items()
    }
    for index, held in enumerate(scalars.get("optimizer_group_values", [])):
        values |= {f"group {index}.{key}": value for key, value in held.items()}
    return values


def _compare_evaluations(baseline: TrialRun, other: TrialRun) -> Iterator[Divergence]:
    """Yield how the evaluations of two runs differ; a run has one for each step, however often it was resumed."""
    ours = {
        (row["step"], row["event"]): row for row in RunDir(baseline.run_dir).rows() if row["event"] in ("eval", "final")
    }
    for row in RunDir(other.run_dir).rows():
        mine = ours.get((row["step"], row["event"]))
        if mine is None:
            continue
        keys = [key for key in mine if key not in ("time", "seconds") and mine[key] != row.get(key)]
        if keys:
            values = _truncated(mine[keys[0]]), _truncated(row.get(keys[0]))
            yield divergence_in(other, row["step"], "evaluation", keys[0], *values, ranks=[0], more=keys[1:])


def one_sided(baseline: TrialRun, other: TrialRun) -> Iterator[Divergence]:
    """Yield the first step and the first evaluation that only one of two runs has, and that they share no checkpoint.

    What only one run has cannot be compared, so without this a run that did less would agree. A step counts as taken
    where every rank recorded its state.
    """

    steps, other_steps = _steps_taken(baseline), _steps_taken(other)
    if unshared_steps := sorted(steps ^ other_steps):
        first, *further = unshared_steps
        values = [
            f"{counted(len(taken), 'step')}, {'with' if first in taken else 'without'} step {first}"
            for taken in (steps, other_steps)
        ]
        rest = [f"and {len(further)} more steps that only one of the runs took"] if further else []
        yield divergence_in(
            other, first, "done", "a step that only one of the runs took on every rank", *values, more=rest
        )
    evaluated, other_evaluated = _evaluated(baseline), _evaluated(other)
    every = evaluated | other_evaluated
    if unshared := sorted(evaluated.keys() ^ other_evaluated.keys(), key=lambda key: every[key]):
        values = [
            "evaluated after this step" if unshared[0] in each else "not evaluated"
            for each in (evaluated, other_evaluated)
        ]
        rest = [f"and {len(unshared) - 1} more evaluations that only one has"] if len(unshared) > 1 else []
        subject = "an evaluation that only one of the runs has"
        yield divergence_in(other, every[unshared[0]], "done", subject, *values, more=rest)
    if not shared_checkpoints(baseline.run_dir, other.run_dir):
        saved = [_saved_steps(run.run_dir) for run in (baseline, other)]
        step = max(steps | other_steps, default=0)
        yield divergence_in(other, step, "done", "no checkpoint that both runs have", *saved)


def _steps_taken(trial: TrialRun) -> set[int]:
    return {
        step
        for attempt in trial.attempts
        for step, ranks in attempt.trace.steps.items()
        if sum("state" in entry for entry in ranks.values()) == attempt.trace.facts["world_size"]
    }


def _evaluated(trial: TrialRun) -> dict[tuple[str, str, int], int]:
    """Return the steps of a run's evaluations by (event, split, step), with 0 for the final one, of whichever step."""
    return {
        (row["event"], row["split"], row["step"] if row["event"] == "eval" else 0): row["step"]
        for row in RunDir(trial.run_dir).rows()
        if row["event"] in ("eval", "final")
    }


def _saved_steps(run_dir: Path) -> str:
    steps = sorted(info.step for info in list_checkpoints(RunDir(run_dir).checkpoints))
    return f"checkpoints of the steps {', '.join(map(str, steps))}" if steps else "no checkpoint"


def _compare_checkpoints(baseline: TrialRun, other: TrialRun) -> Iterator[Divergence]:
    """Yield how the earliest shared checkpoint that differs does, tensor by tensor."""
    for step, one, two in shared_checkpoints(baseline.run_dir, other.run_dir):
        try:
            found = difference(one, two)
        except CheckpointError as error:
            found = Difference((str(error),), (), ())
        if found.identical:
            continue
        lines = [*found.listing, *map(str, found.tensors)]
        if found.tensors:
            first = found.tensors[0]
            subject, values = first_differing_element(one, two, first.name)
            yield divergence_in(other, step, "checkpoint", subject, *values, gap=first.max_rel, more=lines)
        else:
            yield divergence_in(other, step, "checkpoint", "", one.name, lines[0], more=lines[1:])
        return


def first_differing_element(one: Path, other: Path, name: str) -> tuple[str, tuple[str, str]]:
    """Return (name and index, both values) of the first element of a tensor that differs in two checkpoints."""
    with Reader(one, verify=False) as a, Reader(other, verify=False) as b:
        for start, *both in chunks(a, b, name):
            x, y = (elements(raw, reader.spec(name).dtype) for raw, reader in zip(both, (a, b), strict=True))
            for place in np.flatnonzero(x != y)[:1]:
                return f"{name}, element {start + int(place)}", (repr(x[place].item()), repr(y[place].item()))
    return name, ("the same values", "the same values, in other bits")


def shared_checkpoints(one: Path, other: Path) -> list[tuple[int, Path, Path]]:
    """Return (step, path, path) of the checkpoints that both runs have, in order of steps."""
    ours, theirs = (
        {info.step: info.path for info in list_checkpoints(RunDir(run).checkpoints)} for run in (one, other)
    )
    return [(step, ours[step], theirs[step]) for step in sorted(ours.keys() & theirs.keys())]


def _suspects(
    reference: AttemptTrace, attempts: Sequence[AttemptTrace], divergence: Divergence
) -> list[tuple[str, str, str]]:
    """Return the state that no checkpoint holds and that differed in the two runs before the step.

    What differed in the first attempt as well, and made no difference there, was not lost by a resume: an instant, a
    process id. Random number generators stay, as one may be used now and then.
    """
    step = divergence.step if divergence.what != "start" else divergence.step + 1
    after = divergence.what in ("evaluation", "checkpoint")  # these come after the step
    rank = divergence.ranks[0] if divergence.ranks else 0
    found = _differing(reference, attempts[divergence.attempt], step, rank, after=after)
    if divergence.attempt > 0:
        innocent = {each[0] for each in _differing(reference, attempts[0], attempts[0].start_step + 1, rank)}
        found = [each for each in found if is_generator(each) or each[0] not in innocent]
    # state that changes at every step is a likelier cause than state that was set once
    changes = reference.hidden_changes(step, rank)
    return sorted(found, key=lambda suspect: -changes.get(suspect[0], 0))


def _differing(
    reference: AttemptTrace, trace: AttemptTrace, step: int, rank: int, *, after: bool = False
) -> list[tuple[str, str, str]]:
    ours, theirs = (each.hidden_before(step, rank, after=after) for each in (reference, trace))
    pairs = ((path, ours.get(path, "nothing"), theirs.get(path, "nothing")) for path in sorted(ours.keys() | theirs))
    return [each for each in pairs if each[1] != each[2]]


def is_generator(suspect: tuple[str, str, str]) -> bool:
    """Whether a suspect is a random number generator, which is enough to explain a difference."""
    return any("in state" in value for value in suspect[1:])


def _files(reference: AttemptTrace, attempts: Sequence[AttemptTrace]) -> list[tuple[str, str, str]]:
    """Return the files in which the user's code may keep state: those it writes and reads, else those it writes."""
    ours, here = reference.files, attempts[-1].files
    written = {path for trace in (reference, *attempts) for path, (_, wrote) in trace.files.items() if wrote}
    read: list[tuple[str, str, str]] = []
    kept: list[tuple[str, str, str]] = []
    for path in sorted(ours.keys() | here.keys()):
        one, two = (files.get(path, (None, False))[0] for files in (ours, here))
        if {one, two} == {None, "not there"}:
            continue  # a file that a run makes for itself
        pair = (one or "not read", two or "not read")
        if path in written and one != two:
            read.append((f"the file {path}, which training writes and reads", *pair))
        elif one and two and one != two:
            read.append((f"the file {path}, which something changed between the runs", *pair))
        elif path in written and path in ours and path in here:
            kept.append((f"the file {path}{WRITTEN_ONLY}", *pair))
    return read or kept


def relative_difference(a: float, b: float) -> float:
    """Return |a - b| relative to the larger of the two."""
    size = max(abs(a), abs(b))
    return abs(a - b) / size if size else 0.0


def _truncated(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
