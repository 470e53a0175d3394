"""What the time of a run went to, over all of its attempts; what it cost. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from distrain.run.attempts import EVENT, STEP, how_it_ended
from distrain.run.folder import RunDir
from distrain.run.heartbeat import STEP_PHASES
from distrain.run.json_files import read_rows

_TRAINING = (*STEP_PHASES, "callbacks", STEP)
_CHECKPOINT = ("save", "finish")


@dataclass(frozen=True)
class Goodput:
    """Seconds from the first attempt's beginning to the last sign of life; the parts add up to `total_s`."""

    total_s: float
    useful_s: float
    """Steps whose results the run has, with callbacks."""
    replayed_s: float
    """Steps that were trained again, as no checkpoint had them."""
    checkpoint_s: float
    """The loop's waits for checkpoints, the export at the end, and the restoring for a rollback."""
    start_s: float
    """From an attempt's taking of the run to its first step, and what compiling adds to that."""
    evaluation_s: float
    idle_s: float
    """Between attempts: the queue, the start of processes and their imports, and up to the interval of a heartbeat
    before a process was killed."""
    unknown_s: float
    """Of attempts of earlier versions, which did not note it."""
    steps: int
    """Optimizer steps whose results the run has, of those that it has trained itself."""
    replayed_steps: int
    attempts: int
    device_s: float
    """Seconds of all processes, each with its device, while an attempt was at work."""
    energy_wh: float | None
    """Watt-hours of all GPUs; None where no rank of some attempt knows it."""
    samples: int | None = None
    """Samples of `steps`; None where the batch is not known."""
    device_s_per_1000_samples: float | None = None
    energy_wh_per_1000_samples: float | None = None
    price: float | None = None
    """Of all device hours, where `log.gpu_hour_price` says what one costs."""
    price_per_1000_samples: float | None = None

    @property
    def share(self) -> float:
        """The useful part of the time, 0 to 1."""
        return self.useful_s / self.total_s if self.total_s > 0 else 0.0


def goodput(
    attempts: Sequence[Mapping[str, Any]],
    last: Mapping[str, Any] | None = None,
    *,
    global_batch_size: int | None = None,
    gpu_hour_price: float | None = None,
) -> Goodput | None:
    """Return it from the rows of attempts.jsonl; None where there is no attempt.

    `last` is how far the last attempt has come, as `how_it_ended` returns it; those before have their rows of `ended`.
    """
    begun = [row for row in attempts if "event" not in row]
    if not begun:
        return None
    ended = {row["token"]: row for row in reversed(attempts) if row.get("event") == EVENT}
    if last is not None:
        ended[last["token"]] = last
    parts = dict.fromkeys(("useful", "replayed", "checkpoint", "start", "evaluation", "idle", "unknown"), 0.0)
    steps = replayed = 0
    device_s, energy = 0.0, list[float | None]()
    for place, row in enumerate(begun):
        end, start = ended.get(row.get("token")), float(row["time"])
        following = begun[place + 1 :]
        until = float(following[0]["time"]) if following else None
        if end is None:
            # an earlier version did not note it, and it may have ended at any time before the next
            parts["unknown"] += max(until - start, 0.0) if until is not None else 0.0
            device_s += (max(until - start, 0.0) if until is not None else 0.0) * int(row.get("processes") or 1)
            energy.append(None)
            continue
        took = max(float(end["time"]) - start, 0.0)
        if until is not None:
            took = min(took, max(until - start, 0.0))
            parts["idle"] += max(until - start - took, 0.0)
        device_s += took * int(row.get("processes") or 1)
        energy.append(sum(end["energy_wh"].values()) if end.get("energy_wh") else None)
        first, reached, done = int(row["step"]), int(end["step"]), int(end["steps"])
        kept = max(min([reached, *(int(each["step"]) for each in following)]) - first, 0)
        steps, replayed = steps + kept, replayed + max(done - kept, 0)
        for part, seconds in _split(end, took, kept / done if done else 0.0).items():
            parts[part] += seconds
    known = [each for each in energy if each is not None]
    found = Goodput(
        total_s=sum(parts.values()),
        useful_s=parts["useful"],
        replayed_s=parts["replayed"],
        checkpoint_s=parts["checkpoint"],
        start_s=parts["start"],
        evaluation_s=parts["evaluation"],
        idle_s=parts["idle"],
        unknown_s=parts["unknown"],
        steps=steps,
        replayed_steps=replayed,
        attempts=len(begun),
        device_s=device_s,
        energy_wh=sum(known) if known and len(known) == len(energy) else None,
    )
    return _with_costs(found, global_batch_size, gpu_hour_price)


def _split(end: Mapping[str, Any], took: float, share: float) -> dict[str, float]:
    """Return what the `took` seconds of an attempt went to; `share` of its steps are useful."""
    phases: Mapping[str, float] = end["phases"]
    if not phases:
        return {"unknown" if end["steps"] else "start": took}
    training = sum(phases.get(phase, 0.0) for phase in _TRAINING)
    further = {
        "checkpoint": sum(phases.get(phase, 0.0) for phase in _CHECKPOINT),
        "evaluation": phases.get("evaluate", 0.0),
    }
    done, first = int(end["steps"]), end.get("first_step_s")
    compiling = max(first - (training - first) / (done - 1), 0.0) if first is not None and done > 1 else 0.0
    training -= compiling
    known = training + sum(further.values())
    if known > took:  # a clock was set back: what was measured counts, in its proportion
        factor = took / known
        training, further = training * factor, {part: seconds * factor for part, seconds in further.items()}
        known = took
    return further | {"useful": training * share, "replayed": training * (1 - share), "start": took - known}


def _with_costs(found: Goodput, global_batch_size: int | None, gpu_hour_price: float | None) -> Goodput:
    price = found.device_s / 3600 * gpu_hour_price if gpu_hour_price is not None else None
    samples = found.steps * global_batch_size if global_batch_size is not None else None
    if not samples:
        return replace(found, samples=samples, price=price)

    def each(total: float | None) -> float | None:
        return None if total is None else 1000 * total / samples

    return replace(
        found,
        samples=samples,
        price=price,
        device_s_per_1000_samples=each(found.device_s),
        energy_wh_per_1000_samples=each(found.energy_wh),
        price_per_1000_samples=each(price),
    )


def goodput_of(
    run: RunDir, *, global_batch_size: int | None = None, gpu_hour_price: float | None = None
) -> Goodput | None:
    """Return it for a run, up to its last sign of life; None before its first attempt, and where a row is damaged."""
    try:
        rows = [*read_rows(run.attempts_path)]
        begun = [row for row in rows if "event" not in row]
        last = how_it_ended(run, begun[-1]) if begun else None
        return goodput(rows, last, global_batch_size=global_batch_size, gpu_hour_price=gpu_hour_price)
    except (KeyError, TypeError, ValueError):
        return None
