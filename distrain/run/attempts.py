"""How far an attempt at a run came and what its seconds went to, kept when the next one begins. Imports no torch.

Heartbeats say it while an attempt lives, and those of the next replace them: so that one first adds a row with `event:
ended` to attempts.jsonl. What was written after the last heartbeat of a process that was killed is in metrics.jsonl.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice, takewhile
from typing import Any

from distrain.run.folder import RunDir
from distrain.run.heartbeat import Heartbeat, read_heartbeats
from distrain.run.json_files import rows_backwards

EVENT = "ended"
STEP = "step"
"""Seconds of steps that are not known by phase."""
_LOOKED_AT = 10_000
"""Rows after a heartbeat, at most."""


def how_it_ended(run: RunDir, attempt: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row of the run's last attempt, up to its last sign of life, from its heartbeats and metrics.jsonl."""
    begun = float(attempt["time"])
    beats = [beat for beat in read_heartbeats(run) if beat.time >= begun]
    # of ranks on other machines, whose clocks may differ, the first decides
    first = next((beat for beat in beats if beat.rank == 0), None)
    row = ended_row(attempt, first, _since(run, begun if first is None else first.time))
    energy = {str(beat.rank): beat.energy_wh for beat in beats if beat.energy_wh is not None}
    return row | ({"energy_wh": energy} if energy else {})


def _since(run: RunDir, time: float) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl that were written after a time, the oldest first."""
    last = takewhile(lambda row: float(row.get("time", 0.0)) > time, rows_backwards(run.metrics_path))
    return [*islice(last, _LOOKED_AT)][::-1]


def ended_row(attempt: Mapping[str, Any], beat: Heartbeat | None, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the row of an attempt; `beat` is rank 0's last one, and `rows` are those of metrics.jsonl after it."""
    begun, step = float(attempt["time"]), int(attempt["step"])
    done, reached, time = (0, step, begun) if beat is None else (beat.steps, max(beat.step, step), beat.time)
    phases = {} if beat is None else {phase: each for phase, each in beat.phases.items() if each > 0}
    trained = [row for row in rows if row["event"] == "train" and int(row["step"]) > reached]
    if rows:
        end = max(float(row["time"]) for row in rows)
        left = end - time
        evaluating = min(sum(float(row["seconds"]) for row in rows if row["event"] in ("eval", "final")), left)
        left -= evaluating
        further = {"evaluate": evaluating}
        if not done and trained:
            # before its first step
            steps = (int(trained[0]["step"]) - reached) * float(trained[0].get("step_s", 0.0))
            further["setup"] = min(max(float(trained[0]["time"]) - time - steps, 0.0), left)
            left -= further["setup"]
        further[STEP if trained or beat is None else beat.phase] = left
        for phase, seconds in further.items():
            phases[phase] = phases.get(phase, 0.0) + seconds
        time = end
    if further_steps := [int(row["step"]) for row in rows if row["event"] in ("train", "eval")]:
        done, reached = done + max(max(further_steps) - reached, 0), max(reached, *further_steps)
    if beat is not None and not beat.phases:
        phases = {}  # an earlier version did not note what its time went to
    first = None if beat is None else beat.first_step_s
    return {
        "event": EVENT,
        "token": attempt["token"],
        "time": time,
        "step": reached,
        "steps": done,
        "phases": phases,
        **({"first_step_s": first} if first is not None else {}),
    }
